"""Coefficients that change while training runs: values by hand, and what a YAML file makes of them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.losses import Objective
from rlvr_lightning.schedule import Schedule, ever_nonzero

FADE = Schedule(start=0.01, end=0.0, steps=100)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("linear", [1.0, 1.0, 2.0, 3.0, 5.0, 5.0]),
        ("cosine", [1.0, 1.0, 3 - math.sqrt(2), 3.0, 5.0, 5.0]),  # 3 - 2 cos(pi / 4)
        ("constant", [1.0, 1.0, 1.0, 1.0, 5.0, 5.0]),
    ],
)
def test_values_by_hand(shape: Any, values: list[float]):
    schedule = Schedule(start=1.0, end=5.0, steps=8, shape=shape, delay=10)
    assert [schedule.at(step) for step in (0, 10, 12, 14, 18, 1000)] == pytest.approx(values, abs=1e-12)


NUMBERS = st.floats(-1e3, 1e3)
SCHEDULES = st.builds(
    Schedule,
    start=NUMBERS,
    end=NUMBERS,
    steps=st.integers(1, 50),
    shape=st.sampled_from(["linear", "cosine", "constant"]),
    delay=st.integers(0, 20),
)


@given(SCHEDULES)
def test_a_schedule_goes_from_start_to_end_without_turning_back(schedule: Schedule):
    values = [schedule.at(step) for step in range(schedule.delay + schedule.steps + 3)]
    assert values[: schedule.delay + 1] == [schedule.start] * (schedule.delay + 1)
    assert values[schedule.delay + schedule.steps :] == [schedule.end] * 3
    ordered = sorted(values, reverse=schedule.end < schedule.start)
    assert values == pytest.approx(ordered, abs=1e-9)
    low, high = sorted((schedule.start, schedule.end))
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    assert ever_nonzero(schedule) == any(values)


@given(st.builds(Schedule, start=st.floats(0, 1e3), end=st.floats(0, 1e3), steps=st.integers(1, 50)), st.integers(0, 60))
def test_a_step_of_a_valid_objective_is_valid(schedule: Schedule, step: int):
    assert Objective(kl_coef=schedule, policy_coef=schedule).at(step).coefficients.get("kl", 0.0) == schedule.at(step)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (FADE, "0.01 -> 0 over 100 steps"),
        (Schedule(start=0.0, end=1.0, steps=5, shape="cosine", delay=20), "0 -> 1 over 5 steps after 20 (cosine)"),
        (Schedule(start=0.0, end=1.0, steps=5, shape="constant", delay=20), "0 -> 1 at step 25"),
    ],
)
def test_a_schedule_reads_as_a_phrase(schedule: Schedule, text: str):
    assert str(schedule) == text


@pytest.mark.parametrize(
    "settings",
    [{"start": math.nan}, {"end": math.inf}, {"steps": 0}, {"delay": -1}, {"shape": "step"}],
    ids=str,
)
def test_an_impossible_schedule_is_refused_by_name(settings: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"^{next(iter(settings))} of a schedule is "):
        Schedule(**{"start": 0.0, "end": 1.0, "steps": 5} | settings)


# --- in the objective --------------------------------------------------------------------------------------------------


def test_an_objective_has_numbers_at_a_step():
    objective = Objective(
        policy_coef=Schedule(start=1.0, end=0.0, steps=10, shape="constant"), entropy_coef=FADE, dual_clip=3.0
    )
    assert objective.at(0) == Objective(policy_coef=1.0, entropy_coef=0.01, dual_clip=3.0)
    assert objective.at(50) == Objective(policy_coef=0.0, entropy_coef=0.005, dual_clip=3.0)
    assert objective.at(50).coefficients == {"kl": 0.001, "entropy": -0.005}
    assert Objective().at(7) == Objective()


def test_an_objective_of_a_subclass_stays_one():
    class Mine(Objective):
        pass

    assert type(Mine(entropy_coef=FADE).at(3)) is Mine


def test_a_schedule_is_shown_in_the_formula():
    assert str(Objective(entropy_coef=FADE, kl_coef=0.0)) == "loss = surrogate - (0.01 -> 0 over 100 steps) * entropy"
    grow = Schedule(start=0.0, end=0.1, steps=5)
    assert str(Objective(kl_coef=grow, kl_in="reward", entropy_coef=0.0)) == (
        "loss = surrogate, reward - (0 -> 0.1 over 5 steps) * KL(policy || reference)"
    )


@pytest.mark.parametrize("name", ["policy_coef", "kl_coef", "entropy_coef"])
def test_a_schedule_is_no_number(name: str):
    objective = Objective(**{name: FADE})
    with pytest.raises(TypeError, match=r"0\.01 -> 0 over 100 steps is a schedule, not a number: use objective\.at\(step\)"):
        _ = objective.coefficients
    x = torch.zeros(1, 2)
    with pytest.raises(TypeError, match=r"use objective\.at\(step\)"):
        objective(logprobs=x, entropy=x, old_logprobs=x, reference_logprobs=x, advantages=torch.ones(1, 1))


def test_a_reference_is_needed_if_the_kl_coefficient_is_ever_other_than_zero():
    assert Objective().uses_kl
    assert not Objective(kl_coef=0.0).uses_kl
    assert Objective(kl_coef=Schedule(start=0.0, end=0.1, steps=5)).uses_kl
    assert Objective(kl_coef=FADE).uses_kl
    assert not Objective(kl_coef=FADE).at(100).uses_kl
    assert not Objective(kl_coef=Schedule(start=0.0, end=0.0, steps=5)).uses_kl


@pytest.mark.parametrize("part", ["start", "end"])
@pytest.mark.parametrize("name", ["policy_coef", "kl_coef"])
def test_a_schedule_below_zero_is_refused_by_name(name: str, part: str):
    with pytest.raises(ConfigError, match=rf"objective\.{name}\.{part} is -1"):
        Objective(**{name: Schedule(**{"start": 0.0, "end": 0.0, "steps": 5} | {part: -1.0})})


def test_an_entropy_schedule_may_change_its_sign():
    assert Objective(entropy_coef=Schedule(start=0.1, end=-0.1, steps=2)).at(2).coefficients["entropy"] == 0.1


# --- from a configuration ----------------------------------------------------------------------------------------------


def parser() -> ArgumentParser:
    built = ArgumentParser(exit_on_error=False)
    built.add_argument("--config", action="config")
    built.add_argument("--objective", type=Objective, default=Objective())
    return built


@pytest.mark.parametrize(
    ("text", "coef"),
    [
        ("0.001", 0.001),
        ("0", 0.0),
        ("1e-3", 0.001),
        ("{start: 0.01, end: 0, steps: 100}", FADE),
        (
            "{start: 0, end: 1, steps: 5, shape: cosine, delay: 3}",
            Schedule(start=0.0, end=1.0, steps=5, shape="cosine", delay=3),
        ),
    ],
)
def test_a_coefficient_is_a_number_or_a_schedule(text: str, coef: float | Schedule):
    args = parser().parse_string(f"objective: {{entropy_coef: {text}, kl_coef: {text}, policy_coef: {text}}}")
    objective = parser().instantiate(args).objective
    assert objective == Objective(entropy_coef=coef, kl_coef=coef, policy_coef=coef)
    assert parser().instantiate(parser().parse_string(parser().dump(args))).objective == objective  # as run.yaml has it


@pytest.mark.parametrize(
    ("first", "second", "coef"),
    [("0.5", "{start: 0.01, end: 0, steps: 100}", FADE), ("{start: 0.01, end: 0, steps: 100}", "0.5", 0.5)],
)
def test_a_later_setting_replaces_an_earlier_one_of_the_other_kind(first: str, second: str, coef: Any, tmp_path: Any):
    (tmp_path / "first.yaml").write_text(f"objective: {{entropy_coef: {first}, dual_clip: 3}}")
    args = parser().parse_args([f"--config={tmp_path / 'first.yaml'}", f"--objective.entropy_coef={second}"])
    assert parser().instantiate(args).objective == Objective(entropy_coef=coef, dual_clip=3.0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{start: 0.01, end: 0}", "steps"),
        ("{start: 0.01, end: 0, steps: 0}", "steps of a schedule is 0: set it to 1 or more"),
        ("{start: 0.01, end: 0, steps: 5, shap: cosine}", "shap"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_said(text: str, problem: str):
    with pytest.raises(Exception, match=problem):  # jsonargparse chooses the type of its errors
        parser().instantiate(parser().parse_string(f"objective: {{entropy_coef: {text}}}"))
