"""The objective: one formula, three terms, per token.

Legend: ``b`` rows of a micro-batch, ``S`` tokens of the padded row. Every array has a value per token; what lies outside
the completion mask is ignored by whoever sums. Nothing here averages: normalization happens once, in the module.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlvr_lightning.errors import ConfigError


@dataclass(frozen=True)
class LossTerms:
    """Per-token terms of the loss, each (b, S)."""

    surrogate: Tensor
    """Clipped policy-gradient loss."""
    kl: Tensor
    """k3 estimate of KL(policy || reference), nats; zeros when the term is off."""
    entropy: Tensor
    """Entropy of the policy's next-token distribution, nats."""
    total: Tensor
    """policy_coef * surrogate + kl_coef * kl - entropy_coef * entropy."""
    clipped: Tensor
    """1 where the clip is active, else 0."""


def clipped_surrogate(
    ratio: Float[Tensor, "b S"], advantages: Float[Tensor, "b 1"], clip_low: float, clip_high: float
) -> Float[Tensor, "b S"]:
    """Return -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), the loss to minimize.

    Source: PPO, arXiv 1707.06347, equation 7.

    >>> clipped_surrogate(torch.tensor([[1.5, 0.5]]), torch.tensor([[1.0]]), 0.2, 0.2)
    tensor([[-1.2000, -0.5000]])
    """
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def kl_k3(logprobs: Float[Tensor, "b S"], reference_logprobs: Float[Tensor, "b S"]) -> Float[Tensor, "b S"]:
    """Return exp(d) - d - 1 with d = log reference - log policy: an estimate of KL(policy || reference), never negative.

    Clamped to 10 as in the paper's code (ypwang61/One-Shot-RLVR:verl/trainer/ppo/core_algos.py, low_var_kl).

    Source: Schulman 2020, "Approximating KL divergence", estimator k3; arXiv 2504.20571, section 2.

    >>> kl_k3(torch.tensor([[0.0, -1.0]]), torch.tensor([[0.0, -2.0]]))
    tensor([[0.0000, 0.3679]])
    """
    d = (reference_logprobs - logprobs).clamp(max=20.0)  # beyond, exp overflows and its gradient behind the clamp is NaN
    return (d.expm1() - d).clamp(max=10.0)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """loss = policy_coef * surrogate + kl_coef * KL(policy || reference) - entropy_coef * H(policy), per token.

    This object is both the configuration and the function. A coefficient of 0 removes the term: with kl_coef = 0 no
    reference model is built at all. Source: arXiv 2504.20571, section 2 (its alpha is minus our entropy_coef).
    """

    policy_coef: float = 1.0
    """Weight of the policy-gradient term; 0 trains on KL and entropy alone."""
    kl_coef: float = 0.001
    """Weight of KL(policy || reference), k3, in the loss (not in the reward)."""
    entropy_coef: float = 0.001
    """Weight of the entropy bonus: it is subtracted, so a positive value keeps the policy exploring."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low. Only acts with more than one update per rollout batch."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""

    def __post_init__(self) -> None:
        for name in ("policy_coef", "kl_coef", "entropy_coef", "clip_low", "clip_high"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"objective.{name} is {getattr(self, name)}: set a finite number")
        for name in ("policy_coef", "kl_coef", "clip_low", "clip_high"):
            if getattr(self, name) < 0:
                raise ConfigError(f"objective.{name} is {getattr(self, name)}: set it to 0 (off) or above")
        if self.clip_low > 1:
            raise ConfigError(f"objective.clip_low is {self.clip_low}: 1 already lets the ratio fall to 0; set at most 1")

    @property
    def coefficients(self) -> dict[str, float]:
        """Term of :class:`LossTerms` -> its factor in the total, terms at 0 left out."""
        factors = {"surrogate": self.policy_coef, "kl": self.kl_coef, "entropy": -self.entropy_coef}
        return {name: factor for name, factor in factors.items() if factor}

    def __str__(self) -> str:
        """The formula with its numbers, terms at 0 left out."""
        names = {"kl": "KL(policy || reference)"}
        terms = [(factor, names.get(name, name)) for name, factor in self.coefficients.items()]
        shown = [("- " if c < 0 else "+ ") + (f"{abs(c):g} * " if abs(c) != 1 else "") + name for c, name in terms]
        return "loss = " + (" ".join(shown).removeprefix("+ ") or "0 (nothing but weight decay moves the weights)")

    def __call__(
        self,
        *,
        logprobs: Float[Tensor, "b S"],
        entropy: Float[Tensor, "b S"],
        old_logprobs: Float[Tensor, "b S"],
        reference_logprobs: Float[Tensor, "b S"] | None,
        advantages: Float[Tensor, " b"],
    ) -> LossTerms:
        """Compute every term for every token.

        Args:
            logprobs: log-probs of the sampled tokens under the policy being trained, at the sampling temperature.
            entropy: entropy of the same distributions.
            old_logprobs: the same log-probs before the first update on these rollouts, no gradient.
            reference_logprobs: under the frozen reference, no gradient; None when ``kl_coef`` is 0.
            advantages: one per row, shared by all its tokens.
        """
        ratio = torch.exp(logprobs - old_logprobs)
        surrogate = clipped_surrogate(ratio, advantages[:, None], self.clip_low, self.clip_high)
        kl = torch.zeros_like(logprobs) if reference_logprobs is None else kl_k3(logprobs, reference_logprobs)
        total = self.policy_coef * surrogate + self.kl_coef * kl - self.entropy_coef * entropy
        clipped = (surrogate > -ratio * advantages[:, None]).to(ratio.dtype)
        return LossTerms(surrogate=surrogate, kl=kl, entropy=entropy, total=total, clipped=clipped)
