"""Rollouts as a prefix tree: what several rows have in common is computed once.

All completions of a group share their prompt, groups of the same problem do too, and completions sampled at a low temperature
begin alike. A causal LM computes the same hidden states for the same prefix, so a batch of rows is a tree with one node per
distinct prefix, and the forward pass runs over the nodes instead of over rows x length. No node is padding.

The nodes stand in depth-first order. A node then sees exactly those before it whose subtree it is in, and a run of
consecutive nodes ("block") sees the ancestors of its first node and itself: attention goes block by block.

Legend: ``B`` rows, ``S`` tokens of the longest row, ``N`` nodes that predict something, ``M`` distinct sampled tokens,
``C`` nodes of a block, ``K`` keys that a block sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = {"cpu": 96, "cuda": 1024}
"""Nodes per attention block: small blocks see fewer keys in vain, large ones start fewer kernels."""


@dataclass(frozen=True)
class Block:
    """Consecutive nodes and what they attend to."""

    nodes: slice
    keys: Tensor
    """(K,) node indices: the ancestors of the first node, then the block itself."""
    mask: Tensor
    """(C, K) bool: which of them each node sees."""
    positions: Tensor
    """(K,) of the keys; the last C of them are the block's own."""

    def visible(self, window: int | None) -> Tensor:
        """Return the mask, for a sliding window of so many positions if there is one."""
        if window is None:
            return self.mask
        return self.mask & (self.positions[-len(self.mask) :, None] - self.positions < window)


@dataclass(frozen=True)
class PrefixTree:
    """The distinct prefixes of a batch of rows."""

    token_ids: Tensor
    """(N,) int64"""
    positions: Tensor
    """(N,) int64: depth, the position in every row that goes through the node."""
    blocks: tuple[Block, ...]
    parents: Tensor
    """(M,) the node whose hidden state predicts each distinct sampled token."""
    targets: Tensor
    """(M,) the sampled tokens."""
    place: Tensor
    """(number of completion tokens of all rows,) index into M, in row-major order of the completion mask."""

    @classmethod
    def of(cls, input_ids: Tensor, lengths: Sequence[int], completion_mask: Tensor) -> "PrefixTree":
        """Build the tree of the rows ``input_ids[i, :lengths[i]]`` (B, S) on their device."""
        device = input_ids.device
        ids, mask, ends = input_ids.cpu().numpy(), completion_mask.cpu().numpy(), np.asarray(lengths)
        order = lexical_order(ids, ends)
        common = np.array([0, *common_prefixes(ids, ends, order)])  # with the row before
        # Row r, in lexical order, adds one node per token after the prefix that it shares with row r - 1.
        new = ends[order] - common
        first = np.cumsum(new) - new  # the first of them
        node = np.zeros(ids.shape, dtype=np.int64)  # (B, S): node of each token
        last = np.zeros(int(new.sum()), dtype=np.int64)  # last node of each node's subtree
        previous = node[order[0]]
        for row, end, start, at in zip(order, ends[order], first, common, strict=True):
            node[row, :at] = previous[:at]
            node[row, at:end] = np.arange(start, start + end - at)
            last[node[row, :end]] = start + end - at - 1  # later rows overwrite what they go through
            previous = node[row]
        # Leaves predict nothing: only inner nodes are forwarded.
        inside = np.arange(ids.shape[1]) < ends[:, None]
        inner = np.zeros(len(last), dtype=bool)
        inner[node[:, :-1][inside[:, 1:]]] = True
        index = np.cumsum(inner) - 1  # of the inner node at or before
        depth, token = np.zeros(len(last), dtype=np.int64), np.zeros(len(last), dtype=np.int64)
        depth[node[inside]] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)[inside]
        token[node[inside]] = ids[inside]
        parent = np.zeros(len(last), dtype=np.int64)
        parent[node[:, 1:][inside[:, 1:]]] = node[:, :-1][inside[:, 1:]]
        sampled, place = np.unique(node[mask], return_inverse=True)
        kept = np.flatnonzero(inner)
        blocks = _blocks(index[last[kept]], index[parent[kept]], depth[kept], BLOCK[device.type])
        return cls(
            token_ids=torch.from_numpy(token[kept]).to(device),
            positions=torch.from_numpy(depth[kept]).to(device),
            blocks=tuple(Block(b.nodes, b.keys.to(device), b.mask.to(device), b.positions.to(device)) for b in blocks),
            parents=torch.from_numpy(index[parent[sampled]]).to(device),
            targets=torch.from_numpy(token[sampled]).to(device),
            place=torch.from_numpy(place).to(device),
        )

    def forward(self, decoder: nn.Module) -> Tensor:
        """Return the hidden states (N, H); ``decoder`` has to use the attention :data:`ATTENTION`."""
        return decoder(
            input_ids=self.token_ids[None],
            position_ids=self.positions[None],
            # Four dimensions keep transformers from making an (N, N) mask out of the repeating positions.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.token_ids.device),
            use_cache=False,
            prefix_tree=self,
        ).last_hidden_state[0]


