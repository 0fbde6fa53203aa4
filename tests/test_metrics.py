"""Rollout metrics against sums written out by hand, over batches and over ranks."""

import math
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torchmetrics import MetricCollection

from rlvr_lightning.metrics import (
    Accuracy,
    BoxedAccuracy,
    BoxedRate,
    MajorityVote,
    MeanLength,
    MeanReward,
    PassAtK,
    ReflectionRate,
    RepetitionRate,
    RolloutMean,
    SubjectAccuracy,
    TruncationRate,
    accuracy,
    boxed_accuracy,
    boxed_rate,
    ends_in_repetition,
    evaluation_metrics,
    majority_vote,
    mean_length,
    mean_reward,
    pass_at_k,
    reason_shares,
    reflection_rate,
    repetition_rate,
    rollout_metrics,
    subject_accuracy,
    truncation_rate,
)
from rlvr_lightning.records import Completion, FinishReason, Problem, Reason, Rollout, Score

PROBLEM = Problem(id="p0", question="1+1?", answer="2", subject="sums")
Metrics = Callable[[], RolloutMean]
Function = Callable[[list[Rollout]], float]
TWINS: list[tuple[Metrics, Function]] = [
    (Accuracy, accuracy),
    (BoxedRate, boxed_rate),
    (BoxedAccuracy, boxed_accuracy),
    (MeanLength, mean_length),
    (TruncationRate, truncation_rate),
    (MeanReward, mean_reward),
    (RepetitionRate, repetition_rate),
    (ReflectionRate, reflection_rate),
    (lambda: SubjectAccuracy("sums"), lambda rollouts: subject_accuracy(rollouts).get("sums", 0.0)),
    (lambda: PassAtK(1, samples_per_problem=1), lambda rollouts: pass_at_k(rollouts, 1, samples_per_problem=1)),
    (lambda: MajorityVote(samples_per_problem=1), lambda rollouts: majority_vote(rollouts, samples_per_problem=1)),
]


def rollout(
    length: int = 1,
    *,
    reward: float = 0.0,
    correct: bool = False,
    extracted: str | None = "2",
    finish_reason: FinishReason = "stop",
    reason: Reason | None = None,
    text: str = "text",
    problem: Problem = PROBLEM,
) -> Rollout:
    completion = Completion((1,) * length, (-0.5,) * length, text, finish_reason)
    score = Score(reward, correct, reason or ("correct" if correct else "wrong"), extracted)
    return Rollout(problem, (7,), completion, score, 1.0, 0)


def values(metrics: MetricCollection) -> dict[str, float]:
    return {key: value.item() for key, value in metrics.compute().items()}


# A format bonus: reward 0.1 without being correct. One answer is missing, one completion is cut. One text loops, one reflects.
MIXED = [
    rollout(3, reward=1.0, correct=True, text="Let me Recheck."),
    rollout(5, reward=0.1),
    rollout(8, extracted=None, finish_reason="length", reason="truncated", text="and so on, and so forth, " * 4),
    rollout(4, reward=1.0, correct=True),
]
REASONS = ("correct", "wrong", "no_answer", "unparsable", "truncated", "timeout", "error")
# accuracy 2/4, boxed 3/4, length (3+5+8+4)/4, truncated 1/4, reward 2.1/4
BY_HAND = {"accuracy": 0.5, "boxed": 0.75, "length": 5.0, "truncated": 0.25, "reward": 0.525}
BY_HAND |= {f"reason_{reason}": 0.0 for reason in REASONS}
BY_HAND |= {"reason_correct": 0.5, "reason_wrong": 0.25, "reason_truncated": 0.25}


def samples(problem: str, answers: str, right: str = "2", subject: str = "sums") -> list[Rollout]:
    """One rollout per character of ``answers``, the answer it gave; "-" gave none."""
    of = Problem(id=problem, question="1+1?", answer=right, subject=subject)
    return [rollout(extracted=None if a == "-" else a, correct=a == right, problem=of) for a in answers]


# --- over rollouts -----------------------------------------------------------------------------------------------------


def test_functions_and_collection_agree_with_hand_computed_values() -> None:
    functions = [accuracy(MIXED), boxed_rate(MIXED), mean_length(MIXED), truncation_rate(MIXED), mean_reward(MIXED)]
    assert functions == pytest.approx(list(BY_HAND.values())[:5])
    assert reason_shares(MIXED) == {reason: BY_HAND[f"reason_{reason}"] for reason in REASONS}
    metrics = rollout_metrics()
    metrics.update(MIXED)
    assert values(metrics) == pytest.approx(BY_HAND)


