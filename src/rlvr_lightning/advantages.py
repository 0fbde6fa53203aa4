"""Advantages of a group's rollouts. Pure functions (P, G) -> (P, G).

Legend: ``P`` problems, ``G`` rollouts per problem (the group is the last axis, never an id to look up).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def group_norm(rewards: Float[Tensor, "P G"], eps: float = 1e-6) -> Float[Tensor, "P G"]:
    """Standardize rewards within each group: (r - mean) / (std + eps), std with Bessel's correction (n - 1).

    A group whose rewards are all equal gets exactly zero; a group of one keeps its reward (mean 0, std 1). numpy's
    population std (n) would give values that are 7 % larger at G = 8; this is the estimator of the paper's code.

    Source: GRPO, arXiv 2402.03300, section 4.1.2; std and eps as in ypwang61/One-Shot-RLVR:verl/trainer/ppo/core_algos.py.

    >>> group_norm(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    tensor([[ 0.8660,  0.8660, -0.8660, -0.8660]])
    """
    if rewards.shape[-1] == 1:
        return rewards / (1 + eps)
    centered = rewards - rewards.mean(dim=-1, keepdim=True)
    # Exact zeros for a constant group: the mean of equal floats can differ from them in the last bit, and eps is tiny.
    centered = torch.where((rewards == rewards[..., :1]).all(dim=-1, keepdim=True), 0.0, centered)
    return centered / (rewards.std(dim=-1, keepdim=True) + eps)


def group_center(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Subtract each group's mean reward, without dividing by the std.

    Source: Dr. GRPO, arXiv 2503.20783, section 3.2.

    >>> group_center(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500]])
    """
    return torch.where((rewards == rewards[..., :1]).all(-1, keepdim=True), 0.0, rewards - rewards.mean(-1, keepdim=True))


def leave_one_out(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Subtract the mean reward of the other rollouts of the group: G / (G - 1) * (r - mean).

    Source: RLOO, arXiv 2402.14740, section 3.2.

    >>> leave_one_out(torch.tensor([[1.0, 0.0, 0.0]]))
    tensor([[ 1.0000, -0.5000, -0.5000]])
    """
    group = rewards.shape[-1]
    return group_center(rewards) * (group / (group - 1))


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm": group_norm,
    "group_center": group_center,
    "leave_one_out": leave_one_out,
}
