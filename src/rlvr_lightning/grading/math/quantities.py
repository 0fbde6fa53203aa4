r"""Numbers and expressions with what stands behind or before them: units, percent and money signs, scale words, ratios."""

from collections.abc import Iterator
from fractions import Fraction

from rlvr_lightning.grading.math.answers import NO_UNIT, Bag, Ratio, Value
from rlvr_lightning.grading.math.expression import parse
from rlvr_lightning.grading.math.tokens import FUNCTIONS, Token, Tokens, Unparsable, matching, says, split
from rlvr_lightning.grading.math.tree import Expr, num, sign_choices, symbols, uses
from rlvr_lightning.grading.math.units import DEGREE, RADIAN, SHORT, SKIPPED, Unit, known, read_unit


def ratio(tokens: Tokens) -> Iterator[Ratio]:
    """Read ``a:b`` and "a to b"."""
    parts = split(tokens, lambda t: t.is_(":") or says(t, "to"))
    if 1 < len(parts) < 8 and all(parts):
        try:
            yield Ratio(tuple(parse(p) for p in parts))
        except Unparsable:
            return


def value(tokens: Tokens) -> Iterator[Value | Bag]:
    r"""Read a number or an expression, with a unit if one stands behind it; both values of a ``\pm``."""
    if len(tokens) == 1 and tokens[0].kind == "word" and tokens[0].text.isupper():  # AB is a name here, no product
        yield Value(Expr("sym", (tokens[0].text,)))
        return
    for head, unit, scale in _units(tokens):
        try:
            expr = parse(head)
        except Unparsable:
            continue
        if expr.op == "deg" and not unit and not uses(expr, "pi"):
            expr, unit = expr.args[0], DEGREE
        elif unit == RADIAN and uses(expr, "pi"):
            unit = NO_UNIT
        elif unit and not _takes_unit(expr, unit, tokens[len(head) :]):
            continue
        if scale:
            expr = Expr("mul", (expr, num(Fraction(10) ** scale)))
        choices = sign_choices(expr)
        if len(choices) > 1:
            yield Bag(tuple((Value(choice, unit),) for choice in choices))
        elif choices:
            yield Value(expr, unit)


def _takes_unit(expr: Expr, unit: Unit, tail: Tokens) -> bool:
    r"""Return whether letters behind an expression are a unit: a bare ``h`` is a factor, unless it follows a numeral."""
    if ("degree", 1) in unit and (uses(expr, "pi", *FUNCTIONS)):
        return False
    bare = [t.text for t in tail if t.kind in ("sym", "word") and len(t.text) < 3]
    if ("degree", 1) in unit and bare in (["C"], ["F"]):
        return True
    if all(text in SHORT for text in bare):
        return not bare or not symbols(expr)
    return (
        _is_numeral(expr)
        and all(len(text) == 1 or text in SHORT for text in bare)
        and not any(t.is_("^") for t in tail if len(bare) == 1)
    )


def _is_numeral(expr: Expr) -> bool:
    """Return whether a number is written with digits alone: 5, -1/2, 1 1/3, 3 x 10^8."""
    return expr.op == "num" or (
        expr.op in ("neg", "div", "add", "mul", "pow") and all(isinstance(a, Expr) and _is_numeral(a) for a in expr.args)
    )


def _units(tokens: Tokens) -> Iterator[tuple[Tokens, Unit, int]]:
    """Yield (number, unit, power of ten), without a unit first."""
    yield tokens, NO_UNIT, 0
    if tokens[0].is_("$", "€", "£", "¥") and tokens[1:]:
        yield from _money(tokens[1:], tokens[0].text)
        return
    if tokens[0].is_("-") and tokens[2:] and tokens[1].is_("$"):
        yield from _money((tokens[0], *tokens[2:]), "$")
        return
    fraction = next((i for i, t in enumerate(tokens) if t.is_("frac") and i > 0), 0)
    if fraction and tokens[fraction + 1 : fraction + 2] and tokens[fraction + 1].is_("{"):  # m over s
        middle = matching(tokens, fraction + 1)
        above, below = tokens[fraction + 2 : middle], tokens[middle + 2 : -1]
        if tokens[-1].is_("}") and above and below and _names_unit(above[0]) and _names_unit(below[0]):
            found = read_unit(_spelled(above) + "/" + _spelled(below))
            if found is not None and found[0]:
                yield tokens[:fraction], *found
    start = len(tokens)
    while start > 1 and _may_be_unit(tokens, start - 1):
        start -= 1
    while start < len(tokens) and not _starts_unit(tokens, start):
        start += 1
    if start == len(tokens):
        return
    head, tail = tokens[:start], tokens[start:]
    found = read_unit(_spelled(tail))
    if found is None or (not found[0] and not found[1] and not SKIPPED.issuperset(_spelled(tail).split())):
        return
    yield head, *found


def _names_unit(token: Token) -> bool:
    return token.kind in ("text", "word") or (token.kind == "sym" and token.text in "mshgl")


def _spelled(tail: Tokens) -> str:
    """Return what stands behind a number as words, signs and exponents."""
    powers = any(t.is_("^") for t in tail)
    silent = ("{", "}", "cdot", "(", ")") if powers else ("{", "}", "cdot", "(", ")", "-")
    words = "".join(" " + t.text if t.kind in ("text", "word", "sym") else "" if t.is_(*silent) else t.text for t in tail)
    return words.replace("^circ", " degree ")


def _money(tokens: Tokens, sign: str) -> Iterator[tuple[Tokens, Unit, int]]:
    base = frozenset({({"€": "eur", "£": "gbp", "¥": "yen"}.get(sign, "$"), 1)})
    yield tokens, base, 0
    for head, unit, scale in list(_units(tokens))[1:]:
        if not unit:
            yield head, base, scale
        elif unit == base:
            yield head, unit, scale
        else:
            yield head, unit | base, scale


def _may_be_unit(tokens: Tokens, index: int) -> bool:
    token = tokens[index]
    if token.kind == "text":
        return not any(c.isdigit() for c in token.text)
    if token.kind == "word":
        return known(token.text) or len(token.text) > 3
    if token.kind == "sym":
        before = tokens[index - 1]
        return (
            known(token.text)
            and (token.spaced or before.is_("/", "circ", "}"))
            and not before.is_("+", "-", "*", "^", "cdot", "_")
        )
    if token.kind == "num":  # an exponent
        return tokens[index - 1].is_("^", "-") or (tokens[index - 1].is_("{") and index > 1 and tokens[index - 2].is_("^"))
    return token.is_("%", "$", "€", "£", "¥", "^", "/", "{", "}", "circ", "cdot", "-", "(", ")")


def _starts_unit(tokens: Tokens, index: int) -> bool:
    token = tokens[index]
    degrees = token.is_("^") and any(t.is_("circ") for t in tokens[index : index + 3])
    wordy = token.kind in ("text", "word") or (token.kind == "sym" and known(token.text) and token.spaced)
    return degrees or wordy or token.is_("%", "$", "€", "£", "¥")
