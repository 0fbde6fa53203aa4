"""What is no mathematics: words, choice letters, times of day, and numerals whose base is written."""

import re
from collections.abc import Iterator
from fractions import Fraction

from rlvr_lightning.grading.math.answers import REALS, Based, Choice, Clock, Readings, Region, Value, Word
from rlvr_lightning.grading.math.tokens import Tokens
from rlvr_lightning.grading.math.tree import num
from rlvr_lightning.grading.math.units import STOP_WORDS

_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
    "sixteen": 16,
}
_BASED = re.compile(
    r"\(?([0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)\)?\s*(?:_\s*\{?\s*\(?|\s+(?:in\s+)?base[ -]?)(\d+|[a-z]+)\)?\s*\}?", re.ASCII
)
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)\s*(?:([ap])\.?\s*m\.?)?|(\d{1,2})()\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_CHOICE = re.compile(r"\(?([A-Z])\)?[.):]*|\(([A-Z])\)(\s+[^\s(].*)|([A-Z])[.):](\s+[^\s(].*)", re.DOTALL)
_NAMED_CHOICE = re.compile(r"^(?:the )?(?:option|choice|answer)(?: is)?:? (?=\(?[A-Z]\)?$)", re.IGNORECASE)
_WORDY = re.compile(r"[\w\s.,:;'()/-]+")
_PUNCTUATION = re.compile(r"(?<!\d)[.,;:'](?!\d)|[.,;:](?!\S)|(?<=[A-Za-z]{3})-(?=[A-Za-z]{3})")
_SHORT_WORDS = frozenset("yes no true false none even odd red one two six ten all may sun mon tue wed thu fri sat".split())
_NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        (
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen twenty"
        ).split()
    )
}
_REALS = {"all real numbers", "all reals", "real numbers", "any real number", "every real number"}
_EMPTY = {
    "no solution",
    "no solutions",
    "no real solution",
    "no real solutions",
    "empty set",
    "there are no solutions",
    "there is no solution",
}


def choices(plain: str) -> Iterator[Choice]:
    """Read the letter of a choice, with or without what it stands for."""
    match = _CHOICE.fullmatch(_NAMED_CHOICE.sub("", plain))
    rest = (match[3] or match[5] or "") if match else ""
    if match and not re.search(r"\b[A-Z]\b", rest) and not STOP_WORDS & set(re.findall("[a-z]+", rest.lower())):
        yield Choice(match[1] or match[2] or match[4])


def based(plain: str) -> Iterator[Based | Value]:
    """Read a numeral with its base."""
    match = _BASED.fullmatch(plain)
    if match is None:
        return
    base = int(match[2]) if match[2].isdigit() and len(match[2]) < 3 else _BASES.get(match[2], 0)
    digits = match[1].upper()
    if 2 <= base <= 36 and any(c.isdigit() for c in digits) and all(int(c, 36) < base for c in digits if c != "."):
        yield Value(num(Fraction(digits))) if base == 10 else Based(digits, base)


def clocks(plain: str) -> Iterator[Clock]:
    """Read a time of day."""
    match = _CLOCK.fullmatch(plain)
    if match:
        hour, minute, half = (match[1], match[2], match[3]) if match[1] else (match[4], "0", match[6])
        if int(hour) < 25 and int(minute) < 60:
            yield Clock(int(hour), int(minute), (half or "").lower())


def of_tokens(tokens: Tokens) -> Readings:
    """Words between other tokens, such as the elements of a list."""
    if all(t.kind in ("text", "word", "sym") for t in tokens):
        return tuple(words(" ".join(t.text for t in tokens), as_text=any(t.kind == "text" for t in tokens)))
    return ()


def words(plain: str, *, as_text: bool) -> Iterator[Word | Value | Region]:
    r"""Read words; numbers among them count as spelled, case does not count.

    Args:
        plain: the answer without commands.
        as_text: it was written as ``\text``, so short words are words, and not products of symbols.
    """
    plain = plain.removeprefix("(").removesuffix(")") if plain.count("(") == plain[:1].count("(") else plain
    capitals = len(plain) > 1 and plain.isupper() and plain.isalpha() and plain.lower() not in _SHORT_WORDS
    if not _WORDY.fullmatch(plain) or not (
        capitals or re.search("[A-Za-z]{4}", plain) or plain.lower() in _SHORT_WORDS or as_text
    ):
        return
    if capitals:
        yield Word(plain)  # letters, such as the names of points in their order
        if not as_text or len(plain) < 4:
            return
    text = " ".join(_PUNCTUATION.sub(" ", plain).casefold().split())
    if re.search(r"[-/()]", text):
        return
    text = re.sub(r"^(?:the|an?) (?=\w)", "", text)
    if text in _NUMBER_WORDS:
        yield Value(num(_NUMBER_WORDS[text]))
    elif text in _REALS:
        yield REALS
    elif text in _EMPTY:
        yield Region(())
    if re.search("[a-z]{2}", text):
        yield Word(text)
