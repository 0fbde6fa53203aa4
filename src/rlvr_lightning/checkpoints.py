"""Checkpoints on the disk, which any number of processes can write and read.

A checkpoint is one file, or a folder with a shard per rank. Either is written under another name first: what bears the name of
a checkpoint is complete.
"""

import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from rlvr_lightning.errors import ConfigError

META = "meta.pt"
"""In a folder of shards: everything but weights and optimizer states."""


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads files and folders of shards alike.

    Args:
        optimizers: read their states too; evaluation has no use for them.
    """

    def __init__(self, *, optimizers: bool = True) -> None:
        self.optimizers = optimizers

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one file.

        Raises:
            ConfigError: if the disk is full, or the place cannot be written to.
        """
        # A file opened here: torch's own writer would not say why it failed.
        with written_whole(Path(path)) as scratch, scratch.open("wb") as file:
            torch.save(checkpoint, file)
            sync_to_disk(file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Return a checkpoint as one process writes it, from a file or a folder."""
        if not Path(path).is_dir():
            return super().load_checkpoint(path, map_location, weights_only)
        return read_shards(Path(path), optimizers=self.optimizers)


# --- files and folders -------------------------------------------------------------------------------------------------


def scratch_of(path: Path) -> Path:
    """Return the name under which ``path`` is written."""
    return path.with_name(f".{path.name}.partial")


def discard(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_to_disk(file: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def publish(scratch: Path, path: Path) -> None:
    """Give what is complete its name. A folder in the way is moved aside first, because rename replaces files only."""
    aside = path.with_name(f".{path.name}.old")
    discard(aside)
    if path.is_dir() or (path.exists() and scratch.is_dir()):
        path.rename(aside)
    scratch.replace(path)
    discard(aside)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failure to write ``path`` into one sentence, and delete what was written of it.

    Raises:
        ConfigError: instead of the error of the operating system.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # else torch's report of a full disk
            raise
        # torch's report of the shards holds the error of each rank
        causes = [cause for cause, *_ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        cause = next((c for c in causes if isinstance(c, OSError)), causes[0])
        with suppress(OSError):
            discard(scratch_of(path))
        raise cannot_write(path, getattr(cause, "strerror", None) or str(cause).splitlines()[0]) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Lend another name to write a file under; at the end it becomes ``path``, or vanishes if writing failed.

    Raises:
        ConfigError: if writing failed.
    """
    scratch = scratch_of(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        discard(scratch)
        yield scratch
        publish(scratch, path)


def cannot_write(path: Path, reason: str) -> ConfigError:
    """Return the error of a checkpoint or export that could not be written."""
    place = next((p for p in path.parents if p.is_dir()), Path("/"))
    free = shutil.disk_usage(place).free / 2**30
    return ConfigError(
        f"cannot write {path}: {reason} ({free:.2f} GiB are free there); what was saved before is intact: free space, or set "
        "trainer.default_root_dir to a disk with more, and go on from the latest checkpoint with --ckpt_path"
    )


# --- what a checkpoint holds -------------------------------------------------------------------------------------------


def check_checkpoint(path: str) -> None:
    """Raise ConfigError unless ``path`` looks like a checkpoint of this project: a file, or a folder of shards.

    Reads a few bytes, not the weights.
    """
    place = Path(path)
    if not place.exists():
        raise ConfigError(f"checkpoint {path!r} does not exist: give --ckpt_path a file or folder under <run>/checkpoints")
    complete = (place / META).is_file() if place.is_dir() else zipfile.is_zipfile(place)
    if not complete:
        raise ConfigError(f"checkpoint {path!r} cannot be read: it is no checkpoint, or was cut off while being written")


def check_shards(folder: Path) -> None:
    """Raise ConfigError unless every shard that the ranks have written is in this folder.

    Without a folder that all machines see, each holds its own shards and none a checkpoint.
    """
    files = {place.relative_path for place in FileSystemReader(folder).read_metadata().storage_data.values()}
    if missing := sorted(name for name in files if not (folder / name).is_file()):
        discard(folder)
        raise ConfigError(
            f"{len(missing)} of {len(files)} shards of the checkpoint are not in {folder.parent} ({missing[0]}): set "
            "trainer.default_root_dir to a folder that all machines share, or strategy.save_distributed_checkpoint to false"
        )


def shapes_of_shards(folder: Path) -> dict[str, torch.Size]:
    """Return name and shape of each weight in a folder of shards."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    start = "state_dict."
    return {
        k.removeprefix(start): v.size
        for k, v in entries.items()
        if k.startswith(start) and isinstance(v, TensorStorageMetadata)
    }


def read_shards(folder: Path, *, optimizers: bool) -> dict[str, Any]:
    """Return a folder of shards as the checkpoint of one process, in main memory.

    Args:
        folder: the checkpoint.
        optimizers: with their states, which are twice as large as the weights.
    """
    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys=None if optimizers else {"state_dict"})
    _load_state_dict(state, storage_reader=FileSystemReader(folder), planner=planner, no_dist=True)
    checkpoint = torch.load(folder / META, weights_only=True)
    names = sorted(name for name in state if name.startswith("optimizer_"))
    checkpoint["state_dict"] = state["state_dict"]
    checkpoint["optimizer_states"] = [_numbered(state[name]) for name in names]
    return checkpoint


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with numbers in place of names, as the optimizer itself counts its parameters."""
    number = {name: n for n, name in enumerate(name for group in state["param_groups"] for name in group["params"])}
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [group | {"params": [number[name] for name in group["params"]]} for group in state["param_groups"]],
    }


def check_fits(saved: Mapping[str, torch.Size], model: nn.Module, path: Path | str) -> None:
    """Raise ConfigError unless the checkpoint holds every weight of the model in its shape, and no others of the policy."""
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(own.keys() | saved.keys()):
        if own.get(name) == saved.get(name) or (name.startswith("critic.") and name not in own):
            continue
        here, there = (tuple(shapes[name]) if name in shapes else "not there" for shapes in (own, saved))
        raise ConfigError(
            f"checkpoint {path} is of another model: {name} is {here} in this run and {there} in the checkpoint; set "
            "policy.model, policy.lora and model.critic as in the run.yaml that it was written with"
        )
