"""Checkpoints at intervals, and one more when the run is asked to stop."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from rlvr_lightning.checkpoints import discard, scratch_of
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.module import RLVRModule

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CheckpointCallback(Checkpoint):
    """Saves resumable checkpoints to ``<root>/checkpoints``. What bears a checkpoint's name there is complete.

    The first Ctrl-C or SIGTERM lets the current step finish, saves ``interrupted.ckpt`` and ends the run; the second ends
    it at once. Not Lightning's ModelCheckpoint, which expects models optimized by hand to hold a copy of their weights.

    Args:
        every_n_steps: rollout batches between checkpoints; 0 saves only when interrupted.
        keep: how many of them to keep, the latest ones; -1 keeps all.
    """

    def __init__(self, *, every_n_steps: int = 0, keep: int = 1) -> None:
        if every_n_steps < 0:
            raise ConfigError(f"checkpoint.every_n_steps is {every_n_steps}: set it to 0 (only when interrupted) or more")
        if keep == 0 or keep < -1:
            raise ConfigError(f"checkpoint.keep is {keep}: set it to 1 or more, or to -1 to keep all")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.stopped_by: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        """Take over the two signals that ask a run to stop; delete what a killed run was in the middle of writing."""
        self.stopped_by = None
        if trainer.is_global_zero:
            for leftover in (Path(trainer.default_root_dir) / "checkpoints").glob(scratch_of(Path("*.ckpt")).name):
                discard(leftover)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = number
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving; again to end at once", flush=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: RLVRModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save at intervals; when asked to stop, save and end, on every rank at the same step."""
        folder = Path(trainer.default_root_dir) / "checkpoints"
        if self.every_n_steps and pl_module.steps_done % self.every_n_steps == 0:
            trainer.save_checkpoint(folder / f"step-{pl_module.steps_done:06d}.ckpt")
            if trainer.is_global_zero:
                self._prune(folder)
        if trainer.strategy.reduce_boolean_decision(self.stopped_by is not None, all=False):
            trainer.should_stop = True
            command = save_interrupted(trainer)
            if trainer.is_global_zero:
                print(f"stopped after update {trainer.global_step}; to go on:\n  {command}")

    def _prune(self, folder: Path) -> None:
        """Delete all but the latest ``keep`` checkpoints, once the newest is complete."""
        checkpoints = sorted(folder.glob("step-*.ckpt"), key=lambda path: path.stat().st_mtime)
        for old in checkpoints[: len(checkpoints) - self.keep] if self.keep > 0 else []:
            discard(old)

    def _restore_signals(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_train_end(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        """Give the signals back."""
        self._restore_signals()

    def on_exception(self, trainer: Trainer, pl_module: RLVRModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore_signals()


def save_interrupted(trainer: Trainer) -> str:
    """Save ``checkpoints/interrupted.ckpt``; return the command that goes on from it. Collective."""
    root = Path(trainer.default_root_dir)
    path = root / "checkpoints" / "interrupted.ckpt"
    trainer.save_checkpoint(path)
    return f"rlvr fit --config {root / 'run.yaml'} --ckpt_path {path}"
