r"""Measure how many completions per second one worker grades when none was seen before, and where the time goes.

    python benchmarks/grading.py [--grader math] [--pairs 2000] [--repetitions 5] [--json FILE]

The pairs are what training meets most: integers, decimals, fractions and roots in a box after some text, half of them right,
half of them off by one. No pair repeats, and every repetition takes a fresh Verifier, so the memo never helps. While a worker
compares its parent waits, so the two together keep one core busy: verdicts per second are per core.

`extract` and `compare` are timed in this process; `pipe` is the rest: messages to the worker, locks, records.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlvr_lightning.grading import load_grader
from rlvr_lightning.records import Completion, Problem
from rlvr_lightning.verify import Verifier

TEXT = "First we write down what is given. Then $x^2 = {n}$ has to hold, and the two cases $x > 0$ and $x < 0$ remain.\n" * 4
FORMS: tuple[Callable[[int, int], tuple[str, str]], ...] = (
    lambda n, off: (str(n), f"{n + off}.0"),
    lambda n, off: (f"{n}.5", rf"\frac{{{2 * (n + off) + 1}}}{{2}}"),
    lambda n, off: (rf"\frac{{{n}}}{{7}}", rf"\dfrac{{{3 * (n + off)}}}{{21}}"),
    lambda n, off: (rf"{n}\sqrt{{2}}", rf"\sqrt{{2}} \cdot {n + off}"),
)
"""Ground truth and answer, equal if ``off`` is 0."""


def make_pairs(count: int) -> list[tuple[Problem, Completion]]:
    """Return distinct pairs, every form equally often; every other round of the forms is wrong."""
    pairs = []
    for i in range(count):
        n, form = divmod(i, len(FORMS))
        ground_truth, answer = FORMS[form](n + 2, n % 2)
        text = TEXT.replace("{n}", str(n)) + rf"So the answer is $\boxed{{{answer}}}$."
        pairs.append((Problem(str(i), "?", ground_truth), Completion((), (), text, "stop")))
    return pairs


def measure(pairs: list[tuple[Problem, Completion]], name: str) -> dict[str, float]:
    """Return seconds per verdict: all of it, and its parts."""
    grader = load_grader(name)
    verifier = Verifier(name)
    try:
        verifier([(Problem("warm-up", "?", "1"), Completion((), (), r"\boxed{2}", "stop"))])  # the worker starts here
        start = time.perf_counter()
        scores = verifier(pairs)
        total = time.perf_counter() - start
    finally:
        verifier.close()
    if name == "math" and sum(score.correct for score in scores) != (len(pairs) // len(FORMS) + 1) // 2 * len(FORMS):
        raise SystemExit("the verdicts are wrong, so their speed means nothing")
    start = time.perf_counter()
    extracted = [grader.extract(completion.text) or "" for _, completion in pairs]
    extraction = time.perf_counter() - start
    start = time.perf_counter()
    for (problem, _), answer in zip(pairs, extracted, strict=True):
        grader.compare(problem.answer, answer)
    comparison = time.perf_counter() - start
    seconds = {"total": total, "extract": extraction, "compare": comparison, "pipe": total - extraction - comparison}
    return {part: value / len(pairs) for part, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grader", default="math")
    parser.add_argument("--pairs", type=int, default=2000, help="a multiple of 4")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    if args.pairs < len(FORMS) or args.pairs % len(FORMS) or args.repetitions < 1:
        parser.error(f"--pairs must be a positive multiple of {len(FORMS)}, and --repetitions positive")
    pairs = make_pairs(args.pairs)
    runs = [measure(pairs, args.grader) for _ in range(args.repetitions)]
    medians = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    speeds = sorted(1 / run["total"] for run in runs)
    result: dict[str, Any] = {
        "grader": args.grader,
        "pairs": args.pairs,
        "verdicts_per_s": statistics.median(speeds),
        "verdicts_per_s_runs": speeds,
        "microseconds_per_verdict": {part: 1e6 * seconds for part, seconds in medians.items()},
    }
    print(f"{args.grader}: {result['verdicts_per_s']:.0f} verdicts/s per core, median of {args.repetitions} runs", end=" ")
    print(f"({speeds[0]:.0f} to {speeds[-1]:.0f}) of {args.pairs} unseen pairs")
    print(", ".join(f"{part} {value:.0f} us" for part, value in result["microseconds_per_verdict"].items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
