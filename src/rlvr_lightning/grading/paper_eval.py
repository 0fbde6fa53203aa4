r"""The evaluation grader of the paper's code: lenient in what it reads and in what it takes for equal.

Source: the evaluation of arXiv 2504.20571; the rules are those of QwenLM/Qwen2.5-Math:evaluation/parser.py (extraction,
normalisation) and evaluation/grader.py (equality). Published numbers contain all of this leniency: numbers within 1e-4,
a factor of 100 either way, brackets of any kind, lists without brackets and some products by their first element, and
the last number of a response that boxes nothing. For what is mathematically right use the grader ``math``.

Differences from that code, all on purpose: LaTeX is read by latex2sympy2_extended's grammar in place of sympy's, and what it
refuses by :mod:`rlvr_lightning.grading.paper_expr` in place of ``eval``; number words become digits only if the whole answer
consists of them; infinite values are not compared as numbers.

:mod:`rlvr_lightning.grading.paper_eval_keep_units` is the variant for Minerva.
"""

import re
from collections.abc import Sequence
from math import isfinite
from typing import Any

from rlvr_lightning.grading.paper_expr import Unreadable, read_latex, read_plain
from rlvr_lightning.grading.paper_normal import normal_form
from rlvr_lightning.grading.verdict import Verdict

RELATIVE_TOLERANCE = 1e-4
_NUMBER = re.compile(r"-?\d*\.?\d+")
_CHOICE = re.compile(r"\b[A-E]\b")
_LIST = re.compile(r"[(\[].+[)\]]")
_MATRIX = re.compile(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}")
_STOP = re.compile(r"[(\[]|[)\]]|(?<!\d),|,(?!\d{3})")  # a comma between thousands is none


def extract(response: str) -> str | None:
    r"""Return what the response gives as its answer, or None if that is nothing.

    The first of these that occurs counts: ``final answer is $...$. I hope``; the last ``boxed``, also without its backslash or
    closing brace; the text after the last "he answer is", or "final answer is"; that after the first Chinese "answer is";
    the last number. Time is linear in the length of the response.

    >>> extract("The answer is 12.8."), extract("6 by 7 is 42, I think")
    ('12.8', '42')
    """
    answer = re.sub(r"\n\s*", "", _answer(response)).strip()
    return answer.removeprefix(":").removesuffix(".").removesuffix("/").strip() or None


def compare(ground_truth: str, extracted: str) -> Verdict:
    r"""Return the verdict of the paper's evaluation on an extracted answer, units removed on both sides.

    >>> compare("50", r"0.5 \text{ cm}"), compare(r"\frac{4}{3}", "1.3333"), compare("3,5,7", "5,3,7")
    ('correct', 'correct', 'wrong')
    """
    return compare_normal(normal_form(ground_truth), normal_form(extracted))


def compare_normal(ground_truth: str, extracted: str) -> Verdict:
    """Return the verdict on two normal forms. A ground truth without one is an error."""
    if not ground_truth:
        return "error"
    return "correct" if _equal(ground_truth, extracted) else "wrong"


def _answer(response: str) -> str:
    head, hope, _ = response.partition("$. I hope")
    if hope and "final answer is $" in head:
        return head.partition("final answer is $")[2]
    if "boxed" in response:
        return _boxed(response.rpartition("boxed")[2])
    for marker in ("he answer is", "final answer is"):
        if marker in response:
            return response.rpartition(marker)[2]
    if "答案是" in response:
        return response.split("答案是", 2)[1].strip().partition("\n\n")[0]
    numbers = _NUMBER.findall(response.replace(",", ""))
    return numbers[-1] if numbers else ""


def _boxed(text: str) -> str:
    """Return the group that the text starts with, up to its end if it is not closed; else what precedes a dollar sign."""
    if not text.startswith("{"):
        return text.partition("$")[0]
    depth = 0
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[1 : brace.start()]
    return text[1:]


def _equal(answer: str, given: str) -> bool:
    """Return whether two normal forms count as equal: by spelling, as choices, as numbers, by structure, by value."""
    answer, given = answer.strip(), given.strip()
    if answer.lower() == given.lower():
        return True
    if answer in tuple("ABCDE") and (_CHOICE.findall(given.upper()) or [""])[-1] == answer:
        return True
    if _same_number(answer, given):
        return True
    if not given:
        return False
    if _same_without_brackets(answer, given):
        return True
    if _LIST.match(answer) and _LIST.match(given):
        return _all_equal(answer[1:-1].split(","), given[1:-1].split(","))
    matrices = _MATRIX.fullmatch(answer), _MATRIX.fullmatch(given)
    if matrices[0] and matrices[1]:
        return _all_equal(*(re.split(r"&|(\\\\)", matrix[1].removesuffix("\\\\")) for matrix in matrices if matrix))
    return _equal_sides(answer, given)


