"""Problems from files or from the configuration, served in an order that is a pure function of (seed, step).

Legend: ``P`` problems per step over all ranks.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.suite import EvalSet, declared
from rlvr_lightning.jsonl import write_lines
from rlvr_lightning.perturb import Perturbation
from rlvr_lightning.records import Problem, ProblemBatch
from rlvr_lightning.selection import Selection
from rlvr_lightning.sources import Pool, TrainSource, declared_source, read_pool

GOLDEN = 11400714819323198485
"""2**64 times the golden ratio's fraction: no number's multiples, modulo 2**64, spread more evenly over the circle."""


class ProblemLoader:
    """An endless stream of training batches, the same on every rank: ranks share out the rollouts, not the problems.

    Slot ``s`` of step ``k`` holds problem ``k * P + s`` of an endless order that is a pure function of the seed, so nothing
    but the step has to be saved. Without weights every pass over the set is shuffled anew. With weights the problems lie
    on a circle, in a shuffled order, each on an arc as long as its weight, and every slot is a golden ratio of the circle
    further: any stretch of slots holds each problem as often as its weight says, to within about one.

    Args:
        problems: the data set.
        problems_per_step: P.
        seed: decides the order.
        weights: how often each problem is drawn, relative to the others; None: all alike.
    """

    def __init__(
        self, problems: Sequence[Problem], problems_per_step: int, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        self._problems = problems
        self._problems_per_step = problems_per_step
        self._seed = seed
        self._step = 0
        self._ends: np.ndarray | None = None
        if weights is not None and len(set(weights)) > 1:
            self._circle = np.random.default_rng((seed, 0)).permutation(len(problems))
            ends = np.cumsum(np.asarray(weights, dtype=float)[self._circle])
            self._ends = ends / ends[-1]

    def __len__(self) -> int:
        # Endless, but sized: Lightning prefetches a batch from an unsized loader, and the saved step would be one ahead.
        return 10**9

    def __iter__(self) -> Iterator[ProblemBatch]:
        while True:
            batch = self.batch(self._step)
            self._step += 1  # before the yield: a checkpoint written during this step resumes at the next
            yield batch

    def repeat(self) -> None:
        """Take the last batch back: a checkpoint written now resumes with it."""
        self._step -= 1

    def batch(self, step: int) -> ProblemBatch:
        """Return the batch of a step."""
        slots = tuple(range(self._problems_per_step))
        return ProblemBatch(step=step, slots=slots, problems=tuple(self._at(step * self._problems_per_step + s) for s in slots))

    def _at(self, position: int) -> Problem:
        if self._ends is not None:
            angle = position * GOLDEN % 2**64 / 2**64
            return self._problems[int(self._circle[np.searchsorted(self._ends[:-1], angle, side="right")])]
        epoch, index = divmod(position, len(self._problems))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._problems))
        return self._problems[int(order[index])]

    def state_dict(self) -> dict[str, int]:
        """Return the next step to serve."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the saved step."""
        self._step = state["step"]


