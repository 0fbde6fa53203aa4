r"""The ``math`` grader: both sides are typed, then compared by type; exact about numbers, strict about everything else.

Conventions, where mathematics leaves a choice:

- The last closed ``\boxed{}`` of the response counts, after the last ``</think>``; nothing else is an answer.
- An exact ground truth is not met by a rounded decimal, a decimal one by every form of its exact value.
- A missing unit is forgiven; a different unit, or a percent sign that the ground truth does not have, is wrong.
- Symbols are case-sensitive, words are not. Order counts in tuples and intervals, not in sets and lists.
- ``x = 5`` meets ``5``; a chain of equalities counts if all its sides agree; equations may differ by a constant factor.
- ``A OR B`` in the ground truth gives alternatives; ``A or B`` in an answer is a list.

Text becomes tokens, tokens a tree, the tree a value. No step hands text to an interpreter.
"""

import re

from rlvr_lightning.grading.boxed import last_boxed
from rlvr_lightning.grading.math import fallback
from rlvr_lightning.grading.math.answers import Bag, Choice, Named, same
from rlvr_lightning.grading.math.normalize import canonical, normalize
from rlvr_lightning.grading.math.reader import read
from rlvr_lightning.grading.math.tokens import is_balanced
from rlvr_lightning.grading.verdict import Verdict

_ALTERNATIVES = re.compile(r"\s*(?:\\(?:text|textrm|mathrm|mbox)\s*\{\s*OR\s*\}|\bOR\b)\s*")

_INSIDE_TEXT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\bOR\b([^{}]*)\}")

_CONDITION = re.compile(r"(?:\\text\s*\{\s*,?\s*)?\b(?:for|where)\b.*|\\forall.*|,\s*[a-z]\s*\\in\s*\\mathbb.*", re.DOTALL)
_BEST_FIRST: tuple[Verdict, ...] = ("correct", "wrong", "unparsable", "error")

extract = last_boxed


def compare(ground_truth: str, extracted: str) -> Verdict:
    """Return whether ``extracted`` is the answer that ``ground_truth`` asks for.

    Args:
        ground_truth: LaTeX or plain text; alternatives are joined by OR.
        extracted: the content of the response's last box.

    Returns:
        ``unparsable`` for an answer that has no meaning here, ``error`` for a ground truth that has none.
    """
    golds = [normalize(gold) for gold in _alternatives(ground_truth)]
    worst: Verdict = "correct"
    for candidate in _alternatives(extracted):  # all that an answer offers has to be right
        verdicts = {_compare(gold, normalize(candidate)) for gold in golds}
        best = min(verdicts, key=_BEST_FIRST.index)
        worst = _BEST_FIRST[max(_BEST_FIRST.index(worst), _BEST_FIRST.index(best))]
    if worst != "correct" and len(golds) > 1 and _all_are_listed(golds, extracted):
        return "correct"
    return worst


def _alternatives(text: str) -> list[str]:
    return _ALTERNATIVES.split(_INSIDE_TEXT.sub(r"\\text{\1} OR \\text{\2}", text))


def _compare(gold: str, candidate: str) -> Verdict:
    expected, found = read(gold), read(candidate)
    if canonical(gold) == canonical(candidate) and (expected or is_balanced(gold)):
        return "correct"
    if not expected or not found:
        verdict = fallback.compare(gold, candidate)
        return verdict or ("unparsable" if expected else "wrong" if is_balanced(gold) else "error")
    # Only where a letter is asked for is "C. 12 cm" the letter C, and then "D = C" is not.
    foreign = Named if any(isinstance(r, Choice) for r in expected) else Choice
    found = tuple(r for r in found if not isinstance(r, foreign))
    if not same(expected, found):
        return "wrong" if found else "unparsable"
    conditions = {canonical(c[0]) for c in (_CONDITION.search(gold), _CONDITION.search(candidate)) if c}
    return "correct" if len(conditions) < 2 else "wrong"


def _all_are_listed(golds: list[str], extracted: str) -> bool:
    """Return whether every element of "A or B" is one of several ground truths."""
    bags = [r for r in read(normalize(extracted)) if isinstance(r, Bag) and not r.is_set]
    return any(all(any(same(read(g), item) for g in golds) for item in bag.items) for bag in bags)
