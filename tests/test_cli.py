"""The command line as a user meets it: bad input ends in one sentence and status 2, good input leaves a run that repeats."""

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr_lightning.__main__ import main
from rlvr_lightning.policy import PolicyConfig
from rlvr_lightning.records import Completion, Problem, Score

TESTS = Path(__file__).parent


class EvenVerifier:
    """Rewards a text with an even number of characters: about half of what a random model writes."""

    def __call__(self, pairs: Sequence[tuple[Problem, Completion]]) -> list[Score]:
        verdicts = [len(completion.text) % 2 == 0 for _, completion in pairs]
        return [Score(float(v), v, "correct" if v else "wrong", None) for v in verdicts]

    def check(self, problems: Sequence[Problem]) -> None:
        """Any answer will do."""

    def close(self) -> None:
        """Nothing to free."""


def write_config(folder: Path, model: Path) -> Path:
    """Write a run of two steps, as a user would, and return its file."""
    evals = folder / "sums.jsonl"
    evals.write_text('{"question": "What is 1 + 1?", "answer": "2"}\n{"question": "What is 1 + 2?", "answer": "3"}\n')
    config = {
        "model": {"policy": {"model": str(model)}, "optimizer": {"lr": 1e-3}},
        "data": {
            "class_path": "rlvr_lightning.data.SingleExampleDataModule",
            "init_args": {
                "question": "What is 3 + 4?",
                "answer": "7",
                "problems_per_step": 2,
                "evals": {"sums": str(evals)},
            },
        },
        "rollout": {
            "engine": {"class_path": "rlvr_lightning.engines.hf.HFEngine"},
            "sampling": {"rollouts_per_problem": 4, "temperature": 1.0, "max_tokens": 8},
            "eval_sampling": {"rollouts_per_problem": 1, "temperature": 0.0, "max_tokens": 8},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "val_check_interval": 2,
            "default_root_dir": str(folder / "run"),
        },
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@dataclass
class Outcome:
    """What one command left on the terminal."""

    status: int
    out: str
    err: str
    seconds: float
    """Of processor time, which other processes do not stretch."""


@pytest.fixture
def rlvr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process."""

    def run(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["rlvr", *map(str, args)])
        capsys.readouterr()
        started = time.process_time()
        status = main()
        seconds = time.process_time() - started
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err, seconds)

    return run


def child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def command(*args: object, path: Path = TESTS, cwd: Path | None = None) -> Outcome:
    """Run a command in a process of its own; ``path`` comes first where it looks for modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    started = child_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "rlvr_lightning", *map(str, args)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr, child_seconds() - started)


def refused(outcome: Outcome, *parts: str) -> None:
    """Assert that a command ended as bad input has to end."""
    assert outcome.status == 2, outcome.out + outcome.err
    message = outcome.err[outcome.err.index("rlvr: error: ") :]
    assert outcome.err.count("rlvr: error: ") == 1
    assert "Traceback" not in outcome.err + outcome.out
    assert [part for part in parts if part not in message] == [], message
    assert outcome.seconds < 20


# --- the front door ---------------------------------------------------------------------------------------------------


def test_help_is_instant_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['rlvr', '--help']; from rlvr_lightning.__main__ import main; assert main() == 0; "
        "print(sorted({'torch', 'lightning', 'transformers', 'numpy', 'hydra', 'vllm'} & set(sys.modules)))"
    )
    started = child_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child_seconds() - started < 1
    assert done.stdout.startswith("rlvr: train a reasoning model")
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_and_empty_command_line(rlvr: Callable[..., Outcome]) -> None:
    from rlvr_lightning import __version__

    assert rlvr("--version").out == f"{__version__}\n"
    assert rlvr().out == rlvr("-h").out != ""


