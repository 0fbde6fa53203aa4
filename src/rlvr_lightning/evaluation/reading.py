"""From files to problems: one row, one problem, and every bad row named."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.grading.boxed import last_boxed
from rlvr_lightning.prompts import PAPER_SUFFIX
from rlvr_lightning.records import Problem

BUILTIN = "builtin:"
MOST_CHARACTERS = 1_000_000
"""A longer question is taken for a mistake, such as a file pasted into a field."""

RowParser = Callable[[dict[str, Any], int, str], Problem]
"""From a row, its 1-based number and its source to a problem; raises ConfigError saying what is wrong with the row."""


def training_row(row: dict[str, Any], number: int, source: str) -> Problem:
    """Return the problem of a row with the usual keys or in the schema of the paper's training files.

    The question is under ``question`` or ``problem``, or the last message of the paper's ``prompt``; the answer under
    ``answer``, or the paper's ``reward_model.ground_truth``. The id is ``id``, else ``extra_info.index``.

    Source: ypwang61/One-Shot-RLVR:data/train.
    """
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
    has = f"the row has {', '.join(row)}" if row else "the row is empty"
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"no question (keys read: question, problem, prompt; {has})")
    if answer is None or not str(answer).strip():
        raise ConfigError(f"no answer (keys read: answer, reward_model.ground_truth; {has})")
    index = (extra or {}).get("index")
    return Problem(id=str(row.get("id", "" if index is None else index)), question=question, answer=str(answer), source=source)


def load_problems(file: str, parse: RowParser = training_row) -> list[Problem]:
    """Read problems as `read_problems` does, all or none.

    Raises:
        ConfigError: if the file is missing, empty or unreadable, or listing every bad row with what is wrong.
    """
    problems, faults = read_problems(file, parse)
    if faults:
        raise ConfigError(bad_rows(faults))
    return problems


def bad_rows(faults: Sequence[str]) -> str:
    """Return one message about all of them."""
    return "\n  ".join([f"{len(faults)} bad row(s); mend or remove them:", *faults])


def data_files(path: str) -> list[str]:
    """Return ``path``, or the data files in it if it is a folder, by name.

    Raises:
        ConfigError: if the folder holds none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [path]
    found = sorted(str(file) for file in folder.iterdir() if file.suffix in READERS)
    if not found:
        raise ConfigError(f"data folder {path!r} holds no {', '.join(READERS)} file: give the folder of the data files")
    return found


def read_problems(file: str, parse: RowParser = training_row, prefix: str = "") -> tuple[list[Problem], list[str]]:
    """Read problems from a ``.jsonl``, ``.json`` or ``.parquet`` file, or a set that ships with the package (``builtin:NAME``).

    Args:
        file: where they are.
        parse: makes a problem of a row; one without an id gets the row's number.
        prefix: put before that number.

    Returns:
        The problems of the good rows, and a line on each bad one: file, row, what is wrong. If all are bad in the same way,
        as in a file without the right columns, one line says so.

    Raises:
        ConfigError: if the file is missing, empty or unreadable.
    """
    path = _builtin(file) if file.startswith(BUILTIN) else Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"data file {file!r} does not exist: give the path of a .jsonl, .json or .parquet file")
    if path.suffix not in READERS:
        raise ConfigError(f"data file {file!r} is none of {', '.join(READERS)}: convert it, one problem per row")
    problems: list[Problem] = []
    bad: list[tuple[str, str]] = []
    for number, row in READERS[path.suffix](path):
        try:
            problem = parse(_checked(row), number, f"{file}:{number}")
            if len(problem.question) > MOST_CHARACTERS:
                raise ConfigError(f"the question has {len(problem.question):,} characters, more than any model can read")
            problems.append(problem if problem.id else replace(problem, id=f"{prefix}{number}"))
        except ConfigError as error:
            bad.append((f"row {number}{_id(row)}", str(error)))
    if not problems and not bad:
        raise ConfigError(f"data file {file!r} is empty: it needs at least one problem")
    if not problems and len(bad) > 1 and len({reason for _, reason in bad}) == 1:
        return [], [f"{file}, each of its {len(bad)} rows: {bad[0][1]}"]
    return problems, [f"{file} {row}: {reason}" for row, reason in bad]


def answer_under(row: Mapping[str, Any], key: str) -> str | None:
    """Return the ground truth under ``key``, or None if the row has no such key."""
    name, _, form = key.partition("|")
    value = row.get(name)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # AMC's file writes its integers as 27.0
    text = str(value).strip()
    return FORMS[form](text) if form else text


FORMS: Mapping[str, Callable[[str], str]] = {
    "last_box": lambda text: last_boxed(text) or "",
    "after_hashes": lambda text: text.rpartition("####")[2].strip() if "####" in text else "",
}
"""How a ground truth is read from a worked solution; an empty string means that there is none."""


def _id(row: Any) -> str:
    """Return how a message names the id of a row that has one."""
    extra = row.get("extra_info") if isinstance(row, dict) else None
    known = row.get("id", extra.get("index") if isinstance(extra, dict) else None) if isinstance(row, dict) else None
    return "" if known is None else f" (id {known})"


def _checked(row: Any) -> dict[str, Any]:
    """Return a row that is an object; what a reader could not decode arrives as its error."""
    if isinstance(row, UnicodeDecodeError):
        raise ConfigError("not UTF-8 text")
    if isinstance(row, Exception):
        raise ConfigError(f"not JSON ({row})")
    if not isinstance(row, dict):
        raise ConfigError(f"a row must be an object with question and answer, not {type(row).__name__}")
    return row


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


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of a list of rows."""
    try:
        rows = json.loads(path.read_bytes().decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"data file {str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list):
        raise ConfigError(f"data file {str(path)!r} holds no list: write [{{...}}, ...], or one row per line in a .jsonl file")
    yield from enumerate(rows, start=1)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"data file {str(path)!r} cannot be read as parquet: {error}") from error
    yield from enumerate(rows, start=1)


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""From a file to (1-based number, row); a row that cannot be read arrives as its error."""


def _builtin(file: str) -> Path:
    folder = Path(str(package_files("rlvr_lightning"))) / "problems"
    name = file.removeprefix(BUILTIN)
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"no built-in set {name!r}: choose one of {', '.join(sorted(p.stem for p in folder.glob('*.jsonl')))}"
        )
    return path