@pytest.mark.parametrize(("metric", "function"), TWINS)
def test_uneven_updates_give_the_mean_over_terms(metric: Metrics, function: Function) -> None:
    whole, pieces = metric(), metric()
    whole.update(MIXED)
    for part in (MIXED[:1], [], MIXED[1:]):
        pieces.update(part)
    assert pieces.compute() == whole.compute() == pytest.approx(function(MIXED))
    assert 0 < function(MIXED) != function(MIXED[:3])


def test_metrics_whose_first_update_agrees_stay_separate() -> None:
    # All correct with reward 1: accuracy, boxed and reward have the same sum and count after this update.
    same = [rollout(1, reward=1.0, correct=True)] * 4
    metrics = rollout_metrics()
    metrics.update(same)
    metrics.update(MIXED)
    # accuracy (4+2)/8, boxed (4+3)/8, length (4+20)/8, truncated 1/8, reward (4+2.1)/8
    expected = {"accuracy": 0.75, "boxed": 0.875, "length": 3.0, "truncated": 0.125, "reward": 0.7625}
    assert {key: value for key, value in values(metrics).items() if key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("metric", "function"), TWINS)
def test_no_rollouts_mean_zero_and_reset_forgets(metric: Metrics, function: Function) -> None:
    assert function([]) == 0.0
    filled = metric()
    filled.update(MIXED)
    assert filled.compute() > 0
    filled.reset()
    filled.update([])
    assert filled.compute() == 0.0


def test_token_counts_add_up_beyond_float32() -> None:
    metric = MeanLength()
    metric.update([rollout(1)])
    metric.total += 2**24  # float32 cannot tell 2**24 from 2**24 + 1
    metric.update([rollout(1)])
    assert metric.compute().item() == (2**24 + 2) / 2


def test_accuracy_of_boxed_answers_leaves_out_those_without() -> None:
    assert boxed_accuracy(samples("p", "2-5--2")) == pytest.approx(2 / 3)
    assert boxed_accuracy(samples("p", "--")) == 0.0


def test_each_subject_has_its_own_accuracy() -> None:
    rollouts = samples("p", "22", subject="sums") + samples("q", "2555", subject="Algebra")
    assert subject_accuracy(rollouts) == {"Algebra": 0.25, "sums": 1.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 7. " * 4, True),
        ("The answer is 7. " * 3, False),
        ("First, some thought. " + "0" * 64, True),
        ("First, some thought. " + "0" * 63, False),
        ("so " * 100 + "s", True),  # cut in the middle of a piece
        ("so " * 100 + "\n\n", True),
        ("so " * 100 + "\\boxed{7}", False),  # it found the way out
        ("So we add\nthe two numbers.\n" * 4, True),
        ("A paragraph of a thousand characters. " + "".join(f"{i} " for i in range(300)), False),
        ("".join(f"{i} " for i in range(300)) * 4, True),
        ("", False),
    ],
)
def test_a_text_that_ends_in_a_loop_is_repetitive(text: str, expected: bool) -> None:
    assert ends_in_repetition(text) is expected


def test_looking_for_a_loop_takes_no_time_even_where_it_almost_finds_one() -> None:
    fibonacci, following = "a", "ab"  # full of pieces written three times, and none four times
    while len(following) < 50_000:
        fibonacci, following = following, following + fibonacci
    started = time.process_time()
    for text in (following, ("a" * 63 + "b") * 3 + "c" * 60 + "d" * 50_000 + "e", "a" * 50_000 + "b" + "a" * 60):
        assert not ends_in_repetition(text)
    assert time.process_time() - started < 0.5


def test_reflection_counts_responses_and_not_words() -> None:
    texts = ["Let me RETHINK; rethink!", "We recalculated it.", "I check.", ""]
    rollouts = [rollout(text=text) for text in texts]
    assert reflection_rate(rollouts) == 0.5
    assert reflection_rate(rollouts, ["Check"]) == 0.25
    assert reflection_rate(rollouts, []) == 0.0


# --- over problems -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(k: int) -> None:
    groups = ["25552", "55555", "22222", "52555"]
    hits = [any("2" in chosen for chosen in subset) for group in groups for subset in combinations(group, k)]
    rollouts = [r for i, group in enumerate(groups) for r in samples(f"p{i}", group)]
    assert pass_at_k(rollouts, k, samples_per_problem=5) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("2255", 1),  # a tie goes to the answer seen first
        ("5522", 0),
        ("2555", 0),  # the majority may be wrong
        ("2534", 1),
        ("---2", 1),  # those without an answer do not vote
        ("5--2", 0),
        ("----", 0),
    ],
)
def test_the_majority_decides(answers: str, expected: int) -> None:
    assert majority_vote(samples("p", answers), samples_per_problem=4) == expected


