"""Two real processes that shard the policy with FSDP2 (gloo), against one process that does not.

One launch runs every scenario in turn and leaves what it found on the disk; the tests read it. A scenario in which ranks could
wait for each other forever has a launch of its own with a short timeout.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from rlvr_lightning.batching import RolloutBatch, plan_micro_batches, share_of_rank
from rlvr_lightning.callbacks.checkpoint import CheckpointCallback
from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.critic import CriticConfig
from rlvr_lightning.data import SingleExampleDataModule
from rlvr_lightning.engines import Sampling
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.losses import Objective
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.optimizer import AdamW
from rlvr_lightning.policy import LoRA, PolicyConfig
from rlvr_lightning.records import Completion, Problem, ProblemBatch, Rollout, Score
from rlvr_lightning.strategies import FSDP2Strategy, whole

pytestmark = pytest.mark.multiprocess

WORLD = 2
STEPS = 4
PROBLEMS = [Problem(f"p{i}", f"question {i}", "1") for i in range(4)]
LENGTHS = [(4, 1, 12, 2), (20, 20, 18, 20), (3, 3, 5, 1), (2, 6, 1, 7)]
"""Completion tokens of each slot's group. Rank 0 has slots 0 and 1: more tokens, and more micro-batches."""
SAMPLING = Sampling(rollouts_per_problem=4, temperature=1.0, max_tokens=8)
SMALL_BUDGET = 45
PROBE = (20, 30, 40)


def group(slot: int, step: int) -> list[Rollout]:
    """The rollouts of one slot, made up but the same in every process."""
    generator = torch.Generator().manual_seed(100 * step + slot)
    prompt = tuple(range(10 + slot % 2, 16 + slot))
    rollouts = []
    for sample, length in enumerate(LENGTHS[slot]):
        tokens = tuple(torch.randint(1, 90, (length,), generator=generator).tolist())
        reward = float((sample + slot + step) % 3 == 0)
        score = Score(reward, reward == 1, "wrong", None)
        rollouts.append(Rollout(PROBLEMS[slot], prompt, Completion(tokens, (-3.0,) * length, "", "length"), score, 0.6, 0))
    return rollouts


class Scripted(Callback):
    """Attaches this rank's share of the made-up groups."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: ProblemBatch, batch_idx: int) -> None:
        batch.problems, batch.group_size = tuple(PROBLEMS[slot] for slot in batch.slots), SAMPLING.rollouts_per_problem
        everything = [rollout for slot in batch.slots for rollout in group(slot, batch.step)]
        batch.share = share_of_rank(len(everything), pl_module.updates_per_step, trainer.global_rank, trainer.world_size)
        batch.rollouts = [everything[i] for i in batch.share]


class NoDigit:
    """Reward 1 for a completion without digits."""

    def __call__(self, pairs: Sequence[tuple[Problem, Completion]]) -> list[Score]:
        verdicts = [not any(c.isdigit() for c in completion.text) for _, completion in pairs]
        return [Score(float(v), v, "correct" if v else "wrong", None) for v in verdicts]

    def check(self, problems: Sequence[Problem]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Record(Callback):
    """Metrics, steps and sampled tokens, per step."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    tokens: list[dict[tuple[int, int], tuple[int, ...]]] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: ProblemBatch, batch_idx: int) -> None:
        assert batch.rollouts is not None
        ids = [r.completion.token_ids for r in batch.rollouts]
        self.tokens.append(dict(zip(batch.places, ids, strict=True)))
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.steps.append(batch.step)


class ProbeEngine(Callback):
    """After the first update: what the engine says before and after a sync, and what it holds."""

    def __init__(self, engine: HFEngine) -> None:
        self.engine = engine
        self.found: dict[str, Any] = {}

    def ask(self) -> Tensor:
        sampling = Sampling(rollouts_per_problem=1, temperature=1.0, max_tokens=1)
        ((completion,),) = self.engine.generate([PROBE], sampling, [[5]])
        return torch.tensor([completion.token_ids[0], completion.logprobs[0]])

    def on_train_batch_end(self, trainer: Trainer, pl_module: RLVRModule, *args: Any) -> None:
        if trainer.global_step == 1:
            before = self.ask()
            self.engine.sync(pl_module.weights(), 1, window=32)
            assert self.engine._model is not None
            self.found = {
                "before": before,
                "after": self.ask(),
                "private": self.engine._model is not pl_module.policy.lm,
                "weights": full(pl_module),
            }


def full(module: RLVRModule) -> dict[str, Tensor]:
    """Every weight in one piece; all ranks must call it."""
    return {n: whole(p).detach().cpu().clone() for n, p in [*module.policy.lm.named_parameters(), *of_critic(module)]}


def of_critic(module: RLVRModule) -> list[tuple[str, Tensor]]:
    owner = getattr(module, "critic", module.policy)
    return [(f"critic.{n}", p) for n, p in owner.named_parameters() if hasattr(module, "critic") or "value_head" in n]


def local_share(module: torch.nn.Module) -> dict[str, float]:
    """Part of each parameter that this rank holds: 1 for whatever is not sharded."""
    return {n: p.to_local().numel() / p.numel() if isinstance(p, DTensor) else 1.0 for n, p in module.named_parameters()}


