"""Measure the engine against bare vLLM: how much of its speed is left once seeds, log-probs and grading are attached.

    python benchmarks/rollout.py [--workloads quickstart long] [--repetitions 5] [--json]

Two workloads of 64 rollouts of the quickstart's prompt with the embedded model: `quickstart`, at most 48 tokens at temperature
0.8, and `long`, 128 tokens each, the end-of-sequence token ignored. Three ways to sample them, taking turns in one process:
`bare`: `LLM.generate` on the same vLLM instance, same requests, seeds and parameters; `engine`: `VLLMEngine.generate`;
`collect`: `Collector.collect`, which also builds prompts and grades. The prefix cache is emptied before every measurement, as
it is after a weight update. `sync` is the time of one weight update; `matmul` compares a matrix
product before vLLM was started and after.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlvr_lightning.engines import Sampling
from rlvr_lightning.engines.vllm import VLLMEngine, import_vllm
from rlvr_lightning.policy import PolicyConfig, PolicyWeights
from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.records import Problem, ProblemBatch
from rlvr_lightning.rollout import Collector, seed_for
from rlvr_lightning.verify import Verifier

GROUPS, SIZE = 8, 8
PROMPT = PromptTemplate(examples=(("What is 2 + 2?", "2 + 2 = \\boxed{4}"),))
PROBLEM = Problem("inline", "What is 3 + 4?", "7")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class EndlessEngine(VLLMEngine):
    """Samples on after the end-of-sequence token."""

    def _params(self, *args: Any, **kwargs: Any) -> Any:
        params = super()._params(*args, **kwargs)
        params.ignore_eos = True
        params.stop_token_ids = []
        params._all_stop_token_ids = set()
        return params


@dataclass
class Workload:
    """What is sampled."""

    name: str
    sampling: Sampling
    engine: VLLMEngine


def seconds_of(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return wall time and result."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = action()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def matmul_seconds() -> float:
    """Return the median time of a bf16 matrix product."""
    x = torch.randn(1024, 1024, dtype=torch.bfloat16, device=DEVICE)
    return statistics.median(seconds_of(lambda: x @ x)[0] for _ in range(50))


def compare(work: Workload, collector: Collector, repetitions: int) -> dict[str, Any]:
    """Return tokens per second of the three ways, and their ratios to bare vLLM."""
    engine, sampling = work.engine, work.sampling
    llm = engine._llm
    assert llm is not None
    vllm = import_vllm()
    prompt = PROMPT(PROBLEM, collector.tokenizer)
    batch = ProblemBatch(step=0, slots=tuple(range(GROUPS)), problems=(PROBLEM,) * GROUPS, group_size=SIZE)
    seeds = [[seed_for(0, stream="train", step=0, slot=slot, sample=i) for i in range(SIZE)] for slot in range(GROUPS)]
    requests = [vllm.TokensPrompt(prompt_token_ids=list(prompt)) for _ in range(GROUPS * SIZE)]

    def bare() -> int:
        params = [engine._params(sampling, seed) for row in seeds for seed in row]
        return sum(len(out.outputs[0].token_ids) for out in llm.generate(requests, params, use_tqdm=False))

    def ours() -> int:
        return sum(len(c.token_ids) for group in engine.generate([prompt] * GROUPS, sampling, seeds) for c in group)

    def collect() -> int:
        return sum(len(r.completion.token_ids) for r in collector.collect(batch, PROMPT, sampling))

    ways: dict[str, Callable[[], int]] = {"bare": bare, "engine": ours, "collect": collect}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    engine.generate([prompt] * GROUPS, replace(sampling, max_tokens=4), seeds)  # warm-up
    for _ in range(repetitions):
        for name, way in ways.items():
            llm.reset_prefix_cache()
            seconds, tokens = seconds_of(way)
            speeds[name].append(tokens / seconds)
    ratios = {
        n: statistics.median(a / b for a, b in zip(speeds[n], speeds["bare"], strict=True)) for n in ("engine", "collect")
    }
    return {"tokens_per_s": {name: statistics.median(values) for name, values in speeds.items()}, "ratio_to_bare": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=("quickstart", "long"), default=["quickstart", "long"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, everything else on stderr")
    args = parser.parse_args()
    if args.repetitions < 1:
        parser.error("--repetitions must be positive")
    before, threads_before = matmul_seconds(), torch.get_num_threads()
    policy = PolicyConfig(model="embedded:SmolLM2-135M-Instruct").build().to(DEVICE)
    weights = PolicyWeights(policy, torch.bfloat16)
    engine = EndlessEngine()
    engine.sync(weights, 0, window=256)
    plain = VLLMEngine()  # the same vLLM instance, with the usual end of a completion
    plain.__dict__.update(engine.__dict__)
    after = matmul_seconds()
    sync = [seconds_of(lambda i=i: engine.sync(weights, i + 1, window=256))[0] for i in range(args.repetitions)]
    plain.version = engine.version
    works = [
        Workload("quickstart", Sampling(rollouts_per_problem=SIZE, temperature=0.8, max_tokens=48), plain),
        Workload("long", Sampling(rollouts_per_problem=SIZE, temperature=0.8, max_tokens=128), engine),
    ]
    verifier = Verifier()
    try:
        compared = {
            work.name: compare(work, Collector(work.engine, verifier, policy.tokenizer, run_seed=0), args.repetitions)
            for work in works
            if work.name in args.workloads
        }
    finally:
        verifier.close()
        engine.close()
    result: dict[str, Any] = {
        "device": DEVICE,
        "repetitions": args.repetitions,
        "workloads": compared,
        "sync_s": statistics.median(sync),
        "matmul_after_start_over_before": after / before,
        "threads": {"before": threads_before, "after": torch.get_num_threads()},
    }
    where = sys.stderr if args.json else sys.stdout
    for name, values in compared.items():
        speeds, ratios = values["tokens_per_s"], values["ratio_to_bare"]
        print(f"{name}: bare vLLM {speeds['bare']:.0f} tokens/s, engine x {ratios['engine']:.2f}, ", end="", file=where)
        print(f"collect x {ratios['collect']:.2f}", file=where)
    print(f"sync {result['sync_s']:.3f} s; matmul after vLLM's start x {after / before:.2f} of the time before", file=where)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
