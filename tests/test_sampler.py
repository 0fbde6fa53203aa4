"""Runs whose engine dies, and runs that sample a step ahead: a real vLLM server, killed for real."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback, Trainer

from rlvr_lightning.callbacks.checkpoint import CheckpointCallback
from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.data import SingleExampleDataModule
from rlvr_lightning.engines import EngineDiedError, Sampling
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.engines.server import VLLMServerEngine
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.losses import Objective
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.optimizer import AdamW
from rlvr_lightning.policy import PolicyConfig
from test_fsdp2 import full, largest_gap, launch, train
from test_training import SAMPLING, Record, RuleVerifier, lasting, no_digit

STEPS = 4
PLAIN = Objective(kl_coef=0.0, entropy_coef=0.01)
CORRECTED = Objective(kl_coef=0.0, entropy_coef=0.01, importance_cap=2.0)


class KillServer(Callback):
    """Kills the engine's server, with all that it started: at rest before a step samples, or right after it began to."""

    def __init__(self, step: int, *, rank: int = 0, for_good: bool = False) -> None:
        self.step = step
        self.rank = rank
        self.for_good = for_good

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.step == self.step and trainer.global_rank == self.rank:
            self.kill(trainer)

    def kill(self, trainer: Trainer) -> None:
        (source,) = (c for c in trainer.callbacks if isinstance(c, RolloutCallback))  # type: ignore[attr-defined]
        engine = source.engine
        assert isinstance(engine, VLLMServerEngine)
        assert engine._server is not None
        if trainer.callbacks.index(self) < trainer.callbacks.index(source):  # type: ignore[attr-defined]
            source.sampler.settle()
        for pid in engine._server.pids[1:]:
            psutil.Process(pid).kill()
        if self.for_good:
            engine._start = [sys.executable, "-c", "raise SystemExit('gone for good')"], {}


