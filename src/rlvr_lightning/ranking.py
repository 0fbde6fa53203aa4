"""Training problems ranked by their accuracy history.

Legend: ``P`` problems, ``K`` visits that every problem has. A history maps a problem's id to its accuracy (share of
correct rollouts, 0 to 1) at each visit, a visit being one step that trained on it. Its order is the order of the file,
and ties keep it. This module imports neither torch nor lightning.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.jsonl import read_jsonl

History = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class RankedProblem:
    """One row of a ranking."""

    rank: int
    """From 1."""
    id: str
    score: float
    """What the ranking sorts by, larger first."""
    mean: float
    """Accuracy over all visits, 0 to 1."""
    visits: int


def std_scores(history: Mapping[str, Sequence[float]]) -> NDArray[np.float64]:
    """Return the [P] population standard deviations of the accuracies; exactly 0 where they never varied.

    Source: arXiv:2504.20571, section 2, "historical variance score"; the square root as in the authors' script.
    """
    return _spread(history, np.std)


def var_scores(history: Mapping[str, Sequence[float]]) -> NDArray[np.float64]:
    """Return the [P] population variances of the accuracies; exactly 0 where they never varied.

    Source: arXiv:2504.20571, section 2, "historical variance score".
    """
    return _spread(history, np.var)


def mean_scores(history: Mapping[str, Sequence[float]]) -> NDArray[np.float64]:
    """Return the [P] mean accuracies: the easiest problem ranks first."""
    return np.array([np.mean(accuracies) for accuracies in history.values()], dtype=np.float64)


def lim_scores(history: Mapping[str, Sequence[float]]) -> NDArray[np.float64]:
    """Return the [P] learning impacts: 1 for a problem whose accuracy follows the average's over the first K visits.

    1 - sum_k (r_i^k - avg^k)^2 / sum_k (1 - avg^k)^2, with avg^k the mean over the problems at visit k. Where everything
    was solved at each of these visits, all problems follow the average and get 1.

    Source: LIMR, arXiv:2502.11886, equation of the learning impact measurement.
    """
    num_visits = common_visits(history)
    accuracy = np.array([accuracies[:num_visits] for accuracies in history.values()])  # [P, K]
    average = accuracy.mean(axis=0)
    distance = np.square(accuracy - average).sum(axis=1)
    total = np.square(1 - average).sum()
    return 1 - distance / total if total > 0 else np.ones(len(history))


def random_scores(num_problems: int, seed: int) -> NDArray[np.float64]:
    """Return [P] scores from 0 to below 1, all different, in an order that depends on nothing but the seed and P."""
    return np.random.default_rng(seed).permutation(num_problems) / num_problems


SCORES: dict[str, Callable[[Mapping[str, Sequence[float]]], NDArray[np.float64]]] = {
    "std": std_scores,
    "var": var_scores,
    "lim": lim_scores,
    "mean": mean_scores,
}
"""What a ranking can sort by; ``random`` is the fifth, the only one with a seed."""


def rank_problems(history: Mapping[str, Sequence[float]], by: str = "std", *, seed: int = 0) -> list[RankedProblem]:
    """Return all problems, the largest score first; ties keep the order of the history.

    Args:
        history: At least one problem; every problem has at least one visit.
        by: A key of `SCORES`, or ``random``.
        seed: Of the random order; 0 or more.
    """
    scores = random_scores(len(history), seed) if by == "random" else SCORES[by](history)
    ids = list(history)
    ranked = []
    for rank, i in enumerate(np.argsort(-scores, kind="stable"), start=1):
        accuracies = history[ids[i]]
        ranked.append(RankedProblem(rank, ids[i], float(scores[i]), float(np.mean(accuracies)), len(accuracies)))
    return ranked


def common_visits(history: Mapping[str, Sequence[float]]) -> int:
    """Return K, the number of visits that every problem has."""
    return min(map(len, history.values()))


def history_file(path: Path) -> Path:
    """Return the file that holds the history: ``path`` itself, or ``history.jsonl`` in a run folder.

    Raises:
        ConfigError: There is none.
    """
    file = path / "history.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{str(file)!r} does not exist: give a run folder, its history.jsonl, or a .json file of accuracies")
    return file


def read_history(path: Path) -> History:
    """Return the history of a run, or of a ``.json`` file ``{id: [accuracy, ...]}``.

    All rows of one problem and step are one visit, in the order of the steps. Its accuracy counts ``reasons["correct"]``
    and not rewards, which may hold a bonus. A torn last row is left out, so that a run that goes on can be read.

    Args:
        path: A run folder, its ``history.jsonl``, or the ``.json`` file.

    Raises:
        ConfigError: The file is absent, of another kind or empty, or a row is damaged.
    """
    file = history_file(path)
    if file.suffix == ".jsonl":
        return _read_visits(file)
    if file.suffix == ".json":
        return _read_accuracies(file)
    raise ConfigError(f"{str(file)!r} is neither .jsonl nor .json: give a run's history.jsonl or a .json of accuracies")


def read_ranking(file: str | Path) -> list[RankedProblem]:
    """Return the rows of a file that ``rlvr rank`` wrote, or of a part of it, best first.

    Raises:
        ConfigError: The file is absent or empty, or naming the first bad row.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"ranking {str(file)!r} does not exist: `rlvr rank` writes one")
    ranked: list[RankedProblem] = []
    seen: set[str] = set()
    for number, row in enumerate(_rows(path), start=1):
        fault = _ranking_fault(row)
        if fault is None and ranked and row["rank"] <= ranked[-1].rank:
            fault = f"'rank' {row['rank']} does not follow {ranked[-1].rank}"
        if fault is None and row["id"] in seen:
            fault = f"the id {row['id']!r} was there before"
        if fault is not None:
            raise ConfigError(f"{path}:{number}: {fault}; write the ranking again with `rlvr rank`")
        seen.add(row["id"])
        ranked.append(RankedProblem(row["rank"], row["id"], float(row["score"]), float(row["mean"]), row["visits"]))
    if not ranked:
        raise ConfigError(f"ranking {str(file)!r} has no rows: write it again with `rlvr rank`")
    return ranked


