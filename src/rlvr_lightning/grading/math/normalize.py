r"""One spelling for everything that looks the same on paper: Unicode to LaTeX, layout commands out, one name per command.

What comes out is still text; :mod:`.tokens` reads it. Every step is linear in the length.
"""

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₓₙ", "0123456789+-()axn", strict=True))
_FRACTIONS = {
    char: r"\frac{" + unicodedata.normalize("NFKC", char).replace("\u2044", "}{") + "}" for char in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
_GREEK = {
    chr(code): "\\" + unicodedata.name(chr(code)).rsplit(" ", 1)[-1].lower().replace("lamda", "lambda") + " "
    for code in (*range(0x3B1, 0x3C2), *range(0x3C3, 0x3CA))
    if code != 0x3BF
}
_CAPITALS = {
    c: f"\\{n} " for c, n in zip("ΓΔΘΛΞΠΣΦΨΩ", "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split(), strict=True)
}
_SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\u2015\ufe63\uff0d", "-"),
    **dict.fromkeys("×✕✖⨯", r"\times "),
    **dict.fromkeys("·⋅∙•∗", r"\cdot "),
    **dict.fromkeys("÷", "/"),
    **dict.fromkeys("ÅÅ", r" \text{angstrom}"),
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("≤⩽≦", r"\le "),
    **dict.fromkeys("≥⩾≧", r"\ge "),
    **dict.fromkeys("≈≃≅", r"\approx "),
    **dict.fromkeys("∅⌀Ø", r"\emptyset "),
    **dict.fromkeys("°˚º", r"^{\circ}"),
    **dict.fromkeys("′\u2019\u2018", "'"),
    "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∞": r"\infty ",
    "π": r"\pi ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ",
    "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ", "∠": r"\angle ", "→": r"\to ", "⇒": r"\Rightarrow ", "″": "''",
    "∶": ":", "\u2261": r"\equiv ", "ϕ": r"\phi ", "ϵ": r"\epsilon ", "\xa0": " ",
}  # fmt: skip
_TABLE = str.maketrans(_FRACTIONS | _GREEK | _CAPITALS | _SIGNS)
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]")

