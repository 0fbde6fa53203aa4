"""Weights through files: any device, any number of servers, as long as they see the folder."""

import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from rlvr_lightning.engines import EngineDiedError, PeerFailedError, Sent, StaleEngineError, checksum_of

T = TypeVar("T")
FILE_BYTES = 2**30
"""A file is closed once it holds so much: not all tensors have to be in memory at once."""


def gather(value: T) -> list[T]:
    """Return every rank's value, in the order of ranks. Collective."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def rank() -> int:
    """Return this process's rank, 0 without others."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def together(action: Callable[[], T]) -> list[T]:
    """Run an action on every rank and return all results. What one rank raises is raised on all: none is left waiting.

    Raises:
        PeerFailedError: if the engine of another rank failed.
    """
    result, fault = None, None
    try:
        result = action()
    except Exception as error:
        fault = error
    outcomes: list[Any] = gather((result, fault))
    if fault is not None:
        raise fault
    for number, (_, other) in enumerate(outcomes):
        if isinstance(other, EngineDiedError | StaleEngineError):
            raise PeerFailedError(f"that of rank {number}: {other}")
        if other is not None:
            raise other
    return [outcome for outcome, _ in outcomes]


def write_folder(tensors: Iterable[tuple[str, torch.Tensor]], parent: Path) -> Path:
    """Write named tensors as safetensors into a new folder, which has its final name only when it is complete."""
    final = parent / f"rlvr-weights-{uuid.uuid4().hex[:12]}"
    partial, waiting, count = None, iter(tensors), 0
    try:
        partial = Path(tempfile.mkdtemp(prefix=f"{final.name}-", suffix=".partial", dir=parent))
        while True:
            held, size = {}, 0
            for name, tensor in waiting:
                held[name] = tensor.detach().contiguous().cpu()
                size += tensor.nbytes
                if size >= FILE_BYTES:
                    break
            if not held:
                break
            save_file(held, partial / f"model-{count:05}.safetensors")
            count += 1
        return partial.rename(final)
    except BaseException:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        for _ in waiting:  # it may be collective: the other ranks wait for the rest
            pass


def weights_parent(folder: Path | None) -> Path:
    """Return where to write weights: the given folder, main memory if it can be written to, else the disk."""
    memory = Path("/dev/shm")
    return folder or (memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir()))


def send_files(sent: Sent, ask: Callable[[str, Any], list[Any]] | None, *, folder: Path | None, per_host: bool) -> None:
    """Write the weights, have the servers load them, and compare what they read with what was written. Collective.

    Args:
        sent: the weights; its sums are complete afterwards, on every rank.
        ask: sends (path, content) to the servers that this rank tells to load; None = another rank does.
        folder: where to write, None = main memory.
        per_host: the first rank of each host writes; else rank 0 alone.
    """
    hosts = gather(socket.gethostname() if per_host else "")
    writer = hosts.index(hosts[rank()])
    written: Path | None = None

    def write() -> tuple[Path | None, dict[str, int]]:
        nonlocal written
        if writer == rank():
            written = write_folder(sent, weights_parent(folder))
        else:
            sent.pass_by()
        return written, sent.sums

    def load() -> None:
        if ask is None:
            return
        answers = ask("/collective_rpc", {"method": "rlvr_load", "args": [str(path)]})
        for read in (worker for answer in answers for worker in answer["results"]):
            if read != sent.sums:
                raise RuntimeError(
                    f"a server read weights with checksum {checksum_of(read)} and {sent.checksum} was written to {path}: does "
                    "it see that folder?"
                )

    try:
        path, sent.sums = together(write)[writer]
        together(load)
    finally:
        if written is not None:
            shutil.rmtree(written, ignore_errors=True)
