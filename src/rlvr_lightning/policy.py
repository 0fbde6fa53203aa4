"""The policy: a Hugging Face causal LM that answers one question, log-probs and entropy of the sampled tokens.

Legend: ``b`` rows, ``S`` tokens of the padded row, ``N`` predicted tokens, ``H`` hidden size, ``V`` vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlvr_lightning.backbone import Backbone, ValueHead
from rlvr_lightning.batching import RolloutBatch
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.logprobs import token_logprobs_and_entropy
from rlvr_lightning.models import load_config_and_tokenizer, resolve_model
from rlvr_lightning.prefix_tree import ATTENTION
from rlvr_lightning.strategies import whole


class TokenStats(NamedTuple):
    """What the policy says about each sampled token; zeros outside the completion mask."""

    logprobs: Tensor
    """(b, S) nats, at the sampling temperature."""
    entropy: Tensor
    """(b, S) nats, exact over the vocabulary, with gradient."""
    values: Tensor | None = None
    """(b, S) the return expected before the token is chosen, if the policy has a value head."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Train low-rank adapters instead of all weights (needs the ``peft`` extra). The reference is the adapter switched off."""

    rank: int = 32
    """Rank of every adapter."""
    alpha: int = 64
    """The adapter's output is scaled by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Module names to adapt, or ``all-linear`` (every linear layer but the head)."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Which model to train and how to hold it. Parsing this allocates nothing; :meth:`build` loads the weights."""

    model: str
    """A Hugging Face model folder, a hub id, or ``embedded:SmolLM2-135M-Instruct``."""
    attn_implementation: str = "sdpa"
    """Attention of the forward pass, as transformers names it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more arithmetic for far less memory."""
    share_prefixes: bool | None = None
    """Compute what rows have in common, the prompt above all, once (`prefix_tree.py`). None: where it is expected to be
    faster and the model passes :meth:`Policy.check_sharing`. True: always, an error if the model fails that check."""
    check_sharing: bool = True
    """Compare the shared forward pass with the row-wise one on a few tokens before the first step."""
    lora: LoRA | None = None
    """Train adapters only; None trains every weight."""

    @cached_property
    def model_path(self) -> str:
        """The folder or hub id that libraries accept."""
        return resolve_model(self.model)

    def build(self, value_head: ValueHead | None = None) -> "Policy":
        """Load the policy on the CPU with fp32 weights; ``value_head``: of a critic that shares its trunk."""
        return Policy(*self.load(), self, value_head)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model on the CPU with fp32 weights, ready to share prefixes and with adapters if it has any.

        fp32 because AdamW at the paper's learning rate of 1e-6 rounds most updates of bf16 weights to nothing.

        Raises:
            ConfigError: if the model cannot be loaded, or has a head that this forward pass would get wrong.
        """
        config, tokenizer = load_config_and_tokenizer(self.model_path)
        for attribute in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(config, attribute, None) not in (None, 1.0):
                raise ConfigError(
                    f"{self.model!r} scales its logits ({attribute}), which is not supported: choose another model"
                )
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.model_path,
                dtype=torch.float32,
                attn_implementation=self.attn_implementation,
                output_loading_info=True,
            )
            lm, loading = loaded
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"cannot load the weights of {self.model!r}: {error}") from error
        if loading["missing_keys"]:  # transformers would fill them at random, with a warning at most
            raise ConfigError(f"cannot load the weights of {self.model!r}: missing {sorted(loading['missing_keys'])[:5]}")
        if type(lm.get_output_embeddings()) is not nn.Linear:
            raise ConfigError(f"the head of {self.model!r} is no linear layer, which is not supported: choose another model")
        if self.share_prefixes is not False and self._may_share(lm):
            lm.config._attn_implementation = ATTENTION
        if self.lora is not None:
            _add_adapters(lm, self.lora)
        return lm, tokenizer

    def _may_share(self, lm: PreTrainedModel) -> bool:
        able = lm.config._attn_implementation == "sdpa" and lm._supports_attention_backend
        if not able and self.share_prefixes:
            raise ConfigError(
                "policy.share_prefixes needs a model with policy.attn_implementation sdpa: set it to null or false"
            )
        return able


class Policy(Backbone):
    """A causal LM that answers one question: log-probs and entropy of the sampled tokens."""

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: PolicyConfig,
        value_head: ValueHead | None = None,
    ) -> None:
        share = config.share_prefixes if lm.config._attn_implementation == ATTENTION else False
        super().__init__(lm, share=share, gradient_checkpointing=config.gradient_checkpointing)
        self.config = config
        self.tokenizer = tokenizer
        self.generation_config = lm.generation_config or GenerationConfig()
        self.eos_token_ids = _eos_token_ids(lm, tokenizer)
        lm.generation_config = GenerationConfig()  # else generate() fills in what the model's own asks for, penalties and all
        self.value_head = value_head

    def forward(self, batch: RolloutBatch, *, as_tree: bool = False) -> TokenStats:
        """Return log-prob and entropy of every completion token, and its value if there is a value head.

        Args:
            batch: the rows.
            as_tree: compute each distinct prefix once; otherwise row by row.
        """
        states = self.states(batch, as_tree=as_tree)
        logprobs, entropy = self._predict(states.hidden, states.targets, batch.temperature)
        values = None if self.value_head is None else states.spread(self.value_head(states.hidden))
        return TokenStats(states.spread(logprobs), states.spread(entropy), values)

    def _predict(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies (N,) of ``targets`` (N,) given the hidden states (N, H) that predict them."""
        head: Any = self.lm.get_output_embeddings()
        base = getattr(head, "base_layer", head)  # of a head with adapters
        weight = base.weight
        if base is not head and not head.disable_adapters:
            weight = weight + head.get_delta_weight("default")
        return token_logprobs_and_entropy(hidden, targets, weight, base.bias, temperature)

    @torch.no_grad()
    def check_sharing(self) -> str | None:
        """Run a few rows both ways; where they differ, share no more and return what differed. Collective when sharded.

        A model whose layers mix tokens other than by attention, or attend in a way of their own, fails here.

        Raises:
            ConfigError: if ``share_prefixes`` is True and the model does not pass.
        """
        if self.share is False or not self.config.check_sharing:
            return None
        device = self.device
        ids = torch.arange(5 * 24).view(5, 24) * 7919 % min(self.lm.config.vocab_size, 30000)
        ids[1:, :12], ids[2:, :16] = ids[0, :12], ids[1, :16]  # a common prompt, and a branch further on
        lengths = (24, 20, 24, 23, 24)
        position = torch.arange(24)
        mask = (position >= 12) & (position < torch.tensor(lengths)[:, None])
        batch = RolloutBatch(ids, mask, torch.zeros(5, 24), lengths, temperature=1.0).to(device)
        with torch.autocast(device.type, enabled=False):
            try:
                gap = (self(batch, as_tree=True).logprobs - self(batch).logprobs).abs().max().item()
                reason = f"log-probs of the shared and the row-wise forward pass differ by up to {gap:.2g}"
            except (TypeError, RuntimeError) as error:  # the model's own code knows no such attention
                gap, reason = math.inf, str(error).splitlines()[0]
        if isinstance(self, FSDPModule):
            self.reshard()
        if gap <= (1e-2 if self.dtype == torch.float32 else 0.5):
            return None
        self.share = False
        if self.config.share_prefixes:
            raise ConfigError(f"policy.share_prefixes does not work with this model ({reason}): set it to null or false")
        return reason

    def freeze(self, dtype: torch.dtype) -> "Policy":
        """Train no more, and hold the linear layers in the dtype of the forward pass.

        These are the bits that autocast would make of them in every pass, in half the memory; the rest stays in fp32.
        """
        self.requires_grad_(False)
        head = self.lm.get_output_embeddings()
        for layer in self.lm.modules():
            if type(layer) is nn.Linear and layer is not head:  # the head may share its weight with the embedding
                layer.to(dtype)
        return self

    def without_adapters(self) -> AbstractContextManager[Any]:
        """Context in which a LoRA policy is its own frozen reference."""
        if self.config.lora is None:
            return nullcontext()
        from peft.tuners.tuners_utils import BaseTunerLayer

        return _AdaptersOff([m for m in self.lm.modules() if isinstance(m, BaseTunerLayer)])


