r"""The ``choice`` grader: the letter of a multiple-choice answer, from the last box or, without one, from the prose."""

import re

from rlvr_lightning.grading.boxed import last_boxed
from rlvr_lightning.grading.verdict import Verdict

_FONT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*|[{}$*]")
_LETTER = re.compile(r"\s*\(?([A-Za-z])(?:\)|[.:]|$)(?:.*)", re.DOTALL)
_PROSE = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Z])\b(?![A-Za-z'])|\(([A-Z])\)")


def extract(response: str) -> str | None:
    r"""Return the letter: of the last box if there is one, else of the last "answer is C" or "(C)".

    >>> extract(r"so it is \boxed{\textbf{(C)}}"), extract("The answer is B.")
    ('C', 'B')
    """
    boxed = last_boxed(response)
    if boxed is not None:
        return _letter(boxed) or boxed
    last = None
    for last in _PROSE.finditer(response):  # noqa: B007 - the last one counts
        pass
    return (last[1] or last[2]) if last else None


def compare(ground_truth: str, extracted: str) -> Verdict:
    """Compare letters; case does not matter."""
    expected, found = _letter(ground_truth), _letter(extracted)
    if expected is None:
        return "error"
    return "unparsable" if found is None else "correct" if expected == found else "wrong"


def _letter(text: str) -> str | None:
    match = _LETTER.fullmatch(_FONT.sub("", text))
    return match[1].upper() if match else None
