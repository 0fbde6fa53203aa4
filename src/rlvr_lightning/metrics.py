"""Means over rollouts, as functions of a list and as torchmetrics that add up over batches and ranks.

Every metric here is a mean of one number per rollout. The class keeps the sum and the number of rollouts, both summed
over ranks: ranks with different numbers of rollouts (or none) give the mean over all of them, not a mean of means. The
mean over no rollouts is 0.0, in both forms: a nan would spread into every average and monitor downstream.
"""

from collections.abc import Sequence
from math import fsum
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from rlvr_lightning.records import Rollout


class RolloutMean(Metric):
    """Mean of ``value(rollout)``; subclasses say what the value is.

    The sum is float64: with float32, token counts stop adding up exactly after 16.7 million tokens.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @staticmethod
    def value(rollout: Rollout) -> float:
        """Return the number to average for one rollout."""
        raise NotImplementedError

    def update(self, rollouts: Sequence[Rollout]) -> None:
        """Add ``rollouts``; an empty list is fine."""
        self.total += fsum(map(self.value, rollouts))
        self.count += len(rollouts)

    def compute(self) -> Tensor:
        """Return the mean over every rollout of every rank, or 0.0 when there were none; all ranks must call it."""
        return self.total / self.count.clamp(min=1)


class Accuracy(RolloutMean):
    """Share of rollouts that the verifier calls correct; independent of the reward, which may hold a bonus."""

    higher_is_better = True

    @staticmethod
    def value(rollout: Rollout) -> float:
        """Return what one rollout counts."""
        return float(rollout.score.correct)


class BoxedRate(RolloutMean):
    """Share of rollouts in which the verifier found an answer at all, right or wrong."""

    higher_is_better = True

    @staticmethod
    def value(rollout: Rollout) -> float:
        """Return what one rollout counts."""
        return float(rollout.score.extracted is not None)


class MeanLength(RolloutMean):
    """Mean length of a completion in tokens; the end-of-sequence token counts."""

    @staticmethod
    def value(rollout: Rollout) -> float:
        """Return what one rollout counts."""
        return float(len(rollout.completion.token_ids))


class TruncationRate(RolloutMean):
    """Share of rollouts that ran into the token limit."""

    higher_is_better = False

    @staticmethod
    def value(rollout: Rollout) -> float:
        """Return what one rollout counts."""
        return float(rollout.completion.finish_reason == "length")


class MeanReward(RolloutMean):
    """Mean reward, as the objective sees it."""

    higher_is_better = True

    @staticmethod
    def value(rollout: Rollout) -> float:
        """Return what one rollout counts."""
        return rollout.score.reward


def rollout_metrics() -> MetricCollection:
    """Return accuracy, boxed, length, truncated and reward as one collection that takes a list of rollouts."""
    metrics: dict[str, Metric | MetricCollection] = {
        "accuracy": Accuracy(),
        "boxed": BoxedRate(),
        "length": MeanLength(),
        "truncated": TruncationRate(),
        "reward": MeanReward(),
    }
    # Compute groups merge metrics whose states agree after the first update. Ours agree whenever every rollout of that
    # update is, say, correct with reward 1; one of the two would never be updated again.
    return MetricCollection(metrics, compute_groups=False)


def accuracy(rollouts: Sequence[Rollout]) -> float:
    """Return the share of correct rollouts; see `Accuracy`."""
    return _mean(Accuracy, rollouts)


def boxed_rate(rollouts: Sequence[Rollout]) -> float:
    """Return the share of rollouts with an answer; see `BoxedRate`."""
    return _mean(BoxedRate, rollouts)


def mean_length(rollouts: Sequence[Rollout]) -> float:
    """Return the mean completion length in tokens; see `MeanLength`."""
    return _mean(MeanLength, rollouts)


def truncation_rate(rollouts: Sequence[Rollout]) -> float:
    """Return the share of truncated rollouts; see `TruncationRate`."""
    return _mean(TruncationRate, rollouts)


def mean_reward(rollouts: Sequence[Rollout]) -> float:
    """Return the mean reward; see `MeanReward`."""
    return _mean(MeanReward, rollouts)


def _mean(metric: type[RolloutMean], rollouts: Sequence[Rollout]) -> float:
    return fsum(map(metric.value, rollouts)) / max(len(rollouts), 1)
