r"""From normalized text to tokens: numbers with their exact value, symbols, commands, and text that is not mathematics."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal

from rlvr_lightning.grading.math.units import known

Kind = Literal["num", "sym", "word", "text", "cmd", "begin", "end", "punc"]

FUNCTIONS = frozenset(
    (
        "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech csch ln log lg "
        "exp cis sqrt cbrt abs floor ceil asin acos atan arsinh arcosh artanh"
    ).split()
)
_CONSTANTS = {
    "pi": "pi",
    "Pi": "pi",
    "PI": "pi",
    "infinity": "infty",
    "Infinity": "infty",
    "infty": "infty",
    "inf": "infty",
    "oo": "infty",
}
_TEXT_COMMANDS = frozenset(
    (
        "text textrm textbf textit textsf texttt textup textnormal mbox hbox mathrm mathbf mathit mathsf mathtt "
        "mathnormal emph operatorname bold pmb underline uline textsc"
    ).split()
)
_OPENERS = frozenset(["(", "[", "{", "lbrace", "langle", "lfloor", "lceil"])
_CLOSERS = frozenset([")", "]", "}", "rbrace", "rangle", "rfloor", "rceil"])
MAX_TOKENS = 1500
_MAX_DIGITS = 2000

_NUMBER = (
    r"(?:\d{1,3}(?:,\d{3})+(?![\d])|(?<![_^])\d{1,3}(?: \d{3})+(?![\d/]))(?:\.\d+)?"
    r"|\d*\.\d*\s*\\(?:overline|bar|dot)\s*(?:\{\d+\}|\d)"
    r"|\d+(?:\.\d+)?[eE][+-]?\d{1,4}(?![A-Za-z\d.^{])"
    r"|\d+\.\d+|\d+\.(?!\.)|\d+|\.\d+"
)
_TOKEN = re.compile(
    rf"(?P<num>{_NUMBER})"
    r"|\\(?P<cmd>[A-Za-z]+)\*?"
    r"|(?P<word>[A-Za-z]+)"
    r"|\\(?P<esc>[$%])|(?P<dots>\.\.\.+|\u2026)|(?P<punc>[^\s\\])|(?P<space>\s+)"
)
_LETTERS = re.compile(r"\(?[A-Z]+\)?(?:(?:,| and|, and| or) \(?[A-Z]+\)?)+|[a-zA-Z](?: ?[-+*/^=<>] ?[a-zA-Z0-9])+")
_DOLLAR = re.compile(r"(?<!\\)\$")
_CODE_NUMERAL = re.compile(r"(?<![\w.])0[xXbBoO][0-9A-Fa-f]")
_ARGUMENT = re.compile(r"\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|\s*([A-Za-z])(?![A-Za-z])")
_REPEATING = re.compile(r"(\d*)\.(\d*)\s*\\(?:overline|bar|dot)\s*\{?(\d+)\}?")


class Unparsable(ValueError):
    """The text is no answer of the kind that was tried."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token; equal tokens read the same, wherever they stand."""

    kind: Kind
    text: str
    value: Fraction | None = None
    """Exact value of a number."""
    spaced: bool = False
    """White space stands before it."""

    def is_(self, *texts: str) -> bool:
        """Return whether this is one of these commands or signs."""
        return self.kind in ("cmd", "punc") and self.text in texts


Tokens = tuple[Token, ...]


def tokenize(text: str, *, grouped: bool = True) -> Tokens:
    """Return the tokens of normalized text.

    Args:
        text: as :func:`.normalize.normalize` returns it.
        grouped: read ``1,234`` as one number; False: as two.

    Raises:
        Unparsable: if there are too many, or one that mathematics does not have.
    """
    tokens: list[Token] = []
    position, spaced = 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) > MAX_TOKENS or _CODE_NUMERAL.match(text, position):
            raise Unparsable(text[position : position + 20])
        position = match.end()
        kind, found = match.lastgroup, match[match.lastgroup or 0]
        if kind == "space":
            spaced = True
            continue
        if kind == "num":
            if not grouped and "," in found:
                first = found.index(",")
                found, position = found[:first], match.start() + first
            tokens.append(Token("num", found, _number(found), spaced))
        elif kind == "cmd" and (found in _TEXT_COMMANDS or found in ("begin", "end", "mathbb", "mathcal")):
            argument = _ARGUMENT.match(text, position)
            if argument is None:
                if found == "mathbb":
                    raise Unparsable(found)
                continue  # a font switch such as {\mathbf ...
            position = argument.end()
            content = argument[1] if argument[1] is not None else argument[2]
            behind = bool(tokens) and (tokens[-1].kind in ("num", "text") or tokens[-1].is_("}", ")", "pi"))
            behind = behind or (len(tokens) > 1 and tokens[-1].is_("cdot", "/") and tokens[-2].kind == "text")
            if behind and len(content.strip()) == 1 and known(content.strip()):  # upright behind a number: a unit
                tokens.append(Token("text", content.strip(), spaced=True))
            else:
                tokens += _text(found, content, spaced or content[:1].isspace(), grouped)
        elif kind == "word":
            tokens += _letters(found, spaced)
        elif kind == "esc":
            tokens.append(Token("cmd", found, spaced=spaced))
        elif kind == "dots":
            tokens.append(Token("cmd", "...", spaced=spaced))
        elif kind == "cmd":
            tokens.append(Token("cmd", found, spaced=spaced))
        else:
            tokens.append(Token("cmd" if found == "%" else "punc", found, spaced=spaced))
        spaced = False
    return tuple(tokens)


