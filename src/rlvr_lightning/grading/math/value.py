"""Whether two expressions are the same: exactly where numbers allow it, else at many digits and several points.

Rational numbers are compared as such. Irrational constants are evaluated to 150 digits and compared relatively, at 300 when
they look like zero. Expressions with symbols are compared at points chosen by their names, so that a verdict never depends on
the run. Towers of powers are compared by their logarithms and never expanded.
"""

import math
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rlvr_lightning.grading.math.expression import Expr, num, symbols, uses

_MAX_BITS = 40_000
"""Of an exact integer; anything longer is compared through its logarithm or in floating point."""
_MAX_LOG = 10**7
_DIGITS = 150
_POINTS = 6


class TooLarge(ValueError):
    """A value of more than about four million digits."""


class Undefined(ValueError):
    """The expression has no (real) value at this point."""


def equal(a: Expr, b: Expr) -> bool:
    """Return whether two expressions have the same value wherever both have one."""
    if a == b:
        return not uses(a, "inf") or a.op in ("inf", "neg")
    if uses(a, "inf") or uses(b, "inf"):
        return False
    x, y = exact(a), exact(b)
    if x is not None and y is not None:
        return x == y
    names = sorted(symbols(a) | symbols(b))
    bases = ("e", "10") if uses(a, "log") or uses(b, "log") else ("e",)
    if names:
        return any(_agree(a, b, names, base) for base in bases)
    return any(_same_constant(a, b, base) for base in bases)


def proportional(a: Expr, b: Expr, *, positive: bool = False) -> bool:
    """Return whether ``a = c * b`` with one constant c, not 0 (and above 0 on request)."""
    names = sorted(symbols(a) | symbols(b))
    if symbols(a) != symbols(b) or uses(a, "inf") or uses(b, "inf"):
        return False
    ratio = None
    found = 0
    for values in _points(names, a, b):
        x, y = values
        if abs(y) < 1e-25 or abs(x) < 1e-25:
            if abs(x) < 1e-25 and abs(y) < 1e-25:
                continue
            return False
        if ratio is None:
            ratio = x / y
        elif abs(x / y - ratio) > 1e-30 * abs(ratio):
            return False
        found += 1
    if ratio is None or found < 3:
        return False
    return not positive or (abs(ratio.imag) < 1e-30 and ratio.real > 0)


def constant(expr: Expr) -> Any | None:
    """Return the 150-digit value of an expression without symbols (an mpmath number), or None if it has none."""
    if symbols(expr):
        return None
    try:
        return _numeric(expr, {}, "e", _DIGITS, real=False)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


@lru_cache(4096)
def exact(expr: Expr) -> Fraction | None:
    """Return the rational value of an expression, or None if it is irrational, symbolic, undefined or too long."""
    op, args = expr.op, expr.args
    if op == "num":
        return args[0]
    if op in ("sym", "pi", "e", "i", "inf", "deg"):
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


def _same_constant(a: Expr, b: Expr, log_base: str, depth: int = 0) -> bool:
    try:
        x, y = (_numeric(e, {}, log_base, _DIGITS, real=False) for e in (a, b))
    except TooLarge:
        if depth > 3:
            return False
        logs = _log(a), _log(b)
        return logs[0] is not None and logs[1] is not None and _same_constant(logs[0], logs[1], log_base, depth + 1)
    except (Undefined, ZeroDivisionError, OverflowError):
        return False
    if abs(x - y) <= 1e-110 * max(abs(x), abs(y)):
        return True
    if min(abs(x), abs(y)) > 1e-100:
        return False
    try:  # what is zero shrinks when digits are added; what is merely small stays
        precise = [_numeric(e, {}, log_base, 2 * _DIGITS, real=False) for e in (a, b)]
    except (ValueError, ZeroDivisionError, OverflowError):
        return False
    zero = [abs(p) <= abs(v) * 1e-100 for p, v in zip(precise, (x, y), strict=True)]
    return all(zero) or abs(precise[0] - precise[1]) <= 1e-110 * max(abs(precise[0]), abs(precise[1]))


def _log(expr: Expr) -> Expr | None:
    """Return the logarithm of a product of powers, as an expression; None for anything else."""
    if expr.op == "pow":
        return Expr("mul", (expr.args[1], Expr("ln", (expr.args[0],))))
    if expr.op in ("mul", "div"):
        first, second = (_log(a) for a in expr.args)
        if first is None or second is None:
            return None
        return Expr("add", (first, second if expr.op == "mul" else Expr("neg", (second,))))
    if expr.op == "num" or expr.op in ("e", "pi"):
        return Expr("ln", (expr,))
    if expr.op == "fact":
        return Expr("lnfact", expr.args)
    return None


def _agree(a: Expr, b: Expr, names: list[str], log_base: str) -> bool:
    found = 0
    for x, y in _points(names, a, b, log_base):
        if abs(x - y) > 1e-30 * max(abs(x), abs(y)) and max(abs(x), abs(y)) > 1e-35:
            return False
        found += 1
    return found >= 3


def _points(names: list[str], a: Expr, b: Expr, log_base: str = "e") -> "list[tuple[Any, Any]]":
    """Return both values at points where both are defined: real ones of either sign, else positive, else whole numbers."""
    real = not uses(a, "i", "cis") and not uses(b, "i", "cis")
    found: list[tuple[Any, Any]] = []
    for signs in ("mixed", "positive", "whole"):
        for index in range(_POINTS if signs == "mixed" else _POINTS - 1):
            env = {name: _coordinate(name, index, signs) for name in names}
            try:
                found.append((_numeric(a, env, log_base, 60, real=real), _numeric(b, env, log_base, 60, real=real)))
            except (ValueError, ZeroDivisionError, OverflowError):
                continue
        if len(found) >= 3:
            break
    return found


