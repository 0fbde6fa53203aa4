r"""From the text of an answer to everything that it may mean.

Structure first (alternatives, lists, brackets, relations), then what is between: a number with a unit, an expression, words.
A text may have several readings, such as the point and the interval ``(1, 2)``; each is tried on its own.
"""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import product

from rlvr_lightning.grading.math.answers import (
    REALS,
    Bag,
    Matrix,
    Named,
    Piece,
    Readings,
    Region,
    Tuple,
    Value,
    Word,
    interval_between,
    same,
    union,
    without,
)
from rlvr_lightning.grading.math.expression import parse
from rlvr_lightning.grading.math.quantities import ratio, value
from rlvr_lightning.grading.math.relations import implication, intersection, membership, relation
from rlvr_lightning.grading.math.tokens import Tokens, Unparsable, matching, says, split, tokenize
from rlvr_lightning.grading.math.tree import Expr, num, uses
from rlvr_lightning.grading.math.units import MISLEADING, STOP_WORDS
from rlvr_lightning.grading.math.words import based, choices, clocks, of_tokens, words

_STRUCTURAL = frozenset("Rightarrow , ; in = approx sim < > le ge ne equiv vee lor wedge land".split())
_MAX_DEPTH = 12
_SIGNS = frozenset(["+", "-", "*", "/", "<", ">", "=", r"\times", r"\cdot", r"\le", r"\ge", r"\ne", r"\approx", r"\pm"])
_DECIMAL = re.compile(r"-?\d{1,50}(?:\.\d{1,50})?", re.ASCII)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|operatorname)\s*\{([^{}]*)\}")
_PREFIX = re.compile(
    r"(?:the )?(?:final )?(?:answer|result|solution|value|point|pair|option|choice)s?(?: is| are| equals)?:?|both|either"
    r"|there are|exactly|about|approximately|therefore|thus|is|so"
    r"|[a-z ]{1,40}(?::| is| are| equals)"
)
_SENTENCE = re.compile(r"([A-Za-z][A-Za-z ]*(?: is| are| equals|:)|[Ee]xactly)\s+(-?[\d(\\].*)")
_HARMLESS = frozenset(["is", "approximately", "about", "for", "either", "point"])
_MATRICES = ("matrix", "pmatrix", "bmatrix", "Bmatrix", "vmatrix", "Vmatrix", "smallmatrix", "array")


@lru_cache(4096)
def read(text: str) -> Readings:
    """Return every meaning of a normalized text; empty if it has none.

    Errors of the grammar are no errors here: what cannot be read in one way may be read in another.
    """
    if _DECIMAL.fullmatch(text):  # what most answers are
        return (Value(num(Fraction(text))),)
    plain = _TEXT.sub(r" \1 ", text).replace("$", " ")
    plain = " ".join(plain.split())
    if _SENTENCE.fullmatch(plain) and _introduces(_SENTENCE.sub(r"\1", plain)):  # The answer is 15
        return read(_SENTENCE.sub(r"\2", plain))
    if text in _SIGNS:  # which operation is it?
        return (Word(text),)
    if numeral := tuple(based(plain)):
        return numeral
    readings = [*choices(plain), *clocks(plain)]
    for grouped in _groupings(text):
        try:
            tokens = tokenize(text, grouped=grouped)
        except Unparsable:
            continue
        readings += _read(tokens, 0)
        if grouped and any(isinstance(v, Value) for r in readings for v in (r.value if isinstance(r, Named) else (r,))):
            break
    if not any(isinstance(r, Value) and r.unit for r in readings):
        readings += words(plain, as_text=plain != text)
    return tuple(dict.fromkeys(readings))


def _groupings(text: str) -> tuple[bool, ...]:
    """Return whether ``1,250`` may be one number (True) or two (False); in brackets it is two."""
    if not re.search(r"\d,[1-9]\d\d", text):
        return (True,)
    return (False,) if text[0] in "([" and text[-1] in ")]" else (True, False)


