r"""Print the table of docs/ablation.md: rows 1 to 13 of the paper's ablation, as SmolLM2 trains them on a CPU.

    rlvr sweep -m seed_everything=0,1,2 experiment=$(echo paper/cpu/row{1..13} | tr ' ' ,) \
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


SEEDS = Path(__file__).with_name("ablation.json")
"""Row -> seed -> last values, of every run that was made for the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="of sweeps: their runs are added to benchmarks/ablation.json")
    parser.add_argument("--json", action="store_true", help="print the content of that file instead of a table")
    args = parser.parse_args()
    found: dict[str, dict[str, dict[str, float | None]]] = json.loads(SEEDS.read_text()) if SEEDS.is_file() else {}
    for job in (job for folder in args.folders for job in read_jobs(folder)):
        row = re.fullmatch(r"paper/cpu/row(\d+)", job.overrides.get("experiment", ""))
        minimises = float(job.overrides.get("model.objective.entropy_coef", 0)) < 0  # the paper has no such row
        if row and job.status == 0 and not minimises:
            keys = {name: f"val/{name}/accuracy" for name in SETS} | {"reward": "rollout/reward", "entropy": "train/entropy"}
            values = {name: last_value(job.folder, key) for name, key in keys.items()}
            found.setdefault(row[1], {})[job.overrides["seed_everything"]] = values
    if args.folders:
        ordered = {row: dict(sorted(found[row].items())) for row in sorted(found, key=int)}
        SEEDS.write_text(json.dumps(ordered, indent=1) + "\n")
        found = ordered
    if args.json:
        print(json.dumps(found, indent=2))
        return
    heads = ("row", "terms", "seeds", "other sums", "differences", "two-digit sums", "reward", "entropy", "paper, MATH500")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for row, seeds in found.items():
        cells = [str(len(seeds))]
        for name in (*SETS, "reward", "entropy"):
            mean, half_width = mean_and_interval([value for run in seeds.values() if (value := run[name]) is not None])
            cells.append(f"{mean:.2f}" + (f" +- {half_width:.2f}" if half_width is not None and name in SETS else ""))
        print(f"| {row} | {PAPER[int(row)][0]} | {' | '.join(cells)} | {PAPER[int(row)][1]} |")


if __name__ == "__main__":
    main()
