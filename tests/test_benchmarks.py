"""The scripts in benchmarks/ parse their command lines, and what they compute from measurements is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
WORKERS = {"rlvr_worker", "trl_worker"}  # started by other scripts, without options
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in WORKERS)


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FOLDER / f"{script}.py", *args], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_opens_with_what_the_script_does_and_its_command(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{script}.py" in done.stdout


@pytest.mark.parametrize("args", [("vs_trl", "--steps", "0"), ("time_to_accuracy", "--max-steps", "7")])
def test_bad_counts_are_refused_before_anything_starts(args: tuple[str, ...]) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert args[1] in done.stderr


def step(number: int, seconds: float) -> dict:
    return {
        "kind": "step",
        "step": number,
        "seconds": seconds,
        "tokens": 700 + number,
        "reward": 0.5,
        "peak_gib": {"host": 2.0},
    }


def evaluation(number: int, accuracy: float) -> dict:
    return {"kind": "evaluation", "step": number, "accuracy": accuracy, "seconds": 99.0, "peak_gib": {"host": 3.0}}


def test_time_to_accuracy_sums_the_steps_until_the_first_evaluation_that_reaches_the_target() -> None:
    from time_to_accuracy import summarize

    records = [step(1, 10.0), step(2, 4.0), evaluation(2, 0.79), step(3, 5.0), step(4, 6.0), evaluation(4, 0.8), step(5, 7.0)]
    summary = summarize(records, target=0.8, startup_s=30.0)
    assert summary["steps"] == 4
    assert summary["training_s"] == 25.0  # 10 + 4 + 5 + 6: no evaluation, no fifth step
    assert summary["with_startup_s"] == 55.0
    assert [(point["training_s"], point["accuracy"]) for point in summary["curve"]] == [(14.0, 0.79), (25.0, 0.8)]
    assert summarize(records, target=0.9, startup_s=30.0)["training_s"] is None


def test_step_summary_leaves_out_the_warm_up_step(tmp_path: Path) -> None:
    from vs_trl import TrainerProcess, compare_steps, summarize_steps

    ours, trl = TrainerProcess("ours", [], tmp_path), TrainerProcess("trl", [], tmp_path)
    ours.records = [step(1, 100.0), step(2, 1.0), step(3, 3.0), step(4, 2.0), {"kind": "end", "peak_gib": {"host": 5.0}}]
    trl.records = [step(1, 0.1), step(2, 9.0), step(3, 8.0), step(4, 7.0), {"kind": "end", "peak_gib": {"host": 10.0}}]
    assert summarize_steps(ours)["step_s"] == 2.0
    assert compare_steps(summarize_steps(ours), summarize_steps(trl)) == {"speedup": 4.0, "peak_memory_ratio": 0.5}


WORKER = """
import sys, time
sys.path.insert(0, {folder!r})
from vs_trl import Gate
gate = Gate()
print("noise")
for tokens in (1, 2, 3):
    gate.wait()
    gate.note(tokens=tokens, reward=0.0)
gate.finish()
{end}
"""


def test_a_worker_steps_when_told_and_its_clock_stands_still_while_it_waits(tmp_path: Path) -> None:
    from vs_trl import TrainerProcess, take_turns

    code = WORKER.format(folder=str(FOLDER), end="gate.emit(kind='end')")
    processes = [TrainerProcess(name, [sys.executable, "-c", code], tmp_path) for name in ("ours", "trl")]
    take_turns(processes)
    for process in processes:
        assert [record["tokens"] for record in process.of("step")] == [1, 2, 3]
        assert process.of("step")[1]["seconds"] < 1
        assert process.of("end")[0]["peak_gib"]["host"] > 0
        assert "noise" in (tmp_path / f"{process.name}.log").read_text()
    turns = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    steps = [(record["trainer"], record["step"]) for record in turns if record["kind"] == "step"]
    assert steps == [("ours", 1), ("trl", 1), ("ours", 2), ("trl", 2), ("ours", 3), ("trl", 3)]


def test_a_trainer_that_is_done_is_stopped_where_it_waits(tmp_path: Path) -> None:
    from vs_trl import TrainerProcess, take_turns

    process = TrainerProcess("ours", [sys.executable, "-c", WORKER.format(folder=str(FOLDER), end="")], tmp_path)
    take_turns([process], done=lambda one: len(one.of("step")) == 1)
    assert [record["step"] for record in process.of("step")] == [1]


def test_a_worker_that_dies_is_an_error_that_shows_its_log(tmp_path: Path) -> None:
    from vs_trl import TrainerProcess, take_turns

    code = WORKER.format(folder=str(FOLDER), end="raise RuntimeError('out of luck')")
    with pytest.raises(SystemExit, match="out of luck"):
        take_turns([TrainerProcess("trl", [sys.executable, "-c", code], tmp_path)])


def test_the_pinned_version_of_trl_names_its_environment() -> None:
    from vs_trl import REQUIREMENTS, trl_version

    assert trl_version(REQUIREMENTS.read_text()).startswith("1.")
