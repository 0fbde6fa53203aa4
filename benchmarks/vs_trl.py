r"""Time one training step of the quickstart beside TRL's GRPOTrainer, and compare their peak memory.

    python benchmarks/vs_trl.py [--steps 5] [--engine vllm] [--json]

Both train SmolLM2-135M-Instruct on the quickstart's one problem: the same prompt tokens, 8 groups of 8 rollouts, T = 0.8, at
most 48 tokens, the same grader, objective coefficients, learning rate and clipping, fp32 weights under bf16 autocast, one
update per step. What the quickstart's configuration says is what TRL is told. Ours is ``rlvr fit`` on that configuration
without evaluation.

Each trainer is a process of its own. They take turns, step by step, so that both meet the same noise of the machine: a worker
waits for ``go`` before every step, and its clock stands still while it waits. The first step of each is a warm-up (in ours the
engine starts in it). Memory is the process's high-water mark over the whole run, engine included.

TRL gets an environment of its own in the cache folder, made on the first run from benchmarks/trl-requirements.txt;
``--trl-python`` takes an existing one. There it samples with transformers.generate, also on a GPU, where its users would take
vLLM.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "benchmarks" / "trl-requirements.txt"
TRL_BATCHES = {"cpu": 16, "cuda": 64}
"""Rows of one forward pass in TRL; gradients accumulate up to the 64 of a step. On two CPU cores 16 rows without checkpointing
were as fast as 64 rows with it, faster than 64 without, and took the least memory; fp32 without autocast was no faster."""
DIFFERENCES = (
    "TRL samples with transformers.generate, ours with the engine named by --engine",
    "TRL's learning rate is 0 in its first update, ours a tenth of the full one: both warm up over 10",
    "TRL does not decay norm weights",
    "TRL writes no rollouts and no checkpoint; ours writes transcripts, metrics and history in every step",
)


# --- the worker's end -----------------------------------------------------------------------------------------------------


class Gate:
    """What a trainer's process says and when it may go on: JSON lines out, ``go`` lines in.

    Whatever else the process prints goes to stderr. End of input ends the process.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._started: float | None = None
        self._notes: dict[str, float] = {}
        self.step = 0

    def emit(self, **record: Any) -> None:
        """Send one record, with the process's peak memory so far."""
        print(json.dumps(record | {"step": self.step, "peak_gib": peak_gib()}), file=self._out)

    def wait(self) -> None:
        """End the step in progress, if any, and begin the next one when told to."""
        self.finish()
        self.emit(kind="waiting")
        if sys.stdin.readline() != "go\n":
            os._exit(0)
        self._started = time.perf_counter()

    def note(self, **values: float) -> None:
        """Add what this step did to its record."""
        self._notes |= values

    def finish(self) -> None:
        """Send the seconds of the step in progress, if any: what follows is not part of it."""
        if self._started is None:
            return
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.step += 1
        self.emit(kind="step", seconds=time.perf_counter() - self._started, **self._notes)
        self._started = None


def peak_gib() -> dict[str, float]:
    """Return this process's high-water marks: ``host`` (VmHWM), and ``gpu`` (torch's reserved memory) where there is one."""
    kib = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert kib is not None
    peaks = {"host": int(kib[1]) / 2**20}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_reserved() / 2**30
    return peaks


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of ``packages``, without those that are not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- the controller's end -------------------------------------------------------------------------------------------------


class TrainerProcess:
    """One trainer's process. It runs only inside :meth:`start` and :meth:`advance`.

    Args:
        name: ``ours`` or ``trl``.
        command: what starts it.
        out: folder for its log, and for ``progress.jsonl`` with every record of every trainer.
    """

    def __init__(self, name: str, command: Sequence[str | Path], out: Path) -> None:
        self.name = name
        self.records: list[dict[str, Any]] = []
        self.running = False
        self.startup_s = 0.0
        self._command = list(command)
        self._log = out / f"{name}.log"
        self._progress = out / "progress.jsonl"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process and wait until it is ready for its first step."""
        started = time.perf_counter()
        # TRL's environment imports the grader from the source folder.
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.running = True
        self._read()
        self.startup_s = time.perf_counter() - started

    def advance(self) -> None:
        """Let the process take one step, and the evaluation after it if one is due."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._read()

    def stop(self) -> None:
        """End the process where it waits."""
        self.running = False
        if self._process is not None:
            self._process.communicate()

    def _read(self) -> None:
        """Take records until the process waits or has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            record = json.loads(line)
            self.records.append(record)
            with self._progress.open("a") as file:
                file.write(json.dumps({"trainer": self.name} | record) + "\n")
            if record["kind"] in ("step", "evaluation"):
                values = {key: value for key, value in record.items() if key not in ("kind", "step", "peak_gib")}
                print(f"{self.name:>4} {record['kind']} {record['step']:3d}:", _line(values), file=sys.stderr, flush=True)
            if record["kind"] == "waiting":
                return
        self.running = False
        if self._process.wait() or self.records[-1:] == [] or self.records[-1]["kind"] != "end":
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise SystemExit(f"{self.name} ended with status {self._process.returncode}; {self._log} ends with\n{tail}")

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of one kind: ``about``, ``step``, ``evaluation``, ``end``."""
        return [record for record in self.records if record["kind"] == kind]


