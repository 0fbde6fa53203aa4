"""Training on few problems: any number of processes gives one run, and a killed run leaves a history that goes on.

Processes are forks of a server that has imported everything, so that a launch takes a second; each has a deadline.
"""

import json
import multiprocessing as mp
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlvr_lightning.callbacks.history import HistoryCallback
from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.checkpoints import check_checkpoint
from rlvr_lightning.data import SubsetDataModule
from rlvr_lightning.engines import Sampling
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.jsonl import append_lines, dump, read_jsonl
from rlvr_lightning.losses import Objective
from rlvr_lightning.module import AdamW, RLVRModule
from rlvr_lightning.policy import PolicyConfig
from rlvr_lightning.ranking import read_history
from rlvr_lightning.records import Completion, Problem, ProblemBatch, Score
from rlvr_lightning.strategies import FSDP2Strategy

SERVER: Any = mp.get_context("forkserver")
SERVER.set_forkserver_preload(["rlvr_lightning.cli", "transformers.models.llama.modeling_llama"])

QUESTIONS = ("3 + 4", "say it in one word", "x")


class Letters:
    """Reward: the share of a text's characters that are letters, so that rewards of a random model differ."""

    def __call__(self, pairs: Sequence[tuple[Problem, Completion]]) -> list[Score]:
        rewards = [sum(map(str.isalpha, c.text)) / max(len(c.text), 1) for _, c in pairs]
        return [Score(r, r > 0.5, "correct" if r > 0.5 else "wrong", None) for r in rewards]

    def check(self, problems: Sequence[Problem]) -> None: ...

    def close(self) -> None: ...