def test_an_unknown_command_is_refused_with_the_known_ones(rlvr: Callable[..., Outcome]) -> None:
    refused(rlvr("train"), "no command 'train'", "fit, validate, test, predict")


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "misspelled key": (["--model.objective.entropy_coeff=0.1"], ["did you mean 'model.objective.entropy_coef'?"]),
    "misspelled data key": (["--data.init_args.problems_per_stp=4"], ["problems_per_stp"]),
    "misspelled trainer key": (["--trainer.maxsteps=4"], ["did you mean 'trainer.max_steps'?"]),
    "misspelled sampling key": (["--rollout.sampling.temprature=1"], ["did you mean 'rollout.sampling.temperature'?"]),
    "a key unlike any other": (["--zebra=1"], ["zebra", "--help"]),
    "number expected": (["--trainer.max_steps=many"], ["max_steps", "many"]),
    "float expected": (["--model.optimizer.lr=fast"], ["optimizer.lr", "fast"]),
    "wrong choice": (["--model.advantage=best"], ["model.advantage", "best", "group_norm", "leave_one_out"]),
    "no such class": (["--rollout.engine=no.such.Engine"], ["rollout.engine", "no.such.Engine"]),
    "no such config": (["--config=absent.yaml"], ["absent.yaml"]),
    "greedy training": (["--rollout.sampling.temperature=0"], ["rollout.sampling.temperature is 0", "set it above 0"]),
    "negative temperature": (["--rollout.sampling.temperature=-1"], ["temperature is -1", "set it above 0"]),
    "nucleus in training": (["--rollout.sampling.top_p=0.9"], ["rollout.sampling.top_p is 0.9", "set it to 1"]),
    "one rollout per group": (
        ["--rollout.sampling.rollouts_per_problem=1", "--model.advantage=leave_one_out"],
        ["rollout.sampling.rollouts_per_problem is 1", "set rollouts_per_problem to 2 or more"],
    ),
    "training window": (
        ["--rollout.sampling.max_tokens=256"],
        ["window of 256 tokens", "data.question: ", " + 256 tokens", "lower rollout.sampling.max_tokens"],
    ),
    "evaluation window": (
        ["--rollout.eval_sampling.max_tokens=250"],
        ["window of 256 tokens", "sums.jsonl:1: ", "sums.jsonl:2: ", " + 250 tokens", "eval_sampling.max_tokens"],
    ),
    "16-bit weights": (
        ["--trainer.precision=bf16-true", "--model.optimizer.lr=1e-6"],
        ["trainer.precision bf16-true", "1e-06", "set trainer.precision to bf16-mixed"],
    ),
    "gradient_clip_val": (["--trainer.gradient_clip_val=1"], ["trainer.gradient_clip_val", "model.max_grad_norm"]),
    "accumulate_grad_batches": (
        ["--trainer.accumulate_grad_batches=2"],
        ["trainer.accumulate_grad_batches", "data.problems_per_step"],
    ),
    "no updates": (["--model.updates_per_step=0"], ["model.updates_per_step is 0", "set it to 1 or more"]),
    "no learning rate": (["--model.optimizer.lr=0"], ["optimizer.lr is 0", "set it above 0"]),
    "no checkpoints kept": (["--checkpoint.keep=0"], ["checkpoint.keep is 0", "set it to 1 or more"]),
    "table interval": (["--transcripts.every_n_steps=0"], ["transcripts.every_n_steps is 0", "set the first to 1"]),
    "no groups": (["--data.init_args.problems_per_step=0"], ["data.problems_per_step is 0", "set it to 1 or more"]),
    "question and file": (["--data.init_args.file=builtin:addition_1digit"], ["data.file", "exclude each other"]),
    "no grading processes": (
        ["--rollout.verifier=rlvr_lightning.verify.Verifier", "--rollout.verifier.workers=0"],
        ["workers=0"],
    ),
    "negative export interval": (["--export.every_n_steps=-1"], ["export.every_n_steps is -1", "set it to 0"]),
    "no model folder": (["--model.policy.model=/no/such/model"], ["'/no/such/model' does not exist", "policy.model"]),
    "no model name": (["--model.policy.model=llama"], ["'llama' does not exist", "owner/name"]),
    "no embedded model": (["--model.policy.model=embedded:x"], ["no embedded model 'x'", "SmolLM2-135M-Instruct"]),
    "no data file": (
        ["--data.init_args.evals={sums: absent.jsonl}"],
        ["'absent.jsonl' does not exist", "give the path"],
    ),
    "no built-in set": (["--data.init_args.evals={sums: 'builtin:x'}"], ["no built-in set 'x'", "addition_1digit"]),
    "no checkpoint": (["--ckpt_path=absent.ckpt"], ["checkpoint 'absent.ckpt' does not exist", "give --ckpt_path"]),
    "ungradable answer": (["--data.init_args.answer=\\frac{"], ["\\frac{", "data.question"]),
}


