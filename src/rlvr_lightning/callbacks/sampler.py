"""An engine kept in step with the policy: synced when stale, started again when it died, a step ahead when asked."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Any, TypeVar, cast

from lightning.pytorch.trainer.states import TrainerFn

from rlvr_lightning.batching import share_of_rank
from rlvr_lightning.callbacks.checkpoint import save_interrupted
from rlvr_lightning.data import ProblemLoader
from rlvr_lightning.engines import EngineDiedError, PeerFailedError, RolloutEngine, Sampling, StaleEngineError
from rlvr_lightning.engines.transfer import gather
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.records import ProblemBatch, Rollout
from rlvr_lightning.rollout import Collector

T = TypeVar("T")
Ahead = tuple[list[Rollout], float | None]
"""Rollouts, and the seconds in which the engine sampled them."""
FAILURES = (EngineDiedError, StaleEngineError, PeerFailedError)


class Sampler:
    """Attaches rollouts to batches. Every rank calls every method: a sync is collective.

    Args:
        engine: what samples.
        collector: prompts it and grades what it says.
        window: most tokens of any sequence of the run.
        max_restarts: times that an engine that failed is tried again for one batch.
    """

    def __init__(self, engine: RolloutEngine, collector: Collector, window: int, max_restarts: int) -> None:
        self.engine = engine
        self.collector = collector
        self.window = window
        self.max_restarts = max_restarts
        self.restarts = 0
        """Failures of this rank's engine so far."""
        self._died = False
        self.generate_s: float | None = None
        """Seconds in which the engine sampled the latest training rollouts; None if an earlier process did."""
        self._ahead: tuple[ProblemBatch, Future[Ahead]] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampling-ahead")

    def attach(
        self, module: RLVRModule, batch: ProblemBatch, prompt: PromptTemplate, sampling: Sampling, grader: str | None = None
    ) -> dict[str, float]:
        """Fill ``batch.rollouts``; return the seconds of each part.

        When the engine of one rank has failed, that rank starts it again, all of them sync, and it samples with the same seeds.

        Raises:
            EngineDiedError: after ``max_restarts``. A fit has then been saved, at the step or the evaluation that it could not
                sample.
        """
        self._finish_ahead()
        share(module, batch, sampling)
        trains = batch.name == "train"
        seconds = self._persist(module, lambda: self._sample(module, batch, prompt, sampling, grader), repeat=trains)
        if trains:
            self.generate_s = self.collector.seconds["generate"]
        return seconds

    def _persist(self, module: RLVRModule, work: Callable[[], T], *, repeat: bool) -> T:
        """Return what ``work`` returns once it has succeeded on every rank; ``repeat``: a resumed run begins with this step."""
        failure: RuntimeError | None = None
        for left in range(self.max_restarts, -1, -1):
            done, failure = self._guard(self._restart)
            if not failed_anywhere(module, failure):  # else the others would wait for this rank in the sync
                done, failure = self._guard(work)
                if not failed_anywhere(module, failure):
                    return cast(T, done)
            self.engine.version = None  # on every rank, so that all of them sync
            if failure is not None and not isinstance(failure, PeerFailedError):
                self.restarts += 1
                what = f"trying again, at most {left} time(s)" if left else "giving up"
                print(f"the engine failed; {what}: {failure}", flush=True)
        reason = f"the engine failed {self.max_restarts + 1} time(s) in a row: {failure or 'that of another rank'}"
        loader = module.trainer.train_dataloader
        if module.trainer.state.fn == TrainerFn.FITTING and isinstance(loader, ProblemLoader):
            if repeat:
                loader.repeat()
            reason += f"\nsaved after update {module.trainer.global_step}; to go on:\n  {save_interrupted(module.trainer)}"
        raise EngineDiedError(reason) from failure

    def _guard(self, work: Callable[[], T]) -> tuple[T | None, RuntimeError | None]:
        """Return what ``work`` returns, or how this rank's engine failed in it."""
        try:
            return work(), None
        except FAILURES as error:
            self._died = self._died or isinstance(error, EngineDiedError)
            return None, error

    def _restart(self) -> None:
        if self._died:
            self.engine.restart()
            self._died = False

    def _sync(self, module: RLVRModule) -> None:
        stale = self.engine.version != module.policy_version
        if module.trainer.strategy.reduce_boolean_decision(stale, all=False):  # a sync is collective
            self.engine.sync(module.weights(), module.policy_version, window=self.window)

    def _sample(
        self, module: RLVRModule, batch: ProblemBatch, prompt: PromptTemplate, sampling: Sampling, grader: str | None
    ) -> dict[str, float]:
        started = time.perf_counter()
        self._sync(module)
        synced = time.perf_counter()
        if batch.rollouts is None:  # else only another rank's engine had failed
            batch.rollouts = self.collector.collect(batch, prompt, sampling, grader)
        return {"sync": synced - started, **self.collector.seconds}

    # --- one step ahead ------------------------------------------------------------------------------------------------

    def begin_ahead(self, module: RLVRModule, present: ProblemBatch, prompt: PromptTemplate, sampling: Sampling) -> float:
        """Begin to sample the step after the present one, with the weights of now; return the seconds that the sync took.

        Raises:
            EngineDiedError: as :meth:`attach` does; the checkpoint then holds the rollouts of the present step.
        """
        started, self._ahead = time.perf_counter(), (present, at_hand(present.rollouts or []))
        self._persist(module, lambda: self._sync(module), repeat=True)
        batch = self._batch(module, present.step + 1, sampling)

        def collect() -> Ahead:
            return self.collector.collect(batch, prompt, sampling), self.collector.seconds["generate"]

        self._ahead = batch, self._thread.submit(collect)
        return time.perf_counter() - started

    def take_ahead(self, module: RLVRModule, batch: ProblemBatch) -> dict[str, float] | None:
        """Attach what was sampled ahead for this step; return the seconds waited, or None if it is not there on every rank."""
        started = time.perf_counter()
        self._finish_ahead()
        ahead, self._ahead = self._ahead, None
        there = ahead is not None and ahead[0].step == batch.step
        if not module.trainer.strategy.reduce_boolean_decision(there):
            return None
        assert ahead is not None
        batch.group_size, batch.share = ahead[0].group_size, ahead[0].share
        batch.rollouts, self.generate_s = ahead[1].result()
        return {"sync": 0.0, "generate": time.perf_counter() - started, "grade": 0.0}

    def _finish_ahead(self) -> None:
        """Wait for what is being sampled ahead; forget it if this rank's engine failed in it."""
        self.settle()
        if self._ahead is not None:
            _, failure = self._guard(self._ahead[1].result)
            if failure is not None:
                self._ahead = self.engine.version = None
                self.restarts += 1
                print(f"the engine failed, so the next step is sampled when it comes: {failure}", flush=True)

    def state(self) -> dict[str, Any]:
        """Return what all ranks have sampled for a step that has not begun, for a checkpoint; waits for it. Collective."""
        self._finish_ahead()
        mine = None if self._ahead is None else dict(zip(self._ahead[0].indices, self._ahead[1].result()[0], strict=True))
        rollouts: dict[int, Rollout] = {}
        for part in gather(mine):
            if part is None:
                return {}
            rollouts |= part
        assert self._ahead is not None
        return {"step": self._ahead[0].step, "rollouts": [asdict(rollouts[i]) for i in sorted(rollouts)]}

    def restore(self, module: RLVRModule, state: dict[str, Any], sampling: Sampling) -> None:
        """Take over what :meth:`state` returned, with any number of ranks, unless the run now samples something else."""
        batch, rollouts = self._batch(module, state["step"], sampling), [*map(Rollout.from_dict, state["rollouts"])]
        if [rollout.problem for rollout in rollouts] == [p for p in batch.problems for _ in range(batch.group_size)]:
            self._ahead = batch, at_hand([rollouts[i] for i in batch.indices])

    def _batch(self, module: RLVRModule, step: int, sampling: Sampling) -> ProblemBatch:
        loader = module.trainer.train_dataloader
        assert isinstance(loader, ProblemLoader)
        batch = loader.batch(step)
        share(module, batch, sampling)
        return batch

    def settle(self) -> None:
        """Wait until nothing is sampled any more; what was stays until its step."""
        if self._ahead is not None:
            wait([self._ahead[1]])


def at_hand(rollouts: list[Rollout]) -> Future[Ahead]:
    """Return rollouts as what samples ahead returns them."""
    future: Future[Ahead] = Future()
    future.set_result((rollouts, None))
    return future


def failed_anywhere(module: RLVRModule, failure: RuntimeError | None) -> bool:
    """Return whether the engine of any rank has failed. Collective."""
    return module.trainer.strategy.reduce_boolean_decision(failure is not None, all=False)


def share(module: RLVRModule, batch: ProblemBatch, sampling: Sampling) -> None:
    """Decide the group size, and which of a training step's rollouts are this rank's."""
    batch.group_size = sampling.rollouts_per_problem
    if batch.name == "train":
        of_step = len(batch.problems) * batch.group_size
        batch.share = share_of_rank(of_step, module.updates_per_step, module.global_rank, module.trainer.world_size)
