"""When the training problems are solved, and what evaluation gains before and after; never a reason to stop."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from rlvr_lightning.saturation import Saturation, describe, summarize


class SaturationCallback(Callback):
    """Logs ``rollout/saturated_at``, 0 while there is no such step, and writes ``<root>/summary.json`` at the end.

    A saturated problem is neither filtered nor skipped, and the run goes on: accuracy on other problems keeps rising
    (arXiv 2504.20571, section 3.2).

    Args:
        threshold: mean training accuracy that counts as saturated.
        window: number of steps in that mean.
    """

    def __init__(self, *, threshold: float = 0.99, window: int = 10) -> None:
        self._saturation = Saturation(threshold, window)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take this step's accuracy, which is that of all ranks."""
        accuracy = trainer.callback_metrics.get("rollout/accuracy")
        if accuracy is None:
            return
        self._saturation.update(batch.step + 1, float(accuracy))
        pl_module.log("rollout/saturated_at", float(self._saturation.step or 0), batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say and write what the run's own log shows."""
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        summary = summarize(root, threshold=self._saturation.threshold, window=self._saturation.window)
        (root / "summary.json").write_text(json.dumps({"saturation": summary}, indent=2) + "\n")
        print(describe(summary), flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update({"saturation": summary})

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return self._saturation.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self._saturation.load_state_dict(state_dict)
