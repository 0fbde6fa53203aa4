r"""The spelling that the paper's evaluation compares: without units, signs of presentation and other accidents.

Source: QwenLM/Qwen2.5-Math:evaluation/parser.py (``strip_string``), whose list of units comes from MathQA. The steps and their
order are facts of that code; some lose more than an accident (everything from a final ``\text{...}`` on, or a lone letter
that is also a unit), and both answers lose it alike.
"""

import re

from rlvr_lightning.grading.paper_train import brace_fractions, slash_to_fraction

_MATHQA_UNITS = (
    "east|degree|mph|kmph|ft|m sqaure| m east|sq m|deg|mile|q .|monkey|prime|ratio|profit of rs|rd|o|gm|p . m|lb|"
    "tile|per|dm|lt|gain|ab|way|west|a .|b .|c .|d .|e .|f .|g .|h .|t|a|h|no change|men|soldier|pie|bc|excess|st|"
    "inches|noon|percent|by|gal|kmh|c|acre|rise|a . m|th|π r 2|sq|mark|l|toy|coin|sq . m|gallon|° f|profit|minw|yr|"
    "women|feet|am|pm|hr|cu cm|square|v â € ™|are|rupee|rounds|cubic|cc|mtr|s|ohm|number|day|hour|minute|min|"
    "second|man|woman|sec|cube|mt|sq inch|mp|∏ cm ³|hectare|more|unit|cu . m|cm 2|rs .|rs|kg|g|month|km|m|cm|mm|"
    "apple|liter|loss|yard|pure|year|increase|decrease|d|less|Surface|litre|pi sq m|s .|metre|meter|inch"
)
"""The dots are wildcards in that code too."""
_UNITS = [*_MATHQA_UNITS.split("|"), *(f"{unit}s" for unit in _MATHQA_UNITS.split("|"))]
_UNIT_PATTERNS = [(unit.split(" .")[0].strip(), re.compile(rf"(^|\W){unit}($|\W)")) for unit in _UNITS]

_BEFORE_UNITS = (
    ("\n", ""),
    (r"\!", ""),
    ("bmatrix", "pmatrix"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\neq", r"\ne"),
    (r"\leq", r"\le"),
    (r"\geq", r"\ge"),
    (r"\left", ""),
    (r"\right", ""),
    (r"\{", "{"),
    (r"\}", "}"),
)
_DROPPED = (r"^{\circ}", r"^\circ", r"\$", "$", r"\(", r"\)")
_AFTER_WORDS = (
    *((f"{name}{relation}", "") for relation in ("=", r"\in", r"\to") for name in "xyz"),
    (r"\emptyset", "{}"),
    (r"(-\infty,\infty)", r"\mathbb{R}"),
    (r"\%", ""),
    ("%", ""),
    (" .", " 0."),
    ("{.", "{0."),
    ("infinity", r"\infty"),
)
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORD_NUMBERS = {word: value for value, word in enumerate(_ONES.split())} | {
    word: 10 * tens for tens, word in enumerate(_TENS.split(), start=2)
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}


def normal_form(text: str, *, keep_units: bool = False) -> str:
    r"""Return the spelling that two answers are compared by. An answer that is nothing but a unit (``east``) keeps it.

    >>> normal_form(r"x = \dfrac12 \text{ cm}"), normal_form("5 cm"), normal_form("5 cm", keep_units=True)
    ('\\frac{1}{2}', '5', '5cm')
    """
    form = _once(_once(text, keep_units), keep_units)  # the code applies it twice to every prediction
    return form if form or keep_units else normal_form(text, keep_units=True)


def _once(text: str, keep_units: bool) -> str:
    text = text.strip().replace("\n", "").rstrip(".")
    text = re.sub(r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}", text).replace(r"\end{array}", r"\end{pmatrix}")
    for old, new in _BEFORE_UNITS:
        text = text.replace(old, new)
    text = re.sub(r"\\text{.*?}$", "", text).strip() or text
    if not keep_units:
        text = _without_units(text)
    for old in _DROPPED:
        text = text.replace(old, "")
    text = re.sub(r"\\text\{(.*?)\}", r"\1", _digits(text))
    for old, new in _AFTER_WORDS:
        text = text.replace(old, new)
    if r"\infty" not in text:
        text = text.replace("inf", r"\infty")
    text = re.sub(r"\\mbox{.*?}", "", text.replace("and", "").replace(r"\mathbf", ""))
    if "i" not in text:
        text = text.replace("j", "i")  # the imaginary unit of engineers
    text = re.sub(r"(\d+)\.0*([^\d])", r"\1\2", text)
    text = re.sub(r"(\d+)\.0*$", r"\1", text)
    text = "0" + text if text.startswith(".") else text
    if text.count("=") == 1 and text.index("=") <= 2:
        text = text.partition("=")[2]
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", "")
    return slash_to_fraction(brace_fractions(text))


def _without_units(text: str) -> str:
    """Return the text without the words and letters that name units, unless nothing else is there."""
    for _ in range(2):  # the first round may bare what stood between two units
        for needed, pattern in _UNIT_PATTERNS:
            if needed in text:
                text = pattern.sub(r"\1\2", text) or text
    return text


def _digits(text: str) -> str:
    """Return the number that the text spells in English words, as digits, or the text if it has any other word."""
    words = re.findall(r"[a-z]+", text.lower())
    if not words or not re.fullmatch(r"[A-Za-z\s-]+", text) or not {*words} <= {*_WORD_NUMBERS, *_SCALES, "and"}:
        return text
    total = current = 0
    for word in words:
        if word == "hundred":
            current = max(current, 1) * 100
        elif word in _SCALES:
            total, current = total + max(current, 1) * _SCALES[word], 0
        else:
            current += _WORD_NUMBERS.get(word, 0)
    return str(total + current)
