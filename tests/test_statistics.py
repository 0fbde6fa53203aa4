"""Intervals and p-values against loops, enumeration and closed forms."""

import time
from itertools import product
from math import comb

import numpy as np
import pytest

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation import statistics
from rlvr_lightning.evaluation.statistics import accuracy, bootstrap_interval, mean_interval, paired_difference


def verdicts(num_problems: int, samples: int, seed: int) -> np.ndarray:
    """[P, k] verdicts of problems with different chances."""
    rng = np.random.default_rng(seed)
    return rng.random((num_problems, samples)) < rng.random((num_problems, 1))


def resampled_by_loop(correct: list[list[bool]], rng: np.random.Generator) -> float:
    chosen = [correct[i] for i in rng.integers(len(correct), size=len(correct))]
    return float(np.mean([rng.choice(row, size=len(row)).mean() for row in chosen]))


def test_accuracy_is_the_mean_over_problems_and_not_over_samples() -> None:
    assert accuracy([[True, True, True, False], [False]]) == 0.375  # (3/4 + 0) / 2, where samples would give 3/5


@pytest.mark.parametrize("ragged", [False, True])
def test_interval_agrees_with_resampling_in_a_loop(ragged: bool) -> None:
    correct = verdicts(40, 4, seed=3).tolist()
    if ragged:
        correct = [row[: 1 + i % 4] for i, row in enumerate(correct)]
    rng = np.random.default_rng(0)
    means = [resampled_by_loop(correct, rng) for _ in range(3000)]
    # The loop's own error, at 3000 resamples, is about 0.004.
    assert bootstrap_interval(correct) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.012)


def test_interval_of_one_sample_per_problem_is_that_of_a_proportion() -> None:
    correct = [[i < 30] for i in range(100)]
    low, high = bootstrap_interval(correct)
    half = 1.96 * (0.3 * 0.7 / 100) ** 0.5
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.012)


def test_interval_is_deterministic_and_the_seed_counts() -> None:
    correct = verdicts(30, 3, seed=1)
    assert bootstrap_interval(correct) == bootstrap_interval(correct.tolist())
    assert any(bootstrap_interval(correct) != bootstrap_interval(correct, seed=s) for s in (1, 2, 3))


def test_equal_verdicts_leave_no_width() -> None:
    assert bootstrap_interval([[True] * 3] * 7) == (1.0, 1.0)
    assert bootstrap_interval([[False]] * 7) == (0.0, 0.0)


def test_500_problems_with_8_samples_take_less_than_half_a_second() -> None:
    a, b = verdicts(500, 8, seed=1), verdicts(500, 8, seed=2)
    for call in (lambda: bootstrap_interval(a), lambda: paired_difference(a, b)):
        started = time.process_time()
        call()
        assert time.process_time() - started < 0.5


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 3), (2, 9), (10, 30)])
def test_one_sample_per_problem_gives_mcnemars_exact_test(only_a: int, only_b: int) -> None:
    a = [[True]] * only_a + [[False]] * only_b + [[True]] * 20
    b = [[False]] * only_a + [[True]] * only_b + [[True]] * 20
    num = only_a + only_b
    tail = sum(comb(num, i) for i in range(min(only_a, only_b) + 1)) / 2**num
    result = paired_difference(a, b)
    assert result.p_value == pytest.approx(min(1.0, 2 * tail))
    assert result.difference == pytest.approx((only_b - only_a) / len(a))


@pytest.mark.parametrize("samples", [(4, 4), (2, 3)])
def test_p_value_agrees_with_every_flip_of_signs(samples: tuple[int, int]) -> None:
    a, b = verdicts(9, samples[0], seed=5), verdicts(9, samples[1], seed=6)
    differences = b.mean(axis=1) - a.mean(axis=1)
    observed = abs(differences.sum())
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=9)]
    expected = np.mean([s >= observed - 1e-12 for s in sums])
    assert 0 < expected < 1
    assert paired_difference(a, b).p_value == pytest.approx(expected)


def test_p_value_is_estimated_where_the_exact_one_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = verdicts(60, 4, seed=7), verdicts(60, 4, seed=8)
    exact = paired_difference(a, b).p_value
    monkeypatch.setattr(statistics, "_MAX_EXACT_OPERATIONS", 0)
    estimate = paired_difference(a, b).p_value
    assert estimate != exact
    assert estimate == pytest.approx(exact, abs=0.02)
    assert paired_difference([[False]] * 40, [[True]] * 40).p_value == 1 / 10_001  # never 0


def test_many_different_numbers_of_samples_take_no_memory() -> None:
    a = [[i % 3 == 0] * (i + 1) for i in range(60)]  # the common multiple of 1 ... 60 has 25 digits
    b = [[i % 2 == 0] * (i + 1) for i in range(60)]
    assert 0 < paired_difference(a, b).p_value <= 1


def test_difference_interval_agrees_with_resampling_the_same_problems() -> None:
    chances = np.random.default_rng(0).random((50, 1))  # both solve the same problems: pairing narrows the interval
    a, b = (np.random.default_rng(seed).random((50, 8)) < chances for seed in (1, 2))
    rng = np.random.default_rng(4)
    means = []
    for _ in range(3000):
        rows = rng.integers(50, size=(50, 1))
        means.append(b[rows, rng.integers(8, size=(50, 8))].mean() - a[rows, rng.integers(8, size=(50, 8))].mean())
    result = paired_difference(a, b)
    assert (result.low, result.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    alone = bootstrap_interval(a)
    assert result.high - result.low < 0.7 * 2**0.5 * (alone[1] - alone[0])
    assert result.difference == pytest.approx(b.mean() - a.mean())


def test_swapping_the_sides_turns_the_sign() -> None:
    a, b = verdicts(25, 2, seed=1), verdicts(25, 2, seed=2)
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.difference == -back.difference != 0
    assert there.p_value == back.p_value


@pytest.mark.parametrize("k", [1, 4])
def test_the_interval_of_a_mean_is_that_of_the_accuracy(k: int) -> None:
    correct = verdicts(60, k, seed=3)
    assert mean_interval(correct) == pytest.approx(bootstrap_interval(correct), abs=0.02)


def test_the_interval_of_a_mean_takes_problems_that_contribute_nothing() -> None:
    low, high = mean_interval([[10.0, 20.0], [], [15.0], [12.0, 18.0, 15.0]])
    assert 10 < low < 15 < high < 20
    assert mean_interval([[], []]) == (0.0, 0.0)
    with pytest.raises(ConfigError, match="at least one problem"):
        mean_interval([])


@pytest.mark.parametrize("empty", [[], [[True], []]])
def test_no_problem_or_no_sample_is_refused(empty: list[list[bool]]) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        bootstrap_interval(empty)


def test_different_numbers_of_problems_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 problems against 1"):
        paired_difference([[True], [False]], [[True]])
