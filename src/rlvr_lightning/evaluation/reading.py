"""From files to problems: one row, one problem, and every bad row named."""

import json
from collections.abc import Callable, Iterator
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.prompts import PAPER_SUFFIX
from rlvr_lightning.records import Problem

BUILTIN = "builtin:"

RowParser = Callable[[dict[str, Any], int, str], Problem]
"""From a row, its 1-based number and its source to a problem; raises ConfigError saying what is wrong with the row."""


def training_row(row: dict[str, Any], number: int, source: str) -> Problem:
    """Return the problem of a row with the usual keys or in the schema of the paper's training files.

    The question is under ``question`` or ``problem``, or the last message of the paper's ``prompt``; the answer under
    ``answer``, or the paper's ``reward_model.ground_truth``. The id is ``id``, else ``extra_info.index``, else the number.

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
    if not isinstance(question, str) or not question.strip():
        raise ConfigError("no question (keys read: question, problem, prompt)")
    if answer is None or not str(answer).strip():
        raise ConfigError("no answer (keys read: answer, reward_model.ground_truth)")
    index = (extra or {}).get("index")
    return Problem(
        id=str(row.get("id", number if index is None else index)), question=question, answer=str(answer), source=source
    )


def load_problems(file: str, parse: RowParser = training_row) -> list[Problem]:
    """Read problems from a ``.jsonl`` or ``.parquet`` file, or a set that ships with the package (``builtin:NAME``).

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
            problems.append(parse(_checked(row), number, f"{file}:{number}"))
        except ConfigError as error:
            bad.append(f"{file} row {number}: {error}")
    if bad:
        raise ConfigError("\n  ".join([f"{len(bad)} bad row(s); mend or remove them:", *bad]))
    if not problems:
        raise ConfigError(f"data file {file!r} is empty: it needs at least one problem")
    return problems


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


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"data file {str(path)!r} cannot be read as parquet: {error}") from error
    yield from enumerate(rows, start=1)


def _builtin(file: str) -> Path:
    folder = Path(str(package_files("rlvr_lightning"))) / "problems"
    name = file.removeprefix(BUILTIN)
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"no built-in set {name!r}: choose one of {', '.join(sorted(p.stem for p in folder.glob('*.jsonl')))}"
        )
    return path