@pytest.fixture
def no_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if weights are loaded: bad input has to be found before."""

    def build(self: PolicyConfig) -> None:
        pytest.fail("a model was built before the bad input was found")

    monkeypatch.setattr(PolicyConfig, "build", build)


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.parametrize(("args", "parts"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name_before_a_model_is_built(
    rlvr: Callable[..., Outcome], tmp_path: Path, tiny_model: Path, args: list[str], parts: list[str]
) -> None:
    refused(rlvr("fit", "--config", write_config(tmp_path, tiny_model), *args), *parts)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.parametrize(
    ("path", "name", "meant"),
    [
        (["data", "init_args"], "problems_per_stp", "problems_per_step"),
        (["rollout", "engine", "init_args"], "batch_sise", "batch_size"),
        (["model"], "max_grad_nrom", "max_grad_norm"),
        (["trainer"], "max_stps", "max_steps"),
    ],
)
def test_a_misspelled_key_of_a_file_comes_with_the_one_that_was_meant(
    rlvr: Callable[..., Outcome], tmp_path: Path, tiny_model: Path, path: list[str], name: str, meant: str
) -> None:
    config = write_config(tmp_path, tiny_model)
    content = yaml.safe_load(config.read_text())
    place = content
    for key in path:
        place = place.setdefault(key, {})
    place[name] = 4
    config.write_text(yaml.safe_dump(content))
    refused(rlvr("fit", "--config", config), name, "did you mean", meant)


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["p.jsonl' is empty", "at least one problem"]),
        (b'{"question": "1+1?", "answer": "2"}\n{"question": "1+2?"}\n', ["p.jsonl row 2: no answer"]),
        (b'{"question": "1+1?"}\n{"answer"\n', ["p.jsonl row 1: no answer", "p.jsonl row 2: not JSON", "2 bad row(s)"]),
    ],
    ids=["empty", "no answer", "two bad rows"],
)
def test_a_bad_data_file_is_refused_by_file_and_row(
    rlvr: Callable[..., Outcome], tmp_path: Path, tiny_model: Path, content: bytes, parts: list[str]
) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    config = write_config(tmp_path, tiny_model)
    refused(rlvr("fit", "--config", config, f"--data.init_args.evals={{own: {tmp_path / 'p.jsonl'}}}"), *parts)
    text = yaml.safe_load(config.read_text())
    text["data"]["init_args"] = {"file": str(tmp_path / "p.jsonl")}
    config.write_text(yaml.safe_dump(text))
    refused(rlvr("fit", "--config", config), *parts)


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model": {"objectiv": {"kl_coef": 0.1}}}, ["objectiv"]),
        ({"rollouts": {"seed": 1}}, ["rollouts"]),
        ({"model": {"policy": {"model": "x/y", "attention": "sdpa"}}}, ["attention"]),
        ({"model": {"max_grad_nrom": 1.0}}, ["model.max_grad_nrom"]),
    ],
    ids=["nested", "top", "policy", "model"],
)
def test_a_misspelled_key_of_a_file_is_refused_by_name(
    rlvr: Callable[..., Outcome], tmp_path: Path, tiny_model: Path, change: dict[str, Any], parts: list[str]
) -> None:
    config = write_config(tmp_path, tiny_model)
    content = yaml.safe_load(config.read_text())
    for key, value in change.items():
        content[key] = {**content.get(key, {}), **value}
    config.write_text(yaml.safe_dump(content))
    refused(rlvr("fit", "--config", config), *parts)


@pytest.mark.usefixtures("no_model_is_built")
def test_a_file_that_is_no_checkpoint_is_refused(rlvr: Callable[..., Outcome], tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(tmp_path, tiny_model)
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "shards").mkdir()
    for name in ("torn.ckpt", "shards"):
        refused(rlvr("fit", "--config", config, "--ckpt_path", tmp_path / name), f"{name}' cannot be read", "no checkpoint")


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the key has an effect on a GPU")
def test_a_gpu_key_on_a_cpu_is_refused(rlvr: Callable[..., Outcome], tmp_path: Path, tiny_model: Path) -> None:
    engine = "--rollout.engine=rlvr_lightning.engines.vllm.VLLMEngine"
    key = "--rollout.engine.init_args.gpu_memory_utilization=0.5"
    refused(
        rlvr("fit", "--config", write_config(tmp_path, tiny_model), engine, key),
        "rollout.engine.gpu_memory_utilization has no effect on a CPU",
    )


def test_without_vllm_its_engine_is_refused_with_the_way_to_install_it(tmp_path: Path, tiny_model: Path) -> None:
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    # What an environment without the package looks like: the ordinary search for it finds nothing.
    (blocker / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class WithoutVLLM(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.split('.')[0] == 'vllm' else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutVLLM\n"
    )
    engine = "--rollout.engine=rlvr_lightning.engines.vllm.VLLMEngine"
    outcome = command("fit", "--config", write_config(tmp_path, tiny_model), engine, path=blocker)
    refused(outcome, "vLLM is not installed", "pip install 'rlvr-lightning[vllm]'", "requirements/vllm-cpu.txt")
    assert len(outcome.err.strip().splitlines()) == 1


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One finished run."""

    root: Path
    config: Path
    outcome: Outcome

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    """Two steps in a process of their own."""
    folder = tmp_path_factory.mktemp("cli")
    config = write_config(folder, tiny_model)
    verifier = "--rollout.verifier=test_cli.EvenVerifier"
    outcome = command("fit", "--config", config, verifier, "--checkpoint.every_n_steps=1", "--seed_everything=3")
    return Run(folder / "run", config, outcome)