def _coordinate(name: str, index: int, signs: str) -> Fraction:
    noise = zlib.crc32(f"{name}/{index}".encode())
    if signs == "whole":
        return Fraction(2 + noise % 9 + index)
    value = Fraction(noise % 9_973 + 1_009, 4_093 + noise % 89)
    negative = index >> (zlib.crc32(name.encode()) % 3) & 1  # each symbol takes both signs, most pairs all four
    return -value if signs == "mixed" and negative else value


def _numeric(expr: Expr, env: dict[str, Fraction], log_base: str, digits: int, *, real: bool) -> Any:
    import mpmath

    with mpmath.workdps(digits + 20):
        result = _Evaluator(mpmath.mp, env, log_base, real)(expr)
        if not mpmath.isfinite(result):
            raise Undefined("not finite")
        return mpmath.mpmathify(result)


class _Evaluator:
    """Numeric value of a tree at one point, within mpmath's current precision."""

    def __init__(self, mp: Any, env: dict[str, Fraction], log_base: str, real: bool) -> None:
        self.mp, self.env, self.real = mp, env, real
        self.log_base = mp.mpf(10) if log_base == "10" else mp.e

    def fraction(self, value: Fraction) -> Any:
        return self.mp.mpf(value.numerator) / value.denominator

    def __call__(self, expr: Expr) -> Any:
        op, args, mp = expr.op, expr.args, self.mp
        if op == "num":
            return self.fraction(args[0])
        if op == "sym":
            return self.fraction(self.env[args[0]])
        if op in ("pi", "e"):
            return +mp.pi if op == "pi" else +mp.e
        if op == "i":
            return mp.j
        if op == "inf":
            raise Undefined("infinity")
        values = [self(a) for a in args]
        if op == "add":
            return mp.fsum(values)
        rule = getattr(self, f"op_{op}", None)
        if rule is not None:
            return rule(*values)
        return self.function(op, values[0])

    def op_neg(self, a: Any) -> Any:
        return -a

    def op_mul(self, a: Any, b: Any) -> Any:
        return a * b

    def op_div(self, a: Any, b: Any) -> Any:
        if b == 0:
            raise Undefined("division by zero")
        return a / b

    def op_pow(self, base: Any, exponent: Any) -> Any:
        if base == 0:
            if exponent == 0 or not self.mp.re(exponent) > 0:
                raise Undefined("0 to this power")
            return base
        whole = self.mp.im(exponent) == 0 and self.mp.isint(exponent)
        if self.real and self.mp.re(base) < 0 and not whole:
            raise Undefined("a real power of a negative number")
        if abs(exponent) * (abs(self.mp.log(abs(base))) + 1) > _MAX_LOG:
            raise TooLarge("power")
        return base ** (int(self.mp.re(exponent)) if whole else exponent)

    def op_root(self, a: Any, index: Any) -> Any:
        if index == 0:
            raise Undefined("root of index 0")
        negative = self.mp.im(a) == 0 and self.mp.re(a) < 0
        if negative and self.mp.isint(index) and int(self.mp.re(index)) % 2:
            return -((-a) ** (1 / index))
        if negative and self.real:
            raise Undefined("an even root of a negative number")
        return self.mp.sqrt(a) if index == 2 else self.op_pow(a, 1 / index)

    def op_fact(self, a: Any) -> Any:
        if abs(a) > 10**5 or self.mp.im(a) != 0 or (self.mp.isint(a) and self.mp.re(a) < 0):
            raise TooLarge("factorial")
        return self.mp.gamma(a + 1)

    def op_lnfact(self, a: Any) -> Any:
        return self.mp.loggamma(a + 1)

    def op_binom(self, n: Any, k: Any) -> Any:
        if max(abs(n), abs(k)) > 10**6:
            raise TooLarge("binomial")
        return self.mp.binomial(n, k)

    def op_abs(self, a: Any) -> Any:
        return abs(a)

    def op_deg(self, a: Any) -> Any:
        return a * self.mp.pi / 180

    def op_floor(self, a: Any) -> Any:
        return self.mp.floor(a)

    def op_ceil(self, a: Any) -> Any:
        return self.mp.ceil(a)

    def function(self, name: str, a: Any) -> Any:
        mp = self.mp
        if abs(a) > 10**50 and name not in ("ln", "log"):
            raise TooLarge(name)
        if name in ("ln", "log"):
            if a == 0 or (self.real and mp.re(a) < 0):
                raise Undefined("logarithm")
            return mp.log(a) / mp.log(self.log_base) if name == "log" else mp.log(a)
        if name == "cis":
            return self.op_pow(+mp.e, mp.j * a)
        if name == "exp":
            return self.op_pow(+mp.e, a)
        short = name.replace("arc", "a").replace("arsinh", "asinh").replace("arcosh", "acosh").replace("artanh", "atanh")
        method = getattr(mp, {"arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh"}.get(name, short), None)
        if method is None:
            raise Undefined(name)
        value = method(a)
        if self.real and mp.im(value) != 0:
            raise Undefined(name)
        return value


ZERO = num(0)
