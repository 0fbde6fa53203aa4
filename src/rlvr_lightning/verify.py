"""Verdicts on completions: read the last closed box, compare it with the ground truth in processes that can be killed.

Nothing in the text is trusted: extraction is one linear scan, long answers are refused, and symbolic work happens in
:mod:`rlvr_lightning.grading_worker` under a wall clock that this process holds. No signals, so any thread may grade.
"""

import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.records import Completion, Problem, Reason, Score

MAX_CHARS = 2000
"""Longer answers are refused. Two of them, JSON-escaped, fit into a pipe: asking a stuck worker never blocks."""
_MAX_MEMO = 100_000
_START_LIMIT_S = 120.0

_BOXED = re.compile(r"\\boxed\s*")
_TOKEN = re.compile(
    r"(?P<open>\\boxed\s*\{)"
    r"|\\boxed\s*(?P<bare>[-+\u2212]?\.?\d[^\s{}$\\]*|(?<=\s)[A-Z]\b)"  # \boxed 5; not prose such as "\boxed and"
    r"|\\.|(?P<brace>[{}])",  # an escaped brace, or a backslash before a brace's own, is no brace
    re.DOTALL,
)

Pair = tuple[str, str]
"""Ground truth, and extracted answer or an empty string."""


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed ``\boxed{...}``, or None if there is none or it is empty.

    With ``</think>`` in the text only what follows the last one counts. A box around one other box means the inner one;
    a box around several means their list. Time is linear in the length of the text.

    >>> last_boxed(r"so \boxed{12.8}, that is \boxed{\boxed{\frac{64}{5}} mph}")
    '\\frac{64}{5}'
    """
    text = text.rpartition("</think>")[2]
    braces: list[tuple[int, int] | None] = []  # open braces; for a box (start, number of boxes closed before it)
    boxes: list[tuple[int, int, int]] = []  # closed boxes: (start, end, index of the first box inside)
    for token in _TOKEN.finditer(text):
        if token["open"]:
            braces.append((token.end(), len(boxes)))
        elif token["bare"]:
            boxes.append((*token.span("bare"), len(boxes)))
        elif token["brace"] == "{":
            braces.append(None)
        elif token["brace"] and braces and (box := braces.pop()):
            boxes.append((box[0], token.start(), box[1]))
    if not boxes:
        return None
    index = len(boxes) - 1
    while (first := boxes[index][2]) < index and boxes[index - 1][2] == first:  # exactly one box directly inside
        index -= 1
    start, end, first = boxes[index]
    content = text[start:end] if first == index else _BOXED.sub("", text[start:end])
    bare = text[start - 1] != "{"
    return (content.rstrip(".,;:!?") if bare else content).strip() or None


class Verifier(Protocol):
    """What the rollout callback and the evaluator need from a grader."""

    def __call__(self, pairs: Sequence[tuple[Problem, Completion]]) -> list[Score]:
        """Return one verdict per pair, in order."""
        ...

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise ConfigError if a ground truth could never be met."""
        ...

    def close(self) -> None:
        """Free every resource. Calling it twice is allowed."""
        ...


