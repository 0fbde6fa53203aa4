"""From rollouts to padded tensors and to micro-batches: nothing lost, nothing doubled, end-of-sequence kept."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lightning.batching import RolloutBatch, plan_micro_batches, share_of_rank, split_evenly
from rlvr_lightning.records import Completion, Problem, Rollout, Score

EOS = PAD = 0
PROBLEMS = [Problem(id=f"p{i}", question="?", answer="1") for i in range(3)]


def rollout(
    prompt: Sequence[int] = (7, 8),
    completion: Sequence[int] = (5, EOS),
    *,
    reward: float = 0.0,
    problem: Problem = PROBLEMS[0],
    temperature: float = 0.6,
) -> Rollout:
    logprobs = tuple(-0.1 * (i + 1) for i in range(len(completion)))
    score = Score(reward, reward == 1, "correct" if reward == 1 else "wrong", None)
    return Rollout(problem, tuple(prompt), Completion(tuple(completion), logprobs, "", "stop"), score, temperature, 0)


def batch_of(lengths: Sequence[tuple[int, int]]) -> RolloutBatch:
    """Rows of (prompt number, completion tokens); prompt ``k`` has ``k + 1`` tokens."""
    return RolloutBatch.from_rollouts([rollout([k + 2] * (k + 1), [9] * tokens) for k, tokens in lengths])


ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=24)


def test_rows_are_prompt_then_completion_then_padding():
    batch = RolloutBatch.from_rollouts([rollout((7, 8), (5, 6, EOS)), rollout((7,), (4,))])
    assert batch.input_ids.tolist() == [[7, 8, 5, 6, EOS], [7, 4, PAD, PAD, PAD]]
    assert batch.completion_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    expected = torch.tensor([[0, 0, -0.1, -0.2, -0.3], [0, -0.1, 0, 0, 0]])
    torch.testing.assert_close(batch.sampler_logprobs, expected)
    assert (batch.lengths, batch.temperature) == ((5, 2), 0.6)


def test_the_mask_follows_lengths_although_end_of_sequence_is_the_padding_id():
    # Prompts may hold the id, completions may hold it twice, and the padding is made of it.
    batch = RolloutBatch.from_rollouts([rollout((EOS, 8), (EOS, 5, EOS)), rollout((EOS, 8), (EOS,))])
    assert batch.completion_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]


def test_selected_rows_are_cut_to_their_longest_and_keep_every_array():
    rows = [rollout((7, 8), (5, 6, 4, EOS)), rollout((9,), (3, EOS)), rollout((9,), (2,))]
    whole = RolloutBatch.from_rollouts(rows)
    numbered = torch.arange(18.0).view(3, 6)
    whole = replace(whole, advantages=2 * numbered, old_logprobs=numbered, reference_logprobs=-numbered)
    part = whole.rows([2, 1])
    expected = RolloutBatch.from_rollouts([rows[2], rows[1]])
    assert part.input_ids.tolist() == expected.input_ids.tolist() == [[9, 2, PAD], [9, 3, EOS]]
    assert part.completion_mask.tolist() == expected.completion_mask.tolist()
    torch.testing.assert_close(part.sampler_logprobs, expected.sampler_logprobs)
    assert part.lengths == (2, 3)
    assert part.advantages is not None
    assert part.old_logprobs is not None
    assert part.reference_logprobs is not None
    assert part.advantages.tolist() == [[24.0, 26.0, 28.0], [12.0, 14.0, 16.0]]
    assert part.old_logprobs.tolist() == [[12.0, 13.0, 14.0], [6.0, 7.0, 8.0]]
    assert part.reference_logprobs.tolist() == [[-12.0, -13.0, -14.0], [-6.0, -7.0, -8.0]]
    assert part.temperature == 0.6


def test_without_completions_keeps_the_rows_and_learns_from_none():
    batch = RolloutBatch.from_rollouts([rollout(), rollout()])
    silent = batch.without_completions()
    assert silent.completion_mask.sum() == 0
    assert silent.completion_mask.shape == batch.completion_mask.shape
    assert silent.input_ids is batch.input_ids
    assert batch.completion_mask.sum() == 4


@pytest.mark.parametrize(
    ("rollouts", "message"),
    [
        ([rollout(), rollout(completion=())], "completion without tokens"),
        ([rollout(temperature=0.6), rollout(temperature=1.0)], r"one sampling temperature, got \[0\.6, 1\.0\]"),
    ],
)
def test_rollouts_that_cannot_be_batched_are_refused(rollouts: list[Rollout], message: str):
    with pytest.raises(ValueError, match=message):
        RolloutBatch.from_rollouts(rollouts)


@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 5))
def test_ranks_share_out_every_mini_batch_evenly(rollouts: int, updates: int, world_size: int):
    shares = [share_of_rank(rollouts, updates, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share) == list(range(rollouts))
    assert all(share == sorted(share) for share in shares)
    for minibatch in split_evenly(rollouts, updates):
        sizes = [len(set(minibatch) & set(share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_no_rollouts_are_one_row_without_completion():
    batch = RolloutBatch.from_rollouts([])
    assert (len(batch), int(batch.completion_mask.sum())) == (1, 0)
    assert plan_micro_batches(batch, 10).cuts == [[0]]


def distinct_prefixes(batch: RolloutBatch, rows: Sequence[int]) -> int:
    return len({tuple(batch.input_ids[i, : t + 1].tolist()) for i in rows for t in range(batch.lengths[i])})


@given(ROWS, st.integers(1, 120), st.booleans())
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[tuple[int, int]], max_tokens: int, share: bool):
    batch = batch_of(lengths)
    plan = plan_micro_batches(batch, max_tokens, share=share)
    assert plan.as_tree == share
    assert sorted(row for rows in plan.cuts for row in rows) == list(range(len(batch)))
    for rows in plan.cuts:
        padded = len(rows) * max(batch.lengths[i] for i in rows)
        assert (distinct_prefixes(batch, rows) if share else padded) <= max_tokens or len(rows) == 1


@given(ROWS, st.integers(1, 120))
def test_a_tree_is_cut_only_where_the_next_row_does_not_fit(lengths: list[tuple[int, int]], max_tokens: int):
    batch = batch_of(lengths)
    cuts = plan_micro_batches(batch, max_tokens, share=True).cuts
    for rows, following in pairwise(cuts):
        assert distinct_prefixes(batch, [*rows, following[0]]) > max_tokens


def test_rows_of_like_length_go_into_one_micro_batch_when_they_fit():
    batch = batch_of([(0, 10)] * 6)  # a prompt of 1 token, completions of 10
    assert [sorted(rows) for rows in plan_micro_batches(batch, 1000, share=False).cuts] == [[0, 1, 2, 3, 4, 5]]
    # 33 // 11 = 3 rows per micro-batch
    assert [len(rows) for rows in plan_micro_batches(batch, 33, share=False).cuts] == [3, 3]
    assert [len(rows) for rows in plan_micro_batches(batch, 31, share=False).cuts] == [2, 2, 2]
    assert [len(rows) for rows in plan_micro_batches(batch, 11, share=True).cuts] == [6]  # six times the same


def test_one_very_long_row_is_not_padded_onto_the_short_ones():
    batch = batch_of([(0, 1)] * 15 + [(0, 400)])
    # together: 16 rows x 401 tokens = 6416; apart: 401 + 15 x 2 = 431, and one more start costs far less than the rest
    assert sorted(map(len, plan_micro_batches(batch, 10**6, share=False).cuts)) == [1, 15]


@pytest.mark.parametrize(
    ("prompt", "completion", "group", "as_tree"),
    [(68, 14, 64, True), (512, 64, 64, True), (2048, 8, 8, True), (16, 2048, 8, False), (16, 8, 1, False)],
)
def test_prefixes_are_shared_where_that_saves_more_than_it_costs(prompt: int, completion: int, group: int, as_tree: bool):
    batch = RolloutBatch.from_rollouts([rollout([5] * prompt, [i + 10] * completion) for i in range(group)])
    assert plan_micro_batches(batch, 10**6).as_tree == as_tree


@given(st.integers(0, 100), st.integers(1, 20))
def test_an_even_split_covers_all_rows_in_order_with_sizes_one_apart(num_rows: int, parts: int):
    ranges = split_evenly(num_rows, parts)
    assert [i for part in ranges for i in part] == list(range(num_rows))
    assert len(ranges) == parts
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