def write_problems(file: Path, count: int) -> Path:
    rows = [{"id": f"p{i}", "question": question, "answer": "1"} for i, question in enumerate(QUESTIONS[:count])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- one process and two ----------------------------------------------------------------------------------------------


@dataclass
class Record(Callback):
    """What a process did: which rollouts were its, what each update trained on, metrics per step."""

    numbers: list[list[int]] = field(default_factory=list)
    """Per step: of its rollouts, counted group after group."""
    versions: list[set[int]] = field(default_factory=list)
    """Per step: policy versions that its rollouts were sampled from."""
    updates: list[Counter[tuple[int, ...]]] = field(default_factory=list)
    """Per update: the token ids of every row that went through a pass with gradient."""
    metrics: list[dict[str, float]] = field(default_factory=list)

    def on_fit_start(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        self.updates.append(Counter())
        pl_module.policy.register_forward_pre_hook(self._note)

    def _note(self, _: Any, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            (micro,) = args
            for ids, mask, length in zip(micro.input_ids, micro.completion_mask, micro.lengths, strict=True):
                if mask.any():  # a rank without work passes a row that does not count
                    self.updates[-1][tuple(ids[:length].tolist())] += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.updates.append(Counter())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: ProblemBatch, batch_idx: int) -> None:
        assert batch.rollouts is not None
        assert len(batch.rollouts) == len(batch.indices)
        self.numbers.append(list(batch.indices))
        self.versions.append({r.policy_version for r in batch.rollouts})
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@dataclass(frozen=True)
class Case:
    """A training that any number of processes must do alike."""

    problems: int
    problems_per_step: int
    rollouts: int
    steps: int
    updates_per_step: int = 1
    share_prefixes: bool | None = None


ONE_PROBLEM = {f"{n} rollouts": Case(problems=1, problems_per_step=1, rollouts=n, steps=2) for n in (7, 64)}
NO_WORK = {
    f"1 rollout, {name}": Case(problems=1, problems_per_step=1, rollouts=1, steps=2, share_prefixes=share)
    for name, share in (("tree", True), ("rows", False), ("whatever is cheaper", None))
}
THREE_PROBLEMS = {
    "one update": Case(problems=3, problems_per_step=5, rollouts=3, steps=6),
    "two updates": Case(problems=3, problems_per_step=5, rollouts=3, steps=6, updates_per_step=2),
}


def train(model: str, root: Path, case: Case, world: int) -> dict[str, Any]:
    """Train in ``world`` processes, of which this is one; return what it found."""
    record = Record()
    source = RolloutCallback(
        engine=HFEngine(),
        sampling=Sampling(rollouts_per_problem=case.rollouts, temperature=1.0, max_tokens=5),
        verifier=Letters(),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FSDP2Strategy(timeout_s=60) if world > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        inference_mode=False,
        num_sanity_val_steps=0,
        max_steps=case.steps * case.updates_per_step,
        default_root_dir=root,
        callbacks=[source, HistoryCallback(), record],
    )
    module = RLVRModule(
        policy=PolicyConfig(model=model, share_prefixes=case.share_prefixes),
        objective=Objective(kl_coef=0.1, entropy_coef=0.01),
        optimizer=AdamW(lr=3e-3, eps=1e-4),  # eps far above rounding: Adam's first step is the sign of the gradient
        updates_per_step=case.updates_per_step,
        tokens_per_micro_batch=100,
    )
    data = SubsetDataModule(sources=[str(root.parent / f"{case.problems}.jsonl")], problems_per_step=case.problems_per_step)
    trainer.fit(module, datamodule=data)
    weights = module.policy.lm.named_parameters()
    return {
        "weights": {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in weights},
        "updates": record.updates[:-1],
        "numbers": record.numbers,
        "versions": record.versions,
        "metrics": record.metrics,
    }


def _rank(rank: int, cases: dict[str, Case], model: str, folder: Path, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",  # what tells Lightning that the processes are there already
    }
    torch.set_num_threads(1)
    found = {name: train(model, folder / name, case, 2) for name, case in cases.items()}
    torch.save(found, folder / f"rank{rank}.pt")


def launch(cases: dict[str, Case], model: Path, folder: Path, *, limit_s: float) -> dict[str, list[dict[str, Any]]]:
    """Train every case in two processes; return what each rank found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [SERVER.Process(target=_rank, args=(rank, cases, str(model), folder, port)) for rank in range(2)]
    deadline = time.monotonic() + limit_s
    try:
        for rank in ranks:
            rank.start()
        while any(rank.exitcode is None for rank in ranks):
            assert time.monotonic() < deadline, f"{list(cases)}: a rank still runs after {limit_s} s"
            assert not any(rank.exitcode for rank in ranks), "a rank failed; see its traceback above"
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return {name: [of_rank[name] for of_rank in found] for name in cases}


@dataclass
class Pair:
    """The same training by one process and by two."""

    alone: dict[str, Any]
    ranks: list[dict[str, Any]]
    history: list[dict[str, Any]]
    history_of_two: list[dict[str, Any]]


def pairs(cases: dict[str, Case], model: Path, folder: Path, limit_s: float) -> dict[str, Pair]:
    together, single = folder / "two", folder / "one"
    for place in (together, single):
        place.mkdir()
        for count in (1, 3):
            write_problems(place / f"{count}.jsonl", count)
    two = launch(cases, model, together, limit_s=limit_s)

    def history(root: Path) -> list[dict[str, Any]]:
        return list(read_jsonl(root / "history.jsonl"))

    return {
        name: Pair(train(str(model), single / name, case, 1), two[name], history(single / name), history(together / name))
        for name, case in cases.items()
    }


@pytest.fixture(scope="module")
def with_work(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Trainings in which both of two ranks have rollouts at every step."""
    return pairs(ONE_PROBLEM | THREE_PROBLEMS, tiny_model, tmp_path_factory.mktemp("work"), limit_s=200)


def largest_gap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[n] - second[n]).abs().max()) for n in first)


