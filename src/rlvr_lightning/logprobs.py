"""Token log-probs and exact entropy from hidden states, without keeping (tokens x vocabulary) for the backward pass.

Legend: ``N`` completion tokens, ``H`` hidden size, ``V`` vocabulary.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TOKENS_PER_CHUNK = 2048
"""Tokens whose logits exist at the same time: 2048 x 152k x 4 bytes = 1.2 GB."""


def token_logprobs_and_entropy(
    hidden: Float[Tensor, "N H"],
    targets: Int[Tensor, " N"],
    head: Callable[[Tensor], Tensor],
    temperature: float,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return log p(target) and the entropy of p, both in nats, where p = softmax(head(hidden) / temperature).

    Both carry gradients. Softmax runs in fp32 whatever the head computes in. More than :data:`TOKENS_PER_CHUNK` tokens are
    cut into chunks whose logits are recomputed in the backward pass; the cut does not change the result.

    Args:
        hidden: last hidden state at the position that predicts each target.
        targets: token ids.
        head: the language-model head, (n, H) -> (n, V).
        temperature: the sampling temperature, so that these are the sampler's distribution (paper's code: logits are
            divided before log-softmax and before the entropy).
    """
    if len(targets) <= TOKENS_PER_CHUNK:
        return _logprobs_and_entropy(hidden, targets, head, temperature)
    chunks = [
        checkpoint(_logprobs_and_entropy, h, t, head, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(TOKENS_PER_CHUNK), targets.split(TOKENS_PER_CHUNK), strict=True)
    ]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _logprobs_and_entropy(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), entropy