class _Worker:
    """One grading process, started when it is first asked and again after it had to be killed."""

    def __init__(self, timeout_s: float, memory_gib: float) -> None:
        self._timeout_s, self._memory_gib = timeout_s, memory_gib
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, pair: Pair) -> Reason:
        """Grade one pair. The clock runs only while the worker has it."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(pair).encode() + b"\n")
            process.stdin.flush()
            reply = _read(process, self._timeout_s)
        except OSError:  # a broken pipe: it died before it could read
            reply = ""
        except BaseException:  # an interrupt: the reply to this question must not answer the next one
            self.stop()
            raise
        if not reply:
            self.stop()
            return "timeout" if reply is None else "error"
        return json.loads(reply)["reason"]

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(OSError), process:  # leaving the context waits and closes; the pipe may be broken
                pass

    def _start(self) -> subprocess.Popen[bytes]:
        self.stop()
        limits = [str(int(self._memory_gib * 2**30)), str(2 * self._timeout_s + 5)]
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "rlvr_lightning.grading_worker", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[1],  # -m finds the package here, however this process found it
        )
        ready = None
        try:
            ready = _read(process, _START_LIMIT_S)
        finally:
            if not ready:
                self.stop()
        if not ready:  # a grader that cannot start must not look like a policy that answers nothing right
            raise ConfigError(
                "The grading worker did not start: check that `python -c 'import math_verify'` works with "
                f"{sys.executable}, or raise memory_gib={self._memory_gib}."
            )
        return process


def _read(process: subprocess.Popen[bytes], limit_s: float) -> str | None:
    """Return the next line, None if there was none in time, or an empty string if the process has ended."""
    assert process.stdout is not None
    if not wait([process.stdout.fileno()], limit_s):
        return None
    line = process.stdout.readline().decode()
    return line if line.endswith("\n") else ""


class MathVerifier:
    """Grade with math-verify, in worker processes; reward 1.0 for a correct answer and 0.0 for everything else.

    Verdicts do not depend on thread, order or number of workers. Workers start on first need, also after ``close``, and
    verdicts are memoised, except those that say more about the machine than about the answer (timeout, error).

    Args:
        timeout_s: Wall-clock limit of one comparison, in seconds; start-up and queueing do not count.
        workers: Comparisons that run at the same time.
        memory_gib: Address-space limit of one worker.
    """

    def __init__(self, *, timeout_s: float = 5.0, workers: int = 1, memory_gib: float = 2.0) -> None:
        if not 0 < timeout_s <= 600:
            raise ConfigError(f"timeout_s={timeout_s} is out of range: set a number of seconds between 0 and 600.")
        if workers < 1 or workers != int(workers):
            raise ConfigError(f"workers={workers} is no number of processes: set it to an integer of 1 or more.")
        if not 0.5 <= memory_gib <= 1024:
            raise ConfigError(f"memory_gib={memory_gib} is out of range: a worker needs 0.5 GiB or more, 2 is enough.")
        self._lock = threading.Lock()
        self._memo: dict[Pair, Reason] = {}
        self._workers = [_Worker(timeout_s, memory_gib) for _ in range(int(workers))]
        # Runs at garbage collection and at exit, whichever comes first.
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    def __call__(self, pairs: Sequence[tuple[Problem, Completion]]) -> list[Score]:
        """Return one verdict per pair, in order. Blocks while another thread is being served."""
        answers = [(problem.answer, last_boxed(completion.text) or "") for problem, completion in pairs]
        with self._lock:
            graded = self._grade(sorted({pair for pair in answers if not _cheap(pair) and pair not in self._memo}))
            reasons: list[Reason] = [_cheap(pair) or graded.get(pair) or self._memo[pair] for pair in answers]
            self._memo |= {pair: reason for pair, reason in graded.items() if reason not in ("timeout", "error")}
            while len(self._memo) > _MAX_MEMO:
                del self._memo[next(iter(self._memo))]
        scores = []
        for (_, completion), (_, extracted), reason in zip(pairs, answers, reasons, strict=True):
            if reason == "no_answer" and completion.finish_reason == "length":
                reason = "truncated"
            correct = reason == "correct"
            # What was refused for its length is cut here too: logs keep every score.
            scores.append(Score(float(correct), correct, reason, extracted[:MAX_CHARS] or None))
        return scores

    def check(self, problems: Sequence[Problem]) -> None:
        """Compare every ground truth with itself, as a completion that boxes it would be.

        Raises:
            ConfigError: Names every problem whose ground truth is empty, too long, unreadable, or too slow to compare.
        """
        usable = {problem.answer for problem in problems if 0 < len(problem.answer) <= MAX_CHARS}
        with self._lock:
            reasons = self._grade([(answer, answer) for answer in sorted(usable)])
        faults = {"wrong": "does not equal itself", "timeout": "takes too long to compare with itself"}
        lines = []
        for problem in problems:
            reason = reasons.get((problem.answer, problem.answer))
            if reason == "correct":
                continue
            fault = faults.get(reason or "", "is too long" if reason is None else "cannot be read as mathematics")
            fault = fault if problem.answer.strip() else "is empty"
            lines.append(f"- {problem.source or problem.id}: the answer {problem.answer[:80]!r} {fault}")
        if lines:
            raise ConfigError(
                f"{len(lines)} of {len(problems)} ground truths could never be met. Write each one as LaTeX that "
                "verifies against itself, or remove the row:\n" + "\n".join(lines)
            )

    def close(self) -> None:
        """End every worker. Calling it twice is allowed."""
        with self._lock:
            _stop_all(self._workers)

    def _grade(self, pairs: Sequence[Pair]) -> dict[Pair, Reason]:
        """Ask the workers, each one pair at a time."""
        if not pairs:
            return {}
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def ask(pair: Pair) -> Reason:
            worker = idle.get()
            try:
                return worker.ask(pair)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(min(len(self._workers), len(pairs)), thread_name_prefix="grading") as threads:
            return dict(zip(pairs, threads.map(ask, pairs), strict=True))


def _cheap(pair: Pair) -> Reason | None:
    """Return the verdict if it takes no worker."""
    answer, extracted = pair
    if not extracted:
        return "no_answer"
    if len(extracted) > MAX_CHARS:
        return "unparsable"
    if len(answer) > MAX_CHARS:
        return "error"
    return "correct" if answer.split() == extracted.split() else None


def _stop_all(workers: Iterable[_Worker]) -> None:
    for worker in workers:
        worker.stop()