def _line(values: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in values.items())


def take_turns(trainers: Sequence[TrainerProcess], done: Callable[[TrainerProcess], bool] = lambda _: False) -> None:
    """Start each trainer and run them step by step in turn, until each has ended or is ``done``."""
    try:
        for trainer in trainers:
            print(f"starting {trainer.name}", file=sys.stderr, flush=True)
            trainer.start()
        while any(trainer.running for trainer in trainers):
            for trainer in trainers:
                if trainer.running and done(trainer):
                    trainer.stop()
                elif trainer.running:
                    trainer.advance()
    finally:
        for trainer in trainers:
            trainer.stop()


def summarize_steps(trainer: TrainerProcess) -> dict[str, Any]:
    """Return what one trainer's steps took; medians leave out the first step."""
    steps = trainer.of("step")
    rest = steps[1:]
    return {
        "step_s": statistics.median(step["seconds"] for step in rest),
        "steps_s": [step["seconds"] for step in steps],
        "tokens_per_step": statistics.median(step["tokens"] for step in rest),
        "reward": [step["reward"] for step in steps],
        "startup_s": trainer.startup_s,
        "peak_gib": trainer.records[-1]["peak_gib"],
        **{key: value for record in trainer.of("about") for key, value in record.items() if key in ("versions", "settings")},
    }


def compare_steps(ours: dict[str, Any], trl: dict[str, Any]) -> dict[str, float]:
    """Return how many times faster ours is, and its peak memory as a share of TRL's (of the GPU's, where there is one)."""
    where = "gpu" if "gpu" in ours["peak_gib"] else "host"
    return {
        "speedup": trl["step_s"] / ours["step_s"],
        "peak_memory_ratio": ours["peak_gib"][where] / trl["peak_gib"][where],
    }


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    import torch

    name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name[1] if name else platform.processor(), "cores": len(os.sched_getaffinity(0)), "gpu": gpu}


# --- one configuration for both -------------------------------------------------------------------------------------------


def compose(out: Path, steps: int, engine: str, *, seed: int = 0, evaluate_every: int = 0) -> Any:
    """Return the quickstart's configuration; ``evaluate_every`` 0 evaluates nothing, else the 80 sums every so many steps."""
    import torch
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from rlvr_lightning.sweep import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = hydra_compose("config", ["experiment=quickstart", f"rollout={engine}"])
    cfg.seed_everything = seed
    cfg.evaluate_first = False
    cfg.data.init_args.evals = {"addition_1digit": "builtin:addition_1digit"} if evaluate_every else {}
    cfg.trainer.max_steps = steps
    cfg.trainer.val_check_interval = evaluate_every or steps
    cfg.trainer.default_root_dir = str(out / "ours")
    cfg.trainer.accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    return cfg


def trl_job(
    cfg: Any, out: Path, *, evaluate_every: int = 0, batch: int | None = None, gradient_checkpointing: bool = False
) -> dict[str, Any]:
    """Return the same training in the words of trl_worker.py: plain values, prompts as text."""
    import torch

    from rlvr_lightning.data import SingleExampleDataModule
    from rlvr_lightning.models import load_config_and_tokenizer, resolve_model
    from rlvr_lightning.prompts import PromptTemplate

    data = SingleExampleDataModule(**cfg.data.init_args)
    data.setup("fit")
    problem = data.train_problems[0]
    path = resolve_model(cfg.model.policy.model)
    tokenizer = load_config_and_tokenizer(path)[1]
    template = PromptTemplate(**cfg.rollout.prompt)
    sampling, objective, optimizer = cfg.rollout.sampling, cfg.model.objective, cfg.model.optimizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rollouts = data.problems_per_step * sampling.rollouts_per_problem
    batch = batch or TRL_BATCHES[device]
    if rollouts % batch:
        raise SystemExit(f"--trl-batch {batch} does not divide the {rollouts} rollouts of a step")
    return {
        "model": path,
        "prompt": template.text(problem, tokenizer),
        "prompt_ids": template(problem, tokenizer),
        "answer": problem.answer,
        "evaluation": [
            {"prompt": template.text(p, tokenizer), "answer": p.answer}
            for problems in data.eval_problems.values()
            for p in problems
        ],
        "evaluate_every": evaluate_every,
        "problems_per_step": data.problems_per_step,
        # The names of GRPOConfig from here on.
        "config": {
            "output_dir": str(out / "trl"),
            "seed": cfg.seed_everything,
            "max_steps": cfg.trainer.max_steps,
            "use_cpu": device == "cpu",
            "dataloader_pin_memory": device == "cuda",
            "num_generations": sampling.rollouts_per_problem,
            "temperature": sampling.temperature,
            "max_completion_length": sampling.max_tokens,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": rollouts // batch,  # one rollout batch, one update: on-policy
            "gradient_checkpointing": gradient_checkpointing,
            "bf16": True,
            "loss_type": "dapo",  # the mean over all completion tokens of the step
            "epsilon": objective.clip_low,
            "epsilon_high": objective.clip_high,
            "beta": objective.kl_coef,
            "use_bias_correction_kl": False,  # k3 as it stands, as ours
            "entropy_coef": objective.entropy_coef,
            "learning_rate": optimizer.lr,
            "weight_decay": optimizer.weight_decay,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": optimizer.warmup_steps,
            "max_grad_norm": cfg.model.max_grad_norm,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        },
    }


