"""``rlvr grade``: verdicts on the responses of a file, with the graders that training and evaluation use."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rlvr_lightning.errors import CommandParser, ConfigError
from rlvr_lightning.grading import GRADERS
from rlvr_lightning.records import Completion, FinishReason, Problem
from rlvr_lightning.verify import Verifier

_CHUNK = 1000

Row = dict[str, Any]


def main(args: list[str]) -> int:
    """Grade ``FILE`` into ``--out``; return the exit status."""
    parser = CommandParser(prog="rlvr grade", description=__doc__)
    parser.add_argument("file", type=Path, help="jsonl; every row has `response` and `ground_truth`")
    parser.add_argument("--grader", default="math", help=f"one of {', '.join(GRADERS)}, or the dotted path of a module")
    parser.add_argument(
        "--out", type=Path, required=True, help="the same rows with `reward`, `reason` and `extracted`, in order"
    )
    parser.add_argument("--workers", type=int, default=1, help="grading processes")
    parser.add_argument("--timeout_s", type=float, default=5.0, help="wall-clock limit of one comparison")
    options = parser.parse_args(args[1:])
    if not options.file.is_file():
        raise ConfigError(f"{str(options.file)!r} does not exist: give a jsonl file with `response` and `ground_truth`")
    if options.out.exists() and options.out.samefile(options.file):
        raise ConfigError("--out is the input file: give another name")
    verifier = Verifier(options.grader, workers=options.workers, timeout_s=options.timeout_s)
    partial = options.out.with_name(options.out.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    reasons: Counter[str] = Counter()
    try:
        with options.file.open("rb") as lines, partial.open("w", encoding="utf-8") as out:
            rows = (_row(line) for line in lines if line.strip())
            while chunk := list(islice(rows, _CHUNK)):
                for row in grade_rows(chunk, verifier):
                    out.write(json.dumps(row) + "\n")
                    reasons[row["reason"]] += 1
        os.replace(partial, options.out)
    finally:
        verifier.close()
        partial.unlink(missing_ok=True)
    total = reasons.total()
    shares = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    print(f"{options.out}: {total} rows, {reasons['correct'] / max(total, 1):.4f} correct with {options.grader!r} ({shares})")
    if reasons["error"]:
        print("rows with reason `error` have no usable ground truth or response; their `message` says why", file=sys.stderr)
    return 0


def grade_rows(rows: list[Row], verifier: Verifier) -> Iterator[Row]:
    """Yield every row with ``reward``, ``reason`` and ``extracted``, in order; a row that cannot be graded says why."""
    faults = [_fault(row) for row in rows]
    pairs = [_pair(row) for row, fault in zip(rows, faults, strict=True) if fault is None]
    scores = iter(verifier(pairs))
    for row, fault in zip(rows, faults, strict=True):
        if fault is None:
            score = next(scores)
            yield row | {"reward": score.reward, "reason": score.reason, "extracted": score.extracted}
        else:
            yield row | {"reward": 0.0, "reason": "error", "extracted": None, "message": fault}


def _row(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        return {"line": line.decode("utf-8", "replace").rstrip("\n"), "message": f"not JSON: {error}"}
    return row if isinstance(row, dict) else {"line": row, "message": "not an object"}


def _fault(row: Row) -> str | None:
    if "line" in row and "message" in row:
        return str(row["message"])
    if not isinstance(row.get("response"), str):
        return "`response` is missing or no text"
    if not isinstance(row.get("ground_truth"), str | int | float) or not str(row["ground_truth"]).strip():
        return "`ground_truth` is missing or empty"
    return None


def _pair(row: Row) -> tuple[Problem, Completion]:
    finished: FinishReason = "length" if row.get("finish_reason") == "length" else "stop"
    return Problem("", "", str(row["ground_truth"])), Completion((), (), row["response"], finished)
