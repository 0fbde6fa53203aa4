"""The verifier gives the right verdict with the right reason, and nothing that a model writes can stop it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.grading.boxed import last_boxed
from rlvr_lightning.records import Completion, FinishReason, Problem, Score
from rlvr_lightning.verify import MAX_CHARS, Verifier

SRC = Path(__file__).parents[1] / "src"
TOWER = "9^{9^{9^{9}}}"
SLOW = r"\sum_{k=1}^{10^{9}} \sin(k^{k})"


def pair(answer: str, text: str, finish_reason: FinishReason = "stop") -> tuple[Problem, Completion]:
    return Problem("p", "?", answer), Completion((), (), text, finish_reason)


def grade(verifier: Verifier, answer: str, extracted: str) -> Score:
    return verifier([pair(answer, rf"so \boxed{{{extracted}}}.")])[0]


def children() -> set[int]:
    """Process ids of this process's grading workers, zombies included."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    ).stdout.splitlines()
    return {int(line.split()[0]) for line in listed if "grading.worker" in line or "<defunct>" in line}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    verifier = Verifier(timeout_s=5)
    yield verifier
    verifier.close()


@pytest.fixture(scope="module")
def hasty() -> Iterator[Verifier]:
    """For items that are meant to run into the limit."""
    verifier = Verifier(timeout_s=1)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"$\boxed 5$", "5"),
        (r"it is \boxed 12.8.", "12.8"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{\frac{4}{3}}", r"\frac{4}{3}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{ x \boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{V = \boxed{5}}", "V = {5}"),
        (r"\boxed{-\boxed{5}}", "-{5}"),
        (r"\boxed 30^\circ.", r"30^\circ"),
        (r"\boxed{\boxed{3}, \boxed{4}}", "{3}, {4}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"\boxed{5} } {", "5"),
        (r"\boxed{5}, as asked in \boxed and \boxed.", "5"),
        (r"\boxed{1}</think> thus \boxed{2}", "2"),
        (r"</think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}</think> done", None),
        (r"\boxed{1} \boxed{}", None),
        (r"\boxed{ }", None),
        (r"\fbox{5} the answer is 5, $5$", None),
        (r"\boxedx{5}", None),
        ("", None),
    ],
)
def test_last_closed_box_is_extracted(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 150_000,
        r"\boxed{}" * 130_000,
        r"\boxed " * 150_000,
        r"\boxed" + " " * 1_000_000,
        r"\boxed{" * 70_000 + "}" * 70_000,
        "\\" * 1_000_000,
        "{" * 1_000_000,
        "</think>" * 125_000,
    ],
    ids=["open", "empty", "bare", "spaces", "nested", "backslashes", "braces", "thinking"],
)
def test_extraction_is_linear_on_a_hostile_megabyte(text: str) -> None:
    start = time.monotonic()
    assert last_boxed(text) is None
    assert time.monotonic() - start < 2  # takes 0.2 s; quadratic time would be minutes


