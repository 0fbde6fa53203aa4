"""FSDP2 as this project uses it."""

import ctypes
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from rlvr_lightning.checkpoints import (
    META,
    check_fits,
    check_shards,
    discard,
    explained,
    publish,
    scratch_of,
    shapes_of_shards,
    sync_to_disk,
)
from rlvr_lightning.errors import ConfigError

_M_MMAP_THRESHOLD = -3  # malloc.h


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy with all processes in data parallel and none in tensor parallel.

    ``ModelParallelStrategy`` wants the data-parallel size as a number, and its ``auto`` means one tensor-parallel group per
    node; this takes the world size when it is known.

    Args:
        save_distributed_checkpoint: write one shard per rank (True) or one consolidated file. Shards of several machines need
            a folder that all of them see.
        timeout_s: seconds after which a rank that waits for another gives up.
        offload: keep weights, gradients and optimizer states of what trains in main memory; a block's weights come to the
            device for its pass, and the optimizer runs on the CPU.
    """

    def __init__(self, *, save_distributed_checkpoint: bool = True, timeout_s: int = 1800, offload: bool = False) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(seconds=timeout_s),
        )
        self.timeout_s = timeout_s
        self.offload = offload
        self._places: list[tuple[str, int]] = []

    def setup_environment(self) -> None:
        """Set the data-parallel size before the device mesh is built from it; note where every rank runs."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self.offload and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # the gradient norm is that of tensors in main memory
        _return_large_blocks()
        super().setup_environment()
        places: list[Any] = [None] * self.world_size
        dist.all_gather_object(places, (socket.gethostname(), os.getpid()))
        self._places = places

    def model_to_device(self) -> None:
        """Move the model, unless FSDP2 is to fetch it piece by piece."""
        if not self.offload:
            return super().model_to_device()
        assert self.model is not None
        for child in self.model.children():
            if not isinstance(child, FSDPModule):
                child.to(self.root_device)

    # --- checkpoints: one file is what a single process would write ----------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights: this rank's shards, or, for one file, all of them on rank 0. Collective."""
        if self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return self._gather(self.model.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state, as :meth:`lightning_module_state_dict` does the weights. Collective."""
        return super().optimizer_state(optimizer) if self._save_distributed_checkpoint else self._gather(optimizer.state_dict())

    def _gather(self, state: dict[str, Any]) -> dict[str, Any]:
        def on_rank_zero(tensor: DTensor) -> Tensor | None:
            full = whole(tensor)
            return full.cpu() if self.is_global_zero else None

        with torch.no_grad():
            return apply_to_collection(state, DTensor, on_rank_zero)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint under another name, then give it its own. Collective.

        Raises:
            ConfigError: on every rank, if any of them could not write.
        """
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            with self._all_or_none():
                if self.is_global_zero:
                    self.checkpoint_io.save_checkpoint(checkpoint, path)
            return
        scratch = scratch_of(path)
        with self._all_or_none():
            if self.is_global_zero:
                with explained(path):
                    discard(scratch)
                    scratch.mkdir(parents=True)
        with self._all_or_none(), explained(path):
            super().save_checkpoint(checkpoint, scratch)
        with self._all_or_none():
            if self.is_global_zero:
                with explained(path):
                    check_shards(scratch)
                    with (scratch / META).open("rb+") as file:
                        sync_to_disk(file)  # torch has seen to the shards
                    publish(scratch, path)

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Raise on every rank what one of them raised: the others would wait for it at the next collective call."""
        failure = None
        try:
            yield
        except ConfigError as error:
            failure = str(error)
        failures: list[str | None] = [None] * self.world_size
        dist.all_gather_object(failures, failure)
        if any(failures):
            raise ConfigError(next(text for text in failures if text))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer states, whatever number of processes wrote them; return the rest. Collective.

        Raises:
            ConfigError: if the weights are those of another model.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if path.is_dir():
            check_fits(shapes_of_shards(path), self.model, path)
            return super().load_checkpoint(path, weights_only)
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        weights, own = checkpoint.pop("state_dict"), self.model.state_dict()
        check_fits({name: tensor.shape for name, tensor in weights.items()}, self.model, path)
        self.model.load_state_dict({name: shard_like(weights[name], tensor) for name, tensor in own.items()})
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states"), strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                number: {key: shard_like(value, parameters[number]) for key, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": moments})
        return checkpoint

    # --- when a rank is gone -------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Add to the error of a broken connection which process is missing, as far as this machine can tell."""
        super().on_exception(exception)
        if isinstance(exception, ConfigError | KeyboardInterrupt) or self.world_size == 1:
            return
        words = ("connection", "timed out", "timeout", "gloo", "nccl", "socket", "peer")
        lost = isinstance(exception, RuntimeError) and any(word in str(exception).lower() for word in words)
        if missing := self._missing(patience_s=3.0 if lost else 0.0):
            exception.add_note("\n".join(f"{who} is gone; its own output says why" for who in missing))
        elif lost:
            here = socket.gethostname()
            elsewhere = sorted({host for host, _ in self._places} - {here})
            others = f", or a rank on {', '.join(elsewhere)} is gone" if elsewhere else ""
            exception.add_note(
                f"every rank on {here} is there: one is stuck or has given up before (the limit is "
                f"strategy.timeout_s={self.timeout_s}){others}"
            )

    def _missing(self, *, patience_s: float) -> list[str]:
        """Return the ranks of this machine whose process has ended; a process closes its connections before it has."""
        deadline = time.monotonic() + patience_s
        here = socket.gethostname()
        while True:
            gone = [
                f"rank {rank} (process {pid} on {host})"
                for rank, (host, pid) in enumerate(self._places)
                if host == here and not _runs(pid)
            ]
            if gone or time.monotonic() > deadline:
                return gone
            time.sleep(0.1)


def _return_large_blocks() -> None:
    """Let the C library hand every freed block of a megabyte back: by its own rule it keeps most of what FSDP2 has gathered."""
    with suppress(OSError, AttributeError):  # mallopt is glibc's
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece, on the device of the passes; collective if it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    shards: Any = tensor.to(tensor.device_mesh.device_type)  # from main memory, with CPU offload
    return shards.full_tensor()


def shard_like(value: Any, like: Tensor) -> Any:
    """Return this rank's part of a full tensor, cut as ``like`` is; anything of another shape as it is."""
    if not (isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to(like.device)
