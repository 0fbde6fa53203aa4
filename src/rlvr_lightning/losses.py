"""The objective: one formula, three terms, per token.

Legend: ``b`` rows of a micro-batch, ``S`` tokens of the padded row. Every array has a value per token; what lies outside the
completion mask is ignored by whoever sums. No term averages: normalization happens once, with :func:`token_weights`.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.schedule import Schedule, ever_nonzero

PolicyLoss = Literal["clip", "gspo", "cispo"]
KLEstimator = Literal["k1", "k2", "k3", "abs"]
KLPlace = Literal["loss", "reward"]
Reduction = Literal["token", "sequence", "micro_batch"]
PerToken = Float[Tensor, "b S"]
PerRow = Float[Tensor, "b 1"]
Mask = Bool[Tensor, "b S"]


@dataclass(frozen=True)
class LossTerms:
    """Per-token terms of the loss, each (b, S)."""

    surrogate: Tensor
    """Policy-gradient loss, after every clip and importance weight."""
    kl: Tensor
    """Estimate of KL(policy || reference), nats; zeros without a reference. In the total only with ``kl_in: loss``."""
    entropy: Tensor
    """Entropy of the policy's next-token distribution, nats."""
    total: Tensor
    """policy_coef * surrogate + kl_coef * kl - entropy_coef * entropy."""
    clipped: Tensor
    """1 where a clip of the ratio is active, else 0."""


def clipped_surrogate(ratio: PerToken, advantages: PerToken | PerRow, clip_low: float, clip_high: float) -> PerToken:
    """Return -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), the loss to minimize.

    Source: PPO, arXiv 1707.06347, equation 7.

    >>> clipped_surrogate(torch.tensor([[1.5, 0.5]]), torch.tensor([[1.0]]), 0.2, 0.2)
    tensor([[-1.2000, -0.5000]])
    """
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def sequence_ratio(logprobs: PerToken, old_logprobs: PerToken, mask: Mask) -> PerToken:
    """Return exp(mean over the row's tokens of logprobs - old_logprobs), the same number at every token of a row.

    A row without tokens has ratio 1. A mean moves far less than a token, so its clip is narrower: GSPO's authors take clip_low
    3e-4 and clip_high 4e-4, and average per sequence. Source: GSPO, arXiv 2507.18071, section 4.1.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).sum(dim=1, keepdim=True)
    return torch.exp(log_ratio / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(logprobs)


def cispo_surrogate(
    logprobs: PerToken, ratio: PerToken, advantages: PerToken | PerRow, clip_low: float, clip_high: float
) -> PerToken:
    """Return -clip(ratio, 1 - clip_low, 1 + clip_high) * A * logprobs, no gradient through the ratio.

    Every token keeps a gradient; the clip bounds its weight only. clip_low = 1 means no lower bound, as its authors have it.
    Source: CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5.
    """
    return -ratio.detach().clamp(1 - clip_low, 1 + clip_high) * advantages * logprobs


def dual_clipped(surrogate: PerToken, advantages: PerToken | PerRow, dual_clip: float) -> PerToken:
    """Return min(surrogate, -dual_clip * A) where A < 0, else the surrogate: a bad token costs at most dual_clip * |A|.

    Source: dual-clip PPO, arXiv 1912.09729 (there max(min(...), c * A), to maximize).
    """
    return torch.where(advantages < 0, torch.minimum(surrogate, -dual_clip * advantages), surrogate)


def importance_weights(old_logprobs: PerToken, sampler_logprobs: PerToken, cap: float) -> PerToken:
    """Return min(exp(old_logprobs - sampler_logprobs), cap), no gradient: corrects for an engine that is not quite the learner.

    Source: truncated importance sampling, Ionides 2008; between engine and learner as in verl and TRL.
    """
    return torch.exp(old_logprobs - sampler_logprobs).clamp(max=cap).detach()


def kl_k3(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return exp(d) - d - 1 with d = log reference - log policy: an estimate of KL(policy || reference), never negative.

    Clamped to 10 as in the paper's code (ypwang61/One-Shot-RLVR:verl/trainer/ppo/core_algos.py, low_var_kl).
    Source: Schulman 2020, "Approximating KL divergence", estimator k3; arXiv 2504.20571, section 2.

    >>> kl_k3(torch.tensor([[0.0, -1.0]]), torch.tensor([[0.0, -2.0]]))
    tensor([[0.0000, 0.3679]])
    """
    d = (reference_logprobs - logprobs).clamp(max=20.0)  # beyond, exp overflows and its gradient behind the clamp is NaN
    return (d.expm1() - d).clamp(max=10.0)


def kl_estimate(logprobs: PerToken, reference_logprobs: PerToken, estimator: KLEstimator) -> PerToken:
    """Return an estimate of KL(policy || reference) per token, nats.

    With d = log reference - log policy, k1: -d, unbiased, but its mean gradient is zero, so it is of use in the reward only.
    k2: d^2 / 2, biased, but its mean gradient on-policy is that of the KL. k3: see :func:`kl_k3`. abs: |d|.
    Source: Schulman 2020, "Approximating KL divergence"; abs as in verl's core_algos.py.
    """
    if estimator == "k3":
        return kl_k3(logprobs, reference_logprobs)
    k1 = logprobs - reference_logprobs
    return {"k1": k1, "k2": k1.square() / 2, "abs": k1.abs()}[estimator]