def _read(tokens: Tokens, depth: int) -> Readings:
    """Return every meaning of some tokens."""
    tokens = _without_condition(_bare(tokens))
    if not tokens or depth > _MAX_DEPTH:
        return ()

    def inner(part: Tokens) -> Readings:
        return _read(part, depth + 1)

    structures = (implication, _alternatives, _list, membership, relation)
    if any(t.text in _STRUCTURAL or t.kind in ("text", "word") for t in tokens):
        for structure in structures:
            readings = structure(tokens, inner)
            if readings is not None:
                return readings
    return (
        *_brackets(tokens, inner),
        *_unions(tokens, inner),
        *_matrix(tokens),
        *ratio(tokens),
        *value(tokens),
        *of_tokens(tokens),
    )


def _bare(tokens: Tokens) -> Tokens:
    """Return the tokens without what stands around an answer: a group, a leading sign of relation, "the answer is"."""
    while tokens:
        first = tokens[0]
        if first.is_("=", "approx", "sim", ":", "therefore") or (
            first.kind in ("text", "word") and tokens[1:] and _introduces(first.text)
        ):
            tokens = tokens[1:]
        elif tokens[-1].is_(",", ".", ";", ":"):
            tokens = tokens[:-1]
        elif first.is_("{") and matching(tokens, 0) == len(tokens) - 1:
            tokens = tokens[1:-1]
        else:
            break
    return tokens


def _without_condition(tokens: Tokens) -> Tokens:
    r"""Return the tokens before a clause that says for which values: ``, k \in \mathbb{Z}``, "for all x", "where ..."."""
    for index, token in enumerate(tokens[1:], start=1):
        said = token.text.lower().split() if token.kind in ("text", "word") else []
        if said[:1] in (["for"], ["where"]) or token.is_("forall"):
            clause = tokens[index + 1 :]
            words = {w for t in (token, *clause) if t.kind in ("text", "word") for w in t.text.lower().split()}
            cases = any(t.is_(",", ";") for t in clause) or words & {"if", "otherwise", "and", "or", "even", "odd"}
            return tokens if cases or words & (STOP_WORDS - {"for", "where", "is"}) else _bare(tokens[:index])
    if len(tokens) > 4 and tokens[-2].is_("in") and tokens[-1].kind == "cmd" and tokens[-1].text.startswith("mathbb"):
        bounded = any(t.is_("<", ">", "le", "ge", "ne") for t in tokens) and not tokens[-1].is_("mathbbR")
        if tokens[-4].is_(",", ";") and not bounded:
            return _bare(tokens[:-4])
    return tokens


def _introduces(text: str) -> bool:
    """Return whether words in front of an answer say no more than that it is one."""
    text = text.lower().strip()
    return bool(_PREFIX.fullmatch(text)) and not MISLEADING & (set(re.findall("[a-z]+", text)) - _HARMLESS)


def _alternatives(tokens: Tokens, inner: Callable[[Tokens], Readings]) -> Readings | None:
    """Read ``A or B``: one answer if both say the same, a union of intervals, or a list."""
    parts = split(tokens, lambda t: says(t, "or", "OR", "vee", "lor"))
    if len(parts) == 1:
        return None
    items = [inner(p) for p in parts]
    if all(items) and all(same(items[0], item) for item in items[1:]):  # 4/3 or 8/6
        return items[0]
    return _joined(items, both=False)


def _list(tokens: Tokens, inner: Callable[[Tokens], Readings]) -> Readings | None:
    """Read ``A, B and C``."""
    parts = split(tokens, lambda t: t.is_(",", ";") or says(t, "and", "wedge", "land"))
    parts = [p for p in parts if p]
    if len(parts) == 1:
        return None
    commas = not any(says(t, "and", "wedge", "land") for t in tokens)
    return _joined([inner(p) for p in parts], both=True, commas=commas)


