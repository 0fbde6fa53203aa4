"""Compare the memory that `rlvr doctor --config` plans with the peak that a run logs.

    python benchmarks/memory.py [--cases hf-fp32-kl vllm-bf16 ...] [--constants] [--json]

Each case is a real `rlvr fit` of two steps in a process of its own; its peak is `memory/peak_gib` (VmHWM of the largest rank).
With an engine in another process it is the most that all processes held together (proportional set size, read every half
second). The plan is that of the same arguments. Budgets of tokens are such that the rollouts reach them, so that the planned
micro-batch is a real one; `computed` is how many tokens the decoder had to compute for the larger of the two updates.

`--constants` measures main memory after the imports. The constants of the plan are some 0.1 GiB above: the first pass through a
model, and the start of an engine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from rlvr_lightning.doctor import configuration
from rlvr_lightning.memory_plan import GIB, LIBRARIES_GIB, VLLM_GIB, MemoryPlan

CONF = Path(__file__).parents[1] / "conf"
HF, VLLM, PROCESS = (["--rollout", str(CONF / f"rollout/{name}.yaml")] for name in ("hf", "vllm", "vllm-process"))
TWO = ["--trainer", str(CONF / "trainer/fsdp.yaml"), "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
FP32, NO_KL = ["--trainer.precision", "32-true"], ["--model.objective.kl_coef", "0"]
CHECKPOINTING = ["--model.policy.gradient_checkpointing", "true"]


def size(groups: int, completion: int, budget: int) -> list[str]:
    """Return arguments for so many groups of 8 rollouts, at a temperature that makes them long and different."""
    return [
        *("--data.init_args.problems_per_step", str(groups), "--rollout.sampling.max_tokens", str(completion)),
        *("--model.tokens_per_micro_batch", str(budget), "--rollout.sampling.temperature", "1.5"),
    ]


CASES = {
    "hf-fp32-kl": [*HF, *FP32, *size(2, 48, 256)],
    "vllm-bf16": [*VLLM, *NO_KL, *size(2, 48, 256)],
    "vllm-bf16-checkpointing": [*VLLM, *NO_KL, *CHECKPOINTING, *size(1, 256, 1024)],
    "vllm-bf16-kl-long": [*VLLM, *size(1, 256, 1024)],
    "vllm-bf16-lora": [*VLLM, *size(2, 48, 256), "--model.policy.lora", "{}"],
    "vllm-bf16-critic": [*VLLM, *NO_KL, *size(2, 48, 256), "--model.advantage", "gae", "--model.critic", "{}"],
    "vllm-fp32-kl": [*VLLM, *FP32, *size(2, 48, 256)],
    "process-bf16-kl": [*PROCESS, *size(2, 48, 256)],
    "fsdp-hf-fp32-kl": [*TWO, *HF, *FP32, *size(2, 48, 256)],
}


def arguments(case: str, folder: str) -> list[str]:
    """Return the arguments of ``rlvr fit``."""
    files = ["model/smollm2", "data/three-plus-four", "trainer/cpu"]
    words = [word for file in files for word in (f"--{file.split('/')[0]}", str(CONF / f"{file}.yaml"))]
    run = ["--trainer.max_steps", "2", "--evaluate_first", "false", "--trainer.val_check_interval", "1000000"]
    return [*words, *CASES[case], *run, "--trainer.default_root_dir", folder]


def planned(words: list[str]) -> MemoryPlan:
    """Return the plan of a fit with these arguments.

    Raises:
        SystemExit: if they do not pass the checks.
    """
    found = list(configuration(words))
    plan = next((x for x in found if isinstance(x, MemoryPlan)), None)
    if plan is None:
        raise SystemExit("\n".join(map(str, found)))
    return plan


def held_together(pid: int) -> float:
    """Return the GiB of a process and all that it started; what they share counts once."""
    total = 0
    with suppress(psutil.Error):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(OSError, psutil.Error):
                total += process.memory_full_info().pss
    return total / GIB


def measure(case: str) -> dict[str, Any]:
    """Plan a case, run it, and return both."""
    with tempfile.TemporaryDirectory() as folder:
        words = arguments(case, folder)
        plan = planned(words)
        command = [sys.executable, "-m", "rlvr_lightning", "fit", *words]
        log = Path(folder) / "log"
        with log.open("w") as out:
            run = subprocess.Popen(command, env={**os.environ, "WANDB_MODE": "offline"}, stdout=out, stderr=out)
            together = 0.0
            while run.poll() is None:
                together = max(together, held_together(run.pid))
                time.sleep(0.5)
        if run.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {run.returncode}:\n{log.read_text()[-2000:]}")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "memory/peak_gib" in row]
    peak = together if plan.settings.own_process else max(row["memory/peak_gib"] for row in steps)
    return {
        "planned_gib": plan.total,
        "measured_gib": peak,
        "ratio": plan.total / peak,
        "micro_batch": plan.settings.micro_batch,
        "computed": max(int(row["train/computed_tokens"]) for row in steps),
    }


RSS = "import psutil; print('rss', psutil.Process().memory_info().rss)"


def resident(code: str) -> float:
    """Return GiB that are resident after so much Python."""
    out = subprocess.run([sys.executable, "-c", f"{code}\n{RSS}"], check=True, capture_output=True, text=True).stdout
    return int(out.split("rss ")[-1]) / GIB


def constants() -> dict[str, float]:
    """Return GiB after imports: torch; the command line, which imports transformers and Lightning; vLLM besides."""
    cli = "import rlvr_lightning.cli"
    return {
        "torch": resident("import torch"),
        "rlvr_lightning.cli": resident(cli),
        "and vllm.LLM": resident(f"{cli}\nfrom rlvr_lightning.engines.vllm import import_vllm\nimport_vllm().LLM"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--constants", action="store_true", help="measure the memory of imports only")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args()
    if args.constants:
        found = constants()
        print(json.dumps(found) if args.json else "\n".join(f"{name:<24}{gib:6.2f} GiB" for name, gib in found.items()))
        print(f"the plan takes {LIBRARIES_GIB} and {VLLM_GIB} more", file=sys.stderr)
        return
    results = {}
    print(f"{'case':<26}{'planned':>9}{'measured':>10}{'ratio':>7}{'micro-batch':>13}{'computed':>10}", file=sys.stderr)
    for case in args.cases:
        r = results[case] = measure(case)
        line = f"{case:<26}{r['planned_gib']:9.2f}{r['measured_gib']:10.2f}{r['ratio']:7.2f}"
        print(f"{line}{r['micro_batch']:>13}{r['computed']:>10}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"cases": results}, indent=2))


if __name__ == "__main__":
    main()