def token_weights(mask: Mask, reduction: Reduction, *, num_tokens: Tensor | int, num_rows: Tensor | int) -> PerToken:
    """Return what each token's loss counts in the mini-batch's loss = sum over micro-batches of (total * weights).sum().

    The weights of a mini-batch sum to 1; a row without tokens has none. By reduction,
    token: mask / num_tokens. DAPO, arXiv 2503.14476.
    sequence: mask / (tokens of the row * num_rows). GRPO, arXiv 2402.03300, equation 3.
    micro_batch: mask / tokens of the micro-batch * its rows / num_rows; depends on how rows are cut into micro-batches. Code of
        arXiv 2504.20571 (ypwang61/One-Shot-RLVR:verl/workers/actor/dp_actor.py).

    Args:
        mask: completion tokens of one micro-batch.
        reduction: which of the three.
        num_tokens: completion tokens of the mini-batch, over all micro-batches and ranks.
        num_rows: rows of the mini-batch that have completion tokens, over all micro-batches and ranks.
    """
    tokens = mask.sum(dim=1, keepdim=True)  # (b, 1)
    all_tokens, all_rows = (torch.as_tensor(n, device=mask.device).clamp(min=1) for n in (num_tokens, num_rows))
    if reduction == "token":
        return mask / all_tokens
    if reduction == "sequence":
        return mask / (tokens.clamp(min=1) * all_rows)
    return mask * ((tokens > 0).sum() / (tokens.sum().clamp(min=1) * all_rows))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """loss = policy_coef * surrogate + kl_coef * KL(policy || reference) - entropy_coef * H(policy), per token.

    This object is both the configuration and the function. A coefficient of 0 removes the term (with kl_coef 0 no reference
    model is built); each may be a schedule. Source: arXiv 2504.20571, section 2 (its alpha is minus our entropy_coef).
    """

    policy_coef: float | Schedule = 1.0
    """Weight of the policy-gradient term; 0 trains on KL and entropy alone."""
    kl_coef: float | Schedule = 0.001
    """Weight of KL(policy || reference), in the loss or in the reward (``kl_in``)."""
    entropy_coef: float | Schedule = 0.001
    """Weight of the entropy bonus: it is subtracted, so a positive value keeps the policy exploring. A negative one minimizes
    entropy (arXiv 2505.20282), with policy_coef 0 as the only signal."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low. Only acts with more than one update per rollout batch."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    policy_loss: PolicyLoss = "clip"
    """clip: PPO's, with a ratio per token. gspo: the same with a ratio per sequence; set the clips to about 3e-4 and
    ``reduction`` to sequence. cispo: the clipped ratio weighs the log-prob and has no gradient."""
    dual_clip: float | None = None
    """Where the advantage is negative, a token's loss is at most dual_clip * |advantage|; above 1, usually 3. None: off."""
    importance_cap: float | None = None
    """The surrogate is weighted by a token's probability under the learner over that under the engine, at most this, usually 2.
    None: not weighted."""
    kl_estimator: KLEstimator = "k3"
    """How KL is estimated from the sampled token. k1 has no mean gradient: use it with ``kl_in: reward``."""
    kl_in: KLPlace = "loss"
    """reward: kl_coef times the KL summed over a completion is subtracted from its reward, and the loss has no KL term."""
    reduction: Reduction = "token"
    """What the loss averages over. token: all tokens alike. sequence: each row's tokens, then rows. micro_batch: each
    micro-batch's tokens, then micro-batches by their rows (the paper's code; depends on ``tokens_per_micro_batch``)."""

    def __post_init__(self) -> None:
        for name in ("policy_coef", "kl_coef", "entropy_coef", "clip_low", "clip_high"):
            value = getattr(self, name)
            numbers = {".start": value.start, ".end": value.end} if isinstance(value, Schedule) else {"": value}
            for part, number in numbers.items():
                if not math.isfinite(number):
                    raise ConfigError(f"objective.{name}{part} is {number}: set a finite number")
                if number < 0 and name != "entropy_coef":
                    raise ConfigError(f"objective.{name}{part} is {number}: set it to 0 (off) or above")
        if self.clip_low > 1:
            raise ConfigError(f"objective.clip_low is {self.clip_low}: 1 already lets the ratio fall to 0; set at most 1")
        choices = {"policy_loss": PolicyLoss, "kl_estimator": KLEstimator, "kl_in": KLPlace, "reduction": Reduction}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(f"objective.{name} is {getattr(self, name)!r}: choose one of {', '.join(get_args(allowed))}")
        for name, least in (("dual_clip", 1), ("importance_cap", 0)):
            if (limit := getattr(self, name)) is not None and not limit > least:
                raise ConfigError(f"objective.{name} is {limit}: set it above {least}, or to null (off)")
        if self.dual_clip is not None and self.policy_loss == "cispo":
            raise ConfigError("objective.dual_clip has no effect with policy_loss cispo, a clip for both signs: set it to null")

    @property
    def uses_kl(self) -> bool:
        """Whether the KL coefficient is, or ever becomes, other than 0; then a reference is needed."""
        return ever_nonzero(self.kl_coef)

    def at(self, step: int) -> "Objective":
        """Return the objective of a step (rollout batches before it), with numbers in place of schedules."""
        names = ("policy_coef", "kl_coef", "entropy_coef")
        numbers = {name: value.at(step) for name in names if isinstance(value := getattr(self, name), Schedule)}
        return replace(self, **numbers) if numbers else self

    @property
    def coefficients(self) -> dict[str, float]:
        """Term of :class:`LossTerms` -> its factor in the total, terms at 0 or in the reward left out. No schedules here."""
        return {term: value * sign for term, sign, value in self._signed()}

    def _signed(self) -> list[tuple[str, int, float | Schedule]]:
        """Term, sign and coefficient of what is ever in the total."""
        kl_coef = self.kl_coef if self.kl_in == "loss" else 0.0
        signed = [("surrogate", 1, self.policy_coef), ("kl", 1, kl_coef), ("entropy", -1, self.entropy_coef)]
        return [(term, sign, value) for term, sign, value in signed if ever_nonzero(value)]

    def __str__(self) -> str:
        """The formula with its numbers, terms at 0 left out, and the switches that are not at their defaults."""
        terms = " ".join(_summand(*term) for term in self._signed()).removeprefix("+ ")
        text = f"loss = {terms or '0 (nothing but weight decay moves the weights)'}"
        if self.kl_in == "reward" and self.uses_kl:
            text += f", reward {_summand('kl', -1, self.kl_coef)}"
        switches = ("policy_loss", "dual_clip", "importance_cap", "kl_estimator", "reduction")
        changed = [f"{n}={v}" for n in switches if (v := getattr(self, n)) != getattr(Objective, n)]
        return text + (f" ({', '.join(changed)})" if changed else "")

    def __call__(
        self,
        *,
        logprobs: PerToken,
        entropy: PerToken,
        old_logprobs: PerToken,
        reference_logprobs: PerToken | None,
        advantages: PerToken | PerRow,
        sampler_logprobs: PerToken | None = None,
        mask: Mask | None = None,
    ) -> LossTerms:
        """Compute every term for every token.

        Args:
            logprobs: log-probs of the sampled tokens under the policy being trained, at the sampling temperature.
            entropy: entropy of the same distributions.
            old_logprobs: the same log-probs before the first update on these rollouts, no gradient.
            reference_logprobs: under the frozen reference, no gradient; None when ``kl_coef`` is 0.
            advantages: of each token, or one for all tokens of a row.
            sampler_logprobs: what the engine said when it sampled, no gradient; needed for ``importance_cap``.
            mask: completion tokens; needed for ``policy_loss: gspo``.

        Raises:
            ValueError: if an input that a switch needs is missing; TypeError if a coefficient is a schedule.
        """
        ratio = torch.exp(logprobs - old_logprobs)
        if self.policy_loss == "gspo":
            ratio = sequence_ratio(logprobs, old_logprobs, _given(mask, "policy_loss gspo needs mask"))
        if self.policy_loss == "cispo":
            surrogate = cispo_surrogate(logprobs, ratio, advantages, self.clip_low, self.clip_high)
            clipped = ratio != ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        else:
            surrogate = clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high)
            if self.dual_clip is not None:
                surrogate = dual_clipped(surrogate, advantages, self.dual_clip)
            clipped = surrogate != -ratio * advantages
        if self.importance_cap is not None:
            sampled = _given(sampler_logprobs, "importance_cap needs sampler_logprobs")
            surrogate = importance_weights(old_logprobs, sampled, self.importance_cap) * surrogate
        kl = torch.zeros_like(logprobs) if reference_logprobs is None else kl_k3(logprobs, reference_logprobs)
        if reference_logprobs is not None and self.kl_estimator != "k3":
            kl = kl_estimate(logprobs, reference_logprobs, self.kl_estimator)
        if self.kl_in == "reward":  # the advantages hold it already
            total = self.policy_coef * surrogate - self.entropy_coef * entropy
        else:
            total = self.policy_coef * surrogate + self.kl_coef * kl - self.entropy_coef * entropy
        return LossTerms(surrogate=surrogate, kl=kl, entropy=entropy, total=total, clipped=clipped.to(logprobs.dtype))


def _given(value: Tensor | None, need: str) -> Tensor:
    if value is None:
        raise ValueError(f"objective.{need}: pass it with the log-probs")
    return value


def _summand(term: str, sign: int, coef: float | Schedule) -> str:
    """Such as ``- 0.001 * entropy``; a schedule keeps its own signs."""
    name = "KL(policy || reference)" if term == "kl" else term
    if isinstance(coef, Schedule):
        return f"{'-' if sign < 0 else '+'} ({coef}) * {name}"
    return f"{'-' if sign * coef < 0 else '+'} {f'{abs(coef):g} * ' if abs(coef) != 1 else ''}{name}"
