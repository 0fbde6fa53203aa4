"""The ``exact`` grader: the boxed answer is the ground truth, letter by letter, up to white space."""

from rlvr_lightning.grading.boxed import last_boxed
from rlvr_lightning.grading.verdict import Verdict

extract = last_boxed


def compare(ground_truth: str, extracted: str) -> Verdict:
    """Return ``correct`` for the same text."""
    if not ground_truth.strip():
        return "error"
    return "correct" if ground_truth.split() == extracted.split() else "wrong"
