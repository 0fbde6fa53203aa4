"""Sharded learners as users need them: adapters, precision, offload, checkpoints between any numbers of processes.

As in test_fsdp2.py, one launch of two gloo processes runs every scenario and leaves what it found on the disk.
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlvr_lightning.callbacks.checkpoint import CheckpointCallback
from rlvr_lightning.callbacks.export import ExportCallback, export_checkpoint
from rlvr_lightning.callbacks.history import HistoryCallback
from rlvr_lightning.callbacks.rollout import peak_memory_gib
from rlvr_lightning.callbacks.transcripts import read_transcripts
from rlvr_lightning.checkpoints import check_shards
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.models import resolve_model
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.optimizer import AdamW
from rlvr_lightning.policy import LoRA
from rlvr_lightning.strategies import whole
from test_fsdp2 import SMALL_BUDGET, STEPS, TRAININGS, WORLD, full, largest_gap, launch, local_share, train

pytestmark = pytest.mark.multiprocess

LORA = LoRA(rank=4, alpha=8)
RUNS: dict[str, dict[str, Any]] = {
    # rows only: the first pass of all is then the reference's, with the adapters switched off
    "adapters": {"lora": LORA, "share_prefixes": False, "tokens_per_micro_batch": SMALL_BUDGET},
    "every weight": {},
    "a critic": TRAININGS["a critic"],
    "a value head": TRAININGS["a value head"],
}
"""What is checkpointed. Parameters that do not train, several optimizers and several groups each are counted differently."""
HALF = f"checkpoints/step-{STEPS // 2:06d}.ckpt"


class Gradients(Callback):
    """The dtypes of the gradients of the last update."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.dtypes = {p.grad.dtype for p in pl_module.parameters() if p.grad is not None}


class FullDisk(Callback):
    """From the third step on, one rank can write small files only, as on a disk that is nearly full."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def moments(module: RLVRModule) -> dict[str, Tensor]:
    """Both moments of every weight that trains, in one piece; all ranks must call it."""
    names = {id(p): n for n, p in module.named_parameters()}
    found = {}
    for optimizer in module.trainer.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                for key in ("exp_avg", "exp_avg_sq"):
                    found[f"{names[id(p)]}/{key}"] = whole(optimizer.state[p][key]).clone()
                assert float(optimizer.state[p]["step"]) > 0
    return found


def outcome(module: RLVRModule, record: Any, root: Path) -> dict[str, Any]:
    """What must not depend on the number of processes, nor on having been interrupted; all ranks must call it."""
    rows = [json.loads(line) for line in (root / "history.jsonl").read_text().splitlines()]
    merged = {n: t.clone() for n, t in module.weights().tensors()}
    return {"weights": full(module), "moments": moments(module), "merged": merged, "history": rows, "metrics": record.metrics}


def run(model: str, root: Path, name: str, world: int, **more: Any) -> dict[str, Any]:
    """Train to the end, with a checkpoint half-way and an export."""
    extra = (CheckpointCallback(every_n_steps=STEPS // 2, keep=-1), HistoryCallback(), ExportCallback(dtype="float32"))
    return outcome(*train(model, root, *extra, world=world, **(RUNS[name] | more)), root)


def resume(model: str, root: Path, name: str, world: int, ckpt: Path, **more: Any) -> dict[str, Any]:
    return outcome(*train(model, root, HistoryCallback(), world=world, ckpt_path=str(ckpt), **(RUNS[name] | more)), root)


def message(action: Any, *args: Any, **kwargs: Any) -> str:
    try:
        action(*args, **kwargs)
    except ConfigError as error:
        return str(error)
    return "nothing was raised"


def seed_history(root: Path, of: Path) -> Path:
    """A folder that begins with the history of another run, as if that one had been copied."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "history.jsonl").write_text((of / "history.jsonl").read_text())
    return root


