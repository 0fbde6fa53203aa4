"""``rlvr rank``: training problems ranked by how their accuracy changed over a run, to train on the best of them next."""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rlvr_lightning.errors import CommandParser, ConfigError
from rlvr_lightning.evaluation.reading import read_problems
from rlvr_lightning.jsonl import write_lines
from rlvr_lightning.plots import plot_history
from rlvr_lightning.ranking import (
    SCORES,
    History,
    RankedProblem,
    common_visits,
    history_file,
    rank_problems,
    read_history,
)
from rlvr_lightning.records import Problem

FEW_VISITS = 8
"""With fewer visits, a score says little about the problem."""
_SHOWN = 5


def main(args: list[str]) -> int:
    """Rank the problems of ``HISTORY`` into ``--out`` (the first word is ``rank``); return the exit status."""
    parser = CommandParser(prog="rlvr rank", description=__doc__)
    parser.add_argument(
        "history", metavar="HISTORY", type=Path, help="run folder, its history.jsonl, or a .json file {id: [accuracy, ...]}"
    )
    parser.add_argument(
        "--by",
        choices=[*SCORES, "random"],
        default="std",
        help="std, var: spread of the accuracy over the visits (default: std); lim: how closely it follows the average "
        "over the problems (LIMR); mean: easiest first; random: for comparison",
    )
    parser.add_argument("--top", metavar="N", type=int, help="keep the first N (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of --by random (default: 0)")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="ranking to write: jsonl, best problem first")
    parser.add_argument(
        "--problems",
        metavar="FILE",
        type=Path,
        help="data file of the problems, .jsonl or .parquet (default: problems.jsonl beside the history, if it is there): the "
        "chosen ones are then written beside --out, ready to train on",
    )
    options = parser.parse_args(args[1:])
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: give 0 or more")
    source = history_file(options.history)
    data = options.problems or source.with_name("problems.jsonl")
    data = data if options.problems or data.is_file() else None
    targets = Targets(options.out)
    targets.check(inputs=[source, data] if data else [source])
    history = read_history(source)
    if options.top is not None and not 1 <= options.top <= len(history):
        raise ConfigError(f"--top {options.top}: the history has {len(history)} problems; give 1 to {len(history)}")
    ranking = rank_problems(history, options.by, seed=options.seed)[: options.top]
    chosen, skipped = choose(ranking, data) if data else ([], [])
    try:
        write(targets, ranking, history=history, chosen=chosen, by=options.by)
    except OSError as error:
        raise ConfigError(
            f"--out {options.out}: {error.strerror or error}; name a file in a folder you can write to"
        ) from error
    print("\n".join(report(history, ranking, by=options.by, skipped=skipped)))
    print("written:", *(f"  {file}" for file in targets.files(bool(chosen))), sep="\n")
    if chosen:
        sources, ids = list_override("sources", str(targets.problems)), list_override("ids", chosen[0].id)
        print(f"train on the first: rlvr sweep data=subset {sources} {ids}")
    return 0


class Targets:
    """The files that a ranking writes: ``--out`` and what lies beside it under the same stem."""

    def __init__(self, out: Path) -> None:
        self.ranking = out
        self.problems = out.with_name(out.stem + ".problems.jsonl")
        self.figure = out.with_name(out.stem + ".png")

    def files(self, has_problems: bool) -> list[Path]:
        """Return what is written, in that order."""
        return [self.ranking, *([self.problems] if has_problems else []), self.figure]

    def check(self, inputs: Sequence[Path]) -> None:
        """Raise ConfigError where writing would destroy an input or one of the files themselves."""
        if self.ranking.is_dir() or self.ranking == self.figure:
            raise ConfigError(f"--out {self.ranking} is a folder or a picture: name a .jsonl file")
        for file in self.files(has_problems=True):
            if any(file.exists() and other.exists() and file.samefile(other) for other in inputs):
                raise ConfigError(f"--out {self.ranking} would overwrite the input {file}: give another name")


