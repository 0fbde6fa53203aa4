"""The evaluator's files and words: what is asked and how, every sample on the disk, results, and going on after a stop."""

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from rlvr_lightning.callbacks.history import gather_rows
from rlvr_lightning.callbacks.progress import clock
from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.data import ProblemDataModule
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.results import (
    EvaluationFolder,
    Fingerprint,
    describe,
    fingerprint,
    rollout_of,
    row_of,
    summarize,
)
from rlvr_lightning.evaluation.table import table
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.records import Problem, ProblemBatch, Rollout


class EvaluationCallback(Callback):
    """Says what every evaluation measures; in ``test`` also writes ``<root>/evaluation`` and prints the results.

    An interrupted test goes on when the same command is given again: problems that are finished are read from the folder and
    the others sampled, with the seeds that they would have had. List it before the callback that attaches rollouts.
    """

    def __init__(self) -> None:
        self.fingerprints: dict[str, Fingerprint] = {}
        """Of every set that was evaluated."""
        self._folder: EvaluationFolder | None = None
        self._rollouts: dict[str, dict[int, list[Rollout]]] = {}
        self._known: dict[str, dict[int, list[Rollout]]] = {}
        self._batch_started = 0.0

    def setup(self, trainer: Trainer, pl_module: RLVRModule, stage: str) -> None:
        """Refuse to evaluate nothing."""
        if stage == "test" and not self._data(trainer).eval_problems:
            raise ConfigError("data.evals is empty: name at least one evaluation set, such as math500: suite:math500")

    # --- what is measured ----------------------------------------------------------------------------------------------

    def _fingerprints(self, trainer: Trainer) -> dict[str, Fingerprint]:
        """Return every set's fingerprint; on rank zero, print those that have not been printed."""
        rollout, datamodule = self._sampler(trainer), self._data(trainer)
        found: dict[str, Fingerprint] = {}
        for name, problems in datamodule.eval_problems.items():
            eval_set = datamodule.eval_set(name)
            template = eval_set.prompt or rollout.eval_prompt
            likelihood = eval_set.likelihood
            words = describe(eval_set.sampling(rollout.eval_sampling), rollout.seed)
            grader = eval_set.grader or getattr(rollout.verifier, "grader", type(rollout.verifier).__name__)
            found[name] = fingerprint(
                prompt=template.text(Problem("", "{question}", ""), rollout.tokenizer),
                sampling="none" if likelihood else words,
                grader=f"log-likelihood, {likelihood}" if likelihood else str(grader),
                problems=problems,
            )
            if trainer.is_global_zero and self.fingerprints.get(name) != found[name]:
                how = f"samples: {found[name]['sampling']}, grader: {found[name]['grader']}"
                print(f"evaluation   {name}: {len(problems)} problems, {how}   [{found[name]['id']}]", flush=True)
        self.fingerprints = found
        return found

    @staticmethod
    def _sampler(trainer: Trainer) -> RolloutCallback:
        callbacks: list[Any] = getattr(trainer, "callbacks")  # noqa: B009 - set by Lightning at run time
        for callback in callbacks:
            if isinstance(callback, RolloutCallback):
                return callback
        raise ConfigError("EvaluationCallback needs a RolloutCallback: add it to the trainer, after this one")

    @staticmethod
    def _data(trainer: Trainer) -> ProblemDataModule:
        datamodule: ProblemDataModule = getattr(trainer, "datamodule")  # noqa: B009 - set by Lightning at run time
        return datamodule

    def on_validation_start(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        """Say once what is measured."""
        if not self.fingerprints:
            self._fingerprints(trainer)

    # --- test ----------------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        """Open the folder; all ranks read what is finished before rank zero writes."""
        rollout, datamodule = self._sampler(trainer), self._data(trainer)
        policy = {
            "model": pl_module.policy_config.model,
            "policy_version": pl_module.policy_version,
            "weights": weights_digest(pl_module),
        }
        self._folder = EvaluationFolder(Path(trainer.default_root_dir), policy, self._fingerprints(trainer))
        sizes = {n: datamodule.eval_set(n).sampling(rollout.eval_sampling).rollouts_per_problem for n in self.fingerprints}
        self._known = {n: self._folder.finished(n, datamodule.eval_problems[n], size) for n, size in sizes.items()}
        self._rollouts = {name: dict(groups) for name, groups in self._known.items()}
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            if total := sum(map(len, self._known.values())):
                print(f"{total} problems were finished before: {self._folder.path}", flush=True)
            self._folder.start(self._known)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: RLVRModule, batch: ProblemBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hand over what is finished, so that only the rest is sampled."""
        self._batch_started = time.perf_counter()
        batch.known = {slot: self._known[batch.name][slot] for slot in batch.slots if slot in self._known[batch.name]}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: RLVRModule,
        outputs: Any,
        batch: ProblemBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Put the finished problems of all ranks on the disk and say how far the set is."""
        assert self._folder is not None
        problems, size = self._data(trainer).eval_problems[batch.name], batch.group_size
        rows = {
            slot: [row_of(r, sample) for sample, r in enumerate((batch.rollouts or [])[i * size : (i + 1) * size])]
            for i, slot in enumerate(batch.slots)
        }
        new = gather_rows([{"slot": slot, "rows": group} for slot, group in rows.items() if slot not in batch.known])
        for one in new:  # in the form in which they are read back: whether a test was interrupted makes no difference
            group = [rollout_of(row, problems[one["slot"]], pl_module.policy_version) for row in one["rows"]]
            self._rollouts[batch.name][one["slot"]] = group
        if not trainer.is_global_zero or not new:
            return
        seconds = time.perf_counter() - self._batch_started
        self._folder.append(batch.name, [row for one in new for row in one["rows"]], seconds)
        done, of = self._rollouts[batch.name], len(problems)
        correct = [r.score.correct for group in done.values() for r in group]
        print(
            f"{batch.name}   {len(done)}/{of} problems   accuracy so far {sum(correct) / len(correct):.3f}   "
            f"left {clock((of - len(done)) * seconds / len(new))}   [{self.fingerprints[batch.name]['id']}]",
            flush=True,
        )

    def on_test_end(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        """Write results.json and the samples in order, and print the table."""
        folder, self._folder = self._folder, None
        if not trainer.is_global_zero or folder is None:
            return
        datamodule, summaries = self._data(trainer), {}
        for name, groups in self._rollouts.items():
            if len(groups) < len(datamodule.eval_problems[name]):
                print(f"{name}: {len(groups)} of {len(datamodule.eval_problems[name])} problems done, so no result", flush=True)
                continue
            folder.write(name, groups)
            rollouts = [rollout for _, group in sorted(groups.items()) for rollout in group]
            likelihood = datamodule.eval_set(name).likelihood is not None
            summaries[name] = summarize(
                rollouts,
                len(rollouts) // len(groups),
                likelihood=likelihood,
                reflection_words=pl_module.reflection_words,
            )
        print(f"\n{table(folder.finish(summaries))}\nwritten to {folder.path}/", flush=True)

    def on_exception(self, trainer: Trainer, pl_module: RLVRModule, exception: BaseException) -> None:
        """Say that nothing finished is lost."""
        folder, self._folder = self._folder, None
        if folder is not None and trainer.is_global_zero:
            done = sum(map(len, self._rollouts.values()))
            print(f"\nstopped: {done} finished problems are kept in {folder.path}; the same command goes on", flush=True)


@torch.no_grad()
def weights_digest(module: RLVRModule) -> str:
    """Return twelve digits that differ between policies: a hash over some entries of every weight. Every rank calls it."""
    found = hashlib.sha256()
    for name, tensor in module.weights().tensors():
        flat = tensor.detach().flatten()
        found.update(name.encode() + flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:12]
