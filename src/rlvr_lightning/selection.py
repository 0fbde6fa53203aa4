"""Which problems of a pool a run trains on: named ones, the first of a ranking, a band of difficulty, a random few."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.ranking import RankedProblem, read_ranking
from rlvr_lightning.records import Problem

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A choice of problems. Without any field set, all of them in the files' order."""

    ids: tuple[str, ...] | None = None
    """Exactly these, in this order. ``pi_1`` is the first of the ranking (arXiv 2504.20571), unless a problem has that id."""
    ranking: str | None = None
    """A file that ``rlvr rank`` wrote."""
    top: int | None = None
    """The first so many of the ranking."""
    accuracy: tuple[float, float] | None = None
    """Those whose mean accuracy in the ranking lies between these two, both included."""
    random: int | None = None
    """So many, drawn from those that the other fields leave."""
    seed: int = 0
    """Decides the draw; independent of the run's seed."""

    def __post_init__(self) -> None:
        if self.ids is not None and not self.ids:
            raise ConfigError("data.ids is empty: name at least one problem, or leave it out to train on all of them")
        if self.ids is not None and (self.top, self.accuracy, self.random) != (None, None, None):
            raise ConfigError("data.ids names the problems: leave out data.top, data.accuracy and data.random")
        if self.ranking is None and (self.top is not None or self.accuracy is not None):
            raise ConfigError("data.top and data.accuracy need data.ranking: name a file that `rlvr rank` wrote")
        for key, value in (("top", self.top), ("random", self.random)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{key} is {value}: set it to 1 or more")
        if self.accuracy is not None and not 0 <= self.accuracy[0] <= self.accuracy[1] <= 1:
            raise ConfigError(f"data.accuracy is {list(self.accuracy)}: give the lower and the upper end, from 0 to 1")

    def __call__(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return the chosen problems; a ranking gives them its order.

        Raises:
            ConfigError: if an id is unknown, or there are not as many problems as asked for.
        """
        by_id = {problem.id: problem for problem in problems}
        ranking = [] if self.ranking is None else read_ranking(self.ranking)
        if self.ids is not None:
            return _named(self.ids, by_id, ranking)
        chosen = list(problems)
        if self.ranking is not None:
            if strangers := [r.id for r in ranking if r.id not in by_id]:
                raise ConfigError(
                    f"data.ranking {self.ranking!r} ranks {len(strangers)} problem(s) that the data does not hold, such as "
                    f"{strangers[0]!r}: it has ids like {', '.join(list(by_id)[:3])}; give the files that the ranking is of"
                )
            low, high = self.accuracy or (0.0, 1.0)
            chosen = [by_id[r.id] for r in _first(ranking, self.top, "data.top") if low <= r.mean <= high]
            if not chosen:
                raise ConfigError(f"data.accuracy {[low, high]}: no ranked problem has a mean accuracy in it; widen the band")
        if self.random is not None:
            order = np.random.default_rng(self.seed).permutation(len(chosen))
            chosen = [chosen[i] for i in sorted(_first(order.tolist(), self.random, "data.random"))]
        return chosen


def _first(items: list[_T], count: int | None, key: str) -> list[_T]:
    if count is not None and count > len(items):
        raise ConfigError(f"{key} is {count} but there are only {len(items)} problems: lower it")
    return items[:count]


def _named(ids: Sequence[str], by_id: dict[str, Problem], ranking: Sequence[RankedProblem]) -> list[Problem]:
    names = {f"pi_{r.rank}": r.id for r in ranking}
    found = [by_id.get(i) or by_id.get(names.get(i, "")) for i in ids]
    missing = [i for i, problem in zip(ids, found, strict=True) if problem is None]
    if missing:
        hint = "; pi_N needs data.ranking" if not ranking and any(re.fullmatch(r"pi_?\d+", i) for i in missing) else ""
        raise ConfigError(
            f"no problem with id {', '.join(map(repr, missing))} in the data, which has ids like "
            f"{', '.join(list(by_id)[:3])}{hint}"
        )
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise ConfigError(f"data.ids names {', '.join(twice)} twice: name each once; a source's weight says how often it comes")
    return [problem for problem in found if problem is not None]
