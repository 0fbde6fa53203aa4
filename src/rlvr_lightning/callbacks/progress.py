"""One printed line per step and per evaluation: enough to see from a terminal or a log file whether a run learns."""

import time
from collections import deque
from statistics import median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlvr_lightning.records import ProblemBatch

# key, how it is shown; fixed widths, so that lines can be compared by eye
COLUMNS = (
    ("rollout/reward", "reward {:5.2f}"),
    ("rollout/length", "length {:6.1f}"),
    ("train/entropy", "entropy {:.3f}"),
    ("rollout/tokens_per_s", "{:5.0f} tok/s"),
    ("time/step_s", "{:5.1f} s/step"),
)


class ProgressCallback(Callback):
    """Prints on rank zero. A metric that is not logged is left out.

    Steps are counted in optimizer updates, as ``trainer.global_step`` and ``trainer.max_steps`` are. The time left is
    that of the remaining updates at the median pace of the last 10 batches, so that an evaluation does not disturb it.
    """

    def __init__(self) -> None:
        self._seconds_per_update: deque[float] = deque(maxlen=10)
        self._last: tuple[float, int] = (0.0, 0)
        self._said_zero_advantage = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a resumed run starts at the step it restored."""
        self._seconds_per_update.clear()
        self._last = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ProblemBatch, batch_idx: int
    ) -> None:
        """Print the step's line."""
        # From end to end of a batch, and not from its start: other callbacks sample the rollouts at the start.
        now, step = time.monotonic(), trainer.global_step
        if step > self._last[1]:
            self._seconds_per_update.append((now - self._last[0]) / (step - self._last[1]))
        self._last = (now, step)
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        total = trainer.max_steps if trainer.max_steps > 0 else None
        parts = [f"step {step:3d}" if total is None else f"step {step:{max(3, len(str(total)))}d}/{total}"]
        parts += [text.format(float(metrics[key])) for key, text in COLUMNS if key in metrics]
        if total is not None and self._seconds_per_update:
            parts.append(f"left {clock(max(total - step, 0) * median(self._seconds_per_update))}")
        print("   ".join(parts), flush=True)
        if metrics.get("rollout/zero_advantage_fraction") == 1.0 and batch.rollouts and not self._said_zero_advantage:
            self._said_zero_advantage = True
            print(zero_advantage_sentence(batch, world_size=trainer.world_size), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print every set's accuracy in one line, with its fingerprint where an EvaluationCallback knows it."""
        if not trainer.is_global_zero:  # the sanity check before a fit leaves no metrics, so it prints nothing
            return
        callbacks: list[Any] = getattr(trainer, "callbacks")  # noqa: B009 - set by Lightning at run time
        ids = {name: f" [{of['id']}]" for c in callbacks for name, of in getattr(c, "fingerprints", {}).items()}
        accuracies = {
            key.removeprefix("val/").removesuffix("/accuracy"): float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("val/") and key.endswith("/accuracy")
        }
        parts = [f"{name} {value:.2f}{ids.get(name, '')}" for name, value in accuracies.items()]
        if parts:
            print("   ".join([f"eval at step {trainer.global_step}", *parts]), flush=True)


def zero_advantage_sentence(batch: ProblemBatch, *, world_size: int = 1) -> str:
    """Return why the policy gradient is zero when the rollouts of each group all scored the same."""
    rewards = sorted({rollout.score.reward for rollout in batch.rollouts or []})
    whose = "" if world_size == 1 else " of this rank"
    rest = "the policy gradient is zero this step; the KL and entropy terms still act"
    if len(rewards) == 1:
        return f"all {len(batch.rollouts or [])} rollouts{whose} scored {rewards[0]:g}: {rest}"
    scores = ", ".join(f"{reward:g}" for reward in rewards)
    return f"in each of the {len(batch.problems)} groups all rollouts scored the same ({scores}{whose}): {rest}"


def clock(seconds: float) -> str:
    """Return a duration as m:ss, or h:mm:ss from one hour on.

    >>> clock(88.4), clock(3725)
    ('1:28', '1:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
