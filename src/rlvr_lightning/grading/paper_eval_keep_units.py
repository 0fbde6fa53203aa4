"""The paper's evaluation grader for Minerva: as :mod:`rlvr_lightning.grading.paper_eval`, but units stay where they are.

Its answers contain single letters, such as the m of a mass, that the removal of units would take away.

Source: QwenLM/Qwen2.5-Math:evaluation/parser.py (``skip_unit``).
"""

from rlvr_lightning.grading.paper_eval import compare_normal, extract
from rlvr_lightning.grading.paper_normal import normal_form
from rlvr_lightning.grading.verdict import Verdict

__all__ = ["compare", "extract"]


def compare(ground_truth: str, extracted: str) -> Verdict:
    """Return the verdict of the paper's evaluation on an extracted answer of Minerva.

    >>> compare("m", "m"), compare("m", "x")
    ('correct', 'wrong')
    """
    return compare_normal(normal_form(ground_truth, keep_units=True), normal_form(extracted, keep_units=True))
