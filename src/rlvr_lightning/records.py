"""Plain records that flow through one training step: text, token ids and scores, never tensors.

Legend: ``P`` problems of one step, ``G`` rollouts per problem (the group), ``B`` of the ``P * G`` rollouts are this rank's.
This module imports neither torch nor lightning, so that grading processes and ``rlvr --help`` stay light.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]
"""``stop``: the model sampled an end-of-sequence token. ``length``: it ran into the token limit."""

Reason = Literal["correct", "wrong", "no_answer", "unparsable", "truncated", "timeout", "error"]
"""Why a completion got its verdict. Everything but ``correct`` scores 0."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with a verifiable answer."""

    id: str
    """Unique within its data set."""
    question: str
    """The statement as the user would ask it, before any prompt template."""
    answer: str
    """The ground truth, as LaTeX or plain text, without ``\\boxed``."""
    source: str = ""
    """Where the row came from, for messages and logs: ``file:row`` or a data set's name."""
    subject: str = ""
    """What evaluation groups by, such as a field of mathematics; empty if the set has none."""
    choices: tuple[tuple[str, str], ...] = ()
    """(label, text) of the answers to choose from, where the answer is a label; empty for an open question."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine sampled after a prompt."""

    token_ids: tuple[int, ...]
    """[T] sampled tokens; the end-of-sequence token is included when ``finish_reason`` is ``stop``."""
    logprobs: tuple[float, ...]
    """[T] nats, under the engine's distribution at the sampling temperature. With top-p below 1, which only evaluation may
    use, vLLM's are those after the cut."""
    text: str
    """Decoded ``token_ids`` without special tokens."""
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} tokens but {len(self.logprobs)} log-probs: the engine lost some")


@dataclass(frozen=True, slots=True)
class Score:
    """A verifier's verdict on one completion."""

    reward: float
    """What the objective sees."""
    correct: bool
    """What the evaluator counts. Separate from the reward: a format bonus must not leak into accuracy."""
    reason: Reason
    extracted: str | None
    """The answer that was read from the completion; None when there was none."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One prompt, one completion, one score: the record that every consumer reads."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    """[L] the exact token ids that the engine was given."""
    completion: Completion
    score: Score
    temperature: float
    """Sampling temperature; the learner divides its logits by the same number."""
    policy_version: int
    """Optimizer updates that the sampling weights had seen."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Rollout":
        """Return the rollout of which ``dataclasses.asdict`` made these fields."""
        parts = {"problem": Problem(**fields["problem"]), "completion": Completion(**fields["completion"])}
        return cls(**{**fields, **parts, "score": Score(**fields["score"])})


@dataclass(slots=True)
class ProblemBatch:
    """What the DataModule serves for one step; the rollout callback fills ``rollouts``."""

    step: int
    """Training: index of the rollout batch since the run began, across resumes. Evaluation: always 0, so
    that every evaluation of a set draws with the same seeds."""
    slots: tuple[int, ...]
    """[P] position of each problem in the step's order; identifies a group for seeding, whatever the rank count."""
    problems: tuple[Problem, ...]
    """[P]"""
    name: str = "train"
    """``train``, or the evaluation set's name."""
    group_size: int = 1
    """G; set with the rollouts."""
    share: Sequence[int] | None = None
    """[B] which of the step's P * G rollouts, counted group after group, are this rank's; None: all of them. A group may be
    spread over ranks, so any number of problems trains on any number of ranks."""
    subjects: tuple[str, ...] = ()
    """Every subject of the whole evaluation set, whatever this batch holds; empty if the set has none."""
    known: dict[int, list[Rollout]] = field(default_factory=dict)
    """slot -> its G rollouts that an interrupted evaluation has left on the disk; they are not sampled again."""
    rollouts: list[Rollout] | None = None
    """[B] group-major: those of problem 0 first. None until the callback has attached them."""

    @property
    def indices(self) -> Sequence[int]:
        """[B] number of each of this rank's rollouts among the step's P * G."""
        return range(len(self.problems) * self.group_size) if self.share is None else self.share

    @property
    def places(self) -> list[tuple[int, int]]:
        """[B] (index of the problem, number of the sample in its group) of each of this rank's rollouts."""
        return [divmod(i, self.group_size) for i in self.indices]

    def to(self, *_args: Any, **_kwargs: Any) -> "ProblemBatch":
        """Return self: text stays where it is (Lightning calls this to move a batch to the device)."""
        return self