def matching(tokens: Tokens, start: int) -> int:
    """Return the index of the bracket that closes the one at ``start``; any closer closes any opener, as in ``[1, 2)``."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += _nesting(tokens[index])
        if depth == 0:
            return index
    return -1


def split(tokens: Tokens, separates: Callable[[Token], bool]) -> list[Tokens]:
    """Cut tokens at separators outside every bracket."""
    parts: list[Tokens] = []
    depth = start = 0
    for index, token in enumerate(tokens):
        depth += _nesting(token)
        if depth == 0 and separates(token):
            parts.append(tokens[start:index])
            start = index + 1
    return [*parts, tokens[start:]]


def is_balanced(text: str) -> bool:
    """Return whether normalized text can be cut into tokens and every bracket in it closes: then its spelling can be met."""
    try:
        tokens = tokenize(text)
    except Unparsable:
        return False
    depths = list(accumulate(map(_nesting, tokens), initial=0))
    return bool(tokens) and depths[-1] == 0 and min(depths) == 0


def says(token: Token, *words: str) -> bool:
    """Return whether a token is one of these words, in text or as a command."""
    return (token.kind in ("text", "word") and token.text.lower().strip(" ,") in words) or token.is_(*words)


def _nesting(token: Token) -> int:
    if token.is_(*_OPENERS) or token.kind == "begin":
        return 1
    return -1 if token.is_(*_CLOSERS) or token.kind == "end" else 0


def _text(command: str, content: str, spaced: bool, grouped: bool) -> list[Token]:
    r"""Return the tokens of ``\text{content}`` and its like; what is mathematics in disguise is read as such."""
    if command in ("begin", "end"):
        return [Token(command, content.strip(), spaced=spaced)]
    if command == "mathbb":
        return [Token("cmd", "mathbb" + content.strip(), spaced=spaced)]
    words = " ".join(_DOLLAR.sub(" ", content).split())
    bare = words.strip("() ")
    as_mathematics = (
        not re.search("[A-Za-z]", words)
        or re.search(r"\d|\\", words)
        or _LETTERS.fullmatch(words)
        or (len(bare) == 1 and bare.isalpha())
    )
    if as_mathematics or (bare in FUNCTIONS and bare not in ("sec", "arcsec", "floor")) or bare in _CONSTANTS:
        inner = tokenize(words, grouped=grouped)
        return [Token(t.kind, t.text, t.value, spaced if i == 0 else t.spaced) for i, t in enumerate(inner)]
    letter = re.fullmatch(r"\(([A-Z])\)\s*(.*)|([A-Z])[.)]\s*(.*)", words)
    if letter:  # (C), or (C) with what it stands for
        rest = letter[2] or letter[4]
        choice = [Token("punc", "("), Token("sym", letter[1] or letter[3]), Token("punc", ")")]
        return [*choice, *([Token("text", rest, spaced=True)] if rest else [])]
    return [Token("text", words, spaced=spaced)] if words else []


def _letters(run: str, spaced: bool) -> list[Token]:
    """Return the tokens of a run of letters outside any command."""
    if run in FUNCTIONS:
        return [Token("cmd", run, spaced=spaced)]
    if run in _CONSTANTS:
        return [Token("cmd", _CONSTANTS[run], spaced=spaced)]
    if len(run) == 1:
        return [Token("sym", run, spaced=spaced)]
    for name in ("sin", "cos", "tan", "ln", "log", "sqrt", "pi"):
        if run.startswith(name) and len(run) == len(name) + 1:
            return [Token("cmd", name, spaced=spaced), Token("sym", run[-1])]
    return [Token("word", run, spaced=spaced)]


def _number(text: str) -> Fraction:
    if len(text) > _MAX_DIGITS:
        raise Unparsable("too many digits")
    repeating = _REPEATING.fullmatch(text)
    if repeating:
        whole, fixed, period = repeating[1] or "0", repeating[2], repeating[3]
        tail = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
        return Fraction(f"{whole}.{fixed or '0'}") + tail
    plain = text.replace(",", "").replace(" ", "")
    return Fraction(plain + "0" if plain.endswith(".") else plain)
