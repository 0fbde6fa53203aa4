"""math-verify for what our own grammar does not read (sums, integrals, limits), behind vetoes where it is lenient."""

import re
from typing import Any

from rlvr_lightning.grading.verdict import Verdict

_READABLE = re.compile(r"\\(?:sum|prod|int(?=\s*_)|operatorname|pmod|bmod|equiv|gcd|lcm|max|min)(?![A-Za-z])")
_WORDS = re.compile(r"\\(?:text|mathrm|mbox)|[A-Za-z]{4,}(?<!frac)(?<!sqrt)|%|=|<|>|,")
_LIMITS = re.compile(r"[_^]\s*(?:\{[^{}]*\}|\w|\\infty)")
_DIGITS = 50


def compare(gold: str, candidate: str) -> Verdict | None:
    """Return math-verify's verdict on two normalized texts, or None where it is not to be trusted."""
    if not _READABLE.search(gold) and not _READABLE.search(candidate):
        return None
    if any(_WORDS.search(_LIMITS.sub("", _READABLE.sub("", text))) for text in (gold, candidate)):
        return None
    from math_verify import verify

    parsed = _parse(gold), _parse(candidate)
    if parsed[0] is None or parsed[1] is None:
        return None
    return "correct" if verify(*parsed, numeric_precision=_DIGITS, timeout_seconds=None) else "wrong"


def _parse(text: str) -> Any:
    from math_verify import LatexExtractionConfig, parse
    from sympy import Float, Rational

    parsed = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=0)
    if not parsed:
        return None
    # A decimal is the rational number that it spells. As a Float it would be compared after rounding to six decimals.
    floats = parsed[0].atoms(Float)
    return parsed[0].xreplace({number: Rational(str(number)) for number in floats}) if floats else parsed[0]
