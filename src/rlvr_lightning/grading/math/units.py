r"""Units of measurement and other words behind a number: which spellings mean the same, and which do not."""

import re

Unit = frozenset[tuple[str, int]]
"""Pairs of name and exponent; the empty set is no unit."""

RADIAN: Unit = frozenset({("rad", 1)})
DEGREE: Unit = frozenset({("degree", 1)})
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Powers of ten that are written as words."""

_SPELLINGS = """
m meter metre|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|dm decimeter|nm nanometer|in inch inches
ft foot feet|yd yard|mi mile|g gram|kg kilogram|mg milligram|lb lbs pound|oz ounce|t ton tonne|s sec second|min minute|h hr hour
day|week wk|month|year yr|ms millisecond|l liter litre|ml milliliter millilitre|gal gallon|qt quart|pt pint|cup|cent ¢
$ dollar usd buck|euro eur €|gbp £|rupee|yen ¥|degree deg degrees|rad radian|%|unit|n newton|j joule|w watt|v volt|pa pascal
a amp ampere|k kelvin|hz hertz|c celsius|f fahrenheit|mol mole|people person persons|child children|man men|woman women|way
point|side|erg|au|kj kilojoule|kw kilowatt|mw megawatt|ev electronvolt|gev|mev|angstrom|gauss|dyne|arcsec arcsecond|pc parsec
coulomb|ohm|tesla|farad|die dice|acre
""".replace("\n", "|")
_NAMES = {word: group.split()[0] for group in _SPELLINGS.split("|") if group.strip() for word in group.split()}
_COMPOUND = {
    "mph": {"mi": 1, "h": -1},
    "kph": {"km": 1, "h": -1},
    "kmh": {"km": 1, "h": -1},
    "fps": {"ft": 1, "s": -1},
    "cc": {"cm": 3},
}
_CASED = {"C", "F", "N", "J", "W", "V", "A", "K", "T", "L", "s", "m", "g", "h", "l"}
"""Single letters that are units in this case only."""
SKIPPED = {"of", "the", "a", "an", "total", "each", "long", "tall", "wide", "about", "exactly", "old"}
"""Words behind a number that say nothing about its unit."""
COUNTS = frozenset({("%", 1), ("rad", 1), ("dozen", 1), ("score", 1), ("gross", 1), ("couple", 1)})
"""Units that are factors: a ground truth without them is not met by an answer with them."""
STOP_WORDS = frozenset(
    (
        "not no or and either if when where for is mod base unless except but factorial half halves halfs quarter "
        "quarters plus minus more less fewer over divided negative positive pi infinity root remainder modulo "
        "choose power to below above under most least maximum minimum zero never wrong incorrect cannot maybe "
        "probably perhaps possibly roughly rounded approx approximately repeating recurring out point loss twice "
        "doubled tripled inverse itself guess against through around almost nearly close after before reciprocal "
        "opposite than then double triple as many permille ppm percentile quadrillion quintillion lakh crore tens "
        "hundreds thousands millions billions trillions matrix grid board table array one two three four five six "
        "seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
        "thirty forty fifty sixty seventy eighty ninety thirds thousandths first "
        "false untrue excluded excluding unknown supposedly hopefully likely estimated estimate ish mistake unlike "
        "different besides exceeds basis mil mn bn grand fold factorials turns exclusive short decrease increase subtracted"
    ).split()
)
"""Words that change what a number says, so they are no units, no names and no introduction."""
MISLEADING = STOP_WORDS | frozenset(
    "square cube complement logarithm log bound error incorrectly sum difference product distractor limit average mean".split()
)
"""Words that introduce something else than the answer."""
_ORDINAL = re.compile(r"(?!(?:month|length|width|path|depth|bath|death|birth|cloth)s?$)\w+ths?|\w+n't|[a-z]*fifths?")
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
_WORD = re.compile(r"[A-Za-z'-]+|[%$€£¥¢]|[²³]|/|\^\{?-?\d+\}?|\d+")


SHORT = frozenset(["cm", "km", "mm", "ft", "kg", "lb", "yd", "mi", "sq", "cu"])
"""Units of two letters that hardly ever are a product of two symbols."""


def known(word: str) -> bool:
    r"""Return whether a word outside ``\text`` is a unit, not a product of symbols."""
    if len(word) == 1:
        return word in _CASED
    low = word.lower()
    return low in _NAMES or low.rstrip("s") in _NAMES or low in _COMPOUND or low in _POWERS or low in SCALES or low == "per"


def read_unit(text: str) -> tuple[Unit, int] | None:
    """Return (unit, power of ten) of the words behind a number, or None if they say anything else.

    >>> read_unit("miles per hour") == read_unit("mi/h") == read_unit("mph")
    True
    """
    exponents: dict[str, int] = {}
    scale, sign, power, last = 0, 1, 1, ""
    for part in _WORD.findall(re.sub(r"\bper cent\b", "percent", text.replace(".", " "))):
        word = part if len(part) == 1 else part.lower()
        if part[0] == "M" and word in ("mw", "mhz", "mg"):
            word = "mega" + word[1:]
        if word in ("positive", "negative") and not text.rstrip().lower().endswith(word):
            continue
        if word in STOP_WORDS or part.isdigit() or _ORDINAL.fullmatch(word):
            return None
        if word in SKIPPED:
            continue
        if word in ("per", "/"):
            sign = -1
        elif part[0] == "^" and last:
            exponents[last] *= int(part.strip("^{}"))
        elif word in ("squared", "cubed") and last:
            exponents[last] *= _POWERS[word]
        elif word in _POWERS:
            power = _POWERS[word]
        elif word in SCALES and not last:
            scale += SCALES[word]
        elif word in _COMPOUND:
            for name, exponent in _COMPOUND[word].items():
                exponents[name] = exponents.get(name, 0) + sign * exponent
            last = word
            exponents.setdefault(last, 0)
        else:
            last = _name(word)
            exponents[last] = exponents.get(last, 0) + sign * power
            power = 1
    return frozenset((name, exponent) for name, exponent in exponents.items() if exponent), scale


def _name(word: str) -> str:
    if word in ("percent", "percentage", "pct", "percents"):
        return "%"
    if len(word) == 1 and word.isalpha():
        return _NAMES.get(word.lower(), word) if word in _CASED or word == "t" else word
    if word in _NAMES:
        return _NAMES[word]
    singular = (
        word[:-3] + "y" if word.endswith("ies") else word[:-1] if word.endswith("s") and not word.endswith("ss") else word
    )
    return _NAMES.get(singular, singular)
