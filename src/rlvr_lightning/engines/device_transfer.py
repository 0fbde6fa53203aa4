"""Weights from GPU to GPU with vLLM's own transfer engines: CUDA IPC on one GPU, NCCL between several."""

import base64
import ipaddress
import math
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlvr_lightning.engines import EngineDiedError, ReplyError, Sent
from rlvr_lightning.engines.client import Client
from rlvr_lightning.engines.transfer import rank, together


class _Source(WeightSource):
    """The weights of the sync under way, as vLLM asks for them."""

    def __init__(self) -> None:
        self.sent: Sent | None = None
        self._metadata: list[ParamMeta] | None = None
        self._pass: Iterator[tuple[str, torch.Tensor]] | None = None

    def metadata(self) -> list[ParamMeta]:
        if self._metadata is None:  # names and shapes stay, so one more pass is made, once
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.sent is not None
        self._pass = iter(self.sent)
        return self._pass

    def complete(self) -> None:
        """Go through what is left of the pass that was begun, or through all: it may be collective."""
        for _ in self if self._pass is None else self._pass:
            pass

    def begin(self, sent: Sent) -> None:
        """Take the weights of the next sync."""
        self.sent = sent
        self.metadata()
        self._pass = None


class _Control:
    """What vLLM calls a weight-sync client, for several servers at once.

    Args:
        client: the servers.
        workers: GPUs of each server.
        timeout: seconds for each request.
        patient: keep the first error and ask for nothing more, so that a collective pass comes to its end.
    """

    def __init__(self, client: Client, workers: Sequence[int], timeout: float, *, patient: bool) -> None:
        self._client, self._workers, self._timeout, self._patient = client, workers, timeout, patient
        self.error: Exception | None = None

    def _ask(self, path: str, contents: Sequence[Any]) -> None:
        if self.error is None:
            try:
                self._client.gather(path, contents, timeout=self._timeout)
            except (EngineDiedError, ReplyError) as error:
                if not self._patient:
                    raise
                self.error = error

    def _ask_all(self, path: str, content: Any) -> None:
        self._ask(path, [content] * len(self._workers))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        jsons, offset = [], init_info.get("rank_offset")
        for workers in self._workers:
            jsons.append({"init_info": init_info if offset is None else {**init_info, "rank_offset": offset}})
            offset = None if offset is None else offset + workers
        self._ask("/init_weight_transfer_engine", jsons)

    def start_weight_update(self) -> None:
        self._ask_all("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        if "ipc_handles" in update_info:  # no JSON: the server unpickles what its own parent sends over a private socket
            info = {key: value for key, value in update_info.items() if key != "ipc_handles"}
            handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
            update_info = {**info, "ipc_handles_pickled": handles}
        self._ask_all("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask_all("/finish_weight_update", {})


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
        # Over IPC vLLM's sender meets the other ranks at every chunk; NCCL's broadcast must not begin without its receivers.
        self._control = _Control(client, workers, timeout, patient=backend == "ipc")
        self._address = _address_towards([str(address) for address in client.addresses]) if backend == "nccl" else ""
        self._world_size = 1 + sum(workers)
        self._source = _Source()
        self._trainer: Any = None

    def send(self, sent: Sent, explain: Callable[[Exception], None]) -> None:
        """Send the weights to servers that have been told nothing yet. Collective.

        Args:
            sent: the weights; every rank goes through all of them, whatever fails.
            explain: raises a better error where it knows one.
        """
        self._source.begin(sent)

        def explained(action: Callable[[], None]) -> None:
            self._control.error = None
            try:
                action()
                if self._control.error is not None:
                    raise self._control.error
            except (EngineDiedError, ReplyError) as error:
                explain(error)
                raise

        def transfer() -> None:
            try:
                self._trainer.send_weights()
            finally:
                self._source.complete()

        if self._trainer is None:
            together(lambda: explained(self._connect))
        together(lambda: explained(transfer))

    def _connect(self) -> None:
        info: TrainerInitInfo
        if self._backend == "ipc":  # every rank is the sender to its own server
            largest = max(math.prod(p.shape) * p.dtype.itemsize for p in self._source.metadata())
            info = IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=max(2**30, largest))
        else:
            info = NCCLTrainerInitInfo(self._address, _free_port(), self._world_size, rank=rank())
        self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=self._control, source=self._source)


def _address_towards(urls: Sequence[str]) -> str:
    """Return this host's address on the way to the URLs; that of another host's, if there is one, all can reach."""
    addresses = []
    for parts in map(urlsplit, urls):
        family, kind, *_, there = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:  # connecting it sends nothing
            probe.connect(there)
            addresses.append(probe.getsockname()[0])
    return next((address for address in addresses if not ipaddress.ip_address(address).is_loopback), addresses[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