def trl_python() -> Path:
    """Return the Python of TRL's environment, which is made first if it is missing or outdated."""
    from rlvr_lightning.models import cache_dir

    wanted = REQUIREMENTS.read_text()
    folder = cache_dir() / f"trl-{trl_version(wanted)}"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing {REQUIREMENTS.name} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, stdout=sys.stderr)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", REQUIREMENTS], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return python


def trl_version(requirements: str) -> str:
    r"""Return the version that the text of a requirements file pins.

    >>> trl_version("torch==2.13.0\ntrl==1.16.0\n")
    '1.16.0'
    """
    pinned = re.search(r"^trl==(\S+)", requirements, re.MULTILINE)
    assert pinned is not None, "trl-requirements.txt pins no version of trl"
    return pinned[1]


def make_trainers(cfg: Any, job: dict[str, Any], out: Path, python: Path | None, names: Sequence[str]) -> list[TrainerProcess]:
    """Write both configurations into ``out`` and return the trainers that are asked for, not yet started."""
    from omegaconf import OmegaConf

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    folder = ROOT / "benchmarks"
    commands: dict[str, list[str | Path]] = {}
    if "ours" in names:
        OmegaConf.save(cfg, out / "ours.yaml", resolve=True)
        commands["ours"] = [sys.executable, folder / "rlvr_worker.py", out / "ours.yaml"]
    if "trl" in names:
        (out / "trl.json").write_text(json.dumps(job, indent=2) + "\n")
        commands["trl"] = [python or trl_python(), folder / "trl_worker.py", out / "trl.json"]
    return [TrainerProcess(name, command, out) for name, command in commands.items()]


def add_common_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that vs_trl.py and time_to_accuracy.py share."""
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm", help="what samples in ours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trl-python", type=Path, metavar="PYTHON", help="an environment with TRL that exists already")
    parser.add_argument("--trl-batch", type=int, help="rows of one forward pass in TRL")
    parser.add_argument("--trl-checkpointing", action="store_true", help="TRL's default: less memory, slower steps")
    parser.add_argument("--out", type=Path, default=Path(out), help="logs, and progress.jsonl; emptied first")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each, after one warm-up step")
    add_common_arguments(parser, "runs/vs-trl")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be positive")
    cfg = compose(args.out, args.steps + 1, args.engine, seed=args.seed)
    job = trl_job(cfg, args.out, batch=args.trl_batch, gradient_checkpointing=args.trl_checkpointing)
    trainers = make_trainers(cfg, job, args.out, args.trl_python, ("ours", "trl"))
    print("what differs:", *DIFFERENCES, sep="\n- ", file=sys.stderr)
    take_turns(trainers)
    results = {trainer.name: summarize_steps(trainer) for trainer in trainers}
    comparison = compare_steps(results["ours"], results["trl"])
    if args.json:
        print(json.dumps(comparison | results | {"machine": machine(), "differences": DIFFERENCES}, indent=2))
        return
    for name, result in results.items():
        peaks = ", ".join(f"{gib:.2f} GiB {where}" for where, gib in result["peak_gib"].items())
        print(f"{name:>4}: {result['step_s']:.2f} s per step, {result['tokens_per_step']:.0f} tokens, peak {peaks}")
    print(f"speed-up {comparison['speedup']:.2f}, peak memory ratio {comparison['peak_memory_ratio']:.2f}")


if __name__ == "__main__":
    main()
