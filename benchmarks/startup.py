"""Measure how long `rlvr quickstart` takes to its first training step, and where that time goes.

    python benchmarks/startup.py [--runs 5] [--engine vllm] [--json]

Each run is the real command in a process of its own, ended after its first step. Times are seconds from the start of the
process to a line of its output: the policy is loaded before the first evaluation set is named, then the engine starts, takes
the weights and evaluates. `first_step` is the time of that step's line in metrics.jsonl, whose `time/...` keys follow.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARKS = {"evaluation ": "policy_loaded", "eval at step 0": "evaluated", "training on": "training", "step ": "first_step"}
"""How a line of output begins -> what has happened when it first appears."""


def measure(engine: str) -> dict[str, float]:
    """Run the command until its first step has ended; return the seconds after which each mark was passed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable,
            "-u",
            "-m",
            "rlvr_lightning",
            "quickstart",
            "--engine",
            engine,
            "--steps",
            "1",
            "--out",
            str(out),
        ]
        seconds: dict[str, float] = {}
        started, wall = time.perf_counter(), time.time()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                for beginning, mark in MARKS.items():
                    if line.startswith(beginning):
                        seconds.setdefault(mark, time.perf_counter() - started)
        if process.returncode or "first_step" not in seconds:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode} before its first step")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    step = next(row for row in rows if "time/step_s" in row)
    seconds["first_step"] = step["time"] - wall
    return seconds | {key: value for key, value in step.items() if key.startswith("time/")}


def command_seconds(*args: str) -> float:
    """Return how long ``rlvr ARGS`` takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rlvr_lightning", *args], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, everything else on stderr")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs must be positive")
    help_seconds = [command_seconds("--help") for _ in range(args.runs)]
    fit_help_seconds = [command_seconds("fit", "--help") for _ in range(args.runs)]
    runs = [measure(args.engine) for _ in range(args.runs)]
    result: dict[str, Any] = {
        "engine": args.engine,
        "cores": len(os.sched_getaffinity(0)),
        "help_s": statistics.median(help_seconds),
        "fit_help_s": statistics.median(fit_help_seconds),
        "first_step_s": statistics.median(run["first_step"] for run in runs),
        "first_step_runs_s": sorted(run["first_step"] for run in runs),
        "timeline_s": {key: statistics.median(run[key] for run in runs) for key in runs[0]},
    }
    where = sys.stderr if args.json else sys.stdout
    print(f"rlvr --help {result['help_s']:.2f} s, rlvr fit --help {result['fit_help_s']:.1f} s", file=where)
    print(f"rlvr quickstart, medians of {args.runs}:", file=where)
    for key, value in result["timeline_s"].items():
        print(f"  {key:<20} {value:7.2f} s", file=where)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