def two_processes(model: str, root: Path) -> dict[str, Any]:
    rank = int(os.environ["RANK"])

    def folder(name: str, of: Path) -> Path:
        place = root / name
        if rank == 0:
            seed_history(place, of)
        torch.distributed.barrier()
        return place

    found: dict[str, Any] = {}
    for name in RUNS:
        found[name] = run(model, root / name, name, WORLD)
        found[f"{name} from one"] = resume(
            model, folder(f"{name} from one", root / name), name, WORLD, root / f"one {name}" / HALF
        )
    name = "every weight"
    run(model, root / "file", name, WORLD, consolidated=True)
    run(model, root / "file adapters", "adapters", WORLD, consolidated=True)
    found["offloaded"] = run(model, root / "offloaded", name, WORLD, offload=True, offload_reference=True)
    found["offloaded from one"] = resume(
        model, folder("offloaded from one", root / name), name, WORLD, root / f"one {name}" / HALF, offload=True
    )
    watch = Gradients()
    module, record = train(model, root / "bf16", watch, precision="bf16-mixed")
    dtypes = {p.dtype for p in module.parameters()} | {m.dtype for m in moments(module).values()} | watch.dtypes
    found["bf16"] = {"dtypes": dtypes, "metrics": record.metrics, "weights": full(module)}
    for kind, place in (("shards", root / name / HALF), ("file", root / f"one {name}" / HALF)):
        found[f"other model, {kind}"] = message(resume, model, root / "never", "adapters", WORLD, place)
    for kind, unlucky in (("shards", 1), ("file", 0)):
        extra = (CheckpointCallback(every_n_steps=2), FullDisk(unlucky))
        place = root / f"full disk, {kind}"
        found[f"full disk, {kind}"] = message(train, model, place, *extra, world=WORLD, consolidated=kind == "file")
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def alone(tiny_model: Path, root: Path) -> dict[str, dict[str, Any]]:
    """What one process found."""
    pytest.importorskip("peft")
    return {name: run(str(tiny_model), root / f"one {name}", name, 1) for name in RUNS}


@pytest.fixture(scope="module")
def two(tiny_model: Path, root: Path, alone: Any) -> list[dict[str, Any]]:
    """What two processes found, per rank."""
    return launch(two_processes, tiny_model, root)


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert largest_gap(found["weights"], expected["weights"]) <= tolerance
    assert largest_gap(found["moments"], expected["moments"]) <= tolerance
    assert found["history"] == expected["history"]
    assert [row["step"] for row in found["history"]] == [step for step in range(STEPS) for _ in range(4)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_like_one(two: list[dict[str, Any]], alone: dict[str, Any], name: str):
    for rank in two:
        assert_same(rank[name], alone[name])
        assert [m["train/kl"] for m in rank[name]["metrics"]] == pytest.approx(
            [m["train/kl"] for m in alone[name]["metrics"]], rel=5e-4, abs=1e-5
        )


def test_sharded_adapters_learn_and_the_base_model_stays(two: list[dict[str, Any]], tiny_model: Path):
    start = dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).named_parameters())
    for rank in two:
        weights = rank["adapters"]["weights"]
        base = {n.replace(".base_layer", ""): w for n, w in weights.items() if "lora_" not in n}
        assert largest_gap(base, {n: p.detach() for n, p in start.items()}) == 0
        assert all(w.abs().max() > 1e-3 for n, w in weights.items() if "lora_B" in n)  # they begin at zero
        metrics = rank["adapters"]["metrics"]
        assert metrics[0]["train/kl"] == pytest.approx(0, abs=1e-7)  # the reference is the adapter switched off
        assert metrics[1]["train/kl"] > 1e-4


@pytest.mark.parametrize("name", RUNS)
def test_every_rank_sees_the_full_merged_weights(two: list[dict[str, Any]], alone: dict[str, Any], tiny_model: Path, name: str):
    names = set(AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()) - {"lm_head.weight"}  # tied
    for rank in two:
        assert set(rank[name]["merged"]) == names
        assert largest_gap(rank[name]["merged"], alone[name]["merged"]) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_go_on_from_the_checkpoint_of_one(two: list[dict[str, Any]], alone: dict[str, Any], name: str):
    for rank in two:
        assert_same(rank[f"{name} from one"], alone[name])


