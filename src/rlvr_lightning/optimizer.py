"""The optimizer and its learning rate."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rlvr_lightning.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The optimizer. Defaults: arXiv 2504.20571 and its code."""

    lr: float = 1e-6
    """Learning rate after the warm-up; constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay on every trained weight."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from lr / warmup_steps to lr."""
    start_at_zero: bool = False
    """Begin the rise at 0, so that the first update moves nothing, as in the paper's code; only its moments count later."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optimizer.lr is {self.lr}: set it above 0")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise ConfigError("optimizer.weight_decay and optimizer.warmup_steps: set them to 0 or above")

    def lr_at(self, updates: int) -> float:
        """Return the learning rate of the next update, after so many."""
        return self.lr * min(1.0, (updates + (not self.start_at_zero)) / max(self.warmup_steps, 1))


def build_optimizer(*groups: tuple[AdamW, Iterable[torch.nn.Parameter]]) -> torch.optim.AdamW:
    """Return one optimizer over those weights that train, each group with settings of its own."""
    settings: list[dict[str, Any]] = [
        asdict(config) | {"params": [p for p in weights if p.requires_grad]} for config, weights in groups
    ]
    fused = not any(isinstance(p, DTensor) for group in settings for p in group["params"])
    keys = ("params", "lr", "betas", "eps", "weight_decay")
    return torch.optim.AdamW([{key: group[key] for key in keys} for group in settings], fused=fused)
