"""Collecting rollouts: prompts in, graded completions out. Knows nothing of algorithms or of Lightning."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlvr_lightning.engines import RolloutEngine, Sampling
from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.records import Completion, Problem, ProblemBatch, Rollout, Score
from rlvr_lightning.verify import Verifier

STREAMS: Mapping[str, int] = {"train": 0, "eval": 1}
"""Independent seed streams."""


def seed_for(run_seed: int, *, stream: str, step: int, slot: int, sample: int) -> int:
    """Return the 63-bit seed of one completion, a pure function of where it stands in the run.

    Nothing has to be saved for an exact resume, and a run on other ranks samples the same completions.

    >>> seed_for(0, stream="train", step=3, slot=1, sample=7) == seed_for(0, stream="train", step=3, slot=1, sample=7)
    True
    """
    entropy = (run_seed, STREAMS[stream], step, slot, sample)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Scorer(Protocol):
    """What turns completions into rewards: a :class:`~rlvr_lightning.verify.Verifier`, or a class of one's own."""

    def __call__(self, pairs: Sequence[tuple[Problem, Completion]]) -> list[Score]:
        """Return one verdict per pair, in order."""
        ...

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise ConfigError if a ground truth could never be met."""
        ...

    def close(self) -> None:
        """Free every resource. Calling it twice is allowed."""
        ...


@dataclass
class Collector:
    """Prompts an engine with a batch of problems and grades what it says."""

    engine: RolloutEngine
    verifier: Scorer
    tokenizer: PreTrainedTokenizerBase
    run_seed: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the last call, by part: ``generate`` and ``grade``."""

    def __post_init__(self) -> None:
        # Evaluation sets name their grader; a verifier of one's own need not know it.
        self.graders = self.verifier if isinstance(self.verifier, Verifier) else Verifier()

    def collect(
        self, batch: ProblemBatch, template: PromptTemplate, sampling: Sampling, grader: str | None = None
    ) -> list[Rollout]:
        """Return this rank's rollouts of the batch's problems, group-major.

        Args:
            batch: P problems with their step and slots, which decide the seeds, and which rollouts are wanted.
            template: from problem to prompt.
            sampling: temperature and length.
            grader: a name of ``rlvr_lightning.grading``; None leaves it to the verifier.
        """
        stream = "train" if batch.name == "train" else "eval"
        wanted: dict[int, list[int]] = {}  # index of a problem -> seeds
        for index, sample in batch.places:
            seed = seed_for(self.run_seed, stream=stream, step=batch.step, slot=batch.slots[index], sample=sample)
            wanted.setdefault(index, []).append(seed)
        problems = [batch.problems[index] for index in wanted]
        prompts, seeds = [template(problem, self.tokenizer) for problem in problems], list(wanted.values())

        def begin_to_grade(index: int, completion: Completion) -> None:
            if grader is not None or self.graders is self.verifier:
                self.graders.anticipate(problems[index], completion, grader)

        started = time.perf_counter()
        groups = self.engine.generate(prompts, sampling, seeds, begin_to_grade) if prompts else []
        generated = time.perf_counter()
        pairs = [(p, c) for p, group in zip(problems, groups, strict=True) for c in group]
        scores = self.verifier(pairs) if grader is None else self.graders(pairs, grader)
        self.seconds = {"generate": generated - started, "grade": time.perf_counter() - generated}
        version = self.engine.version
        assert version is not None or not pairs  # generate() refuses to run without weights
        prompt_of = [p for p, group in zip(prompts, groups, strict=True) for _ in group]
        return [
            Rollout(
                problem=problem,
                prompt_ids=prompt,
                completion=completion,
                score=score,
                temperature=sampling.temperature,
                policy_version=version or 0,
            )
            for (problem, completion), prompt, score in zip(pairs, prompt_of, scores, strict=True)
        ]