def _joined(items: list[Readings], *, both: bool, commas: bool = False) -> Readings:
    if len(items) < 2 or not all(items):
        return ()
    regions = [next((r for r in item if isinstance(r, Region)), None) for item in items]
    if not both and any(regions):
        regions = [region or _as_points(item) for region, item in zip(regions, items, strict=True)]
    readings: list[Region | Bag] = [Bag(tuple(_flat(items)))]
    known_regions = [r for r in regions if r is not None]
    names = {r.name for r in known_regions} - {""}
    if len(known_regions) == len(items) and len(names) < 2:
        name = next(iter(names), "")
        if name:  # conditions on one variable are one condition
            readings = []
        try:
            if both and not name:  # points, not intervals
                pass
            elif both:
                result = known_regions[0]
                for region in known_regions[1:]:
                    result = intersection(result, region)
                if result.pieces:
                    readings.append(result)
                elif commas:  # x < -1, x > 1
                    readings.append(union([p for r in known_regions for p in r.pieces], name))
            else:
                readings.append(union([p for r in known_regions for p in r.pieces], name))
        except TypeError:  # symbolic ends
            pass
    return tuple(readings)


def _as_points(item: Readings) -> Region | None:
    """Return a single value, with or without a name, or a set of them as degenerate intervals."""
    for reading in item:
        name, values = (reading.name, reading.value) if isinstance(reading, Named) else ("", (reading,))
        found = next((v for v in values if isinstance(v, Value | Bag)), None)
        if isinstance(found, Value):
            return Region((Piece(found.expr, found.expr, True, True),), name)
        if isinstance(found, Bag) and (region := _as_region(found)) is not None:
            return Region(region.pieces, name)
    return None


def _flat(items: list[Readings]) -> Iterator[Readings]:
    r"""Put the two values of a ``\pm`` among the other elements."""
    for item in items:
        if _two_values(item) and isinstance(item[0], Bag):
            yield from item[0].items
        elif (named := next((r for r in item if isinstance(r, Named) and _two_values(r.value)), None)) is not None:
            yield from ((Named(named.name, value),) for bag in named.value if isinstance(bag, Bag) for value in bag.items)
        else:
            yield item


def _two_values(item: Readings) -> bool:
    return len(item) == 1 and isinstance(item[0], Bag) and not item[0].is_set


def _brackets(tokens: Tokens, inner: Callable[[Tokens], Readings]) -> Iterator[Bag | Tuple | Region]:
    """Read sets, tuples and intervals."""
    if tokens[0].kind == "sym" and tokens[0].text.isupper() and tokens[1:] and tokens[1].is_("("):
        tokens = tokens[1:] if any(t.is_(",") for t in tokens) else tokens  # A(3, 4) is a point
    if not tokens[0].is_("(", "[", "lbrace", "langle") or matching(tokens, 0) != len(tokens) - 1:
        return
    opener, closer = tokens[0].text, tokens[-1].text
    if (opener == "lbrace") != (closer == "rbrace"):
        return
    parts = split(tokens[1:-1], lambda t: t.is_(",", ";"))
    if opener == "lbrace":
        if parts == [()]:
            yield Bag((), is_set=True)
            return
        described = split(tokens[1:-1], lambda t: t.is_("|", ":"))
        if len(described) == 2:  # {x | x > 3}
            element = described[0]
            if len(element) == 1 or (len(element) == 3 and element[1].is_("in") and element[2].is_("mathbbR")):
                yield from (r for r in inner(described[1]) if isinstance(r, Region) and r.name in ("", element[0].text))
            return
        items = [inner(p) for p in parts]
        if all(items):
            yield Bag(tuple(_flat(items)), is_set=True)
        return
    if len(parts) < 2:
        return
    items = [inner(p) for p in parts]
    if all(items):
        kind = {"(": "(", "[": "[", "langle": "("}[opener] + {")": ")", "]": "]", "rangle": ")"}.get(closer, closer)
        if any(_two_values(item) for item in items):  # (0, \pm 2) is two points
            values = [item[0].items if _two_values(item) and isinstance(item[0], Bag) else (item,) for item in items]
            if any(t.is_("mp") for t in tokens):  # tied together, first with first
                values = [v * 2 if len(v) == 1 else v for v in values]
            points = zip(*values, strict=False) if any(t.is_("mp") for t in tokens) else product(*values)
            yield Bag(tuple((Tuple(kind, choice),) for choice in points))
        else:
            yield Tuple(kind, tuple(items))
    if len(parts) == 2 and opener in "([" and closer in ")]":
        try:
            low, high = parse(parts[0]), parse(parts[1])
        except Unparsable:
            return
        interval = interval_between(low, high, opener == "[", closer == "]")
        if interval is not None and not uses(low, "pm", "mp") and not uses(high, "pm", "mp"):
            yield interval


