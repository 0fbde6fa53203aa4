"""The kinds of answers, and when two answers of one kind are the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlvr_lightning.grading.math.tree import Expr, minus, num, substitute, symbols
from rlvr_lightning.grading.math.units import COUNTS, DEGREE, Unit
from rlvr_lightning.grading.math.value import constant, equal, proportional

_ZERO = num(0)
NO_UNIT: Unit = frozenset()


@dataclass(frozen=True, slots=True)
class Value:
    """A number or an expression, with or without a unit."""

    expr: Expr
    unit: Unit = NO_UNIT

    def meets(self, other: "Value") -> bool:
        """Return whether ``other`` says the same; a missing unit is forgiven, a percent sign too many is not."""
        if other.unit & COUNTS and other.unit != self.unit:
            return False
        if self.unit and other.unit and self.unit != other.unit:
            degrees = DEGREE in (self.unit, other.unit) and self.unit & other.unit == DEGREE  # 25 degrees, of Celsius
            return degrees and equal(self.expr, other.expr)
        return equal(self.expr, other.expr)


@dataclass(frozen=True, slots=True)
class Based:
    """A numeral whose base is written; it is met by the same numeral alone."""

    digits: str
    base: int

    def meets(self, other: "Based") -> bool:
        """Return whether numeral and base are the same."""
        return (self.digits.lstrip("0"), self.base) == (other.digits.lstrip("0"), other.base)


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day."""

    hour: int
    minute: int
    half: str = ""

    def meets(self, other: "Clock") -> bool:
        """Return whether it is the same time; a missing a.m. or p.m. is forgiven."""
        same_half = not self.half or not other.half or self.half == other.half
        return (self.hour, self.minute) == (other.hour, other.minute) and same_half


@dataclass(frozen=True, slots=True)
class Ratio:
    """Two or more terms of a ratio."""

    terms: tuple[Expr, ...]

    def meets(self, other: "Ratio") -> bool:
        """Return whether the terms are proportional."""
        if len(self.terms) != len(other.terms):
            return False
        pairs = list(zip(self.terms, other.terms, strict=True))
        if any(equal(t, _ZERO) for t in (*self.terms, *other.terms)):  # cross products with 0 say nothing
            return all(equal(a, b) for a, b in pairs)
        return all(equal(Expr("mul", (a, d)), Expr("mul", (b, c))) for (a, b), (c, d) in pairwise(pairs))


@dataclass(frozen=True, slots=True)
class Word:
    """Words, and letters that name a choice; case does not matter in words."""

    text: str

    def meets(self, other: "Word") -> bool:
        """Return whether the words are the same."""
        return self.text == other.text


@dataclass(frozen=True, slots=True)
class Choice:
    """The letter of a multiple-choice answer."""

    letter: str

    def meets(self, other: "Choice") -> bool:
        """Return whether it is the same letter in the same case."""
        return self.letter == other.letter


@dataclass(frozen=True, slots=True)
class Bag:
    """Several answers in no order: a set, a list of roots, alternatives."""

    items: tuple["Readings", ...]
    is_set: bool = False
    """Written with braces: repeated elements count once."""

    def meets(self, other: "Bag") -> bool:
        """Return whether each answer of one has its partner in the other."""
        mine, theirs = list(self.items), list(other.items)
        if self.is_set:
            mine, theirs = _distinct(mine), _distinct(theirs)
        if len(mine) != len(theirs):
            return False
        if _has_names(mine) != _has_names(theirs):  # x = 2, y = 3 is met by 2, 3 and not by 3, 2
            bare = theirs if _has_names(mine) else mine
            named = any(isinstance(r, Named) for item in bare for r in item)  # x = 1, 2 is x = 1, x = 2
            return not named and all(same(a, b) for a, b in zip(mine, theirs, strict=True))
        for item in mine:
            partner = next((i for i, candidate in enumerate(theirs) if same(item, candidate)), None)
            if partner is None:
                return False
            del theirs[partner]
        return True


