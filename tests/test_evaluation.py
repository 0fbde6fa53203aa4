"""Evaluations as they are declared, sampled, scored, written down, interrupted and resumed."""

import functools
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr_lightning.__main__ import main
from rlvr_lightning.callbacks.evaluation import EvaluationCallback
from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.data import EvalDataModule, SingleExampleDataModule
from rlvr_lightning.engines import Sampling
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.likelihood import choose
from rlvr_lightning.evaluation.paper import REPORTED, SIX
from rlvr_lightning.evaluation.results import fingerprint
from rlvr_lightning.evaluation.suite import SUITE, EvalSet, declared, suite_set
from rlvr_lightning.evaluation.table import table
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.policy import PolicyConfig
from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.records import Problem, Score
from rlvr_lightning.strategies import FSDP2Strategy

ROW = ["id", "sample", "subject", "question", "ground_truth", "response", "tokens", "finish_reason", "extracted", "reason"]
ROW += ["reward", "correct"]
CONTEXT = "Question: {question}\nAnswer:"
COLOURS = [
    {"id": "sky", "question": "Sky?", "choices": {"text": ["red", "blue", "a kind of green"], "label": ["A", "B", "C"]}},
    {"id": "blood", "question": "Blood?", "choices": {"text": ["red", "blue", "grey"], "label": ["1", "2", "3"]}},
    {"id": "snow", "question": "Snow?", "choices": {"text": ["off white", "black"], "label": ["A", "B"]}},
]
ANSWERS = ["B", "1", "A"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"s{i}", "question": f"{i} + 1?", "answer": str(i + 1), "kind": "odd" if i % 2 else "even"} for i in range(count)
    ]


@pytest.fixture
def evals(tmp_path: Path) -> dict[str, Any]:
    """Sums, sampled twice at T = 1; the same greedily; colours by likelihood."""
    file = str(write(tmp_path / "sums.jsonl", sums(7)))
    colours = write(tmp_path / "colours.jsonl", [row | {"answer": a} for row, a in zip(COLOURS, ANSWERS, strict=True)])
    plain = {"chat": False, "plain": CONTEXT}
    return {
        "twice": {"file": file, "rollouts_per_problem": 2, "temperature": 1.0, "subject": "kind", "grader": "exact"},
        "greedy": {"file": file},
        "colours": {"file": str(colours), "likelihood": "acc", "prompt": plain},
    }


class CountingEngine(HFEngine):
    """Counts completions; fails, as a machine or a user may, instead of the call after ``calls``."""

    def __init__(self, calls: int = 10**6, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.calls, self.error, self.completions = calls, error, 0

    def generate(self, prompts: Any, sampling: Sampling, seeds: Any, _: Any = None) -> Any:
        if self.calls == 0:
            raise self.error("stopped here")
        self.calls -= 1
        self.completions += sum(map(len, seeds))
        return super().generate(prompts, sampling, seeds)


def evaluate(
    model: Path,
    root: Path,
    evals: dict[str, Any],
    *,
    engine: HFEngine | None = None,
    batch_size: int = 2,
    stage: str = "test",
    strategy: Any = "auto",
    devices: int = 1,
    **rollout: Any,
) -> Trainer:
    greedy = Sampling(rollouts_per_problem=1, temperature=0.0, max_tokens=6)
    callbacks = [EvaluationCallback(), RolloutCallback(engine=engine or HFEngine(), **({"eval_sampling": greedy} | rollout))]
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        inference_mode=False,
        default_root_dir=root,
        callbacks=callbacks,
    )
    module = RLVRModule(policy=PolicyConfig(model=str(model)))
    data = EvalDataModule(evals=evals, eval_batch_size=batch_size)
    getattr(trainer, stage)(module, datamodule=data, verbose=False)
    return trainer


def samples(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "evaluation" / f"{name}.jsonl").read_text().splitlines()]


def results(root: Path) -> dict[str, Any]:
    return json.loads((root / "evaluation" / "results.json").read_text())


def timeless(content: dict[str, Any]) -> dict[str, Any]:
    for entry in content["sets"].values():
        del entry["seconds"], entry["tokens_per_s"]
    return content


# --- declarations -----------------------------------------------------------------------------------------------------


