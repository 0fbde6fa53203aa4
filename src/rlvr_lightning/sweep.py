"""``rlvr sweep``: Hydra composes the files of conf/, and every job is one ``rlvr fit`` in a fresh process.

That is Hydra's whole footprint. It composes, this file saves the result as ``run.yaml``, and LightningCLI validates and builds
it exactly as it would any other configuration, so that a misspelled key fails the same way from either front end.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.sweep_report import Job, last_value, read_jobs, report

TRAINING_METRICS = ("rollout", "train", "critic", "mismatch", "time", "memory")
"""What the keys begin with that a run logs at every step."""


def conf_dir() -> Path:
    """Return the folder of configuration groups: the installed package's, or the repository's in a checkout."""
    installed = Path(str(package_files("rlvr_lightning"))) / "conf"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "conf"


def run_job(cfg: DictConfig) -> float:
    """Train with one composed configuration in a process of its own, and say where it is.

    Returns:
        The last value of the metric named by ``optimize``, for sweepers that search; NaN without one, or if the job failed.

    Raises:
        ConfigError: if the only job fails; its own message stands above. A failed job of several is reported at the end.
    """
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    overrides = dict(o.lstrip("+").split("=", 1) for o in job.overrides.task if "=" in o)
    if "trainer.default_root_dir" in overrides:
        raise ConfigError(
            "a sweep gives every job its own folder: set hydra.run.dir or hydra.sweep.dir, not trainer.default_root_dir"
        )
    OmegaConf.set_struct(cfg, False)
    optimize = cfg.pop("optimize", None)
    if optimize is not None:
        check_metric(str(optimize), [str(name) for name in OmegaConf.select(cfg, "data.init_args.evals") or ()])
    cfg.trainer.default_root_dir = str(folder)
    config = folder / "run.yaml"
    OmegaConf.save(cfg, config, resolve=True)
    shown = " ".join(job.overrides.task) or "no overrides"
    several = job.mode == RunMode.MULTIRUN
    number = int(job.job.num) if several else 0
    print(f"job {number}: {shown}\n       {folder}", flush=True)
    # Python finds modules in the current folder, which Hydra leaves alone: the child sees the same paths as this process.
    status = subprocess.run([sys.executable, "-m", "rlvr_lightning", "fit", "--config", str(config)], check=False).returncode
    if status and not several:
        raise ConfigError(f"job {number} ({shown}) ended with exit status {status}; its files are in {folder}")
    if status in (130, 143):  # the run was asked to stop and saved itself: the sweep was meant too
        raise KeyboardInterrupt
    Job(folder, number, overrides, status).save()
    value = None if optimize is None or status else last_value(folder, optimize)
    if optimize is not None and value is None and not status:
        raise ConfigError(f"optimize is {optimize!r}, which the run did not log: see docs/metrics.md for the keys")
    return float("nan") if value is None else value


def check_metric(key: str, evals: Sequence[str]) -> None:
    """Raise ConfigError for a metric that no run with these evaluation sets logs, before it has run for nothing."""
    stage, _, rest = key.partition("/")
    if stage == "val" and rest.partition("/")[0] not in evals:
        raise ConfigError(f"optimize is {key!r}, and the evaluation sets are {', '.join(evals) or 'none'}: name one of them")
    if stage not in ("val", *TRAINING_METRICS) or not rest:
        parts = ", ".join(f"{part}/..." for part in TRAINING_METRICS)
        raise ConfigError(f"optimize is {key!r}: name a metric of docs/metrics.md, that is val/<set>/<metric>, {parts}")


class SweepReport(Callback):
    """Ends a multirun with a table and a figure over its jobs."""

    failed = False
    """Whether a job of the last multirun of this process failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read what the jobs left; every launcher leaves the same files."""
        folder = Path(config.hydra.sweep.dir)
        SweepReport.failed = any(job.status for job in read_jobs(folder))
        print(f"\n{report(folder)}", flush=True)


def main(args: list[str]) -> int:
    """Run Hydra on the given command line (its first word is ``sweep``); return the exit status.

    Returns:
        0, or 1 if a job of several failed.
    """
    sys.argv = ["rlvr sweep", *args[1:]]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors through: the message is ours, not Hydra's page
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run_job)()
    except (HydraException, OmegaConfBaseException) as error:
        reason = "\n".join(line for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip())
        raise ConfigError(f"the configuration does not compose: {reason}") from error
    return int(SweepReport.failed)