@pytest.mark.parametrize("name", RUNS)
def test_one_process_goes_on_from_the_shards_of_two(
    two: list[dict[str, Any]], alone: dict[str, Any], tiny_model: Path, root: Path, tmp_path: Path, name: str
):
    assert (root / name / HALF).is_dir()
    assert_same(resume(str(tiny_model), seed_history(tmp_path, root / name), name, 1, root / name / HALF), alone[name])


@pytest.mark.parametrize(("name", "folder"), [("every weight", "file"), ("adapters", "file adapters")])
def test_one_process_goes_on_from_the_consolidated_file_of_two(
    two: list[dict[str, Any]], alone: dict[str, Any], tiny_model: Path, root: Path, tmp_path: Path, name: str, folder: str
):
    assert (root / folder / HALF).is_file()
    assert_same(resume(str(tiny_model), seed_history(tmp_path, root / name), name, 1, root / folder / HALF), alone[name])


def test_shards_that_are_not_all_in_the_folder_are_refused(two: list[dict[str, Any]], root: Path, tmp_path: Path):
    folder = tmp_path / "checkpoints" / ".step.partial"  # as on a machine that does not see the other's disk
    shutil.copytree(root / "every weight" / HALF, folder)
    check_shards(folder)
    (folder / "__1_0.distcp").unlink()
    assert "1 of 2 shards of the checkpoint are not in" in message(check_shards, folder)
    assert not folder.exists()


