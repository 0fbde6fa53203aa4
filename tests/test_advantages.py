"""Advantages against sums written out by hand, brute force, and what a group may and may not influence."""

import doctest
import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lightning import advantages
from rlvr_lightning.advantages import (
    ADVANTAGES,
    gae,
    global_norm,
    global_norm_baseline,
    group_center,
    group_norm,
    leave_one_out,
    max_rl,
    pass_at_k,
    whiten,
)
from rlvr_lightning.errors import ConfigError

ESTIMATORS = pytest.mark.parametrize("name", list(ADVANTAGES))
GROUPWISE = pytest.mark.parametrize("name", ["group_norm", "group_center", "leave_one_out", "max_rl", "pass_at_k"])
BASELINED = pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "global_norm"])
SCALE_FREE = {"group_norm", "global_norm", "global_norm_baseline", "max_rl"}  # up to eps
F64 = torch.float64


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def variance(values: list[float]) -> float:
    return math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)


def subset_rewards(group: list[float], k: int) -> tuple[list[float], list[list[float]]]:
    """Best reward of every k-subset, and for every rollout of those that hold it, by enumeration."""
    best = {subset: max(group[i] for i in subset) for subset in combinations(range(len(group)), k)}
    return list(best.values()), [[r for subset, r in best.items() if i in subset] for i in range(len(group))]


def reference(name: str, rewards: list[list[float]]) -> list[list[float]]:
    """Plain Python floats, straight from the papers' formulas."""
    if name == "global_norm":
        flat = [r for group in rewards for r in group]
        return [[(r - mean(flat)) / math.sqrt(variance(flat) + 1e-8) for r in group] for group in rewards]
    if name == "global_norm_baseline":
        return reference("global_norm", reference("group_center", rewards))
    rows = []
    for group in rewards:
        n = len(group)
        if name == "group_center":
            rows.append([r - mean(group) for r in group])
        elif name == "leave_one_out":
            rows.append([r - (math.fsum(group) - r) / (n - 1) for r in group])
        elif name == "max_rl":
            rows.append([r / mean(group) - 1 if any(group) else 0.0 for r in group])
        elif name == "pass_at_k":
            subsets, holding = subset_rewards(group, 4)
            std = math.sqrt(mean([(r - mean(subsets)) ** 2 for r in subsets]))
            rows.append([(mean(own) - mean(subsets)) / (std + 1e-6) for own in holding])
        else:
            rows.append([(r - mean(group)) / (math.sqrt(variance(group)) + 1e-6) for r in group])
    return rows


@st.composite
def batches(draw: st.DrawFn, *, binary: bool, low: float = -3.0) -> list[list[float]]:
    """1 to 4 groups of 4 to 9 rewards."""
    size = draw(st.integers(4, 9))
    reward = st.sampled_from([0.0, 1.0]) if binary else st.floats(low, 3, width=32).filter(lambda r: abs(r) > 1e-3)
    return draw(st.lists(st.lists(reward, min_size=size, max_size=size), min_size=1, max_size=4))