_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_LAYOUT = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|tt|sf|hfill|break|newline"
    r"|mathstrut|strut|tiny|small|normalsize|large|Large|LARGE|huge|Huge|nonumber|notag|boldsymbol|bm|mathopen|mathclose|ensuremath|displaylimits)(?![A-Za-z])\s*(?:\.(?!\d))?"
)
_SPACES = re.compile(
    r"\\(?:[,;: >/]|quad(?![A-Za-z])|qquad(?![A-Za-z])|thinspace|enspace|hspace\*?\{[^{}]*\}|[hv]?phantom\{[^{}]*\})|~"
)
_RENAMED = (
    (re.compile(r"\\(?:[dtc]|nice|s|x)frac(?![A-Za-z])"), r"\\frac"),
    (
        re.compile(
            r"\\(?:vspace|hskip|vskip|tag|label|phantom)\*?\s*\{[^{}]*\}|\\(?:checkmark|qed|blacksquare|square|Box)(?![A-Za-z])"
        ),
        " ",
    ),
    (re.compile(r"\\colorbox\s*\{[^{}]*\}"), " "),
    (re.compile(r"\\fbox(?![A-Za-z])"), " "),
    (re.compile(r"\\mathring\s*\{\s*A\s*\}|\\AA(?![A-Za-z])"), r" \\text{angstrom}"),
    (re.compile(r"(?<=[\d}])\s*(?:\\,|\s)*\\mu\s*\\(?:text|mathrm)\s*\{\s*m\s*\}"), r" \\text{micrometer}"),
    (re.compile(r"(?<=\d)\s+\\Omega(?![A-Za-z])"), r" \\text{ohm}"),
    (
        re.compile(
            r"(?<=\d)\^\s*(?:\{\s*(?:\\(?:text|mathrm)\s*\{\s*o\s*\}|o)\s*\}|\\(?:text|mathrm)\s*\{\s*o\s*\}|o(?![a-z]))"
        ),
        r"^{\\circ}",
    ),
    (re.compile(r"(?<=\d)\^\s*\{?\s*\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?|(?<=\d)(?:st|nd|rd|th)\b"), r" "),
    (
        re.compile(
            r"\\begin\s*\{(?:aligned|align\*?|gathered|split|equation\*?)\}|\\end\s*\{(?:aligned|align\*?|gathered|split|equation\*?)\}"
        ),
        " ",
    ),
    (re.compile(r"&\s*="), "="),
    (re.compile(r"\{\}\s*\^"), "^"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant|leqq)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant|geqq)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"(?<=[a-z\s])!=\s"), r"\\ne "),
    (re.compile(r"\\bigcup(?![A-Za-z])"), r"\\cup "),
    (
        re.compile(
            r"\\pmod\s*(?:\{\s*(\w+)\s*\}|(\w))|\(?\s*(?:\\bmod|\\text\s*\{\s*mod\s*\}|\\mod|\bmod\b)\s*\{?(\w+)\}?\s*\)?"
        ),
        r"\\pmod{\1\2\3}",
    ),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\(?:approxeq|simeq|thickapprox|doteq)(?![A-Za-z])"), r"\\approx"),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:rightarrow|longrightarrow)(?![A-Za-z])"), r"\\to"),
    (re.compile(r"\\(?:implies|Longrightarrow|therefore|iff)(?![A-Za-z])"), r"\\Rightarrow"),
    (re.compile(r"\\var(epsilon|phi|theta|rho)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\(?:ldots|cdots|dotsc|dotsb|dots)(?![A-Za-z])"), "..."),
    (re.compile(r"\\lbrace(?![A-Za-z])|\\\{"), r"\\lbrace "),
    (re.compile(r"\\rbrace(?![A-Za-z])|\\\}"), r"\\rbrace "),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}"), " "),
    (re.compile(r"\\lbrack(?![A-Za-z])"), "["),
    (re.compile(r"\\rbrack(?![A-Za-z])"), "]"),
    (re.compile(r"\\(?:[lr]?vert|mid)(?![A-Za-z])|\\\|"), "|"),
    (re.compile(r"\\(?:ast|star)(?![A-Za-z])|\*{1,2}(?=\s*\^)"), r"\\cdot "),
    (re.compile(r"\\degree(?:s)?(?![A-Za-z])|\\textdegree(?![A-Za-z])"), r"^{\\circ}"),
    (re.compile(r"\\(?:slash|div)(?![A-Za-z])"), "/"),
    (re.compile(r"\\colon(?![A-Za-z])|\\?:(?==)"), ":"),
    (re.compile(r"\\prime(?![A-Za-z])"), "'"),
    (re.compile(r"\\backslash(?![A-Za-z])"), r"\\setminus "),
    (re.compile(r"\\Re(?:als)?(?![A-Za-z])|\\R(?![A-Za-z])"), r"\\mathbb{R}"),
    (re.compile(r"\\#"), "#"),
    (re.compile(r"\\_"), "_"),
    (re.compile(r"\\&"), r"\\text{and}"),
)
_DELIMITERS = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]]")
_GROUPING = re.compile(r"(?<=\d)\s*(?:\{,\}|,\\!|\\!,|\{,\}\\!)\s*(?=\d{3})")
_THIN = re.compile(r"(?<![_^]\d)(?<=\d)(?:\\,|\\ |~|\\;|\\:)(?=\d{3}(?!\d))")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_ROW = re.compile(r"\\\\(?:\[[^\[\]]*\])?")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[A-Za-z{}])")
_PRIMES = re.compile(r"\^\s*(?:\{\s*((?:\\prime\s*)+)\}|(\\prime)(?![A-Za-z]))")
_PLAIN_ROOT = re.compile(r"(?:√|(?<![\\A-Za-z])sqrt)\s*(\d+(?:\.\d+)?)")
_QUOTES = re.compile(r"(\*\*|[\"`])(.*)\1", re.DOTALL)
_CUBE_ROOT = re.compile(r"∛\s*(\d+(?:\.\d+)?)")
_SINGLE = re.compile(r"\{([.:=<>])\}")
_CODE = re.compile(r"(?<![\w.])(?:np|numpy|math|sympy|sp)\.(?=[a-z])")
_UNSPACED = re.compile(r"(?<![\w.,])\s+|\s+(?![\w.,\\])")


def normalize(text: str) -> str:
    r"""Return ``text`` in the one spelling that the tokenizer knows.

    >>> normalize("x ≤ −½\u200b")
    'x \\le -\\frac{1}{2}'
    """
    text = _INVISIBLE.sub("", text)
    # \\\\ ends a row of a matrix; in front of a command, where there is no matrix, somebody escaped once too often.
    text = _ROW.sub(r"\\cr ", text if "\\begin" in text else _ESCAPED_TWICE.sub(r"\\", text))
    text = _RAISED.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", text)
    text = _CUBE_ROOT.sub(r"\\sqrt[3]{\1}", _PLAIN_ROOT.sub(r"\\sqrt{\1}", text))
    text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    text = "".join(c if c.isprintable() else " " for c in text)
    text = _QUOTES.sub(r"\2", text.strip())
    text = _CODE.sub("", _SINGLE.sub(r"\1", text))
    text = _GROUPING.sub(",", _THIN.sub(",", text)).replace("\\!", "")
    text = _LAYOUT.sub(" ", text)
    text = _SPACES.sub(" ", text)
    text = _PRIMES.sub(lambda m: "'" * m[0].count("prime"), text)
    for pattern, name in _RENAMED:
        text = pattern.sub(name, text)
    text = _DELIMITERS.sub(" ", text)
    text = text.replace("**", "^")
    text = _TIMES_TEN.sub(r"\\times ", text)
    text = " ".join(text.split()).rstrip(",;:\\ ").strip()
    return text[:-1].rstrip(",;: ") if text.endswith(".") and not text.endswith("..") else text


def canonical(normalized: str) -> str:
    """Return ``normalized`` without the spaces that mean nothing; ``1 1/2`` and ``11/2`` stay apart."""
    return _UNSPACED.sub("", normalized)
