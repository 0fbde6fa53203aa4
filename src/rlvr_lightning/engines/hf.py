"""Sampling with ``transformers.generate``: needs nothing beyond the core, and is the oracle for the other engines."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.logits_process import LogitsProcessorList, TopPLogitsWarper

from rlvr_lightning.engines import Listener, RolloutEngine, Sampling, Sent, WeightSource, require_weights
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.records import Completion


class HFEngine(RolloutEngine):
    """Generates on the learner's own model, or on a full private copy when that model is sharded over processes.

    Args:
        dtype: compute dtype; ``auto`` takes the learner's.
        batch_size: rows per call of ``generate``.
    """

    def __init__(self, *, dtype: Literal["auto", "float32", "bfloat16"] = "auto", batch_size: int = 128) -> None:
        if batch_size < 1:
            raise ConfigError(f"rollout.engine.batch_size is {batch_size}: set it to 1 or more")
        self.version: int | None = None
        self.checksum: str | None = None
        self._dtype = dtype
        self._batch_size = batch_size
        self._model: PreTrainedModel | None = None
        self._copy: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._eos: tuple[int, ...] = ()
        self._compute_dtype = torch.float32

    def check(self) -> None:
        """Always runs: transformers is a core dependency."""

    def sync(self, weights: WeightSource, version: int, *, window: int) -> None:
        """Point at the live model, or copy the full weights when the live one is sharded (collective then)."""
        self.version = self.checksum = None
        self._model = weights.live_model or self._copy_of(weights)
        self._tokenizer, self._eos = weights.tokenizer, weights.eos_token_ids
        self._compute_dtype = weights.dtype if self._dtype == "auto" else getattr(torch, self._dtype)
        self.version = version

    def _copy_of(self, weights: WeightSource) -> PreTrainedModel:
        if self._copy is None:
            self._copy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(weights.model_path)).eval()
        copy: Any = self._copy
        sent = Sent(weights, torch.float32)
        state = dict(sent)
        missing, unexpected = copy.load_state_dict(state, strict=False)
        tied = set(getattr(copy, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise RuntimeError(f"the engine's copy and the policy differ: missing {missing}, unexpected {unexpected}")
        self.checksum = sent.checksum
        return copy.to(next(iter(state.values())).device)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        on_completion: Listener | None = None,
    ) -> list[list[Completion]]:
        """Sample with one random generator per completion, so that a seed means the same in any batch."""
        require_weights(self)
        rows = [(i, seed) for i, row in enumerate(seeds) for seed in row]
        completions: list[Completion] = []
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            finished = self._generate([prompts[i] for i, _ in batch], [seed for _, seed in batch], sampling)
            completions += finished
            if on_completion is not None:
                for (i, _), completion in zip(batch, finished, strict=True):
                    on_completion(i, completion)
        rest = iter(completions)
        return [[next(rest) for _ in row] for row in seeds]

    def _generate(self, prompts: list[Sequence[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        assert self._model is not None
        assert self._tokenizer is not None
        model: Any = self._model
        device = self._model.device
        width = max(len(p) for p in prompts)
        input_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        sampler = _SeededSampler(seeds, sampling, device)
        was_training = model.training
        model.eval()
        try:
            with self._autocast(device):
                output = model.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    logits_processor=LogitsProcessorList([sampler]),
                    # Everything explicit: a model's own generation config may ask for top-k or a repetition penalty.
                    generation_config=GenerationConfig(
                        do_sample=False,
                        max_new_tokens=sampling.max_tokens,
                        eos_token_id=list(self._eos),
                        pad_token_id=self._eos[0],
                        repetition_penalty=1.0,
                        use_cache=True,
                    ),
                )
        finally:
            model.train(was_training)
        tokens = output[:, width:].cpu().tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).cpu().tolist()
        return [self._completion(t, lp, self._tokenizer) for t, lp in zip(tokens, logprobs, strict=True)]

    def _completion(self, tokens: list[int], logprobs: list[float], tokenizer: PreTrainedTokenizerBase) -> Completion:
        """Cut a row after its first end-of-sequence token; what follows is generate()'s padding."""
        end = next((i for i, token in enumerate(tokens) if token in self._eos), None)
        length = len(tokens) if end is None else end + 1
        return Completion(
            token_ids=tuple(tokens[:length]),
            logprobs=tuple(logprobs[:length]),
            text=str(tokenizer.decode(tokens[:length], skip_special_tokens=True)),
            finish_reason="length" if end is None else "stop",
        )

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self._compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self._compute_dtype)

    def restart(self) -> None:
        """Forget the model: nothing runs here that could die alone."""
        self.close()

    def sleep(self) -> None:
        """Nothing to give back: the weights are the learner's."""

    def close(self) -> None:
        """Forget the model."""
        self._model = self._copy = None
        self.version = self.checksum = None


class _SeededSampler(LogitsProcessor):
    """Turns greedy decoding into exact sampling: argmax(log p + Gumbel noise) is a draw from p.

    Every row draws from its own generator, once per token, so neither its neighbours nor their number matter. Records the
    log-prob of each chosen token.
    """

    _nucleus: Any

    def __init__(self, seeds: list[int], sampling: Sampling, device: torch.device) -> None:
        self._temperature = sampling.temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds] if sampling.temperature > 0 else []
        self._nucleus = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self._device = device
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        log_p = torch.log_softmax(scores.float() / (self._temperature or 1.0), dim=-1)
        perturbed = log_p if self._nucleus is None else self._nucleus(input_ids, log_p)
        if self._generators:
            perturbed = perturbed + torch.stack([_gumbel(log_p.shape[-1], g) for g in self._generators]).to(self._device)
        self.logprobs.append(log_p.gather(-1, perturbed.argmax(dim=-1, keepdim=True)).squeeze(-1))
        return perturbed


def _gumbel(size: int, generator: torch.Generator) -> Tensor:
    """Return standard Gumbel noise, -log(Exponential(1)), (size,)."""
    return -torch.empty(size).exponential_(generator=generator).log()
