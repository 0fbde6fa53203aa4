"""The only place that talks to an engine: sync when stale, sample, grade, attach."""

import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer

from rlvr_lightning.callbacks.header import describe_run
from rlvr_lightning.callbacks.sampler import Sampler
from rlvr_lightning.data import ProblemDataModule
from rlvr_lightning.engines import RolloutEngine, Sampling
from rlvr_lightning.engines.server import VLLMServerEngine
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.likelihood import choose
from rlvr_lightning.memory import check, plan_run
from rlvr_lightning.metrics import rollout_metrics
from rlvr_lightning.models import load_config_and_tokenizer
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.passes import greatest
from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.records import ProblemBatch
from rlvr_lightning.rollout import Collector, Scorer
from rlvr_lightning.verify import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RolloutCallback(Callback):
    """Attaches graded rollouts to every batch of fit, validate, test and predict.

    Args:
        engine: what samples.
        sampling: training rollouts.
        eval_sampling: evaluation rollouts; greedy by default.
        prompt: training prompt.
        eval_prompt: evaluation prompt; None takes the training prompt.
        verifier: turns completions into rewards.
        overlap: sample step k + 1, with the weights that step k began with, while step k trains. Rollouts are then one step
            old, except the first; needs an engine in another process, and ``objective.importance_cap`` to correct for it.
        max_restarts: times that an engine that died is started again in one step; then the run saves and ends.
        seed: the run's seed; every completion's own seed follows from it.
    """

    def __init__(
        self,
        *,
        engine: RolloutEngine,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        eval_sampling: Sampling = Sampling(rollouts_per_problem=1, temperature=0.0),  # noqa: B008 - frozen
        prompt: PromptTemplate = PromptTemplate(),  # noqa: B008 - frozen
        eval_prompt: PromptTemplate | None = None,
        verifier: Scorer | None = None,
        overlap: bool = False,
        max_restarts: int = 3,
        seed: int = 0,
    ) -> None:
        if max_restarts < 0:
            raise ConfigError(f"rollout.max_restarts is {max_restarts}: set it to 0 (never) or more")
        if overlap and not isinstance(engine, VLLMServerEngine):
            raise ConfigError(
                f"rollout.overlap is set and {type(engine).__name__} samples in the learner's process, which is busy: choose "
                "rollout=vllm-process or vllm-server, or leave overlap out"
            )
        self.engine = engine
        self.sampling = sampling
        self.eval_sampling = eval_sampling
        self.prompt = prompt
        self.eval_prompt = eval_prompt or prompt
        self.verifier = verifier or Verifier()
        self.overlap = overlap
        self.max_restarts = max_restarts
        self.seed = seed
        self._window = 0
        self._trains = False
        self._checked: set[str] = set()
        self._metrics = rollout_metrics()
        self._step_started = 0.0
        self._evaluation_started = 0.0
        self._other = 0.0
        self._collector: Collector | None = None
        self._sampler: Sampler | None = None
        self._saved: dict[str, Any] = {}

    @property
    def sampler(self) -> Sampler:
        """What keeps the engine in step with the policy, once :meth:`setup` has checked the run."""
        assert self._sampler is not None
        return self._sampler

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The policy's tokenizer, once :meth:`setup` has loaded it."""
        assert self._collector is not None
        return self._collector.tokenizer

    # --- before anything expensive -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: RLVRModule, stage: str) -> None:
        """Check everything that can be checked without loading weights or starting an engine."""
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, ProblemDataModule):
            raise ConfigError("RolloutCallback needs a ProblemDataModule: pass datamodule= to the trainer")
        if stage == "fit":
            if not datamodule.train_problems:
                raise ConfigError("data holds no training problem: fit with SingleExampleDataModule or SubsetDataModule")
            self.check_training(pl_module, datamodule.problems_per_step)
        self.engine.check()
        config, tokenizer = load_config_and_tokenizer(pl_module.policy_config.model_path)
        self._collector = Collector(self.engine, self.verifier, tokenizer, self.seed)
        self._window = self._check_window(datamodule, getattr(config, "max_position_embeddings", None))
        self._sampler = Sampler(self.engine, self._collector, self._window, self.max_restarts)
        if trainer.is_global_zero:
            self._check_answers(datamodule)
            if self._trains:  # once, before the evaluation that precedes a fit
                check(plan_run(pl_module, trainer, datamodule, self, window=self._window))
        self._trains = False

    def check_training(self, module: RLVRModule, groups: int) -> None:
        """Raise ConfigError for sampling that cannot train; ``groups``: of one step."""
        if self.sampling.temperature == 0:
            raise ConfigError(
                "rollout.sampling.temperature is 0: greedy rollouts of a group are all alike and teach nothing; set it "
                "above 0 (the paper uses 0.6)"
            )
        if self.sampling.top_p != 1:
            raise ConfigError(
                f"rollout.sampling.top_p is {self.sampling.top_p}: the learner knows no cut, so the ratio would be biased; "
                "set it to 1"
            )
        group = self.sampling.rollouts_per_problem
        if group == 1 and module.advantage not in ("group_norm", "global_norm", "gae"):
            raise ConfigError(
                f"rollout.sampling.rollouts_per_problem is 1 and model.advantage is {module.advantage}: a group of one has "
                "no baseline; set rollouts_per_problem to 2 or more, or take group_norm, whose advantage is then the reward"
            )
        if self.overlap and module.objective.importance_cap is None:
            raise ConfigError(
                "rollout.overlap trains on rollouts of the step before and model.objective.importance_cap is not set: set it "
                "(2 is usual), so that what the policy no longer likes weighs less"
            )
        if module.advantage == "pass_at_k" and not 1 <= module.pass_k <= group:
            raise ConfigError(f"model.pass_k is {module.pass_k} and a group has {group} rollouts: set it between 1 and those")
        if module.updates_per_step > groups * self.sampling.rollouts_per_problem:
            raise ConfigError(
                f"model.updates_per_step is {module.updates_per_step} but a step has only "
                f"{groups * self.sampling.rollouts_per_problem} rollouts: set it to at most that"
            )
        self._trains = True

    def _check_answers(self, datamodule: ProblemDataModule) -> None:
        """Compare ground truths with themselves: in training a fault is an error, in evaluation a warning, given once."""
        if datamodule.train_problems:
            try:
                self.verifier.check(datamodule.train_problems)
            except ConfigError as error:
                if not datamodule.skip_bad_rows:
                    raise
                print(f"warning: {error}", flush=True)
        assert self._collector is not None
        for name, problems in datamodule.eval_problems.items():
            eval_set = datamodule.eval_set(name)
            ours = eval_set.grader is not None or self._collector.graders is self.verifier
            if name in self._checked or eval_set.likelihood is not None or not ours:
                continue
            self._checked.add(name)
            if faults := self._collector.graders.unverifiable(problems, eval_set.grader):
                of = f"{len(faults)} of {len(problems)} ground truths can never be met"
                print("\n".join([f"warning: evaluation set {name}: {of}, so its accuracy is too low", *faults]), flush=True)

    def _check_window(self, datamodule: ProblemDataModule, limit: int | None) -> int:
        """Return the longest prompt + completion of the run, in tokens, or raise listing the problems that do not fit."""
        tokenizer = self.tokenizer
        lengths = [(len(self.prompt(p, tokenizer)), self.sampling.max_tokens, p) for p in datamodule.train_problems]
        for name, problems in datamodule.eval_problems.items():
            eval_set = datamodule.eval_set(name)
            template, most = eval_set.prompt or self.eval_prompt, eval_set.sampling(self.eval_sampling).max_tokens
            for p in problems:
                texts = [text for _, text in p.choices] if eval_set.likelihood is not None else None
                longest = most if texts is None else max(len(tokenizer(f" {text}").input_ids) for text in texts)
                lengths.append((len(template(p, tokenizer)), longest, p))
        over = [f"{p.source or p.id}: {n} + {most} tokens" for n, most, p in lengths if limit and n + most > limit]
        if over:
            shown = "\n  ".join(over[:50] + ([f"... and {len(over) - 50} more"] if len(over) > 50 else []))
            raise ConfigError(
                f"prompt + max_tokens exceed the model's window of {limit} tokens:\n  {shown}\nlower "
                "rollout.sampling.max_tokens (or eval_sampling.max_tokens), remove these problems, or choose a model with a "
                "longer window"
            )
        return max((n + most for n, most, _ in lengths), default=0)

    def on_fit_start(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        """Say in words what this run is."""
        datamodule: ProblemDataModule = getattr(trainer, "datamodule")  # noqa: B009 - set by Lightning at run time
        if trainer.is_global_zero:
            print(describe_run(pl_module, datamodule, self.engine, self.sampling, trainer.world_size), flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: with ``overlap``, the rollouts of the next step. Collective."""
        return self.sampler.state() if self.overlap else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._saved = state_dict

    # --- the arrows from engine to batch -------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        """Start the clock of the first step; take over what the run that is resumed had sampled ahead."""
        if self.overlap and self._saved:
            self.sampler.restore(pl_module, self._saved, self.sampling)
        self._saved = {}
        self._step_started = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: RLVRModule, batch: ProblemBatch, batch_idx: int) -> None:
        """Attach this step's rollouts and log what they say."""
        started = time.perf_counter()
        seconds = self.sampler.take_ahead(pl_module, batch) if self.overlap else None
        seconds = seconds or self.sampler.attach(pl_module, batch, self.prompt, self.sampling)
        if not self.overlap:
            self.engine.sleep()
        elif (pl_module.steps_done + 1) * pl_module.updates_per_step < trainer.max_steps:
            seconds["sync"] += self.sampler.begin_ahead(pl_module, batch, self.prompt, self.sampling)
        seconds["wait"] = self._wait_for_other_ranks(trainer)
        assert batch.rollouts is not None
        metrics = self._metrics.to(pl_module.device)
        metrics.reset()
        metrics.update(batch.rollouts)
        generated = sum(len(r.completion.token_ids) for r in batch.rollouts)
        values: dict[str, Any] = {f"rollout/{key}": value.float() for key, value in metrics.compute().items()}
        if self.sampler.generate_s is not None:
            values["rollout/tokens_per_s"] = generated / max(self.sampler.generate_s, 1e-9)
        ages = [pl_module.policy_version - r.policy_version for r in batch.rollouts]
        values["rollout/staleness"] = max(ages, default=0) / pl_module.updates_per_step
        values["rollout/restarts"] = float(self.sampler.restarts)
        values |= {f"time/{part}_s": value for part, value in seconds.items()}
        pl_module.log_dict(values, batch_size=len(batch.rollouts))
        between_steps, whole = started - self._step_started, time.perf_counter() - started
        self._other = between_steps + whole - sum(seconds.values())

    @staticmethod
    def _wait_for_other_ranks(trainer: Trainer) -> float:
        """Return the seconds from here until the last rank is here too."""
        if trainer.world_size == 1:
            return 0.0
        started = time.perf_counter()
        trainer.strategy.barrier()
        return time.perf_counter() - started

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: RLVRModule, outputs: Any, batch: ProblemBatch, batch_idx: int
    ) -> None:
        """Log the whole step's time, from the end of the step before, and the memory it ended with."""
        ended = time.perf_counter()
        values: dict[str, Any] = {
            "time/other_s": self._other,
            "time/step_s": ended - self._step_started,
            "memory/rss_gib": psutil.Process().memory_info().rss / 2**30,
            "memory/peak_gib": greatest(torch.tensor(peak_memory_gib(), device=pl_module.device)),
        }
        if pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved() / 2**30
            values["memory/device_peak_gib"] = greatest(torch.tensor(peak, device=pl_module.device))
        pl_module.log_dict(values)
        self._step_started = ended

    def _evaluate(self, trainer: Trainer, module: RLVRModule, batch: ProblemBatch) -> None:
        """Attach what is known, and sample or score the rest as its set declares."""
        datamodule: ProblemDataModule = getattr(trainer, "datamodule")  # noqa: B009 - set by Lightning at run time
        eval_set = datamodule.eval_set(batch.name)
        template, sampling = eval_set.prompt or self.eval_prompt, eval_set.sampling(self.eval_sampling)
        todo = [i for i, slot in enumerate(batch.slots) if slot not in batch.known]
        rest = replace(
            batch, slots=tuple(batch.slots[i] for i in todo), problems=tuple(batch.problems[i] for i in todo), known={}
        )
        # Syncing and scoring are collective for a sharded policy: all ranks skip them, or none.
        if trainer.strategy.reduce_boolean_decision(bool(todo), all=False):
            if eval_set.likelihood is None:
                self.sampler.attach(module, rest, template, sampling, eval_set.grader)
            else:
                with trainer.precision_plugin.forward_context():
                    rest.rollouts = choose(
                        rest.problems,
                        template,
                        self.tokenizer,
                        lambda data: module.score(data.to(module.device)),
                        metric=eval_set.likelihood,
                        policy_version=module.policy_version,
                    )
        new, size = rest.rollouts or [], sampling.rollouts_per_problem
        groups = batch.known | {slot: new[i * size : (i + 1) * size] for i, slot in enumerate(rest.slots)}
        batch.rollouts = [rollout for slot in batch.slots for rollout in groups[slot]]
        batch.group_size = size

    def on_validation_start(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        """Stop the clock of the step: an evaluation is no part of it."""
        self._evaluation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        """Let the clock go on."""
        self._step_started += time.perf_counter() - self._evaluation_started

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: RLVRModule, batch: ProblemBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attach evaluation rollouts."""
        self._evaluate(trainer, pl_module, batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: RLVRModule, batch: ProblemBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attach evaluation rollouts."""
        self._evaluate(trainer, pl_module, batch)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: RLVRModule, batch: ProblemBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attach evaluation rollouts."""
        self._evaluate(trainer, pl_module, batch)

    # --- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the engine and the grading processes. Idempotent."""
        self.engine.close()  # first: what is being sampled ahead ends with an error
        if self._sampler is not None:
            self._sampler.settle()
        self.verifier.close()
        if self._collector is not None:
            self._collector.graders.close()

    def teardown(self, trainer: Trainer, pl_module: RLVRModule, stage: str) -> None:
        """Close everything, except after ``validate``: a fit that follows would start the engine a second time."""
        if stage == "validate":
            self.engine.sleep()
            self.engine.version = None  # the next entry may load other weights under the same version
        else:
            self.close()

    def on_exception(self, trainer: Trainer, pl_module: RLVRModule, exception: BaseException) -> None:
        """Leave no process behind."""
        self.close()


def peak_memory_gib() -> float:
    """Return the most main memory that this process has held so far, GiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would begin with the peak of the process that started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
