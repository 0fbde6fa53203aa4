"""What a run leaves on disk and on the terminal: written by a real Trainer, torn by hand, resumed, and read back."""

import contextlib
import gzip
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from rlvr_lightning.callbacks import progress
from rlvr_lightning.callbacks.history import HistoryCallback, history_rows, visits
from rlvr_lightning.callbacks.progress import ProgressCallback, clock
from rlvr_lightning.callbacks.transcripts import TranscriptCallback, drop_steps_from, read_transcripts
from rlvr_lightning.jsonl import append_lines, keep_before, read_jsonl
from rlvr_lightning.loggers import MetricsFileLogger, OfflineFirstWandbLogger
from rlvr_lightning.records import Completion, Problem, ProblemBatch, Rollout, Score

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`"),  # Lightning's own call into torch
]
G = 2


def make_rollouts(batch: ProblemBatch, version: int, reward: float | None = None) -> list[Rollout]:
    """Length, text and reward of a rollout follow from step, slot and sample, so that a reader can recompute them."""
    rollouts = []
    for slot, problem in zip(batch.slots, batch.problems, strict=True):
        for sample in range(G):
            length = 1 + batch.step + slot + sample
            right = sample == 0
            score = Score(float(right) if reward is None else reward, right, "correct" if right else "wrong", "2")
            completion = Completion((5,) * length, (-0.25,) * length, f"é step {batch.step}\n", "stop" if right else "length")
            rollouts.append(Rollout(problem, (1, 2), completion, score, 0.6, version))
    return rollouts


def make_batch(step: int, *, slots: tuple[int, ...] = (0, 1), name: str = "train") -> ProblemBatch:
    return ProblemBatch(step, slots, tuple(Problem(f"p{slot}", "1+1?", "2") for slot in slots), name, group_size=G)


class Stream(IterableDataset):
    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[ProblemBatch]:
        return map(make_batch, itertools.count(self.first))


class Attach(pl.Callback):
    """Stands in for the callback that samples; can die in the middle of a step, after sampling."""

    def __init__(self, reward: float | None = None) -> None:
        self.reward = reward

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: ProblemBatch, batch_idx: int) -> None:
        batch.rollouts = make_rollouts(batch, trainer.global_step, self.reward)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0):
        batch.rollouts = make_rollouts(batch, trainer.global_step)


class Tiny(pl.LightningModule):
    def __init__(self, die_at: int | None = None, logged: dict[str, float] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.die_at = die_at
        self.logged = logged or {}

    def training_step(self, batch: ProblemBatch, batch_idx: int) -> torch.Tensor:
        if batch.step == self.die_at:
            raise RuntimeError("died")
        loss = self.weight.sum() * 0 + batch.step
        self.log_dict({"train/loss": loss, **self.logged}, batch_size=1)
        return loss

    def validation_step(self, batch: ProblemBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log(f"val/{batch.name}/accuracy", 0.25 * (1 + dataloader_idx), add_dataloader_idx=False, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(root: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu"}
    settings = {"logger": False, "enable_checkpointing": False, "max_epochs": -1, **quiet, **kwargs}
    return pl.Trainer(default_root_dir=root, callbacks=list(callbacks), **settings)


def fit(root: Path, *, first: int, steps: int, die_at: int | None = None, ckpt: Path | None = None) -> None:
    """Train with every file-writing part, a checkpoint after each third batch and an evaluation after each second."""
    save = ModelCheckpoint(root / "ckpt", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    callbacks = [Attach(), HistoryCallback(), TranscriptCallback(), save]
    logger = MetricsFileLogger(root)
    trainer = make_trainer(root, *callbacks, logger=logger, max_steps=steps, enable_checkpointing=True,
                           val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=1)  # fmt: skip
    val = [DataLoader([make_batch(0, name="add"), make_batch(1, name="add")], batch_size=None)]
    with pytest.raises(RuntimeError, match="died") if die_at is not None else contextlib.nullcontext():
        trainer.fit(Tiny(die_at), DataLoader(Stream(first), batch_size=None), val, ckpt_path=ckpt)


def contents(root: Path) -> dict[str, Any]:
    metrics = [{key: row[key] for key in row if key != "time"} for row in read_jsonl(root / "metrics.jsonl")]
    rollouts = {path.name: list(read_transcripts(path)) for path in sorted((root / "rollouts").iterdir())}
    return {"metrics": metrics, "history": list(read_jsonl(root / "history.jsonl")), **rollouts}


def test_a_torn_and_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    fit(whole, first=0, steps=7)
    fit(torn, first=0, steps=7, die_at=5)  # the checkpoint is after step 2: steps 3 and 4 are written twice
    assert [row["step"] for row in read_jsonl(torn / "history.jsonl")][-1] == 4
    transcript = torn / "rollouts" / "train-rank0-00000000.jsonl.gz"
    assert list(read_transcripts(transcript))[-1]["step"] == 5  # on the disk although its update failed
    for path, tear in [
        (torn / "metrics.jsonl", b'{"step": 5, "ti'),
        (torn / "history.jsonl", b'{"step": 5, "id": "p0", "slot"'),
        (transcript, gzip.compress(b'{"step": 6, "slot": 0}\n')[:-9]),
    ]:
        with path.open("ab") as file:
            file.write(tear)
    fit(torn, first=3, steps=7, ckpt=torn / "ckpt" / "step=3.ckpt")
    assert contents(torn) == contents(whole)
    steps = [row["step"] for row in contents(whole)["metrics"] if "train/loss" in row]
    assert steps == list(range(7))
    assert [row["step"] for row in contents(whole)["metrics"] if "val/add/accuracy" in row] == [1, 3, 5]
    # After updates 2, 4 and 6; the sanity check before the fit, which sees half of the set, leaves no file.
    evaluations = [name for name in contents(whole) if name.startswith("add-")]
    assert evaluations == ["add-00000002.jsonl", "add-00000004.jsonl", "add-00000006.jsonl"]


def test_transcripts_hold_every_rollout_and_what_it_scored(tmp_path: Path) -> None:
    make_trainer(tmp_path, Attach(), TranscriptCallback(every_n_steps=100), max_steps=2).fit(
        Tiny(), DataLoader(Stream(99), batch_size=None)
    )
    files = [tmp_path / "rollouts" / f"train-rank0-{first:08d}.jsonl.gz" for first in (0, 100)]
    assert sorted((tmp_path / "rollouts").iterdir()) == files  # step 99 ends the first file, step 100 begins the next
    with gzip.open(files[0], "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert [(row["slot"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert rows[3] == {
        "step": 99,
        "slot": 1,
        "problem_id": "p1",
        "sample": 1,
        "reward": 0.0,
        "correct": False,
        "reason": "wrong",
        "extracted": "2",
        "finish_reason": "length",
        "length": 102,
        "mean_logprob": -0.25,
        "text": "é step 99\n",
        "policy_version": 0,
        "temperature": 0.6,
    }


def test_transcripts_can_be_read_while_they_grow_and_when_torn_anywhere(tmp_path: Path) -> None:
    callback, trainer = TranscriptCallback(), make_trainer(tmp_path)
    path = tmp_path / "rollouts" / "train-rank0-00000000.jsonl.gz"
    sizes = []
    for step in range(3):
        batch = make_batch(step)
        batch.rollouts = make_rollouts(batch, step)
        callback.on_train_batch_end(trainer, None, None, batch, step)
        with gzip.open(path) as file:
            assert sum(1 for _ in file) == 4 * (step + 1)
        sizes.append(path.stat().st_size)
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        assert len(list(read_transcripts(path))) == 4 * sum(size >= end for end in sizes)
    path.write_bytes(data[: sizes[0]] + b"\0" * 40 + data[sizes[0] :])
    with pytest.raises(ValueError, match="damaged"):
        list(read_transcripts(path))


def test_dropping_steps_cuts_own_files_and_those_of_ranks_that_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    for rank, step in itertools.product(range(3), (98, 99, 100, 101)):
        callback = TranscriptCallback()
        callback._written = -1  # past the first batch
        batch = make_batch(step)
        batch.rollouts = make_rollouts(batch, 0)
        trainer = SimpleNamespace(default_root_dir=tmp_path, global_rank=rank, world_size=3, loggers=[])
        callback.on_train_batch_end(trainer, None, None, batch, 0)
    drop_steps_from(folder, 99, rank=0, world_size=2)  # three ranks have become two
    left = {path.name: {row["step"] for row in read_transcripts(path)} for path in folder.iterdir()}
    assert left == {
        "train-rank0-00000000.jsonl.gz": {98},
        "train-rank1-00000000.jsonl.gz": {98, 99},
        "train-rank1-00000100.jsonl.gz": {100, 101},
        "train-rank2-00000000.jsonl.gz": {98},
    }


def test_evaluation_files_hold_one_evaluation_and_are_overwritten(tmp_path: Path) -> None:
    loaders = [DataLoader([make_batch(i, name=name) for i in range(2)], batch_size=None) for name in ("add", "sub")]
    for _ in range(2):
        make_trainer(tmp_path, Attach(), TranscriptCallback()).validate(Tiny(), loaders, verbose=False)
    assert sorted(os.listdir(tmp_path / "rollouts")) == ["add-00000000.jsonl", "sub-00000000.jsonl"]
    rows = list(read_transcripts(tmp_path / "rollouts" / "sub-00000000.jsonl"))
    assert [(row["step"], row["slot"], row["sample"]) for row in rows] == list(itertools.product(range(2), repeat=3))
    assert "set" not in rows[0]


def test_history_row_by_hand() -> None:
    batch = make_batch(3, slots=(4,))
    batch.rollouts = make_rollouts(batch, 0)
    row = {"step": 3, "id": "p4", "slot": 4, "rewards": [1.0, 0.0], "lengths": [8, 9], "truncated": 1}
    assert history_rows(visits(batch)) == [{**row, "reasons": {"correct": 1, "wrong": 1}}]


def test_jsonl_survives_every_tear_and_reports_damage(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert list(read_jsonl(path)) == []
    assert keep_before(path, 3) == 0
    append_lines(path, [{"step": 0, "text": "é\u2028"}, {"step": 1, "loss": float("nan")}])
    data = path.read_bytes()
    assert b"null" in data
    first = data.index(b"\n")
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        # A row that lacks nothing but its newline is whole.
        whole = (size >= first) + (size >= len(data) - 1)
        assert [row["step"] for row in read_jsonl(path)] == [0, 1][:whole]
        append_lines(path, [{"step": 7}])
        assert [row["step"] for row in read_jsonl(path)] == [*[0, 1][:whole], 7]
    path.write_bytes(data + b'{"st')
    assert keep_before(path, 2) == 0
    assert path.read_bytes() == data
    assert keep_before(path, 1) == 1
    assert path.read_bytes() == data[: first + 1]
    assert os.listdir(tmp_path) == ["rows.jsonl"]
    path.write_bytes(b'{"st\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: "):
        list(read_jsonl(path))


def test_metrics_logger_drops_leftovers_only_when_a_fit_begins(tmp_path: Path) -> None:
    old = MetricsFileLogger(tmp_path)
    assert (old.name, old.version, old.save_dir, old.log_dir) == ("metrics", "", str(tmp_path), str(tmp_path))
    old.log_hyperparams({"lr": 1})
    assert os.listdir(tmp_path) == []
    for step in range(4):
        old.log_metrics({"train/loss": 1.0}, step)

    def steps() -> list[tuple[int, list[str]]]:
        rows = read_jsonl(tmp_path / "metrics.jsonl")
        return [(row["step"], [key for key in row if key not in ("step", "time")]) for row in rows]

    train, val = ["train/loss"], ["val/add/accuracy"]
    new = MetricsFileLogger(tmp_path)
    new.log_metrics({"val/add/accuracy": 0.5}, 0)  # `validate` in a run directory
    assert steps() == [(0, train), (1, train), (2, train), (3, train), (0, val)]
    new.log_metrics({"train/loss": 2.0}, 0)  # a fit from the start: what it writes over is gone, its baseline is not
    new.log_metrics({"train/loss": 2.0}, 1)
    assert steps() == [(0, val), (0, train), (1, train)]
    new.finalize("success")
    new.log_metrics({"train/loss": 3.0}, 1)  # a second fit through the same logger
    assert steps() == [(0, val), (0, train), (1, train)]
    new.truncate_after(0)
    assert steps() == [(0, val), (0, train)]


def test_progress_lines_say_what_was_logged_and_leave_out_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(0, 44)  # seconds between two calls: the start, then the end of each batch
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    logged = {"rollout/reward": 0.3125, "rollout/length": 12.4, "rollout/tokens_per_s": 623.4}
    trainer = make_trainer(tmp_path, Attach(reward=1.0), ProgressCallback(), max_steps=3, val_check_interval=2,
                           check_val_every_n_epoch=None)  # fmt: skip
    val = [DataLoader([make_batch(0, name=name)], batch_size=None) for name in ("add", "sub")]
    module = Tiny(logged={**logged, "rollout/zero_advantage_fraction": 1.0})
    trainer.fit(module, DataLoader(Stream(0), batch_size=None), val)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step", "eval", "all"))]
    assert lines == [
        "step   1/3   reward  0.31   length   12.4     623 tok/s   left 1:28",
        "all 4 rollouts scored 1: the policy gradient is zero this step; the KL and entropy terms still act",
        "step   2/3   reward  0.31   length   12.4     623 tok/s   left 0:44",
        "eval at step 2   add 0.25   sub 0.50",
        "step   3/3   reward  0.31   length   12.4     623 tok/s   left 0:00",
    ]


def test_progress_without_a_limit_shows_no_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = DataLoader([make_batch(0)], batch_size=None)
    logged = {"time/step_s": 4.9, "train/entropy": 0.2141, "rollout/zero_advantage_fraction": 0.5}
    make_trainer(tmp_path, Attach(), ProgressCallback(), max_epochs=1).fit(Tiny(logged=logged), loader)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step", "all", "in each"))]
    assert lines == ["step   1   entropy 0.214     4.9 s/step"]


def test_zero_advantage_with_different_groups_and_clock() -> None:
    batch = make_batch(0)
    batch.rollouts = make_rollouts(batch, 0, reward=0.0)[:2] + make_rollouts(batch, 0, reward=1.0)[2:]
    said = progress.zero_advantage_sentence(batch, world_size=2)
    assert said.startswith("in each of the 2 groups all rollouts scored the same (0, 1 of this rank): ")
    assert [clock(0), clock(59.6), clock(3725)] == ["0:00", "1:00", "1:02:05"]


@pytest.fixture
def no_wandb_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "")  # recorded first, so that what wandb sets is undone as well
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_wandb_is_offline_unless_there_is_a_key_or_a_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wandb_account: None
) -> None:
    def offline(**kwargs: Any) -> bool:
        return OfflineFirstWandbLogger(save_dir=tmp_path, **kwargs)._offline

    assert offline()
    assert not offline(offline=False)
    (tmp_path / ".netrc").write_text("machine example.org login user password key\n")
    assert offline()  # a key for another host
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    assert not offline()
    assert offline(offline=True)
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert not offline()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not offline()  # wandb reads the variable


def descendants() -> list[str]:
    """Command lines of the processes below this one."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    found, queue = [], [os.getpid()]
    while queue:
        children = [pid for pid, parent in parents.items() if parent == queue[0]]
        queue = [*queue[1:], *children]
        found += [names[pid] for pid in children]
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for left-over processes in /proc")
def test_wandb_offline_writes_the_table_of_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_wandb_account: None
) -> None:
    wandb = pytest.importorskip("wandb")
    logger = OfflineFirstWandbLogger(save_dir=tmp_path, project="test")
    callbacks = [Attach(), TranscriptCallback(every_n_steps=2, table_rows=3)]
    make_trainer(tmp_path, *callbacks, logger=[logger, MetricsFileLogger(tmp_path)], max_steps=3).fit(
        Tiny(), DataLoader(Stream(0), batch_size=None)
    )
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    wandb.teardown()
    assert not [name for name in descendants() if "wandb" in name]
    assert capsys.readouterr().out.count(f"`wandb sync {folder}`") == 1
    assert list(folder.glob("*.wandb"))
    tables = [json.loads(path.read_text()) for path in folder.glob("files/media/table/*.json")]
    assert sorted(table["data"][0][0] for table in tables) == [0, 2]  # every second step
    assert tables[0]["columns"] == ["step", "problem", "reward", "reason", "length", "text"]
    step = tables[0]["data"][0][0]
    assert tables[0]["data"][1] == [step, "p0", 0, "wrong", 2 + step, f"é step {step}\n"]
    assert len(tables[0]["data"]) == 3


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    root = Path(folder) / "run"
    trainer = SimpleNamespace(default_root_dir=root, is_global_zero=rank == 0, global_rank=rank, world_size=2,
                              loggers=[], sanity_checking=False)  # fmt: skip
    batch = make_batch(0, slots=(0, 1, 2))  # the ranks share the middle group, and rank zero has what comes later
    batch.share = ([3, 4, 5], [0, 1, 2])[rank]
    batch.rollouts = [make_rollouts(batch, 0)[i] for i in batch.share]
    evaluation = make_batch(0, slots=(rank, rank + 2)[: 2 - rank], name="add")  # and more to evaluate
    evaluation.rollouts = make_rollouts(evaluation, 0)
    history, transcripts = HistoryCallback(), TranscriptCallback()
    history.on_train_batch_end(trainer, None, None, batch, 0)
    transcripts.on_train_batch_end(trainer, None, None, batch, 0)
    transcripts.on_validation_batch_end(trainer, None, None, evaluation, 0)
    transcripts.on_validation_epoch_end(trainer, None)
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_rank_zero_writes_the_rows_of_all_ranks(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    root = tmp_path / "run"
    history = list(read_jsonl(root / "history.jsonl"))
    assert [(row["slot"], row["id"], row["lengths"]) for row in history] == [(i, f"p{i}", [i + 1, i + 2]) for i in range(3)]
    assert all((row["rewards"], row["truncated"], row["reasons"]) == ([1, 0], 1, {"correct": 1, "wrong": 1}) for row in history)
    for rank, places in enumerate(([(1, 1), (2, 0), (2, 1)], [(0, 0), (0, 1), (1, 0)])):
        rows = read_transcripts(root / "rollouts" / f"train-rank{rank}-00000000.jsonl.gz")
        assert [(row["slot"], row["sample"]) for row in rows] == places
    rows = read_transcripts(root / "rollouts" / "add-00000000.jsonl")
    assert [(row["slot"], row["sample"]) for row in rows] == list(itertools.product(range(3), range(2)))
