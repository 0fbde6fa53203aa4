r"""Training problems changed on purpose: labels made wrong, labels and statements replaced, every change on record.

A label is made wrong by the kind of number that it is, and every draw is a pure function of the seed and the problem's id:
neither the order of a file nor the rate decides what a problem's wrong label is.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.grading.math import compare
from rlvr_lightning.grading.math.normalize import normalize
from rlvr_lightning.grading.math.reader import read
from rlvr_lightning.records import Problem

REACH = 10
"""A number moves by at most this much, up or down."""

_ATTEMPTS = 200
_GROUP = r"(?:,|,\\!|\{,\}|\\,)"
_INTEGER = rf"\d{{1,3}}(?:{_GROUP}\d{{3}})+|\d+"
_PLAIN = re.compile(rf"(?P<sign>[+-]?)\s*(?:(?P<decimal>\d*\.\d+)|(?P<integer>{_INTEGER}))")
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<whole>\d+)?\s*(?P<command>\\[dtc]?frac)\s*"
    r"\{\s*(?P<above>[+-]?\s*\d+)\s*\}\s*\{\s*(?P<below>[+-]?\s*\d+)\s*\}"
)
_SLASHED = re.compile(r"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)\s+)?(?P<above>\d+)(?P<slash>\s*/\s*)(?P<below>\d+)")
_WRAPPED = re.compile(r"(?P<before>\s*(?:\$+|\\\(|\\\[)?\s*)(?P<body>.*?)(?P<after>\s*(?:(?<!\\)\$+|\\\)|\\\])?\s*)", re.DOTALL)
_ALTERNATIVES = re.compile(r"\s*(?:\\(?:text|textrm|mathrm|mbox)\s*\{\s*OR\s*\}|\bOR\b)\s*")

# Braces around arguments of one digit, so that a second digit has a place.
_COMPACT = (
    (re.compile(r"(\\[dtc]?frac)\s*(\d)"), r"\1{\2}"),
    (re.compile(r"(\\[dtc]?frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"(\\sqrt\s*(?:\[[^\]]*\])?)\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\^\s*(\d+)"), r"^{\1}"),
)
_GROUPED = re.compile(r"\d*\.\d+|\d{1,3}(?:(?:,\\!|\{,\})\d{3})+(?!\d)|\d+")
# Before a number that says which, not how many: a subscript, and the power of a unit.
_FIXED = re.compile(r"_\s*\{?\s*$|(?:\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|(?<![\\A-Za-z])[A-Za-z]{2,})\s*\^\s*\{?\s*$")
_ROOT_INDEX = re.compile(r"\\sqrt\s*\[\s*$")
_SLOW = re.compile(r"\\(?:sum|prod|int|lim)(?![A-Za-z])")


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """What is changed in the training problems, on purpose; nothing by default."""

    answers: dict[str, str | int | float] = field(default_factory=dict)
    """id -> label in place of the problem's own. Quote a number whose spelling matters, such as "12.70"."""
    questions: dict[str, str] = field(default_factory=dict)
    """id -> statement in place of the problem's own."""
    label_noise: float = 0.0
    """Share of the problems whose label is made wrong, 0 to 1. A label without a number, such as A or x, never is."""
    seed: int = 0
    """Decides which labels are made wrong and how; the run's own seed has no say in it."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise <= 1:
            raise ConfigError(f"data.perturb.label_noise is {self.label_noise}: set it to a share between 0 and 1")
        if self.seed < 0:
            raise ConfigError(f"data.perturb.seed is {self.seed}: set it to 0 or more")
        for key in ("answers", "questions"):
            texts = {str(id_): str(text) for id_, text in getattr(self, key).items()}  # yaml may read either as a number
            if empty := [id_ for id_, text in texts.items() if not text.strip()]:
                raise ConfigError(f"data.perturb.{key} holds nothing for id {empty[0]!r}: give it a text, or leave the id out")
            object.__setattr__(self, key, texts)

    def __call__(self, problems: Sequence[Problem]) -> tuple[list[Problem], list[dict[str, str]]]:
        """Return the problems with the changes made, and a list of the changes; both are in the order of the problems.

        A change is ``{"id", "field": "answer" or "question", "before", "after"}``. ``round(label_noise * n)`` labels are
        made wrong. Those of a lower rate are among those of a higher one, with the same wrong labels. A problem with an
        entry in ``answers`` has that label and is not drawn.

        Raises:
            ConfigError: an id that no problem has, or several different ones; or too few labels that can be made wrong.
        """
        self._check_ids(problems)
        drawn = self._wrong_labels(problems)
        changed: list[Problem] = []
        changes: list[dict[str, str]] = []
        for index, problem in enumerate(problems):
            new = replace(
                problem,
                question=self.questions.get(problem.id, problem.question),
                answer=str(self.answers.get(problem.id, drawn.get(index, problem.answer))),
            )
            changed.append(new)
            changes += [
                {"id": problem.id, "field": name, "before": getattr(problem, name), "after": getattr(new, name)}
                for name in ("question", "answer")
                if getattr(problem, name) != getattr(new, name)
            ]
        return changed, changes

    def _check_ids(self, problems: Sequence[Problem]) -> None:
        meant: dict[str, set[tuple[str, str]]] = {}
        for problem in problems:
            meant.setdefault(problem.id, set()).add((problem.question, problem.answer))
        overrides: tuple[tuple[str, Mapping[str, object]], ...] = (("answers", self.answers), ("questions", self.questions))
        for key, texts in overrides:
            if unknown := [id_ for id_ in texts if id_ not in meant]:
                known = ", ".join(list(meant)[:3]) or "none at all"
                raise ConfigError(
                    f"data.perturb.{key} has the id {', '.join(map(repr, unknown[:5]))}, which no training problem has: "
                    f"use ids like {known}"
                )
            if unclear := [id_ for id_ in texts if len(meant[id_]) > 1]:
                raise ConfigError(
                    f"data.perturb.{key} has the id {unclear[0]!r}, which {len(meant[unclear[0]])} different training problems "
                    "share: give every row of the data files an id of its own"
                )

    def _wrong_labels(self, problems: Sequence[Problem]) -> dict[int, str]:
        """Return position -> wrong label of the problems that the noise hits."""
        number = round(self.label_noise * len(problems))
        found: dict[int, str] = {}
        if not number:
            return found
        for _, _, _, index, stream in sorted(self._lots(problems), key=lambda lot: lot[:4]):
            label = wrong_label(problems[index].answer, np.random.default_rng(stream))
            if label is not None:
                found[index] = label
                if len(found) == number:
                    return found
        raise ConfigError(
            f"data.perturb.label_noise is {self.label_noise}, which is {number} of {len(problems)} labels, but only "
            f"{len(found)} can be made wrong, for the others hold no number or are in data.perturb.answers: set it to "
            f"{_floor(len(found) / len(problems))} or less"
        )

    def _lots(self, problems: Sequence[Problem]) -> Iterable[tuple[int, str, str, int, np.random.SeedSequence]]:
        """Yield (lot, question, answer, position, stream) of every problem that may be drawn; the lowest are."""
        copies: Counter[tuple[str, str, str]] = Counter()
        for index, problem in enumerate(problems):
            if problem.id in self.answers:
                continue
            content = (problem.id, problem.question, problem.answer)
            name = problem.id.encode("utf-8", "surrogatepass")
            # The length, because a seed sequence takes an end of zeros for none.
            entropy = (self.seed, copies[content], len(name), *name)
            copies[content] += 1
            draw, stream = np.random.SeedSequence(entropy).spawn(2)
            yield int(draw.generate_state(1, np.uint64)[0]), problem.question, problem.answer, index, stream


def wrong_label(label: str, rng: np.random.Generator) -> str | None:
    r"""Return a label of the same kind and another value, or None if ``label`` holds no number to change.

    An integer moves by 1 to 10, up or down, and its sign is flipped by chance; a decimal keeps its places; numerator and
    denominator of a fraction move like two integers, a mixed number as an improper fraction. In any other label, such as
    ``2\sqrt{3}`` or ``(1,2)``, its numbers move by up to 10 and stay positive. Of alternatives (``A OR B``) one is left.

    The value is another one for the ``math`` grader, which is exact. ``paper-eval`` forgives a share of 1e-4, so there a large
    integer may meet its neighbour.

    Source: arXiv 2504.20571, Table 17, for integers and fractions; the other kinds are ours.
    """
    body = label.replace("\u2212", "-")
    for pattern, braces in _COMPACT:
        body = pattern.sub(braces, body)
    parts = _WRAPPED.fullmatch(body)
    assert parts is not None, "every part of the pattern may be empty"
    if match := _PLAIN.fullmatch(parts["body"]):
        new = _wrong_number(match, rng)
    elif match := _FRACTION.fullmatch(parts["body"]) or _SLASHED.fullmatch(parts["body"]):
        new = _wrong_fraction(match, rng)
    else:
        return _wrong_expression(label, _ALTERNATIVES.split(body)[0], rng)
    return f"{parts['before']}{new}{parts['after']}".strip()


def _step(rng: np.random.Generator) -> int:
    return int(rng.integers(1, REACH + 1)) * _sign(rng)


def _sign(rng: np.random.Generator) -> int:
    return 1 - 2 * int(rng.integers(2))


def _wrong_number(match: re.Match[str], rng: np.random.Generator) -> str:
    digits = match["decimal"] or re.sub(r"\D", "", match["integer"])
    places = len(digits.partition(".")[2])
    unit = 10**places
    old = int(match["sign"] + digits.replace(".", ""))
    while True:
        new = (old + _step(rng) * unit) * _sign(rng)
        if new != old:
            whole, rest = divmod(abs(new), unit)
            return f"{'-' * (new < 0)}{whole}" + (f".{rest:0{places}d}" if places else "")


def _wrong_fraction(match: re.Match[str], rng: np.random.Generator) -> str:
    above, below = (int(re.sub(r"\s", "", match[name])) for name in ("above", "below"))
    above += int(match["whole"] or 0) * below
    above = -above if match["sign"] == "-" else above
    while True:
        new_above, new_below = ((part + _step(rng)) * _sign(rng) for part in (above, below))
        if new_below and (not below or Fraction(new_above, new_below) != Fraction(above, below)):
            break
    sign = "-" * (new_above * new_below < 0)
    new_above, new_below = abs(new_above), abs(new_below)
    if "slash" in match.re.groupindex:
        return f"{sign}{new_above}{match['slash']}{new_below}"
    return f"{sign}{match['command']}{{{new_above}}}{{{new_below}}}"


def _wrong_expression(label: str, body: str, rng: np.random.Generator) -> str | None:
    """Return ``body`` with some of its numbers moved, such that the ``math`` grader reads it as another value than ``label``.

    None where no number can be moved, or where only a computer algebra system could tell that the value is another.
    """
    numbers = [
        (match.span(), match[0], 2 if _ROOT_INDEX.search(body, 0, match.start()) else 1)
        for match in _GROUPED.finditer(body)
        if not _FIXED.search(body[max(0, match.start() - 40) : match.start()])
    ]
    if not numbers or _SLOW.search(body):
        return None
    readable = bool(read(normalize(body)))
    for attempt in range(_ATTEMPTS):
        # Where digits are bound, as in 1604_8, one number alone has better chances than all at once.
        chosen = range(len(numbers)) if attempt < _ATTEMPTS // 2 else {int(rng.integers(len(numbers)))}
        pieces, end = [], 0
        for index, ((start, stop), text, lowest) in enumerate(numbers):
            pieces += [body[end:start], _nearby(text, lowest, rng) if index in chosen else text]
            end = stop
        new = "".join([*pieces, body[end:]]).strip()
        same = new == label or "correct" in (compare(label, new), compare(new, label))
        if not same and (not readable or read(normalize(new))):
            return new
    return None


def _nearby(text: str, lowest: int, rng: np.random.Generator) -> str:
    """Return an unsigned number within 10, not below ``lowest``, as text of the same form."""
    digits, point, places = re.sub(r"[^\d.]", "", text).partition(".")
    value = int(digits or 0)
    new = value + int(rng.integers(max(lowest - value, -REACH), REACH + 1))
    width = len(digits) if digits.startswith("0") else 0  # 4:05 has two digits after the colon
    return f"{new:0{width}d}{point}{places}"


def _floor(share: float) -> float:
    return int(share * 1000) / 1000
