r"""The ``format`` grader: 1 for any non-empty box in the response, whatever it says (arXiv 2504.20571, format reward)."""

from rlvr_lightning.grading.boxed import last_boxed
from rlvr_lightning.grading.verdict import Verdict

extract = last_boxed


def compare(ground_truth: str, extracted: str) -> Verdict:
    """Return ``correct`` if there is anything in the box."""
    return "correct" if extracted.strip() else "wrong"