def random_rewards(name: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rewards that the estimator takes: 0/1 for pass_at_k, none below zero for max_rl."""
    rewards = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return {"pass_at_k": (rewards > 0.8).to(dtype), "max_rl": rewards.abs()}.get(name, rewards)


# --- hand-computed numbers --------------------------------------------------------------------------------------------------


def test_the_doctests_hold():
    result = doctest.testmod(advantages)
    assert result.failed == 0
    assert result.attempted >= len(ADVANTAGES) + 2


def test_seven_of_eight_correct_gives_the_papers_numbers():
    rewards = torch.tensor([[1.0] * 7 + [0.0]])
    # mean 7/8; std = sqrt((7 * (1/8)^2 + (7/8)^2) / 7) = sqrt(1/8) = 0.35355; 0.125 / 0.35355 = 0.3536
    expected = torch.tensor([[0.3536] * 7 + [-2.4749]])  # -0.875 / 0.35355 = -2.4749
    torch.testing.assert_close(group_norm(rewards), expected, atol=5e-5, rtol=0)


def test_four_of_eight_correct_gives_the_papers_numbers():
    rewards = torch.tensor([[1.0, 0.0] * 4])
    # mean 1/2; std = sqrt(8 * 0.25 / 7) = 0.53452; 0.5 / 0.53452 = 0.9354 (population std would give 1.0)
    torch.testing.assert_close(group_norm(rewards), torch.tensor([[0.9354, -0.9354] * 4]), atol=5e-5, rtol=0)


def test_group_center_and_leave_one_out_of_three_quarters():
    rewards = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    # mean 3/4
    torch.testing.assert_close(group_center(rewards), torch.tensor([[0.25, 0.25, 0.25, -0.75]]))
    # the others' means are 2/3 and 1: 1 - 2/3 and 0 - 1
    torch.testing.assert_close(leave_one_out(rewards), torch.tensor([[1 / 3, 1 / 3, 1 / 3, -1.0]]))


def test_global_estimators_of_an_easy_and_a_hard_problem():
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    # mean 5/8; var = (5 * (3/8)^2 + 3 * (5/8)^2) / 7 = (120/64) / 7 = 15/56
    expected = torch.tensor([[0.375] * 4, [0.375] + [-0.625] * 3]) / math.sqrt(15 / 56)
    torch.testing.assert_close(global_norm(rewards), expected)
    # minus the groups' means: 0 0 0 0 and 3/4 -1/4 -1/4 -1/4; var = (9/16 + 3/16) / 7 = 3/28
    expected = torch.tensor([[0.0] * 4, [0.75, -0.25, -0.25, -0.25]]) / math.sqrt(3 / 28)
    torch.testing.assert_close(global_norm_baseline(rewards), expected)


def test_max_rl_of_one_and_of_three_in_four():
    # 1 / (1/4) - 1 = 3 and 1 / (3/4) - 1 = 1/3; a wrong one always gets -1, unless all are wrong
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[3.0, -1.0, -1.0, -1.0], [1 / 3, 1 / 3, 1 / 3, -1.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(max_rl(rewards), expected)


def test_pass_at_two_of_one_in_four():
    # Of the 6 pairs 3 hold the right one: mean 1/2, std 1/2. Right: (1 - 1/2) / (1/2) = 1. Wrong: 1 of its 3 pairs passes,
    # (1/3 - 1/2) / (1/2) = -1/3.
    expected = torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]])
    torch.testing.assert_close(pass_at_k(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), k=2), expected, atol=5e-6, rtol=0)


# --- every estimator --------------------------------------------------------------------------------------------------------


@ESTIMATORS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (F64, 1e-12)])
@given(data=st.data())
def test_every_estimator_equals_its_formula_in_plain_python(
    name: str, dtype: torch.dtype, tolerance: float, data: st.DataObject
):
    rewards = data.draw(batches(binary=True))
    result = ADVANTAGES[name](torch.tensor(rewards, dtype=dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result, torch.tensor(reference(name, rewards), dtype=dtype), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "pass_at_k"])
@given(data=st.data())
def test_real_valued_rewards_equal_the_formula_in_plain_python(name: str, data: st.DataObject):
    rewards = data.draw(batches(binary=False, low=0.0 if name == "max_rl" else -3.0))
    if min(max(group) - min(group) for group in rewards) < 1e-2:
        return  # a tiny spread is divided by: the rounding of the mean itself, 1e-16, is then above the tolerance
    result = ADVANTAGES[name](torch.tensor(rewards, dtype=F64))
    torch.testing.assert_close(result, torch.tensor(reference(name, rewards), dtype=F64), atol=1e-11, rtol=1e-11)


@ESTIMATORS
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, 1 / 3, 0.7, 1.1])
@pytest.mark.parametrize("size", [4, 6, 7, 8, 11])
def test_equal_rewards_give_exactly_zero(name: str, reward: float, size: int):
    # Exactly: AdamW divides the gradient's scale out again, so 1e-8 would be a full step.
    if name == "pass_at_k":
        reward = float(reward > 0.5)
    for dtype in (torch.float32, F64):
        assert ADVANTAGES[name](torch.full((3, size), reward, dtype=dtype)).tolist() == [[0.0] * size] * 3


@BASELINED
def test_a_group_of_equal_rewards_among_others_gets_exactly_zero(name: str):
    rewards = random_rewards(name, 6, 7)
    rewards[2], rewards[4] = 1.0, 0.0 if name == "pass_at_k" else 0.1
    silent = (ADVANTAGES[name](rewards) == 0).all(dim=1)
    assert silent[2]
    assert silent[4]
    assert not silent.all()


@GROUPWISE
def test_groups_do_not_see_each_other(name: str):
    rewards = random_rewards(name, 5, 4, seed=3)
    alone = torch.cat([ADVANTAGES[name](rewards[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(ADVANTAGES[name](rewards), alone, atol=0, rtol=0)
    # 1024 rollouts of one problem are 128 groups of 8, not one group: the same rewards as one group differ.
    assert not torch.allclose(ADVANTAGES[name](rewards.view(1, 20)).view(5, 4), alone, atol=1e-2)


def test_global_estimators_weigh_groups_against_each_other():
    rewards = random_rewards("", 5, 4)
    # without a baseline the cut into groups means nothing; with one, all groups are divided by one and the same number
    torch.testing.assert_close(global_norm(rewards.view(2, 10)).view(5, 4), global_norm(rewards))
    ratio = group_center(rewards) / global_norm_baseline(rewards)
    torch.testing.assert_close(ratio, ratio[0, 0].expand(5, 4))


@ESTIMATORS
def test_permuting_groups_or_members_permutes_the_advantages(name: str):
    rewards = random_rewards(name, 4, 6, seed=1, dtype=F64)
    groups, members = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
    expected = ADVANTAGES[name](rewards)[groups][:, members]
    torch.testing.assert_close(ADVANTAGES[name](rewards[groups][:, members]), expected)


@BASELINED
def test_advantages_of_a_group_add_up_to_zero(name: str):
    result = ADVANTAGES[name](random_rewards(name, 3, 8, seed=2, dtype=F64))
    torch.testing.assert_close(result.sum(dim=1), torch.zeros(3, dtype=F64), atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", ["global_norm", "global_norm_baseline"])
def test_global_estimators_have_mean_zero_and_variance_one(name: str):
    result = ADVANTAGES[name](random_rewards(name, 3, 8, dtype=F64))
    torch.testing.assert_close(result.mean(), torch.zeros((), dtype=F64), atol=1e-15, rtol=0)
    torch.testing.assert_close(result.var(), torch.ones((), dtype=F64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name not in ("max_rl", "pass_at_k")])
@given(st.floats(-10, 10))
def test_a_constant_added_to_all_rewards_changes_nothing(name: str, constant: float):
    rewards = random_rewards(name, 3, 6, seed=4, dtype=F64)
    torch.testing.assert_close(ADVANTAGES[name](rewards + constant), ADVANTAGES[name](rewards), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "pass_at_k"])
@given(st.floats(0.1, 10))
def test_the_scale_of_the_rewards_either_carries_over_or_vanishes(name: str, scale: float):
    rewards = random_rewards(name, 3, 6, seed=5, dtype=F64)
    expected = ADVANTAGES[name](rewards) * (1.0 if name in SCALE_FREE else scale)
    torch.testing.assert_close(ADVANTAGES[name](rewards * scale), expected, atol=1e-4, rtol=1e-4)


def test_groups_of_one():
    rewards = torch.tensor([[1.0], [0.0], [1.0]])
    torch.testing.assert_close(group_norm(rewards), rewards)
    assert group_center(rewards).tolist() == global_norm_baseline(rewards).tolist() == max_rl(rewards).tolist() == [[0.0]] * 3
    # mean 2/3; var = (2/9 + 4/9) / 2 = 1/3
    torch.testing.assert_close(global_norm(rewards), torch.tensor([[1 / 3], [-2 / 3], [1 / 3]]) * math.sqrt(3))
    assert pass_at_k(rewards, k=1).tolist() == [[0.0]] * 3
    assert global_norm(rewards[:1]).tolist() == global_norm_baseline(rewards[:1]).tolist() == [[0.0]]
    with pytest.raises(ConfigError, match="rollouts_per_problem to 2 or more"):
        leave_one_out(rewards)


@pytest.mark.parametrize(("name", "factor"), [("group_center", 0.75), ("leave_one_out", 1.0), ("max_rl", None)])
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_expected_gradient_is_the_stated_multiple_of_that_of_the_pass_rate(name: str, factor: float | None, p: float):
    # A policy that is right with probability p: d log pi / dp is 1 / p for a right rollout, -1 / (1 - p) for a wrong one.
    # All 2^4 groups, weighted by their probability, give the expectation of mean(A * d log pi / dp) exactly.
    expected = 0.0
    for group in product([0.0, 1.0], repeat=4):
        probability = math.prod(p if r else 1 - p for r in group)
        if probability:
            result = ADVANTAGES[name](torch.tensor([group], dtype=F64))[0].tolist()
            score = [1 / p if r else -1 / (1 - p) for r in group]
            expected += probability * mean([a * s for a, s in zip(result, score, strict=True)])
    if p == 1:  # nothing is wrong, so nothing is learned
        assert expected == 0
    else:
        stated = factor if factor is not None else 1 + (1 - p) + (1 - p) ** 2  # G - 1 = 3 terms of 1 / p
        assert expected == pytest.approx(stated, rel=1e-12)


def test_max_rl_refuses_negative_rewards():
    with pytest.raises(ConfigError, match=r"one reward is -0\.5: give rewards of 0 or more"):
        max_rl(torch.tensor([[1.0, -0.5]]))


# --- pass@k -----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=9), st.data())
def test_pass_at_k_equals_the_enumeration_of_all_subsets(group: list[float], data: st.DataObject):
    k = data.draw(st.integers(1, len(group)))
    subsets, holding = subset_rewards(group, k)
    std = float(np.std(subsets))
    expected = [(np.mean(own) - np.mean(subsets)) / (std + 1e-6) for own in holding]
    result = pass_at_k(torch.tensor([group], dtype=F64), k=k)
    np.testing.assert_allclose(result[0].numpy(), expected, atol=1e-12, rtol=1e-12)


def test_pass_at_one_is_group_norm_with_the_population_std():
    rewards = random_rewards("pass_at_k", 6, 8, dtype=F64)
    torch.testing.assert_close(pass_at_k(rewards, k=1), group_norm(rewards) * math.sqrt(8 / 7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", range(1, 9))
def test_a_group_with_fewer_than_k_wrong_rollouts_teaches_nothing(k: int):
    rewards = torch.tensor([[0.0] * wrong + [1.0] * (8 - wrong) for wrong in range(9)])
    silent = (pass_at_k(rewards, k=k) == 0).all(dim=1).tolist()
    assert silent == [wrong < k or wrong == 8 for wrong in range(9)]


def test_pass_at_k_stays_exact_in_a_group_of_1024():
    rewards = torch.zeros(1, 1024, dtype=F64)
    rewards[0, 0] = 1.0
    # one in G: mean k / G = 1/2, std 1/2; right (1 - 1/2) / (1/2) = 1, each wrong one its share of minus that
    torch.testing.assert_close(
        pass_at_k(rewards, k=512)[0, :2], torch.tensor([1.0, -1 / 1023], dtype=F64), atol=3e-6, rtol=3e-6
    )


def test_pass_at_k_says_what_to_change():
    rewards = torch.tensor([[1.0, 0.0]])
    with pytest.raises(ConfigError, match="k = 4 and groups of 2"):
        pass_at_k(rewards)
    with pytest.raises(ConfigError, match="k to 1 or more"):
        pass_at_k(rewards, k=0)
    with pytest.raises(ConfigError, match="rewards of 0 or 1"):
        pass_at_k(torch.tensor([[1.0, 0.5]]), k=2)


# --- tokens: whitening and generalized advantage estimation -------------------------------------------------------------------


def spans(num_tokens: int, bounds: list[tuple[int, int]]) -> Tensor:
    """A mask with one run per row."""
    mask = torch.zeros(len(bounds), num_tokens, dtype=torch.bool)
    for row, (start, end) in enumerate(bounds):
        mask[row, start:end] = True
    return mask


BOUNDS = st.integers(1, 9).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n), st.integers(0, n)), min_size=1, max_size=4))
)


@given(BOUNDS, st.integers(0, 2**31))
def test_whiten_equals_numpy_on_the_completion_tokens(bounds: tuple[int, list[tuple[int, int]]], seed: int):
    mask = spans(*bounds)
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    values[~mask] = torch.nan  # what lies outside must not be read
    result = whiten(values, mask)
    assert (result[~mask] == 0).all()
    inside = values[mask].numpy()
    expected = (inside - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8) if inside.size > 1 else np.zeros(inside.size)
    np.testing.assert_allclose(result[mask].numpy(), expected, atol=1e-12, rtol=1e-9)


def test_whiten_gives_exact_zeros_where_nothing_varies():
    values = torch.tensor([[0.1, 0.1, 0.1, 5.0], [0.1, 0.1, 0.1, 5.0]])
    for mask in (spans(4, [(0, 3), (0, 3)]), spans(4, [(1, 2), (0, 0)]), spans(4, [(0, 0), (0, 0)])):
        assert whiten(values, mask).tolist() == [[0.0] * 4] * 2


@given(BOUNDS, st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_its_definition(bounds: tuple[int, list[tuple[int, int]]], seed: int, gamma: float, lam: float):
    mask = spans(*bounds)
    rewards, values = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    expected_advantages, expected_returns = torch.zeros(2, *mask.shape, dtype=F64)
    for row, (start, end) in enumerate(bounds[1]):
        r, v = rewards[row].tolist(), [*values[row, :end].tolist(), 0.0]
        for t in range(start, end):
            terms = [(gamma * lam) ** (u - t) * (r[u] + gamma * v[u + 1] - v[u]) for u in range(t, end)]
            expected_advantages[row, t] = math.fsum(terms)
            expected_returns[row, t] = math.fsum(terms) + v[t]
    rewards[~mask] = values[~mask] = torch.nan  # what lies outside must not be read
    result = gae(rewards, values, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(result, (expected_advantages, expected_returns), atol=1e-12, rtol=1e-12)


def test_gae_of_a_terminal_reward_is_the_reward_minus_the_value():
    mask = spans(7, [(2, 6), (1, 7), (3, 4)])
    values = torch.rand(3, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    rewards = torch.zeros(3, 7, dtype=F64)
    rewards[0, 5], rewards[1, 6] = 1.0, 1.0
    result, returns = gae(rewards, values, mask)
    outcome = torch.tensor([[1.0], [1.0], [0.0]], dtype=F64) * mask
    torch.testing.assert_close(result, (outcome - values) * mask)
    torch.testing.assert_close(returns, outcome)


def test_gae_with_lam_one_is_the_discounted_return_minus_the_value():
    mask = spans(5, [(1, 4)])
    rewards, values = torch.tensor([[9.0, 1.0, 2.0, 4.0, 9.0]]), torch.tensor([[9.0, 0.5, 0.25, 0.125, 9.0]])
    result, returns = gae(rewards, values, mask, gamma=0.5)
    # 1 + 2/2 + 4/4 = 3; 2 + 4/2 = 4; 4
    torch.testing.assert_close(returns, torch.tensor([[0.0, 3.0, 4.0, 4.0, 0.0]]))
    torch.testing.assert_close(result, torch.tensor([[0.0, 2.5, 3.75, 3.875, 0.0]]))


def test_gae_with_lam_zero_is_the_temporal_difference():
    mask = spans(5, [(1, 4)])
    rewards, values = torch.tensor([[9.0, 1.0, 2.0, 4.0, 9.0]]), torch.tensor([[9.0, 0.5, 0.25, 0.125, 9.0]])
    result, returns = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    # 1 + 0.25/2 - 0.5; 2 + 0.125/2 - 0.25; 4 + 0 - 0.125
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.625, 1.8125, 3.875, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.0, 1.125, 2.0625, 4.0, 0.0]]))


def test_gae_does_not_depend_on_padding():
    rewards, values = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    short = gae(rewards, values, spans(6, [(2, 6)]), gamma=0.9, lam=0.8)
    wide = [torch.nn.functional.pad(x, (3, 70), value=7.0) for x in (rewards, values)]
    long = gae(wide[0], wide[1], spans(79, [(5, 9)]), gamma=0.9, lam=0.8)
    torch.testing.assert_close([x[:, 3:9] for x in long], list(short), atol=1e-14, rtol=1e-14)
    assert all((x[:, 9:] == 0).all() for x in long)


def test_gae_passes_no_gradient_to_the_critic():
    values = torch.rand(1, 3, requires_grad=True)
    assert not any(x.requires_grad for x in gae(torch.ones(1, 3), values, spans(3, [(0, 3)])))


def test_gae_says_what_to_change():
    rewards, mask = torch.zeros(1, 4), spans(4, [(0, 4)])
    for setting in ({"gamma": 1.5}, {"lam": -0.1}, {"lam": math.nan}):
        with pytest.raises(ConfigError, match="set it to a number from 0 to 1"):
            gae(rewards, rewards, mask, **setting)
    with pytest.raises(ValueError, match="one unbroken run"):
        gae(rewards, rewards, torch.tensor([[True, False, True, False]]))
