"""From rollouts to tensors, and from tensors to micro-batches that fit a token budget.

Legend: ``P`` problems, ``G`` rollouts per problem, ``B = P * G`` rows, ``S`` tokens of the longest row.
Rows are right-padded: prompt, completion, padding. Per-token arrays have length ``S`` and index ``t`` describes token ``t``;
the one-position causal shift happens inside ``Policy.forward`` and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlvr_lightning.prefix_tree import BLOCK, common_prefixes, lexical_order
from rlvr_lightning.records import Rollout


def share_of_rank(rollouts: int, updates: int, rank: int, world_size: int) -> list[int]:
    """Return which of a step's rollouts, counted group after group, are this rank's.

    Each of the step's mini-batches is shared out evenly and in order, so it holds the same rollouts on any number of ranks.

    >>> [share_of_rank(10, 2, rank, 2) for rank in (0, 1)]
    [[0, 1, 5, 6], [2, 3, 4, 7, 8, 9]]
    """
    shares = ((rows, split_evenly(len(rows), world_size)[rank]) for rows in split_evenly(rollouts, updates))
    return [i for rows, share in shares for i in rows[share.start : share.stop]]


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Rollouts as padded tensors. Frozen: a step adds arrays with :func:`dataclasses.replace`."""

    input_ids: Tensor
    """(B, S) int64: prompt, completion, padding."""
    completion_mask: Tensor
    """(B, S) bool: sampled tokens, the sampled end-of-sequence token included. Built from lengths, never by comparing
    with the padding id, which many tokenizers share with end-of-sequence."""
    sampler_logprobs: Tensor
    """(B, S) float32: the engine's log-probs of the sampled tokens; 0 elsewhere."""
    lengths: tuple[int, ...]
    """[B] prompt + completion."""
    temperature: float
    """Sampling temperature of every row."""
    advantages: Tensor | None = None
    """(B, S) float32; of a group's rollout, the same for all its tokens."""
    old_logprobs: Tensor | None = None
    """(B, S) float32: the policy's log-probs before the first update on this batch; None = this is the first update."""
    reference_logprobs: Tensor | None = None
    """(B, S) float32; None when the KL term is off."""
    values: Tensor | None = None
    """(B, S) float32: the critic's values before the first update on this batch; None without a critic."""
    returns: Tensor | None = None
    """(B, S) float32: what the critic is to learn from this batch; None without a critic."""

    @classmethod
    def from_rollouts(cls, rollouts: Sequence[Rollout]) -> "RolloutBatch":
        """Pad rollouts to one batch on the CPU, in the given order.

        No rollouts give one row that contributes nothing: a rank without work still joins in what is collective.

        Raises:
            ValueError: for an empty completion, or temperatures that differ.
        """
        if not rollouts:
            blank = torch.zeros(1, 2)  # a row needs a token that predicts and one that is predicted
            return cls(blank.long(), blank.bool(), blank, (2,), 1.0)
        temperatures = {r.temperature for r in rollouts}
        if len(temperatures) != 1:
            raise ValueError(f"rollouts of one batch need one sampling temperature, got {sorted(temperatures)}")
        lengths = tuple(len(r.prompt_ids) + len(r.completion.token_ids) for r in rollouts)
        if not all(r.completion.token_ids for r in rollouts):
            raise ValueError("a completion without tokens cannot be trained on: the engine has to return at least one")
        input_ids = torch.zeros(len(rollouts), max(lengths), dtype=torch.long)
        mask = torch.zeros(input_ids.shape, dtype=torch.bool)
        sampler_logprobs = torch.zeros(input_ids.shape, dtype=torch.float32)
        for row, (rollout, end) in enumerate(zip(rollouts, lengths, strict=True)):
            start = len(rollout.prompt_ids)
            input_ids[row, :end] = torch.tensor(rollout.prompt_ids + rollout.completion.token_ids)
            mask[row, start:end] = True
            sampler_logprobs[row, start:end] = torch.tensor(rollout.completion.logprobs)
        return cls(
            input_ids=input_ids,
            completion_mask=mask,
            sampler_logprobs=sampler_logprobs,
            lengths=lengths,
            temperature=temperatures.pop(),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "RolloutBatch":
        """Return the batch with every tensor on ``device``."""
        return replace(self, **{f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)})

    def rows(self, indices: Sequence[int]) -> "RolloutBatch":
        """Return the given rows, cut to the longest of them."""
        width = max(self.lengths[i] for i in indices)
        index = torch.tensor(indices, device=self.input_ids.device)

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[index, :width] if value.dim() == 2 else value[index]
            return tuple(value[i] for i in indices) if isinstance(value, tuple) else value

        return RolloutBatch(**{f.name: cut(getattr(self, f.name)) for f in fields(self)})

    def without_completions(self) -> "RolloutBatch":
        """Return the same rows with an all-False mask: forward and backward run, and contribute exactly nothing."""
        return replace(self, completion_mask=torch.zeros_like(self.completion_mask))


