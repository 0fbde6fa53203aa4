"""The exact value of an expression that is a rational number, within a limit on its length."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from rlvr_lightning.grading.math.tree import Expr

_MAX_BITS = 300_000
"""Of an exact integer; anything longer is compared through its logarithm or in floating point."""


@lru_cache(4096)
def exact(expr: Expr) -> Fraction | None:
    """Return the rational value of an expression, or None if it is irrational, symbolic, undefined or too long."""
    op, args = expr.op, expr.args
    if op == "num":
        return args[0]
    if op in ("sym", "pi", "e", "i", "inf", "deg", "call"):
        return None
    values = [exact(a) for a in args]
    if any(v is None for v in values):
        return None
    known = [v for v in values if v is not None]
    rule = _EXACT.get(op)
    try:
        result = rule(*known) if rule else None
    except ZeroDivisionError:
        return None
    if result is None or result.numerator.bit_length() + result.denominator.bit_length() > _MAX_BITS:
        return None
    return result


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        root = _exact_root(base, Fraction(exponent.denominator))
        return None if root is None else _exact_power(root, Fraction(exponent.numerator))
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * size > _MAX_BITS and base not in (0, 1, -1):
        return None
    if base == 0 and exponent <= 0:
        return Fraction(1) if exponent == 0 else None
    return base ** (int(exponent) % 2 if abs(base) == 1 else int(exponent))


def _exact_root(value: Fraction, index: Fraction) -> Fraction | None:
    if index.denominator != 1 or not 2 <= index <= 100 or (value < 0 and index % 2 == 0):
        return None
    parts = []
    for part in (abs(value.numerator), value.denominator):
        root = math.isqrt(part) if index == 2 else _integer_root(part, int(index))
        if root ** int(index) != part:
            return None
        parts.append(root)
    return Fraction(parts[0], parts[1]) * (-1 if value < 0 else 1)


def _integer_root(value: int, index: int) -> int:
    low, high = 0, 1 << (value.bit_length() // index + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**index <= value else (low, middle - 1)
    return low


def _exact_factorial(n: Fraction) -> Fraction | None:
    return Fraction(math.factorial(int(n))) if n.denominator == 1 and 0 <= n <= 3000 else None


def _exact_binomial(n: Fraction, k: Fraction) -> Fraction | None:
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= 3000 or not 0 <= n <= 10**6:
        return None
    return Fraction(math.comb(int(n), int(k)))


_EXACT: dict[str, Callable[..., Fraction | None]] = {
    "add": lambda *terms: sum(terms, Fraction(0)),
    "neg": lambda a: -a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": _exact_power,
    "root": _exact_root,
    "fact": _exact_factorial,
    "binom": _exact_binomial,
    "abs": lambda a: abs(a),
    "floor": lambda a: Fraction(math.floor(a)),
    "ceil": lambda a: Fraction(math.ceil(a)),
}