def test_a_fit_ends_with_status_zero_and_says_what_it_does(finished: Run) -> None:
    assert finished.outcome.status == 0, finished.outcome.err
    assert "Traceback" not in finished.outcome.err
    for part in ("training on", "2 groups x 4 rollouts = 8 completions", "eval at step 0", "step   2/2", "eval at step 2"):
        assert part in finished.outcome.out


def test_a_fit_writes_metrics_history_rollouts_and_its_configuration(finished: Run) -> None:
    metrics = finished.lines("metrics.jsonl")
    training = [line for line in metrics if "train/loss" in line]
    assert [line["step"] for line in training] == [1, 2]
    assert [line["step"] for line in metrics if "val/sums/accuracy" in line] == [0, 2]
    history = finished.lines("history.jsonl")
    assert [(row["step"], row["slot"]) for row in history] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    rewards = [reward for row in history for reward in row["rewards"]]
    assert len(rewards) == 16
    assert set(rewards) == {0.0, 1.0}
    for line, step in zip(training, (0, 1), strict=True):
        of_step = [r for row in history if row["step"] == step for r in row["rewards"]]
        assert line["rollout/reward"] == pytest.approx(sum(of_step) / len(of_step))
    with gzip.open(finished.root / "rollouts" / "train-rank0-00000000.jsonl.gz", "rt") as file:
        rollouts = [json.loads(line) for line in file]
    assert [row["reward"] for row in rollouts] == rewards
    assert len({row["text"] for row in rollouts}) > 8
    assert {p.name for p in (finished.root / "rollouts").glob("sums-*.jsonl")} == {
        "sums-00000000.jsonl",
        "sums-00000002.jsonl",
    }
    written = yaml.safe_load((finished.root / "run.yaml").read_text())
    assert written["seed_everything"] == 3
    assert written["rollout"]["verifier"]["class_path"] == "test_cli.EvenVerifier"


def test_the_export_is_the_checkpoint_as_a_hugging_face_folder(finished: Run, tiny_model: Path) -> None:
    final = finished.root / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 0
    [checkpoint] = (finished.root / "checkpoints").glob("*.ckpt")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    exported = model.state_dict()
    assert saved.keys() == {f"policy.lm.{name}" for name in exported}
    assert all(torch.equal(tensor.bfloat16(), exported[n.removeprefix("policy.lm.")]) for n, tensor in saved.items())
    untrained = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).state_dict()
    assert any(not torch.equal(untrained[name], tensor) for name, tensor in exported.items())
    text = "What is 3 + 4?"
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_model, final))
    assert new(text).input_ids == old(text).input_ids
    assert new.chat_template == old.chat_template


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("time", "memory", "rollout/tokens_per_s")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def test_run_yaml_alone_repeats_the_run(finished: Run, rlvr: Callable[..., Outcome], tmp_path: Path) -> None:
    history, metrics = finished.lines("history.jsonl"), finished.lines("metrics.jsonl")
    kept = tmp_path / "run.yaml"
    shutil.copy(finished.root / "run.yaml", kept)
    shutil.rmtree(finished.root)
    outcome = rlvr("fit", "--config", kept)
    assert outcome.status == 0, outcome.err
    assert finished.lines("history.jsonl") == history
    again = without_times(finished.lines("metrics.jsonl"))
    assert [line.keys() for line in again] == [line.keys() for line in without_times(metrics)]
    for new, old in zip(again, without_times(metrics), strict=True):
        assert new == pytest.approx(old, rel=1e-4, abs=1e-6)
    assert (finished.root / "run.yaml").read_text() == kept.read_text()


