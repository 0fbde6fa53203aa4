"""Weights from GPU to GPU with vLLM's own transfer engines: CUDA IPC on one GPU, NCCL between several."""

import base64
import pickle
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlvr_lightning.engines import Sent
from rlvr_lightning.engines.client import Client
from rlvr_lightning.engines.transfer import rank


class _Source(WeightSource):
    """The weights of the sync under way, as vLLM asks for them."""

    def __init__(self) -> None:
        self.sent: Sent | None = None
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        if self._metadata is None:  # names and shapes stay, so one more pass is made, once
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.sent is not None
        return iter(self.sent)


class _Control:
    """What vLLM calls a weight-sync client, for several servers at once.

    Args:
        client: the servers.
        workers: GPUs of each server.
        timeout: seconds for each request.
    """

    def __init__(self, client: Client, workers: Sequence[int], timeout: float) -> None:
        self._client, self._workers, self._timeout = client, workers, timeout

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        jsons, offset = [], init_info.get("rank_offset")
        for workers in self._workers:
            jsons.append({"init_info": init_info if offset is None else {**init_info, "rank_offset": offset}})
            offset = None if offset is None else offset + workers
        self._client.gather("/init_weight_transfer_engine", jsons, timeout=self._timeout)

    def start_weight_update(self) -> None:
        self._client.call_all("/start_weight_update", {}, timeout=self._timeout)

    def update_weights(self, update_info: Any) -> None:
        if "ipc_handles" in update_info:  # no JSON: the server unpickles what its own parent sends over a private socket
            info = {key: value for key, value in update_info.items() if key != "ipc_handles"}
            handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
            update_info = {**info, "ipc_handles_pickled": handles}
        self._client.call_all("/update_weights", {"update_info": update_info}, timeout=self._timeout)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._client.call_all("/finish_weight_update", {}, timeout=self._timeout)


class DeviceTransfer:
    """Sends weights without a copy in main memory. Every rank makes one.

    Args:
        backend: ``ipc``: each rank to its own server on its own GPU; ``nccl``: rank 0 to all servers.
        client: the servers.
        workers: GPUs of each server.
        timeout: seconds for each request. NCCL itself waits as long as its own settings say.
    """

    def __init__(self, backend: Literal["ipc", "nccl"], client: Client, workers: Sequence[int], timeout: float) -> None:
        self._backend = backend
        self._control = _Control(client, workers, timeout)
        self._address = _address_towards(str(client.addresses[0])) if backend == "nccl" else ""
        self._world_size = 1 + sum(workers)
        self._source = _Source()
        self._trainer: Any = None

    def send(self, sent: Sent) -> None:
        """Send the weights to servers that have been told nothing yet. Collective."""
        self._source.sent = sent
        if self._trainer is None:
            info: TrainerInitInfo
            if self._backend == "ipc":
                info = IPCTrainerInitInfo(rank=0, packed=True)  # every rank is the sender to its own server
            else:
                port = _free_port()
                info = NCCLTrainerInitInfo(self._address, port, self._world_size, rank=rank())
            self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=self._control, source=self._source)
        self._trainer.send_weights()


def _address_towards(url: str) -> str:
    """Return this host's address on the way to a URL."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
