"""A sweep's table: settings without their seeds, means with intervals, and failed jobs in plain sight."""

import json
import math
import random
from pathlib import Path

import pytest

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.jsonl import append_lines
from rlvr_lightning.sweep import check_metric
from rlvr_lightning.sweep_report import Job, last_value, mean_and_interval, read_jobs, report, settings_of, summarize


def make_job(root: Path, number: int, overrides: dict[str, str], accuracy: float | None, status: int = 0) -> Job:
    job = Job(root / str(number), number, overrides, status)
    job.save()
    if accuracy is not None:
        rows = [{"step": 0, "val/sums/accuracy": 0.1}, {"step": 1, "rollout/reward": 0.5, "train/entropy": 0.25}]
        append_lines(job.folder / "metrics.jsonl", [*rows, {"step": 1, "val/sums/accuracy": accuracy}])
    return job


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two coefficients on two seeds; one job failed. All share an override."""
    for number, (coefficient, seed, accuracy) in enumerate([("0", 0, 0.5), ("0", 1, 0.7), ("0.1", 0, 0.2), ("0.1", 1, None)]):
        overrides = {"experiment": "quickstart", "model.objective.entropy_coef": coefficient, "seed_everything": str(seed)}
        make_job(tmp_path, number, overrides, accuracy, status=0 if accuracy is not None else 2)
    return tmp_path


def test_seeds_of_a_setting_are_averaged_and_failures_counted(sweep: Path) -> None:
    rows = summarize(read_jobs(sweep))
    assert [(row["setting"], row["jobs"], row["failed"]) for row in rows] == [
        ("entropy_coef=0", 2, []), ("entropy_coef=0.1", 2, [3])
    ]  # fmt: skip
    assert rows[0]["last"]["val/sums/accuracy"] == (pytest.approx(0.6), pytest.approx(1.2706, abs=1e-3))
    assert rows[1]["last"]["val/sums/accuracy"] == (0.2, None)


def test_the_report_is_a_table_a_figure_and_the_failed_jobs(sweep: Path) -> None:
    told = report(sweep).splitlines()
    assert told[0].split() == ["setting", "jobs", "sums", "rollout/reward", "train/entropy"]
    assert told[1].split() == ["entropy_coef=0", "2", "0.600", "+-", "1.271", "0.500", "+-", "0.000", "0.250", "+-", "0.000"]
    assert told[2].split() == ["entropy_coef=0.1", "1/2", "0.200", "0.500", "0.250"]
    assert told[3] == f"job 3 failed with exit status 2: {sweep / '3'}"
    assert [row["setting"] for row in json.loads((sweep / "table.json").read_text())] == ["entropy_coef=0", "entropy_coef=0.1"]
    assert (sweep / "figure.png").stat().st_size > 10_000


def test_a_sweep_in_which_all_failed_still_says_so(tmp_path: Path) -> None:
    make_job(tmp_path, 0, {"trainer.max_steps": "0"}, None, status=2)
    told = report(tmp_path).splitlines()
    assert told[1].split() == ["all", "jobs", "0/1"]
    assert "job 0 failed" in told[2]


def test_jobs_without_a_varied_setting_are_one(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, n, {"seed_everything": str(n)}, 0.5) for n in range(11)]
    assert {name: len(found) for name, found in settings_of(jobs).items()} == {"all jobs": 11}
    assert [job.number for job in read_jobs(tmp_path)] == list(range(11))  # by number, not by name


def test_the_last_value_of_a_metric(sweep: Path) -> None:
    assert last_value(sweep / "0", "val/sums/accuracy") == 0.5
    assert last_value(sweep / "0", "val/none/accuracy") is None


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_interval_covers_the_truth_as_often_as_it_says(n: int) -> None:
    draw = random.Random(n)
    hits = 0
    for _ in range(4000):
        mean, half = mean_and_interval([draw.gauss(0.4, 0.1) for _ in range(n)])
        assert half is not None
        hits += abs(mean - 0.4) <= half
    assert math.isclose(hits / 4000, 0.95, abs_tol=0.015)
    assert mean_and_interval([0.3]) == (0.3, None)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("val/sums/accuracy", None),
        ("rollout/reward", None),
        ("critic/explained_variance", None),
        ("val/products/accuracy", "the evaluation sets are sums, differences: name one of them"),
        ("accuracy", "name a metric of docs/metrics.md"),
        ("valid/sums/accuracy", "name a metric of docs/metrics.md"),
        ("rollout/", "name a metric of docs/metrics.md"),
    ],
)
def test_a_metric_that_no_job_would_log_is_refused_before_the_first_job(key: str, message: str | None) -> None:
    if message is None:
        check_metric(key, ["sums", "differences"])
    else:
        with pytest.raises(ConfigError, match=message):
            check_metric(key, ["sums", "differences"])