def assert_alike(pair: Pair, case: Case, model: Path) -> None:
    """Assert that two processes made the run of one, and that the run is one that could have differed."""
    from transformers import AutoModelForCausalLM

    start = {n: p.detach() for n, p in AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters()}
    assert largest_gap(pair.alone["weights"], start) > 2e-3
    for rank in pair.ranks:
        assert largest_gap(rank["weights"], pair.alone["weights"]) < 1e-5
        for key in ("train/tokens", "rollout/reward", "rollout/zero_advantage_fraction", "rollout/effective_samples"):
            assert [m[key] for m in rank["metrics"]] == pytest.approx([m[key] for m in pair.alone["metrics"]]), key

    assert pair.history_of_two == pair.history
    places = [(row["step"], row["slot"]) for row in pair.history]
    assert places == [(step, slot) for step in range(case.steps) for slot in range(case.problems_per_step)]
    assert {len(row["rewards"]) for row in pair.history} == {len(row["lengths"]) for row in pair.history} == {case.rollouts}
    rewards = {reward for row in pair.history for reward in row["rewards"]}
    assert len(rewards) > 1

    everything = list(range(case.problems_per_step * case.rollouts))
    for step in range(case.steps):
        assert pair.alone["numbers"][step] == everything
        assert sorted(n for rank in pair.ranks for n in rank["numbers"][step]) == everything  # every rollout once
    for update, whole in enumerate(pair.alone["updates"]):
        first, second = (rank["updates"][update] for rank in pair.ranks)
        assert first + second == whole  # the same rows, whoever trains on them
        assert abs(first.total() - second.total()) <= 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ONE_PROBLEM)
def test_one_problem_trains_alike_on_one_process_and_on_two(with_work: dict[str, Pair], tiny_model: Path, name: str) -> None:
    assert_alike(with_work[name], ONE_PROBLEM[name], tiny_model)
    assert {row["id"] for row in with_work[name].history} == {"p0"}


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", NO_WORK)
def test_one_rollout_trains_while_the_other_process_has_none(tiny_model: Path, tmp_path: Path, name: str) -> None:
    pair = pairs({name: NO_WORK[name]}, tiny_model, tmp_path, limit_s=100)[name]  # they could wait for each other forever
    assert_alike(pair, NO_WORK[name], tiny_model)
    assert sorted(len(numbers) for rank in pair.ranks for numbers in rank["numbers"]) == [0, 0, 1, 1]
    for found in (pair.alone, *pair.ranks):
        for row, metrics in zip(pair.history, found["metrics"], strict=True):
            # At ratio 1 the loss of every token is minus the advantage, which is the reward where a group is one rollout.
            assert metrics["train/policy_loss"] == pytest.approx(-row["rewards"][0], abs=1e-5)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", THREE_PROBLEMS)
def test_three_problems_in_steps_of_five_train_alike_on_one_process_and_on_two(
    with_work: dict[str, Pair], tiny_model: Path, name: str
) -> None:
    pair, case = with_work[name], THREE_PROBLEMS[name]
    assert_alike(pair, case, tiny_model)
    assert Counter(row["id"] for row in pair.history) == {"p0": 10, "p1": 10, "p2": 10}  # 6 steps of 5 slots
    assert len(pair.alone["updates"]) == case.steps * case.updates_per_step
    for step in range(case.steps):
        # 15 rollouts: in two mini-batches 7 and 8
        sizes = [u.total() for u in pair.alone["updates"][step * case.updates_per_step : (step + 1) * case.updates_per_step]]
        assert sizes == ([15] if case.updates_per_step == 1 else [7, 8])
        assert all(rank["versions"][step] == {step * case.updates_per_step} for rank in (pair.alone, *pair.ranks))


# --- killed, and going on ---------------------------------------------------------------------------------------------

STEPS = 66
KILLS = 10


def _die_at(moment: str, step: int) -> None:
    """Have this process killed where a step's history is written."""
    from rlvr_lightning.callbacks import history

    def append(path: Path, rows: list[dict[str, Any]], *, fsync: bool = False) -> None:
        if rows[0]["step"] == step:
            if moment == "in the middle":
                with path.open("ab") as file:
                    file.write(b"".join(map(dump, rows))[:-20])
            elif moment == "after":
                append_lines(path, rows, fsync=fsync)
            os.kill(os.getpid(), signal.SIGKILL)
        append_lines(path, rows, fsync=fsync)

    history.append_lines = append  # type: ignore[assignment]


