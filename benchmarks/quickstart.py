"""Run the quickstart once per seed and print the table of docs/quickstart.md.

    python benchmarks/quickstart.py --seeds 0 1 2 --engine vllm --out runs/seeds [--json]

Runs one after the other: two at once on two cores slow each other down far more than twofold.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SETS = ("addition_1digit", "subtraction_1digit", "addition_2digit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--question", default="What is 3 + 4?")
    parser.add_argument("--answer", default="7")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    summaries = []
    for seed in args.seeds:
        out = args.out / f"{args.engine}-seed{seed}"
        command = [sys.executable, "-m", "rlvr_lightning", "quickstart", "--seed", str(seed), "--engine", args.engine]
        command += ["--question", args.question, "--answer", args.answer, "--steps", str(args.steps), "--out", str(out)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        summaries.append(json.loads((out / "summary.json").read_text()))
    if args.json:
        print(json.dumps({"runs": summaries}, indent=2))
        return
    print("| engine | problem | seed | " + " | ".join(SETS) + " | seconds total | seconds per step |")
    print("|---" * (5 + len(SETS)) + "|")
    for s in summaries:
        cells = [f"{s['accuracy_before'][n]:.2f} -> {s['accuracy_after'][n]:.2f}" for n in SETS]
        per_step = s["seconds_training"] / s["steps"]
        row = [
            s["engine"],
            s["train_problem"]["question"],
            str(s["seed"]),
            *cells,
            f"{s['seconds_total']:.0f}",
            f"{per_step:.1f}",
        ]
        print("| " + " | ".join(row) + " |")
    medians = [f"{statistics.median(s['accuracy_after'][n] for s in summaries):.2f}" for n in SETS]
    print(f"\nmedian after: {', '.join(f'{n} {m}' for n, m in zip(SETS, medians, strict=True))}")


if __name__ == "__main__":
    main()