def test_another_seed_is_another_run(finished: Run, rlvr: Callable[..., Outcome], tmp_path: Path) -> None:
    arguments = ["--seed_everything=4", "--evaluate_first=false", f"--trainer.default_root_dir={tmp_path}"]
    assert rlvr("fit", "--config", finished.root / "run.yaml", *arguments).status == 0
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["rewards"] for row in rows] != [row["rewards"] for row in finished.lines("history.jsonl")]
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "val/sums/accuracy" not in metrics[0]  # evaluate_first=false


@pytest.mark.parametrize(("name", "key"), [("validate", "val/sums/"), ("test", "test/sums/")])
def test_a_checkpoint_is_evaluated(finished: Run, rlvr: Callable[..., Outcome], tmp_path: Path, name: str, key: str) -> None:
    [checkpoint] = (finished.root / "checkpoints").glob("*.ckpt")
    lines = {}
    for label, path in (("trained", ["--ckpt_path", checkpoint]), ("untrained", [])):
        root = tmp_path / label
        outcome = rlvr(name, "--config", finished.root / "run.yaml", f"--trainer.default_root_dir={root}", *path)
        assert outcome.status == 0, outcome.err
        lines[label] = json.loads((root / "metrics.jsonl").read_text().splitlines()[-1])
        assert lines[label][f"{key}length"] > 0
    in_training = [line for line in finished.lines("metrics.jsonl") if "val/sums/accuracy" in line]
    for label, then in (("untrained", in_training[0]), ("trained", in_training[1])):
        for metric in ("accuracy", "reward", "length", "truncated"):
            assert lines[label][f"{key}{metric}"] == then[f"val/sums/{metric}"]


def test_predict_writes_what_a_checkpoint_says(finished: Run, rlvr: Callable[..., Outcome], tmp_path: Path) -> None:
    [checkpoint] = (finished.root / "checkpoints").glob("*.ckpt")
    arguments = [f"--trainer.default_root_dir={tmp_path}", "--ckpt_path", checkpoint]
    outcome = rlvr("predict", "--config", finished.root / "run.yaml", *arguments)
    assert outcome.status == 0, outcome.err
    [file] = (tmp_path / "rollouts").iterdir()
    predicted = [json.loads(line) for line in file.read_text().splitlines()]
    then = finished.lines("rollouts/sums-00000002.jsonl")
    assert [(row["problem_id"], row["text"]) for row in predicted] == [(row["problem_id"], row["text"]) for row in then]


def test_weights_and_biases_records_offline(finished: Run, rlvr: Callable[..., Outcome], tmp_path: Path) -> None:
    logger = "--trainer.logger=rlvr_lightning.loggers.OfflineFirstWandbLogger"
    arguments = [f"--trainer.logger.save_dir={tmp_path}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    outcome = rlvr("fit", "--config", finished.root / "run.yaml", logger, *arguments, "--trainer.max_steps=1")
    assert outcome.status == 0, outcome.err
    assert "W&B: recording offline" in outcome.out
    wandb.finish()  # as at the end of a process: only then is everything on the disk
    wandb.teardown()
    [record] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    # The record is cut into blocks, so any one key may be torn in two.
    assert any(key in content for key in (b"rollout/reward", b"rollout/length", b"rollout/accuracy"))
    assert any(key in content for key in (b"train/entropy", b"train/loss", b"train/grad_norm"))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("train/entropy" in line for line in metrics)  # the file is there whatever else is configured
