"""Two loggers: a plain file of metrics that is always there, and Weights & Biases that needs no account to start.

The file is the record; W&B is a mirror of it. The module logs its own step: line 5 of training describes the fifth rollout
batch, and an evaluation right after it has step 5 too; step 0 is the untrained policy.
"""

import netrc
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from rlvr_lightning.jsonl import append_lines, keep_before


class MetricsFileLogger(Logger):
    """Appends ``{"step", "time", **metrics}`` to ``<root>/metrics.jsonl`` at every log call, on rank zero.

    ``time`` is in unix seconds. A nan or an infinity is written as null. Hyper-parameters are not written.

    A resumed run repeats the steps after its checkpoint. So the first training line of a fit (one with a ``train/...``
    key) first removes what earlier runs wrote for its step and later ones. Evaluation alone removes nothing.
    """

    def __init__(self, root: str | Path) -> None:
        """Write nothing yet.

        Args:
            root: The run directory; created with the first line.
        """
        super().__init__()
        self._path = Path(root) / "metrics.jsonl"
        self._fitting = False
        self._lines_before_fit = 0

    @property
    def name(self) -> str:
        """Return ``metrics``."""
        return "metrics"

    @property
    def version(self) -> str:
        """Return the empty string: a run directory holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """Return the run directory."""
        return str(self._path.parent)

    @property
    def log_dir(self) -> str:
        """Return the run directory."""
        return self.save_dir

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is saved elsewhere, in full."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line; readers see it at once."""
        step = 0 if step is None else step
        if not self._fitting and any(key.startswith("train/") for key in metrics):
            self._fitting = True
            # An evaluation that this logger wrote just before the fit may have the same step, but is no leftover.
            keep_before(self._path, step, keep_last=self._lines_before_fit)
        self._lines_before_fit += not self._fitting
        append_lines(self._path, [{"step": step, "time": round(time.time(), 3), **metrics}])

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Drop every line whose step is greater than ``step``, and a torn last line; the rewrite is atomic."""
        keep_before(self._path, step + 1)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End a fit: the next one through this logger looks for leftovers again."""
        if self._fitting:
            self._fitting, self._lines_before_fit = False, 0


class OfflineFirstWandbLogger(WandbLogger):
    """`WandbLogger` that asks for no account: without an API key the run is recorded on disk, to upload later."""

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | Path = ".",
        version: str | None = None,
        offline: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the arguments of `WandbLogger`, in its order.

        Args:
            name: Display name of the run.
            save_dir: Where the ``wandb`` folder goes.
            version: Id of the run, to resume it.
            offline: None: offline, unless an API key is found (``WANDB_API_KEY`` or netrc) or ``WANDB_MODE`` decides.
            **kwargs: The other arguments of `WandbLogger`, and those of ``wandb.init``.
        """
        if offline is None:
            # With WANDB_MODE set, False means "leave it to wandb", which reads that variable itself.
            offline = not (os.environ.get("WANDB_MODE") or has_wandb_key())
        super().__init__(name=name, save_dir=save_dir, version=version, offline=offline, **kwargs)
        self._announced = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the W&B run, which starts here; says once where it goes."""
        run = super().experiment
        if not self._announced:
            self._announced = True
            if getattr(run, "offline", False):
                folder = Path(run.dir).parent
                print(f"W&B: recording offline; to upload, `wandb login` and then `wandb sync {folder}`", flush=True)
            elif getattr(run, "url", None):
                print(f"W&B: online at {run.url}", flush=True)
        return run


def has_wandb_key() -> bool:
    """Return whether W&B would find an API key: in ``WANDB_API_KEY``, or for its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    places = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    path = next((place for place in places if place and Path(place).is_file()), None)
    try:
        return path is not None and netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False
