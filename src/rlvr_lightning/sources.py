"""Where problems come from: a declaration of one source, and what a training set makes of several."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.reading import BUILTIN, answer_under, bad_rows, data_files, read_problems, training_row
from rlvr_lightning.evaluation.synthetic import generate
from rlvr_lightning.records import Problem

_S = TypeVar("_S", bound="Source")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Some problems. Exactly one of ``file``, ``generator``, ``hub`` says where they come from."""

    file: str | None = None
    """A jsonl, json or parquet file, a folder of such files, or ``builtin:NAME``."""
    generator: str | None = None
    """Make the problems from a seed: ``arithmetic:OPERATION:DIGITS``, or ``reasoning_gym:TASK`` (needs reasoning-gym)."""
    count: int = 200
    """How many problems to make."""
    seed: int = 0
    """Decides which problems are made; independent of the run's seed."""
    hub: str | None = None
    """A data set of the Hugging Face hub, ``owner/name``."""
    hub_file: str = ""
    """The split's file in the data set, jsonl or parquet."""
    revision: str = "main"
    """Commit, tag or branch of the data set."""
    local: str = ""
    """Name, without ending, of the file that ``data.eval_folder`` holds in place of the hub's."""
    question: tuple[str, ...] = ()
    """Keys of the question; the first one present counts. Empty, as with ``answer``: the keys of training files."""
    answer: tuple[str, ...] = ()
    """Keys of the ground truth; the first one present counts, and of a list its first entry. ``KEY|last_box`` takes the last
    ``\\boxed{}`` of the value, ``KEY|after_hashes`` what follows ``####``."""
    subject: str = ""
    """Key of what accuracy is also reported by; empty if there is none."""
    id: str = "id"
    """Key of the id; a row without it is known by its number."""

    def __post_init__(self) -> None:
        given = [key for key in ("file", "generator", "hub") if getattr(self, key)]
        if len(given) != 1:
            raise ConfigError(
                "a set of problems comes from one of file, generator, hub; this one has "
                f"{' and '.join(given) or 'none'}: give one"
            )
        if self.count < 1:
            raise ConfigError(f"count is {self.count}: set it to 1 or more")

    def read(self, folder: str | None = None) -> tuple[list[Problem], list[str]]:
        """Return the problems of all rows, copies included, and what is wrong with the other rows.

        Args:
            folder: what to read in place of the hub; None downloads.

        Raises:
            ConfigError: if there is nothing to read.
        """
        if self.generator is not None:
            return generate(self.generator, self.count, self.seed), []
        files, problems, faults = self._files(folder), [], []
        for file in files:
            prefix = f"{Path(file).stem}:" if len(files) > 1 else ""  # rows known by number, in several files
            found, bad = read_problems(file, self.parse, prefix)
            problems += found
            faults += bad
        return problems, faults

    def _files(self, folder: str | None) -> list[str]:
        if self.file is not None:
            return [self.file] if self.file.startswith(BUILTIN) else data_files(self.file)
        if folder is not None:
            for path in (Path(folder).expanduser() / f"{self.local}{ending}" for ending in (".jsonl", ".parquet")):
                if self.local and path.is_file():
                    return [str(path)]
            raise ConfigError(
                f"data.eval_folder {folder!r} holds no {self.local}.jsonl: put it there, or leave data.eval_folder out to take "
                f"{self.hub} from the hub"
            )
        from huggingface_hub import hf_hub_download

        assert self.hub is not None
        try:
            return [hf_hub_download(self.hub, self.hub_file, repo_type="dataset", revision=self.revision)]
        except (OSError, ValueError) as error:  # every failure of the hub's client is one of them
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"{self.hub_file} of the data set {self.hub} cannot be had from the hub ({reason}): set data.eval_folder to a "
                f"folder that holds {self.local}.jsonl, or go online"
            ) from error

    def parse(self, row: dict[str, Any], number: int, source: str) -> Problem:
        """Return the problem of a row; see :data:`~rlvr_lightning.evaluation.reading.RowParser`."""
        if not self.question and not self.answer and self.id == "id":
            problem = training_row(row, number, source)
        else:
            questions, answers = self.question or ("question", "problem"), self.answer or ("answer",)
            question = next((row[key] for key in questions if row.get(key)), None)
            if not isinstance(question, str) or not question.strip():
                raise ConfigError(f"no question (keys read: {', '.join(questions)}; the row has {', '.join(row)})")
            answer = next((a for key in answers if (a := answer_under(row, key)) is not None), "")
            if not answer:
                raise ConfigError(f"no answer (keys read: {', '.join(answers)}; the row has {', '.join(row)})")
            problem = Problem(id=str(row.get(self.id, "")), question=question, answer=answer, source=source)
        subject = row.get(self.subject) if self.subject else None
        return problem if subject is None else replace(problem, subject=str(subject))


