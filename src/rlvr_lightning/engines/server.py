"""Sampling with vLLM's own HTTP server: one that this process starts, or servers that run already.

A sync takes four steps, each on every rank: the servers are up; their label says "updating"; the weights go over, by files or
from GPU to GPU; what arrived is compared, the prefix cache is emptied and the label becomes ``VERSION-CHECKSUM``. Before each
generation, and in each completion, the label is compared with that of the last sync.
"""

import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch

from rlvr_lightning.engines import (
    EngineDiedError,
    Listener,
    ReplyError,
    RolloutEngine,
    Sampling,
    Sent,
    StaleEngineError,
    WeightSource,
    check_arrival,
    require_weights,
)
from rlvr_lightning.engines.process import MAX_NUM_SEQS, OwnServer, checked_settings, own_server_start
from rlvr_lightning.engines.transfer import gather, rank, send_files, together
from rlvr_lightning.engines.vllm import cache_bytes, check_installed
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.records import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlvr_lightning.engines.client import Client
    from rlvr_lightning.engines.device_transfer import DeviceTransfer

Transport = Literal["files", "ipc", "nccl"]
UPDATING = "updating"
"""Label of a server whose weights are neither the old nor the new ones."""


class VLLMServerEngine(RolloutEngine):
    """vLLM in another process: a server of its own for each rank, or servers that are given.

    Args:
        urls: servers that run already, such as ``http://127.0.0.1:8000``; None: each rank starts one on its own device.
        transport: how weights travel: ``files`` through a folder, ``ipc`` on one GPU (own server), ``nccl`` between GPUs (given
            servers); ``auto``: files on a CPU, else ipc to an own server and nccl to given ones.
        folder: where weights are written for ``files``; None: main memory, which servers on other hosts do not see.
        dtype: weights and activations; ``auto`` takes the learner's compute dtype. Given servers must have it.
        gpu_memory_utilization: share of the GPU that an own server may use; None = 0.45 (GPU only).
        kv_cache_gib: GiB for an own server's cache; None = room for 64 of the longest sequences, at most 1 (CPU only).
        max_num_seqs: most sequences that an own server decodes at the same time; None = 256.
        enforce_eager: skip CUDA graphs of an own server; None = False (GPU only; the CPU always runs eagerly).
        sleep: an own server frees weights and cache while the learner updates; None = True (GPU only).
        start_timeout: seconds until a server must be up.
        sync_timeout: seconds for each part of a sync.
        request_timeout: seconds without any finished completion after which a generation is given up.
    """

    def __init__(
        self,
        *,
        urls: list[str] | None = None,
        transport: Literal["auto", "files", "ipc", "nccl"] = "auto",
        folder: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        gpu_memory_utilization: float | None = None,
        kv_cache_gib: float | None = None,
        max_num_seqs: int | None = None,
        enforce_eager: bool | None = None,
        sleep: bool | None = None,
        start_timeout: float = 600.0,
        sync_timeout: float = 600.0,
        request_timeout: float = 1800.0,
    ) -> None:
        if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(
                f"rollout.engine.gpu_memory_utilization is {gpu_memory_utilization}: set it above 0 and at most 1"
            )
        positive = {"kv_cache_gib": kv_cache_gib, "max_num_seqs": max_num_seqs}
        deadlines = {"start_timeout": start_timeout, "sync_timeout": sync_timeout, "request_timeout": request_timeout}
        for key, value in (positive | deadlines).items():
            if value is not None and not value > 0:
                raise ConfigError(f"rollout.engine.{key} is {value}: set it above 0")
        if urls is not None and not urls:
            raise ConfigError("rollout.engine.urls is empty: name a server, or leave it out to start one")
        self.version: int | None = None
        self.checksum: str | None = None
        self._urls = urls
        self._transport: Transport | Literal["auto"] = transport
        self._folder = Path(folder) if folder is not None else None
        self._dtype = dtype
        self._own: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization, "kv_cache_gib": kv_cache_gib}
        self._own |= {"max_num_seqs": max_num_seqs, "enforce_eager": enforce_eager, "sleep": sleep}
        self._start_timeout, self._sync_timeout, self._request_timeout = start_timeout, sync_timeout, request_timeout
        self._server: OwnServer | None = None
        self._client: Client | None = None
        self._device_transfer: DeviceTransfer | None = None
        self._settings: list[dict[str, Any]] = []
        self._start: tuple[list[str], dict[str, str]] = ([], {})
        self._expected: dict[str, Any] = {}
        self._label = UPDATING
        self._asleep = False
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._eos: tuple[int, ...] = ()

    # --- before anything expensive -------------------------------------------------------------------------------------

    @property
    def transport(self) -> Transport:
        """How weights travel here."""
        if self._transport != "auto":
            return self._transport
        if not torch.cuda.is_available():
            return "files"
        return "ipc" if self._urls is None else "nccl"

    def check(self) -> None:
        """Raise ConfigError if a key has no effect here, vLLM is missing for an own server, or a given one does not answer."""
        on_gpu, own = torch.cuda.is_available(), self._urls is None
        for key, value in self._own.items():
            if value is not None and not own:
                raise ConfigError(f"rollout.engine.{key} has no effect on servers that run already: leave it or urls out")
            if value is not None and not on_gpu and key in ("gpu_memory_utilization", "enforce_eager", "sleep"):
                raise ConfigError(f"rollout.engine.{key} has no effect on a CPU: leave it out")
        if on_gpu and self._own["kv_cache_gib"] is not None:
            raise ConfigError("rollout.engine.kv_cache_gib has no effect on a GPU: set gpu_memory_utilization instead")
        if self.transport != "files" and not on_gpu:
            raise ConfigError(f"rollout.engine.transport is {self.transport} and there is no GPU: set it to files")
        if self.transport == "ipc" and not own:
            raise ConfigError(
                "rollout.engine.transport is ipc, which needs an own server: leave urls out, or take nccl or files"
            )
        if self.transport == "nccl" and own:
            raise ConfigError(
                "rollout.engine.transport is nccl, which needs a GPU for each side: give urls, or take ipc or files"
            )
        if self._folder is not None and self.transport != "files":
            raise ConfigError(f"rollout.engine.folder has no effect on transport {self.transport}: leave it out or take files")
        if self._folder is not None and not os.access(self._folder, os.W_OK):
            raise ConfigError(f"rollout.engine.folder is {self._folder}: make it a folder that this process can write to")
        if own or self.transport != "files":
            check_installed(type(self).__name__)
        for url in self._urls or ():
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(f"rollout.engine.urls holds {url!r}: write http://HOST:PORT")
            if self.transport == "files" and self._folder is None and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
                raise ConfigError(
                    f"rollout.engine.urls names {parts.hostname} and weights travel through files in this host's memory: set "
                    "rollout.engine.folder to a folder that both see"
                )
        if not own:
            client = self._open(5.0)
            try:
                client.call_all("/health", timeout=5.0)
            except RuntimeError as error:
                raise ConfigError(
                    f"rollout.engine.urls: {error}; start it as docs/engines.md says, or leave urls out"
                ) from None
            finally:
                client.close()

    # --- servers -------------------------------------------------------------------------------------------------------

    def _open(self, max_num_seqs: float) -> "Client":
        from rlvr_lightning.engines.client import Client

        assert self._urls is not None or self._server is not None
        addresses: list[str | Path] = [*(self._urls or ())] if self._server is None else [self._server.socket]
        return Client(addresses, connections=int(max_num_seqs) + 32)

    def _connect(self, weights: WeightSource, window: int) -> None:
        """Have servers that serve what is expected of them; start an own one on first use."""
        if self._client is not None:
            if window > self._expected["max_model_len"]:
                raise ConfigError(
                    f"vLLM was started for {self._expected['max_model_len']} tokens and cannot serve {window}: sync with the "
                    "largest first"
                )
            return
        dtype = weights.dtype if self._dtype == "auto" else getattr(torch, self._dtype)
        backend = None if self.transport == "files" else self.transport
        self._expected = {"max_model_len": window, "dtype": str(dtype).removeprefix("torch."), "weight_transfer": backend}
        self._tokenizer, self._eos = weights.tokenizer, weights.eos_token_ids
        if self._urls is None:
            size = int((self._own["kv_cache_gib"] or 0) * 2**30) or cache_bytes(weights, window, dtype)
            name, ipc = self._expected["dtype"], self.transport == "ipc"
            self._start = own_server_start(weights.model_path, self._own, dtype=name, window=window, cache_bytes=size, ipc=ipc)
        self._bring_up()

    def _bring_up(self) -> None:
        """Start the own server, or wait for the given ones; then compare their settings with what is expected."""
        if self._urls is None:
            self._server = OwnServer(*self._start)
        client = self._open(MAX_NUM_SEQS)
        try:
            self._wait_until_up(client)
            each = range(len(client.addresses))
            self._settings = [checked_settings(client, i, self._expected, timeout=self._sync_timeout) for i in each]
        except BaseException:
            client.close()
            if self._server is not None:
                self._server.stop()
                self._server = None
            raise
        client.connections = max(settings["max_num_seqs"] for settings in self._settings) + 32
        self._client = client

    def _wait_until_up(self, client: "Client") -> None:
        deadline = time.monotonic() + self._start_timeout
        while True:
            try:
                client.call_all("/health", timeout=min(5.0, self._start_timeout))
                return
            except RuntimeError as error:
                if self._server is not None and not self._server.alive:
                    raise EngineDiedError(f"vLLM ended before it was up; its log ends:\n{self._server.log_tail()}") from None
                if time.monotonic() > deadline:
                    log = f"; its log ends:\n{self._server.log_tail()}" if self._server is not None else ""
                    late = f"vLLM was not up within start_timeout, {self._start_timeout:g} s"
                    raise EngineDiedError(f"{late}: {error}{log}") from None
            time.sleep(0.1)

    # --- sync ----------------------------------------------------------------------------------------------------------

    def sync(self, weights: WeightSource, version: int, *, window: int) -> None:
        """Bring servers up if needed, have them load the weights, and verify that they did."""
        together(lambda: self._connect(weights, window))
        assert self._client is not None
        self.version = self.checksum = None
        drives = self._urls is None or rank() == 0
        sent = Sent(weights, getattr(torch, self._expected["dtype"]))
        try:
            together(lambda: self._begin() if drives else None)
            if self.transport == "files":
                per_host = self._urls is None and self._folder is None
                send_files(sent, self._ask if drives else None, folder=self._folder, per_host=per_host)
            else:
                self._send_from_gpu(sent)
                sent.sums = gather(sent.sums)[0]
            label = f"{version}-{sent.checksum}"
            together(lambda: self._finish(sent, label) if drives else None)
        except BaseException:
            self._device_transfer = None  # its communicator may be broken: the next sync opens another
            raise
        self._label = label
        self.version, self.checksum = version, sent.checksum

    def _ask(self, path: str, content: Any) -> list[Any]:
        """Return what all servers answer to a part of a sync; raises an EngineDiedError with its log if one is dead."""
        assert self._client is not None
        try:
            return self._client.call_all(path, content, timeout=self._sync_timeout)
        except (EngineDiedError, ReplyError) as error:
            self._explain(error)
            raise

    def _begin(self) -> None:
        if self._asleep:
            self._ask("/wake_up?tags=weights", {})
        self._ask("/update_weight_version", {"new_version": UPDATING})

    def _send_from_gpu(self, sent: Sent) -> None:
        from rlvr_lightning.engines.device_transfer import DeviceTransfer

        if self._device_transfer is None:
            assert self.transport != "files"
            assert self._client is not None
            workers = [settings["workers"] for settings in self._settings]
            self._device_transfer = DeviceTransfer(self.transport, self._client, workers, self._sync_timeout)
        self._device_transfer.send(sent, self._explain)

    def _finish(self, sent: Sent, label: str) -> None:
        for answer in self._ask("/collective_rpc", {"method": "rlvr_held"}):
            workers = answer["results"]
            check_arrival(sent.sums, [worker["sums"] for worker in workers], workers[0]["joined"])
        if self._asleep:
            self._ask("/wake_up?tags=kv_cache", {})
            self._asleep = False
        if not all(answer["success"] for answer in self._ask("/reset_prefix_cache", {})):
            raise RuntimeError("vLLM kept its prefix cache across a weight update: requests are still running")
        self._ask("/update_weight_version", {"new_version": label})

    # --- generate ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        on_completion: Listener | None = None,
    ) -> list[list[Completion]]:
        """Sample one request per completion, each with its own seed, spread over the servers."""
        require_weights(self)
        assert self._client is not None
        places = [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
        requests = [self._request(prompts[i], sampling, seeds[i][j]) for i, j in places]
        completions: dict[tuple[int, int], Completion] = {}
        try:
            for server, answer in enumerate(self._client.call_all("/weight_info", timeout=self._sync_timeout)):
                self._check_label(answer["weight_version"], f"the server at {self._client.addresses[server]}")
            answers = self._client.answers("/inference/v1/generate", requests, silence=self._request_timeout)
            with closing(answers):  # whatever happens, no request is left behind
                for number, answer in answers:
                    place = places[number]
                    completions[place] = self._completion(answer["choices"][0])
                    if on_completion is not None:
                        on_completion(place[0], completions[place])
        except (EngineDiedError, ReplyError) as error:
            self.version = None
            self._explain(error)
            raise
        return [[completions[i, j] for j in range(len(row))] for i, row in enumerate(seeds)]

    def _explain(self, error: BaseException) -> None:
        """Raise an EngineDiedError with the log's last lines if a dead server is behind an error."""
        if self._client is None or not isinstance(error, EngineDiedError | ReplyError):
            return
        try:
            self._client.call_all("/health", timeout=5.0)
        except RuntimeError:
            log = f"; its log ends:\n{self._server.log_tail()}" if self._server is not None else ""
            raise EngineDiedError(f"{error}{log}") from error

    def _request(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "max_tokens": sampling.max_tokens,
            "seed": seed if sampling.temperature > 0 else None,
            "stop_token_ids": list(self._eos),
            "logprobs": 0,
            "detokenize": False,
        }
        return {"token_ids": list(prompt), "sampling_params": parameters, "cache_salt": self._label}

    def _completion(self, choice: dict[str, Any]) -> Completion:
        assert self._tokenizer is not None
        for span in choice["weight_versions"] or ():
            self._check_label(span["version"], "the server that sampled a completion")
        return Completion(
            token_ids=tuple(choice["token_ids"]),
            logprobs=tuple(token["logprob"] for token in choice["logprobs"]["content"]),
            text=str(self._tokenizer.decode(choice["token_ids"], skip_special_tokens=True)),
            finish_reason="stop" if choice["finish_reason"] == "stop" else "length",
        )

    def _check_label(self, found: str, where: str) -> None:
        if found != self._label:
            self.version = None
            raise StaleEngineError(
                f"{where} holds weights {found!r} and not {self._label!r}, those of the last sync: it was started again, or "
                "another run uses it"
            )

    # --- the end -------------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Start the own server again, or wait for the given ones to come back."""
        self._drop()
        if self._expected:
            self._bring_up()

    def sleep(self) -> None:
        """On a GPU, have the own server discard weights and cache until the next sync."""
        if self._client is None or self._server is None or self._asleep or not torch.cuda.is_available():
            return
        if self._own["sleep"] is not False:
            self.version = None
            try:
                self._ask("/sleep?level=2", {})
            except EngineDiedError:
                return  # the next sync meets it too, and is tried again
            self._asleep = True

    def _drop(self) -> None:
        """Forget connections and end the own server."""
        self.version = self.checksum = self._device_transfer = None
        self._asleep = False
        if self._client is not None:
            self._client.close()
        if self._server is not None:
            self._server.stop()
        self._client = self._server = None

    def close(self) -> None:
        """End the own server and all that it started. Servers that were given go on."""
        self._drop()
        self._expected = {}
