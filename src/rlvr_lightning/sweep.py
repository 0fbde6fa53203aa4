"""``rlvr sweep``: Hydra composes the files of conf/, and every job is one ``rlvr fit`` in a fresh process.

That is Hydra's whole footprint. It composes, this file saves the result as ``run.yaml``, and LightningCLI validates and builds
it exactly as it would any other configuration, so that a misspelled key fails the same way from either front end.
"""

import os
import subprocess
import sys
from importlib.resources import files as package_files
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlvr_lightning.errors import ConfigError


def conf_dir() -> Path:
    """Return the folder of configuration groups: the installed package's, or the repository's in a checkout."""
    installed = Path(str(package_files("rlvr_lightning"))) / "conf"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "conf"


def run_job(cfg: DictConfig) -> None:
    """Train with one composed configuration in a process of its own, and say where it is.

    Raises:
        ConfigError: if the job fails; its own message stands above.
    """
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    if any(o.split("=")[0].lstrip("+") == "trainer.default_root_dir" for o in job.overrides.task):
        raise ConfigError(
            "a sweep gives every job its own folder: set hydra.run.dir or hydra.sweep.dir, not trainer.default_root_dir"
        )
    OmegaConf.update(cfg, "trainer.default_root_dir", str(folder), force_add=True)
    config = folder / "run.yaml"
    OmegaConf.save(cfg, config, resolve=True)
    overrides = " ".join(job.overrides.task) or "no overrides"
    number = 0 if OmegaConf.is_missing(job.job, "num") else job.job.num  # only a multirun numbers its jobs
    print(f"job {number}: {overrides}\n       {folder}", flush=True)
    # Python finds modules in the current folder, which Hydra leaves alone: the child sees the same paths as this process.
    status = subprocess.run([sys.executable, "-m", "rlvr_lightning", "fit", "--config", str(config)], check=False).returncode
    if status:
        raise ConfigError(f"job {number} ({overrides}) ended with exit status {status}; its files are in {folder}")


def main(args: list[str]) -> int:
    """Run Hydra on the given command line (its first word is ``sweep``); return the exit status."""
    sys.argv = ["rlvr sweep", *args[1:]]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors through: the message is ours, not Hydra's page
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run_job)()
    except (HydraException, OmegaConfBaseException) as error:
        reason = "\n".join(line for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip())
        raise ConfigError(f"the configuration does not compose: {reason}") from error
    return 0
