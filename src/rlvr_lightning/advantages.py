"""Advantages: of a group's rollouts, (P, G) -> (P, G), and of a critic's tokens, (B, S) -> (B, S). Pure functions.

Legend: ``P`` problems, ``G`` rollouts per problem (the group is the last axis, never an id to look up), ``B`` rows, ``S``
padded tokens. Zeros are exact: AdamW divides the gradient's scale out again, so rounding noise of 1e-8 would be a full step.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from rlvr_lightning.errors import ConfigError


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
    return group_center(rewards) / (rewards.std(dim=-1, keepdim=True) + eps)


def group_center(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Subtract each group's mean reward, without dividing by the std.

    Source: Dr. GRPO, arXiv 2503.20783, section 3.2.

    >>> group_center(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500]])
    """
    # Not just r - mean: the mean of equal floats can differ from them in the last bit.
    return torch.where((rewards == rewards[..., :1]).all(-1, keepdim=True), 0.0, rewards - rewards.mean(-1, keepdim=True))


def leave_one_out(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Subtract the mean reward of the other rollouts of the group: G / (G - 1) * (r - mean).

    Raises:
        ConfigError: G is 1, so that there are no others.

    Source: RLOO, arXiv 2402.14740, section 3.2.

    >>> leave_one_out(torch.tensor([[1.0, 0.0, 0.0]]))
    tensor([[ 1.0000, -0.5000, -0.5000]])
    """
    group = rewards.shape[-1]
    if group == 1:
        raise ConfigError(
            "leave_one_out compares a rollout with the others of its group and this group has one rollout: set "
            "rollouts_per_problem to 2 or more"
        )
    return group_center(rewards) * (group / (group - 1))


def global_norm(rewards: Float[Tensor, "P G"], eps: float = 1e-8) -> Float[Tensor, "P G"]:
    """Whiten rewards over all P * G rollouts: (r - mean) / sqrt(var + eps), var with Bessel's correction.

    Groups play no part: G = 1 is allowed, and a group of equal rewards gets zero only if all P * G are equal. Every rollout
    counts once; OpenRLHF (``reinforce``) and verl (``reinforce_plus_plus``) take mean and var over tokens, so that long
    completions count more.

    Source: REINFORCE++, arXiv 2501.03262 (global advantage normalization); var and eps as in
    volcengine/verl:verl/utils/torch_functional.py.

    >>> global_norm(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    tensor([[ 0.5000,  0.5000],
            [ 0.5000, -1.5000]])
    """
    return whiten(rewards, torch.ones_like(rewards, dtype=torch.bool), eps)


def global_norm_baseline(rewards: Float[Tensor, "P G"], eps: float = 1e-8) -> Float[Tensor, "P G"]:
    """Subtract each group's mean, then divide by one std: (r - group mean) / sqrt(var + eps), var of all P * G differences.

    The differences already have mean 0, so that whitening them is this division, and a group of equal rewards (G = 1 too) gets
    exactly zero. Easy and hard problems keep their own scale, which ``group_norm`` takes from them. In OpenRLHF:
    ``reinforce_baseline``; in verl: ``reinforce_plus_plus_baseline`` (there, a group of one keeps its reward).

    Source: REINFORCE++ with baseline, arXiv 2501.03262; volcengine/verl:verl/trainer/ppo/core_algos.py.

    >>> global_norm_baseline(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    tensor([[ 0.0000,  0.0000],
            [ 1.2247, -1.2247]])
    """
    centered = group_center(rewards)
    var = centered.square().sum() / max(rewards.numel() - 1, 1)
    return centered * (var + eps).rsqrt()


def max_rl(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Divide by each group's mean reward instead of its std: (r - mean) / mean, zero for a group whose mean is 0.

    In a group of which a fraction q is right, a right rollout gets 1 / q - 1 and a wrong one -1: the rarer a success, the
    larger its weight. For 0/1 rewards of a policy with pass rate p, the expected mean of A * grad log pi over the group is
    1 + (1 - p) + ... + (1 - p)^(G - 2) times grad p; as G grows, that becomes grad log p.

    Raises:
        ConfigError: a reward is negative.

    Source: MaxRL, arXiv 2602.02710; PrimeIntellect-ai/prime-rl:src/prime_rl/orchestrator/algo/max_rl.py.

    >>> max_rl(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    tensor([[ 3., -1., -1., -1.]])
    """
    if bool((rewards < 0).any()):
        raise ConfigError(
            f"max_rl divides by a group's mean reward and one reward is {rewards.min():g}: give rewards of 0 or more, or "
            "choose another advantage"
        )
    mean = rewards.mean(-1, keepdim=True)
    return group_center(rewards) / torch.where(mean > 0, mean, 1.0)


def pass_at_k(rewards: Float[Tensor, "P G"], *, k: int = 4, eps: float = 1e-6) -> Float[Tensor, "P G"]:
    """Credit a rollout for the pass@k of the k-subsets of its group that hold it: (mean over them - mean) / (std + eps).

    The reward of a subset is 1 if any of its k rollouts is right. With n wrong rollouts the mean over all subsets is
    1 - C(n, k) / C(G, k); over those that hold a given wrong one it is 1 - C(n - 1, k - 1) / C(G - 1, k - 1), and over those
    that hold a right one 1; std = sqrt(mean * (1 - mean)). With fewer than k wrong rollouts every subset passes, and all get
    exactly zero: the larger k, the earlier a problem counts as solved. k = 1 is ``group_norm`` with the population std.

    Raises:
        ConfigError: k is not in 1 .. G, or a reward is neither 0 nor 1.

    Source: arXiv 2508.10751 (analytical derivation); eps as in RUCAIBox/Passk_Training:code/passk_adv.py.

    >>> pass_at_k(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), k=2)
    tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])
    """
    group = rewards.shape[-1]
    if not 1 <= k <= group:
        raise ConfigError(
            f"pass_at_k has k = {k} and groups of {group}: set k to 1 or more, and rollouts_per_problem to at least k"
        )
    if not bool(((rewards == 0) | (rewards == 1)).all()):
        raise ConfigError("pass_at_k counts right and wrong rollouts: give rewards of 0 or 1, or choose another advantage")
    table = []  # by number of wrong rollouts: advantage of a wrong one, of a right one
    for wrong in range(group + 1):
        fail = math.comb(wrong, k) / math.comb(group, k)
        fail_with_one = math.comb(wrong - 1, k - 1) / math.comb(group - 1, k - 1) if wrong else 0.0
        std = math.sqrt(fail * (1 - fail))
        table.append(((fail - fail_with_one) / (std + eps), fail / (std + eps)))
    num_wrong = (rewards == 0).sum(-1, keepdim=True)
    return rewards.new_tensor(table)[num_wrong, rewards.long()]


Advantage = Literal[
    "group_norm", "group_center", "leave_one_out", "global_norm", "global_norm_baseline", "max_rl", "pass_at_k", "gae"
]
ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm": group_norm,
    "group_center": group_center,
    "leave_one_out": leave_one_out,
    "global_norm": global_norm,
    "global_norm_baseline": global_norm_baseline,
    "max_rl": max_rl,
    "pass_at_k": pass_at_k,
}


def whiten(
    values: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    eps: float = 1e-8,
    *,
    everywhere: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "B S"]:
    """Give the values inside the mask mean 0 and variance 1: (v - mean) / sqrt(var + eps), var with Bessel's correction.

    Exactly zero outside the mask, and everywhere if all values inside are equal, or only one or none is. What lies outside is
    never read, not even if it is NaN.

    Args:
        values: of this rank's rows.
        mask: which of them count.
        eps: added to the variance.
        everywhere: the values inside the masks of all ranks, if there are others than these.

    Source: ypwang61/One-Shot-RLVR:verl/utils/torch_functional.py, masked_whiten.

    >>> whiten(torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]]))
    tensor([[-1.,  0.,  1.,  0.]])
    """
    inside, result = values[mask], torch.zeros_like(values)
    everywhere = inside if everywhere is None else everywhere
    if not bool((everywhere == everywhere[:1]).all()):
        result[mask] = (inside - everywhere.mean()) * (everywhere.var() + eps).rsqrt()
    return result


def gae(
    rewards: Float[Tensor, "B S"],
    values: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S"]]:
    """Return (advantages, returns) of each completion token by generalized advantage estimation; zero outside the mask.

    delta_t = r_t + gamma * V_(t+1) - V_t; A_t = sum over l >= 0 of (gamma * lam)^l * delta_(t+l); returns = A + V. After the
    last completion token V is 0: a completion that was cut off is not bootstrapped. No gradient flows, nothing is whitened.

    Args:
        rewards: reward for choosing token t; the verifier's at the last completion token, zero before.
        values: the critic's V of the state in which token t is chosen, that is, read at the position before it.
        mask: True on completion tokens, one unbroken run per row. What lies outside is never read.
        gamma: discount per token.
        lam: 1: Monte Carlo return minus V; 0: delta alone.

    Raises:
        ConfigError: gamma or lam is not in 0 .. 1.
        ValueError: a row of the mask has more than one run.

    Source: arXiv 1506.02438, equation 16; ypwang61/One-Shot-RLVR:verl/trainer/ppo/core_algos.py, which whitens on top.

    >>> gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.25, 0.5, 0.75]]), torch.tensor([[True, True, True]]))
    (tensor([[0.7500, 0.5000, 0.2500]]), tensor([[1., 1., 1.]]))
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} of the generalized advantage estimation is {value}: set it to a number from 0 to 1")
    if bool((pad(mask, (1, 0))[:, :-1].logical_not() & mask).sum(-1).gt(1).any()):
        raise ValueError("a row's completion tokens are not one unbroken run: estimate each turn as a row of its own")
    rewards, values = rewards.detach().where(mask, 0.0), values.detach().where(mask, 0.0)
    advantages = rewards + gamma * pad(values, (0, 1))[:, 1:] - values  # delta
    # After d doublings each entry holds the first 2^d terms of its sum: log2(S) passes over (B, S) instead of S over (B,).
    span, num_tokens = 1, mask.shape[-1]
    while span < num_tokens:
        advantages = advantages + (gamma * lam) ** span * pad(advantages[:, span:], (0, span))
        span *= 2
    advantages = advantages.where(mask, 0.0)
    return advantages, advantages + values
