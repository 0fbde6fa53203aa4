"""Whether a run fits into the memory of this machine, before it starts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import psutil
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from rlvr_lightning.data import ProblemDataModule
from rlvr_lightning.engines import RolloutEngine, Sampling
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.memory_plan import GIB, MemoryPlan, ModelSizes, Settings, plan_memory
from rlvr_lightning.prompts import PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlvr_lightning.module import RLVRModule


class Rollouts(Protocol):
    """What a plan reads of :class:`~rlvr_lightning.callbacks.rollout.RolloutCallback`."""

    engine: RolloutEngine
    sampling: Sampling
    prompt: PromptTemplate

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The policy's."""
        ...


def plan_run(
    module: "RLVRModule",
    trainer: Trainer,
    data: ProblemDataModule,
    rollout: Rollouts,
    *,
    window: int,
    device: Literal["cpu", "cuda"] | None = None,
) -> MemoryPlan:
    """Return the plan of a fit; reads the model's config, not its weights.

    Args:
        module: the algorithm.
        trainer: says how many processes, on what device.
        data: set up, so that the problems are known.
        rollout: engine, sampling and prompts.
        window: most tokens of any sequence, prompt and completion, evaluations included.
        device: other than the trainer's.
    """
    engine, sampling, overlap = rollout.engine, rollout.sampling, bool(getattr(rollout, "overlap", False))
    policy, critic = module.policy_config, getattr(module, "critic_config", None)
    kind = device or ("cuda" if trainer.strategy.root_device.type == "cuda" else "cpu")
    world = trainer.num_devices * trainer.num_nodes
    low = str(trainer.precision).startswith("bf16")
    rollouts = data.problems_per_step * sampling.rollouts_per_problem
    capacity, available = machine_memory(kind)
    longest = sorted(data.train_problems, key=lambda p: len(p.question))[-32:]
    evaluated = max((len(problems) for problems in data.eval_problems.values()), default=0)
    of_engine = engine_settings(engine, kind, max(rollouts // world, evaluated), 2 if low else 4)
    of_engine["engine_sleeps"] = of_engine.get("engine_sleeps", False) and not overlap
    return plan_memory(
        Settings(
            model=ModelSizes.read(policy.model_path, policy.lora),
            tokens_per_micro_batch=module.tokens_per_micro_batch,
            rows=-(-rollouts // (world * module.updates_per_step)),
            prompts=min(data.problems_per_step, len(data.train_problems)),
            prompt_tokens=max(len(rollout.prompt(problem, rollout.tokenizer)) for problem in longest),
            max_tokens=sampling.max_tokens,
            window=window,
            device=kind,
            capacity_gib=capacity,
            available_gib=available,
            itemsize=2 if low else 4,
            world_size=world,
            local_ranks=trainer.num_devices if kind == "cpu" else 1,
            sharded=isinstance(trainer.strategy, ModelParallelStrategy),
            checkpointing=policy.gradient_checkpointing,
            trees=policy.share_prefixes is not False,
            reference=module.uses_reference,
            critic=critic is not None and not critic.shared_trunk,
            overlap=overlap,
            **of_engine,
        )
    )


def check(plan: MemoryPlan) -> None:
    """Print a warning if a run may not fit.

    Raises:
        ConfigError: if it cannot fit, whatever its rollouts are like.
    """
    verdict = plan.verdict()
    if verdict.startswith("does not fit"):
        raise ConfigError(f"memory {verdict}; `rlvr doctor --config ...` lists the parts:\n{plan}")
    if verdict.startswith("may not fit"):
        print("\n  ".join([f"warning: memory {verdict}", *plan.advice()]), flush=True)


def engine_settings(engine: RolloutEngine, device: str, sequences: int, itemsize: int) -> dict[str, Any]:
    """Return the settings of an engine; one that is not known counts as elsewhere."""
    name, given = type(engine).__name__, vars(engine)
    own_process = "_own" in given
    given = given | {f"_{key}": value for key, value in given.get("_own", {}).items()}
    size = {"float32": 4, "bfloat16": 2}.get(given.get("_dtype", "auto"), itemsize)
    if "vllm" in name.lower() and not given.get("_urls"):
        return {
            "engine": "vllm",
            "engine_itemsize": size,
            "own_process": own_process,
            "engine_rows": min(given.get("_max_num_seqs") or 256, sequences),
            "gpu_memory_utilization": given.get("_gpu_memory_utilization") or 0.45,
            "kv_cache_gib": given.get("_kv_cache_gib"),
            "engine_sleeps": device == "cuda" and given.get("_sleep") is not False,
        }
    if name == "HFEngine":
        return {"engine": "hf", "engine_itemsize": size, "engine_rows": min(given["_batch_size"], sequences)}
    return {"engine": "elsewhere"}


def machine_memory(device: str) -> tuple[float | None, float | None]:
    """Return (capacity, available) in GiB: of the GPU, or of main memory within the container's limit; None without a GPU."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return None, None
        free, total = torch.cuda.mem_get_info()
        return total / GIB, (free + torch.cuda.memory_reserved()) / GIB
    memory, own = psutil.virtual_memory(), psutil.Process().memory_info().rss
    limit, used = cgroup_memory()
    free = min(memory.available, limit - used) + own
    return min(memory.total, limit) / GIB, min(free, memory.total, limit) / GIB


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[float, float]:
    """Return (limit, used) in bytes of the container, version 1 or 2, the strictest of its levels; (inf, 0) without a limit.

    What the kernel could drop, the cache of files, does not count as used.
    """
    places: list[tuple[Path, str, str]] = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            base, names = (
                (root, ("memory.max", "memory.current"))
                if not controllers
                else (root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
            )
            folder = base / path.lstrip("/")
            places += [(folder, *names) for folder in (folder, *folder.parents) if folder.is_relative_to(base)]
    found = [(float("inf"), 0.0)]
    for folder, limit_name, used_name in places:
        if (folder / limit_name).is_file() and (text := (folder / limit_name).read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / used_name).read_text()) - int(stat.get("inactive_file", 0)) - int(stat.get("active_file", 0))
            if int(text) < 1 << 60:  # version 1 writes a huge number for no limit
                found.append((float(text), float(used)))
    return min(found, key=lambda pair: pair[0] - pair[1])
