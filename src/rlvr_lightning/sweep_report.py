"""What a sweep came to: a table and a figure over its jobs, with the seeds of a setting averaged. Reads files, never trainers.

Legend: a setting is what a job overrides, without its seed; ``n`` seeds of a setting.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlvr_lightning.jsonl import read_jsonl
from rlvr_lightning.plots import plot_settings, read_curves

SEED = "seed_everything"
# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; 1.96 beyond is at most 4 % too narrow.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
      2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One job of a sweep, as it stands on the disk."""

    folder: Path
    number: int
    overrides: Mapping[str, str]
    """Key -> value, as on the command line."""
    status: int
    """Exit status; 0 is success."""

    def save(self) -> None:
        """Write ``job.json`` into the job's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"number": self.number, "overrides": dict(self.overrides), "status": self.status}
        (self.folder / "job.json").write_text(json.dumps(content, indent=2) + "\n")


def read_jobs(folder: Path) -> list[Job]:
    """Return the jobs below a sweep's folder that have ended, by number."""
    found = []
    for file in folder.glob("**/job.json"):
        content = json.loads(file.read_text())
        found.append(Job(file.parent, content["number"], content["overrides"], content["status"]))
    return sorted(found, key=lambda job: job.number)


def last_value(folder: Path, key: str) -> float | None:
    """Return the last value that a run logged under ``key``; None if there is none."""
    values = [row[key] for row in read_jsonl(folder / "metrics.jsonl") if row.get(key) is not None]
    return values[-1] if values else None


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half-width of its 95 % interval (Student's t); None for a single value.

    >>> [round(value, 4) for value in mean_and_interval([0.5, 0.7])]
    [0.6, 1.2706]
    """
    n = len(values)
    if n < 2:
        return fmean(values), None
    t = _T[n - 2] if n - 2 < len(_T) else 1.96
    return fmean(values), t * stdev(values) / sqrt(n)


def settings_of(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Return setting -> its jobs, in order; a setting names the overrides that differ between jobs, without the seed."""
    varied = [
        key
        for key in dict.fromkeys(key for job in jobs for key in job.overrides)
        if key != SEED and len({job.overrides.get(key) for job in jobs}) > 1
    ]
    found: dict[str, list[Job]] = {}
    for job in jobs:
        name = " ".join(f"{key.rsplit('.', 1)[-1]}={job.overrides.get(key, 'default')}" for key in varied)
        found.setdefault(name or "all jobs", []).append(job)
    return found


def summarize(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return one row per setting: how many jobs succeeded, and mean and interval of each curve's last value.

    Columns: accuracy of every evaluation set, training reward, entropy. Jobs that failed are counted, not averaged.
    """
    rows = []
    for setting, members in settings_of(jobs).items():
        good = [read_curves(job.folder) for job in members if job.status == 0]
        sets = sorted({key for curves in good for key in curves if key.startswith("val/") and key.count("/") == 2})
        keys = [key for key in sets if key.endswith("/accuracy")] + ["rollout/reward", "train/entropy"]
        values = {key: [curves[key][-1][1] for curves in good if key in curves] for key in keys}
        rows.append(
            {
                "setting": setting,
                "jobs": len(members),
                "failed": [job.number for job in members if job.status],
                "last": {key: mean_and_interval(found) for key, found in values.items() if found},
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as aligned text: mean, and +- the half-width of its interval where there are several seeds."""
    keys = list(dict.fromkeys(key for row in rows for key in row["last"]))
    head = ["setting", "jobs", *(key.removeprefix("val/").removesuffix("/accuracy") for key in keys)]
    body = [[row["setting"], _jobs(row), *(_cell(row["last"].get(key)) for key in keys)] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    padded = (zip(line, widths, strict=True) for line in [head, *body])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in padded)


def report(folder: Path) -> str:
    """Write ``table.json`` and ``figure.png`` of a sweep's folder; return the table, and which jobs failed."""
    jobs = read_jobs(folder)
    rows = summarize(jobs)
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    curves = {s: [read_curves(job.folder) for job in members if not job.status] for s, members in settings_of(jobs).items()}
    plot_settings({setting: found for setting, found in curves.items() if found}, folder / "figure.png")
    failed = [f"job {job.number} failed with exit status {job.status}: {job.folder}" for job in jobs if job.status]
    return "\n".join([table(rows), *failed, f"written: {folder / 'table.json'}, {folder / 'figure.png'}"])


def _jobs(row: Mapping[str, Any]) -> str:
    return f"{row['jobs'] - len(row['failed'])}/{row['jobs']}" if row["failed"] else str(row["jobs"])


def _cell(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    mean, half_width = value
    return f"{mean:.3f}" if half_width is None else f"{mean:.3f} +- {half_width:.3f}"