@dataclass(frozen=True)
class PolicyWeights:
    """A policy seen from an engine; implements :class:`~rlvr_lightning.engines.WeightSource`."""

    policy: Policy
    dtype: torch.dtype

    @property
    def model_path(self) -> str:
        """Folder or hub id with config and tokenizer."""
        return self.policy.config.model_path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return self.policy.tokenizer

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion."""
        return self.policy.eos_token_ids

    @property
    def live_model(self) -> PreTrainedModel | None:
        """The learner's own causal LM; None when it is sharded."""
        sharded = any(isinstance(p, DTensor) for p in self.policy.parameters())
        return None if sharded else self.policy.lm

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full tensor) in Hugging Face naming, one at a time; collective when sharded."""
        lm = self.policy.lm
        merged = _merged_weights(lm) if self.policy.config.lora is not None else {}
        tied = set(getattr(lm, "_tied_weights_keys", None) or ()) if lm.config.tie_word_embeddings else set()
        for name, tensor in lm.state_dict().items():
            if "lora_" in name or name in tied:
                continue
            yield name.replace(".base_layer.", "."), (merged[name]() if name in merged else whole(tensor))


def _eos_token_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Union of what generation config and tokenizer call end-of-sequence, so that every engine stops at the same tokens."""
    ids = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    configured = ids if isinstance(ids, list) else [ids]
    found = {i for i in [*configured, tokenizer.eos_token_id] if i is not None}
    if not found:
        raise ConfigError("the model names no end-of-sequence token: set eos_token_id in its generation_config.json")
    return tuple(sorted(found))


def _add_adapters(lm: PreTrainedModel, lora: LoRA) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("policy.lora needs peft: pip install 'rlvr-lightning[peft]'") from error
    lm.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    try:
        inject_adapter_in_model(config, lm)
    except ValueError as error:
        raise ConfigError(f"policy.lora does not fit this model: {error}") from error


def _merged_weights(lm: PreTrainedModel) -> dict[str, Any]:
    """Map the name of each adapted weight to a function that returns weight + adapter in one piece; collective if sharded."""
    from peft.tuners.lora import LoraLayer

    def merge(layer: Any) -> Tensor:
        return whole(layer.get_base_layer().weight + layer.get_delta_weight("default"))

    layers = {n: m for n, m in lm.named_modules() if isinstance(m, LoraLayer)}
    return {f"{name}.base_layer.weight": (lambda layer=layer: merge(layer)) for name, layer in layers.items()}


class _AdaptersOff(AbstractContextManager[None]):
    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.enable_adapters(False)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            layer.enable_adapters(True)
