"""JSON lines on disk that survive a crash: append, read, and drop what a resumed run is about to write again.

A process that dies in the middle of a write leaves a torn last line. Readers skip it, the next append cuts it off, and
a rewrite goes through a temporary file and a rename. This module imports neither torch nor lightning.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def dump(row: Mapping[str, Any]) -> bytes:
    """Return ``row`` as one UTF-8 line with its newline; numbers that JSON does not have (nan, inf) become null."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(row), ensure_ascii=False)
    # A lone surrogate cannot be encoded; its backslash escape is valid JSON for the same character.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def append_lines(path: str | Path, rows: Iterable[Mapping[str, Any]], *, fsync: bool = False) -> None:
    """Append ``rows`` in one write, after cutting off a torn last line; the folder is created.

    Args:
        path: The file.
        rows: What to write. No rows, no file.
        fsync: Wait until the rows are on the disk: they then survive a power cut and not only a killed process.
    """
    path, data = Path(path), b"".join(map(dump, rows))
    if not data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _mend(file)
        file.write(data)
        file.flush()
        if fsync:
            os.fsync(file.fileno())


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``path`` in order, without a torn last line; a file that does not exist has no rows.

    Raises:
        ValueError: A line before the last one is not JSON: that is damage, not a crash.
    """
    return (row for _, row in _lines(Path(path)))


def write_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace ``path`` by ``rows``; readers see the old file or the new one, never a half."""
    _replace(Path(path), map(dump, rows))


def keep_before(path: str | Path, step: int, *, keep_last: int = 0) -> int:
    """Drop the rows whose ``step`` is at least ``step``, and a torn last line; return how many rows that were.

    Args:
        path: The file; nothing happens when it does not exist.
        step: The first step that is about to be written again.
        keep_last: That many rows at the end stay, whatever their step.
    """
    path = Path(path)
    lines = list(_lines(path))
    settled = len(lines) - keep_last
    kept = [line for i, (line, row) in enumerate(lines) if row["step"] < step or i >= settled]
    if path.exists() and sum(map(len, kept)) != path.stat().st_size:
        _replace(path, kept)
    return len(lines) - len(kept)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield every whole line, newline included, with what it says."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}:{number}: this line is not JSON; remove it or move the file away") from error
            yield line.rstrip(b"\n") + b"\n", row


def _mend(file: Any) -> None:
    """Make a file end after a newline: complete a row that lacks only that, cut off a torn one."""
    size = file.seek(0, os.SEEK_END)
    if size == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n":
        return
    file.seek(0)
    tail = file.read().rpartition(b"\n")[2]
    try:
        json.loads(tail)
        file.write(b"\n")
    except ValueError:
        file.truncate(size - len(tail))


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())  # before the rename: otherwise a power cut can leave an empty file under the final name
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
