"""How much of the machine's bf16 matrix-product rate the update reaches, counting only the arithmetic that it needs.

    python benchmarks/learner.py [--prompt 68] [--completion 512] [--rollouts 64] [--steps 5] [--shape qwen2.5-1.5b] [--json]

The real module trains on made-up rollouts: one prompt, random answers that share nothing with each other. Needed are, for every
distinct prefix, two operations per weight and four per query, key and channel, three times (forward, and two products in the
backward pass); nothing is counted twice for what is computed again. The time is the whole update: forward, backward, gradient
clipping, AdamW. The peak is measured before every step, in the same process. `--profile` lists what the time went into.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import profile

from rlvr_lightning.data import SingleExampleDataModule
from rlvr_lightning.losses import Objective
from rlvr_lightning.models import load_config_and_tokenizer, resolve_model
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.policy import Policy, PolicyConfig
from rlvr_lightning.records import Completion, Problem, ProblemBatch, Rollout, Score

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
}
"""Random weights of a Qwen2 model: speed needs no trained ones."""


class MadeUpRollouts(Callback):
    """Attaches the same rollouts to every batch: one prompt, random answers of one length, every other one right."""

    def __init__(self, prompt: int, completion: int, rollouts: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(10, vocabulary, (count,), generator=generator).tolist())

        problem, question = Problem("made-up", "?", "1"), tokens(prompt)
        self.rollouts = [
            Rollout(
                problem,
                question,
                Completion(tokens(completion), (-10.0,) * completion, "", "length"),
                Score(float(i % 2), i % 2 == 1, "wrong", None),
                temperature=0.8,
                policy_version=0,
            )
            for i in range(rollouts)
        ]
        self.peaks: list[float] = []
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: ProblemBatch, batch_idx: int) -> None:
        """Measure the machine, then attach."""
        self.peaks.append(matmul_peak())
        batch.problems, batch.group_size = (self.rollouts[0].problem,), len(self.rollouts)
        batch.rollouts = self.rollouts

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ProblemBatch, batch_idx: int
    ) -> None:
        """Keep what the step logged."""
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        update, peak = self.steps[-1]["time/update_s"], self.peaks[-1] / 1e12
        print(f"step {len(self.steps)}: update {update:.1f} s, peak {peak:.3f} TFLOP/s", file=sys.stderr, flush=True)


def matmul_peak(size: int | None = None, repetitions: int = 5) -> float:
    """Return the rate of a large bf16 matrix product, floating-point operations per second: the best of a few."""
    size = size or (8192 if DEVICE.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(repetitions + 1))


def seconds(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes, its kernels included."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def needed_flops(policy: Policy, prompt: int, completion: int, rollouts: int) -> float:
    """Return the operations of one update that no arrangement can save: distinct prefixes only, causal pairs only."""
    config = policy.lm.config
    head = config.vocab_size * config.hidden_size
    linear = sum(p.numel() for p in policy.lm.get_decoder().parameters()) - head
    tokens = prompt + rollouts * (completion - 1)  # the last one predicts nothing
    pairs = prompt * (prompt + 1) / 2 + rollouts * sum(range(prompt + 1, prompt + completion))
    channels = config.num_hidden_layers * config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    return 3 * (2 * linear * tokens + 2 * head * rollouts * completion + 4 * channels * pairs)


@contextmanager
def model_folder(shape: str | None) -> Iterator[str]:
    """Yield the small trained model, or a folder with random weights of a shape."""
    if shape is None:
        yield "embedded:SmolLM2-135M-Instruct"
        return
    from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        lm = Qwen2ForCausalLM(Qwen2Config(**SHAPES[shape])).to(torch.bfloat16)
        lm.generation_config = GenerationConfig(eos_token_id=0)
        lm.save_pretrained(folder)
        AutoTokenizer.from_pretrained(resolve_model("embedded:SmolLM2-135M-Instruct")).save_pretrained(folder)
        yield folder


def train(options: argparse.Namespace, model: str, *, tokens: int, kl_coef: float = 0.0) -> tuple[RLVRModule, MadeUpRollouts]:
    """Train ``options.steps`` steps and one to warm up."""
    policy = PolicyConfig(model=model, gradient_checkpointing=options.gradient_checkpointing)
    module = RLVRModule(
        policy=policy,
        objective=Objective(kl_coef=kl_coef, entropy_coef=0.001),
        tokens_per_micro_batch=tokens,
        mismatch_limit=float("inf"),
    )
    config, _ = load_config_and_tokenizer(policy.model_path)
    source = MadeUpRollouts(options.prompt, options.completion, options.rollouts, config.vocab_size)
    trainer = Trainer(
        accelerator="gpu" if DEVICE.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=options.steps + 1,
        callbacks=[source],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=SingleExampleDataModule(question="?", answer="1", problems_per_step=1, evals={}))
    return module, source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=68)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24000 if DEVICE.type == "cuda" else 4096, help="per micro-batch")
    parser.add_argument("--shape", choices=SHAPES, default=None, help="random weights instead of SmolLM2-135M")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the operations that took longest")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with model_folder(options.shape) as model:
        if options.profile:
            with profile() as profiler:
                module, source = train(options, model, tokens=options.tokens)
            print(profiler.key_averages().table(sort_by=f"self_{DEVICE.type}_time_total", row_limit=25), file=sys.stderr)
        else:
            module, source = train(options, model, tokens=options.tokens)
    flops = needed_flops(module.policy, options.prompt, options.completion, options.rollouts)
    shares = [flops / step["time/update_s"] / peak for step, peak in zip(source.steps[1:], source.peaks[1:], strict=True)]
    result = {
        "share_of_peak": statistics.median(shares),
        "shares": shares,
        "needed_tflop": flops / 1e12,
        "update_s": statistics.median(step["time/update_s"] for step in source.steps[1:]),
        "peak_tflop_per_s": statistics.median(source.peaks[1:]) / 1e12,
        "computed_tokens": source.steps[-1]["train/computed_tokens"],
        "tokens_per_micro_batch": options.tokens,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{options.rollouts} rollouts of {options.prompt} + {options.completion} tokens: {result['update_s']:.1f} s, "
            f"needs {result['needed_tflop']:.2f} TFLOP; peak {result['peak_tflop_per_s']:.2f} TFLOP/s, of it "
            f"{100 * result['share_of_peak']:.0f} % ({100 * min(shares):.0f} to {100 * max(shares):.0f})"
        )


if __name__ == "__main__":
    main()