def train(
    model: str,
    root: Path,
    *extra: Callback,
    source: Callback | None = None,
    steps: int = STEPS,
    world: int = WORLD,
    share_prefixes: bool | None = None,
    timeout_s: int = 120,
    ckpt_path: str | None = None,
    consolidated: bool = False,
    offload: bool = False,
    offload_reference: bool = False,
    lora: LoRA | None = None,
    precision: Any = "32-true",
    accelerator: str = "cpu",
    sharded: bool | None = None,
    **settings: Any,
) -> tuple[RLVRModule, Record]:
    """Train in ``world`` processes, of which this is one."""
    record = Record()
    fsdp2 = FSDP2Strategy(save_distributed_checkpoint=not consolidated, timeout_s=timeout_s, offload=offload)
    trainer = Trainer(
        accelerator=accelerator,
        devices=world,
        strategy=fsdp2 if sharded or world > 1 else "auto",
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, CheckpointCallback) for c in extra),
        inference_mode=False,
        num_sanity_val_steps=0,
        max_steps=steps,
        default_root_dir=root,
        callbacks=[source or Scripted(), record, *extra],
    )
    defaults: dict[str, Any] = {
        "objective": Objective(kl_coef=0.1, entropy_coef=0.01),
        # eps far above rounding: Adam's first step is the sign of the gradient, even of one that is rounding noise
        "optimizer": AdamW(lr=3e-3, eps=1e-4),
        "mismatch_limit": float("inf"),
    }
    torch.manual_seed(0)  # adapters begin at random
    policy = PolicyConfig(model=model, share_prefixes=share_prefixes, lora=lora)
    module = RLVRModule(policy=policy, offload_reference=offload_reference, **(defaults | settings))
    data = SingleExampleDataModule(question="say a word", answer="1", problems_per_step=4)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return module, record


def sampling_run(model: str, root: Path, world: int) -> tuple[RLVRModule, Record, dict[str, Any]]:
    """Two steps with an engine; the second samples from the updated weights."""
    engine = HFEngine()
    probe = ProbeEngine(engine)
    source = RolloutCallback(engine=engine, sampling=SAMPLING, verifier=NoDigit())
    settings = {"mismatch_limit": 0.1, "optimizer": AdamW(lr=1e-2, eps=1e-4)}
    module, record = train(model, root, probe, source=source, steps=2, world=world, **settings)
    return module, record, probe.found


TRAININGS: dict[str, dict[str, Any]] = {
    "one micro-batch per rank": {},
    "uneven micro-batches": {"tokens_per_micro_batch": SMALL_BUDGET, "share_prefixes": False},
    "uneven micro-batches, shared prefixes": {"tokens_per_micro_batch": SMALL_BUDGET, "share_prefixes": True},
    "two updates per step": {"updates_per_step": 2, "steps": 2 * STEPS, "tokens_per_micro_batch": SMALL_BUDGET},
    "sequences": {"objective": Objective(kl_coef=0.1, reduction="sequence"), "tokens_per_micro_batch": SMALL_BUDGET},
    "a critic": {
        "advantage": "gae",
        "critic": CriticConfig(lam=0.9, updates_per_step=2, optimizer=AdamW(lr=3e-3, eps=1e-4)),
        "tokens_per_micro_batch": SMALL_BUDGET,
    },
    "a value head": {"advantage": "gae", "critic": CriticConfig(shared_trunk=True, optimizer=AdamW(lr=3e-3, eps=1e-4))},
}


def all_scenarios(model: str, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, settings in TRAININGS.items():
        module, record = train(model, root / name, **settings)
        found[name] = {"weights": full(module), "metrics": record.metrics}
        found["shares"] = local_share(module.policy.lm), local_share(module._reference[0].lm)
    module, record, probe = sampling_run(model, root / "engine", WORLD)
    found["engine"] = {"tokens": record.tokens, "metrics": record.metrics, **probe}
    for kind in ("sharded", "consolidated", "sharded with a critic"):
        settings = {"consolidated": kind == "consolidated", **(TRAININGS["a critic"] if "critic" in kind else {})}
        train(model, root / kind, CheckpointCallback(every_n_steps=2), steps=2, **settings)
        (path,) = (root / kind / "checkpoints").iterdir()
        module, record = train(model, root / kind, ckpt_path=str(path), **settings)
        found[kind] = {"weights": full(module), "steps": record.steps, "metrics": record.metrics, "folder": path.is_dir()}
    return found


Scenario = Callable[[str, Path], dict[str, Any]]


def _rank(rank: int, scenario: Scenario, model: str, root: str, port: int, world: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",  # what tells Lightning that the processes are there already
    }
    torch.set_num_threads(1)
    found = scenario(model, Path(root))
    torch.save(found, Path(root) / f"rank{rank}.pt")


def launch(
    scenario: Scenario, model: Path | str, root: Path, *, limit_s: int = 400, world: int = WORLD
) -> list[dict[str, Any]]:
    """Run a scenario in processes of its own; return what each found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = mp.spawn(_rank, args=(scenario, str(model), str(root), port, world), nprocs=world, join=False)
    deadline = time.monotonic() + limit_s
    try:
        while not ranks.join(timeout=1, grace_period=2):  # a rank that waits for one that failed is killed
            if time.monotonic() > deadline:
                raise TimeoutError(f"{scenario.__name__} still runs after {limit_s} s")
    finally:
        for process in ranks.processes:
            process.kill()
    return [torch.load(root / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, per rank."""
    return launch(all_scenarios, tiny_model, tmp_path_factory.mktemp("two"))


def largest_gap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[n] - second[n]).abs().max()) for n in first)


