"""The seam between the learner and whatever samples for it.

An engine holds its own idea of the policy's weights, labelled with the policy version they belong to. Weights flow in
through :meth:`RolloutEngine.sync` and completions flow out of :meth:`RolloutEngine.generate`; nothing else crosses.
"""

from collections.abc import Callable, Iterator, Sequence
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


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from its own copy of the policy."""

    version: int | None
    """Policy version of the weights held; None = no usable weights (fresh, or put to sleep without them)."""

    def check(self) -> None:
        """Raise :class:`ConfigError` if this engine cannot run here. Allocates nothing."""
        ...

    def sync(self, weights: WeightSource, version: int, *, window: int) -> None:
        """Take over the policy's weights; starts the engine on first use. Every rank calls it.

        Args:
            weights: the learner's weights.
            version: the policy version they belong to.
            window: most tokens (prompt + completion) of any sequence that will be asked for.
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
        """
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