@dataclass(frozen=True, kw_only=True)
class TrainSource(Source):
    """A source of training problems, which may be mixed with others."""

    prefix: str = ""
    """Put before every id: two sources may number their rows alike."""
    weight: float | None = None
    """How much of the training comes from this source, relative to the weights of the others. None, for all sources: every
    problem is drawn as often as any other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(f"weight is {self.weight}: set it above 0, or leave the source out")


@dataclass(frozen=True)
class Pool:
    """Problems to train on."""

    problems: list[Problem]
    """Different ones, with ids that differ."""
    weights: dict[str, float]
    """id -> how often it is drawn, relative to the others."""
    notes: list[str]
    """What a user should know of the files, one line each."""

    def keep(self, problems: list[Problem]) -> "Pool":
        """Return the pool with these problems alone, in this order."""
        return replace(self, problems=problems)


def read_pool(sources: Sequence[TrainSource], folder: str | None = None, *, skip_bad_rows: bool = False) -> Pool:
    """Return the problems of all sources as one set.

    Rows that are copies (same id, question and answer) are one problem, drawn as often as all of them: the paper's files hold
    128 rows of one problem. The same problem under several ids stays, and is told.

    Args:
        sources: at least one.
        folder: what to read in place of the hub.
        skip_bad_rows: leave bad rows out, and tell, instead of raising.

    Raises:
        ConfigError: listing every bad row of every source; a second problem of the same id is one. A source that cannot be
            read at all is an error in any case.
    """
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError("data.sources: some have a weight and some have none: give it to all of them or to none")
    by_id: dict[str, Problem] = {}
    weights: dict[str, float] = defaultdict(float)
    faults: list[str] = []
    unreadable: list[str] = []
    notes: list[str] = []
    for source in sources:
        try:
            rows, bad = source.read(folder)
        except ConfigError as error:
            unreadable.append(str(error))
            continue
        faults += bad
        good: list[str] = []
        for row in (replace(p, id=source.prefix + p.id) for p in rows):
            known = by_id.setdefault(row.id, row)
            if (known.question, known.answer) == (row.question, row.answer):
                good.append(row.id)
            else:
                faults.append(f"{_row(row)}: its id {row.id!r} is that of {_row(known)} (prefix tells sources apart)")
        for i in good:
            weights[i] += 1.0 if source.weight is None else source.weight / len(good)
        if copies := len(good) - len(set(good)):
            name = source.file or source.hub or source.generator
            notes.append(f"{name}: {copies} of {len(good)} rows are copies of other rows, {len(set(good))} problem(s)")
    if unreadable or (faults and not (skip_bad_rows and by_id)):
        told = [bad_rows(faults) + "\nor set data.skip_bad_rows to true to train without them"] if faults else []
        raise ConfigError("\n".join([*unreadable, *told]))
    notes += [f"left out: {fault}" for fault in faults]
    notes += _duplicates(by_id.values())
    return Pool(list(by_id.values()), dict(weights), notes)


def declared_source(value: str | Mapping[str, Any], key: str) -> TrainSource:
    """Return the source that the configuration declares under ``key``: a path or ``builtin:NAME``, or its fields."""
    if isinstance(value, str):
        return TrainSource(file=value)
    known = [f.name for f in fields(TrainSource)]
    if unknown := set(value) - set(known):
        raise ConfigError(f"{key} has no field {', '.join(sorted(unknown))}: it may have {', '.join(known)}")
    return build(TrainSource, value, key, "source")


def build(kind: type[_S], values: Mapping[str, Any], key: str, what: str, base: _S | None = None) -> _S:
    """Return an instance of a declaration's class from the fields that a configuration gives, as jsonargparse types them.

    Args:
        kind: the dataclass.
        values: field -> value.
        key: where it stands, for messages.
        what: what it should be, for messages.
        base: the fields that are not given are those of this one.

    Raises:
        ConfigError: naming the key and what is wrong with it.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    start: dict[str, Any] = {} if base is None else {"default": base}
    parser.add_argument("--it", type=kind, **start)
    try:
        return parser.instantiate(parser.parse_object({"it": dict(values)})).it
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    except Exception as error:  # jsonargparse raises several kinds, each with a sentence about the field
        raise ConfigError(f"{key} is no {what}: {' '.join(str(error).split())}") from error


def _duplicates(problems: Iterable[Problem]) -> list[str]:
    """Return a line for every question that stands under several ids."""
    same: dict[str, list[Problem]] = {}
    for problem in problems:
        same.setdefault(" ".join(problem.question.split()), []).append(problem)
    return [
        f"{len(group)} rows hold the same question"
        + (": " if len({p.answer for p in group}) == 1 else ", with different answers: ")
        + ", ".join(f"id {p.id} ({_row(p)})" for p in group)
        for group in same.values()
        if len(group) > 1
    ]


def _row(problem: Problem) -> str:
    """Return where a problem stands, as messages about rows say it.

    >>> _row(Problem("7", "1 + 1?", "2", source="sums.jsonl:3"))
    'sums.jsonl row 3'
    """
    return " row ".join(problem.source.rsplit(":", 1))
