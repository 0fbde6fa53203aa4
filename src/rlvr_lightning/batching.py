"""From rollouts to tensors, and from tensors to micro-batches that fit a token budget.

Legend: ``P`` problems, ``G`` rollouts per problem, ``B = P * G`` rows, ``S`` tokens of the longest row, ``L`` prompt tokens,
``T`` completion tokens. Rows are right-padded: prompt, completion, padding. Per-token arrays have length ``S`` and index
``t`` describes token ``t``; the one-position causal shift happens inside ``Policy.forward`` and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlvr_lightning.records import Rollout


def group_rewards(rollouts: Sequence[Rollout], num_problems: int) -> Tensor:
    """Return the rewards as (P, G), from group-major rollouts.

    Raises:
        ValueError: if the rollouts do not divide into ``num_problems`` equal groups of one problem each.
    """
    rewards = torch.tensor([r.score.reward for r in rollouts], dtype=torch.float32)
    if num_problems == 0 or len(rollouts) % num_problems:
        raise ValueError(f"{len(rollouts)} rollouts do not divide into {num_problems} equal groups")
    group = len(rollouts) // num_problems
    if any(rollouts[i].problem != rollouts[i - i % group].problem for i in range(len(rollouts))):
        raise ValueError("rollouts are not group-major: a group mixes problems")
    return rewards.view(num_problems, group)


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
    prompt_lengths: tuple[int, ...]
    """[B]"""
    lengths: tuple[int, ...]
    """[B] prompt + completion."""
    prompt_groups: tuple[int, ...]
    """[B] rows with the same number have the same prompt tokens."""
    temperature: float
    """Sampling temperature of every row."""
    advantages: Tensor | None = None
    """(B,) float32."""
    old_logprobs: Tensor | None = None
    """(B, S) float32: the policy's log-probs before the first update on this batch; None = this is the first update."""
    reference_logprobs: Tensor | None = None
    """(B, S) float32; None when the KL term is off."""

    @classmethod
    def from_rollouts(cls, rollouts: Sequence[Rollout]) -> "RolloutBatch":
        """Pad rollouts to one batch on the CPU, in the given order.

        Raises:
            ValueError: for no rollouts, an empty completion, or temperatures that differ.
        """
        temperatures = {r.temperature for r in rollouts}
        if len(temperatures) != 1:
            raise ValueError(f"rollouts of one batch need one sampling temperature, got {sorted(temperatures)}")
        prompt_lengths = tuple(len(r.prompt_ids) for r in rollouts)
        lengths = tuple(len(r.prompt_ids) + len(r.completion.token_ids) for r in rollouts)
        if any(length == prompt for length, prompt in zip(lengths, prompt_lengths, strict=True)):
            raise ValueError("a completion without tokens cannot be trained on: the engine has to return at least one")
        input_ids = torch.zeros(len(rollouts), max(lengths), dtype=torch.long)
        mask = torch.zeros(input_ids.shape, dtype=torch.bool)
        sampler_logprobs = torch.zeros(input_ids.shape, dtype=torch.float32)
        groups: dict[tuple[int, ...], int] = {}
        for row, (rollout, start, end) in enumerate(zip(rollouts, prompt_lengths, lengths, strict=True)):
            input_ids[row, :end] = torch.tensor(rollout.prompt_ids + rollout.completion.token_ids)
            mask[row, start:end] = True
            sampler_logprobs[row, start:end] = torch.tensor(rollout.completion.logprobs)
            groups.setdefault(rollout.prompt_ids, len(groups))
        return cls(
            input_ids=input_ids,
            completion_mask=mask,
            sampler_logprobs=sampler_logprobs,
            prompt_lengths=prompt_lengths,
            lengths=lengths,
            prompt_groups=tuple(groups[r.prompt_ids] for r in rollouts),
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


OVERHEAD_TOKENS = 128
"""What starting one more micro-batch costs, in tokens of arithmetic. Measured on two CPU cores with a 135M model."""


def plan_micro_batches(batch: RolloutBatch, max_tokens: int, *, share_prompts: bool) -> list[list[int]]:
    """Return row indices per micro-batch, longest first, each within ``max_tokens`` padded tokens.

    Rows are sorted by length and cut where the padding saved is worth more than another micro-batch costs. With
    ``share_prompts`` a micro-batch holds rows of one prompt only and counts that prompt once. A single row above the budget
    gets a micro-batch of its own: the budget trades memory for speed, it never drops data.

    >>> rows = RolloutBatch(*[torch.zeros(3, 5)] * 3, (2, 2, 2), (5, 3, 4), (0, 0, 0), 1.0)
    >>> plan_micro_batches(rows, 8, share_prompts=False)
    [[0], [2, 1]]
    >>> plan_micro_batches(rows, 8, share_prompts=True)
    [[0, 2], [1]]
    """
    plan: list[list[int]] = []
    for group in sorted(set(batch.prompt_groups)) if share_prompts else [None]:
        rows = [i for i in range(len(batch)) if group is None or batch.prompt_groups[i] == group]
        rows.sort(key=lambda i: -batch.lengths[i])
        shared = batch.prompt_lengths[rows[0]] if share_prompts else 0
        for start, end in _cheapest_cuts([batch.lengths[i] - shared for i in rows], shared, max_tokens):
            plan.append(rows[start:end])
    return plan


def _cheapest_cuts(lengths: list[int], shared: int, max_tokens: int) -> list[tuple[int, int]]:
    """Cut descending lengths into runs that minimize padded tokens plus overhead; exact, by dynamic programming.

    Ties go to the longer first run.
    """
    best: list[tuple[int, int]] = [(0, len(lengths))] * (len(lengths) + 1)  # from row i on: (cost, end of the first run)
    for start in range(len(lengths) - 1, -1, -1):
        longest = max(lengths[start], 1)
        most = max(1, (max_tokens - shared) // longest)
        fixed = OVERHEAD_TOKENS + shared
        ends = range(start + 1, min(start + most, len(lengths)) + 1)
        best[start] = min((fixed + (end - start) * longest + best[end][0], -end) for end in ends)
        best[start] = (best[start][0], -best[start][1])
    cuts, start = [], 0
    while start < len(lengths):
        cuts.append((start, best[start][1]))
        start = best[start][1]
    return cuts
