"""What policy and critic have in common: a decoder that gives every sampled token the hidden state it was chosen in.

Legend: ``b`` rows, ``S`` tokens of the padded row, ``N`` distinct predictions, ``H`` hidden size, ``V`` vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlvr_lightning.batching import Costs, RolloutBatch
from rlvr_lightning.prefix_tree import PrefixTree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class States:
    """Where the sampled tokens of a batch were chosen: each distinct (prefix, token) once."""

    hidden: Tensor
    """(N, H) final hidden state of the position before the token."""
    targets: Tensor
    """(N,) the token."""
    mask: Tensor
    """(b, S) bool: completion tokens."""
    place: Tensor | None = None
    """(tokens of the mask,) their index into N, in row-major order; None: they are the same, one by one."""

    def spread(self, numbers: Tensor) -> Tensor:
        """Return a number per prediction, (N,), as one per token, (b, S); zeros outside the mask."""
        tokens = numbers if self.place is None else take(numbers, self.place)
        # The sum keeps an empty mask in the graph: under FSDP2 every rank has to run the backward pass.
        empty = torch.zeros(self.mask.shape, dtype=tokens.dtype, device=tokens.device)
        return empty.masked_scatter(self.mask, tokens) + tokens.sum() * 0.0


def take(values: Tensor, index: Tensor) -> Tensor:
    """Return ``values[index]``; the backward pass adds up the gradients of a repeated row in the same order each time."""
    return values.index_select(0, index) if values.device.type == "cpu" else values[index]


class Backbone(nn.Module):
    """A Hugging Face decoder with the one forward pass that training needs, by rows or as a prefix tree.

    Args:
        lm: a causal LM, or its decoder alone.
        share: compute common prefixes once: always, never, or (None) where that is expected to be faster.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    def __init__(self, lm: PreTrainedModel, *, share: bool | None, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.share = share
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.lm = lm
        self.train(gradient_checkpointing)

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode of the LM: eval unless it checkpoints, because dropout would make the ratio compare two networks."""
        super().train(mode)
        self.lm.train(mode and self.gradient_checkpointing)
        return self

    def states(self, batch: RolloutBatch, *, as_tree: bool) -> States:
        """Return the hidden states in which the completion tokens were chosen.

        Both ways give the same numbers up to rounding, and pass every decoder block once, as FSDP2 needs it.

        Args:
            batch: the rows.
            as_tree: compute each distinct prefix once; otherwise row by row.
        """
        decoder = self.lm.get_decoder()
        if as_tree:
            tree = PrefixTree.of(batch.input_ids, batch.lengths, batch.completion_mask)
            return States(take(tree.forward(decoder), tree.parents), tree.targets, batch.completion_mask, tree.place)
        # Padding sits on the right, where causal attention never looks, so no attention mask is needed.
        hidden = decoder(input_ids=batch.input_ids[:, :-1], use_cache=False).last_hidden_state
        mask = batch.completion_mask[:, 1:]
        return States(hidden[mask], batch.input_ids[:, 1:][mask], batch.completion_mask)

    @property
    def costs(self) -> Costs:
        """What this model's passes cost, for :func:`~rlvr_lightning.batching.plan_micro_batches`."""
        config = self.lm.config
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        head = config.vocab_size * config.hidden_size
        linear = sum(p.numel() for p in self.lm.get_decoder().parameters()) - head
        # 2 flops per weight and token; 4 per query, key and channel, at about a third of the speed of a matrix product
        return Costs(pair=3 * 4 * layers * heads * head_dim / (2 * linear), prediction=head / linear)

    @property
    def device(self) -> torch.device:
        """Where the passes run: with CPU offload not where the weights are."""
        weight = next(self.parameters())
        return torch.device(weight.device_mesh.device_type) if isinstance(weight, DTensor) else weight.device

    def shard(self, mesh: "DeviceMesh", param_dtype: torch.dtype | None, *, offload: bool = False) -> None:
        """Shard every decoder block and then the rest over ``mesh`` with FSDP2; gradients are reduced in fp32.

        Args:
            mesh: one-dimensional data-parallel mesh.
            param_dtype: dtype in which parameters are gathered and used; None keeps fp32.
            offload: hold parameters and gradients in main memory; a block's come to the device for its pass.
        """
        self.dtype = param_dtype or torch.float32
        precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
        blocks = set(self.lm._no_split_modules or [])
        for module in list(self.lm.modules()):
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=place)
        fully_shard(self, mesh=mesh, mp_policy=precision, offload_policy=place)


class ValueHead(nn.Module):
    """One number per hidden state: the return that the critic expects from there.

    Args:
        hidden_size: H.
        std: standard deviation of its random weights; 0 begins with the value 0 everywhere.
    """

    def __init__(self, hidden_size: int, std: float) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the value (N,) of each hidden state (N, H), in fp32 whatever the autocast."""
        head: Any = self.linear
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float())[:, 0]
