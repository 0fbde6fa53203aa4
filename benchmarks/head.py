"""Compare the tiled head with the plain one: seconds forward and backward, peak memory, gradients.

    python benchmarks/head.py [--cases quickstart-350 quickstart-900 full-bf16 full-fp32] [--repetitions 5] [--json]

The plain head is `log_softmax((hidden @ weight.T).float() / T)`, gather, `-(p * log p).sum()`. The loss sums log-probs and
entropies. Where the plain head's memory for all tokens is not free, the two are compared on the largest power of two of tokens
that fits, and the tiled head runs once more alone on all of them.

Memory is the peak above what is there before the step (inputs and their `.grad`): VmHWM on a CPU, `max_memory_allocated` on a
GPU. It is taken in the first step, which is not timed, and includes the new gradient of the weight. On a GPU with liger-kernel
installed, the head without the entropy is compared with Liger's fused one.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from rlvr_lightning.logprobs import token_logprobs_and_entropy

TEMPERATURE = 0.6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """A shape, and whether it runs under bfloat16 autocast."""

    tokens: int
    vocabulary: int
    hidden: int
    bf16: bool


CASES = {
    "quickstart-350": Case(350, 49152, 576, True),
    "quickstart-900": Case(900, 49152, 576, True),
    "full-bf16": Case(8192, 151936, 1536, True),
    "full-fp32": Case(8192, 151936, 1536, False),
}


def tiled(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    logprobs, entropy = token_logprobs_and_entropy(hidden, targets, weight, None, TEMPERATURE)
    return logprobs.sum() + 0.1 * entropy.sum()


def plain(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    log_p = torch.log_softmax((hidden @ weight.T).float() / TEMPERATURE, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(-1, targets[:, None]).sum() + 0.1 * entropy.sum()


def tiled_logprobs(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return token_logprobs_and_entropy(hidden, targets, weight, None, TEMPERATURE)[0].sum()


def liger_logprobs() -> Loss | None:
    """Return Liger's fused cross entropy, or None where it cannot run."""
    if DEVICE.type != "cuda":
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, targets, weight: -loss(weight, hidden / TEMPERATURE, targets)


def make_inputs(case: Case, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, targets and the weight, gradients allocated; logits spread as a language model's (sd about 2)."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, case.hidden, device=DEVICE).requires_grad_()
    weight = torch.randn(case.vocabulary, case.hidden, device=DEVICE).mul_(2 / case.hidden**0.5).requires_grad_()
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    return hidden, torch.randint(case.vocabulary, (tokens,), device=DEVICE), weight


def step(loss: Loss, case: Case, hidden: Tensor, targets: Tensor, weight: Tensor) -> float:
    """Add to both gradients; return seconds."""
    synchronize()
    start = time.perf_counter()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=case.bf16):
        value = loss(hidden, targets, weight)
    value.backward()
    synchronize()
    return time.perf_counter() - start


def first_step(loss: Loss, case: Case, *inputs: Tensor) -> tuple[int, float, list[Tensor]]:
    """Return the step's peak memory in bytes above what was there before, its seconds, and its gradients."""
    for x in (inputs[0], inputs[2]):
        assert x.grad is not None
        x.grad.zero_()
    before = reset_peak()
    seconds = step(loss, case, *inputs)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else process_memory("VmHWM")
    return peak - before, seconds, [x.grad.clone() for x in (inputs[0], inputs[2]) if x.grad is not None]


def reset_peak() -> int:
    """Forget the peak so far and return the bytes in use."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def process_memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def tokens_that_fit(case: Case) -> int:
    """Return at most ``case.tokens``: as many as need 70 % of the free memory with six fp32 copies of the logits."""
    free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else psutil.virtual_memory().available
    weights = 4 * 4 * case.vocabulary * case.hidden  # itself, .grad, the new gradient, a copy to compare
    tokens = case.tokens
    while weights + 6 * 4 * tokens * case.vocabulary > 0.7 * free and tokens > 64:
        tokens = 1 << ((tokens - 1).bit_length() - 1)
    return tokens


def compare(losses: dict[str, Loss], case: Case, tokens: int, repetitions: int) -> dict[str, Any]:
    """Return memory and median seconds of each loss, and how far the gradients of the first are from the second's."""
    inputs = make_inputs(case, tokens)
    peaks, gradients = {}, []
    for name, loss in losses.items():
        peaks[name], _, grads = first_step(loss, case, *inputs)
        gradients.append(grads)
        del grads
    errors = [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(*gradients, strict=True)]
    del gradients
    runs: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repetitions):
        for name, loss in losses.items():
            runs[name].append(step(loss, case, *inputs))
    seconds = {name: statistics.median(times) for name, times in runs.items()}
    (ours, theirs) = losses
    return {
        "tokens": tokens,
        "seconds": seconds,
        "seconds_runs": runs,
        "time_ratio": seconds[ours] / seconds[theirs],
        "peak_mib": {name: peak / 2**20 for name, peak in peaks.items()},
        "memory_ratio": peaks[ours] / peaks[theirs],
        "relative_gradient_error": dict(zip(("hidden", "weight"), errors, strict=True)),
    }


def measure(name: str, repetitions: int) -> dict[str, Any]:
    case = CASES[name]
    tokens = tokens_that_fit(case)
    result: dict[str, Any] = {**case._asdict(), **compare({"tiled": tiled, "plain": plain}, case, tokens, repetitions)}
    report(name, case, result)
    if tokens < case.tokens:
        peak, seconds, _ = first_step(tiled, case, *make_inputs(case, case.tokens))
        result["tiled_alone"] = {"tokens": case.tokens, "seconds": seconds, "peak_mib": peak / 2**20}
        log(f"  tiled alone on {case.tokens} tokens, one run: {seconds:.2f} s, {peak / 2**20:.0f} MiB")
    if (liger := liger_logprobs()) is not None:
        result["liger"] = compare({"tiled_logprobs": tiled_logprobs, "liger": liger}, case, tokens, repetitions)
        report(f"{name}, log-probs only", case, result["liger"])
    return result


def report(name: str, case: Case, result: dict[str, Any]) -> None:
    ours, theirs = result["seconds"]
    seconds, peak, apart = result["seconds"], result["peak_mib"], result["relative_gradient_error"]
    log(
        f"{name} ({ours} / {theirs}): {result['tokens']} of {case.tokens} tokens, V={case.vocabulary}, H={case.hidden}, "
        f"{'bfloat16 autocast' if case.bf16 else 'float32'}\n"
        f"  seconds {seconds[ours]:.3f} / {seconds[theirs]:.3f} = {result['time_ratio']:.2f}, "
        f"peak {peak[ours]:.0f} / {peak[theirs]:.0f} MiB = {result['memory_ratio']:.3f}, "
        f"gradients apart: hidden {apart['hidden']:.1e}, weight {apart['weight']:.1e}"
    )


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args()
    log(f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads, median of {args.repetitions}, interleaved")
    if liger_logprobs() is None:
        log("Liger is not compared: it needs a CUDA device and liger-kernel.")
    results = {name: measure(name, args.repetitions) for name in args.cases}
    if args.json:
        print(json.dumps({"device": str(DEVICE), "torch": torch.__version__, "cases": results}))


if __name__ == "__main__":
    main()