def test_a_declaration_may_start_from_one_of_the_suite() -> None:
    changed = declared("mine", {"base": "suite:aime24", "rollouts_per_problem": 4, "prompt": {"suffix": "!"}, "grader": None})
    assert (changed.hub, changed.rollouts_per_problem, changed.temperature) == ("HuggingFaceH4/aime_2024", 4, 0.6)
    assert changed.prompt is not None
    assert changed.prompt.suffix == "!"
    assert changed.grader is None
    assert declared("mine", "suite:aime24") is SUITE["aime24"]
    assert declared("mine", "some.jsonl") == EvalSet(file="some.jsonl")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("suite:math", "no evaluation set 'math'.*math500"),
        ({"base": "suite:math"}, "no evaluation set 'math'"),
        ({"base": 3}, "base is 3"),
        ({"base": "suite:math500", "tempreture": 1}, "tempreture"),
        ({"base": "suite:math500", "likelihood": "best"}, "likelihood"),
        ({"grader": "math"}, "one of file, generator, hub; this one has none"),
        ({"file": "x.jsonl", "hub": "a/b"}, "this one has file and hub"),
        ({"file": "x.jsonl", "rollouts_per_problem": 0}, "rollouts_per_problem is 0"),
    ],
)
def test_a_wrong_declaration_is_refused_by_the_name_of_its_set(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)data.evals.mine.*{message}"):
        declared("mine", value)


def test_own_keys_lists_boxes_hashes_and_repeated_ids(tmp_path: Path) -> None:
    rows = [
        {"text": "a?", "gold": ["1", "2"], "n": 5},
        {"text": "b?", "solution": "so \\boxed{3}, no: \\boxed{\\frac{4}{5}}.", "n": 5},
        {"text": "c?", "worked": "6 and 7\n#### 1,300", "n": 6},
        {"text": "d?", "gold": 8.0},
    ]
    own = EvalSet(
        file=str(write(tmp_path / "x.jsonl", rows)),
        question=("text",),
        answer=("gold", "solution|last_box", "worked|after_hashes"),
        id="n",
    )
    problems = own.load(None)
    assert [p.answer for p in problems] == ["1", "\\frac{4}{5}", "1,300", "8"]
    assert [p.id for p in problems] == ["5", "5#2", "6", "4"]


def test_a_file_that_repeats_its_problems_holds_each_once(tmp_path: Path) -> None:
    """The paper's AIME and AMC files hold every row eight times, and its training files one row 128 times."""
    for rows in (sums(3), [{k: v for k, v in row.items() if k != "id"} for row in sums(3)]):
        once, many = (EvalSet(file=str(write(tmp_path / f"{n}.jsonl", rows * n))).load(None) for n in (1, 8))
        assert [(p.id, p.question, p.answer) for p in many] == [(p.id, p.question, p.answer) for p in once]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a?", "choices": ["x", "y"], "answer": "C"}, "the answer 'C' is none of the labels A, B"),
        ({"question": "a?", "answer": "A"}, "no choices"),
        ({"question": "a?", "choices": {"label": ["A"], "text": ["x", "y"]}, "answer": "A"}, "no choices"),
        ({"question": "a?", "choices": ["x", " "], "answer": "A"}, "a choice is empty"),
    ],
)
def test_choices_that_cannot_be_scored_are_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"row 1: {message}"):
        EvalSet(file=str(write(tmp_path / "x.jsonl", [row])), likelihood="acc").load(None)


def test_the_folder_stands_in_for_the_hub_and_neither_is_an_error_that_says_so(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", [{"question": "How many?", "answer": "thus\n#### 12", "idx": 3}])
    assert [(p.id, p.answer) for p in suite_set("gsm8k").load(str(tmp_path))] == [("3", "12")]
    with pytest.raises(ConfigError, match=r"eval_folder .* holds no math500\.jsonl: put it there, or leave"):
        suite_set("math500").load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"allenai/ai2_arc cannot be had from the hub .*set data\.eval_folder"):
        suite_set("arc_easy").load(None)  # the tests run offline


