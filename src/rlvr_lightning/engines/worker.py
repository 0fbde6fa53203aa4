"""What runs beside the model inside vLLM, whether in the learner's process or in a server's.

A server is started with ``--worker-extension-cls rlvr_lightning.engines.worker.WeightReceiver``; the methods are then called by
name over its ``/collective_rpc``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.v1.sample import sampler

from rlvr_lightning.engines import sum_of_bits


@register_model_loader("empty")
class EmptyLoader(DummyModelLoader):
    """Leaves the weights as they were allocated: they come from the learner before anything is sampled.

    vLLM's "dummy" draws a random number for each weight, on one core: a minute per ten billion.
    """

    def load_weights(self, model: torch.nn.Module, model_config: object) -> None:
        """Do nothing."""


def no_ranks(logprobs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return zeros in place of each sampled token's rank among the vocabulary, which nobody asks for.

    vLLM's function is compiled at the first request, which takes the CPU two seconds and a C++ compiler.
    """
    return torch.zeros(len(logprobs), dtype=torch.int64)


@contextmanager
def without_ranks() -> Iterator[None]:
    """Keep vLLM on the CPU from ranking sampled tokens."""
    name = "batched_count_greater_than"
    count = getattr(sampler, name)
    if not torch.cuda.is_available():
        setattr(sampler, name, no_ranks)
    try:
        yield
    finally:
        setattr(sampler, name, count)


def repack_tied_head(model: torch.nn.Module) -> None:
    """Rebuild the CPU backend's packed copy of a head that shares the embedding's weight.

    vLLM's reload reprocesses a layer when its own weights arrive; a tied head has none of its own, so on CPU it would keep
    multiplying by the embedding it was packed from when the engine started. A no-op where nothing is packed.
    """
    head: Any = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def held_by(model: torch.nn.Module) -> dict[str, Any]:
    """Return the sum of bits of each parameter that keeps its layout, and which tensors are joined in one."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    parameters = {name: p for name, p in model.named_parameters() if p.dtype == dtype and p.numel()}
    joined: dict[str, Any] = dict(getattr(model, "packed_modules_mapping", None) or {})
    return {"sums": {name: sum_of_bits(p) for name, p in parameters.items()}, "joined": joined}


class WeightReceiver:
    """Methods that vLLM adds to its worker."""

    vllm_config: Any
    model_runner: Any
    reload_weights: Any

    def rlvr_settings(self) -> dict[str, Any]:
        """Return the settings of this server that decide whether it samples what a learner expects."""
        model, scheduler = self.vllm_config.model_config, self.vllm_config.scheduler_config
        transfer = self.vllm_config.weight_transfer_config
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            setattr(sampler, "batched_count_greater_than", no_ranks)  # noqa: B010 - typed as a compiled function
        return {
            "max_model_len": model.max_model_len,
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(model.logprobs_mode),
            "generation_config": model.generation_config,
            "max_num_seqs": scheduler.max_num_seqs,
            "chunked_prefill_on_cpu": on_cpu and scheduler.enable_chunked_prefill,
            "weight_transfer": getattr(transfer, "backend", None),
            "workers": self.vllm_config.parallel_config.world_size_across_dp,
        }

    def rlvr_load(self, folder: str) -> dict[str, Any]:
        """Load every safetensors file of a folder; return the sums of bits of what was read, by name."""
        read: dict[str, int] = {}

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for file in sorted(Path(folder).glob("*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a dict
                        tensor = opened.get_tensor(name)
                        read[name] = sum_of_bits(tensor)
                        yield name, tensor

        self.reload_weights(weights_iterator=tensors())
        repack_tied_head(self.model_runner.get_model())
        return read

    def rlvr_held(self) -> dict[str, Any]:
        """Return what the model holds now, see :func:`held_by`."""
        return held_by(self.model_runner.get_model())
