"""When training accuracy saturates, and what evaluation accuracy does before and after.

In one-example training the two part: the one problem is soon always solved, and the held-out accuracy goes on rising.

Source: arXiv 2504.20571, which reports it for steps 100 to 2000.
"""

import math
import re
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.plots import read_curves

_ROUNDING = 1e-6
"""Accuracies are logged in single precision: 0.95 is written as 0.94999999."""
_EVALUATED = re.compile(r"val/([^/]+)/accuracy")


class Saturation:
    """Finds the first step from which training accuracy stays high, as the run goes.

    That step is the first s such that the mean accuracy of the steps s to s + window - 1 is at least the threshold, and
    that of every later ``window`` consecutive steps too. A later fall takes it back. Memory is that of one window.

    >>> saturation = Saturation(threshold=0.9, window=2)
    >>> for step, accuracy in enumerate([0.5, 1.0, 0.8, 1.0], start=1):
    ...     saturation.update(step, accuracy)
    >>> saturation.step
    2

    Args:
        threshold: mean accuracy, above 0 and at most 1, that counts as saturated.
        window: number of steps in a mean.
    """

    def __init__(self, threshold: float = 0.99, window: int = 10) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"the saturation threshold is {threshold}: set it to an accuracy above 0 and at most 1")
        if window < 1:
            raise ConfigError(f"the saturation window is {window}: set it to 1 step or more")
        self.threshold, self.window = threshold, window
        self._recent: deque[tuple[int, float]] = deque(maxlen=window)
        self._step: int | None = None

    def update(self, step: int, accuracy: float) -> None:
        """Take the training accuracy of the next step.

        Args:
            step: larger than the one before; the caller's way of counting is that of ``self.step``.
            accuracy: share of the step's rollouts that are correct.
        """
        if self._recent and step <= self._recent[-1][0]:
            raise ValueError(f"step {step} follows step {self._recent[-1][0]}: give the steps in order, each once")
        self._recent.append((step, accuracy))
        if len(self._recent) < self.window:
            return
        mean = math.fsum(value for _, value in self._recent) / self.window
        if not mean >= self.threshold - _ROUNDING:  # nan is no high accuracy
            self._step = None
        elif self._step is None:
            self._step = self._recent[0][0]

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here."""
        return {"recent": list(self._recent), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self._recent = deque(((int(step), float(value)) for step, value in state["recent"]), maxlen=self.window)
        self._step = state["step"]

    @property
    def step(self) -> int | None:
        """The first saturated step; None while there is none, as in the first ``window`` - 1 steps."""
        return self._step


def summarize(root: Path, *, threshold: float = 0.99, window: int = 10) -> dict[str, Any]:
    """Return when a run's training accuracy saturated and what each evaluation set gained before and after.

    The rollouts of step s are sampled by the weights after s - 1 steps, which an evaluation reports as step s - 1. So the
    evaluation "at saturation" is the last one whose step is below ``saturated_at``: no saturated step has changed its weights.

    Args:
        root: a run directory; without ``metrics.jsonl``, or with nothing in it, nothing is found.
        threshold: as in `Saturation`.
        window: as in `Saturation`.

    Returns:
        ``{"saturated_at", "threshold", "window", "evals"}``. ``evals`` maps a set to its accuracies ``before`` (first
        evaluation), ``at_saturation`` and ``last``, to ``at_step``, the step of the evaluation at saturation, and to
        ``gain``, ``gain_before_saturation`` and ``gain_after_saturation``. None stands where there are not two evaluations
        to compare.
    """
    curves = read_curves(root)
    saturation = Saturation(threshold, window)
    for step, accuracy in sorted(dict(curves.get("rollout/accuracy", [])).items()):
        saturation.update(step, accuracy)
    evals = {
        match[1]: _gains(dict(curve), saturation.step) for key, curve in curves.items() if (match := _EVALUATED.fullmatch(key))
    }
    return {"saturated_at": saturation.step, "threshold": threshold, "window": window, "evals": evals}


def _gains(accuracy: dict[int, float], saturated_at: int | None) -> dict[str, Any]:
    """Return one set's entry of `summarize`, from a mapping of steps to accuracies that is not empty."""
    first, last = min(accuracy), max(accuracy)
    at = None if saturated_at is None else max((step for step in accuracy if step < saturated_at), default=None)
    return {
        "before": accuracy[first],
        "at_saturation": None if at is None else accuracy[at],
        "at_step": at,
        "last": accuracy[last],
        "gain": None if first == last else accuracy[last] - accuracy[first],
        "gain_before_saturation": None if at is None or at == first else accuracy[at] - accuracy[first],
        "gain_after_saturation": None if at is None or at == last else accuracy[last] - accuracy[at],
    }


def describe(summary: dict[str, Any]) -> str:
    """Return up to three lines on what `summarize` found, for the end of a run."""
    threshold, window, evals = summary["threshold"], summary["window"], summary["evals"]
    if summary["saturated_at"] is None:
        gains = [f"{name}: {entry['gain']:+.2f}" for name, entry in evals.items() if entry["gain"] is not None]
        lines = [f"training accuracy does not stay at {threshold:g} or above (means over {window} steps)"]
        return "\n".join([*lines, *([f"accuracy over the whole run: {'; '.join(gains)}"] if gains else [])])
    lines = [f"training accuracy stays at {threshold:g} or above from step {summary['saturated_at']} on"]
    parts = []
    for name, entry in evals.items():
        before, after = entry["gain_before_saturation"], entry["gain_after_saturation"]
        told = [f"{gain:+.2f} {when}" for gain, when in ((before, "before that"), (after, "after")) if gain is not None]
        parts += [f"{name}: {', '.join(told)}"] if told else []
    if parts:
        lines.append("; ".join(parts))
        steps = sorted({entry["at_step"] for entry in evals.values() if entry["at_step"] is not None})
        lines.append(f"(divided by the last evaluation before it, at step {', '.join(map(str, steps))})")
    return "\n".join(lines)