@pytest.mark.parametrize(
    ("name", "size"), [("addition_1digit", 81), ("subtraction_1digit", 45), ("multiplication_3digit", 200)]
)
def test_arithmetic_is_right_without_repetition_and_a_function_of_the_seed(name: str, size: int) -> None:
    problems = suite_set(name).load(None)
    assert len(problems) == len({p.id for p in problems}) == size
    for p in problems:
        a, sign, b = p.question.removeprefix("What is ").removesuffix("?").split()
        assert {len(a), len(b)} == {int(name.split("_")[1][0])}
        assert int(p.answer) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] >= 0
    assert suite_set(name).load(None) == problems
    assert declared("x", {"base": f"suite:{name}", "seed": 1, "count": 20}).load(None) != problems[:20]


def test_a_generator_that_is_unknown_or_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe in ("arithmetic:division:2", "arithmetic:addition", "arithmetic:addition:0", "prose:short"):
        with pytest.raises(ConfigError, match=f"generator '{recipe}' is unknown: write arithmetic:OPERATION:DIGITS"):
            EvalSet(generator=recipe).load(None)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # what an environment without it looks like
    with pytest.raises(ConfigError, match="needs reasoning-gym: pip install reasoning-gym"):
        suite_set("reasoning_gym:chain_sum").load(None)


# --- likelihood -------------------------------------------------------------------------------------------------------


def loglikelihood(model: Any, tokenizer: Any, context: str, text: str) -> float:
    """Sum of log p of the tokens after the context, from the logits of one row."""
    whole = tokenizer(f"{context} {text}", add_special_tokens=False).input_ids
    start = len(tokenizer(context, add_special_tokens=False).input_ids)
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(log_p[t - 1, whole[t]]) for t in range(start, len(whole)))


LENGTH = {"acc": lambda t: 1, "acc_norm": len, "acc_bytes": lambda t: len(t.encode())}


