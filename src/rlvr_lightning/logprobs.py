"""Token log-probs and exact entropy from hidden states, one tile of logits at a time.

The (tokens x vocabulary) logits never exist as a whole: the forward pass keeps running sums over tiles, the backward pass
computes every tile again. That is one matrix product more than keeping the logits takes (four instead of three), and saves
several copies of them.

Legend: ``N`` completion tokens, ``H`` hidden size, ``V`` vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_TOKENS = {"cpu": 1024, "cuda": 8192}
"""A tile has at most so many tokens."""
TILE_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""A tile has at most so many logits, of 4 bytes: few enough to stay in a CPU's cache, enough to keep a GPU busy."""


def token_logprobs_and_entropy(
    hidden: Float[Tensor, "N H"],
    targets: Int[Tensor, " N"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    temperature: float,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return log p(target) and the entropy of p, both in nats, with p = softmax((hidden @ weight.T + bias) / temperature).

    Both carry gradients. Matrix products run in the dtype of autocast where it is enabled, otherwise in that of ``hidden``;
    everything else, and so both results, is fp32 (fp64 if the products are). Tiles do not change the result beyond rounding.

    Args:
        hidden: last hidden state at the position that predicts each target.
        targets: token ids; one outside the vocabulary gives the log-prob NaN.
        weight: the language-model head; it may be frozen, or shared with the embedding.
        bias: the language-model head's, if it has one.
        temperature: the sampling temperature, so that these are the sampler's distribution (paper's code: logits are
            divided before log-softmax and before the entropy).

    Source: online softmax, Milakov and Gimelshein 2018 (arXiv:1805.02867), algorithm 3, with one more sum for the entropy.
    """
    return _TiledHead.apply(hidden, targets, weight, bias, 1 / temperature)


class _TiledHead(torch.autograd.Function):
    """Log-probs and entropy of softmax(z), z = scale * (hidden @ weight.T + bias)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # Per token, so far: the largest z, the sums of exp(z - largest) and exp(z - largest) * (z - largest), the target's z.
        state = hidden.new_zeros(4, len(hidden), dtype=torch.promote_types(dtype, torch.float32))
        state[0] = torch.finfo(state.dtype).min
        state[3] = torch.nan
        with torch.autocast(device, enabled=False):
            low = hidden.to(dtype)
            vocabulary_tiles, token_tiles = _tiles(hidden, weight)
            for vocabulary in vocabulary_tiles:
                w, b = weight[vocabulary].to(dtype), None if bias is None else bias[vocabulary]
                for tokens in token_tiles:
                    largest, total, weighted, target_z = state[:, tokens]
                    z = _scaled_logits(low[tokens], w, b, scale)
                    column, inside = _columns(targets[tokens], vocabulary)
                    target_z.copy_(torch.where(inside, z.gather(1, column).squeeze(1), target_z))
                    new_largest = torch.maximum(largest, z.amax(1))
                    shift = largest - new_largest
                    largest.copy_(new_largest)
                    exp_z = z.sub_(largest[:, None]).exp()
                    weighted.add_(shift * total).mul_(shift.exp())
                    total.mul_(shift.exp()).add_(exp_z.sum(1))
                    weighted.add_(exp_z.mul_(z).sum(1))
        largest, total, weighted, target_z = state
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(hidden, targets, weight, bias, largest + log_total, entropy)
        ctx.dtype, ctx.scale = dtype, scale
        ctx.set_materialize_grads(False)
        return target_z - largest - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Use d log p(target) / dz = onehot(target) - p and d entropy / dz = -p (log p + entropy)."""
        hidden, targets, weight, bias, lse, entropy = ctx.saved_tensors
        dtype, scale = ctx.dtype, ctx.scale
        needs_hidden, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=lse.dtype) if needs_bias else None
        # d logits = p * (constant + slope * log p) + onehot(target) * at_target
        at_target = torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs * scale
        slope = None if grad_entropy is None or not grad_entropy.any() else -scale * grad_entropy
        constant = -at_target if slope is None else slope * entropy - at_target
        with torch.autocast(hidden.device.type, enabled=False):
            low = hidden.to(dtype)
            vocabulary_tiles, token_tiles = _tiles(hidden, weight)
            for vocabulary in vocabulary_tiles:
                w, b = weight[vocabulary].to(dtype), None if bias is None else bias[vocabulary]
                grad_w = torch.zeros_like(w, dtype=lse.dtype) if grad_weight is not None else None
                for tokens in token_tiles:
                    log_p = _scaled_logits(low[tokens], w, b, scale).sub_(lse[tokens, None])
                    grad = log_p.exp()
                    if slope is None:
                        grad.mul_(constant[tokens, None])
                    else:
                        grad.mul_(log_p.mul_(slope[tokens, None]).add_(constant[tokens, None]))
                    column, inside = _columns(targets[tokens], vocabulary)
                    grad.scatter_(1, column, grad.gather(1, column) + (at_target[tokens] * inside)[:, None])
                    if grad_bias is not None:
                        grad_bias[vocabulary] += grad.sum(0)
                    grad = grad.to(dtype)
                    if grad_hidden is not None:
                        _add_product(grad_hidden[tokens], grad, w)
                    if grad_w is not None:
                        _add_product(grad_w, grad.T, low[tokens])
                if grad_weight is not None and grad_w is not None:
                    grad_weight[vocabulary] = grad_w
        return grad_hidden, None, grad_weight, grad_bias, None  # autograd casts them to their inputs' dtypes


def _tiles(hidden: Tensor, weight: Tensor) -> tuple[list[slice], list[slice]]:
    """Return the slices of the vocabulary and those of the tokens."""
    device = "cpu" if hidden.device.type == "cpu" else "cuda"
    tokens = max(1, min(TILE_TOKENS[device], len(hidden)))
    return _slices(len(weight), max(1, TILE_LOGITS[device] // tokens)), _slices(len(hidden), tokens)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.mul_(scale) if bias is None else logits.add_(bias).mul_(scale)


def _columns(targets: Tensor, vocabulary: slice) -> tuple[Tensor, Tensor]:
    """Return each target's column in the tile (n, 1), any for a target elsewhere, and whether it is in the tile (n,)."""
    column = targets - vocabulary.start
    last = vocabulary.stop - vocabulary.start - 1
    return column.clamp(0, last)[:, None], (column >= 0) & (column <= last)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total`` in place, which may be of higher precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
