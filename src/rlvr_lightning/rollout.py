"""Collecting rollouts: prompts in, graded completions out. Knows nothing of algorithms or of Lightning."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlvr_lightning.engines import RolloutEngine, Sampling
from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.records import ProblemBatch, Rollout
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


@dataclass
class Collector:
    """Prompts an engine with a batch of problems and grades what it says."""

    engine: RolloutEngine
    verifier: Verifier
    tokenizer: PreTrainedTokenizerBase
    run_seed: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the last call, by part: ``generate`` and ``grade``."""

    def collect(self, batch: ProblemBatch, template: PromptTemplate, sampling: Sampling) -> list[Rollout]:
        """Return P * G rollouts of the batch's problems, group-major.

        Args:
            batch: P problems with their step and slots, which decide the seeds.
            template: from problem to prompt.
            sampling: G, temperature and length.
        """
        stream = "train" if batch.name == "train" else "eval"
        prompts = [template(problem, self.tokenizer) for problem in batch.problems]
        seeds = [
            [
                seed_for(self.run_seed, stream=stream, step=batch.step, slot=slot, sample=sample)
                for sample in range(sampling.rollouts_per_problem)
            ]
            for slot in batch.slots
        ]
        started = time.perf_counter()
        groups = self.engine.generate(prompts, sampling, seeds) if prompts else []
        generated = time.perf_counter()
        pairs = [(p, c) for p, group in zip(batch.problems, groups, strict=True) for c in group]
        scores = self.verifier(pairs)
        self.seconds = {"generate": generated - started, "grade": time.perf_counter() - generated}
        version = self.engine.version
        assert version is not None or not pairs  # generate() refuses to run without weights
        prompt_of = [p for p in prompts for _ in range(sampling.rollouts_per_problem)]
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
