"""The half of the Lightning module that evaluates: rollouts in, metrics of each set out."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from torchmetrics import MetricCollection

from rlvr_lightning.metrics import evaluation_metrics
from rlvr_lightning.records import ProblemBatch


class EvaluationModule(LightningModule):
    """Counts the rollouts that the rollout callback has attached, and logs every set's metrics over all ranks.

    Args:
        reflection_words: responses that contain one of them are counted (`metrics.ReflectionRate`).
    """

    def __init__(self, reflection_words: Sequence[str]) -> None:
        super().__init__()
        self.reflection_words = tuple(reflection_words)
        self._evaluators: dict[str, MetricCollection] = {}

    @property
    def steps_done(self) -> int:
        """Rollout batches trained on so far: the x-axis of every log."""
        raise NotImplementedError

    def _evaluate(self, batch: ProblemBatch) -> None:
        assert batch.rollouts is not None, "no rollouts attached: add RolloutCallback to the trainer"
        if batch.name not in self._evaluators:
            self._evaluators[batch.name] = evaluation_metrics(
                batch.group_size, subjects=batch.subjects, reflection_words=self.reflection_words
            ).to(self.device)
        self._evaluators[batch.name].update(batch.rollouts)

    def _log_evaluators(self, stage: str) -> None:
        for name, metrics in self._evaluators.items():
            self.log_dict({f"{stage}/{name}/{k}": v.float() for k, v in metrics.compute().items()})
        self.log("step", float(self.steps_done))
        self._evaluators.clear()

    def validation_step(self, batch: ProblemBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count this batch's rollouts towards its evaluation set."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/<set>/<metric>`` for every evaluation set."""
        self._log_evaluators("val")

    def test_step(self, batch: ProblemBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count this batch's rollouts towards its evaluation set."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log ``test/<set>/<metric>`` for every evaluation set."""
        self._log_evaluators("test")

    def predict_step(self, batch: ProblemBatch, batch_idx: int, dataloader_idx: int = 0) -> ProblemBatch:
        """Return the batch with its rollouts."""
        assert batch.rollouts is not None, "no rollouts attached: add RolloutCallback to the trainer"
        return batch