def test_a_problem_that_comes_twice_is_two_groups() -> None:
    rollouts = samples("p", "22") + samples("p", "55")
    assert pass_at_k(rollouts, 2, samples_per_problem=2) == 0.5
    assert majority_vote(rollouts, samples_per_problem=2) == 0.5


@pytest.mark.parametrize("rollouts", [samples("p", "225"), samples("p", "2") + samples("q", "2")])
def test_groups_that_are_cut_are_refused(rollouts: list[Rollout]) -> None:
    for metric in (PassAtK(2, samples_per_problem=2), MajorityVote(samples_per_problem=2)):
        with pytest.raises(ValueError, match="not the 2 samples of one problem"):
            metric.update(rollouts)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_more_samples_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of 4"):
        PassAtK(k, samples_per_problem=4)


# --- evaluation sets ---------------------------------------------------------------------------------------------------

SET = [
    *samples("p0", "2255-"),
    *samples("p1", "52555", subject="St. Petersburg"),
    *samples("p2", "55555", subject="St. Petersburg"),
]
# p0: 2 of 5 correct, p1: 1 of 5, p2: none. pass@2: 1 - 3/10, 1 - 6/10, 0; pass@4: 1, 1 - 1/5, 0.
SET_BY_HAND = {
    "accuracy": 3 / 15,
    "avg@5": 3 / 15,
    "boxed": 14 / 15,
    "accuracy_boxed": 3 / 14,
    "maj@5": 1 / 3,
    "pass@2": 1.1 / 3,
    "pass@4": 1.8 / 3,
    "pass@5": 2 / 3,
    "accuracy/sums": 2 / 5,
    "accuracy/St_ Petersburg": 1 / 10,
    "repetition": 0.0,
    "reflection": 0.0,
}


def test_an_evaluation_set_by_hand() -> None:
    metrics = evaluation_metrics(5, subjects=["sums", "St. Petersburg"])
    metrics.update(SET[:5])
    metrics.update(SET[5:])
    got = values(metrics)
    assert {key: got[key] for key in SET_BY_HAND} == pytest.approx(SET_BY_HAND)
    assert set(got) == set(SET_BY_HAND) | set(rollout_metrics())


def test_one_sample_per_problem_needs_no_other_names_for_its_accuracy() -> None:
    assert set(evaluation_metrics(1)) - set(rollout_metrics()) == {"accuracy_boxed", "repetition", "reflection"}


@pytest.mark.parametrize(("n", "ks"), [(2, [2]), (6, [2, 4, 6]), (8, [2, 4, 8])])
def test_pass_at_k_is_there_for_powers_of_two_and_all_samples(n: int, ks: list[int]) -> None:
    assert {key for key in evaluation_metrics(n) if "pass" in str(key)} == {f"pass@{k}" for k in ks}


def test_reflection_words_can_be_chosen() -> None:
    metrics = evaluation_metrics(1, reflection_words=["text"])
    metrics.update([rollout(text="some text"), rollout(text="rethink")])
    assert values(metrics)["reflection"] == 0.5


# --- over ranks --------------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str, rollouts: list[list[Rollout]], evaluated: list[list[Rollout]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(rollouts))
    metrics = rollout_metrics()
    metrics.update(rollouts[rank])
    empty = Accuracy()
    empty.update(rollouts[0] if rank == 0 else [])
    evaluation = evaluation_metrics(5, subjects=["sums", "St. Petersburg"])
    evaluation.update(evaluated[rank])
    got = {"metrics": values(metrics), "one_rank_empty": empty.compute().item(), "evaluation": values(evaluation)}
    torch.save(got, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_ranks_with_different_counts_give_the_mean_over_everything(tmp_path: Path) -> None:
    spawn(_rank, args=(str(tmp_path), [MIXED[:1], MIXED[1:]], [SET[:10], SET[10:]]), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"rank{rank}.pt")
        # A mean of means would give accuracy (1 + 1/3) / 2; with rank 1 empty it would give 1/2.
        assert got["metrics"] == pytest.approx(BY_HAND)
        assert got["one_rank_empty"] == 1.0
        assert not math.isclose(got["metrics"]["accuracy"], (1 + 1 / 3) / 2)
        assert {key: got["evaluation"][key] for key in SET_BY_HAND} == pytest.approx(SET_BY_HAND)
