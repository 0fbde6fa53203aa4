"""Means over rollouts, as functions of a list and as torchmetrics that add up over batches and ranks.

Every metric here is the mean of some numbers, its terms: one per rollout, or one per problem, or one per rollout of some
kind. The class keeps their sum and their count, both summed over ranks: ranks with different numbers of rollouts (or none)
give the mean over all of them, not a mean of means. The mean of nothing is 0.0, in both forms: a nan would spread into
every average and monitor downstream.

Legend: ``P`` problems, ``n`` samples per problem, ``c`` correct ones among them, ``k`` samples that a metric looks at. A
list of rollouts is group-major: the n rollouts of problem 0 first. Metrics over problems need whole groups in a list.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from math import comb, fsum
from typing import Any, get_args

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from rlvr_lightning.records import Reason, Rollout

REFLECTION_WORDS = ("rethink", "recheck", "recalculate")
"""What counts as self-reflection in arXiv 2504.20571."""

# Matched against the reversed text, where the end comes first. The first piece that fits wins, and a mismatch shows within
# few characters: half a millisecond for 12,000 characters.
_REPEATED = re.compile(r"\s*(.{16,}?)\1{3}", re.DOTALL)


class RolloutMean(Metric):
    """Mean of ``terms(rollouts)``; subclasses say what the terms are.

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

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the numbers to average."""
        raise NotImplementedError

    def update(self, rollouts: Sequence[Rollout]) -> None:
        """Add ``rollouts``; an empty list is fine."""
        terms = self.terms(rollouts)
        self.total += fsum(terms)
        self.count += len(terms)

    def compute(self) -> Tensor:
        """Return the mean over the terms of every rank, or 0.0 when there were none; all ranks must call it."""
        return self.total / self.count.clamp(min=1)


# --- over rollouts -----------------------------------------------------------------------------------------------------


class Accuracy(RolloutMean):
    """Share of rollouts that the verifier calls correct; independent of the reward, which may hold a bonus.

    With n samples per problem this is avg@n.
    """

    higher_is_better = True

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return 1 or 0 per rollout."""
        return [rollout.score.correct for rollout in rollouts]


class BoxedRate(RolloutMean):
    """Share of rollouts in which the verifier found an answer at all, right or wrong."""

    higher_is_better = True

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return 1 or 0 per rollout."""
        return [rollout.score.extracted is not None for rollout in rollouts]


class BoxedAccuracy(RolloutMean):
    """Share of correct rollouts among those with an answer: what is left of the accuracy once the format is learned."""

    higher_is_better = True

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return 1 or 0 per rollout with an answer."""
        return [rollout.score.correct for rollout in rollouts if rollout.score.extracted is not None]