def _fit(arguments: list[str], log: str, die_at: tuple[str, int] | None) -> None:
    """Be `rlvr fit`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    tempfile.tempdir = str(Path(log).parent)  # where a checkpoint grows: a killed process leaves it there
    from rlvr_lightning.__main__ import main

    if die_at is not None:
        _die_at(*die_at)
    sys.argv = ["rlvr", "fit", *arguments]
    sys.exit(main())


@dataclass
class Runs:
    """Runs of one configuration, in folders beside each other."""

    model: Path
    folder: Path

    def start(self, root: Path, *, steps: int = STEPS, die_at: tuple[str, int] | None = None) -> tuple[Any, int]:
        """Start or resume `rlvr fit` in ``root``; return the process and the step that it begins with."""
        checkpoint = newest_checkpoint(root)
        arguments = [
            *("--model.policy.model", str(self.model), "--model.optimizer.lr", "3e-3"),
            *("--data", "SubsetDataModule", "--data.sources", f"[{self.folder}/three.jsonl]", "--data.problems_per_step", "2"),
            *("--rollout.engine", "rlvr_lightning.engines.hf.HFEngine", "--rollout.verifier", f"{__name__}.Letters"),
            *("--rollout.sampling.rollouts_per_problem", "3", "--rollout.sampling.temperature", "1.0"),
            *("--rollout.sampling.max_tokens", "4", "--checkpoint.every_n_steps", "2", "--seed_everything", "5"),
            *("--trainer.accelerator", "cpu", "--trainer.max_steps", str(steps), "--trainer.default_root_dir", str(root)),
            *(() if checkpoint is None else ("--ckpt_path", str(checkpoint))),
        ]
        process = SERVER.Process(target=_fit, args=(arguments, str(self.log), die_at))
        process.start()
        return process, 0 if checkpoint is None else int(checkpoint.stem.removeprefix("step-"))

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def whole(self) -> Path:
        """The run that nobody interrupted."""
        return self.folder / "whole"

    def expected(self) -> list[dict[str, Any]]:
        """Its history."""
        return list(read_jsonl(self.whole / "history.jsonl"))


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tiny_model, tmp_path_factory.mktemp("runs"))
    write_problems(made.folder / "three.jsonl", 3)
    process, _ = made.start(made.whole)
    process.join(200)
    assert process.exitcode == 0, made.log.read_text()[-3000:]
    rows = made.expected()
    assert [(row["step"], row["slot"]) for row in rows] == [(step, slot) for step in range(STEPS) for slot in (0, 1)]
    assert len({tuple(row["rewards"]) for row in rows}) > 10
    assert len({tuple(row["lengths"]) for row in rows}) > 1
    return made


def stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes whenever a file is written."""
    if not file.exists():
        return None
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def last_step(file: Path) -> int:
    return max((row["step"] for row in read_jsonl(file)), default=-1)


def wait_to_kill(process: Any, file: Path, *, delay_s: float, at_most: int, limit_s: float = 100) -> None:
    """Return ``delay_s`` after ``file`` was first written to, but not after step ``at_most``."""
    before, deadline = stamp(file), time.monotonic() + limit_s
    written: float | None = None
    while written is None or (time.monotonic() < written + delay_s and last_step(file) < at_most):
        assert process.exitcode is None
        assert time.monotonic() < deadline
        if written is None and stamp(file) != before:
            written = time.monotonic()
        time.sleep(0.002)


def newest_checkpoint(root: Path) -> Path | None:
    """The last checkpoint that `rlvr` accepts."""
    for path in sorted((root / "checkpoints").glob("step-*.ckpt"), reverse=True):
        try:
            check_checkpoint(str(path))
        except ConfigError:
            continue
        return path
    return None


@pytest.mark.multiprocess
def assert_readable(history: Path, expected: list[dict[str, Any]]) -> None:
    """Assert that a killed run left whole rows, each once and none missing, and that a ranking can read them."""
    rows = list(read_jsonl(history))
    assert rows == expected[: len(rows)]
    if rows:
        visits = Counter(i for _, i in {(row["step"], row["id"]) for row in rows})
        assert {i: len(accuracies) for i, accuracies in read_history(history).items()} == visits


