"""The tree of an expression, and what can be said about it without evaluating it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any


@dataclass(frozen=True, slots=True)
class Expr:
    """A node: an operation and what it is applied to.

    ``num`` holds a Fraction, ``sym`` a name; ``pi``, ``e``, ``i`` and ``inf`` hold nothing; all others hold expressions.
    """

    op: str
    args: tuple[Any, ...] = ()


def num(value: int | Fraction) -> Expr:
    """Return a number."""
    return Expr("num", (Fraction(value),))


def minus(a: Expr, b: Expr) -> Expr:
    """Return ``a - b``."""
    return Expr("add", (a, Expr("neg", (b,))))


def symbols(expr: Expr) -> frozenset[str]:
    """Return the names of the free symbols."""
    if expr.op == "sym":
        return frozenset(expr.args)
    return frozenset().union(*(symbols(a) for a in expr.args if isinstance(a, Expr)))


def uses(expr: Expr, *ops: str) -> bool:
    """Return whether any of the operations occurs."""
    return expr.op in ops or any(uses(a, *ops) for a in expr.args if isinstance(a, Expr))


def sign_choices(expr: Expr) -> list[Expr]:
    r"""Return the tree once for every meaning of its ``\pm``: they are independent, unless a ``\mp`` ties them together."""
    count = _count(expr, "pm")
    if not count and not uses(expr, "mp"):
        return [expr]
    if uses(expr, "mp") or count == 1:
        return [_with_signs(expr, iter([sign] * 99)) for sign in (1, -1)]
    return [_with_signs(expr, iter(signs)) for signs in product((1, -1), repeat=count)] if count < 5 else []


def _count(expr: Expr, op: str) -> int:
    return (expr.op == op) + sum(_count(a, op) for a in expr.args if isinstance(a, Expr))


def _with_signs(expr: Expr, signs: Iterator[int]) -> Expr:
    if expr.op in ("pm", "mp"):
        positive = (next(signs) > 0) == (expr.op == "pm")
        inner = _with_signs(expr.args[0], signs)
        return inner if positive else Expr("neg", (inner,))
    return Expr(expr.op, tuple(_with_signs(a, signs) if isinstance(a, Expr) else a for a in expr.args))


def substitute(expr: Expr, values: Mapping[str, Expr]) -> Expr:
    """Return the tree with symbols replaced."""
    if expr.op == "sym":
        return values.get(expr.args[0], expr)
    return Expr(expr.op, tuple(substitute(a, values) if isinstance(a, Expr) else a for a in expr.args))
