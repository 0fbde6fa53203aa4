"""Advantages against sums written out by hand, and what a group may and may not influence."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lightning.advantages import ADVANTAGES, group_center, group_norm, leave_one_out

ESTIMATORS = pytest.mark.parametrize("name", sorted(ADVANTAGES))


def reference(name: str, group: list[float]) -> list[float]:
    """One group in plain Python floats, straight from the papers' formulas."""
    n, mean = len(group), math.fsum(group) / len(group)
    if name == "group_center":
        return [r - mean for r in group]
    if name == "leave_one_out":
        return [r - (math.fsum(group) - r) / (n - 1) for r in group]
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (n - 1))
    return [(r - mean) / (std + 1e-6) for r in group]


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


@ESTIMATORS
@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=9).filter(lambda g: max(g) - min(g) > 1e-2))
def test_every_estimator_equals_its_formula_in_plain_python(name: str, group: list[float]):
    torch.testing.assert_close(
        ADVANTAGES[name](torch.tensor([group])), torch.tensor([reference(name, group)]), atol=2e-4, rtol=1e-4
    )


@ESTIMATORS
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, 1 / 3, 0.7, 1.1])
@pytest.mark.parametrize("size", [2, 6, 7, 8, 11])
def test_equal_rewards_give_exactly_zero(name: str, reward: float, size: int):
    # Exactly: AdamW divides the gradient's scale out again, so 1e-8 would be a full step.
    assert ADVANTAGES[name](torch.full((2, size), reward)).tolist() == [[0.0] * size] * 2


@ESTIMATORS
def test_groups_do_not_see_each_other(name: str):
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([ADVANTAGES[name](rewards[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(ADVANTAGES[name](rewards), alone, atol=0, rtol=0)
    # 1024 rollouts of one problem are 128 groups of 8, not one group: the same rewards as one group differ.
    assert not torch.allclose(ADVANTAGES[name](rewards.view(1, 20)).view(5, 4), alone, atol=1e-2)


@ESTIMATORS
def test_permuting_groups_or_members_permutes_the_advantages(name: str):
    rewards = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    groups, members = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
    expected = ADVANTAGES[name](rewards)[groups][:, members]
    torch.testing.assert_close(ADVANTAGES[name](rewards[groups][:, members]), expected)


@ESTIMATORS
def test_advantages_of_a_group_add_up_to_zero(name: str):
    rewards = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ADVANTAGES[name](rewards).sum(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