class SubjectAccuracy(RolloutMean):
    """Share of correct rollouts among those of one subject (`Problem.subject`)."""

    higher_is_better = True

    def __init__(self, subject: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.subject = subject

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return 1 or 0 per rollout of the subject."""
        return [rollout.score.correct for rollout in rollouts if rollout.problem.subject == self.subject]


class MeanLength(RolloutMean):
    """Mean length of a completion in tokens; the end-of-sequence token counts."""

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return tokens per rollout."""
        return [len(rollout.completion.token_ids) for rollout in rollouts]


class TruncationRate(RolloutMean):
    """Share of rollouts that ran into the token limit."""

    higher_is_better = False

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return 1 or 0 per rollout."""
        return [rollout.completion.finish_reason == "length" for rollout in rollouts]


class MeanReward(RolloutMean):
    """Mean reward, as the objective sees it."""

    higher_is_better = True

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the reward per rollout."""
        return [rollout.score.reward for rollout in rollouts]


class ReasonShare(RolloutMean):
    """Share of rollouts with one verdict; the shares of all reasons add up to 1."""

    def __init__(self, reason: Reason, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reason = reason

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return 1 or 0 per rollout."""
        return [rollout.score.reason == self.reason for rollout in rollouts]


class RepetitionRate(RolloutMean):
    """Share of rollouts whose text got stuck in a loop; see `ends_in_repetition`."""

    higher_is_better = False

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return 1 or 0 per rollout."""
        return [ends_in_repetition(rollout.completion.text) for rollout in rollouts]


class ReflectionRate(RolloutMean):
    """Share of rollouts whose text contains one of ``words``, whatever the case, also as part of a longer word.

    Source: arXiv 2504.20571, Figure 4, which counts such responses instead of giving their share.
    """

    def __init__(self, words: Sequence[str] = REFLECTION_WORDS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.words = tuple(word.lower() for word in words)

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return 1 or 0 per rollout."""
        texts = (rollout.completion.text.lower() for rollout in rollouts)
        return [any(word in text for word in self.words) for text in texts]


# --- over problems -----------------------------------------------------------------------------------------------------


class PassAtK(RolloutMean):
    """Mean over problems of the chance that at least one of k samples is correct.

    With c correct ones among a problem's n samples, 1 - C(n - c, k) / C(n, k): unbiased, where 1 - (1 - c/n)^k is too low.

    Source: arXiv 2107.03374, equation 1.

    Raises:
        ValueError: k is not between 1 and n.
    """

    higher_is_better = True

    def __init__(self, k: int, *, samples_per_problem: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= k <= samples_per_problem:
            raise ValueError(f"pass@{k} of {samples_per_problem} samples per problem: k has to be between 1 and those")
        self.k, self.n = k, samples_per_problem

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the estimate per problem."""
        wrong = (sum(not rollout.score.correct for rollout in group) for group in groups(rollouts, self.n))
        return [1 - comb(w, self.k) / comb(self.n, self.k) for w in wrong]


class MajorityVote(RolloutMean):
    """Share of problems whose most frequent answer is correct (maj@n, also called self-consistency: arXiv 2203.11171).

    Answers count as the same when their text is. A tie goes to the answer seen first. Rollouts without an answer do not
    vote; a problem without any vote counts as wrong.
    """

    higher_is_better = True

    def __init__(self, *, samples_per_problem: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = samples_per_problem

    def terms(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return 1 or 0 per problem."""
        return [_majority_is_correct(group) for group in groups(rollouts, self.n)]


def _majority_is_correct(group: Sequence[Rollout]) -> bool:
    votes = [rollout.score for rollout in group if rollout.score.extracted is not None]
    if not votes:
        return False
    winner = Counter(score.extracted for score in votes).most_common(1)[0][0]  # keeps the order of first sight in ties
    return next(score.correct for score in votes if score.extracted == winner)


def groups(rollouts: Sequence[Rollout], size: int) -> Iterator[Sequence[Rollout]]:
    """Yield the rollouts of each problem; cut by position, as a problem may come twice in a list.

    Raises:
        ValueError: The list does not consist of whole groups of ``size``.
    """
    for start in range(0, len(rollouts), size):
        group = rollouts[start : start + size]
        if len(group) < size or len({rollout.problem.id for rollout in group}) > 1:
            raise ValueError(f"rollouts {start} to {start + len(group) - 1} are not the {size} samples of one problem")
        yield group


def ends_in_repetition(text: str) -> bool:
    """Tell whether a text ends in a loop: some piece of 16 or more characters, written four times in a row.

    A loop of shorter pieces is one of longer pieces too. It may be cut anywhere, and white space may follow.
    A loop that counts up ("Step 1 ... Step 2 ...") is not found.

    >>> ends_in_repetition("So 3 + 4 = 7." + " The answer is 7." * 4), ends_in_repetition("So 3 + 4 = 7.")
    (True, False)
    """
    return _REPEATED.match(text[::-1]) is not None


# --- collections -------------------------------------------------------------------------------------------------------


def rollout_metrics() -> MetricCollection:
    """Return what every list of rollouts is described by, in training steps and in evaluations.

    Keys: accuracy, boxed, length, truncated, reward, and ``reason_<reason>`` for every `Reason`.
    """
    return _collection(_rollout_metrics())


def evaluation_metrics(
    samples_per_problem: int, *, subjects: Sequence[str] = (), reflection_words: Sequence[str] = REFLECTION_WORDS
) -> MetricCollection:
    """Return the metrics of an evaluation set; all ranks must pass the same arguments.

    Keys: those of `rollout_metrics`, accuracy_boxed, repetition, reflection, ``accuracy/<subject>`` (a dot, which module
    names cannot hold, becomes an underscore) and, with n > 1 samples per problem, ``avg@n``, ``maj@n`` and ``pass@k`` for
    k = n and the powers of two below, 1 left out. With one sample, all of these are the accuracy.

    Args:
        samples_per_problem: n; every list of rollouts then holds whole groups of n.
        subjects: The subjects of the whole set, not of this rank's part.
        reflection_words: See `ReflectionRate`.
    """
    n = samples_per_problem
    metrics = _rollout_metrics() | {
        "accuracy_boxed": BoxedAccuracy(),
        "repetition": RepetitionRate(),
        "reflection": ReflectionRate(reflection_words),
    }
    metrics |= {f"accuracy/{subject.replace('.', '_')}": SubjectAccuracy(subject) for subject in subjects}
    if n > 1:
        metrics |= {f"avg@{n}": Accuracy(), f"maj@{n}": MajorityVote(samples_per_problem=n)}
        powers = [2**i for i in range(1, n.bit_length()) if 2**i < n]
        metrics |= {f"pass@{k}": PassAtK(k, samples_per_problem=n) for k in [*powers, n]}
    return _collection(metrics)


def _rollout_metrics() -> dict[str, Metric | MetricCollection]:
    return {
        "accuracy": Accuracy(),
        "boxed": BoxedRate(),
        "length": MeanLength(),
        "truncated": TruncationRate(),
        "reward": MeanReward(),
        **{f"reason_{reason}": ReasonShare(reason) for reason in get_args(Reason)},
    }


def _collection(metrics: dict[str, Metric | MetricCollection]) -> MetricCollection:
    # Compute groups merge metrics whose states agree after the first update. Ours agree whenever every rollout of that
    # update is, say, correct with reward 1; one of the two would never be updated again.
    return MetricCollection(metrics, compute_groups=False)


# --- functions of a list -----------------------------------------------------------------------------------------------


def accuracy(rollouts: Sequence[Rollout]) -> float:
    """Return the share of correct rollouts; see `Accuracy`."""
    return _mean(Accuracy(), rollouts)


def boxed_rate(rollouts: Sequence[Rollout]) -> float:
    """Return the share of rollouts with an answer; see `BoxedRate`."""
    return _mean(BoxedRate(), rollouts)


def boxed_accuracy(rollouts: Sequence[Rollout]) -> float:
    """Return the share of correct rollouts among those with an answer; see `BoxedAccuracy`."""
    return _mean(BoxedAccuracy(), rollouts)


def subject_accuracy(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the accuracy of every subject that occurs, in alphabetical order; see `SubjectAccuracy`."""
    subjects = sorted({rollout.problem.subject for rollout in rollouts})
    return {subject: _mean(SubjectAccuracy(subject), rollouts) for subject in subjects}


def mean_length(rollouts: Sequence[Rollout]) -> float:
    """Return the mean completion length in tokens; see `MeanLength`."""
    return _mean(MeanLength(), rollouts)


def truncation_rate(rollouts: Sequence[Rollout]) -> float:
    """Return the share of truncated rollouts; see `TruncationRate`."""
    return _mean(TruncationRate(), rollouts)


def mean_reward(rollouts: Sequence[Rollout]) -> float:
    """Return the mean reward; see `MeanReward`."""
    return _mean(MeanReward(), rollouts)


def reason_shares(rollouts: Sequence[Rollout]) -> dict[Reason, float]:
    """Return the share of every verdict, also of those that do not occur; see `ReasonShare`."""
    return {reason: _mean(ReasonShare(reason), rollouts) for reason in get_args(Reason)}


def repetition_rate(rollouts: Sequence[Rollout]) -> float:
    """Return the share of rollouts that end in a loop; see `RepetitionRate`."""
    return _mean(RepetitionRate(), rollouts)


def reflection_rate(rollouts: Sequence[Rollout], words: Sequence[str] = REFLECTION_WORDS) -> float:
    """Return the share of rollouts with a word of self-reflection; see `ReflectionRate`."""
    return _mean(ReflectionRate(words), rollouts)


def pass_at_k(rollouts: Sequence[Rollout], k: int, *, samples_per_problem: int) -> float:
    """Return the chance that one of k samples is correct, over problems; see `PassAtK`."""
    return _mean(PassAtK(k, samples_per_problem=samples_per_problem), rollouts)


def majority_vote(rollouts: Sequence[Rollout], *, samples_per_problem: int) -> float:
    """Return the share of problems whose most frequent answer is correct; see `MajorityVote`."""
    return _mean(MajorityVote(samples_per_problem=samples_per_problem), rollouts)


def _mean(metric: RolloutMean, rollouts: Sequence[Rollout]) -> float:
    terms = metric.terms(rollouts)
    return fsum(terms) / max(len(terms), 1)
