r"""LaTeX to plain text as the paper's training reward sees it, losses included.

The reward goes through pylatexenc (phfaist/pylatexenc:pylatexenc/latex2text), a converter for full-text search. What it
keeps decides verdicts, so the facts are reproduced here as measured with version 2.11, for the mathematics of answers:
fractions lose their parentheses (``\frac{x+1}{2}`` becomes ``x+1/2``), roots their index, unknown macros disappear and
leave their arguments, braces that only group disappear.
"""

import re
import unicodedata

_TOKEN = re.compile(r"\\(?:[a-zA-Z]+\s*|.)|[{}]|[^\\{}]+|\\", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|smallmatrix|array)\}(?:\{[lcr|]*\})?(.*?)\\end\{\1\}", re.DOTALL)
_SYMBOLS = {
    **{
        "cdot": "·",
        "times": "\u00d7",
        "div": "÷",
        "pm": "±",
        "mp": "∓",
        "cup": "\u222a",
        "cap": "∩",
        "infty": "∞",
        "circ": "∘",
    },
    **{"leq": "≤", "le": "≤", "geq": "≥", "ge": "≥", "neq": "≠", "approx": "≈", "equiv": "≡", "in": "∈", "notin": "∉"},
    **{"to": "→", "rightarrow": "→", "leftarrow": "←", "emptyset": "∅", "angle": "∠", "ldots": "…", "dots": "…"},
    **{"lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "mid": "|", "prime": "'", "quad": "  ", "qquad": "    "},
    **{name: name for name in ("ln", "log", "exp", "sin", "cos", "tan", "arcsin", "arccos", "arctan", "max", "min")},
    **{",": " ", ":": "  ", ";": "  ", " ": " ", "!": "", "\\": "\n"},
    **{character: character for character in "%$#&_{}"},
}
_FRACTIONS = ("frac", "nicefrac", "textfrac")
_MAX_DEPTH = 50


def plain_text(latex: str) -> str:
    r"""Return the text that is left of a piece of LaTeX.

    Raises:
        ValueError: Braces that do not match, or groups nested more than 50 deep.

    >>> plain_text(r"-\frac{2}{3}\pi \sqrt[3]{x^{2}}")
    '-2/3π√(x^2)'
    """
    latex = _MATRIX.sub(lambda match: "[ " + match[2].replace(r"\\", ";").replace("&", " ") + " ]", latex)
    reader = _Reader(_TOKEN.findall(latex))
    text = reader.group(depth=0)
    if reader.tokens:
        raise ValueError("a closing brace without its opening one")
    return text


class _Reader:
    """The tokens that are still to be read, last one first."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens[::-1]

    def group(self, depth: int) -> str:
        """Return the text up to the closing brace of this group, which stays, or to the end."""
        parts: list[str] = []
        while self.tokens and self.tokens[-1] != "}":
            parts.append(self._one(depth))
        return "".join(parts)

    def _one(self, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        token = self.tokens.pop()
        if token == "{":
            text = self.group(depth + 1)
            if not self.tokens:
                raise ValueError("an opening brace without its closing one")
            self.tokens.pop()
            return text
        if not token.startswith("\\"):
            return token
        name = token[1:].strip() or token[1:]
        if name in _FRACTIONS:
            return f"{self._argument(depth)}/{self._argument(depth)}"
        if name == "sqrt":
            if self.tokens and self.tokens[-1].startswith("["):
                _, bracket, rest = self.tokens.pop().partition("]")
                self.tokens += [rest] if rest else []
                if not bracket:
                    raise ValueError("a root's index that is no plain text")
            return f"√({self._argument(depth)})"
        if name == "mbox":
            self._argument(depth)
            return ""
        if name in _SYMBOLS:
            return _SYMBOLS[name]
        try:
            return unicodedata.lookup(f"GREEK {'SMALL' if name[:1].islower() else 'CAPITAL'} LETTER {name.upper()}")
        except KeyError:
            return ""  # what follows in braces stays, as text

    def _argument(self, depth: int) -> str:
        """Return the text of a macro's argument: a group, a macro, or one character."""
        while self.tokens and self.tokens[-1].isspace():
            self.tokens.pop()
        if not self.tokens or self.tokens[-1] == "}":
            raise ValueError("a macro without its argument")
        if not self.tokens[-1].startswith(("{", "\\")):
            token = self.tokens.pop().lstrip()
            self.tokens += [token[1:]] if token[1:] else []
            return token[0]
        return self._one(depth + 1)
