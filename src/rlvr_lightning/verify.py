"""Verdicts on completions: a grader finds the answer, and processes that can be killed compare it with the ground truth.

Nothing in the text is trusted: extraction is one linear scan, long answers are refused, and comparisons happen in
:mod:`rlvr_lightning.grading.worker` under a wall clock that this process holds. No signals, so any thread may grade.
"""

import json
import os
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.grading import load_grader
from rlvr_lightning.records import Completion, Problem, Reason, Score

MAX_CHARS = 2000
"""Longer answers are refused. Two of them, JSON-escaped, fit into a pipe: asking a stuck worker never blocks."""
_MAX_MEMO = 100_000
_START_LIMIT_S = 120.0

Item = tuple[str, str, str]
"""Grader, ground truth, and extracted answer or an empty string."""


class Verifier:
    """Grades completions in worker processes; reward 1.0 for a correct answer and 0.0 for everything else.

    Verdicts do not depend on thread, order or number of workers. Workers start on first need, also after ``close``, and
    verdicts are memoised, except those that say more about the machine than about the answer (timeout, error).

    Args:
        grader: a name of :data:`rlvr_lightning.grading.GRADERS`, or the dotted path of a module like them.
        timeout_s: Wall-clock limit of one comparison, in seconds; start-up and queueing do not count.
        workers: Comparisons that run at the same time.
        memory_gib: Address-space limit of one worker.
    """

    def __init__(self, grader: str = "math", *, timeout_s: float = 5.0, workers: int = 1, memory_gib: float = 2.0) -> None:
        if not 0 < timeout_s <= 600:
            raise ConfigError(f"timeout_s={timeout_s} is out of range: set a number of seconds between 0 and 600.")
        if workers < 1 or workers != int(workers):
            raise ConfigError(f"workers={workers} is no number of processes: set it to an integer of 1 or more.")
        if not 0.5 <= memory_gib <= 1024:
            raise ConfigError(f"memory_gib={memory_gib} is out of range: a worker needs 0.5 GiB or more, 2 is enough.")
        load_grader(grader)
        self.grader = grader
        self._lock = threading.Lock()
        self._memo: dict[Item, Reason] = {}
        self._early: dict[Item, Future[None]] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="anticipation")
        self._workers = [_Worker(timeout_s, memory_gib) for _ in range(int(workers))]
        # Runs at garbage collection and at exit, whichever comes first.
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    def anticipate(self, problem: Problem, completion: Completion, grader: str | None = None) -> None:
        """Begin to grade one completion in the background: a later call finds the verdict waiting. Never blocks."""
        item = self._item(problem, completion, grader or self.grader)
        if _cheap(item) is None and item not in self._memo and item not in self._early:
            self._early[item] = self._background.submit(self._fill, item)

    def _fill(self, item: Item) -> None:
        with self._lock:
            if item not in self._memo:
                self._memo |= self._grade([item])

    def __call__(self, pairs: Sequence[tuple[Problem, Completion]], grader: str | None = None) -> list[Score]:
        """Return one verdict per pair, in order. Blocks while another thread is being served.

        Args:
            pairs: what was asked, and what was answered.
            grader: another grader than the verifier's own.
        """
        items = [self._item(problem, completion, grader or self.grader) for problem, completion in pairs]
        for future in list(self._early.values()):
            future.result()
        self._early.clear()
        with self._lock:
            missing = sorted({item for item in items if _cheap(item) is None and item not in self._memo})
            self._memo |= self._grade(missing)
            reasons: list[Reason] = [_cheap(item) or self._memo[item] for item in items]
            for item in {i for i in items if self._memo.get(i) in ("timeout", "error")}:
                del self._memo[item]
            while len(self._memo) > _MAX_MEMO:
                del self._memo[next(iter(self._memo))]
        scores = []
        for (_, completion), (_, _, extracted), reason in zip(pairs, items, reasons, strict=True):
            if reason == "no_answer" and completion.finish_reason == "length":
                reason = "truncated"
            correct = reason == "correct"
            # What was refused for its length is cut here too: logs keep every score.
            scores.append(Score(float(correct), correct, reason, extracted[:MAX_CHARS] or None))
        return scores

    def unverifiable(self, problems: Sequence[Problem], grader: str | None = None) -> list[str]:
        """Compare every ground truth with itself, as a completion that boxes it would be.

        Returns:
            A line for each problem whose ground truth is empty, too long, unreadable, or too slow to compare.
        """
        name = grader or self.grader
        usable = {problem.answer for problem in problems if 0 < len(problem.answer) <= MAX_CHARS}
        with self._lock:
            reasons = self._grade([(name, answer, answer) for answer in sorted(usable)])
        faults = {"wrong": "does not equal itself", "timeout": "takes too long to compare with itself"}
        lines = []
        for problem in problems:
            reason = reasons.get((name, problem.answer, problem.answer))
            if reason == "correct":
                continue
            fault = faults.get(reason or "", "is too long" if reason is None else "cannot be read as mathematics")
            fault = fault if problem.answer.strip() else "is empty"
            lines.append(f"- {problem.source or problem.id}: the answer {problem.answer[:80]!r} {fault}")
        return lines

    def check(self, problems: Sequence[Problem], grader: str | None = None) -> None:
        """Raise ConfigError if a ground truth could never be met, naming every such problem."""
        if lines := self.unverifiable(problems, grader):
            raise ConfigError(
                f"{len(lines)} of {len(problems)} ground truths could never be met. Write each one as LaTeX that "
                "verifies against itself, or remove the row:\n" + "\n".join(lines)
            )

    def close(self) -> None:
        """End every worker, and forget what was anticipated. Calling it twice is allowed."""
        for future in self._early.values():
            future.cancel()
        self._early.clear()
        with self._lock:
            _stop_all(self._workers)

    def _item(self, problem: Problem, completion: Completion, grader: str) -> Item:
        return grader, problem.answer, load_grader(grader).extract(completion.text) or ""

    def _grade(self, items: Sequence[Item]) -> dict[Item, Reason]:
        """Ask the workers, each one item at a time."""
        if not items:
            return {}
        if len(self._workers) == 1:
            return {item: self._workers[0].ask(item) for item in items}
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def ask(item: Item) -> Reason:
            worker = idle.get()
            try:
                return worker.ask(item)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(min(len(self._workers), len(items)), thread_name_prefix="grading") as threads:
            return dict(zip(items, threads.map(ask, items), strict=True))


