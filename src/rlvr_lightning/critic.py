"""The critic of PPO: what return it expects from every state, and how that is learned.

Legend: ``b`` rows of a micro-batch, ``B`` rows of a step, ``S`` tokens of the padded row, ``N`` predictions, ``H`` hidden size.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from rlvr_lightning.backbone import Backbone, ValueHead
from rlvr_lightning.batching import Costs, RolloutBatch
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.losses import PerToken
from rlvr_lightning.models import load_config_and_tokenizer
from rlvr_lightning.optimizer import AdamW
from rlvr_lightning.policy import PolicyConfig


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The critic, for ``advantage: gae``. Defaults: the code of arXiv 2504.20571, except where a key says otherwise."""

    shared_trunk: bool = False
    """False: a copy of the policy's model with a value head, trained by itself. True: a value head on the policy's own decoder,
    trained in the policy's updates: no more memory, but the two losses pull at the same weights."""
    gamma: float = 1.0
    """Discount per token of the returns."""
    lam: float = 1.0
    """Lambda of GAE. 1: the return minus the value; lower trusts the critic more."""
    value_clip: float = 0.5
    """A value counts as no further than this from what it was before the step, if that makes its loss larger. ``.inf``: off."""
    coef: float = 1.0
    """Weight of the value loss beside the policy's, with ``shared_trunk``; a copy's own loss needs no weight."""
    optimizer: AdamW = AdamW(lr=1e-5)  # noqa: RUF009 - frozen
    """Of the critic's copy, or of the value head alone with ``shared_trunk``."""
    updates_per_step: int = 1
    """Updates of the copy on one batch of rollouts (paper's code: 8)."""
    head_start: int = 0
    """Rollout batches at the beginning that train the copy alone, while the policy stays as it is (verl: ``critic_warmup``)."""
    head_std: float = 0.0
    """Standard deviation of the value head's first weights; 0 expects nothing anywhere (paper's code: 0.02)."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"critic.{name} is {getattr(self, name)}: set it to a number from 0 to 1")
        for name in ("coef", "value_clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"critic.{name} is {getattr(self, name)}: set it above 0")
        if self.updates_per_step < 1 or self.head_start < 0 or self.head_std < 0:
            raise ConfigError("critic: set updates_per_step to 1 or more, and head_start and head_std to 0 or more")
        if self.shared_trunk and (self.updates_per_step > 1 or self.head_start):
            raise ConfigError(
                "critic.shared_trunk trains the value head in the policy's updates: leave critic.updates_per_step and "
                "critic.head_start out, or set shared_trunk to false"
            )
        if not self.shared_trunk and self.coef != 1:
            raise ConfigError("critic.coef has no effect on a critic with its own optimizer: leave it out, or set shared_trunk")

    def __str__(self) -> str:
        trunk = "head on the policy's trunk" if self.shared_trunk else f"own copy, {self.updates_per_step} update(s) a step"
        loss = f"{f'{self.coef:g} * ' if self.shared_trunk else ''}0.5 * (value - return)^2, clipped at {self.value_clip:g}"
        return f"{trunk}, lr {self.optimizer.lr:g}; {loss}; GAE with gamma {self.gamma:g}, lambda {self.lam:g}, whitened"

    def head(self, policy: PolicyConfig) -> ValueHead:
        """Return a new value head that fits the policy's hidden states; ``head_std`` draws from torch's global generator."""
        config, _ = load_config_and_tokenizer(policy.model_path)
        return ValueHead(config.hidden_size, self.head_std)

    def build(self, policy: PolicyConfig) -> "Critic":
        """Load a copy of the policy's model, as the policy itself would be (with LoRA: its own adapters), and a value head."""
        lm, _ = policy.load()
        return Critic(lm, policy, self.head(policy))


class Critic(Backbone):
    """A decoder with a value head: one number per sampled token."""

    def __init__(self, lm: PreTrainedModel, config: PolicyConfig, head: ValueHead) -> None:
        decoder = lm.get_decoder()  # the language-model head is left behind
        super().__init__(decoder, share=config.share_prefixes, gradient_checkpointing=config.gradient_checkpointing)
        self.value_head = head

    def forward(self, batch: RolloutBatch, *, as_tree: bool = False) -> tuple[Tensor]:
        """Return the values (b, S): at each completion token the return expected before it is chosen; zeros elsewhere."""
        states = self.states(batch, as_tree=as_tree)
        return (states.spread(self.value_head(states.hidden)),)

    @property
    def costs(self) -> Costs:
        """What its passes cost: there is no vocabulary."""
        return replace(super().costs, prediction=0.0)


def value_loss(values: PerToken, old_values: PerToken, returns: PerToken, value_clip: float) -> PerToken:
    """Return 0.5 * max((v - R)^2, (clip(v, v_old - value_clip, v_old + value_clip) - R)^2) per token.

    Source: PPO's code, openai/baselines:baselines/ppo2/model.py; ypwang61/One-Shot-RLVR:verl/trainer/ppo/core_algos.py.

    >>> value_loss(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), torch.ones(1, 2), 0.5)
    tensor([[0.5000, 0.1250]])
    """
    near = torch.clamp(values, old_values - value_clip, old_values + value_clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def explained_variance(values: Float[Tensor, " n"], returns: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return 1 - var(R - v) / var(R): 1 for a critic that knows every return, 0 for one that says the same everywhere.

    NaN while all returns are equal up to rounding: there is nothing to explain.

    >>> explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]))
    tensor(0.7500)
    """
    variance = returns.var()
    return torch.where(variance > 1e-10, 1 - (returns - values).var() / variance, math.nan)