def _spread(history: Mapping[str, Sequence[float]], measure: Callable[[Sequence[float]], Any]) -> NDArray[np.float64]:
    # The mean of equal numbers may be rounded: without the test, 1/3 at every visit would have a spread of about 1e-17.
    return np.array([measure(a) if min(a) < max(a) else 0.0 for a in history.values()], dtype=np.float64)


def _read_visits(file: Path) -> History:
    counts: dict[str, dict[int, tuple[int, int]]] = {}  # id -> step -> correct rollouts, rollouts
    for number, row in enumerate(_rows(file), start=1):
        fault = _visit_fault(row)
        if fault is not None:
            raise ConfigError(f"{file}:{number}: {fault}; give the history.jsonl that a training run wrote")
        visits = counts.setdefault(row["id"], {})
        correct, rollouts = visits.get(row["step"], (0, 0))
        visits[row["step"]] = (correct + row["reasons"].get("correct", 0), rollouts + len(row["rewards"]))
    if not counts:
        raise ConfigError(f"{file}: no rows; wait for the first training step, or give another run's history")
    return {i: [correct / total for _, (correct, total) in sorted(visits.items())] for i, visits in counts.items()}


def _read_accuracies(file: Path) -> History:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: this is not JSON; give {{id: [accuracy, ...]}}, or a history.jsonl of rows") from error
    if not isinstance(content, dict) or not all(isinstance(accuracies, list) for accuracies in content.values()):
        raise ConfigError(f"{file}: not an object of lists; write it as {{id: [accuracy, ...]}}")
    if not content:
        raise ConfigError(f"{file}: no problems in there; write it as {{id: [accuracy, ...]}}")
    for problem, accuracies in content.items():
        if not accuracies:
            raise ConfigError(f"{file}: the list of problem {problem!r} is empty; remove it, or give its accuracies")
        if bad := [a for a in accuracies if not (_is_number(a) and 0 <= a <= 1)]:
            raise ConfigError(f"{file}: problem {problem!r} has the accuracy {bad[0]!r}; write numbers from 0 to 1")
    return {problem: [float(a) for a in accuracies] for problem, accuracies in content.items()}


def _visit_fault(row: Any) -> str | None:
    """Say why a row is not one of a run's history, if it is not."""
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not _is_count(row.get("step")):
        return "this row lacks 'id' (a text) or 'step' (a number)"
    rewards, reasons = row.get("rewards"), row.get("reasons")
    if not isinstance(rewards, list) or not isinstance(reasons, dict) or not all(map(_is_count, reasons.values())):
        return "this row lacks 'rewards' (a list) or 'reasons' (counts)"
    if not rewards or sum(reasons.values()) != len(rewards):
        return f"this row has {len(rewards)} rewards and {sum(reasons.values())} reasons"
    return None


def _ranking_fault(row: Any) -> str | None:
    """Say why a row is not one of a ranking, if it is not."""
    if not isinstance(row, dict):
        return "this row is not an object"
    tests: dict[str, tuple[Callable[[Any], bool], str]] = {
        "rank": (lambda x: _is_count(x) and x >= 1, "a whole number from 1"),
        "id": (lambda x: isinstance(x, str), "a text"),
        "score": (lambda x: _is_number(x) and bool(np.isfinite(x)), "a number"),
        "mean": (lambda x: _is_number(x) and 0 <= x <= 1, "a number from 0 to 1"),
        "visits": (lambda x: _is_count(x) and x >= 1, "a whole number from 1"),
    }
    return next((f"{key!r} must be {what}" for key, (test, what) in tests.items() if not test(row.get(key))), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rows(file: Path) -> Iterator[Any]:
    """Yield what `read_jsonl` reads; damage is the user's to mend."""
    try:
        yield from read_jsonl(file)
    except ValueError as error:
        raise ConfigError(str(error)) from error
