"""Whether two expressions are the same: exactly where numbers allow it, else at many digits and several points.

Rational numbers are compared as such. Irrational constants are evaluated to 150 digits and compared relatively, with more where
they agree. Expressions with symbols are compared at points chosen by their names, so that a verdict never depends on
the run. Towers of powers are compared by their logarithms and never expanded.
"""

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from rlvr_lightning.grading.math.rational import exact
from rlvr_lightning.grading.math.tree import Expr, num, substitute, symbols, uses

_MAX_LOG = 10**7
_DIGITS = 150
_MAX_DIGITS = 6_000
_POINTS = 8


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
        if isinstance(x, Fraction):
            x, y = (_numeric(num(v), {}, "e", 60, real=True) for v in (x, y))
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
    if abs(x - y) > 1e-110 * max(abs(x), abs(y)) and min(abs(x), abs(y)) > 1e-100:
        return False
    # They agree, or look like zero. As many digits again as the largest power has tell 3^999 + 1 from 3^999; what is zero
    # shrinks when digits are added, what is merely small stays.
    digits = 2 * _DIGITS + _exponent(a, log_base) + _exponent(b, log_base)
    if digits > _MAX_DIGITS:
        return not uses(a, "add") and not uses(b, "add") and abs(x - y) <= 1e-110 * max(abs(x), abs(y))
    try:
        precise = [_numeric(e, {}, log_base, digits, real=False) for e in (a, b)]
    except (ValueError, ZeroDivisionError, OverflowError):
        return False
    import mpmath

    with mpmath.workdps(digits):
        close = mpmath.mpf(10) ** (40 - digits)
        zero = [abs(p) <= abs(v) * 1e-100 for p, v in zip(precise, (x, y), strict=True)]
        return all(zero) or bool(abs(precise[0] - precise[1]) <= close * max(abs(precise[0]), abs(precise[1])))


def _exponent(expr: Expr, log_base: str) -> int:
    """Return how many decimal digits the largest power, exponential or factorial in a tree has, on either side of 1."""
    inner = max((_exponent(a, log_base) for a in expr.args if isinstance(a, Expr)), default=0)
    if expr.op not in ("pow", "exp", "fact", "sinh", "cosh", "tanh", "binom"):
        return inner
    argument = Expr("exp", expr.args) if expr.op in ("sinh", "cosh", "tanh") else expr
    try:
        size = _numeric(argument, {}, log_base, 15, real=False)
    except (ValueError, ZeroDivisionError, OverflowError):
        return _MAX_DIGITS
    import mpmath

    return max(inner, 0 if size == 0 else int(abs(mpmath.log10(abs(size)))))


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
        if isinstance(x, Fraction):
            if x != y:
                return False
        elif abs(x - y) > 1e-30 * max(abs(x), abs(y)) and max(abs(x), abs(y)) > 1e-45:
            return False
        found += 1
    return found >= 3


def _points(names: list[str], a: Expr, b: Expr, log_base: str = "e") -> "Iterator[tuple[Any, Any]]":
    """Yield both values at points where both are defined: real ones of either sign, else positive, else whole numbers.

    Rational values are exact. With floor or ceiling, whole numbers come first, and alone for names that stand for integers.
    """
    real = not uses(a, "i", "cis") and not uses(b, "i", "cis")
    steps = uses(a, "floor", "ceil") or uses(b, "floor", "ceil")
    if steps:
        whole = frozenset(name for name in names if name[0] in "nmkNMKij")
        kinds = [(frozenset(names), 32)] if len(whole) == len(names) else [(frozenset(names), 16), (frozenset(), _POINTS)]
    else:
        kinds = [(frozenset(), _POINTS), (None, _POINTS), (_in_exponents(a) | _in_exponents(b), 16), (frozenset(names), 16)]
    found = 0
    for integers, count in kinds:
        for index in range(count):
            env = {name: _coordinate(name, rank, index, integers) for rank, name in enumerate(names)}
            values = [_at(e, env, log_base, real=real) for e in (a, b)]
            if None in values:
                # |x| and (sqrt x)^2 differ where only one of them exists
                if integers == frozenset() and values != [None, None] and (uses(a, "abs") or uses(b, "abs")):
                    yield (Fraction(0), Fraction(1))
                continue
            found += 1
            if not (isinstance(values[0], Fraction) and isinstance(values[1], Fraction)):
                values = [_numeric(num(v), {}, log_base, 60, real=real) if isinstance(v, Fraction) else v for v in values]
            yield (values[0], values[1])
        if found >= 3 and not steps:
            return


def _in_exponents(expr: Expr) -> frozenset[str]:
    """Return the symbols in exponents."""
    own = symbols(expr.args[1]) if expr.op == "pow" else frozenset()
    return own.union(*(_in_exponents(a) for a in expr.args if isinstance(a, Expr)))


def _at(expr: Expr, env: dict[str, Fraction], log_base: str, *, real: bool) -> Any | None:
    """Return the value at a point: a Fraction where it is rational, None where it is undefined."""
    value = exact(substitute(expr, {name: num(value) for name, value in env.items()}))
    if value is not None:
        return value
    try:
        return _numeric(expr, env, log_base, 60, real=real)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


@lru_cache(4096)
def _coordinate(name: str, rank: int, index: int, integers: frozenset[str] | None) -> Fraction:
    """Return one symbol's value at one point: a whole number, or a fraction (None: a positive one)."""
    noise = int.from_bytes(blake2b(f"{name}/{index}".encode(), digest_size=8).digest())
    if integers and name in integers:
        return Fraction(index + 1 if integers == {name} and index % 4 else 1 + noise % (400 if index % 4 == 3 else 12))
    value = Fraction(noise % 9_973 + 1_009, 4_093 + noise % 89)
    if integers is None:
        return value
    negative = (index >> rank) & 1 if rank < 3 else (noise >> 16) & 1  # the first three take every combination of signs
    return value * (1, 1, 10, 1, 100, 3, 1, 1)[(index + rank) % 8] * (-1 if negative else 1)


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
        if op == "call":  # an unknown function: any value that depends on nothing but its name and its arguments
            key = "/".join([args[0], *(self.mp.nstr(self(a), 25) for a in args[1:])])
            return self.fraction(Fraction(int.from_bytes(blake2b(key.encode(), digest_size=4).digest()) - 2**31, 10**9))
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
