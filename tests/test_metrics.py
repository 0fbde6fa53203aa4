"""Rollout metrics against sums written out by hand, over batches and over ranks."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlvr_lightning.metrics import (
    Accuracy,
    BoxedRate,
    MeanLength,
    MeanReward,
    RolloutMean,
    TruncationRate,
    accuracy,
    boxed_rate,
    mean_length,
    mean_reward,
    rollout_metrics,
    truncation_rate,
)
from rlvr_lightning.records import Completion, Problem, Rollout, Score

PROBLEM = Problem(id="p0", question="1+1?", answer="2")
TWINS = [
    (Accuracy, accuracy),
    (BoxedRate, boxed_rate),
    (MeanLength, mean_length),
    (TruncationRate, truncation_rate),
    (MeanReward, mean_reward),
]


def rollout(length: int, *, reward: float, correct: bool, extracted: str | None = "2", finish_reason: str = "stop") -> Rollout:
    completion = Completion((1,) * length, (-0.5,) * length, "text", finish_reason)
    score = Score(reward, correct, "correct" if correct else "wrong", extracted)
    return Rollout(PROBLEM, (7,), completion, score, 1.0, 0)


# A format bonus: reward 0.1 without being correct. One answer is missing, one completion is cut.
MIXED = [
    rollout(3, reward=1.0, correct=True),
    rollout(5, reward=0.1, correct=False),
    rollout(8, reward=0.0, correct=False, extracted=None, finish_reason="length"),
    rollout(4, reward=1.0, correct=True),
]
# accuracy 2/4, boxed 3/4, length (3+5+8+4)/4, truncated 1/4, reward 2.1/4
BY_HAND = {"accuracy": 0.5, "boxed": 0.75, "length": 5.0, "truncated": 0.25, "reward": 0.525}


def test_functions_and_collection_agree_with_hand_computed_values() -> None:
    functions = [accuracy(MIXED), boxed_rate(MIXED), mean_length(MIXED), truncation_rate(MIXED), mean_reward(MIXED)]
    assert functions == pytest.approx(list(BY_HAND.values()))
    metrics = rollout_metrics()
    metrics.update(MIXED)
    assert {key: value.item() for key, value in metrics.compute().items()} == pytest.approx(BY_HAND)


@pytest.mark.parametrize(("metric", "function"), TWINS)
def test_uneven_updates_give_the_mean_over_rollouts(metric: type[RolloutMean], function: object) -> None:
    whole, pieces = metric(), metric()
    whole.update(MIXED)
    for part in (MIXED[:1], [], MIXED[1:]):
        pieces.update(part)
    assert pieces.compute() == whole.compute() == pytest.approx(function(MIXED))


def test_metrics_whose_first_update_agrees_stay_separate() -> None:
    # All correct with reward 1: accuracy, boxed and reward have the same sum and count after this update.
    same = [rollout(1, reward=1.0, correct=True)] * 4
    metrics = rollout_metrics()
    metrics.update(same)
    metrics.update(MIXED)
    got = {key: value.item() for key, value in metrics.compute().items()}
    # accuracy (4+2)/8, boxed (4+3)/8, length (4+20)/8, truncated 1/8, reward (4+2.1)/8
    assert got == pytest.approx({"accuracy": 0.75, "boxed": 0.875, "length": 3.0, "truncated": 0.125, "reward": 0.7625})


@pytest.mark.parametrize(("metric", "function"), TWINS)
def test_no_rollouts_mean_zero_and_reset_forgets(metric: type[RolloutMean], function: object) -> None:
    assert function([]) == 0.0
    filled = metric()
    filled.update(MIXED)
    assert filled.compute() > 0
    filled.reset()
    filled.update([])
    assert filled.compute() == 0.0


def test_token_counts_add_up_beyond_float32() -> None:
    metric = MeanLength()
    metric.update([rollout(1, reward=0.0, correct=False)])
    metric.total += 2**24  # float32 cannot tell 2**24 from 2**24 + 1
    metric.update([rollout(1, reward=0.0, correct=False)])
    assert metric.compute().item() == (2**24 + 2) / 2


def _rank(rank: int, folder: str, rollouts: list[list[Rollout]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(rollouts))
    metrics = rollout_metrics()
    metrics.update(rollouts[rank])
    values = {key: value.item() for key, value in metrics.compute().items()}
    empty = Accuracy()
    empty.update(rollouts[0] if rank == 0 else [])
    torch.save({**values, "one_rank_empty": empty.compute().item()}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_ranks_with_different_counts_give_the_mean_over_all_rollouts(tmp_path: Path) -> None:
    parts = [MIXED[:1], MIXED[1:]]
    mp.spawn(_rank, args=(str(tmp_path), parts), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"rank{rank}.pt")
        # A mean of means would give accuracy (1 + 1/3) / 2; with rank 1 empty it would give 1/2.
        assert got == pytest.approx({**BY_HAND, "one_rank_empty": 1.0})
        assert not math.isclose(got["accuracy"], (1 + 1 / 3) / 2)