def _unions(tokens: Tokens, inner: Callable[[Tokens], Readings]) -> Iterator[Region | Bag]:
    r"""Read ``A \cup B``, the real line, and either without some points."""
    if len(tokens) == 1 and tokens[0].is_("mathbbR"):
        yield REALS
    if len(tokens) == 1 and tokens[0].is_("emptyset"):
        yield Region(())
    minus = split(tokens, lambda t: t.is_("setminus", "-"))
    if len(minus) == 2 and minus[1] and minus[1][0].is_("lbrace"):
        whole = next((r for r in inner(minus[0]) if isinstance(r, Region)), None)
        points = next((r for r in inner(minus[1]) if isinstance(r, Bag)), None)
        if whole and points:
            exprs = [v.expr for item in points.items for v in item[:1] if isinstance(v, Value)]
            if len(exprs) == len(points.items):
                yield without(whole, exprs)
        return
    parts = split(tokens, lambda t: t.is_("cup") or (t.kind == "sym" and t.text == "U"))
    if len(parts) > 1 and all(parts):
        regions = [next((_as_region(r) for r in inner(p) if isinstance(r, Region | Bag)), None) for p in parts]
        if all(regions):
            yield union([p for r in regions if r for p in r.pieces])
        bags = [next((r for r in inner(p) if isinstance(r, Bag) and r.is_set), None) for p in parts]
        if all(bags):
            yield Bag(tuple(i for b in bags if b for i in b.items), is_set=True)


def _as_region(answer: Region | Bag) -> Region | None:
    """Return a region, or a set of numbers as one."""
    if isinstance(answer, Region):
        return answer
    points = [v.expr for item in answer.items for v in item[:1] if isinstance(v, Value)]
    return Region(tuple(Piece(p, p, True, True) for p in points)) if len(points) == len(answer.items) else None


def _matrix(tokens: Tokens) -> Iterator[Matrix]:
    start = next((i for i, t in enumerate(tokens) if t.kind == "begin"), 0)
    if start and tokens[0].kind != "begin" and not tokens[0].is_("(", "["):  # a factor in front
        front = tokens[: start - tokens[start - 1].is_("cdot", "times", "*")]
        try:
            factor = num(-1) if len(front) == 1 and front[0].is_("-") else parse(front)
        except Unparsable:
            return
        for matrix in _matrix(tokens[start:]):
            if matrix.determinant:
                continue
            yield Matrix(tuple(tuple(Expr("mul", (factor, e)) for e in row) for row in matrix.rows), matrix.determinant)
        return
    if tokens[0].kind != "begin" or tokens[0].text not in _MATRICES or matching(tokens, 0) != len(tokens) - 1:
        bracketed = (
            len(tokens) > 2 and tokens[0].is_("(", "[") and tokens[1].kind == "begin" and matching(tokens, 0) == len(tokens) - 1
        )
        if bracketed:
            yield from _matrix(tokens[1:-1])
        return
    body = tokens[1:-1]
    if tokens[0].text == "array" and body and body[0].is_("{"):
        body = body[matching(body, 0) + 1 :]
    rows = [row for row in split(tuple(t for t in body if not t.is_("hline")), lambda t: t.is_("cr")) if row]
    try:
        entries = tuple(tuple(parse(cell) for cell in split(row, lambda t: t.is_("&"))) for row in rows)
    except Unparsable:
        return
    yield Matrix(entries, determinant=tokens[0].text in ("vmatrix", "Vmatrix"))