def start_weights(model: Path) -> dict[str, Tensor]:
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return {n: p.detach() for n, p in lm.named_parameters()}


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_like_one(two: list[dict[str, Any]], tiny_model: Path, tmp_path: Path, name: str):
    module, record = train(str(tiny_model), tmp_path, world=1, **TRAININGS[name])
    expected = full(module)
    assert "lm_head.weight" not in expected  # tied
    of_policy = {n: w for n, w in expected.items() if not n.startswith("critic.")}
    assert largest_gap(of_policy, start_weights(tiny_model)) > 5e-3
    assert ("critic" in TRAININGS[name]) == (len(of_policy) < len(expected))
    for rank in two:
        assert largest_gap(rank[name]["weights"], expected) < 1e-5
        for step, (ours, theirs) in enumerate(zip(record.metrics, rank[name]["metrics"], strict=True)):
            rel = 1e-5 if step == 0 else 5e-4  # every update multiplies what rounding left
            keys = ("loss", "kl", "entropy", "grad_norm", "tokens")
            critic = ("critic/loss", "critic/grad_norm", "critic/value", "critic/explained_variance")
            for key in (*(f"train/{key}" for key in keys), "mismatch/mean_abs", *critic):
                if key in ours:
                    assert theirs[key] == pytest.approx(ours[key], rel=rel, abs=1e-5), key


def plan_of(slots: Sequence[int], *, share: bool) -> list[list[int]]:
    batch = RolloutBatch.from_rollouts([rollout for slot in slots for rollout in group(slot, step=0)])
    return plan_micro_batches(batch, SMALL_BUDGET, share=share).cuts


def test_the_small_budget_gives_the_ranks_different_numbers_of_micro_batches():
    for share in (False, True):
        first, second = (plan_of(slots, share=share) for slots in ((0, 1), (2, 3)))
        assert len(first) != len(second)
        assert {len(rows) == 1 for rows in first + second} == {True, False}  # single rows and others


def test_policy_parameters_are_sharded_in_halves(two: list[dict[str, Any]]):
    for rank in two:
        assert set(rank["shares"][0].values()) == {0.5}


def test_reference_blocks_are_sharded_in_halves(two: list[dict[str, Any]]):
    for rank in two:
        assert {share for n, share in rank["shares"][1].items() if ".layers." in n} == {0.5}


def test_the_whole_reference_is_sharded_between_steps(two: list[dict[str, Any]]):
    for rank in two:
        assert {n: share for n, share in rank["shares"][1].items() if share != 0.5} == {}


def test_the_engine_samples_from_a_private_copy_of_the_sharded_policy(
    two: list[dict[str, Any]], tiny_model: Path, tmp_path: Path
):
    _, alone, _ = sampling_run(str(tiny_model), tmp_path, world=1)
    assert all(rank["engine"]["private"] for rank in two)
    for step in range(2):
        together = two[0]["engine"]["tokens"][step] | two[1]["engine"]["tokens"][step]
        assert together == alone.tokens[step]  # whoever samples a rollout
        assert all(rank["engine"]["metrics"][step]["mismatch/mean_abs"] < 1e-5 for rank in two)


def test_a_sync_brings_the_updated_weights_to_the_engine(two: list[dict[str, Any]], tiny_model: Path):
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for rank in two:
        found = rank["engine"]
        for weights, (token, logprob) in (
            (start_weights(tiny_model), found["before"]),
            (found["weights"], found["after"]),
        ):
            lm.load_state_dict(weights, strict=False)  # tied: no lm_head.weight
            with torch.no_grad():
                expected = lm(torch.tensor([PROBE])).logits[0, -1].log_softmax(-1)[int(token)]
            assert logprob.item() == pytest.approx(expected.item(), abs=1e-5)
        assert abs(found["before"][1] - found["after"][1]) > 1e-3


@pytest.mark.parametrize("kind", ["sharded", "consolidated", "sharded with a critic"])
def test_a_checkpoint_of_two_processes_resumes_at_the_next_step(two: list[dict[str, Any]], kind: str):
    for rank in two:
        whole = rank["a critic" if "critic" in kind else "one micro-batch per rank"]
        assert rank[kind]["folder"] == kind.startswith("sharded")
        assert rank[kind]["steps"] == [2, 3]
        assert largest_gap(rank[kind]["weights"], whole["weights"]) == 0
        assert [m["train/loss"] for m in rank[kind]["metrics"]] == [m["train/loss"] for m in whole["metrics"][2:]]
