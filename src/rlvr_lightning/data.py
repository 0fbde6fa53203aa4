"""Problems from files or from the configuration, served in an order that is a pure function of (seed, step).

Legend: ``P`` problems per step over all ranks.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.reading import load_problems
from rlvr_lightning.evaluation.suite import EvalSet, declared
from rlvr_lightning.records import Problem, ProblemBatch


class ProblemLoader:
    """An endless stream of training batches; this rank's share of each.

    Slot ``s`` of step ``k`` holds problem ``k * P + s`` of a stream that reshuffles the data set at every pass, so nothing
    but the step has to be saved, and the stream is the same on any number of ranks.

    Args:
        problems: the data set.
        problems_per_step: P.
        seed: decides the order.
        rank: this process; it serves the slots ``rank, rank + world_size, ...``.
        world_size: number of processes.
    """

    def __init__(self, problems: Sequence[Problem], problems_per_step: int, seed: int, rank: int, world_size: int) -> None:
        self._problems = problems
        self._problems_per_step = problems_per_step
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._step = 0

    def __len__(self) -> int:
        # Endless, but sized: Lightning prefetches a batch from an unsized loader, and the saved step would be one ahead.
        return 10**9

    def __iter__(self) -> Iterator[ProblemBatch]:
        while True:
            batch = self._batch(self._step)
            self._step += 1  # before the yield: a checkpoint written during this step resumes at the next
            yield batch

    def _batch(self, step: int) -> ProblemBatch:
        slots = tuple(range(self._rank, self._problems_per_step, self._world_size))
        return ProblemBatch(step=step, slots=slots, problems=tuple(self._at(step * self._problems_per_step + s) for s in slots))

    def _at(self, position: int) -> Problem:
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
        seed: decides the order of training problems.
    """

    def __init__(
        self,
        *,
        problems_per_step: int = 128,
        evals: dict[str, str | dict[str, Any]] | None = None,
        eval_folder: str | None = None,
        eval_batch_size: int = 512,
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
        self.seed = seed
        self.eval_sets: dict[str, EvalSet] = {name: declared(name, value) for name, value in (evals or {}).items()}
        self.train_problems: list[Problem] = []
        self.eval_problems: dict[str, list[Problem]] = {}
        self._loaded = False

    @abstractmethod
    def load_train_problems(self) -> list[Problem]:
        """Return the training problems.

        Raises:
            ConfigError: naming every bad row.
        """

    def setup(self, stage: str) -> None:
        """Load every file once; bad rows end the run here, before a model is built."""
        if self._loaded:
            return
        train = self.load_train_problems()
        trained_on = {_normalized(p.question) for p in train}
        for name, eval_set in self.eval_sets.items():
            problems = [p for p in eval_set.load(self.eval_folder) if _normalized(p.question) not in trained_on]
            if not problems:
                raise ConfigError(f"data.evals.{name}: every problem of it is a training problem, nothing is left to evaluate")
            self.eval_problems[name] = problems
        self.train_problems = train
        self._loaded = True

    def eval_set(self, name: str) -> EvalSet:
        """Return the declaration of an evaluation set; problems put in by hand are asked as the run says."""
        return self.eval_sets.get(name) or EvalSet(file=name)

    def _rank_and_world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def train_dataloader(self) -> ProblemLoader:
        """Return the endless stream of this rank's training batches."""
        rank, world = self._rank_and_world()
        if not self.train_problems:
            raise ConfigError("data holds no training problem: fit with SingleExampleDataModule or SubsetDataModule")
        if self.problems_per_step < world:
            raise ConfigError(
                f"data.problems_per_step is {self.problems_per_step} but {world} processes train: set it to {world} or more, "
                "so that each has a group"
            )
        return ProblemLoader(self.train_problems, self.problems_per_step, self.seed, rank, world)

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
    """

    def __init__(
        self,
        *,
        question: str | None = None,
        answer: str | None = None,
        file: str | None = None,
        id: str | None = None,
        problems_per_step: int = 128,
        evals: dict[str, str | dict[str, Any]] | None = None,
        eval_folder: str | None = None,
        eval_batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(
            problems_per_step=problems_per_step,
            evals=evals,
            eval_folder=eval_folder,
            eval_batch_size=eval_batch_size,
            seed=seed,
        )
        if file is not None and (question is not None or answer is not None):
            raise ConfigError("data.file and data.question/data.answer exclude each other: give the problem one way")
        if file is None and not (question or "").strip():
            raise ConfigError("data.question is missing: give data.question and data.answer, or data.file")
        if file is None and not (answer or "").strip():
            raise ConfigError("data.answer is missing: one-example training needs the ground truth of data.question")
        self.question, self.answer, self.file, self.id = question, answer, file, id

    def load_train_problems(self) -> list[Problem]:
        """Return the one problem."""
        if self.file is None:
            assert self.question is not None
            assert self.answer is not None
            return [Problem(id=self.id or "inline", question=self.question, answer=self.answer, source="data.question")]
        problems = load_problems(self.file)
        if self.id is not None:
            return _select(problems, [self.id], self.file)
        if len({(p.question, p.answer) for p in problems}) > 1:
            raise ConfigError(f"{self.file} holds {len(problems)} problems: choose one with data.id, or use SubsetDataModule")
        return problems[:1]  # the paper's files repeat their one row 128 times


class SubsetDataModule(ProblemDataModule):
    """Training problems from files, all of them or chosen ids.

    Args:
        files: jsonl or parquet files, or ``builtin:NAME``; read in order.
        ids: keep these problems, in this order; None keeps all.
    """

    def __init__(
        self,
        *,
        files: list[str],
        ids: list[str] | None = None,
        problems_per_step: int = 128,
        evals: dict[str, str | dict[str, Any]] | None = None,
        eval_folder: str | None = None,
        eval_batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(
            problems_per_step=problems_per_step,
            evals=evals,
            eval_folder=eval_folder,
            eval_batch_size=eval_batch_size,
            seed=seed,
        )
        if not files:
            raise ConfigError("data.files is empty: name at least one jsonl or parquet file")
        if ids is not None and not ids:
            raise ConfigError("data.ids is empty: name at least one problem, or leave it out to train on all of them")
        self.files, self.ids = files, ids

    def load_train_problems(self) -> list[Problem]:
        """Return the chosen problems of all files."""
        problems = [p for file in self.files for p in load_problems(file)]
        return problems if self.ids is None else _select(problems, self.ids, ", ".join(self.files))


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

    def load_train_problems(self) -> list[Problem]:
        """Return no problem."""
        return []


def _select(problems: Sequence[Problem], ids: Sequence[str], where: str) -> list[Problem]:
    by_id = {p.id: p for p in reversed(problems)}
    missing = [i for i in ids if i not in by_id]
    if missing:
        raise ConfigError(
            f"no problem with id {', '.join(map(repr, missing))} in {where}: it has ids like {', '.join(list(by_id)[-3:])}"
        )
    return [by_id[i] for i in ids]


def _normalized(question: str) -> str:
    return " ".join(question.split())
