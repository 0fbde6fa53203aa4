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
_COMMANDS = {
    **dict.fromkeys("dfrac tfrac cfrac nicefrac sfrac xfrac".split(), r"\frac"),
    **dict.fromkeys("dbinom tbinom".split(), r"\binom"),
    **dict.fromkeys("leq leqslant leqq".split(), r"\le"),
    **dict.fromkeys("geq geqslant geqq".split(), r"\ge"),
    **dict.fromkeys("approxeq simeq thickapprox doteq".split(), r"\approx"),
    **dict.fromkeys("varnothing O".split(), r"\emptyset"),
    **dict.fromkeys("rightarrow longrightarrow".split(), r"\to"),
    **dict.fromkeys("implies Longrightarrow therefore iff".split(), r"\Rightarrow"),
    **dict.fromkeys("ldots cdots dotsc dotsb dots".split(), "..."),
    **dict.fromkeys("vert lvert rvert mid".split(), "|"),
    **dict.fromkeys("ast star".split(), r"\cdot "),
    **dict.fromkeys("degree degrees textdegree".split(), r"^{\circ}"),
    **dict.fromkeys("slash div".split(), "/"),
    **dict.fromkeys("R Re Reals".split(), r"\mathbb{R}"),
    **dict.fromkeys("checkmark qed blacksquare square Box fbox".split(), " "),
    **{f"var{name}": f"\\{name}" for name in ("epsilon", "phi", "theta", "rho")},
    "neq": r"\ne", "bigcup": r"\cup", "lt": "<", "gt": ">", "lbrace": r"\lbrace ", "rbrace": r"\rbrace ", "lbrack": "[",
    "rbrack": "]", "colon": ":", "prime": "'", "backslash": r"\setminus ", "AA": r" \text{angstrom}",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_REWRITTEN = (
    ("\\", re.compile(r"\\(?:vspace|hskip|vskip|tag|label|phantom)\*?\s*\{[^{}]*\}"), " "),
    ("color", re.compile(r"\\(?:colorbox|(?:text)?color)\s*\{[^{}]*\}"), " "),
    ("mathring", re.compile(r"\\mathring\s*\{\s*A\s*\}"), r" \\text{angstrom}"),
    ("\\mu", re.compile(r"(?<=[\d}])\s*(?:\\,|\s)*\\mu\s*\\(?:text|mathrm)\s*\{\s*m\s*\}"), r" \\text{micrometer}"),
    ("\\Omega", re.compile(r"(?<=\d)\s+\\Omega(?![A-Za-z])"), r" \\text{ohm}"),
    ("^", re.compile(r"(?<=\d)\^\s*(?:\{\s*o\s*\}|o(?![a-z])|\{?\s*\\(?:text|mathrm)\s*\{\s*o\s*\}\s*\}?)"), r"^{\\circ}"),
    ("^", re.compile(r"(?<=\d)\^\s*\{?\s*\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?"), " "),
    ("", re.compile(r"(?<=\d)(?:st|nd|rd|th)\b"), " "),
    ("\\begin", re.compile(r"\\(?:begin|end)\s*\{(?:aligned|align\*?|gathered|split|equation\*?)\}"), " "),
    ("&", re.compile(r"&\s*="), "="),
    ("{}", re.compile(r"\{\}\s*\^"), "^"),
    ("<=", re.compile("<="), r"\\le "),
    (">=", re.compile(">="), r"\\ge "),
    ("!=", re.compile(r"(?<=[a-z\s])!=\s"), r"\\ne "),
    ("\\not", re.compile(r"\\not\s*="), r"\\ne "),
    ("pmod", re.compile(r"\\pmod\s*(?:\{\s*(\w+)\s*\}|(\w))"), r"\\pmod{\1\2}"),
    ("mod", re.compile(r"\(?\s*(?:\\bmod|\\text\s*\{\s*mod\s*\}|\\mod|(?<!\\p)\bmod\b)\s*\{?(\w+)\}?\s*\)?"), r"\\pmod{\1}"),
    ("\\{", re.compile(r"\\\{"), r"\\lbrace "),
    ("\\}", re.compile(r"\\\}"), r"\\rbrace "),
    ("\\|", re.compile(r"\\\|"), "|"),
    ("*", re.compile(r"\*{1,2}(?=\s*\^)"), r"\\cdot "),
    (":=", re.compile(r"\\?:(?==)"), ":"),
    ("\\#", re.compile(r"\\#"), "#"),
    ("\\_", re.compile(r"\\_"), "_"),
    ("\\&", re.compile(r"\\&"), r"\\text{and}"),
)
"""(what the text must contain, pattern, replacement)"""
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
    if not text.isascii():
        text = _INVISIBLE.sub("", text)
        text = _RAISED.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
        text = _LOWERED.sub(lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", text)
        text = _CUBE_ROOT.sub(r"\\sqrt[3]{\1}", text)
    text = _PLAIN_ROOT.sub(r"\\sqrt{\1}", text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    text = _QUOTES.sub(r"\2", text.strip())
    text = _CODE.sub("", _SINGLE.sub(r"\1", text))
    if "\\" in text:
        # \\ ends a row of a matrix; in front of a command, where there is no matrix, somebody escaped once too often.
        text = _ROW.sub(r"\\cr ", text if "\\begin" in text else _ESCAPED_TWICE.sub(r"\\", text))
        text = _GROUPING.sub(",", _THIN.sub(",", text)).replace("\\!", "")
        text = _SPACES.sub(" ", _LAYOUT.sub(" ", text))
        text = _PRIMES.sub(lambda m: "'" * m[0].count("prime"), text)
        text = _COMMAND.sub(lambda m: _COMMANDS.get(m[1], m[0]), text)
    else:
        text = _GROUPING.sub(",", text.replace("~", " "))
    for needle, pattern, replacement in _REWRITTEN:
        if needle in text:
            text = pattern.sub(replacement, text)
    text = _DELIMITERS.sub(" ", text)
    text = text.replace("**", "^")
    text = _TIMES_TEN.sub(r"\\times ", text)
    text = " ".join(text.split()).rstrip(",;:\\ ").strip()
    return text[:-1].rstrip(",;: ") if text.endswith(".") and not text.endswith("..") else text


def canonical(normalized: str) -> str:
    """Return ``normalized`` without the spaces that mean nothing; ``1 1/2`` and ``11/2`` stay apart."""
    return _UNSPACED.sub("", normalized)
