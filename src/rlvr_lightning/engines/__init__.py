"""The seam between the learner and whatever samples for it.

An engine holds its own idea of the policy's weights, labelled with the policy version they belong to. Weights flow in
through :meth:`RolloutEngine.sync` and completions flow out of :meth:`RolloutEngine.generate`; nothing else crosses.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.records import Completion

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    rollouts_per_problem: int = 8
    """G, the group size: completions sampled for each problem of a step."""
    temperature: float = 0.6
    """Softmax temperature; 0 is greedy decoding (evaluation only)."""
    max_tokens: int = 3072
    """Most tokens that one completion may have, the end-of-sequence token included."""
    top_p: float = 1.0
    """Nucleus mass (evaluation only: in training it would bias the ratio, since the learner knows no cut)."""

    def __post_init__(self) -> None:
        if self.rollouts_per_problem < 1:
            raise ConfigError(f"rollouts_per_problem is {self.rollouts_per_problem}: set it to 1 or more")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}: set it above 0, or to 0 for greedy evaluation")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}: set it to 1 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: set it above 0 and at most 1 (1 = no cut)")


class WeightSource(Protocol):
    """What an engine may know about the learner's policy."""

    @property
    def model_path(self) -> str:
        """Folder or hub id that holds config and tokenizer (and the weights before training)."""
        ...

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype in which the learner computes its forward pass."""
        ...

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The policy's tokenizer."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion."""
        ...

    @property
    def live_model(self) -> "PreTrainedModel | None":
        """The learner's own causal LM; None when it is sharded over processes."""
        ...

    def tensors(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield (name, full tensor) pairs with Hugging Face names, tied duplicates left out and LoRA merged.

        Collective when the policy is sharded: every rank has to exhaust the iterator.
        """
        ...


Listener = Callable[[int, Completion], None]
"""Takes (index of the prompt, completion)."""


class EngineDiedError(RuntimeError):
    """The process that samples is gone or does not answer: ``restart()``, sync and generate again."""


class ReplyError(RuntimeError):
    """A server that is alive refused a request.

    Args:
        status: of HTTP.
        text: what the server said.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status, self.text = status, text

    def __str__(self) -> str:
        return f"status {self.status}: {self.text[:2000]}"


class StaleEngineError(RuntimeError):
    """The process that samples holds other weights than those of the last sync: sync again."""


class PeerFailedError(RuntimeError):
    """The engine of another rank failed in what all ranks do together; this rank's own may be well."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from its own copy of the policy."""

    version: int | None
    """Policy version of the weights held; None = no usable weights (fresh, asleep without them, or a sync that failed)."""
    checksum: str | None
    """Of the weights last taken over, see :class:`Sent`; None = none yet, or they are the learner's own."""

    def check(self) -> None:
        """Raise :class:`ConfigError` if this engine cannot run here. Allocates nothing."""
        ...

    def sync(self, weights: WeightSource, version: int, *, window: int) -> None:
        """Take over the policy's weights; starts the engine on first use. Every rank calls it.

        Args:
            weights: the learner's weights.
            version: the policy version they belong to.
            window: most tokens (prompt + completion) of any sequence that will be asked for.

        Raises:
            EngineDiedError: if a process of its own died or stopped answering.
            PeerFailedError: if that of another rank did.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        on_completion: Listener | None = None,
    ) -> list[list[Completion]]:
        """Sample one completion for each seed of each prompt.

        Args:
            prompts: [P] token ids of each prompt.
            sampling: temperature and length.
            seeds: [P][any number] one seed per completion: the same seed and weights give the same completion.
            on_completion: called with (index of the prompt, completion) as each one is finished, in any order: it can be
                graded while others are sampled.

        Returns:
            Completions in the shape of ``seeds``; log-probs are taken at the sampling temperature (at 1 for greedy decoding).

        Raises:
            RuntimeError: if the engine holds no weights.
            EngineDiedError: if a process of its own died or stopped answering.
            StaleEngineError: if such a process holds other weights than those of the last sync.
        """
        ...

    def restart(self) -> None:
        """Bring the engine up again after an :class:`EngineDiedError`, without weights: ``version`` is None afterwards."""
        ...

    def sleep(self) -> None:
        """Give device memory back to the learner where the platform can; may set ``version`` to None."""
        ...

    def close(self) -> None:
        """End the engine and whatever it started. Idempotent."""
        ...


def require_weights(engine: RolloutEngine) -> None:
    """Raise RuntimeError unless the engine has been synced since it started or slept."""
    if engine.version is None:
        raise RuntimeError(f"{type(engine).__name__} holds no weights: call sync() before generate()")


class Sent:
    """One pass over a source's weights, in the dtype of the engine, that notes what passed.

    A tensor's note is the sum of its bits, read as 64-bit integers and taken modulo 2**64: the same on every device, it adds
    up when an engine joins tensors, and padding with zeros leaves it alone.
    """

    def __init__(self, weights: WeightSource, dtype: "torch.dtype") -> None:
        self._weights = weights
        self._dtype = dtype
        self.sums: dict[str, int] = {}

    def __iter__(self) -> "Iterator[tuple[str, torch.Tensor]]":
        for name, tensor in self._weights.tensors():
            tensor = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            self.sums[name] = sum_of_bits(tensor)
            yield name, tensor

    def pass_by(self) -> None:
        """Take part in a collective pass whose tensors another rank needs."""
        for _ in self._weights.tensors():
            pass

    @property
    def checksum(self) -> str:
        """16 hexadecimal digits that depend on every name and every bit."""
        return checksum_of(self.sums)


def sum_of_bits(tensor: "torch.Tensor") -> int:
    """Return the sum of a tensor's memory as 64-bit integers, modulo 2**64."""
    import torch

    memory = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if memory.storage_offset() % 8 or memory.data_ptr() % 8:
        memory = memory.clone()
    whole = memory.numel() // 8 * 8
    return int(memory[:whole].view(torch.int64).sum() + memory[whole:].sum()) % 2**64


def checksum_of(sums: Mapping[str, int]) -> str:
    """Return 16 hexadecimal digits for the sums of a model's tensors, in whatever order they come."""
    return hashlib.blake2b(repr(sorted(sums.items())).encode(), digest_size=8).hexdigest()


def check_arrival(sent: Mapping[str, int], held: Sequence[Mapping[str, int]], joined: Mapping[str, Sequence[str]]) -> None:
    """Compare what was sent with what the engine's workers hold now.

    Args:
        sent: sum of bits of each tensor, by its Hugging Face name.
        held: the same of each worker's parameters, as far as they keep their layout.
        joined: parts of a joint parameter, such as ``{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}``.

    Raises:
        RuntimeError: if a parameter is not what was sent.
    """
    compared, wrong = 0, []
    for name in held[0] if held else ():
        parts = next(([name.replace(key, part) for part in parts] for key, parts in joined.items() if key in name), [name])
        if not all(part in sent for part in parts):
            continue
        expected, found = sum(sent[part] for part in parts) % 2**64, [worker.get(name, 0) for worker in held]
        compared += 1
        if any(value != expected for value in found) and sum(found) % 2**64 != expected:  # on each worker, or in shares
            wrong.append(name)
    if wrong:
        raise RuntimeError(
            f"the weights did not arrive: {len(wrong)} of {compared} compared parameters differ from the learner's, first "
            f"{wrong[0]}"
        )
    if not compared:
        warnings.warn(
            "none of the engine's parameters has the name of a tensor that was sent: arrival was not verified", stacklevel=2
        )
