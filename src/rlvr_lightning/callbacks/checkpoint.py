"""Checkpoints at intervals, and one more when the run is asked to stop."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlvr_lightning.errors import ConfigError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CheckpointCallback(ModelCheckpoint):
    """Saves resumable checkpoints to ``<root>/checkpoints``.

    The first Ctrl-C or SIGTERM lets the current step finish, saves ``interrupted.ckpt`` and ends the run; the second ends
    it at once.

    Args:
        every_n_steps: updates between checkpoints; 0 saves only when interrupted.
        keep: how many of them to keep, the latest ones; -1 keeps all.
    """

    def __init__(self, *, every_n_steps: int = 0, keep: int = 1) -> None:
        if every_n_steps < 0:
            raise ConfigError(f"checkpoint.every_n_steps is {every_n_steps}: set it to 0 (only when interrupted) or more")
        if keep == 0 or keep < -1:
            raise ConfigError(f"checkpoint.keep is {keep}: set it to 1 or more, or to -1 to keep all")
        super().__init__(
            filename="{step:06d}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.stopped_by: int | None = None
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put checkpoints beside the run's other files."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the two signals that ask a run to stop."""
        super().on_train_start(trainer, pl_module)
        self.stopped_by = None
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = number
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving; again to end at once", flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at intervals; when asked to stop, save and end, on every rank at the same step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.strategy.reduce_boolean_decision(self.stopped_by is not None, all=False):
            path = Path(str(self.dirpath)) / "interrupted.ckpt"
            trainer.save_checkpoint(path)
            trainer.should_stop = True
            if trainer.is_global_zero:
                config = Path(trainer.default_root_dir) / "run.yaml"
                print(f"stopped after update {trainer.global_step}; to go on:\n  rlvr fit --config {config} --ckpt_path {path}")

    def _restore_signals(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        super().on_train_end(trainer, pl_module)
        self._restore_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        super().on_exception(trainer, pl_module, exception)
        self._restore_signals()