def lexical_order(ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the row indices (B,) that sort the rows by their tokens, ties by index."""
    inside = np.arange(ids.shape[1]) < ends[:, None]
    words = np.where(inside, ids + 1, 0).astype(">u4")  # bytes compare as numbers do, a shorter row first
    return np.argsort(np.ascontiguousarray(words).view(f"S{4 * ids.shape[1]}")[:, 0], kind="stable")


def common_prefixes(ids: np.ndarray, ends: np.ndarray, order: np.ndarray) -> list[int]:
    """Return how many tokens each row has in common with the next one in ``order``, (B - 1,)."""
    found = []
    for a, b in pairwise(order):
        length = min(ends[a], ends[b])
        differ = ids[a, :length] != ids[b, :length]
        found.append(int(differ.argmax()) if differ.any() else int(length))
    return found


def _blocks(last: np.ndarray, parent: np.ndarray, depth: np.ndarray, size: int) -> list[Block]:
    """Cut N nodes into blocks, given each one's last descendant, parent and depth, (N,) each."""
    blocks = []
    for start in range(0, len(last), size):
        nodes = np.arange(start, min(start + size, len(last)))
        path = np.empty(depth[start], dtype=np.int64)
        at = start
        for i in range(len(path) - 1, -1, -1):
            at = path[i] = parent[at]
        keys = np.concatenate([path, nodes])
        mask = (keys <= nodes[:, None]) & (nodes[:, None] <= last[keys])
        blocks.append(Block(slice(start, start + len(nodes)), *(torch.from_numpy(a) for a in (keys, mask, depth[keys]))))
    return blocks


# --- attention ---------------------------------------------------------------------------------------------------------

ATTENTION = "sdpa_prefix_tree"
"""Name under which transformers finds :func:`prefix_tree_attention`."""


def prefix_tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_tree: PrefixTree | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within a prefix tree, or, without one, do what transformers does for ``sdpa``.

    Args:
        module: the attention layer.
        query: (1, heads, N, D)
        key: (1, key/value heads, N, D)
        value: (1, key/value heads, N, D)
        attention_mask: only for rows; a tree knows better.
        prefix_tree: what the N tokens are.
        sliding_window: a node sees this many positions back, itself included.
        **kwargs: ``scaling`` and ``dropout``, as transformers passes them.

    Returns:
        (1, N, heads, D), and None instead of attention weights.
    """
    if prefix_tree is None:
        kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Nodes first; rotary embeddings come in fp32 under autocast.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    attend = _attend if query.device.type != "cpu" else _AttendOnCPU.apply
    return attend(q, k, v, prefix_tree.blocks, sliding_window, scale)[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], window: int | None, scale: float) -> Tensor:
    """Return (N, heads, D) for queries (N, heads, D), keys and values (N, key/value heads, D)."""
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for block in blocks:
        keys, values = (x.index_select(0, block.keys).transpose(0, 1)[None] for x in (k, v))
        if groups > 1 and q.device.type != "cpu":  # on CUDA grouped heads with a mask fall back to the slow kernel
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        queries = q[block.nodes].transpose(0, 1)[None]
        mask = block.visible(window)
        output = nn.functional.scaled_dot_product_attention(
            queries, keys, values, mask, scale=scale, enable_gqa=keys.shape[1] != queries.shape[1]
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


class _AttendOnCPU(torch.autograd.Function):
    """:func:`_attend` with a backward pass of matrix products over all heads of a key/value head at once.

    For blocks of this size that takes two thirds of the time of the CPU kernel's own, and neither gathered keys nor
    probabilities are kept for it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], window: int | None, scale: float) -> Tensor:
        output = _attend(q, k, v, blocks, window, scale)
        ctx.save_for_backward(q, k, v, output)
        ctx.blocks, ctx.window, ctx.scale = blocks, window, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (q, k, v, output), scale = grads, ctx.saved_tensors, ctx.scale
        heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[2]
        groups = heads // kv_heads
        delta = (grad.float() * output.float()).sum(-1)  # (N, heads): sum over keys of p dp
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
        for block in ctx.blocks:
            size = block.mask.shape[0]

            def rows(x: Tensor, block: Block = block, size: int = size) -> Tensor:  # (kv_heads, groups * C, D)
                return x[block.nodes].view(size, kv_heads, groups, -1).permute(1, 2, 0, 3).flatten(1, 2)

            keys, values = (x.index_select(0, block.keys).transpose(0, 1) for x in (k, v))  # (kv_heads, K, D)
            queries, grads_out = rows(q), rows(grad)
            scores = (queries @ keys.transpose(1, 2)).float().view(kv_heads, groups, size, -1).mul_(scale)
            p = scores.masked_fill_(~block.visible(ctx.window), -torch.inf).softmax(-1).flatten(1, 2)
            dp = (grads_out @ values.transpose(1, 2)).float().sub_(rows(delta[..., None]))
            ds = dp.mul_(p).mul_(scale).to(q.dtype)
            p = p.to(q.dtype)
            dq = (ds @ keys).view(kv_heads, groups, size, width)
            grad_q[block.nodes] = dq.permute(2, 0, 1, 3).reshape(size, heads, width)
            grad_k.index_add_(0, block.keys, (ds.transpose(1, 2) @ queries).float().transpose(0, 1))
            grad_v.index_add_(0, block.keys, (p.transpose(1, 2) @ grads_out).float().transpose(0, 1))
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


AttentionInterface.register(ATTENTION, prefix_tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