class _Worker:
    """One grading process, started when it is first asked and again after it had to be killed."""

    def __init__(self, timeout_s: float, memory_gib: float) -> None:
        self._timeout_s, self._memory_gib = timeout_s, memory_gib
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: set[str] = set()

    def ask(self, item: Item) -> Reason:
        """Grade one item. The clock runs only while the worker has it."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        grader = item[0]
        if grader not in self._loaded:
            self._expect_ready(self._request(process, (grader,), _START_LIMIT_S), f"the grader {grader!r}")
            self._loaded.add(grader)
        reply = self._request(process, item, self._timeout_s)
        if not reply:
            self.stop()
            return "timeout" if reply is None else "error"
        return json.loads(reply)

    def _request(self, process: "subprocess.Popen[bytes]", message: Sequence[str], limit_s: float) -> str | None:
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            return _read(process, limit_s)
        except OSError:  # a broken pipe: it died before it could read
            return ""
        except BaseException:  # an interrupt: the reply to this question must not answer the next one
            self.stop()
            raise

    def stop(self) -> None:
        process, self._process = self._process, None
        self._loaded.clear()
        if process is not None:
            process.kill()
            with suppress(OSError), process:  # leaving the context waits and closes; the pipe may be broken
                pass

    def _start(self) -> "subprocess.Popen[bytes]":
        self.stop()
        limits = [str(int(self._memory_gib * 2**30)), str(2 * self._timeout_s + 5)]
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "rlvr_lightning.grading.worker", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # The worker finds what this process finds, a grader of the user's own among it.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        try:
            ready = _read(process, _START_LIMIT_S)
        except BaseException:
            self.stop()
            raise
        self._expect_ready(ready, "Python")
        return process

    def _expect_ready(self, reply: str | None, what: str) -> None:
        """Raise ConfigError unless a start succeeded: it must not look like a policy that answers nothing right."""
        if not reply or json.loads(reply) != "ready":
            self.stop()
            raise ConfigError(
                f"The grading worker did not start {what}: check that `python -m rlvr_lightning.grading.worker 4000000000 60` "
                f"says ready with {sys.executable}, or raise memory_gib={self._memory_gib}."
            )


def _read(process: "subprocess.Popen[bytes]", limit_s: float) -> str | None:
    """Return the next line, None if there was none in time, or an empty string if the process has ended."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    if not poll.poll(limit_s * 1000):
        return None
    line = process.stdout.readline().decode()
    return line if line.endswith("\n") else ""


def _cheap(item: Item) -> Reason | None:
    """Return the verdict if it takes no worker."""
    _, answer, extracted = item
    if not extracted.strip():
        return "no_answer"
    if len(extracted) > MAX_CHARS:
        return "unparsable"
    if len(answer) > MAX_CHARS:
        return "error"
    return "correct" if answer.split() == extracted.split() else None


def _stop_all(workers: Iterable[_Worker]) -> None:
    for worker in workers:
        worker.stop()