@dataclass(frozen=True, slots=True)
class Tuple:
    """Answers in an order, between brackets: a point, a vector, a sequence."""

    brackets: str
    items: tuple["Readings", ...]

    def meets(self, other: "Tuple") -> bool:
        """Return whether brackets and elements are the same, in this order."""
        return (
            self.brackets == other.brackets
            and len(self.items) == len(other.items)
            and all(same(a, b) for a, b in zip(self.items, other.items, strict=True))
        )


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of expressions; the brackets are a matter of taste, except those of a determinant."""

    rows: tuple[tuple[Expr, ...], ...]
    determinant: bool = False

    def meets(self, other: "Matrix") -> bool:
        """Return whether shape and entries are the same."""
        if self.determinant != other.determinant or [len(r) for r in self.rows] != [len(r) for r in other.rows]:
            return False
        return all(equal(a, b) for r, s in zip(self.rows, other.rows, strict=True) for a, b in zip(r, s, strict=True))


@dataclass(frozen=True, slots=True)
class Piece:
    """One interval; infinite ends are ``Expr("inf")`` and its negative."""

    low: Expr
    high: Expr
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A union of intervals on the real line, sorted and disjoint where the ends are numbers."""

    pieces: tuple[Piece, ...]
    name: str = ""
    """The variable, if it is written."""

    def meets(self, other: "Region") -> bool:
        """Return whether it is the same set of numbers."""
        symbolic = any(symbols(end) for p in self.pieces for end in (p.low, p.high))
        if self.name != other.name and (symbolic or (self.name and other.name)):
            return False
        if len(self.pieces) != len(other.pieces):
            return False
        return all(
            (a.low_closed, a.high_closed) == (b.low_closed, b.high_closed) and equal(a.low, b.low) and equal(a.high, b.high)
            for a, b in zip(self.pieces, other.pieces, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Equation:
    """An equation, as left side minus right side."""

    difference: Expr

    def meets(self, other: "Equation") -> bool:
        """Return whether one is a constant multiple of the other."""
        return proportional(self.difference, other.difference)


@dataclass(frozen=True, slots=True)
class Inequality:
    """``difference > 0`` (or >= 0) in several variables, or of higher degree."""

    difference: Expr
    strict: bool

    def meets(self, other: "Inequality") -> bool:
        """Return whether one is a positive multiple of the other."""
        return self.strict == other.strict and proportional(self.difference, other.difference, positive=True)


@dataclass(frozen=True, slots=True)
class Named:
    """``name = value``."""

    name: str
    value: "Readings"

    def meets(self, other: "Named") -> bool:
        """Return whether name and value are the same."""
        return self.name == other.name and same(self.value, other.value)


Answer = Value | Based | Clock | Ratio | Word | Choice | Bag | Tuple | Matrix | Region | Equation | Inequality | Named
Readings = tuple[Answer, ...]
"""What one text may mean: ``(1, 2)`` is a point and an interval."""


def same(gold: Readings, candidate: Readings) -> bool:
    """Return whether one meaning of the candidate is a meaning of the ground truth."""
    if any(isinstance(r, Clock) for r in gold) and any(isinstance(r, Clock) for r in candidate):  # 2:30 is no ratio then
        gold = tuple(r for r in gold if isinstance(r, Clock))
    return any(meets(g, c) for g in gold for c in candidate)


def meets(gold: Answer, candidate: Answer) -> bool:
    """Return whether ``candidate`` is what ``gold`` asks for; answers of different kinds meet only where kinds overlap."""
    if isinstance(gold, Named) != isinstance(candidate, Named):
        named, bare = (gold, candidate) if isinstance(gold, Named) else (candidate, gold)
        assert isinstance(named, Named)
        assert not isinstance(bare, Named)
        if isinstance(bare, Equation | Inequality) or not _in_order(named.name):
            return False
        values = named.value
        return same(values, (bare,)) if named is gold else same((bare,), values)
    if isinstance(gold, Bag) and isinstance(candidate, Tuple):
        return _assigned(gold, candidate)
    if isinstance(gold, Tuple) and isinstance(candidate, Bag):
        return _assigned(candidate, gold)
    if isinstance(gold, Bag) and gold.is_set and isinstance(candidate, Region):
        return not gold.items and not candidate.pieces
    if isinstance(gold, Region) and isinstance(candidate, Bag) and candidate.is_set:
        return not candidate.items and not gold.pieces
    if type(gold) is not type(candidate):
        return _ratio_as_fraction(gold, candidate)
    other: Any = candidate
    return gold.meets(other)


def _in_order(name: str) -> bool:
    """Return whether a name is no tuple, or one whose order a bare tuple would have."""
    parts = name.strip("()").split(",")
    return not name.startswith("(") or parts == sorted(parts)


def _assigned(bag: Bag, point: Tuple) -> bool:
    """Return whether ``x = 3, y = 4`` gives the point ``(3, 4)``: every variable once, in alphabetical order."""
    named = [r[0] for r in bag.items if r and isinstance(r[0], Named)]
    names = [n.name for n in named]
    if point.brackets != "()" or not len(bag.items) == len(named) == len(set(names)) == len(point.items):
        return False
    ordered = sorted(named, key=lambda n: n.name)
    return all(same(n.value, item) for n, item in zip(ordered, point.items, strict=True))


def _ratio_as_fraction(gold: Answer, candidate: Answer) -> bool:
    for ratio, value in ((gold, candidate), (candidate, gold)):
        if isinstance(ratio, Ratio) and isinstance(value, Value) and len(ratio.terms) == 2 and value.expr.op == "div":
            return not value.unit and equal(Expr("div", ratio.terms), value.expr)
    return False


def _has_names(items: Sequence[Readings]) -> bool:
    """Return whether the elements belong to different names."""
    return len({r.name for item in items for r in item[:1] if isinstance(r, Named)}) > 1


def _distinct(items: Sequence[Readings]) -> list[Readings]:
    kept: list[Readings] = []
    for item in items:
        if not any(same(item, k) for k in kept):
            kept.append(item)
    return kept


# --- sets of real numbers ---------------------------------------------------------------------------------------------

INFINITY = Expr("inf")
MINUS_INFINITY = Expr("neg", (INFINITY,))
REALS = Region((Piece(MINUS_INFINITY, INFINITY, False, False),))


def _position(end: Expr) -> Any:
    """Return a number to sort by, or None for a symbolic end."""
    if end in (INFINITY, MINUS_INFINITY):
        return float("inf") if end == INFINITY else float("-inf")
    approximate = constant(end)
    return None if approximate is None or approximate.imag != 0 else approximate.real


def interval_between(low: Expr, high: Expr, low_closed: bool, high_closed: bool) -> Region | None:
    """Return an interval, or None if its ends are in the wrong order, as the numbers of a point may be."""
    start, end = _position(low), _position(high)
    if start is not None and end is not None and not start < end:
        return None
    return Region((Piece(low, high, low_closed, high_closed),))


def union(pieces: Sequence[Piece], name: str = "") -> Region:
    """Return the union, with touching pieces merged; pieces with symbolic ends stay as they are written."""
    if any(_position(e) is None for p in pieces for e in (p.low, p.high)):
        return Region(tuple(pieces), name)
    kept: list[Piece] = []
    for piece in sorted(_nonempty(pieces), key=lambda p: (_position(p.low), not p.low_closed)):
        if kept and _touch(kept[-1], piece):
            last = kept[-1]
            a, b = _position(last.high), _position(piece.high)
            end = last if a > b or (a == b and last.high_closed) else piece
            kept[-1] = Piece(last.low, end.high, last.low_closed, end.high_closed)
        else:
            kept.append(piece)
    return Region(tuple(kept), name)


def intersection(first: Region, second: Region) -> Region:
    """Return what both contain."""
    pieces = []
    for a in first.pieces:
        for b in second.pieces:
            low = a if (_position(a.low), not a.low_closed) >= (_position(b.low), not b.low_closed) else b
            high = a if (_position(a.high), a.high_closed) <= (_position(b.high), b.high_closed) else b
            pieces.append(Piece(low.low, high.high, low.low_closed, high.high_closed))
    return union(_nonempty(pieces), first.name or second.name)


def without(region: Region, points: Sequence[Expr]) -> Region:
    """Return the region without some points."""
    for point in points:
        hole = Region((Piece(MINUS_INFINITY, point, False, False), Piece(point, INFINITY, False, False)))
        region = intersection(region, hole)
    return region


def solve_linear(expr: Expr, name: str) -> tuple[Expr, bool] | None:
    """Return (root, whether the slope is positive) of an expression that is linear in its one symbol, else None."""

    def at(value: int) -> Expr:
        return substitute(expr, {name: num(value)})

    offset, slope = at(0), minus(at(1), at(0))
    line = Expr("add", (offset, Expr("mul", (slope, Expr("sym", (name,))))))
    steep = constant(slope)
    if steep is None or abs(steep) < 1e-40 or steep.imag != 0 or not equal(line, expr):
        return None
    return Expr("neg", (Expr("div", (offset, slope)),)), bool(steep.real > 0)


def _nonempty(pieces: Sequence[Piece]) -> list[Piece]:
    kept = []
    for piece in pieces:
        low, high = _position(piece.low), _position(piece.high)
        if low < high or (low == high and piece.low_closed and piece.high_closed):
            kept.append(piece)
    return kept


def _touch(first: Piece, second: Piece) -> bool:
    low, high = _position(second.low), _position(first.high)
    return bool(low < high or (low == high and (second.low_closed or first.high_closed)))
