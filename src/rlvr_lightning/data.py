"""Problems from files or from the configuration, served in an order that is a pure function of (seed, step).

Legend: ``P`` problems per step over all ranks.
"""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.prompts import PAPER_SUFFIX
from rlvr_lightning.records import Problem, ProblemBatch

BUILTIN = "builtin:"


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
            yield ProblemBatch(step=0, slots=slots, problems=tuple(self._problems[s] for s in slots), name=self.name)


class ProblemDataModule(LightningDataModule):
    """Training problems of one kind or another, plus any number of evaluation sets.

    Args:
        problems_per_step: P, the number of groups in one rollout batch. With one training problem, P groups of that problem.
        evals: name -> jsonl or parquet file, or ``builtin:NAME`` for a set that ships with the package. A problem that is
            also trained on is left out of its evaluation set.
        eval_batch_size: problems sampled together in evaluation, per process.
        seed: decides the order of training problems.
    """

    def __init__(
        self,
        *,
        problems_per_step: int = 128,
        evals: dict[str, str] | None = None,
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
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.eval_files = dict(evals or {})
        self.train_problems: list[Problem] = []
        self.eval_problems: dict[str, list[Problem]] = {}

    @abstractmethod
    def load_train_problems(self) -> list[Problem]:
        """Return the training problems.

        Raises:
            ConfigError: naming every bad row.
        """

    def setup(self, stage: str) -> None:
        """Load every file once; bad rows end the run here, before a model is built."""
        if self.train_problems:
            return
        train = self.load_train_problems()
        trained_on = {_normalized(p.question) for p in train}
        for name, file in self.eval_files.items():
            problems = [p for p in load_problems(file) if _normalized(p.question) not in trained_on]
            if not problems:
                raise ConfigError(
                    f"data.evals.{name}: every problem of {file} is a training problem, nothing is left to evaluate"
                )
            self.eval_problems[name] = problems
        self.train_problems = train

    def _rank_and_world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def train_dataloader(self) -> ProblemLoader:
        """Return the endless stream of this rank's training batches."""
        rank, world = self._rank_and_world()
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
        evals: dict[str, str] | None = None,
        eval_batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(problems_per_step=problems_per_step, evals=evals, eval_batch_size=eval_batch_size, seed=seed)
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
        evals: dict[str, str] | None = None,
        eval_batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(problems_per_step=problems_per_step, evals=evals, eval_batch_size=eval_batch_size, seed=seed)
        if not files:
            raise ConfigError("data.files is empty: name at least one jsonl or parquet file")
        if ids is not None and not ids:
            raise ConfigError("data.ids is empty: name at least one problem, or leave it out to train on all of them")
        self.files, self.ids = files, ids

    def load_train_problems(self) -> list[Problem]:
        """Return the chosen problems of all files."""
        problems = [p for file in self.files for p in load_problems(file)]
        return problems if self.ids is None else _select(problems, self.ids, ", ".join(self.files))


def load_problems(file: str) -> list[Problem]:
    """Read problems from a ``.jsonl`` or ``.parquet`` file, or a set that ships with the package (``builtin:NAME``).

    A row needs a question (``question`` or ``problem``, or the paper's ``prompt`` message list) and an answer (``answer``, or
    the paper's ``reward_model.ground_truth``). Its id is ``id``, else ``extra_info.index``, else the row's number.

    Raises:
        ConfigError: if the file is missing, empty or unreadable, or listing every bad row with what is wrong.
    """
    path = _builtin(file) if file.startswith(BUILTIN) else Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"data file {file!r} does not exist: give the path of a .jsonl or .parquet file")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ConfigError(f"data file {file!r} is neither .jsonl nor .parquet: convert it, one problem per row")
    problems: list[Problem] = []
    bad: list[str] = []
    for number, row in readers[path.suffix](path):
        try:
            problems.append(_problem(row, number, f"{file}:{number}"))
        except ConfigError as error:
            bad.append(f"{file} row {number}: {error}")
    if bad:
        raise ConfigError("\n  ".join([f"{len(bad)} bad row(s); mend or remove them:", *bad]))
    if not problems:
        raise ConfigError(f"data file {file!r} is empty: it needs at least one problem")
    return problems


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (1-based line number, row); a line that does not parse is yielded as its error."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                yield number, error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"data file {str(path)!r} cannot be read as parquet: {error}") from error
    yield from enumerate(rows, start=1)


def _problem(row: Any, number: int, source: str) -> Problem:
    if isinstance(row, UnicodeDecodeError):
        raise ConfigError("not UTF-8 text")
    if isinstance(row, Exception):
        raise ConfigError(f"not JSON ({row})")
    if not isinstance(row, dict):
        raise ConfigError(f"a row must be an object with question and answer, not {type(row).__name__}")
    prompt, reward_model, extra = row.get("prompt"), row.get("reward_model"), row.get("extra_info")
    for key, value in (
        ("prompt", prompt[-1] if isinstance(prompt, list) and prompt else {}),
        ("reward_model", reward_model),
        ("extra_info", extra),
    ):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{key} holds {value!r}, not an object with fields: see the paper's parquet schema")
    paper_question = prompt[-1].get("content") if isinstance(prompt, list) and prompt else None
    if isinstance(paper_question, str):  # the paper's training files carry the prompt's suffix in the question
        paper_question = paper_question.removesuffix(PAPER_SUFFIX)
    question = row.get("question") or row.get("problem") or paper_question
    answer = row.get("answer", (reward_model or {}).get("ground_truth"))
    if not isinstance(question, str) or not question.strip():
        raise ConfigError("no question (keys read: question, problem, prompt)")
    if answer is None or not str(answer).strip():
        raise ConfigError("no answer (keys read: answer, reward_model.ground_truth)")
    index = (extra or {}).get("index")
    return Problem(
        id=str(row.get("id", number if index is None else index)), question=question, answer=str(answer), source=source
    )


def _builtin(file: str) -> Path:
    folder = Path(str(package_files("rlvr_lightning"))) / "problems"
    name = file.removeprefix(BUILTIN)
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"no built-in set {name!r}: choose one of {', '.join(sorted(p.stem for p in folder.glob('*.jsonl')))}"
        )
    return path


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