@pytest.mark.multiprocess
def test_a_run_that_is_killed_ten_times_leaves_the_history_of_one_that_is_not(runs: Runs, tmp_path: Path) -> None:
    root, moments, expected = tmp_path / "killed", random.Random(0), runs.expected()
    history = root / "history.jsonl"
    step_s = median(row["time/step_s"] for row in read_jsonl(runs.whole / "metrics.jsonl"))
    begun_at: list[int] = []
    repeated = 0
    for kill in range(KILLS + 1):
        process, begins = runs.start(root)
        repeated += last_step(history) + 1 - begins
        begun_at.append(begins)
        try:
            if kill < KILLS:
                delay_s = 12 * step_s * moments.random()
                wait_to_kill(process, history, delay_s=delay_s, at_most=STEPS * (kill + 1) // (KILLS + 1))
            else:
                process.join(200)
        finally:
            process.kill()
            process.join()
        assert process.exitcode == (-signal.SIGKILL if kill < KILLS else 0), runs.log.read_text()[-3000:]
        assert_readable(history, expected)
    assert list(read_jsonl(history)) == expected
    assert read_history(root) == read_history(runs.whole)
    assert begun_at == sorted(begun_at)
    assert len(set(begun_at)) > 3  # the kills were spread over the run,
    assert repeated > 0  # and some left steps in the history that the checkpoint had not seen


@pytest.mark.multiprocess
def test_a_run_that_is_killed_around_the_writing_of_a_row_loses_none(runs: Runs, tmp_path: Path) -> None:
    root, expected = tmp_path / "killed", runs.expected()
    # After steps 3 and 9 a checkpoint is due: it must not be there before the step is in the history.
    for moment, step in (("before", 3), ("in the middle", 6), ("after", 9), ("in the middle", 11)):
        process, _ = runs.start(root, die_at=(moment, step))
        process.join(100)
        process.kill()
        assert process.exitcode == -signal.SIGKILL, runs.log.read_text()[-3000:]
        assert_readable(root / "history.jsonl", expected)
    process, _ = runs.start(root, steps=14)
    process.join(100)
    assert process.exitcode == 0, runs.log.read_text()[-3000:]
    assert list(read_jsonl(root / "history.jsonl")) == expected[: 14 * 2]


# --- bad rows ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_bad_row_is_in_one_report_before_a_model_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    folder, model, root = tmp_path / "data", tmp_path / "model", tmp_path / "run"
    folder.mkdir()
    good = {"id": "good", "question": "1 + 1?", "answer": "2"}
    rows: list[dict[str, str]] = [
        good,
        {"id": "b", "question": "1 + 2?"},
        {"id": "c", "question": " ", "answer": "3"},
        {"id": "good", "question": "2 + 2?", "answer": "4"},
        {"id": "e", "question": "3" * 2_000_000, "answer": "5"},
    ]
    lines = [json.dumps(row).encode() for row in rows] + [b'{"id": "f", "question": "\xff\xfe", "answer": "6"}']
    (folder / "first.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "second.jsonl").write_text(json.dumps(good | {"question": "3 + 3?"}) + "\n")
    pq.write_table(pa.Table.from_pylist([{"text": "1 + 1?", "answer": "2"}] * 3), str(folder / "third.parquet"))
    model.mkdir()
    for file in tiny_model.iterdir():  # all but the weights: whoever loaded this model would fail
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rlvr_lightning", "fit", "--model.policy.model", str(model)),
            *("--data", "rlvr_lightning.data.SubsetDataModule", "--data.init_args.sources", f"[{folder}]"),
            *("--rollout.engine", "rlvr_lightning.engines.hf.HFEngine"),
            *("--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.default_root_dir", str(root)),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("rlvr: error: ") == 1
    assert "Traceback" not in done.stdout + done.stderr
    told = [line.strip() for line in done.stderr[done.stderr.index("rlvr: error: ") :].splitlines()]
    first, second, third = (str(folder / name) for name in ("first.jsonl", "second.jsonl", "third.parquet"))
    for place, reason in (
        (f"{first} row 2", "no answer"),
        (f"{first} row 3", "no question"),
        (f"{first} row 4", "'good'"),
        (f"{first} row 5", "2,000,000 characters"),
        (f"{first} row 6", "not UTF-8"),
        (f"{second} row 1", "'good'"),
        (f"{third}, each of its 3 rows: ", "no question"),
    ):
        assert [line for line in told if line.startswith(place) and reason in line], (place, done.stderr)
    assert not any(line.startswith(f"{first} row 1") for line in told)
    assert len(done.stderr) < 5000  # what is wrong, not the two million characters
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
    assert [path.name for path in root.rglob("*")] == []