def choose(ranking: Iterable[RankedProblem], data: Path) -> tuple[list[Problem], list[str]]:
    """Return the ranked problems as the data file has them, in rank order, and what is wrong with rows that were left out.

    Exact copies of a problem count once. A row without question or answer matters only if its problem was chosen.

    Raises:
        ConfigError: A ranked id is not in the data, or two different problems have it.
    """
    by_id: dict[str, Problem] = {}
    problems, skipped = read_problems(str(data))
    for problem in problems:
        first = by_id.setdefault(problem.id, problem)
        if (first.question, first.answer) != (problem.question, problem.answer):
            raise ConfigError(
                f"{first.source} and {problem.source} are different problems with the id {problem.id!r}; rename one of them"
            )
    ids = [row.id for row in ranking]
    if missing := [i for i in ids if i not in by_id]:
        named = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        unusable = f" (unusable rows: {len(skipped)}, such as {skipped[0]})" if skipped else ""
        raise ConfigError(
            f"{data} lacks {len(missing)} of the {len(ids)} ranked problems: {named}{unusable}; "
            "name the data that the run trained on with --problems, or rank fewer with --top"
        )
    return [by_id[i] for i in ids], skipped


def write(targets: Targets, ranking: Sequence[RankedProblem], *, history: History, chosen: Sequence[Problem], by: str) -> None:
    """Write the ranking, the chosen problems if there are any, and the figure; the folder is created."""
    write_lines(targets.ranking, map(asdict, ranking))
    if chosen:
        write_lines(targets.problems, ({"id": p.id, "question": p.question, "answer": p.answer} for p in chosen))
    accuracies = {row.id: history[row.id] for row in ranking}
    plot_history(accuracies, targets.figure, scores=[row.score for row in ranking], label=by)


def report(history: History, ranking: Sequence[RankedProblem], *, by: str, skipped: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the summary."""
    yield f"{len(history)} problems, {sum(map(len, history.values()))} visits; the first {len(ranking)} by {by}:"
    yield from _table(ranking[:_SHOWN])
    if len(ranking) > _SHOWN:
        yield f"  ... {len(ranking) - _SHOWN} more"
    constant = [min(a) for a in history.values() if min(a) == max(a)]
    if constant:
        wrong, right = constant.count(0.0), constant.count(1.0)
        between = len(constant) - wrong - right
        parts = f"{wrong} always wrong, {right} always right" + (f", {between} always in between" if between else "")
        yield f"{len(constant)} of {len(history)} problems never varied: {parts}"
    used = [common_visits(history)] * len(history) if by == "lim" else map(len, history.values())
    few = sum(visits < FEW_VISITS for visits in used)
    if few and by != "random":
        yield f"warning: the score of {few} problems rests on fewer than {FEW_VISITS} visits"
    if skipped:
        yield f"warning: unusable rows of the data, left out: {len(skipped)}, such as {skipped[0]}"


def _table(ranking: Sequence[RankedProblem]) -> Iterator[str]:
    rows = [("rank", "id", "score", "mean", "visits")]
    rows += [(str(r.rank), r.id, f"{r.score:.4f}", f"{r.mean:.3f}", str(r.visits)) for r in ranking]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def list_override(key: str, value: str) -> str:
    """Return a command-line word that sets a list of one entry; quoted where Hydra or the shell would read it otherwise."""
    if re.fullmatch(r"(?!(?i:true|false|null|nan|inf)$)(0|[1-9]\d*|[A-Za-z/._][\w/.-]*)", value, re.ASCII):
        return f"data.init_args.{key}=[{value}]"
    # Inside quotes Hydra reads backslashes as escapes only where they stand before a quote.
    escaped = re.sub(r'\\+(?="|\Z)', lambda found: found[0] * 2, value).replace('"', '\\"')
    return shlex.quote(f'data.init_args.{key}=["{escaped}"]')