def run(
    model: Path,
    root: Path,
    *first: Callback,
    last: Callback | None = None,
    engine: Any = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> tuple[Record, RLVRModule]:
    record = Record()
    objective = settings.pop("objective", PLAIN)
    evals = {"addition_1digit": "builtin:addition_1digit"} if settings.pop("evaluate", False) else {}
    source = RolloutCallback(
        engine=engine or VLLMServerEngine(dtype="float32", kv_cache_gib=0.05),
        sampling=SAMPLING,
        eval_sampling=Sampling(rollouts_per_problem=1, temperature=0.0, max_tokens=4),
        verifier=RuleVerifier(no_digit),
        **settings,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=isinstance(last, CheckpointCallback),
        inference_mode=False,
        num_sanity_val_steps=0,
        max_steps=STEPS,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        default_root_dir=root,
        callbacks=[*first, source, record, *([last] if last else [])],
    )
    module = RLVRModule(policy=PolicyConfig(model=str(model)), objective=objective, optimizer=AdamW(lr=3e-3))
    data = SingleExampleDataModule(question="say a word", answer="1", problems_per_step=2, evals=evals)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return record, module


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    yield
    started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert [p for p in started if "vllm" in " ".join(p.cmdline())] == []


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    return run(tiny_model, tmp_path_factory.mktemp("undisturbed"))[0]


@pytest.fixture(scope="module")
def ahead(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    return run(tiny_model, tmp_path_factory.mktemp("ahead"), overlap=True, objective=CORRECTED)[0]


def steady(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in lasting(metrics).items() if k != "rollout/restarts"}


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_that_dies_is_started_again_and_the_run_is_the_same(
    tiny_model: Path, tmp_path: Path, undisturbed: Record, capsys: pytest.CaptureFixture[str]
):
    record, _ = run(tiny_model, tmp_path, KillServer(2))
    assert "the engine failed; trying again, at most 3 time(s)" in capsys.readouterr().out
    assert record.rollouts() == undisturbed.rollouts()
    assert [*map(steady, record.metrics)] == [*map(steady, undisturbed.metrics)]
    assert [m["rollout/restarts"] for m in record.metrics] == [0, 0, 1, 1]


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_that_is_lost_leaves_a_checkpoint_that_resumes_at_its_step(
    tiny_model: Path, tmp_path: Path, undisturbed: Record
):
    with pytest.raises(EngineDiedError, match=r"(?s)failed 2 time\(s\) in a row.*saved after update 2; to go on:\n  rlvr fit"):
        run(tiny_model, tmp_path, KillServer(2, for_good=True), max_restarts=1)
    record, _ = run(tiny_model, tmp_path, ckpt_path=tmp_path / "checkpoints" / "interrupted.ckpt")
    assert record.rollouts() == undisturbed.rollouts()[2:]
    assert [*map(steady, record.metrics)] == [*map(steady, undisturbed.metrics[2:])]


class KillBeforeEvaluation(KillServer):
    """Kills it once a step has been trained on, before the evaluation that follows."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None: ...

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.steps_done == self.step:
            self.kill(trainer)


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_that_is_lost_in_an_evaluation_leaves_a_checkpoint_that_goes_on_after_it(tiny_model: Path, tmp_path: Path):
    evaluated, _ = run(tiny_model, tmp_path / "whole", evaluate=True)
    with pytest.raises(EngineDiedError, match=r"(?s)failed 1 time\(s\) in a row.*saved after update 2; to go on:\n  rlvr fit"):
        run(tiny_model, tmp_path, KillBeforeEvaluation(2, for_good=True), max_restarts=0, evaluate=True)
    lost = tmp_path / "checkpoints" / "interrupted.ckpt"
    record, _ = run(tiny_model, tmp_path / "resumed", ckpt_path=lost, evaluate=True)
    assert record.rollouts() == evaluated.rollouts()[2:]
    trained = [{key: m[key] for key in steady(m) if not key.startswith("val/")} for m in record.metrics]
    assert trained == [{key: m[key] for key in row} for row, m in zip(trained, evaluated.metrics[2:], strict=True)]


@pytest.mark.vllm
@pytest.mark.slow
def test_sampling_ahead_is_one_step_old_and_the_same_every_time(
    tiny_model: Path, tmp_path: Path, undisturbed: Record, ahead: Record
):
    first, second = ahead, run(tiny_model, tmp_path, overlap=True, objective=CORRECTED)[0]
    assert [m["rollout/staleness"] for m in first.metrics] == [0, 1, 1, 1]
    assert [{r.policy_version for r in step} for step in first.rollouts()] == [{0}, {0}, {1}, {2}]
    assert first.rollouts() == second.rollouts()
    assert [*map(steady, first.metrics)] == [*map(steady, second.metrics)]
    assert first.rollouts()[0] == undisturbed.rollouts()[0]
    # The second step has the seeds of the undisturbed run's and the weights of its first.
    assert [r.completion.token_ids for r in first.rollouts()[1]] != [r.completion.token_ids for r in first.rollouts()[0]]
    assert first.rollouts()[2] != undisturbed.rollouts()[2]


@pytest.mark.vllm
@pytest.mark.slow
def test_a_run_that_samples_ahead_is_resumed_as_if_it_had_not_stopped(tiny_model: Path, tmp_path: Path, ahead: Record):
    run(tiny_model, tmp_path, last=CheckpointCallback(every_n_steps=2, keep=-1), overlap=True, objective=CORRECTED)
    half = tmp_path / "checkpoints" / "step-000002.ckpt"
    record, _ = run(tiny_model, tmp_path / "resumed", ckpt_path=half, overlap=True, objective=CORRECTED)
    assert record.rollouts() == ahead.rollouts()[2:]
    assert [*map(steady, record.metrics)] == [*map(steady, ahead.metrics[2:])]


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_that_is_lost_before_it_samples_ahead_spares_the_rollouts_at_hand(
    tiny_model: Path, tmp_path: Path, ahead: Record
):
    with pytest.raises(EngineDiedError, match=r"(?s)failed 1 time\(s\) in a row.*saved after update 2; to go on:\n  rlvr fit"):
        run(tiny_model, tmp_path, KillServer(2, for_good=True), max_restarts=0, overlap=True, objective=CORRECTED)
    lost = tmp_path / "checkpoints" / "interrupted.ckpt"
    record, _ = run(tiny_model, tmp_path / "resumed", ckpt_path=lost, overlap=True, objective=CORRECTED)
    assert record.rollouts() == ahead.rollouts()[2:]
    assert [*map(steady, record.metrics)] == [*map(steady, ahead.metrics[2:])]


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_that_dies_before_it_samples_ahead_changes_nothing(tiny_model: Path, tmp_path: Path, ahead: Record):
    record, _ = run(tiny_model, tmp_path, KillServer(2), overlap=True, objective=CORRECTED)
    assert record.rollouts() == ahead.rollouts()
    assert [*map(steady, record.metrics)] == [*map(steady, ahead.metrics)]
    assert [m["rollout/restarts"] for m in record.metrics] == [0, 0, 1, 1]


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_that_dies_while_sampling_ahead_is_started_again(tiny_model: Path, tmp_path: Path, ahead: Record):
    record, _ = run(tiny_model, tmp_path, last=KillServer(1), overlap=True, objective=CORRECTED)
    assert record.rollouts()[:2] == ahead.rollouts()[:2]
    assert len(record.metrics) == STEPS
    # Step 2 is sampled anew, or was sampled just before the kill; step 3 is sampled ahead again.
    assert record.metrics[2]["rollout/staleness"] in (0, 1)
    assert record.metrics[3]["rollout/staleness"] == 1
    assert record.metrics[3]["rollout/restarts"] == 1


def two_processes(model: str, root: Path) -> dict[str, Any]:
    """What a rank finds, of which the second loses its server in the second step; the servers are each rank's own."""

    def fit(name: str, *extra: Callback, ckpt_path: Path | None = None, overlap: bool = False) -> dict[str, Any]:
        source = RolloutCallback(
            engine=VLLMServerEngine(dtype="float32", kv_cache_gib=0.05),
            sampling=SAMPLING,
            verifier=RuleVerifier(no_digit),
            max_restarts=1,
            overlap=overlap,
        )
        path, objective = str(ckpt_path) if ckpt_path else None, CORRECTED if overlap else PLAIN
        module, record = train(model, root / name, *extra, source=source, steps=3, ckpt_path=path, objective=objective)
        return {"rollouts": record.tokens, "weights": full(module), "restarts": source.sampler.restarts}

    found: dict[str, Any] = {
        name: fit(name, *extra) for name, extra in {"whole": (), "killed": (KillServer(1, rank=1),)}.items()
    }
    with pytest.raises(EngineDiedError) as lost:
        fit("lost", KillServer(1, rank=1, for_good=True))
    found["reason"] = str(lost.value)
    found["resumed"] = fit("resumed", ckpt_path=root / "lost/checkpoints/interrupted.ckpt")
    found["ahead"] = fit("ahead", CheckpointCallback(every_n_steps=2), overlap=True)
    found["ahead resumed"] = fit("ahead resumed", ckpt_path=root / "ahead/checkpoints/step-000002.ckpt", overlap=True)
    return found


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.multiprocess
def test_all_ranks_wait_for_one_that_starts_its_engine_again_and_end_with_one_that_cannot(tiny_model: Path, tmp_path: Path):
    ranks = launch(two_processes, tiny_model, tmp_path)
    for found in ranks:
        assert found["killed"]["rollouts"] == found["whole"]["rollouts"]
        assert largest_gap(found["killed"]["weights"], found["whole"]["weights"]) == 0
        assert "the engine failed 2 time(s) in a row" in found["reason"]
        assert "saved after update 2; to go on:" in found["reason"]
        assert found["resumed"]["rollouts"] == found["whole"]["rollouts"][2:]
        assert largest_gap(found["resumed"]["weights"], found["whole"]["weights"]) == 0
        assert found["ahead resumed"]["rollouts"] == found["ahead"]["rollouts"][2:] != found["whole"]["rollouts"][2:]
        assert largest_gap(found["ahead resumed"]["weights"], found["ahead"]["weights"]) == 0
    assert [found["killed"]["restarts"] for found in ranks] == [0, 1]
    assert "that of another rank" in ranks[0]["reason"]


def test_sampling_ahead_needs_another_process_and_a_correction(tiny_model: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"rollout\.overlap is set and HFEngine samples in the learner's process"):
        RolloutCallback(engine=HFEngine(), overlap=True)
    with pytest.raises(ConfigError, match=r"model\.objective\.importance_cap is not set"):
        run(tiny_model, tmp_path, overlap=True)
    with pytest.raises(ConfigError, match=r"rollout\.max_restarts is -1"):
        RolloutCallback(engine=HFEngine(), max_restarts=-1)
