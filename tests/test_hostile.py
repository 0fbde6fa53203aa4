"""Whatever a response holds, every grader gives a verdict in time, runs none of it, and keeps its worker small."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlvr_lightning.grading import GRADERS, load_grader
from rlvr_lightning.records import Completion, Problem, Score
from rlvr_lightning.verify import MAX_CHARS, Verifier

# One grader is another with one switch turned: its many timeouts need no second run by default.
EVERY_GRADER = [pytest.param(n, marks=pytest.mark.slow) if n == "paper-eval-keep-units" else n for n in GRADERS]
TIMEOUT_S = 1.0
MARGIN_S = 2.0
"""For extraction, which happens in this process, and for a slow moment of the machine."""
MIB = 2**20

TOO_MUCH = {
    "tower": "9^{9^{9^{9}}}",
    "towers": "9^{9^{9^{9}}} - 9^{9^{9^{9}}} + 25",
    "huge exponent": "10^{10^{10}} + 1",
    "power": "9^{999999999}",
    "tiny": "10^{-10^{10}}",
    "scientific": "1e999999999",
    "scientific list": "1e99999999, 2e99999999, 3e99999999",
    "factorial": "99999999!",
    "factorials": "((9!)!)!",
    "exclamations": "9" + "!" * 500,
    "binomial": r"\binom{10^{9}}{5 \cdot 10^{8}}",
    "root": r"\sqrt[10^{9}]{2^{10^{9}}}",
    "sum": r"\sum_{k=1}^{10^{9}} \sin(k^{k})",
    "product": r"\prod_{k=1}^{10^{9}} k",
    "integral": r"\int_0^1 e^{-x^{x^x}} \sin(\frac{1}{x}) dx",
    "limit": r"\lim_{x \to 0} \frac{\sin(\tan x) - \tan(\sin x)}{x^7}",
    "expansion": "(a+b+c+d+e+f+g+h)^{200}",
    "expansions": "*".join(f"(x+{i})^{{99}}" for i in range(99)),
    "polynomial": "+".join(f"{i}x^{{{i}}}y^{{{200 - i}}}" for i in range(110)),
    "nested functions": r"\sin(" * 150 + "x" + ")" * 150,
    "nested roots": r"\sqrt{2+" * 150 + "2" + "}" * 150,
    "fractions": r"\frac{1}{1+" * 120 + "x" + "}" * 120,
    "plus or minus": ",".join([r"\pm 1 \pm 2 \pm 3 \pm 4"] * 60),
    "sum of plus or minus": "1" + r" \pm 1" * 100,
    "absolute values": "|" * 501,
    "equals": "=".join(["x"] * 500),
    "inequalities": "<".join("x" * 400),
    "unions": r"\cup".join(["(1,2)"] * 150),
    "matrix": r"\begin{pmatrix}" + r"\\".join(["&".join("123456789012345")] * 40) + r"\end{pmatrix}",
    "matrices": r"\begin{pmatrix}" * 60 + "1" + r"\end{pmatrix}" * 60,
    "base": "Z" * 900 + "_{36}",
    "repeating decimal": r"0.\overline{" + "142857" * 250 + "}",
    "digits": "9" * 1900,
    "decimals": "0." + "3" * 1900,
    "letters": "abcdefghijklmnopqrstuvwxyz" * 60,
    "words": "or " * 600,
}
"""Within the length that is read, but too much work for a naive evaluator."""

MALFORMED = {
    "nested braces": "{" * 900 + "25" + "}" * 900,
    "10,000 braces": "{" * 10_000 + "25" + "}" * 10_000,
    "parentheses": "(" * 400 + "25" + ")" * 400,
    "left right": r"\left(" * 120 + "25" + r"\right)" * 120,
    "unclosed everything": r"\frac{\sqrt{\left( [ \{ \begin{pmatrix} \text{ 25 & \\",
    "unclosed fractions": r"\frac{" * 300,
    "closed before": "}}}}))))]]]] 25",
    "backslashes": "\\" * 1500,
    "carets": "2" + "^" * 1000,
    "minus signs": "-" * 1500 + "25",
    "commas": "," * 1900,
    "thousands of commas": "1," * 5000,
    "tuples": "(1,2)," * 300,
    "megabyte": "2" * 1_000_000,
    "spaces": " " * 1500 + "25",
    "NUL bytes": "\x00" * 100 + "25",
    "control characters": "".join(map(chr, range(32))) + "25",
    "lone surrogates": "\ud800\udfff25\udc00",
    "right-to-left marks": "\u202e52\u202c\u200f\u061c",
    "zero-width": "\u200b\u200c\u200d\ufeff" * 200,
    "combining marks": "2" + "\u0301" * 1500,
    "ligature that grows": "\ufdfa" * 100,
    "other digits": "\u0662\u0665\u096b\u0be8\u2462",
    "emoji": "\U0001f4a9" * 300,
    "protocol": '25\n["math", "5", "5"]\n"correct"\n5',
    "format strings": "%s %n {0.__class__} ${x}",
    "regular expression": r"(a+)+$ (.*)*\1 [[:alpha:]",
    "catastrophic spaces": r"\text{ " * 90 + " " * 900 + "!",
    "catastrophic digits": "1,111" * 370 + "x",
    "catastrophic fraction": r"\frac" * 380 + "x",
    "LaTeX definitions": r"\def\x{\x\x}\x \newcommand{\y}{\y\y} \input{/etc/passwd}",
}

TOUCH = "__import__('pathlib').Path('canary').touch()"
CODE = {
    "import": TOUCH,
    "import in text": rf"\text{{{TOUCH}}}",
    "system": "__import__('os').system('touch canary')",
    "open": "open('canary','w')",
    "eval": f'eval("{TOUCH}")',
    "exec": "exec(chr(111)+\"pen('canary','w')\")",
    "call in arithmetic": f"24 + 0*len(str({TOUCH}))",
    "in a list": f"[{TOUCH}, 1]",
    "in an equation": f"x = {TOUCH}",
    "in a fraction": rf"\frac{{{TOUCH}}}{{1}}",
    "in a subscript": f"x_{{{TOUCH}}}",
    "lambda": f"(lambda: {TOUCH})()",
    "attributes": "().__class__.__base__.__subclasses__()[104].load_module('os').system('touch canary')",
    "sympy": "sympify(\"__import__('os').system('touch canary')\")",
    "write18": r"\immediate\write18{touch canary}",
    "shell": "$(touch canary) `touch canary`; touch canary | touch canary",
    "file": "Path('canary').write_text('')",
}

RESPONSES = {
    "open boxes": r"\boxed{" * 140_000,
    "nested boxes": r"\boxed{" * 70_000 + "}" * 70_000,
    "1,000 boxes": r"\boxed{25}" * 1000,
    "boxes without braces": r"\boxed " * 140_000,
    "empty boxes": r"\boxed{}" * 120_000,
    "box of a megabyte": r"\boxed{" + "25 " * 330_000 + "}",
    "box and spaces": r"\boxed" + " " * 1_000_000,
    "braces": "{" * 1_000_000,
    "closing braces": r"\boxed{25" + "}" * 1_000_000,
    "backslashes": "\\" * 1_000_000,
    "think": "<think>" * 70_000 + "</think>" * 70_000 + r"\boxed{25}",
    "answer is": "the answer is " * 70_000,
    "final answer": "final answer is $" * 60_000,
    "option": "answer is : (" * 75_000,
    "digits": "25" * 500_000,
    "numbers": "-25.5e1, " * 110_000,
    "spaces": " " * 1_000_000,
    "lines": "\n" * 1_000_000,
    "dollars": "$" * 1_000_000,
    "lone surrogates": "\ud800" * 10_000 + r"\boxed{25}",
    "NUL bytes": "\x00" * 1_000_000 + r"\boxed{25}",
}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    verifier = Verifier("math", timeout_s=TIMEOUT_S)
    yield verifier
    verifier.close()


def grade(verifier: Verifier, grader: str, ground_truth: str, response: str) -> tuple[Score, float]:
    """Return the score and its seconds."""
    start = time.monotonic()
    pair = Problem("p", "?", ground_truth), Completion((), (), response, "stop")
    return verifier([pair], grader)[0], time.monotonic() - start


def revive(verifier: Verifier, grader: str) -> bool:
    """Start the worker if it was killed, and return whether it still tells right from wrong."""
    verifier._memo.clear()
    right, wrong = (grade(verifier, grader, "C", rf"\boxed{{{answer}}}")[0] for answer in "CD")
    return right.correct and wrong.correct == (grader == "format")


def complaints(verifier: Verifier, grader: str, responses: dict[str, str]) -> list[str]:
    """Grade each response, and its text as the ground truth of a plain one; return what was late, rewarded or fatal."""
    found = []
    for name, response in responses.items():
        for ground_truth, text in (("24", response), (response, r"\boxed{24}")):
            score, seconds = grade(verifier, grader, ground_truth, text)
            if seconds > TIMEOUT_S + MARGIN_S:
                found.append(f"{name}: took {seconds:.1f} s")
            if score.correct and grader != "format":
                found.append(f"{name}: rewarded, extracted {score.extracted!r:.80}")
            if len(score.extracted or "") > MAX_CHARS:
                found.append(f"{name}: keeps {len(score.extracted or '')} characters")
            if not revive(verifier, grader):
                found.append(f"{name}: the grader is not itself afterwards")
    return found


def boxed(texts: dict[str, str]) -> dict[str, str]:
    return {name: rf"so $\boxed{{{text}}}$." for name, text in texts.items()}


@pytest.mark.parametrize("grader", EVERY_GRADER)
def test_too_much_work_ends_in_time(verifier: Verifier, grader: str) -> None:
    assert revive(verifier, grader)
    assert complaints(verifier, grader, boxed(TOO_MUCH)) == []


@pytest.mark.parametrize("grader", EVERY_GRADER)
def test_malformed_text_gets_a_verdict(verifier: Verifier, grader: str) -> None:
    assert revive(verifier, grader)
    assert complaints(verifier, grader, MALFORMED | {f"boxed {name}": text for name, text in boxed(MALFORMED).items()}) == []


@pytest.mark.parametrize("grader", EVERY_GRADER)
def test_nothing_is_executed(grader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the worker starts, and where the payloads would leave their file
    verifier = Verifier(grader, timeout_s=TIMEOUT_S)
    try:
        assert complaints(verifier, grader, CODE | {f"boxed {name}": text for name, text in boxed(CODE).items()}) == []
        for name, text in CODE.items():
            grade(verifier, grader, text, rf"\boxed{{{text}}}")  # a careless ground truth is no code either
            assert list(tmp_path.iterdir()) == [], name
    finally:
        verifier.close()


@pytest.mark.parametrize("grader", EVERY_GRADER)
def test_extraction_of_a_megabyte_is_linear(grader: str) -> None:
    extract = load_grader(grader).extract
    late = []
    for name, response in RESPONSES.items():
        start = time.monotonic()
        extract(response)
        if time.monotonic() - start > 2:  # takes 0.3 s; quadratic time would be minutes
            late.append(name)
    assert late == []


def test_limit_holds_in_any_order_and_with_more_workers() -> None:
    verifier = Verifier("math", timeout_s=TIMEOUT_S, workers=2)
    try:
        pairs = [(Problem("p", "?", "24"), Completion((), (), text, "stop")) for text in boxed(TOO_MUCH).values()]
        ordinary = (Problem("p", "?", "24"), Completion((), (), r"\boxed{4!}", "stop"))
        scores = verifier([pair for hostile in pairs for pair in (hostile, ordinary)])
        assert [score.correct for score in scores] == [False, True] * len(pairs)
        assert [s.correct for s in verifier([*reversed(pairs), ordinary])] == [False] * len(pairs) + [True]
    finally:
        verifier.close()


@pytest.mark.parametrize("items", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_worker_memory_stays_flat(items: int) -> None:
    shapes = (
        "{i}^{{{i}^{{{i}}}}}",
        "{i}! + {i}",
        r"\frac{{{i}}}{{1+\sqrt{{{i}}}}}",
        "(x+{i})^{{20}} + (y-{i})^{{20}}",
        ",".join(["{i}"] * 200),
        r"\begin{{pmatrix}} {i} & 2 \\ 3 & 4 \end{{pmatrix}}",
        "[{i}, \\infty) \\cup (-\\infty, -{i})",
        r"\frac{{" * 50 + "{i}",
        "\x00\ud800{i} ((((",
        "x_{{{i}}} + y_{{{i}}} = {i}",
    )
    verifier = Verifier("math", timeout_s=TIMEOUT_S)
    try:
        sizes = []
        for i in range(items):
            text = shapes[i % len(shapes)].format(i=i + 2)
            grade(verifier, "math", r"24 + x", rf"\boxed{{{text}}}")
            process = verifier._workers[0]._process
            if i % 50 == 49 and process is not None and process.poll() is None:
                sizes.append(psutil.Process(process.pid).memory_info().rss / MIB)
    finally:
        verifier.close()
    assert len(sizes) > items // 100  # it lived most of the time
    assert max(sizes) < sizes[0] + 48, f"resident MiB every 50 items: {[round(size) for size in sizes]}"