@pytest.mark.parametrize(
    ("answer", "extracted"),
    [
        ("12.8", "12.8"),
        ("12.8", r"\frac{64}{5}"),
        ("12.8", "64/5"),
        ("12.8", "12.80"),
        ("12.8", r"12.8 \text{ mph}"),
        ("12.8", "12.8 mph"),
        ("12.8", "V = 12.8"),
        ("12.8", r"12\frac{4}{5}"),
        ("12.8", r"\(12.8\)"),
        ("12.8", "$12.8$"),
        (r"\frac{4}{3}", r"\dfrac43"),
        (r"\frac{4}{3}", "4/3"),
        (r"\frac{4}{3}", r"1\frac{1}{3}"),
        (r"\frac{4}{3}", r"\frac{8}{6}"),
        (r"\frac{4}{3}", r"\frac43 \text{ or } \frac{8}{6}"),
        ("24", "24.0"),
        ("24", "4!"),
        ("24", r"2^3 \cdot 3"),
        ("24", r"24^\circ"),
        ("24", "n=24"),
        ("-3", "\u22123"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        ("x^2-1", "(x-1)(x+1)"),
        ("1, 2", "2, 1"),
        ("1, 2", "1 or 2"),
        ("1 OR 2", "2"),
        (r"\frac{1}{2} \text{ OR } 7", "0.5"),
        (r"50\%", r"50 \%"),
        ("0.00000002", r"2 \times 10^{-8}"),
        ("even", r"\text{Even}"),
        ("C", r"\text{(C)}"),
    ],
)
def test_equal_answers_are_correct(verifier: Verifier, answer: str, extracted: str) -> None:
    score = grade(verifier, answer, extracted)
    assert (score.reward, score.correct, score.reason, score.extracted) == (1.0, True, "correct", extracted)


@pytest.mark.parametrize(
    ("answer", "extracted"),
    [
        ("12.8", "12.7"),
        ("12.8", "12.80000001"),
        ("12.8", "13"),
        ("12.8", "-12.8"),
        ("12.8", r"12.8\%"),
        ("12.8", r"1280\%"),
        ("12.8", "12.8, 12.7"),
        ("12.8", "12.8 or 12.7"),
        ("12.8", r"12.8 \text{ or } 12.7"),
        (r"\frac{4}{3}", "1.33"),
        (r"\frac{4}{3}", "1.3333333333333333"),
        (r"\frac{4}{3}", r"\frac{3}{4}"),
        ("24", "23.9999999"),
        ("24", "24x"),
        ("24", "(24, 24)"),
        (r"\sqrt{2}", "1.4142135623730951"),
        ("0.00000002", "0.00000003"),
        (r"\sqrt{2} \cdot 10^{-20}", r"\sqrt{3} \cdot 10^{-20}"),
        ("0", "0.0000000001"),
        (r"(1, \frac{1}{3})", "(1, 0.33333333)"),
        ("(1, 2)", "(2, 1)"),
        ("(4, 5)", "4 or 5"),
        ("1 OR 2", "1 or 3"),
        (r"50\%", "0.5"),
        ("C", "c"),
        ("listen", "silent"),
    ],
)
def test_different_answers_are_wrong(verifier: Verifier, answer: str, extracted: str) -> None:
    score = grade(verifier, answer, extracted)
    assert (score.reward, score.correct, score.reason, score.extracted) == (0.0, False, "wrong", extracted)


def test_every_way_to_miss_has_its_reason(verifier: Verifier) -> None:
    scores = verifier(
        [
            pair("24", "the answer is 24"),
            pair("24", "the answer is", "length"),
            pair("24", r"\boxed{24} and so on", "length"),
            pair("24", r"\boxed{\frac}"),
            pair("24", r"\boxed{" + "2" * (MAX_CHARS + 1) + "}"),
            pair("", r"\boxed{24}"),
            pair("", r"\boxed{}"),
        ]
    )
    reasons = [score.reason for score in scores]
    assert reasons == ["no_answer", "truncated", "correct", "unparsable", "unparsable", "error", "no_answer"]
    assert [score.reward for score in scores] == [0, 0, 1, 0, 0, 0, 0]
    assert [score.extracted is None for score in scores] == [True, True, False, False, False, False, True]


@pytest.mark.parametrize(
    ("extracted", "reasons"),
    [
        (TOWER, {"timeout", "error", "wrong"}),
        (f"{TOWER} - {TOWER} + 24", {"timeout", "error", "wrong"}),
        (SLOW, {"timeout", "error", "wrong", "unparsable"}),
        ("(" * 400 + "24" + ")" * 400, {"timeout", "error", "unparsable", "correct"}),
        ("{" * 900 + "24" + "}" * 900, {"timeout", "error", "unparsable", "correct"}),
        ("{" * 10_000 + "24" + "}" * 10_000, {"unparsable"}),
        ("\x00" * 100 + "25", {"wrong", "unparsable"}),
        ("2" * 1_000_000, {"unparsable"}),
        ("\ud800", {"unparsable", "wrong", "error"}),
        ('24\n["24", "24"]\n', {"unparsable", "wrong"}),
        (r"__import__('os').system('kill -9 0')", {"unparsable", "wrong", "error"}),
    ],
    ids=["tower", "towers", "sum", "parentheses", "900", "10000", "nul", "megabyte", "surrogate", "newline", "code"],
)
def test_hostile_answer_gets_a_verdict_in_time(hasty: Verifier, extracted: str, reasons: set[str]) -> None:
    assert grade(hasty, "24", "4!").correct  # a running worker: start-up is not on the clock
    start = time.monotonic()
    score = grade(hasty, "24", extracted)
    assert time.monotonic() - start < 1 + 2
    assert score.reason in reasons
    assert score.reward == (score.reason == "correct")
    assert grade(hasty, r"\frac{1}{3}", r"\frac{2}{6}").correct
    assert not grade(hasty, r"\frac{1}{3}", "0.33").correct


def test_timeout_kills_the_worker_and_says_so() -> None:
    verifier = Verifier(timeout_s=0.5)
    assert grade(verifier, "24", "4!").correct
    (first,) = children_of(verifier)
    os.kill(first, signal.SIGSTOP)  # as good as an endless computation, and exact on any machine
    start = time.monotonic()
    assert grade(verifier, "24", "25").reason == "timeout"
    assert 0.5 <= time.monotonic() - start < 2.5
    assert first not in children()
    assert grade(verifier, "24", "25").reason == "wrong"  # the machine was at fault: a timeout is not remembered
    verifier.close()


def children_of(verifier: Verifier) -> set[int]:
    return {worker._process.pid for worker in verifier._workers if worker._process is not None}


def test_worker_killed_from_outside_costs_no_later_item() -> None:
    verifier = Verifier()
    assert grade(verifier, "24", "4!").correct
    (first,) = children_of(verifier)
    os.kill(first, signal.SIGKILL)
    time.sleep(0.1)
    assert grade(verifier, "24", "48/2").correct
    assert children_of(verifier) != {first}
    verifier.close()


def test_worker_that_dies_on_an_item_is_an_error_of_that_item_only() -> None:
    verifier = Verifier()
    assert grade(verifier, "24", "4!").correct
    (pid,) = children_of(verifier)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    scores = verifier([pair("24", r"\boxed{24.00}"), pair("24", r"\boxed{48/2}")])
    assert [score.reason for score in scores] == ["error", "correct"]
    assert grade(verifier, "24", "24.00").correct  # nor is an error remembered
    verifier.close()


def test_verdicts_do_not_depend_on_thread_workers_or_order(verifier: Verifier) -> None:
    extracted = ["64/5", "12.7", r"\frac", "12.80", "12.8 or 12.7", "V=12.8", "64/5", "12.7"]
    pairs = [pair("12.8", rf"\boxed{{{text}}}") for text in extracted] + [pair("12.8", "no box")]
    expected = verifier(pairs)
    assert [score.correct for score in expected] == [True, False, False, True, False, True, True, False, False]

    parallel = Verifier(workers=2)
    results: list[list[Score]] = []
    threads = [threading.Thread(target=lambda: results.append(parallel(pairs))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(children_of(parallel)) == 2
    parallel.close()
    assert results == [expected] * 3
    assert verifier(pairs[::-1]) == expected[::-1]


def test_parallel_workers_grade_at_the_same_time() -> None:
    verifier = Verifier(timeout_s=1, workers=2)
    verifier([pair("24", r"\boxed{4!}"), pair("24", r"\boxed{48/2}")])
    stopped = children_of(verifier)
    assert len(stopped) == 2
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    scores = verifier([pair("24", r"\boxed{24.0}"), pair("24", r"\boxed{24.00}")])
    assert [score.reason for score in scores] == ["timeout", "timeout"]
    assert time.monotonic() - start < 1.7  # one after the other would take 2 s
    verifier.close()


def test_memo_and_equal_text_reach_no_worker() -> None:
    verifier = Verifier()
    assert grade(verifier, "12.8", " 12.8  ").correct
    assert not children_of(verifier)
    pairs = [pair("12.8", r"\boxed{64/5}"), pair("12.8", r"\boxed{12.7}")]
    first = verifier(pairs)
    assert children_of(verifier)
    verifier.close()
    assert verifier(pairs) == first
    assert not children_of(verifier)


def test_duplicates_in_one_call_are_graded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, asked = Verifier(), []
    monkeypatch.setattr(verifier._workers[0], "ask", lambda pair: asked.append(pair) or "wrong")
    scores = verifier([pair("24", r"\boxed{25}"), pair("24", r"\boxed{26}")] * 50)
    assert len(scores) == 100
    assert sorted(asked) == [("math", "24", "25"), ("math", "24", "26")]


def test_close_leaves_no_process() -> None:
    verifier = Verifier(workers=2)
    before = children()
    verifier([pair("24", r"\boxed{4!}"), pair("24", r"\boxed{48/2}")])
    started = children() - before
    assert len(started) == 2
    verifier.close()
    verifier.close()
    assert not children() & started


def test_dead_parent_leaves_no_worker() -> None:
    script = (
        "import os, signal\n"
        "from rlvr_lightning import Verifier, Problem, Completion\n"
        "verifier = Verifier()\n"
        "assert verifier([(Problem('p', '?', '24'), Completion((), (), r'\\boxed{4!}', 'stop'))])[0].correct\n"
        "print(verifier._workers[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SRC)}
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_worker_busy_on_an_endless_item_ends_without_its_parent() -> None:
    """A dead parent cannot kill, and a busy worker does not see that its input ended: its own alarm must end it."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "rlvr_lightning.grading.worker", str(2**31), "0.5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(SRC)},
    )
    with worker:
        assert worker.stdout.readline() == b'"ready"\n'
        worker.stdin.write(b'["graders.endless"]\n["graders.endless", "24", "loop"]\n')
        worker.stdin.close()
        try:
            assert worker.wait(timeout=10) == -signal.SIGALRM
        finally:
            worker.kill()


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_worker_imports_no_torch() -> None:
    script = (
        "import sys, rlvr_lightning.grading.worker\n"
        "from rlvr_lightning.grading import GRADERS, load_grader\n"
        "for name in GRADERS: load_grader(name).compare('12.8', '64/5')\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'lightning', 'numpy')])\n"
        "print([name for name in sys.modules if name.startswith('rlvr_lightning.') and 'grading' not in name])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SRC)}
    )
    assert done.stdout.splitlines() == ["[]", "['rlvr_lightning.errors']"], done.stderr


def test_check_names_every_ground_truth_that_cannot_be_met(verifier: Verifier) -> None:
    rows = ["12.8", "", r"\frac{4}{3}", r"\frac{4", " ", "C", "Monday", "4:40 a.m.", "1 OR 2", "9" * (MAX_CHARS + 1)]
    problems = [Problem(f"id{i}", "?", answer, f"train.jsonl:{i}") for i, answer in enumerate(rows)]
    with pytest.raises(ConfigError, match="4 of 10 ground truths") as caught:
        verifier.check([*problems[:-1], Problem("no-source", "?", rows[-1])])
    lines = [line for line in str(caught.value).splitlines() if line.startswith("- ")]
    assert [line.split(": ")[0] for line in lines] == [
        "- train.jsonl:1",
        "- train.jsonl:3",
        "- train.jsonl:4",
        "- no-source",
    ]
    assert r"'\\frac{4' cannot be read" in lines[1]
    verifier.check([problem for problem in problems if problem.answer in ("12.8", "C", "Monday", "4:40 a.m.")])


def test_a_grader_of_ones_own_is_named_by_its_dotted_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    verifier = Verifier("graders.endless", timeout_s=0.5)
    scores = verifier([pair("123", "321"), pair("123", "loop"), pair("123", "123 "), pair("124", "123")])
    assert [score.reason for score in scores] == ["correct", "timeout", "correct", "wrong"]
    assert verifier([pair("123", "321")], grader="exact")[0].reason == "no_answer"
    verifier.close()


def test_what_was_anticipated_is_not_graded_again() -> None:
    verifier = Verifier()
    pairs = [pair("12.8", rf"\boxed{{{text}}}") for text in ("64/5", "12.7", "13", "64/5")] + [pair("12.8", "no box")]
    for problem, completion in pairs:
        verifier.anticipate(problem, completion)
    for future in list(verifier._early.values()):
        future.result()
    verifier.close()
    assert [score.reason for score in verifier(pairs)] == ["correct", "wrong", "wrong", "correct", "no_answer"]
    assert not children_of(verifier)


@pytest.mark.parametrize("name", ["maths", "no.such.module", "json.decoder"])
def test_unknown_grader_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(ConfigError, match="paper-train"):
        Verifier(name)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"workers": 0}, "workers"),
        ({"workers": 1.5}, "workers"),
        ({"memory_gib": 0.1}, "memory_gib"),
    ],
)
def test_bad_argument_is_named_at_construction(arguments: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        Verifier(**arguments)


def test_grader_that_cannot_start_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    verifier = Verifier()
    with pytest.raises(ConfigError, match="did not start"):
        grade(verifier, "24", "25")
