"""Time of a whole training step against rollouts, prompt length, completion length and learner processes.

    python benchmarks/scaling.py [--cases 64x64x16 256x64x16 1024x64x16] [--steps 5] [--engine vllm] [--ranks 1] [--json]

A case is ROLLOUTSxPROMPTxCOMPLETION. Each runs in a process of its own: the real trainer, engine and grader, KL on, with an
engine that never stops early, so that every completion has exactly so many tokens. The first step is not counted.
With `--ranks 2` transformers samples, which stops where an answer ends, and the learner is sharded with FSDP2.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoTokenizer

from learner import DEVICE
from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.data import SingleExampleDataModule
from rlvr_lightning.engines import Sampling
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.losses import Objective
from rlvr_lightning.models import resolve_model
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.policy import PolicyConfig
from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.records import Problem, ProblemBatch
from rlvr_lightning.strategies import FSDP2Strategy
from rollout import EndlessEngine

MODEL = "embedded:SmolLM2-135M-Instruct"
CASES = ["64x64x16", "256x64x16", "1024x64x16", "64x64x128", "64x1024x128"]


class Steps(Callback):
    """Keeps what every step logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ProblemBatch, batch_idx: int
    ) -> None:
        """Copy the metrics."""
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def question_of(length: int) -> str:
    """Return a question whose whole prompt has ``length`` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    question = "Count."
    while len(PromptTemplate()(Problem("q", question, "1"), tokenizer)) < length:
        question += " and"
    return question


def run_case(rollouts: int, prompt: int, completion: int, options: argparse.Namespace) -> dict[str, float]:
    """Train a few steps in this process; return medians of what they logged."""
    steps = Steps()
    engine = EndlessEngine() if options.engine == "vllm" else HFEngine()
    source = RolloutCallback(engine=engine, sampling=Sampling(rollouts_per_problem=8, temperature=0.8, max_tokens=completion))
    module = RLVRModule(
        policy=PolicyConfig(model=MODEL),
        objective=Objective(kl_coef=0.001, entropy_coef=0.001),
        tokens_per_micro_batch=options.tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if DEVICE.type == "cuda" else "cpu",
            devices=options.ranks,
            strategy=FSDP2Strategy() if options.ranks > 1 else "auto",
            precision="bf16-mixed",
            max_steps=options.steps + 1,
            callbacks=[source, steps],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = SingleExampleDataModule(question=question_of(prompt), answer="1", problems_per_step=rollouts // 8, evals={})
        trainer.fit(module, datamodule=data)
    names = [name for name in steps.logged[-1] if name.startswith(("time/", "memory/", "train/computed", "rollout/length"))]
    return {name: statistics.median(step[name] for step in steps.logged[1:]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24000 if DEVICE.type == "cuda" else 4096, help="per micro-batch")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.ranks > 1:
        options.engine = "hf"
    if options.case:
        found = run_case(*map(int, options.case.split("x")), options)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print("found " + json.dumps(found), flush=True)
        return
    results: dict[str, dict[str, float]] = {}
    for case in options.cases:
        command = [sys.executable, __file__, "--case", case, "--steps", str(options.steps), "--engine", options.engine]
        command += ["--ranks", str(options.ranks), "--tokens", str(options.tokens)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        (line,) = [line for line in output.splitlines() if line.startswith("found ")]
        results[case] = json.loads(line.removeprefix("found "))
        print(case, results[case], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"ranks": options.ranks, "engine": options.engine, "cases": results}, indent=2))
        return
    parts = ["step_s", "generate_s", "reference_s", "update_s", "sync_s"]
    print("| rollouts | prompt | completion | " + " | ".join(parts) + " |" + "\n" + "|---" * (3 + len(parts)) + "|")
    for case, found in results.items():
        print("| " + " | ".join([*case.split("x"), *(f"{found.get(f'time/{part}', 0):.2f}" for part in parts)]) + " |")


if __name__ == "__main__":
    main()