class EvalLoader:
    """One evaluation set in order, in batches; every rank gets the same number of them (the last may be empty).

    Equal counts matter because syncing a sharded policy to its engine is collective.
    """

    def __init__(self, name: str, problems: Sequence[Problem], batch_size: int, rank: int, world_size: int) -> None:
        self.name = name
        self._problems = problems
        self._subjects = tuple(sorted({p.subject for p in problems} - {""}))
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        return -(-len(self._problems) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[ProblemBatch]:
        per_round = self._batch_size * self._world_size
        for index in range(len(self)):
            slots = tuple(range(index * per_round, min((index + 1) * per_round, len(self._problems))))[
                self._rank :: self._world_size
            ]
            problems = tuple(self._problems[s] for s in slots)
            yield ProblemBatch(step=0, slots=slots, problems=problems, name=self.name, subjects=self._subjects)


class ProblemDataModule(LightningDataModule):
    """Training problems of one kind or another, plus any number of evaluation sets.

    Args:
        problems_per_step: P, the number of groups in one rollout batch. With one training problem, P groups of that problem.
        evals: name -> jsonl or parquet file, ``builtin:NAME`` for a set that ships with the package, ``suite:NAME`` for a
            declared one, or a declaration (fields of :class:`~rlvr_lightning.evaluation.suite.EvalSet`, and ``base``). A
            problem that is also trained on is left out of its evaluation set.
        eval_folder: folder with ``NAME.jsonl`` to read ``suite:`` sets from; None takes them from the hub.
        eval_batch_size: problems sampled together in evaluation, per process; an interrupted test loses one such batch.
        perturb: what to change in the training problems, on purpose.
        skip_bad_rows: train without rows that cannot be read, and in spite of ground truths that cannot be met, and tell.
        seed: decides the order of training problems.
    """

    def __init__(
        self,
        *,
        problems_per_step: int = 128,
        evals: dict[str, str | dict[str, Any]] | None = None,
        eval_folder: str | None = None,
        eval_batch_size: int = 512,
        perturb: Perturbation = Perturbation(),  # noqa: B008 - frozen
        skip_bad_rows: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in (("problems_per_step", problems_per_step), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ConfigError(f"data.{key} is {value}: set it to 1 or more")
        if "train" in (evals or {}):
            raise ConfigError("data.evals: 'train' names the training batches; give the evaluation set another name")
        self.problems_per_step = problems_per_step
        self.eval_folder = eval_folder
        self.eval_batch_size = eval_batch_size
        self.perturb = perturb
        self.skip_bad_rows = skip_bad_rows
        self.seed = seed
        self.eval_sets: dict[str, EvalSet] = {name: declared(name, value) for name, value in (evals or {}).items()}
        self.train_problems: list[Problem] = []
        self.train_weights: list[float] | None = None
        self.changes: list[dict[str, str]] = []
        self.notes: list[str] = []
        self.eval_problems: dict[str, list[Problem]] = {}
        self._loaded = False

    @abstractmethod
    def load_pool(self) -> Pool:
        """Return the training problems.

        Raises:
            ConfigError: naming every bad row.
        """

    def setup(self, stage: str) -> None:
        """Load every file once; all bad rows of all files end the run here, before a model is built."""
        if not self._loaded:
            self._load()
            self._loaded = True
        trainer = self.trainer
        if stage == "fit" and trainer is not None and trainer.is_global_zero:
            self.save(Path(trainer.default_root_dir))

    def _load(self) -> None:
        faults: list[str] = []
        unchanged: list[Problem] = []
        try:
            pool = self.load_pool()
            unchanged = pool.problems
            self.train_problems, self.changes = self.perturb(pool.problems)
            self.train_weights, self.notes = [pool.weights[p.id] for p in pool.problems], pool.notes
        except ConfigError as error:
            faults.append(str(error))
        trained_on = {_normalized(p.question) for p in [*self.train_problems, *unchanged]}
        for name, eval_set in self.eval_sets.items():
            try:
                problems = [p for p in eval_set.load(self.eval_folder) if _normalized(p.question) not in trained_on]
            except ConfigError as error:
                faults.append(str(error))
                continue
            if not problems:
                faults.append(f"data.evals.{name}: every problem of it is a training problem, nothing is left to evaluate")
            self.eval_problems[name] = problems
        if faults:
            raise ConfigError("\n".join(faults))

    def save(self, folder: Path) -> None:
        """Write what is trained on, ``problems.jsonl``, and what was changed in it on purpose, ``perturbed.jsonl``."""
        rows = [{"id": p.id, "question": p.question, "answer": p.answer, "source": p.source} for p in self.train_problems]
        write_lines(folder / "problems.jsonl", rows)
        if self.changes:
            write_lines(folder / "perturbed.jsonl", self.changes)

    def eval_set(self, name: str) -> EvalSet:
        """Return the declaration of an evaluation set; problems put in by hand are asked as the run says."""
        return self.eval_sets.get(name) or EvalSet(file=name)

    def _rank_and_world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def train_dataloader(self) -> ProblemLoader:
        """Return the endless stream of training batches."""
        if not self.train_problems:
            raise ConfigError("data holds no training problem: fit with SingleExampleDataModule or SubsetDataModule")
        return ProblemLoader(self.train_problems, self.problems_per_step, self.seed, self.train_weights)

    def val_dataloader(self) -> list[EvalLoader]:
        """Return one loader per evaluation set, in the configured order."""
        rank, world = self._rank_and_world()
        return [EvalLoader(n, p, self.eval_batch_size, rank, world) for n, p in self.eval_problems.items()]

    def test_dataloader(self) -> list[EvalLoader]:
        """Return the evaluation sets."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[EvalLoader]:
        """Return the evaluation sets."""
        return self.val_dataloader()


class SingleExampleDataModule(ProblemDataModule):
    """One training problem, inline or from a file: no copies of it are made or needed.

    Args:
        question: the problem's statement.
        answer: its ground truth.
        file: jsonl or parquet file (or ``builtin:NAME``) to take the problem from, instead of question and answer.
        id: the problem's id in ``file`` (needed if the file has more than one row), or the name of the inline problem.
        kwargs: see :class:`ProblemDataModule`.
    """

    def __init__(
        self,
        *,
        question: str | None = None,
        answer: str | None = None,
        file: str | None = None,
        id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if file is not None and (question is not None or answer is not None):
            raise ConfigError("data.file and data.question/data.answer exclude each other: give the problem one way")
        if file is None and not (question or "").strip():
            raise ConfigError("data.question is missing: give data.question and data.answer, or data.file")
        if file is None and not (answer or "").strip():
            raise ConfigError("data.answer is missing: one-example training needs the ground truth of data.question")
        self.question, self.answer, self.file, self.id = question, answer, file, id

    def load_pool(self) -> Pool:
        """Return the one problem."""
        if self.file is None:
            assert self.question is not None
            assert self.answer is not None
            name = self.id or "inline"
            return Pool([Problem(id=name, question=self.question, answer=self.answer, source="data.question")], {name: 1.0}, [])
        pool = read_pool([TrainSource(file=self.file)], skip_bad_rows=self.skip_bad_rows)
        if self.id is not None:
            return pool.keep(Selection(ids=(self.id,))(pool.problems))
        if len(pool.problems) > 1:
            raise ConfigError(
                f"{self.file} holds {len(pool.problems)} problems: choose one by data.id, or use SubsetDataModule"
            )
        return pool


class SubsetDataModule(ProblemDataModule):
    """Training problems from any sources, all of them or some.

    Args:
        sources: each a jsonl or parquet file, a folder of them, ``builtin:NAME``, or a declaration (fields of
            :class:`~rlvr_lightning.sources.TrainSource`: a hub data set, a generator, columns, weight).
        ids: see :class:`~rlvr_lightning.selection.Selection`, also for the other arguments that choose.
        ranking: a file that ``rlvr rank`` wrote.
        top: the first so many of the ranking.
        accuracy: the band of mean accuracies in the ranking.
        random: so many, drawn from those that the others leave.
        random_seed: decides the draw.
        kwargs: see :class:`ProblemDataModule`.
    """

    def __init__(
        self,
        *,
        sources: list[str | dict[str, Any]],
        ids: list[str] | None = None,
        ranking: str | None = None,
        top: int | None = None,
        accuracy: tuple[float, float] | None = None,
        random: int | None = None,
        random_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not sources:
            raise ConfigError("data.sources is empty: name at least one jsonl or parquet file")
        self.sources = [declared_source(value, f"data.sources[{i}]") for i, value in enumerate(sources)]
        self.selection = Selection(
            ids=None if ids is None else tuple(ids),
            ranking=ranking,
            top=top,
            accuracy=None if accuracy is None else (accuracy[0], accuracy[1]),
            random=random,
            seed=random_seed,
        )

    def load_pool(self) -> Pool:
        """Return the chosen problems of all sources."""
        pool = read_pool(self.sources, self.eval_folder, skip_bad_rows=self.skip_bad_rows)
        return pool.keep(self.selection(pool.problems))


class EvalDataModule(ProblemDataModule):
    """Evaluation sets and nothing to train on, for ``rlvr test`` and ``rlvr validate``."""

    def __init__(
        self,
        *,
        evals: dict[str, str | dict[str, Any]],
        eval_folder: str | None = None,
        eval_batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(evals=evals, eval_folder=eval_folder, eval_batch_size=eval_batch_size, seed=seed)
        if not evals:
            raise ConfigError("data.evals is empty: name at least one evaluation set, such as math500: suite:math500")

    def load_pool(self) -> Pool:
        """Return no problem."""
        return Pool([], {}, [])


def _normalized(question: str) -> str:
    return " ".join(question.split())
