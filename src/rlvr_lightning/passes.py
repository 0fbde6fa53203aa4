"""Passes over a batch in micro-batches, and sums over all ranks: what every model of the learner needs alike.

Legend: ``B`` rows of this rank, ``S`` tokens of the padded row, ``n`` numbers of this rank.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlvr_lightning.batching import Plan, RolloutBatch, plan_micro_batches
from rlvr_lightning.strategies import whole

if TYPE_CHECKING:
    from rlvr_lightning.backbone import Backbone


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """Return the sum over all ranks."""
    return _reduce(value, dist.ReduceOp.SUM)


def greatest(value: Tensor) -> Tensor:
    """Return the largest over all ranks."""
    return _reduce(value, dist.ReduceOp.MAX)


def _reduce(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, op=operation)
    return value


def gather(values: Tensor) -> Tensor:
    """Return the numbers (n,) of all ranks, rank after rank; n may differ."""
    if world_size() == 1:
        return values
    rank, counts = dist.get_rank(), torch.zeros(world_size(), dtype=torch.long, device=values.device)
    counts[rank] = len(values)
    counts = total(counts)
    everywhere = torch.zeros(int(counts.sum()), dtype=values.dtype, device=values.device)
    start = int(counts[:rank].sum())
    everywhere[start : start + len(values)] = values
    return total(everywhere)


def plan(data: RolloutBatch, model: "Backbone", max_tokens: int) -> Plan:
    """Cut into micro-batches; every rank gets the same number of them, empty ones at the end.

    Under FSDP2 a forward pass is collective, so unequal counts would hang.
    """
    cuts = plan_micro_batches(data, max_tokens, share=model.share, costs=model.costs)
    count = int(greatest(torch.tensor(len(cuts.cuts), device=data.input_ids.device)))
    return replace(cuts, cuts=cuts.cuts + [[]] * (count - len(cuts.cuts)))


def micro_batch(data: RolloutBatch, rows: list[int]) -> RolloutBatch:
    """Return these rows; without any, a row that runs and contributes nothing."""
    return data.rows(rows) if rows else data.rows([0]).without_completions()


@torch.no_grad()
def score(data: RolloutBatch, model: "Backbone", max_tokens: int) -> list[Tensor]:
    """Return every output of the model as (B, S) in fp32, without gradient."""
    cuts = plan(data, model, max_tokens)
    outputs: list[Tensor] = []
    for rows in cuts.cuts:
        parts = [part for part in model(micro_batch(data, rows), as_tree=cuts.as_tree) if part is not None]
        outputs = outputs or [torch.zeros(data.input_ids.shape, device=data.input_ids.device) for _ in parts]
        for output, part in zip(outputs, parts, strict=True):
            if rows:
                output[rows, : part.shape[1]] = part.float()
    if isinstance(model, FSDPModule):
        model.reshard()  # without a backward pass FSDP2 would keep the outermost parameters gathered
    return outputs


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradient down to at most this L2 norm, over all ranks; return the norm it had."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return whole(norm)
