"""A number that changes while training runs, such as a coefficient of the objective."""

import math
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

from rlvr_lightning.errors import ConfigError

Shape = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``start`` until step ``delay``, then to ``end`` within ``steps`` steps, then ``end``.

    A step is one rollout batch, the x-axis of every log; the first one is step 0.

    >>> [Schedule(start=0.01, end=0.0, steps=100).at(step) for step in (0, 50, 100, 500)]
    [0.01, 0.005, 0.0, 0.0]
    """

    start: float
    """Value up to and including step ``delay``."""
    end: float
    """Value from step ``delay + steps`` on."""
    steps: int
    """Steps from the first value to the last."""
    shape: Shape = "linear"
    """linear; cosine: slow at both ends, half-way at the same step; constant: keeps ``start``, then jumps to ``end``."""
    delay: int = 0
    """Steps before anything changes."""

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} of a schedule is {getattr(self, name)}: set a finite number")
        if self.steps < 1:
            raise ConfigError(f"steps of a schedule is {self.steps}: set it to 1 or more")
        if self.delay < 0:
            raise ConfigError(f"delay of a schedule is {self.delay}: set it to 0 or more")
        if self.shape not in get_args(Shape):
            raise ConfigError(f"shape of a schedule is {self.shape!r}: choose one of {', '.join(get_args(Shape))}")

    def at(self, step: int) -> float:
        """Return the value at a step; always between ``start`` and ``end``."""
        passed = (step - self.delay) / self.steps
        if passed >= 1:
            return float(self.end)
        if passed <= 0 or self.shape == "constant":
            return float(self.start)
        weight = passed if self.shape == "linear" else (1 - math.cos(math.pi * passed)) / 2
        return (1 - weight) * self.start + weight * self.end

    def __mul__(self, other: object) -> NoReturn:
        """Refuse: a schedule is no number."""
        raise TypeError(f"{self} is a schedule, not a number: use objective.at(step), or at(step) of the schedule")

    def __str__(self) -> str:
        """Such as ``0.01 -> 0 over 100 steps``."""
        if self.shape == "constant":
            return f"{self.start:g} -> {self.end:g} at step {self.delay + self.steps}"
        shape = "" if self.shape == "linear" else f" ({self.shape})"
        return f"{self.start:g} -> {self.end:g} over {self.steps} steps{f' after {self.delay}' if self.delay else ''}{shape}"


def ever_nonzero(value: float | Schedule) -> bool:
    """Return whether a number, or a schedule at any step, is other than 0."""
    return value.start != 0 or value.end != 0 if isinstance(value, Schedule) else value != 0