@pytest.mark.parametrize("metric", LENGTH)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_likelihood_chooses_as_a_loop_over_single_rows_does(
    tiny_model: Path, tmp_path: Path, evals: dict[str, Any], metric: str, batch_size: int
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    expected, nats = [], []
    for row in COLOURS:
        context = f"Question: {row['question']}\nAnswer:"
        found = [loglikelihood(model, tokenizer, context, text) for text in row["choices"]["text"]]
        scored = [n / LENGTH[metric](t) for n, t in zip(found, row["choices"]["text"], strict=True)]
        best = max(range(len(scored)), key=scored.__getitem__)
        assert sorted(scored)[-1] - sorted(scored)[-2] > 1e-3  # no near-tie that rounding could turn
        expected.append(row["choices"]["label"][best])
        nats.append(found[best])
    engine = CountingEngine()
    only = {"colours": evals["colours"] | {"likelihood": metric}}
    evaluate(tiny_model, tmp_path, only, batch_size=batch_size, engine=engine)
    assert [row["extracted"] for row in samples(tmp_path, "colours")] == expected
    assert engine.completions == 0  # nothing is sampled
    entry = results(tmp_path)["sets"]["colours"]
    right = [e == a for e, a in zip(expected, ANSWERS, strict=True)]
    assert entry["metrics"] == {"accuracy": sum(right) / 3}
    assert entry["fingerprint"]["grader"] == f"log-likelihood, {metric}"


def test_dividing_by_the_length_decides_between_short_and_long(tiny_model: Path) -> None:
    """Every token of every choice gets -1 nat: the shortest wins, unless lengths are divided out."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    problem = Problem("p", "?", "B", choices=(("A", "aaa a aaa"), ("B", "b"), ("C", "aéé")))

    def chosen(metric: Any, logprobs: Any) -> Any:
        template = PromptTemplate(chat=False, plain=CONTEXT)
        return choose([problem], template, tokenizer, logprobs, metric=metric, policy_version=3)[0]

    def flat(data: Any) -> torch.Tensor:
        return -1.0 * data.completion_mask

    # One token per character and one for the space: A -10, B -2, C -4 nats; A has 9 characters, C 3, in 5 bytes.
    assert chosen("acc", flat).score.extracted == "B"  # -2
    assert chosen("acc_norm", flat).score.extracted == "A"  # -10/9, -2/1, -4/3
    assert chosen("acc_bytes", flat).score.extracted == "C"  # -10/9, -2/1, -4/5
    best = chosen("acc", flat)
    assert (best.score.correct, best.score.reward, best.policy_version) == (True, 1.0, 3)
    assert (best.completion.text, best.completion.logprobs) == ("b", (-1.0, -1.0))
    assert chosen("acc", lambda data: 0.0 * data.completion_mask).score.extracted == "A"  # a tie


# --- what a test leaves behind ----------------------------------------------------------------------------------------


def test_a_test_writes_every_sample_and_its_results(
    tiny_model: Path, tmp_path: Path, evals: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = evaluate(tiny_model, tmp_path, evals)
    found = results(tmp_path)
    assert (found["model"], found["policy_version"], list(found["sets"])) == (str(tiny_model), 0, list(evals))
    rows = samples(tmp_path, "twice")
    assert list(rows[0]) == ROW
    assert [(row["id"], row["sample"]) for row in rows] == [(f"s{i}", sample) for i in range(7) for sample in range(2)]
    entry = found["sets"]["twice"]
    assert (entry["problems"], entry["samples_per_problem"]) == (7, 2)
    accuracy = sum(row["correct"] for row in rows) / 14
    assert entry["metrics"]["accuracy"] == entry["metrics"]["avg@2"] == accuracy
    assert entry["metrics"]["length"] == sum(row["tokens"] for row in rows) / 14
    assert entry["intervals"].keys() == entry["metrics"].keys()
    for key, (low, high) in entry["intervals"].items():
        assert low <= entry["metrics"][key] <= high, key
    assert {s: v["problems"] for s, v in entry["subjects"].items()} == {"even": 4, "odd": 3}
    assert sum(entry["reasons"].values()) == 14
    assert entry["tokens_per_s"] == pytest.approx(sum(row["tokens"] for row in rows) / entry["seconds"])
    assert sorted(entry["fingerprint"]) == ["data", "grader", "id", "prompt", "sampling"]
    assert entry["fingerprint"]["sampling"] == "2 at T=1, at most 6 tokens, seed 0"
    assert [entry["fingerprint"]["grader"], found["sets"]["greedy"]["fingerprint"]["grader"]] == ["exact", "math"]
    for name, entry in found["sets"].items():  # what is logged is what is written
        for key, value in entry["metrics"].items():
            assert float(trainer.callback_metrics[f"test/{name}/{key}"]) == pytest.approx(value)
    printed = capsys.readouterr().out.splitlines()
    numbers = [line for line in printed if any(line.startswith(name) for name in evals)]
    assert len(numbers) == 2 * 4 + 2 + 3  # four batches of two sets, two of one; three rows of the table
    for line in numbers:
        assert found["sets"][line.split()[0]]["fingerprint"]["id"] in line


def test_a_set_is_sampled_as_it_declares_whatever_the_batches(tiny_model: Path, tmp_path: Path, evals: dict[str, Any]) -> None:
    for size in (1, 3, 50):
        evaluate(tiny_model, tmp_path / str(size), {"twice": evals["twice"]}, batch_size=size)
    one, three, all_ = (samples(tmp_path / str(size), "twice") for size in (1, 3, 50))
    assert one == three == all_
    assert len({row["response"] for row in one}) > 7  # samples of a problem differ


def test_validation_says_what_it_measures_and_writes_nothing(
    tiny_model: Path, tmp_path: Path, evals: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = evaluate(tiny_model, tmp_path, evals, stage="validate")
    assert not (tmp_path / "evaluation").exists()
    assert {f"val/{name}/accuracy" for name in evals} <= trainer.callback_metrics.keys()
    out = capsys.readouterr().out
    assert out.count("evaluation   ") == 3
    assert "twice: 7 problems, samples: 2 at T=1, at most 6 tokens, seed 0, grader: exact   [" in out


def test_ground_truths_that_cannot_be_met_are_a_warning_given_once(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "x.jsonl", [{"question": "1?", "answer": "1"}, {"question": "2?", "answer": "\\frac{"}])
    evaluate(tiny_model, tmp_path, {"odd": {"file": str(file), "grader": "math"}})
    out = capsys.readouterr().out
    assert out.count("warning: evaluation set odd: 1 of 2 ground truths can never be met") == 1
    assert f"{file}:2" in out
    assert f"{file}:1" not in out


def test_a_test_of_nothing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    data = SingleExampleDataModule(question="1 + 1?", answer="2")
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[EvaluationCallback(), RolloutCallback(engine=HFEngine())])
    with pytest.raises(ConfigError, match=r"data\.evals is empty: name at least one"):
        trainer.test(RLVRModule(policy=PolicyConfig(model=str(tiny_model))), datamodule=data)


def test_a_set_that_names_its_grader_is_not_left_to_a_verifier_of_ones_own(
    tiny_model: Path, tmp_path: Path, evals: dict[str, Any]
) -> None:
    class Generous:
        def __call__(self, pairs: Any) -> list[Score]:
            return [Score(1.0, True, "correct", "anything") for _ in pairs]

        def check(self, problems: Any) -> None: ...

        def close(self) -> None: ...

    evaluate(tiny_model, tmp_path, {name: evals[name] for name in ("twice", "greedy")}, verifier=Generous())
    found = results(tmp_path)["sets"]
    assert found["greedy"]["metrics"]["accuracy"] == 1
    assert found["twice"]["metrics"]["accuracy"] == 0  # graded by exact: a random model adds nothing up
    assert [found[name]["fingerprint"]["grader"] for name in ("twice", "greedy")] == ["exact", "Generous"]


# --- interrupted and resumed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1, 3, 4, 7])
def test_an_interrupted_test_goes_on_to_the_same_numbers(
    tiny_model: Path, tmp_path: Path, evals: dict[str, Any], calls: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    evaluate(tiny_model, whole, evals)
    with pytest.raises(RuntimeError, match="stopped here"):
        evaluate(tiny_model, cut, evals, engine=CountingEngine(calls))
    assert "the same command goes on" in capsys.readouterr().out
    assert not (cut / "evaluation" / "results.json").exists()
    before = {name: len(samples(cut, name)) for name in ("twice", "greedy")}
    assert before == {"twice": min(4 * calls, 14), "greedy": max(0, min(2 * (calls - 4), 7))}
    with (cut / "evaluation" / "greedy.jsonl").open("a") as file:
        file.write('{"id": "s0", "sam')  # torn by a crash
    engine = CountingEngine()
    resumed = evaluate(tiny_model, cut, evals, engine=engine)
    assert engine.completions == 21 - sum(before.values())
    assert timeless(results(cut)) == timeless(results(whole))
    assert [samples(cut, name) for name in evals] == [samples(whole, name) for name in evals]
    for name, entry in results(whole)["sets"].items():  # what a resumed run logs covers the whole set too
        assert float(resumed.callback_metrics[f"test/{name}/accuracy"]) == pytest.approx(entry["metrics"]["accuracy"])


def test_a_problem_with_half_of_its_samples_is_sampled_again(tiny_model: Path, tmp_path: Path, evals: dict[str, Any]) -> None:
    only = {"twice": evals["twice"]}
    evaluate(tiny_model, tmp_path, only)
    whole = samples(tmp_path, "twice")
    write(tmp_path / "evaluation" / "twice.jsonl", whole[:5])
    engine = CountingEngine()
    evaluate(tiny_model, tmp_path, only, engine=engine)
    assert engine.completions == 10  # two of seven problems were whole
    assert samples(tmp_path, "twice") == whole


def test_a_finished_test_given_again_samples_nothing_and_another_set_joins_it(
    tiny_model: Path, tmp_path: Path, evals: dict[str, Any]
) -> None:
    evaluate(tiny_model, tmp_path, {"twice": evals["twice"]})
    first, engine = results(tmp_path), CountingEngine()
    evaluate(tiny_model, tmp_path, {"twice": evals["twice"]}, engine=engine)
    assert (results(tmp_path), engine.completions) == (first, 0)
    evaluate(tiny_model, tmp_path, {"greedy": evals["greedy"]}, engine=engine)
    assert engine.completions == 7
    assert list(results(tmp_path)["sets"]) == ["twice", "greedy"]
    assert results(tmp_path)["sets"]["twice"] == first["sets"]["twice"]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "prompt": ({"eval_prompt": PromptTemplate(system="Add.")}, "greedy: prompt was "),
    "sampling": ({"eval_sampling": Sampling(rollouts_per_problem=1, temperature=0.0, max_tokens=5)}, "greedy: sampling was "),
    "seed": (
        {"seed": 1},
        "twice: sampling was '2 at T=1, at most 6 tokens, seed 0' and is '2 at T=1, at most 6 tokens, seed 1'",
    ),
}


@pytest.mark.parametrize("change", [*CHANGES, "grader", "data", "weights"])
def test_another_evaluation_in_the_folder_is_an_error_that_names_it(
    tiny_model: Path, tmp_path: Path, evals: dict[str, Any], change: str
) -> None:
    evaluate(tiny_model, tmp_path, evals)
    before = {path.name: path.read_bytes() for path in (tmp_path / "evaluation").iterdir()}
    settings, message = CHANGES.get(change, ({}, f"twice: {change} was"))
    if change == "grader":
        evals["twice"]["grader"] = "math"
    elif change == "data":
        write(tmp_path / "sums.jsonl", [*sums(6), sums(7)[6] | {"answer": "8"}])
    elif change == "weights":
        message = "weights was"
        state = json.loads(before["state.json"])
        before["state.json"] = json.dumps(state | {"weights": "0" * 12}).encode()
        (tmp_path / "evaluation" / "state.json").write_bytes(before["state.json"])
    with pytest.raises(ConfigError) as caught:
        evaluate(tiny_model, tmp_path, evals, **settings)
    assert message in str(caught.value)
    assert str(tmp_path / "evaluation") in str(caught.value)
    assert "set trainer.default_root_dir to another folder, remove this one" in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "evaluation").iterdir()} == before


def test_weights_that_differ_are_told_apart(tiny_model: Path, tmp_path: Path, evals: dict[str, Any]) -> None:
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    evaluate(other, tmp_path, {"greedy": evals["greedy"]})
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight += 1e-3
    model.save_pretrained(other)
    with pytest.raises(ConfigError, match=r"weights was '[0-9a-f]{12}' and is '[0-9a-f]{12}'"):
        evaluate(other, tmp_path, {"greedy": evals["greedy"]})


def test_a_fingerprint_changes_with_everything_that_decides_the_number() -> None:
    problems = [Problem("a", "1?", "1"), Problem("b", "2?", "2")]
    start: dict[str, Any] = {"prompt": "p", "sampling": "s", "grader": "g", "problems": problems}
    others = [{"prompt": "q"}, {"sampling": "t"}, {"grader": "h"}, {"problems": problems[::-1]}, {"problems": problems[:1]}]
    others.append({"problems": [Problem("a", "1?", "1", choices=(("A", "x"),)), problems[1]]})
    ids = [fingerprint(**(start | other))["id"] for other in [{}, *others]]
    assert len(set(ids)) == len(ids)
    assert fingerprint(**start) == fingerprint(**(start | {"problems": list(problems)}))


# --- the table --------------------------------------------------------------------------------------------------------


def result_of(accuracy: float) -> dict[str, Any]:
    return {
        "fingerprint": {"id": "abc"},
        "problems": 30,
        "samples_per_problem": 1,
        "metrics": {"accuracy": accuracy},
        "intervals": {"accuracy": [0.0, 1.0]},
    }


def test_the_papers_numbers_stand_beside_ours_where_model_and_set_are_the_papers() -> None:
    sets = {name: result_of(0.5) for name in (*SIX, "mine")}
    lines = table({"model": "Qwen/Qwen2.5-Math-1.5B", "policy_version": 0, "sets": sets}).splitlines()
    assert "paper: untrained  paper: pi1" in lines[1]
    cells = {line.split("  ")[0]: line.split() for line in lines}
    assert cells["math500"][-4:] == ["36.0", "72.8", "74.8", "abc"]
    assert cells["mine"][-2:] == ["100.0", "abc"]
    assert cells["average of six"][-4:] == ["50.0", "17.6", "35.0", "36.6"]  # the paper's own averages
    alone = table({"model": "someone/else", "policy_version": 0, "sets": sets})
    assert "paper" not in alone
    assert "average of six" not in table({"model": "x", "policy_version": 0, "sets": {"mine": result_of(1.0)}})


@pytest.mark.parametrize(
    ("model", "data", "average"),
    [
        ("Qwen2.5-Math-7B", "untrained", 22.4),
        ("Qwen2.5-Math-7B", "pi1", 40.2),
        ("Qwen2.5-Math-7B", "4-shot", 42.5),
        ("Llama-3.2-3B-Instruct", "untrained", 17.5),
        ("Llama-3.2-3B-Instruct", "pi1+pi13", 21.0),
        ("Qwen2.5-1.5B", "16-shot", 21.0),
        ("Qwen2.5-Math-1.5B-Instruct", "pi1", 37.1),
    ],
)
def test_the_papers_rows_add_up_to_the_averages_that_it_prints(model: str, data: str, average: float) -> None:
    assert sum(REPORTED[model][data][name] for name in SIX) / 6 == pytest.approx(average, abs=0.051)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def keep_signals() -> Iterator[None]:
    """Lightning leaves Ctrl-C switched off after it has been pressed."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keep_signals")
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "aime25.jsonl", [{"problem": f"{i} + 1?", "answer": f"{i + 1}"} for i in range(6)])
    evaluate_yaml = Path(__file__).parents[1] / "conf" / "evaluate.yaml"
    arguments = ["test", "--config", str(evaluate_yaml), f"--model.policy.model={tiny_model}"]
    arguments += ["--data.init_args.evals={aime25: 'suite:aime25'}", f"--data.init_args.eval_folder={tmp_path}"]
    arguments += ["--data.init_args.eval_batch_size=2", "--rollout.engine=rlvr_lightning.engines.hf.HFEngine"]
    arguments += ["--rollout.eval_sampling.max_tokens=4", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    arguments += [f"--trainer.default_root_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["rlvr", *arguments])
    generate, calls = HFEngine.generate, []

    @functools.wraps(generate)
    def interrupted(self: HFEngine, *args: Any) -> Any:
        calls.append(len(args[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *args)

    monkeypatch.setattr(HFEngine, "generate", interrupted)
    assert main() == 130
    assert "2 finished problems are kept" in capsys.readouterr().out
    assert main() == 0
    assert calls == [2, 2, 2, 2]  # 0-1, interrupted at 2-3, then 2-3 and 4-5
    out = capsys.readouterr().out
    assert "2 problems were finished before" in out
    assert "Test metric" not in out  # Lightning's own table knows no fingerprint
    assert [(r["id"], r["sample"]) for r in samples(tmp_path / "run", "aime25")] == [
        (str(i + 1), sample) for i in range(6) for sample in range(8)
    ]


# --- two processes ----------------------------------------------------------------------------------------------------


def _rank(rank: int, model: str, root: str, port: int, evals: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    trainer = evaluate(Path(model), Path(root), evals, strategy=FSDP2Strategy(timeout_s=60), devices=2, batch_size=1)
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    (Path(root) / f"rank{rank}.json").write_text(json.dumps(logged))


@pytest.mark.multiprocess
def test_two_processes_leave_what_one_does(tiny_model: Path, tmp_path: Path, evals: dict[str, Any]) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    evaluate(tiny_model, alone, evals)
    # As if interrupted: the ranks have different numbers of problems left, one of them none at all for a while.
    (together / "evaluation").mkdir(parents=True)
    state = json.loads((alone / "evaluation" / "state.json").read_text())
    (together / "evaluation" / "state.json").write_text(json.dumps(state))
    for name, count in (("twice", 2), ("greedy", 1), ("colours", 1)):
        write(together / "evaluation" / f"{name}.jsonl", samples(alone, name)[:count])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = mp.spawn(_rank, args=(str(tiny_model), str(together), port, evals), nprocs=2, join=False)
    deadline = time.monotonic() + 100
    try:
        while not ranks.join(timeout=1, grace_period=2):
            assert time.monotonic() < deadline
    finally:
        for process in ranks.processes:
            process.kill()
    assert timeless(results(together)) == timeless(results(alone))
    assert [samples(together, name) for name in evals] == [samples(alone, name) for name in evals]
    logged = [json.loads((together / f"rank{rank}.json").read_text()) for rank in range(2)]
    for name, entry in results(alone)["sets"].items():
        for rank in logged:
            assert rank[f"test/{name}/accuracy"] == pytest.approx(entry["metrics"]["accuracy"])
