"""``rlvr problems``: what training on data files would find in them, without training."""

from pathlib import Path

from rlvr_lightning.errors import CommandParser
from rlvr_lightning.jsonl import write_lines
from rlvr_lightning.sources import TrainSource, read_pool


def main(args: list[str]) -> int:
    """Report every bad row, copy and duplicate of the files (the first word is ``problems``); return the exit status.

    Returns:
        0, or 2 if there are bad rows.
    """
    parser = CommandParser(prog="rlvr problems", description=__doc__)
    parser.add_argument("files", metavar="FILE", nargs="+", help="jsonl or parquet files, folders of them, or builtin:NAME")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the good problems, as one jsonl file to train on")
    for key, what in (("question", "statement"), ("answer", "ground truth; KEY|last_box, KEY|after_hashes: of a solution")):
        parser.add_argument(f"--{key}", metavar="KEY", action="append", default=[], help=f"column of the {what}")
    options = parser.parse_args(args[1:])
    question, answer = tuple(options.question), tuple(options.answer)
    pool = read_pool([TrainSource(file=f, question=question, answer=answer) for f in options.files], skip_bad_rows=True)
    print(f"{len(pool.problems)} problems; question of {_range([len(p.question) for p in pool.problems])} characters")
    for note in pool.notes:
        print(note)
    if options.out is not None:
        write_lines(options.out, ({"id": p.id, "question": p.question, "answer": p.answer} for p in pool.problems))
        print(f"written: {options.out}")
    return 2 if any(note.startswith("left out: ") for note in pool.notes) else 0


def _range(numbers: list[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}"
