"""Saturation is where training accuracy begins to stay high, and the gains of evaluation sets are divided there."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.jsonl import append_lines
from rlvr_lightning.saturation import Saturation, describe, summarize

EIGHTHS = st.lists(st.sampled_from([i / 8 for i in range(9)] + [1.0] * 9), max_size=40)


def first_saturated(accuracies: list[float], threshold: float, window: int) -> int | None:
    """The definition, word by word; steps count from 1."""
    starts = range(len(accuracies) - window + 1)
    high = [sum(accuracies[s : s + window]) >= threshold * window for s in starts]
    return next((s + 1 for s in starts if all(high[s:])), None)


@given(EIGHTHS, st.sampled_from([0.5, 0.75, 0.875, 1.0]), st.integers(1, 12))
def test_live_step_is_that_of_the_definition_after_every_update(values: list[float], threshold: float, window: int) -> None:
    saturation = Saturation(threshold, window)
    for n, value in enumerate(values, start=1):
        saturation.update(n, value)
        assert saturation.step == first_saturated(values[:n], threshold, window)


def test_a_later_fall_takes_it_back_and_a_later_rise_gives_a_later_step() -> None:
    saturation = Saturation(0.99, 3)
    seen = []
    for step, value in enumerate([1, 1, 1, 1, 0, 1, 1, 1], start=1):
        saturation.update(step, value)
        seen.append(saturation.step)
    assert seen == [None, None, 1, 1, None, None, None, 6]


def test_memory_is_that_of_one_window() -> None:
    saturation = Saturation(0.99, 5)
    for step in range(1000):
        saturation.update(step, 1.0)
    assert max(len(value) for value in vars(saturation).values() if hasattr(value, "__len__")) == 5
    assert saturation.step == 0


def test_single_precision_does_not_miss_the_threshold() -> None:
    saturation = Saturation(0.95, 2)
    saturation.update(1, 0.949999988079071)  # 0.95 as a float32
    saturation.update(2, 0.949999988079071)
    assert saturation.step == 1


def test_nan_is_no_high_accuracy() -> None:
    saturation = Saturation(0.5, 1)
    saturation.update(1, 1.0)
    saturation.update(2, float("nan"))
    assert saturation.step is None


@pytest.mark.parametrize(("threshold", "window"), [(0.0, 10), (1.1, 10), (float("nan"), 10), (0.99, 0)])
def test_impossible_settings_are_refused(threshold: float, window: int) -> None:
    with pytest.raises(ConfigError, match="saturation"):
        Saturation(threshold, window)


def test_steps_must_come_in_order() -> None:
    saturation = Saturation()
    saturation.update(3, 1.0)
    with pytest.raises(ValueError, match="step 3 follows step 3"):
        saturation.update(3, 1.0)


def write_run(root: Path, training: list[float], evals: dict[int, float], name: str = "held_out") -> None:
    """Write what the logger does: training rows from step 1, an evaluation of step k after the row of step k."""
    for step, accuracy in enumerate([None, *training]):
        if accuracy is not None:
            append_lines(root / "metrics.jsonl", [{"step": step, "time": 0.0, "rollout/accuracy": accuracy}])
        if step in evals:
            row = {f"val/{name}/accuracy": evals[step], f"val/{name}/accuracy/algebra": 0.0, f"val/{name}/length": 3.0}
            append_lines(root / "metrics.jsonl", [{"step": step, "time": 0.0, **row}])


def test_gains_are_divided_by_the_evaluation_of_the_first_saturated_weights(tmp_path: Path) -> None:
    # Row 6 is the first saturated one. Its rollouts come from the weights after 5 steps: evaluation 5, and not 6.
    write_run(tmp_path, [0.0] * 5 + [1.0] * 7, {0: 0.1, 5: 0.5, 6: 0.55, 10: 0.625})
    summary = summarize(tmp_path, threshold=0.9, window=4)
    assert (summary["saturated_at"], summary["threshold"], summary["window"]) == (6, 0.9, 4)
    assert summary["evals"] == {
        "held_out": {
            "before": 0.1,
            "at_saturation": 0.5,
            "at_step": 5,
            "last": 0.625,
            "gain": pytest.approx(0.525),
            "gain_before_saturation": pytest.approx(0.4),
            "gain_after_saturation": pytest.approx(0.125),
        }
    }
    assert describe(summary).splitlines() == [
        "training accuracy stays at 0.9 or above from step 6 on",
        "held_out: +0.40 before that, +0.12 after",
        "(divided by the last evaluation before it, at step 5)",
    ]


def test_a_run_that_is_saturated_from_the_start_gains_only_after(tmp_path: Path) -> None:
    write_run(tmp_path, [1.0] * 10, {0: 0.1, 10: 0.3})
    summary = summarize(tmp_path)
    assert summary["saturated_at"] == 1
    entry = summary["evals"]["held_out"]
    assert (entry["at_saturation"], entry["gain_before_saturation"]) == (0.1, None)
    assert entry["gain_after_saturation"] == pytest.approx(0.2)
    assert "held_out: +0.20 after" in describe(summary)


def test_without_an_evaluation_before_it_there_is_nothing_to_divide(tmp_path: Path) -> None:
    write_run(tmp_path, [1.0] * 10, {5: 0.1, 10: 0.3})
    summary = summarize(tmp_path)
    entry = summary["evals"]["held_out"]
    keys = ("at_saturation", "at_step", "gain_before_saturation", "gain_after_saturation")
    assert [entry[key] for key in keys] == [None] * 4
    assert describe(summary) == "training accuracy stays at 0.99 or above from step 1 on"


def test_a_run_that_never_saturates_tells_its_whole_gain(tmp_path: Path) -> None:
    write_run(tmp_path, [0.5] * 20, {0: 0.1, 20: 0.3})
    summary = summarize(tmp_path)
    assert summary["saturated_at"] is None
    assert summary["evals"]["held_out"]["at_saturation"] is None
    assert describe(summary).splitlines() == [
        "training accuracy does not stay at 0.99 or above (means over 10 steps)",
        "accuracy over the whole run: held_out: +0.20",
    ]


def test_an_empty_folder_has_no_summary_to_tell(tmp_path: Path) -> None:
    summary = summarize(tmp_path)
    assert summary == {"saturated_at": None, "threshold": 0.99, "window": 10, "evals": {}}
    assert len(describe(summary).splitlines()) == 1


def test_rows_without_a_number_are_skipped(tmp_path: Path) -> None:
    append_lines(tmp_path / "metrics.jsonl", [{"step": s, "rollout/accuracy": None if s == 3 else 1.0} for s in range(1, 6)])
    assert summarize(tmp_path, window=4)["saturated_at"] == 1


@given(st.lists(st.sampled_from([0.0, 0.9, 1.0]), max_size=40), st.integers(0, 40), st.integers(1, 5))
def test_a_resumed_run_finds_the_step_of_an_uninterrupted_one(accuracies: list[float], cut: int, window: int) -> None:
    whole, first, second = (Saturation(0.95, window) for _ in range(3))
    for step, accuracy in enumerate(accuracies):
        whole.update(step, accuracy)
    for step, accuracy in enumerate(accuracies[:cut]):
        first.update(step, accuracy)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step, accuracy in list(enumerate(accuracies))[cut:]:
        second.update(step, accuracy)
    assert second.step == whole.step
