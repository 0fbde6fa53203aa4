"""Equations, inequalities, memberships and implications: everything with a sign of relation outside brackets."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from rlvr_lightning.grading.math.answers import (
    INFINITY,
    MINUS_INFINITY,
    REALS,
    Answer,
    Equation,
    Inequality,
    Named,
    Piece,
    Readings,
    Region,
    Value,
    intersection,
    same,
    solve_linear,
    union,
    without,
)
from rlvr_lightning.grading.math.expression import parse
from rlvr_lightning.grading.math.tokens import Token, Tokens, Unparsable, split
from rlvr_lightning.grading.math.tree import Expr, minus, sign_choices, symbols, uses
from rlvr_lightning.grading.math.units import STOP_WORDS
from rlvr_lightning.grading.math.value import constant

if TYPE_CHECKING:
    Inner = Callable[[Tokens], Readings]

_MIRROR = {"<": ">", ">": "<", "le": "ge", "ge": "le"}


def _cut(tokens: Tokens, *signs: str) -> tuple[list[Tokens], list[str]]:
    """Cut at signs outside every bracket; return the sides and the signs between them."""
    found: list[str] = []

    def is_sign(token: Token) -> bool:
        if not token.is_(*signs):
            return False
        found.append(token.text)
        return True

    return split(tokens, is_sign), found


def implication(tokens: Tokens, inner: "Inner") -> Readings | None:
    r"""Read what follows the last ``\Rightarrow``."""
    sides, signs = _cut(tokens, "Rightarrow")
    return inner(sides[-1]) if signs else None


def membership(tokens: Tokens, inner: "Inner") -> Readings | None:
    r"""Read ``x \in A`` as the set of numbers that x may be, or as ``x = A`` for a set of several elements."""
    sides, signs = _cut(tokens, "in")
    if len(signs) != 1 or not is_name(sides[0]):
        return None
    name = spelled(sides[0])
    readings = inner(sides[1])
    regions: list[Answer] = [Region(r.pieces, name) for r in readings if isinstance(r, Region)]
    others = tuple(r for r in readings if not isinstance(r, Region))
    return (*regions, *((Named(name, others),) if others else ()))


def relation(tokens: Tokens, inner: "Inner") -> Readings | None:
    """Read whatever has a relation sign; None if there is none."""
    rounded, signs = _cut(tokens, "approx", "sim")
    if signs:
        return _approximation(rounded, inner) if all(rounded) else ()
    sides, signs = _cut(tokens, "=", "<", ">", "le", "ge", "ne", "equiv")
    if not signs:
        return None
    if not all(sides):
        return ()
    kinds = set(signs)
    if kinds <= {"=", "equiv"} and not any(t.is_("pmod", "bmod", "mod") for t in tokens):
        return tuple(_equation(sides, inner))
    if kinds == {"ne"}:
        return _unequal(sides)
    if kinds <= set(_MIRROR):
        return _inequality(sides, signs)
    return ()


def _equation(sides: list[Tokens], inner: "Inner") -> list[Answer]:
    if is_name(sides[-1]) and not is_name(sides[0]):
        sides = sides[::-1] if len(sides) == 2 else sides
    readings: list[Answer] = []
    asked = is_name(sides[0]) or _is_sum_of_symbols(sides[0])
    values = [inner(side) for side in (sides[1:] if asked else sides)]
    agree = all(values) and all(same(values[-1], value) for value in values[:-1])
    if asked and agree:
        readings.append(Named(_name(sides[0]), values[-1]))
    elif agree and len(sides) > 1:
        readings += values[-1]
    if len(sides) == 2:
        try:
            difference = minus(parse(sides[0]), parse(sides[1]))
        except Unparsable:
            return readings
        if symbols(difference) and not uses(difference, "pm", "mp"):
            readings.append(Equation(difference))
    return readings


def _approximation(sides: list[Tokens], inner: "Inner") -> Readings:
    """An exact value and its rounding: either may be meant, if the one rounds to the other."""
    if is_name(sides[0]):
        readings = inner(sides[1]) if len(sides) == 2 else _approximation(sides[1:], inner)
        return (Named(_name(sides[0]), readings),) if readings else ()
    if len(sides) != 2:
        return ()
    exact, rounded = inner(sides[0]), inner(sides[1])
    name = next((r.name for r in exact if isinstance(r, Named)), None)
    first, second = (next((constant(r.expr) for r in _unnamed(v) if isinstance(r, Value)), None) for v in (exact, rounded))
    digits = next((t.text.partition(".")[2] for t in sides[1] if t.kind == "num"), "")
    if first is None or second is None or abs(first - second) > 0.5001 * 10.0 ** -len(digits):
        return ()
    readings = tuple(dict.fromkeys([*_unnamed(exact), *(rounded if digits else ())]))
    return (Named(name, readings),) if name else readings


def _unnamed(readings: Readings) -> Readings:
    return tuple(r for reading in readings for r in (reading.value if isinstance(reading, Named) else (reading,)))


def _unequal(sides: list[Tokens]) -> Readings:
    if len(sides) != 2:
        return ()
    try:
        left, right = (parse(side) for side in sides)
    except Unparsable:
        return ()
    if left.op != "sym" or symbols(right):
        return ()
    return (Region(without(REALS, sign_choices(right)).pieces, left.args[0]),)


def _inequality(sides: list[Tokens], signs: list[str]) -> Readings:
    try:
        parts = [parse(side) for side in sides]
    except Unparsable:
        return ()
    regions = [_half_line(a, sign, b) for a, sign, b in zip(parts[:-1], signs, parts[1:], strict=True)]
    readings: list[Answer] = []
    known = [r for r in regions if r is not None]
    if len(known) == len(regions) and len({r.name for r in known}) == 1:
        region = known[0]
        try:
            for other in known[1:]:
                region = intersection(region, other)
        except TypeError:  # ends that are symbols: a < x < b as it is written
            region = _between(parts, signs) if len(parts) == 3 else None
        if region is not None:
            readings.append(region)
    elif len(parts) == 3 and (between := _between(parts, signs)) is not None:
        readings.append(between)
    if len(parts) == 2:
        greater = minus(parts[0], parts[1]) if signs[0] in (">", "ge") else minus(parts[1], parts[0])
        if symbols(greater):
            readings.append(Inequality(greater, signs[0] in "<>"))
    return tuple(readings)


def _between(parts: list[Expr], signs: list[str]) -> Region | None:
    """Read ``a < x < b`` with symbols for ends."""
    if parts[1].op != "sym" or len({s in ("<", "le") for s in signs}) > 1:
        return None
    low, high = (parts[0], parts[2]) if signs[0] in ("<", "le") else (parts[2], parts[0])
    first, last = (signs[0], signs[1]) if signs[0] in ("<", "le") else (signs[1], signs[0])
    return Region((Piece(low, high, first in ("le", "ge"), last in ("le", "ge")),), parts[1].args[0])


def _half_line(left: Expr, sign: str, right: Expr) -> Region | None:
    """Solve one inequality that is linear in its one symbol."""
    if left.op == "abs" and not symbols(right):
        return _around(left.args[0], sign, right)
    if right.op == "abs" and not symbols(left):
        return _around(right.args[0], _MIRROR[sign], left)
    names = symbols(left) | symbols(right)
    if len(names) != 1:
        if left.op == "sym" and left.args[0] not in symbols(right):
            return _ray(left.args[0], sign, right)
        if right.op == "sym" and right.args[0] not in symbols(left):
            return _ray(right.args[0], _MIRROR[sign], left)
        return None
    [name] = names
    if left.op == "sym":
        return None if symbols(right) else _ray(name, sign, right)
    if right.op == "sym":
        return None if symbols(left) else _ray(name, _MIRROR[sign], left)
    solved = solve_linear(minus(left, right), name)
    if solved is None:
        return None
    root, rising = solved
    return _ray(name, sign if rising else _MIRROR[sign], root)


def _around(inner: Expr, sign: str, bound: Expr) -> Region | None:
    """Solve ``|inner| < bound`` and its kin."""
    below = "<" if sign in ("<", ">") else "le"
    low = _half_line(Expr("neg", (bound,)), below if sign in ("<", "le") else _MIRROR[below], inner)
    high = _half_line(inner, below if sign in ("<", "le") else _MIRROR[below], bound)
    if low is None or high is None:
        return None
    return intersection(low, high) if sign in ("<", "le") else union([*low.pieces, *high.pieces], low.name)


def _ray(name: str, sign: str, end: Expr) -> Region:
    closed = sign in ("le", "ge")
    if sign in (">", "ge"):
        return Region((Piece(end, INFINITY, closed, False),), name)
    return Region((Piece(MINUS_INFINITY, end, False, closed),), name)


def _is_sum_of_symbols(tokens: Tokens) -> bool:
    """Return whether what is asked is a sum such as m + n."""
    terms = split(tokens, lambda t: t.is_("+", "-"))
    return len(terms) > 1 and all(
        len(t) == 1 and (t[0].kind == "sym" or (t[0].kind == "word" and t[0].text.isupper())) for t in terms
    )


# --- names ------------------------------------------------------------------------------------------------------------


def is_name(tokens: Tokens) -> bool:
    r"""Return whether tokens may stand for what is asked: ``x``, ``a_1``, ``f(2)``, ``\angle ABC``, ``(x, y)``, "Area"."""
    if not tokens or tokens[24:]:
        return False
    head = tokens
    if re.fullmatch(
        r"frac\{?d\^?2?[a-zA-Z]?\}?\{?d[a-zA-Z]\^?2?\}?|d[a-z]/d[a-z]|[a-zA-Z]\^\{?-1\}?\([a-z]\)",
        "".join(t.text for t in tokens),
    ):
        return True  # dy/dx, an inverse function
    if tokens[-1].is_(")") and tokens[0].kind in ("sym", "word", "text", "cmd") and not tokens[0].is_("frac", "sqrt"):
        opening = next((i for i, t in enumerate(tokens) if t.is_("(")), len(tokens))
        head = tokens[:opening]  # f(2), P(X = 1)
    said = [word for t in head if t.kind in ("word", "text") for word in t.text.lower().split()]
    if len(said) > 6 or STOP_WORDS & set(said):
        return False
    if len(head) == 3 and head[0].is_("|") and head[1].text.islower() and head[1].text != "z":
        return False  # |x| = 5 does not say what x is
    depth = 0
    for index, token in enumerate(head):
        subscript = index > 0 and ((token.kind == "num" and head[index - 1].is_("_")) or depth > 0)
        depth += token.is_("{") - token.is_("}")
        structural = token.is_(
            "(",
            ")",
            "[",
            "]",
            ",",
            "_",
            "{",
            "}",
            "'",
            "|",
            "bar",
            "hat",
            "angle",
            "triangle",
            "overline",
            "vec",
            "measuredangle",
            "circ",
        )
        letter = token.kind in ("sym", "word", "text") or (token.kind == "cmd" and token.text in _NAMES)
        if not (subscript or structural or letter):
            return False
    return any(t.kind in ("sym", "word", "text") or t.text in _NAMES for t in head)


_NAMES = frozenset(
    (
        "alpha beta gamma delta epsilon theta lambda mu nu xi rho sigma tau phi chi psi omega Delta Omega Gamma "
        "Phi Sigma ell gcd lcm max min det deg dim Pr arg"
    ).split()
)


def spelled(tokens: Tokens) -> str:
    """Return the spelling of a name."""
    return "".join(t.text for t in tokens if not t.is_("{", "}"))


def _name(tokens: Tokens) -> str:
    """Return the spelling of a name; y and f(x) are one name."""
    name = spelled(tokens)
    return "y" if name in ("f(x)", "y(x)") else name