def _all_equal(answers: Sequence[str | None], givens: Sequence[str | None]) -> bool:
    """Return whether the elements are equal in order. None stands between two columns."""
    if len(answers) != len(givens) or [part is None for part in answers] != [part is None for part in givens]:
        return False
    return all(_equal(answer or "", given or "") for answer, given in zip(answers, givens, strict=True))


def _same_number(answer: str, given: str) -> bool:
    """Return whether both spell numbers, equal within the tolerance up to a factor of 100."""
    try:
        reference, value = float(answer.replace(",", "")), float(given.replace(",", ""))
    except ValueError:
        return False
    return any(_close(target, value) for target in (reference / 100, reference, reference * 100))


def _close(reference: float, value: float) -> bool:
    if not (isfinite(reference) and isfinite(value)):
        return False
    return abs(reference - value) <= RELATIVE_TOLERANCE * max(abs(reference), abs(value))


def _same_without_brackets(answer: str, given: str) -> bool:
    """Return whether two answers are spelled alike without their braces and parentheses."""
    if (given[0] + given[-1] == "[]" and answer[:1] + answer[-1:] != "()") or (
        given[0] + given[-1] == "()" and answer[:1] + answer[-1:] != "[]"
    ):
        answer, given = answer.strip("[]()"), given.strip("[]()")
    answer, given = (re.sub(r"[{}()]", "", text).lower() for text in (answer, given))
    return answer == given


def _equal_sides(answer: str, given: str) -> bool:
    """Compare two equations by the difference of their sides, and take off a short left side that only one has."""
    sides, given_sides = answer.split("="), given.split("=")
    if len(sides) == len(given_sides) == 2:
        difference, given_difference = (f"{left.strip()}-({right.strip()})" for left, right in (sides, given_sides))
        return _same_value(difference, given_difference) or _same_value(difference, f"-({given_difference})")
    if len(given_sides) == 2 and len(given_sides[0].strip()) <= 2 and len(sides) == 1:
        return _equal(answer, given_sides[1])
    if len(sides) == 2 and len(sides[0].strip()) <= 2 and len(given_sides) == 1:
        return _equal(sides[1], given)
    return _same_value(answer, given)


def _same_value(answer: str, given: str) -> bool:
    reference, value = _read(answer), _read(given)
    if reference is None or value is None:
        return False
    try:
        return _same_object(reference, value)
    except Exception:  # sympy has no common base for what it cannot do, and such answers are unequal to the harness
        return False


def _read(text: str) -> Any:
    """Return the sympy object that the text, as far as the harness reads it, spells, or None."""
    text = _readable(text).replace(",", "")
    for read in (read_latex, read_plain):
        try:
            return read(text)
        except Unreadable:
            continue
    return None


def _readable(text: str) -> str:
    r"""Return the text before its first comma, or closing bracket, that nothing before it opens.

    Sympy's ``parse_latex`` stops there in silence, so that ``1,2`` is 1, the piece ``2)\cup(3`` of a split union is 2, and
    ``(x-1)(x+2)``, which the harness takes for a list of the one element ``x-1)(x+2``, is x-1.
    """
    depth = 0
    for mark in _STOP.finditer(text):
        depth += (mark[0] in "([") - (mark[0] in ")]")
        if depth < 0 or (depth == 0 and mark[0] == ","):
            return text[: mark.start()]
    return text


def _same_object(reference: Any, value: Any) -> bool:
    """Return whether two sympy objects are equal: as written, as numbers, identically, as equations or as matrices."""
    from sympy import Expr, MatrixBase, simplify
    from sympy.core.relational import Equality

    if reference == value or str(reference) == str(value):
        return True
    if isinstance(reference, Equality) and isinstance(value, Equality):
        return bool(_imbalance(reference).equals(_imbalance(value)))
    if isinstance(reference, MatrixBase) and isinstance(value, MatrixBase):
        return bool(reference.applyfunc(_rounded) == value.applyfunc(_rounded))
    if not (isinstance(reference, Expr) and isinstance(value, Expr)):
        return False
    if reference.is_number and value.is_number:
        left, right = reference.evalf(), value.evalf()
        if left.is_Float and right.is_Float:
            distance = abs(left - right)
            if distance <= RELATIVE_TOLERANCE * max(abs(left), abs(right)):
                return True
            if distance > 1e-6:  # no identity: spare the work of finding that out
                return False
    return bool(reference.equals(value)) or simplify(reference - value) == 0


def _imbalance(equation: Any) -> Any:
    return abs(equation.lhs - equation.rhs)


def _rounded(entry: Any) -> Any:
    return round(entry, 3)