def test_a_consolidated_file_is_the_file_of_one_process(two: list[dict[str, Any]], root: Path):
    ours, theirs = (torch.load(root / f / HALF, weights_only=True) for f in ("file adapters", "one adapters"))
    assert largest_gap(ours["state_dict"], theirs["state_dict"]) < 1e-5
    (ours,), (theirs,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert ours["state"].keys() == theirs["state"].keys()
    assert [g["params"] for g in ours["param_groups"]] == [g["params"] for g in theirs["param_groups"]]


@pytest.mark.parametrize("kind", ["shards", "file"])
def test_a_rank_that_cannot_write_ends_all_of_them_and_the_previous_checkpoint_is_whole(
    two: list[dict[str, Any]], alone: dict[str, Any], tiny_model: Path, root: Path, tmp_path: Path, kind: str
):
    folder = root / f"full disk, {kind}" / "checkpoints"
    for rank in two:
        text = rank[f"full disk, {kind}"]
        assert text.startswith(f"cannot write {folder / 'step-000004.ckpt'}: File too large")
        assert "free space" in text
    assert [f.name for f in folder.iterdir()] == ["step-000002.ckpt"]  # nothing half-written, under any name
    name = "every weight"
    again = resume(str(tiny_model), seed_history(tmp_path, root / name), name, 1, folder / "step-000002.ckpt")
    assert_same(again, alone[name])


@pytest.mark.parametrize("kind", ["shards", "file"])
def test_a_checkpoint_of_another_model_is_one_sentence(two: list[dict[str, Any]], kind: str):
    for rank in two:
        text = rank[f"other model, {kind}"]
        assert "is of another model" in text
        assert "policy.lora" in text


@pytest.mark.parametrize("name", ["every weight", "adapters"])
def test_one_process_refuses_the_checkpoint_of_another_model(
    two: list[dict[str, Any]], root: Path, tiny_model: Path, tmp_path: Path, name: str
):
    other = "adapters" if name == "every weight" else "every weight"
    for place in (root / name, root / f"one {name}"):
        assert "is of another model" in message(resume, str(tiny_model), tmp_path, other, 1, place / HALF)


def exported(folder: Path) -> dict[str, Tensor]:
    AutoModelForCausalLM.from_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_processes_exports_the_same_folder(two: list[dict[str, Any]], root: Path, name: str):
    of_one, of_two = root / f"one {name}" / "final", root / name / "final"
    assert {f.name for f in of_one.iterdir()} == {f.name for f in of_two.iterdir()}
    for file in of_one.glob("*.json"):
        assert file.read_bytes() == (of_two / file.name).read_bytes(), file.name
    assert largest_gap(exported(of_one), exported(of_two)) < 1e-5


def run_yaml(model: Path, folder: Path, name: str) -> Path:
    policy: dict[str, Any] = {"model": str(model)}
    if "lora" in RUNS[name]:
        policy["lora"] = {"rank": LORA.rank, "alpha": LORA.alpha}
    path = folder / "run.yaml"
    path.write_text(json.dumps({"model": {"policy": policy}, "export": {"dtype": "float32"}}))  # YAML too
    return path


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_exported_without_training(
    two: list[dict[str, Any]], tiny_model: Path, root: Path, tmp_path: Path, name: str
):
    last = f"checkpoints/step-{STEPS:06d}.ckpt"
    for kind, folder in (("shards", root / name), ("file", root / f"one {name}")):
        export_checkpoint(run_yaml(tiny_model, tmp_path, name), folder / last, tmp_path / kind)
        for file in (folder / "final").iterdir():
            if file.suffix != ".safetensors":
                assert file.read_bytes() == (tmp_path / kind / file.name).read_bytes(), file.name
        assert largest_gap(exported(tmp_path / kind), exported(folder / "final")) <= (1e-6 if name == "adapters" else 0)


def test_what_cannot_be_exported_is_one_sentence(alone: dict[str, Any], tiny_model: Path, root: Path, tmp_path: Path):
    config, ckpt = run_yaml(tiny_model, tmp_path, "adapters"), root / "one every weight" / HALF
    assert "is of another model" in message(export_checkpoint, config, ckpt, tmp_path / "out")
    assert "does not exist" in message(export_checkpoint, config, tmp_path / "none.ckpt", tmp_path / "out")
    assert "is no configuration of a run" in message(export_checkpoint, tmp_path / "none.yaml", ckpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["offloaded", "offloaded from one"])
def test_offloading_changes_no_number(two: list[dict[str, Any]], alone: dict[str, Any], name: str):
    for rank in two:
        assert_same(rank[name], alone["every weight"])


def test_mixed_precision_computes_in_bfloat16_and_keeps_everything_in_float32(
    two: list[dict[str, Any]], tiny_model: Path, tmp_path: Path
):
    module, record = train(str(tiny_model), tmp_path, world=1, precision="bf16-mixed")
    exact = two[0]["every weight"]["metrics"]
    for rank in two:
        assert rank["bf16"]["dtypes"] == {torch.float32}
        for step, (ours, theirs) in enumerate(zip(record.metrics, rank["bf16"]["metrics"], strict=True)):
            tolerance = 0.01 if step == 0 else 0.05  # bfloat16 has 8 bits; every update multiplies what rounding left
            for key in ("train/loss", "train/entropy"):
                assert theirs[key] == pytest.approx(ours[key], abs=tolerance), (key, step)
        assert rank["bf16"]["metrics"][0]["train/entropy"] != exact[0]["train/entropy"]  # it is another precision
        assert largest_gap(rank["bf16"]["weights"], full(module)) < 2e-2


class OutsideOfPasses(Callback):
    """Where weights, moments and the reference lie after a step, and where it was computed."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        self.policy = {p.device.type for p in [*pl_module.policy.parameters(), *states]}
        self.reference = {p.device.type for p in pl_module._reference[0].parameters()}
        self.computed_on = pl_module.policy.device.type


def on_a_gpu(model: str, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, settings in {
        "sharded": {"sharded": True},
        "sharded, all offloaded": {"sharded": True, "offload": True, "offload_reference": True},
        "whole": {},
        "whole, reference offloaded": {"offload_reference": True},
    }.items():
        watch = OutsideOfPasses()
        module, _ = train(model, root / name, watch, world=1, accelerator="gpu", **settings)
        merged = {n: t.cpu().clone() for n, t in module.weights().tensors()}
        places = watch.policy, watch.reference, watch.computed_on
        found[name] = {"weights": full(module), "merged": merged, "places": places}
    return found


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="what is offloaded leaves a GPU: needs one")
def test_offloading_leaves_the_gpu_and_changes_no_number(tiny_model: Path, tmp_path: Path):
    (found,) = launch(on_a_gpu, tiny_model, tmp_path, world=1)
    assert found["sharded"]["places"] == ({"cuda", "cpu"}, {"cuda"}, "cuda")  # AdamW counts its steps on the CPU
    assert found["sharded, all offloaded"]["places"] == ({"cpu"}, {"cpu"}, "cuda")
    assert found["whole, reference offloaded"]["places"][1:] == ({"cpu"}, "cuda")
    for name in found:
        assert largest_gap(found[name]["weights"], found["whole"]["weights"]) < 1e-5
        assert largest_gap(found[name]["merged"], found["whole"]["merged"]) < 1e-5


# --- a real language model ---------------------------------------------------------------------------------------------


def five_steps(model: str, root: Path) -> dict[str, Any]:
    """GRPO on 16 given rollouts a step, in as many processes as were started."""
    world = int(os.environ["WORLD_SIZE"])
    module, record = train(model, root, steps=5, world=world, optimizer=AdamW(lr=5e-4, eps=1e-4))
    shares = local_share(module.policy.lm), local_share(module._reference[0].lm)
    return {"peak_gib": peak_memory_gib(), "weights": full(module), "metrics": record.metrics, "shares": shares}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_language_model_trains_in_two_processes_as_in_one_and_each_holds_less(tmp_path: Path):
    model, found = "embedded:SmolLM2-135M-Instruct", {}
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        found[world] = launch(five_steps, model, tmp_path / str(world), limit_s=1700, world=world)
    (one,), two = found[1], found[2]
    start = dict(AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=torch.float32).named_parameters())
    moved = largest_gap(one["weights"], {n: p.detach() for n, p in start.items()})
    for rank in two:
        gap = largest_gap(rank["weights"], one["weights"])
        print(
            f"peak {one['peak_gib']:.2f} GiB alone, {rank['peak_gib']:.2f} GiB sharded; gap {gap:.1e} after moving {moved:.1e}"
        )
        assert gap < 1e-4 < 1e-3 < moved
        assert [m["train/loss"] for m in rank["metrics"]] == pytest.approx([m["train/loss"] for m in one["metrics"]], abs=1e-4)
        assert all(share <= 0.51 for shares in rank["shares"] for share in shares.values())
        assert rank["peak_gib"] < 0.8 * one["peak_gib"]


# --- through the command line ------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
FSDP = Path(__file__).parent.parent / "conf" / "trainer" / "fsdp.yaml"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def fit_arguments(model: Path | str, root: Path, *, steps: int, timeout_s: int = 300) -> list[str]:
    """Of `rlvr fit` in two processes: two problems, 2 x 4 rollouts of 8 tokens."""
    return [
        *("fit", "--model.policy.model", str(model), "--model.optimizer.lr", "1e-4"),
        *(
            "--data",
            "SingleExampleDataModule",
            "--data.question",
            "3 + 4",
            "--data.answer",
            "7",
            "--data.problems_per_step",
            "2",
        ),
        *("--rollout.engine", "rlvr_lightning.engines.hf.HFEngine"),
        *("--rollout.sampling.rollouts_per_problem", "4", "--rollout.sampling.temperature", "0.8"),
        *("--rollout.sampling.max_tokens", "8", "--rollout.eval_sampling.max_tokens", "8"),
        *("--trainer", str(FSDP), "--trainer.strategy.init_args.timeout_s", str(timeout_s)),
        *("--trainer.accelerator", "cpu", "--trainer.devices", str(WORLD), "--trainer.precision", "32-true"),
        *("--trainer.max_steps", str(steps), "--trainer.default_root_dir", str(root)),
    ]


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT | environment,
        start_new_session=True,  # whatever it leaves behind is found by its session
    )


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_ranks(arguments: Sequence[str]) -> list[subprocess.Popen[str]]:
    """Start `rlvr` twice, as torchrun or SLURM would, but without a parent that ends one when the other has failed."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    command = [sys.executable, "-m", "rlvr_lightning", *arguments]
    return [start(command, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(WORLD)]


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if (match := re.match(r"step +(\d+)", line)) and int(match[1]) >= step:
            return
    raise AssertionError(f"the run ended before step {step}: {''.join(seen)}")


def leftovers(sessions: Sequence[int]) -> list[str]:
    """Return the command lines of processes that still run in these sessions."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


@contextmanager
def ended_for_sure(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_torchrun_trains_and_every_file_is_written_once(tiny_model: Path, tmp_path: Path):
    logger = ["--trainer.logger", "rlvr_lightning.loggers.OfflineFirstWandbLogger"]
    logger += ["--trainer.logger.save_dir", str(tmp_path), "--trainer.logger.project", "test"]
    arguments = [*fit_arguments(tiny_model, tmp_path, steps=3), *logger, "--checkpoint.every_n_steps", "2"]
    arguments += ["--export.every_n_steps", "2", "--export.dtype", "float32"]
    command = [*TORCHRUN, "--nproc_per_node", "2", "--master_port", free_port(), "-m", "rlvr_lightning", *arguments]
    process = start(command, WANDB_MODE="offline")
    with ended_for_sure([process]):
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
        assert leftovers([process.pid]) == []
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [(row["step"], row["slot"]) for row in rows(tmp_path / "history.jsonl")] == [
        (s, p) for s in range(3) for p in (0, 1)
    ]
    assert all(len(row["rewards"]) == 4 for row in rows(tmp_path / "history.jsonl"))
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert len(re.findall(r"^step +\d", output, re.MULTILINE)) == 3
    assert output.count("training on ") == output.count("W&B: recording offline") == 1
    kept = [row for file in tmp_path.glob("rollouts/train-*.gz") for row in read_transcripts(file)]
    places = [(row["step"], row["slot"], row["sample"]) for row in kept]
    assert sorted(places) == [(s, p, n) for s in range(3) for p in (0, 1) for n in range(4)]
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-000002.ckpt"]
    assert [f.name for f in (tmp_path / "exports").iterdir()] == ["000002"]
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["trainer"]["devices"] in (2, "2")
    assert not list(tmp_path.rglob("*.partial"))
    export_checkpoint(tmp_path / "run.yaml", tmp_path / "checkpoints/step-000002.ckpt", tmp_path / "later")
    assert largest_gap(exported(tmp_path / "later"), exported(tmp_path / "exports/000002")) == 0
    assert largest_gap(exported(tmp_path / "later"), exported(tmp_path / "final")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stuck"])
def test_a_rank_that_is_gone_or_stuck_ends_the_other_with_a_reason(tiny_model: Path, tmp_path: Path, number: signal.Signals):
    timeout_s = 20
    first, second = ranks = start_ranks(fit_arguments(tiny_model, tmp_path, steps=10_000, timeout_s=timeout_s))
    with ended_for_sure(ranks):
        wait_for_step(first, 2)
        os.kill(second.pid, number)
        began = time.monotonic()
        output, _ = first.communicate(timeout=timeout_s + 90)
        assert first.returncode not in (0, None)
        assert time.monotonic() - began < timeout_s + 60  # the rest is Python's own end on a busy machine
        if number == signal.SIGKILL:
            assert f"rank 1 (process {second.pid} on {socket.gethostname()}) is gone" in output
        else:
            assert "one is stuck or has given up before" in output
            os.kill(second.pid, signal.SIGCONT)
            output, _ = second.communicate(timeout=timeout_s + 90)
            assert second.returncode not in (0, None)
            assert f"rank 0 (process {first.pid} on {socket.gethostname()}) is gone" in output
        second.wait(timeout=60)
        deadline = time.monotonic() + 20
        while (left := leftovers([p.pid for p in ranks])) and time.monotonic() < deadline:
            time.sleep(0.5)  # grading processes see that their parent is gone
        assert left == []


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_message_and_spares_the_previous_checkpoint(tiny_model: Path, tmp_path: Path):
    limit = 200_000  # bytes of any file: the metrics fit, a checkpoint does not

    def fill_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = fit_arguments(tiny_model, tmp_path, steps=2)
    arguments += ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    arguments += ["--checkpoint.every_n_steps", "1"]
    command = [sys.executable, "-m", "rlvr_lightning"]
    assert subprocess.run([*command, *arguments], env=ENVIRONMENT, check=False, timeout=300).returncode == 0
    checkpoint = tmp_path / "checkpoints/step-000002.ckpt"
    before = checkpoint.read_bytes()
    more = [*arguments, "--trainer.max_steps", "4", "--ckpt_path", str(checkpoint)]
    full = subprocess.run(
        [*command, *more], env=ENVIRONMENT, check=False, timeout=300, preexec_fn=fill_disk, capture_output=True, text=True
    )
    assert full.returncode == 2
    assert "Traceback" not in full.stderr
    assert full.stderr.count("rlvr: error: ") == 1
    assert "cannot write" in full.stderr
    assert "free space" in full.stderr
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == [checkpoint.name]
    assert checkpoint.read_bytes() == before
    export_checkpoint(tmp_path / "run.yaml", checkpoint, tmp_path / "out")


def ip(*arguments: str) -> bool:
    return (
        shutil.which("ip") is not None and subprocess.run(["ip", *arguments], check=False, capture_output=True).returncode == 0
    )


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[list[str], str, str]]]:
    """Two network namespaces joined by a cable: how to start a command in each, its interface and its address."""
    tag = f"rlvr{os.getpid() % 10000}"
    names = [f"{tag}a", f"{tag}b"]
    if not ip("netns", "add", names[0]):
        pytest.skip("`ip netns add` needs root")
    try:
        assert ip("netns", "add", names[1])
        assert ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for number, name in enumerate(names, 1):
            assert ip("-n", name, "address", "add", f"10.87.0.{number}/24", "dev", name)
            assert ip("-n", name, "link", "set", name, "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield [(["ip", "netns", "exec", name], name, f"10.87.0.{number}") for number, name in enumerate(names, 1)]
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_machines_train_together(tiny_model: Path, tmp_path: Path, two_hosts: list[tuple[list[str], str, str]]):
    arguments = [*fit_arguments(tiny_model, tmp_path, steps=2), "--checkpoint.every_n_steps", "2"]
    arguments += ["--trainer.devices", "1", "--trainer.num_nodes", "2"]
    torchrun = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", two_hosts[0][2], "--master_port", "29511"]
    nodes = [
        start([*inside, *torchrun, "--node_rank", str(rank), "-m", "rlvr_lightning", *arguments], GLOO_SOCKET_IFNAME=interface)
        for rank, (inside, interface, _) in enumerate(two_hosts)
    ]
    with ended_for_sure(nodes):
        outputs = [node.communicate(timeout=500)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], "".join(outputs)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "step" in outputs[0]
    assert "training on" not in outputs[1]  # rank 0 alone speaks
    shards = [f.name for f in (tmp_path / "checkpoints/step-000002.ckpt").glob("*.distcp")]
    assert sorted(shards) == ["__0_0.distcp", "__1_0.distcp"]
