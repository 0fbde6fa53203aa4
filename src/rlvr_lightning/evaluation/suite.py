"""The evaluation sets: each one declaration that says where its problems come from, how they are asked and how graded."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlvr_lightning.engines import Sampling
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.reading import bad_rows
from rlvr_lightning.evaluation.synthetic import OPERATIONS
from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.records import Problem
from rlvr_lightning.sources import Source, build

SUITE_PREFIX = "suite:"


@dataclass(frozen=True, kw_only=True)
class EvalSet(Source):
    """One evaluation set: where its problems come from, how they are asked and how graded."""

    prompt: PromptTemplate | None = None
    """None: the run's ``rollout.eval_prompt``."""
    rollouts_per_problem: int | None = None
    """Samples per problem, k of avg@k. None: the run's ``rollout.eval_sampling``, which also gives the number of tokens."""
    temperature: float | None = None
    """0 is greedy. None: the run's ``rollout.eval_sampling``."""
    grader: str | None = None
    """A name of ``rlvr_lightning.grading``. None: the verifier's."""
    likelihood: Literal["acc", "acc_norm", "acc_bytes"] | None = None
    """Sample nothing: choose the answer to which the policy gives the highest log-likelihood (``acc``), divided by its
    characters (``acc_norm``) or bytes (``acc_bytes``). The rows need ``choices``. Names: EleutherAI/lm-evaluation-harness."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampling(Sampling())  # refuses numbers that nothing can be sampled with

    def sampling(self, run: Sampling) -> Sampling:
        """Return how this set is sampled in a run whose ``eval_sampling`` is ``run``."""
        own = {"rollouts_per_problem": self.rollouts_per_problem, "temperature": self.temperature}
        if self.likelihood is not None:
            own = {"rollouts_per_problem": 1, "temperature": 0.0}
        return replace(run, **{key: value for key, value in own.items() if value is not None})

    def load(self, folder: str | None) -> list[Problem]:
        """Return the problems: copies of one are one (the paper's files repeat theirs), and ids are unique.

        Args:
            folder: what to read in place of the hub; None downloads.

        Raises:
            ConfigError: if they cannot be had, or listing every bad row.
        """
        found, faults = self.read(folder)
        if faults:
            raise ConfigError(bad_rows(faults))
        different: dict[object, Problem] = {}
        for problem in found:
            different.setdefault((problem.question, problem.answer, problem.choices), problem)
        problems, seen = [], Counter[str]()
        for problem in different.values():
            seen[problem.id] += 1
            number = seen[problem.id]
            problems.append(problem if number == 1 else replace(problem, id=f"{problem.id}#{number}"))
        return problems

    def parse(self, row: dict[str, Any], number: int, source: str) -> Problem:
        """Return the problem of a row; see :data:`~rlvr_lightning.evaluation.reading.RowParser`."""
        problem = super().parse(row, number, source)
        choices = _choices(row, problem.answer) if self.likelihood is not None else ()
        return replace(problem, choices=choices)


def _choices(row: Mapping[str, Any], answer: str) -> tuple[tuple[str, str], ...]:
    """Return (label, text) of every choice: of ``{"label": [...], "text": [...]}``, or of a list, labelled A, B, ..."""
    choices = row.get("choices")
    if isinstance(choices, list):
        choices = {"label": [chr(ord("A") + i) for i in range(len(choices))], "text": choices}
    if not isinstance(choices, dict) or len(choices.get("label", ())) != len(choices.get("text", "-")):
        raise ConfigError("no choices: give a list of texts, or an object with equally long lists label and text")
    pairs = tuple((str(label), str(text)) for label, text in zip(choices["label"], choices["text"], strict=True))
    if answer not in dict(pairs):
        raise ConfigError(f"the answer {answer!r} is none of the labels {', '.join(label for label, _ in pairs)}")
    if not all(text.strip() for _, text in pairs):
        raise ConfigError("a choice is empty")
    return pairs


def _math(local: str, hub: str, hub_file: str, revision: str = "main", **fields: Any) -> EvalSet:
    """Declare a set of mathematics, greedy unless ``fields`` say otherwise."""
    defaults = {"question": ("problem", "question"), "rollouts_per_problem": 1, "temperature": 0.0, "grader": "math"}
    return EvalSet(local=local, hub=hub, hub_file=hub_file, revision=revision, **(defaults | fields))


def _arc(local: str, config: str) -> EvalSet:
    """Declare a half of ARC, asked as lm-evaluation-harness asks it (lm_eval/tasks/arc/arc_easy.yaml).

    The paper names neither harness nor metric; ``acc_norm`` is the other usual one.
    """
    return EvalSet(
        local=local,
        hub="allenai/ai2_arc",
        hub_file=f"{config}/test-00000-of-00001.parquet",
        revision="210d026faf9955653af8916fad021475a3f00453",
        question=("question",),
        answer=("answerKey",),
        prompt=PromptTemplate(chat=False, plain="Question: {question}\nAnswer:"),
        likelihood="acc",
    )


_AVG_AT_8: dict[str, Any] = {"rollouts_per_problem": 8, "temperature": 0.6}

SUITE: Mapping[str, EvalSet] = {
    "math500": _math(
        "math500", "HuggingFaceH4/MATH-500", "test.jsonl", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        id="unique_id", subject="subject",
    ),
    "aime24": _math(
        "aime24", "HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        **_AVG_AT_8,
    ),
    "aime25": _math(
        "aime25", "math-ai/aime25", "test.jsonl", "563bb8404243c5f09de6ec262f2db674fe5bce9b", **_AVG_AT_8
    ),
    "amc23": _math(
        "amc23", "math-ai/amc23", "test-00000-of-00001.parquet", "80815d37005feb82cd7f8fbc6901d5d3eff43057", **_AVG_AT_8
    ),
    "minerva_math": _math(
        "minerva_math", "math-ai/minervamath", "test.jsonl", answer=("solution|last_box", "answer"), id="idx", subject="type"
    ),
    "olympiadbench": _math(
        "olympiadbench", "Hothan/OlympiadBench", "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
        "91184b52131e7fc9455fef848035173aea8cc01a", question=("question",), answer=("final_answer",), subject="subfield",
    ),
    "gsm8k": _math(
        "gsm8k", "openai/gsm8k", "main/test-00000-of-00001.parquet", "740312add88f781978c0658806c59bc2815b9866",
        question=("question",), answer=("answer|after_hashes",), id="idx",
    ),
    "arc_easy": _arc("arc_easy", "ARC-Easy"),
    "arc_challenge": _arc("arc_challenge", "ARC-Challenge"),
}  # fmt: skip
"""The declared sets. The paper's six (arXiv 2504.20571, appendix): greedy on three, eight samples at T = 0.6 on three."""

_ARITHMETIC = re.compile(rf"({'|'.join(OPERATIONS)})_([1-9])digit")


def suite_set(name: str) -> EvalSet:
    """Return a declared set, ``addition_3digit`` and the like, or ``reasoning_gym:TASK``.

    Raises:
        ConfigError: if there is no such set.
    """
    if name in SUITE:
        return SUITE[name]
    if match := _ARITHMETIC.fullmatch(name):
        return EvalSet(generator=f"arithmetic:{match[1]}:{match[2]}", grader="math")
    if name.startswith("reasoning_gym:"):
        return EvalSet(generator=name)
    raise ConfigError(
        f"no evaluation set {name!r}: use suite: with {', '.join(SUITE)}, OPERATION_Ndigit (such as addition_3digit), or "
        "reasoning_gym:TASK"
    )


def declared(name: str, value: str | Mapping[str, Any]) -> EvalSet:
    """Return the set that ``data.evals.NAME`` declares.

    Args:
        name: its name in the run, for messages.
        value: a file, ``builtin:NAME``, ``suite:NAME``, or fields of :class:`EvalSet`, which may change those of a ``base``
            that is written in one of the first three ways.

    Raises:
        ConfigError: naming the set and what is wrong with it.
    """
    if isinstance(value, str):
        if not value.startswith(SUITE_PREFIX):
            return EvalSet(file=value)
        try:
            return suite_set(value.removeprefix(SUITE_PREFIX))
        except ConfigError as error:
            raise ConfigError(f"data.evals.{name}: {error}") from error
    fields = dict(value)
    base = fields.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"data.evals.{name}.base is {base!r}: write a file, builtin:NAME or suite:NAME")
    return build(EvalSet, fields, f"data.evals.{name}", "evaluation set", None if base is None else declared(name, base))
