"""Grade one (ground truth, extracted answer) pair per line, in a process that its parent may kill at any moment.

Started as ``python -m rlvr_lightning.grading_worker MEMORY_BYTES ORPHAN_LIMIT_S``. The first line out says ``ready``;
then every JSON line in, ``[answer, extracted]``, gives one JSON line out, ``{"reason": ...}``. Nothing that a model
wrote is evaluated: only math-verify's LaTeX grammar reads it, not its plain-expression reader, which calls ``eval``.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
import warnings
from typing import Any

_ALTERNATIVES = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{\s*OR\s*\}|\bOR\b")
_OR = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{\s*or\s*\}|\bor\b", re.IGNORECASE)
_PERCENT = re.compile(r"\\text\s*\{\s*(?:%|\\%|percent)\s*\}|\\?%|\bpercent\b")
_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"\(?([A-Za-z])\)?")
_POINT = re.compile(r"\s*(?:\\left)?\s*[(\[][^()\[\]]*[)\]]\s*")
_PLAIN = re.compile(r"(?=.*[A-Za-z])[\w .,:;'()-]{1,40}")
_WORDS = re.compile(r"[A-Za-z]{4,}(?:[ '-][A-Za-z]+)*")
_CLEAN = dict.fromkeys(range(32), " ") | {0x200B: "", 0x200C: "", 0x200D: "", 0xFEFF: "", 0x2212: "-", 0x2013: "-"}
_DIGITS = 50
"""math-verify's own 15 take the difference of two irrational numbers near 1e-20 for zero."""


def grade(answer: str, extracted: str) -> str:
    """Return the reason for one verdict: correct, wrong, unparsable, or error if the ground truth is at fault.

    ``A OR B`` in the ground truth gives alternatives. Answers joined by "or" count only if each one is right, or if
    together they are the list that the ground truth asks for.
    """
    golds = [_OR.sub(",", gold) for gold in _ALTERNATIVES.split(answer)]
    parts = _OR.split(extracted)
    if len(parts) > 1 and any(_compare(gold, ",".join(parts)) == "correct" for gold in golds if not _POINT.fullmatch(gold)):
        return "correct"
    for part in parts:
        verdicts = {_compare(gold, part) for gold in golds}
        if "correct" not in verdicts:
            return "wrong" if "wrong" in verdicts else verdicts.pop()
    return "correct"


def _compare(gold: str, candidate: str) -> str:
    gold, candidate = (_DELIMITERS.sub("", text.translate(_CLEAN)).strip().rstrip(".") for text in (gold, candidate))
    # Percent against percent is compared as written. math-verify would also let 9% meet 9.
    if _PERCENT.search(candidate) and not _PERCENT.search(gold):
        return "wrong"
    gold, candidate = _PERCENT.sub("", gold), _PERCENT.sub("", candidate)

    # math-verify reads a bare word as a product of letters, so that anagrams are equal, and has no upper-case letters.
    bare_gold, bare_candidate = (" ".join(_TEXT.sub(r"\1", text).split()) for text in (gold, candidate))
    if _WORDS.fullmatch(bare_gold) and _WORDS.fullmatch(bare_candidate):
        return "correct" if bare_gold.casefold() == bare_candidate.casefold() else "wrong"
    letters = _LETTER.fullmatch(bare_gold), _LETTER.fullmatch(bare_candidate)
    if letters[0] and letters[1]:
        return "correct" if letters[0][1] == letters[1][1] else "wrong"

    from math_verify import verify

    parsed_gold, parsed_candidate = _parse(gold), _parse(candidate)
    if parsed_gold is None:  # such as 4:40 a.m.: short plain text can still be met by its spelling
        same = bare_gold.casefold() == bare_candidate.casefold()
        return ("correct" if same else "wrong") if _PLAIN.fullmatch(bare_gold) else "error"
    if parsed_candidate is None:
        return "unparsable"
    equal = verify(parsed_gold, parsed_candidate, numeric_precision=_DIGITS, timeout_seconds=None)
    return "correct" if equal else "wrong"


def _parse(text: str) -> Any:
    from math_verify import LatexExtractionConfig, parse
    from sympy import Float, Rational

    parsed = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=0)
    if not parsed:
        return None
    # A decimal is the rational number that it spells. As a Float it would be compared after rounding to six decimals,
    # so that 1.333333 meets 4/3 and 2e-8 meets 3e-8.
    floats = parsed[0].atoms(Float)
    return parsed[0].xreplace({number: Rational(str(number)) for number in floats}) if floats else parsed[0]


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    memory, orphan_limit_s = int(sys.argv[1]), float(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be read as a verdict
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    def reply(reason: str) -> None:
        print(json.dumps({"reason": reason}), file=replies, flush=True)

    # Imports and builds the grammar's tables before the first clock starts.
    if grade("12.8", r"\frac{64}{5}") != "correct":
        sys.exit("math-verify does not find 64/5 equal to 12.8")
    reply("ready")
    from math_verify.errors import TimeoutException  # not an Exception

    for line in sys.stdin:
        answer, extracted = json.loads(line)
        # The kernel ends this process even inside one long multiplication, should the parent have died on its watch.
        signal.setitimer(signal.ITIMER_REAL, orphan_limit_s)
        try:
            reason = grade(answer, extracted)
        except (Exception, TimeoutException):  # RecursionError and MemoryError are among them
            reason = "error"
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(reason)


if __name__ == "__main__":
    main()