def split_evenly(num_rows: int, parts: int) -> list[range]:
    """Return ``parts`` contiguous ranges over ``num_rows`` rows whose sizes differ by one at most."""
    bounds = [num_rows * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


@dataclass(frozen=True)
class Costs:
    """What a forward and backward pass spends, in tokens through the linear layers of the decoder."""

    pair: float = 1e-3
    """One query that attends to one key."""
    prediction: float = 0.3
    """One token through the head."""
    micro_batch: float = 128.0
    """Starting one more micro-batch. Measured on two CPU cores with a 135M model."""


@dataclass(frozen=True)
class Plan:
    """How the rows of a batch are cut into micro-batches."""

    cuts: list[list[int]]
    """Row indices of each micro-batch."""
    as_tree: bool
    """Run each as a prefix tree (`prefix_tree.py`), else as padded rows."""
    tokens: int
    """That the decoder computes."""
    cost: float
    """Expected, in the unit of :class:`Costs`."""


def plan_micro_batches(
    batch: RolloutBatch,
    max_tokens: int,
    *,
    share: bool | None = None,
    costs: Costs = Costs(),
) -> Plan:
    """Cut a batch into micro-batches of at most ``max_tokens`` tokens each.

    As a prefix tree a micro-batch has as many tokens as it has distinct prefixes; as rows it has rows x the longest. A single
    row above the budget gets a micro-batch of its own: the budget trades memory for speed, it never drops data.

    Args:
        batch: the rows.
        max_tokens: the budget.
        share: True for a tree, False for rows, None for what is expected to be cheaper.
        costs: of the model at hand.

    >>> ids = torch.tensor([[7, 8, 5, 5], [7, 8, 6, 0], [7, 8, 5, 5]])
    >>> batch = RolloutBatch(ids, *[torch.zeros(3, 4)] * 2, (4, 3, 4), 1.0)
    >>> plan_micro_batches(batch, 5, share=True).cuts
    [[0, 2, 1]]
    >>> plan_micro_batches(batch, 8, share=False).cuts
    [[0, 2], [1]]
    """
    plans = [
        make(batch, max_tokens, costs) for make, wanted in ((_tree_plan, True), (_row_plan, False)) if share in (wanted, None)
    ]
    return min(plans, key=lambda plan: plan.cost)


def _tree_plan(batch: RolloutBatch, max_tokens: int, costs: Costs) -> Plan:
    """Rows in lexical order, so that those with long common prefixes meet; each cut as full as it gets."""
    ids, ends = batch.input_ids.cpu().numpy(), np.asarray(batch.lengths)
    order, block = lexical_order(ids, ends), BLOCK[batch.input_ids.device.type]
    cuts: list[list[int]] = []
    tokens, total, cost = 0, 0, 0.0
    for row, common in zip(order.tolist(), [0, *common_prefixes(ids, ends, order)], strict=True):
        end = batch.lengths[row]
        if not cuts or tokens + end - common > max_tokens:
            cuts.append([])
            tokens, common, cost = 0, 0, cost + costs.micro_batch
        cuts[-1].append(row)
        new = end - common
        tokens, total = tokens + new, total + new
        keys = new * ((common + end) / 2 + block)
        cost += new + costs.pair * keys + costs.prediction * min(new, int(batch.completion_mask[row].sum()))
    return Plan(cuts, True, total, cost)


def _row_plan(batch: RolloutBatch, max_tokens: int, costs: Costs) -> Plan:
    """Rows by length, cut where the padding saved is worth more than another micro-batch costs; exact, by dynamic programming.

    Ties go to the longer first run.
    """
    rows = sorted(range(len(batch)), key=lambda i: -batch.lengths[i])
    best: list[tuple[float, int]] = [(0.0, 0)] * (len(rows) + 1)  # from row i on: (cost, minus the end of the first run)
    for start in range(len(rows) - 1, -1, -1):
        longest = batch.lengths[rows[start]]
        each = longest + costs.pair * longest**2 / 2
        ends = range(start + 1, min(start + max(1, max_tokens // longest), len(rows)) + 1)
        best[start] = min((costs.micro_batch + (end - start) * each + best[end][0], -end) for end in ends)
    cuts, start = [], 0
    while start < len(rows):
        cuts.append(rows[start : -best[start][1]])
        start = -best[start][1]
    total = sum(len(cut) * batch.lengths[cut[0]] for cut in cuts)
    return Plan(cuts, False, total, best[0][0] + costs.prediction * int(batch.completion_mask.sum()))
