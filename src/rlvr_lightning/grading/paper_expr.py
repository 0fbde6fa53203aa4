r"""Mathematical text of a model, read into sympy by grammars of our own: no text is ever run as code.

The paper's two graders hand model text to sympy's ``parse_expr``, which calls ``eval``. Here plain text such as ``3x+1/2``
goes through the small parser below, and LaTeX through the grammar of latex2sympy2_extended. What would take long or much
memory (long or deeply nested text, towers of powers, large factorials) raises :class:`Unreadable` instead.

Sympy and latex2sympy2_extended are imported inside the functions: importing this module costs nothing.
"""

import re
from collections.abc import Callable
from typing import Any

MAX_CHARS = 500
"""Longer text is not read as an expression; the longest ground truth of the paper's evaluation sets has 210 characters."""
MAX_DEPTH = 25
MAX_BITS = 1_000_000
"""Size of the largest power or factorial of a number, in bits."""
MAX_EXPONENT = 200
"""Largest exponent of anything but a number."""

_TOKEN = re.compile(
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    r"|(?P<name>sqrt|cbrt|sin|cos|tan|asin|acos|atan|log|ln|exp|abs|pi|oo|[^\W\d_](?:_\w+)?)"
    r"|(?P<operator>\*\*|[-+*/^!()])"
)
_FUNCTIONS = {"ln": "log", "abs": "Abs"} | {
    name: name for name in ("sqrt", "cbrt", "sin", "cos", "tan", "asin", "acos", "atan", "log", "exp")
}
_CONSTANTS = {"pi": "pi", "oo": "oo", "E": "E", "I": "I"}
_UNBOUNDED = re.compile(r"\\(?:sum|prod|int|lim|binom|dbinom|tbinom|iint|oint)(?![a-zA-Z])")


class Unreadable(ValueError):
    """The text is no expression that this module reads, or one too large to work with."""


def read_plain(text: str) -> Any:
    """Return the sympy expression that plain text such as ``2sqrt(3)/5`` or ``x**2-4`` spells.

    Numbers are exact (``12.8`` is 64/5), products may be implicit, names of functions win over products of letters,
    and letters are case-sensitive.

    Raises:
        Unreadable: Anything else, or an expression beyond the limits of this module.
    """
    text = "".join(text.split())
    _check_text(text)
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or (match.lastgroup == "name" and not match[0].isidentifier()):
            raise Unreadable(f"unexpected {text[position]!r}")
        tokens.append((str(match.lastgroup), match[0]))
        position = match.end()
    parser = _Plain([*tokens, ("end", "")])
    result = parser.sum()
    if parser.kind != "end":
        raise Unreadable(f"unexpected {parser.text!r}")
    return result


def read_latex(text: str) -> Any:
    """Return the sympy object that LaTeX spells: an expression, equation, inequality, set or matrix.

    Letters are case-sensitive, and pi is one of them, without a value, as it is to sympy's ``parse_latex``.

    Raises:
        Unreadable: The grammar does not read the text, or it is beyond the limits of this module.
    """
    _check_text(text)
    if _UNBOUNDED.search(text):
        raise Unreadable("sums, products, integrals, limits and binomials may take forever")
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Symbol, pi

    try:
        result: Any = latex2sympy(text, conversion_config=ConversionConfig(lowercase_symbols=False))
        _check_size(result)
        return result.xreplace({pi: Symbol("pi")})
    except Exception as error:  # the grammar raises bare exceptions, and AttributeError on some input
        raise Unreadable(f"the LaTeX grammar refuses {text[:80]!r}") from error


def _check_text(text: str) -> None:
    if not text or len(text) > MAX_CHARS:
        raise Unreadable("empty or too long")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise Unreadable("nested too deeply")


class _Plain:
    """Recursive descent over tokens; every method returns a sympy expression and stops at what it cannot use."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        import sympy

        self._sympy, self._tokens, self._next = sympy, tokens, 0

    @property
    def kind(self) -> str:
        return self._tokens[self._next][0]

    @property
    def text(self) -> str:
        return self._tokens[self._next][1]

    def sum(self) -> Any:
        total = self._product()
        while self.text in ("+", "-"):
            sign = self._take()
            term = self._product()
            total = total + term if sign == "+" else total - term
        return total

    def _product(self) -> Any:
        result = self._signed(self._power)
        while self.text in ("*", "/") or self.kind in ("number", "name") or self.text == "(":
            operator = self._take() if self.text in ("*", "/") else "*"
            factor = self._signed(self._power)
            if operator == "/" and factor == 0:
                raise Unreadable("division by zero")
            result = result * factor if operator == "*" else result / factor
        return result

    def _signed(self, operand: Callable[[], Any]) -> Any:
        """Signs apply after powers, as in Python: -2**2 is -4."""
        negative = False
        while self.text in ("+", "-"):
            negative ^= self._take() == "-"
        return -operand() if negative else operand()

    def _power(self) -> Any:
        base = self._atom()
        if self.text not in ("^", "**"):
            return base
        self._take()
        exponent = self._signed(self._power)
        _check_power(base, exponent)
        return self._sympy.Pow(base, exponent)

    def _atom(self) -> Any:
        kind, text = self.kind, self._take()
        if kind == "number":
            if abs(int(re.split("[eE]", text)[1]) if "e" in text.lower() else 0) > MAX_EXPONENT:
                raise Unreadable("exponent too large")
            result = self._sympy.Rational(text)
        elif text == "(":
            result = self._closed()
        elif text in _FUNCTIONS:
            function = getattr(self._sympy, _FUNCTIONS[text])
            if self._take() != "(":
                raise Unreadable(f"{text} without parentheses")
            result = function(self._closed())
        elif kind == "name":
            result = getattr(self._sympy, _CONSTANTS[text]) if text in _CONSTANTS else self._sympy.Symbol(text)
        else:
            raise Unreadable(f"unexpected {text!r}")
        while self.text == "!":
            self._take()
            _check_factorial(result)
            result = self._sympy.factorial(result)
        return result

    def _closed(self) -> Any:
        inner = self.sum()
        if self._take() != ")":
            raise Unreadable("an open parenthesis")
        return inner

    def _take(self) -> str:
        text = self.text
        self._next = min(self._next + 1, len(self._tokens) - 1)
        return text


def _check_size(expression: Any) -> None:
    """Raise Unreadable if a power or factorial inside could not be worked out in reasonable time."""
    from sympy import Pow, exp, factorial, postorder_traversal

    for part in postorder_traversal(expression):  # inner powers first: the size of an outer one needs their value
        if isinstance(part, exp):
            _check_power(part.func(1), part.args[0])
        elif isinstance(part, Pow):
            _check_power(part.base, part.exp)
        elif isinstance(part, factorial):
            _check_factorial(part.args[0])


def _check_power(base: Any, exponent: Any) -> None:
    if not exponent.is_number:
        return
    size = abs(exponent.evalf(15))
    if not (size.is_Float or size.is_Integer) or size <= 1:
        return
    if not base.is_number:
        too_large = size > MAX_EXPONENT
    else:
        from sympy import log

        too_large = base != 0 and bool(abs(log(abs(base), 2).evalf(15)) * size > MAX_BITS)
    if too_large:
        raise Unreadable("power too large")


def _check_factorial(argument: Any) -> None:
    if argument.is_number and bool(abs(argument.evalf(15)) > 10_000):
        raise Unreadable("factorial too large")
