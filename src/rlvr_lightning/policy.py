"""The policy: a Hugging Face causal LM that answers one question, log-probs and entropy of the sampled tokens.

Legend: ``b`` rows, ``S`` tokens of the padded row, ``L`` prompt tokens, ``T`` completion tokens, ``H`` hidden size,
``N`` completion tokens of all rows.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlvr_lightning.batching import RolloutBatch
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.logprobs import token_logprobs_and_entropy
from rlvr_lightning.models import load_config_and_tokenizer, resolve_model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class TokenStats:
    """What the policy says about each sampled token; zeros outside the completion mask."""

    logprobs: Tensor
    """(b, S) nats, at the sampling temperature."""
    entropy: Tensor
    """(b, S) nats, exact over the vocabulary, with gradient."""


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
    share_prompts: bool | None = None
    """Run each prompt once and share its key/value cache among its completions. None: yes, except with gradient
    checkpointing, which cannot keep a cache, and under FSDP2, where all ranks have to pass the blocks equally often."""
    lora: LoRA | None = None
    """Train adapters only; None trains every weight."""

    def __post_init__(self) -> None:
        if self.share_prompts and self.gradient_checkpointing:
            raise ConfigError("policy.share_prompts and policy.gradient_checkpointing exclude each other: switch one off")

    @property
    def shares_prompts(self) -> bool:
        """``share_prompts`` with None resolved."""
        return not self.gradient_checkpointing if self.share_prompts is None else self.share_prompts

    @cached_property
    def model_path(self) -> str:
        """The folder or hub id that libraries accept."""
        return resolve_model(self.model)

    def build(self) -> "Policy":
        """Load the model on the CPU with fp32 weights.

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
        return Policy(lm, tokenizer, self)


class Policy(nn.Module):
    """A causal LM with the one forward pass that training needs."""

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.shares_prompts = config.shares_prompts
        self.tokenizer = tokenizer
        self.generation_config = lm.generation_config or GenerationConfig()
        self.eos_token_ids = _eos_token_ids(lm, tokenizer)
        lm.generation_config = GenerationConfig()  # else generate() fills in what the model's own asks for, penalties and all
        if config.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        if config.lora is not None:
            _add_adapters(lm, config.lora)
        self.lm = lm
        self.train(config.gradient_checkpointing)

    def train(self, mode: bool = True) -> "Policy":
        """Set the mode of the LM: eval unless it checkpoints, because dropout would make the ratio compare two networks."""
        super().train(mode)
        self.lm.train(mode and self.config.gradient_checkpointing)
        return self

    def forward(self, batch: RolloutBatch) -> TokenStats:
        """Return log-prob and entropy of every completion token, (b, S) each, zeros elsewhere.

        The prompt is forwarded once if all rows share it and the policy may (:attr:`PolicyConfig.shares_prompts`),
        otherwise row by row; both give the same numbers up to rounding. Padding sits on the right, where causal attention
        never looks, so no attention mask is needed.
        """
        one_prompt = len(set(batch.prompt_groups)) == 1 and len(batch) > 1
        if one_prompt and self.shares_prompts:
            hidden, targets, mask = self._forward_shared_prompt(batch)
        else:
            hidden, targets, mask = self._forward_rows(batch)
        logprobs, entropy = token_logprobs_and_entropy(hidden[mask], targets[mask], self._head, batch.temperature)
        empty = torch.zeros(batch.input_ids.shape, dtype=logprobs.dtype, device=logprobs.device)
        # Row-major order of the mask is the order of `hidden[mask]`. The sum keeps an empty mask in the graph: under
        # FSDP2 every rank has to run the backward pass.
        anchor = hidden.sum() * 0.0
        return TokenStats(
            logprobs=empty.masked_scatter(batch.completion_mask, logprobs) + anchor,
            entropy=empty.masked_scatter(batch.completion_mask, entropy),
        )

    def _head(self, hidden: Tensor) -> Tensor:
        """Return logits (n, V) for hidden states (n, H)."""
        head = self.lm.get_output_embeddings()
        assert head is not None
        return head(hidden)

    def _forward_rows(self, batch: RolloutBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states (b, S-1, H), the tokens they predict (b, S-1) and the mask of those to learn from."""
        hidden = self.lm.get_decoder()(input_ids=batch.input_ids[:, :-1], use_cache=False).last_hidden_state
        return hidden, batch.input_ids[:, 1:], batch.completion_mask[:, 1:]

    def _forward_shared_prompt(self, batch: RolloutBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states (b, T, H), the completion tokens (b, T) and their mask, with one pass over the prompt.

        The prompt's key/value cache is repeated over the rows, so autograd sums their gradients back into the one prompt.
        """
        rows, start = len(batch), batch.prompt_lengths[0]
        completions = batch.input_ids[:, start:]
        decoder = self.lm.get_decoder()
        cache = DynamicCache(config=self.lm.config)
        prompt = decoder(input_ids=batch.input_ids[:1, :start], past_key_values=cache, use_cache=True).last_hidden_state
        hidden = prompt[:, -1:].expand(rows, 1, -1)
        if completions.shape[1] > 1:  # the last token of a row predicts nothing
            cache.batch_repeat_interleave(rows)
            positions = torch.arange(start, batch.input_ids.shape[1] - 1, device=completions.device)
            rest = decoder(
                input_ids=completions[:, :-1], position_ids=positions[None], past_key_values=cache, use_cache=True
            ).last_hidden_state
            hidden = torch.cat([hidden, rest], dim=1)
        return hidden, completions, batch.completion_mask[:, start:]

    def shard(self, mesh: "DeviceMesh", param_dtype: torch.dtype | None) -> None:
        """Shard every decoder block and then the rest over ``mesh`` with FSDP2; gradients are reduced in fp32.

        Args:
            mesh: one-dimensional data-parallel mesh.
            param_dtype: dtype in which parameters are gathered and used; None keeps fp32.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if self.config.share_prompts:
            raise ConfigError("policy.share_prompts does not work with FSDP2 yet: leave it out, or set it to false")
        self.shares_prompts = False
        precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        blocks = set(self.lm._no_split_modules or [])
        for module in list(self.lm.modules()):
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh, mp_policy=precision)
        fully_shard(self, mesh=mesh, mp_policy=precision)

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
            tensor = merged[name]() if name in merged else tensor
            yield name.replace(".base_layer.", "."), (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


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
    """Map the name of each adapted weight to a function that returns weight + adapter."""
    from peft.tuners.lora import LoraLayer

    def merge(layer: Any) -> Tensor:
        return layer.get_base_layer().weight + layer.get_delta_weight("default")

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
