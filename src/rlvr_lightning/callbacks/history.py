"""What each problem scored at each step, as the run goes: the file to plot learning curves per problem from."""

from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from rlvr_lightning.jsonl import append_lines, keep_before
from rlvr_lightning.records import ProblemBatch


class HistoryCallback(Callback):
    """Appends one row per step and problem slot to ``<root>/history.jsonl``, on the disk before the next step begins.

    A row: ``{"step", "id", "slot", "rewards": [...], "lengths": [...], "truncated": n, "reasons": {reason: n}}``, with
    one entry per rollout in ``rewards`` and ``lengths`` (tokens). Rank zero writes the rows of all ranks, by slot. The
    first batch of a fit drops the rows that an earlier run left for its step and later ones.
    """

    def __init__(self) -> None:
        self._begun = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for leftovers at the first batch: only that says which step the run resumes at."""
        self._begun = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ProblemBatch, batch_idx: int
    ) -> None:
        """Write the step's rows; all ranks must call it."""
        rows = history_rows(gather_rows(visits(batch)))
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "history.jsonl"
        if not self._begun:
            keep_before(path, batch.step)
            self._begun = True
        append_lines(path, rows, fsync=True)


def visits(batch: ProblemBatch) -> list[dict[str, Any]]:
    """Return what `history_rows` needs of each rollout of this rank."""
    return [
        {
            "step": batch.step,
            "id": rollout.problem.id,
            "slot": batch.slots[index],
            "sample": sample,
            "reward": rollout.score.reward,
            "length": len(rollout.completion.token_ids),
            "truncated": rollout.completion.finish_reason == "length",
            "reason": rollout.score.reason,
        }
        for (index, sample), rollout in zip(batch.places, batch.rollouts or (), strict=True)
    ]


def history_rows(rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per slot, in order, from the rollouts of all ranks; see `HistoryCallback`."""
    rows = []
    for slot, group in groupby(sorted(rollouts, key=lambda r: (r["slot"], r["sample"])), key=lambda r: r["slot"]):
        visit = list(group)
        rows.append(
            {
                "step": visit[0]["step"],
                "id": visit[0]["id"],
                "slot": slot,
                "rewards": [r["reward"] for r in visit],
                "lengths": [r["length"] for r in visit],
                "truncated": sum(r["truncated"] for r in visit),
                "reasons": dict(Counter(r["reason"] for r in visit)),
            }
        )
    return rows


def gather_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of all ranks, rank after rank; all ranks must call it."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
