r"""The training reward of the paper's code: strict, on the last ``\boxed{...}``, by spelling first and sympy second.

Source: the reward of arXiv 2504.20571, ypwang61/One-Shot-RLVR:verl/utils/reward_score/deepscaler.py, whose rules are those of
rllm-org/rllm:rllm/rewards/math_utils/utils.py: Hendrycks' MATH normalisation (hendrycks/math:modeling/math_equivalence.py)
and the grader of openai/prm800k:prm800k/grading/grader.py. An answer is correct if either of the two says so.

Differences from that code, all on purpose: the response is read without its prompt, an empty box is no answer, expressions
are read by :mod:`rlvr_lightning.grading.paper_expr` instead of ``eval``, and decimals are exact.
"""

import re
from contextlib import suppress
from typing import Any

from rlvr_lightning.grading.paper_expr import Unreadable, read_plain
from rlvr_lightning.grading.paper_text import plain_text
from rlvr_lightning.grading.verdict import Verdict

_UNITS = re.compile(
    r"(?:degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)(?:es)?s? *(?:\^[0-9]+)?"
)
_TEXT = re.compile(r"\\text\{(.+?)\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")
_UNWORKABLE = re.compile(r"\^[{(]|\^[0-9]+\^|\^[0-9]{2}")


def extract(response: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}``, or None if it is missing, empty, or not closed.

    An earlier box does not stand in for a last one that is broken; ``\boxed 5``, ``\boxed {5}`` and ``\fbox`` do not count.
    After a ``</think>`` only the text up to the next one is read. Time is linear in the length of the response.

    >>> extract(r"\boxed{1}, no: \boxed{\frac{4}{3}}.")
    '\\frac{4}{3}'
    """
    if "</think>" in response:
        response = response.split("</think>", 2)[1]
    start = response.rfind(r"\boxed")
    if start < 0 or not response.startswith(r"\boxed{", start):
        return None
    start += len(r"\boxed{")
    depth = 1
    for brace in re.finditer(r"[{}]", response[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return response[start : start + brace.start()].strip() or None
    return None


def compare(ground_truth: str, extracted: str) -> Verdict:
    r"""Return the verdict of the paper's training reward on an extracted answer.

    A ground truth that contains ``\boxed`` counts as the content of its last box; one that is empty is an error.

    >>> compare(r"\frac{4}{3}", r"m=\frac43"), compare(r"\frac{4}{3}", r"\frac{8}{6}")
    ('correct', 'wrong')
    """
    answer = extract(ground_truth) if r"\boxed" in ground_truth else ground_truth.strip()
    if not answer:
        return "error"
    if _spelling(answer) == _spelling(extracted) or _same_value(_plain(answer), _plain(extracted)):
        return "correct"
    return "wrong"


def _spelling(text: str) -> str:
    """Return the normal form of grader A: two answers with the same one are equal.

    What the normalisation cannot digest, such as a fraction without arguments, stands for itself.

    Source: hendrycks/math:modeling/math_equivalence.py.
    """
    text = text.strip()
    if whole := re.search(r"^\\text\{(.+?)\}$", text):
        text = whole[1].strip()
    original = text
    for old, new in (("\n", ""), (r"\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), (r"\left", "")):
        text = text.replace(old, new)
    for old in (r"\right", r"^{\circ}", r"^\circ", r"\$"):
        text = text.replace(old, "")
    text, *units = text.split(r"\text{ ")
    if len(units) > 1:
        return original
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    if text.count("=") == 1 and text.index("=") <= 2:
        text = text.partition("=")[2]
    if re.search(r"\\sqrt$", text):
        return original
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    if text.endswith(r"\frac"):
        return original
    text = brace_fractions(text)
    return r"\frac{1}{2}" if text == "0.5" else slash_to_fraction(text)


def brace_fractions(text: str) -> str:
    r"""Return the text with braces around the one-character arguments of fractions: ``\frac12``, ``\frac1{72}``.

    A fraction with one character left for two arguments leaves the whole text as it is.
    """
    head, *pieces = text.split(r"\frac")
    if any(len(piece) < 2 and piece != "{" for piece in pieces):
        return text
    for piece in pieces:
        if piece.startswith("{"):
            head += rf"\frac{piece}"
        elif piece[1] == "{":
            head += rf"\frac{{{piece[0]}}}{piece[1:]}"
        else:
            head += rf"\frac{{{piece[0]}}}{{{piece[1]}}}{piece[2:]}"
    return head


def slash_to_fraction(text: str) -> str:
    r"""Return ``\frac{a}{b}`` for a quotient of two integers ``a/b`` without signs or zeros to spare, else the text."""
    match = re.fullmatch(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)", text)
    return rf"\frac{{{match[1]}}}{{{match[2]}}}" if match else text


def _plain(text: str) -> str:
    """Return the normal form of grader B: plain lower-case text without units, spaces and braces.

    Source: openai/prm800k:prm800k/grading/grader.py.
    """
    if whole := re.search(r"^\\text\{(.+?)\}$", text):
        text = whole[1]
    for old, new in ((r"\%", "%"), (r"\$", "$"), ("$", ""), ("%", ""), (" or ", " , "), (" and ", " , ")):
        text = text.replace(old, new)
    for old, zeros in (("million", 6), ("billion", 9), ("trillion", 12)):
        text = text.replace(old, f"*10^{zeros}")
    text = re.sub(r"\^ *\\circ", "", _UNITS.sub("", text))
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    if (number := _integer(text)) is not None:
        text = str(number)
    if "\\" in text:
        text = re.sub(r"\\[td]frac", r"\\frac", text).replace(r"\frac", r" \frac")  # the space tells 1 1/3 from 11/3
        with suppress(ValueError):  # what is no LaTeX stays as it is
            text = plain_text(text)
        for old, new in (("√", "sqrt"), ("π", "pi"), ("∞", "inf"), ("\u222a", "U"), ("·", "*"), ("\u00d7", "*")):
            text = text.replace(old, new)
        text = text.strip()
    text = re.sub(r"([0-9]) +([0-9])", r"\1+\2", re.sub("- *", "-", text))  # mixed numbers
    text = re.sub(r"[ {}]", "", text).lower()
    number = _integer(_THOUSANDS.sub("", text))
    return text if number is None else str(number)


def _integer(text: str) -> int | None:
    """Return the integer that a decimal spells, at most 1e-7 off, or None."""
    try:
        value = float(text)
        return round(value) if abs(value - round(value)) <= 1e-7 else None
    except (ValueError, OverflowError):
        return None


def _same_value(answer: str, given: str) -> bool:
    """Return whether grader B takes two of its normal forms for equal: element by element, in order.

    A fraction must be reduced, and an integer spelled as one.
    """
    if answer == given:
        return True
    if not given:
        return False
    answers, givens = _elements(answer), _elements(given)
    if len(answers) > 1 and (answer[0] != given[0] or answer[-1] != given[-1]):
        return False
    return len(answers) == len(givens) and all(map(_same_element, answers, givens))


def _elements(text: str) -> list[str]:
    """Return the elements of a tuple or interval, or the text itself."""
    text = _THOUSANDS.sub("", text)
    if re.fullmatch(r"[(\[][^()\[\]]+[)\]]", text):
        return [element.strip() for element in text[1:-1].split(",")]
    return [text]


def _same_element(answer: str, given: str) -> bool:
    if _FRACTION.fullmatch(answer) and _FRACTION.fullmatch(given):
        return answer == given
    if (_integer(answer) is None) != (_integer(given) is None):
        return False
    both = f"({answer})-({given})"
    letters = {letter for letter in both.replace("sqrt", "").replace("frac", "") if letter.isalpha()}
    if len(letters) > 2 or _UNWORKABLE.search(both):
        return False
    try:
        return _is_zero(read_plain(answer) - read_plain(given))
    except Unreadable:
        return False


def _is_zero(difference: Any) -> bool:
    from sympy import simplify

    try:
        return simplify(difference) == 0
    except Exception:  # sympy has no common base for what it cannot do
        return False
