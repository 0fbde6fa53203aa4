r"""Print the table of docs/ablation.md: rows 1 to 13 of the paper's ablation, as SmolLM2 trains them on a CPU.

    rlvr sweep -m seed_everything=0,1,2 experiment=paper/cpu/row1,paper/cpu/row2,...,paper/cpu/row13 \
               trainer.max_steps=25 hydra.sweep.dir=runs/ablation
    python benchmarks/ablation.py runs/ablation [--json]

Reads what the jobs left, of one sweep or of several in one folder. Means over seeds, with 95 % intervals (Student's t).
"""

import argparse
import json
import re
from pathlib import Path

from rlvr_lightning.sweep_report import last_value, mean_and_interval, read_jobs

PAPER = {
    1: ("nothing", 39.8),
    2: ("PG", 71.8),
    3: ("PG, WD", 71.4),
    4: ("PG, WD, KL", 70.8),
    5: ("PG, WD, KL, entropy", 74.8),
    6: ("PG, WD, KL, 3 x entropy", 73.6),
    7: ("PG, entropy", 75.6),
    8: ("WD, KL", 39.0),
    9: ("WD, KL, entropy", 65.4),
    10: ("entropy", 63.4),
    11: ("all, label off by a little", 73.4),
    12: ("all, wrong label that can be guessed", 57.0),
    13: ("all, wrong label that cannot", 64.4),
}
"""Row -> its terms, and MATH500 in arXiv 2504.20571, Table 5 (each row's best checkpoint)."""
SETS = ("addition_1digit", "subtraction_1digit", "addition_2digit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweep, or of several")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    runs: dict[int, list[Path]] = {}
    for job in read_jobs(args.folder):
        if (row := re.fullmatch(r"paper/cpu/row(\d+)", job.overrides.get("experiment", ""))) and job.status == 0:
            runs.setdefault(int(row[1]), []).append(job.folder)
    found = {}
    for row in sorted(runs):
        values = {name: [last_value(run, f"val/{name}/accuracy") for run in runs[row]] for name in SETS}
        values |= {"reward": [last_value(run, "rollout/reward") for run in runs[row]]}
        values |= {"entropy": [last_value(run, "train/entropy") for run in runs[row]]}
        found[row] = {name: mean_and_interval([v for v in each if v is not None]) for name, each in values.items()}
        found[row]["seeds"] = (len(runs[row]), None)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    heads = ("row", "terms", "other sums", "differences", "two-digit sums", "training reward", "entropy", "paper, MATH500")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for row, of in found.items():
        cells = [f"{of[name][0]:.2f}" + (f" +- {of[name][1]:.2f}" if of[name][1] is not None else "") for name in SETS]
        cells += [f"{of['reward'][0]:.2f}", f"{of['entropy'][0]:.2f}"]
        print(f"| {row} | {PAPER[row][0]} | {' | '.join(cells)} | {PAPER[row][1]} |")


if __name__ == "__main__":
    main()
