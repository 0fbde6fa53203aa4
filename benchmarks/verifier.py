"""Grade the labelled pairs of benchmarks/verifier_pairs.jsonl and print who judges them right, kind by kind.

    python benchmarks/verifier.py [--graders math math-verify paper-train paper-eval] [--mistakes] [--json FILE]

``math-verify`` is that library by itself, called on the whole response with its own defaults. It is this module's
``extract`` and ``compare``, run by the same Verifier as the other graders: in a process that is killed after ``--timeout``.
A pair is judged right if its reward is the label, whatever the reason.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvr_lightning.grading.verdict import Verdict
from rlvr_lightning.records import Completion, Problem, Reason
from rlvr_lightning.verify import Verifier

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "verifier_pairs.jsonl"
GRADERS = {"math": "math", "math-verify": "benchmarks.verifier", "paper-train": "paper-train", "paper-eval": "paper-eval"}


@dataclass(frozen=True)
class Pair:
    """One row of the table."""

    kind: str
    ground_truth: str
    response: str
    correct: bool
    """The label: whether the response deserves the reward."""
    note: str = ""

    def item(self) -> tuple[Problem, Completion]:
        """Return what a Verifier takes."""
        return Problem("table", "?", self.ground_truth), Completion((), (), self.response, "stop")


def read_table() -> list[Pair]:
    """Return every row of benchmarks/verifier_pairs.jsonl, in order."""
    return [Pair(**json.loads(line)) for line in TABLE.read_text(encoding="utf-8").splitlines()]


def extract(response: str) -> str | None:
    """Return the whole response: math-verify looks for the answer itself."""
    return response


def compare(ground_truth: str, extracted: str) -> Verdict:
    """Return the verdict of math-verify's parse and verify, the ground truth in a box (as verl calls it)."""
    from math_verify import parse, verify

    return "correct" if verify(parse(rf"\boxed{{{ground_truth}}}"), parse(extracted)) else "wrong"


def judge(pairs: list[Pair], grader: str, timeout_s: float) -> tuple[list[Reason], list[float]]:
    """Return the reason for each verdict, and its seconds; the worker's start is not counted."""
    verifier = Verifier(GRADERS[grader], timeout_s=timeout_s)
    reasons, seconds = [], []
    try:
        verifier([Pair("", "1", r"\boxed{2}", correct=False).item()])
        for pair in pairs:
            start = time.perf_counter()
            reasons.append(verifier([pair.item()])[0].reason)
            seconds.append(time.perf_counter() - start)
    finally:
        verifier.close()
    return reasons, seconds


def summarize(pairs: list[Pair], reasons: list[Reason]) -> dict[str, Any]:
    """Return the counts and shares of one set of verdicts."""
    wrongly_accepted = sum(r == "correct" and not p.correct for p, r in zip(pairs, reasons, strict=True))
    wrongly_refused = sum(r != "correct" and p.correct for p, r in zip(pairs, reasons, strict=True))
    return {
        "pairs": len(pairs),
        "accuracy": 1 - (wrongly_accepted + wrongly_refused) / len(pairs),
        "false_positives": wrongly_accepted,
        "false_negatives": wrongly_refused,
    }


def report(pairs: list[Pair], reasons: list[Reason], seconds: list[float]) -> dict[str, Any]:
    """Return one grader's results: over all pairs, by kind, the time that verdicts take, and every mistake."""
    kinds: dict[str, list[int]] = {}
    for row, pair in enumerate(pairs):
        kinds.setdefault(pair.kind, []).append(row)
    return {
        **summarize(pairs, reasons),
        "reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "seconds": {
            "total": sum(seconds),
            "median": statistics.median(seconds),
            "p99": statistics.quantiles(seconds, n=100, method="inclusive")[98],
            "max": max(seconds),
        },
        "kinds": {kind: summarize([pairs[r] for r in rows], [reasons[r] for r in rows]) for kind, rows in kinds.items()},
        "mistakes": [
            {"row": row, "reason": reason, **vars(pair)}
            for row, (pair, reason) in enumerate(zip(pairs, reasons, strict=True), 1)
            if (reason == "correct") != pair.correct
        ],
    }


def print_tables(results: dict[str, dict[str, Any]]) -> None:
    """Print accuracy by kind with (false positives, false negatives), then the time."""
    print("| kind | pairs | " + " | ".join(results) + " |")
    print("|---" * (2 + len(results)) + "|")
    first = next(iter(results.values()))
    rows = {"all": results} | {kind: {g: r["kinds"][kind] for g, r in results.items()} for kind in first["kinds"]}
    for kind, cells in rows.items():
        texts = [f"{c['accuracy']:.1%} (+{c['false_positives']} -{c['false_negatives']})" for c in cells.values()]
        print(f"| {kind} | {next(iter(cells.values()))['pairs']} | " + " | ".join(texts) + " |")
    print("\n+n: wrong answers accepted, -n: right answers refused.\n")
    for grader, result in results.items():
        times = ", ".join(f"{name} {value:.4f} s" for name, value in result["seconds"].items())
        print(f"{grader}: {times}; {result['reasons']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graders", nargs="+", choices=list(GRADERS), default=list(GRADERS))
    parser.add_argument("--kinds", nargs="+", help="only these kinds of pairs")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds per verdict")
    parser.add_argument("--mistakes", action="store_true", help="print every pair that a grader judges against its label")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # the workers inherit it, and find `benchmarks.verifier`
    pairs = [pair for pair in read_table() if not args.kinds or pair.kind in args.kinds]
    if not pairs:
        parser.error(f"no pair is of a kind in {args.kinds}; see the kinds in {TABLE.name}")
    results = {grader: report(pairs, *judge(pairs, grader, args.timeout)) for grader in args.graders}
    print_tables(results)
    if args.mistakes:
        for grader, result in results.items():
            for mistake in result["mistakes"]:
                print(json.dumps({"grader": grader, **mistake}, ensure_ascii=False))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
