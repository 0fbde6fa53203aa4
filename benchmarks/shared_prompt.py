"""The update's forward and backward pass with shared prefixes against the row-wise one, over prompts, completions and groups.

    python benchmarks/shared_prompt.py [--cells 68x14x64 512x64x64 ...] [--repetitions 5] [--max-tokens 40000] [--json]

One prompt, random answers of equal length that share nothing else: the smallest saving that a group can have. `auto` is what
training does: the cheaper of the two by the expected cost. Where it takes rows the ratio is 1 by construction and only named.
The two ways take turns within one run; a cell with more than `--max-tokens` row tokens is left out.
"""

import argparse
import itertools
import json
import statistics
import sys
from typing import Any

import torch

from learner import DEVICE, MadeUpRollouts, seconds
from rlvr_lightning.batching import RolloutBatch, plan_micro_batches
from rlvr_lightning.policy import Policy, PolicyConfig

GRID = list(itertools.product((16, 64, 256, 1024, 2048), (8, 64, 512, 2048), (8, 64, 1024)))
NAMED = [(68, 14, 64), (512, 64, 64)]


def run(policy: Policy, batch: RolloutBatch, budget: int, *, share: bool) -> None:
    """One forward and backward pass over the batch, as training cuts it."""
    plan = plan_micro_batches(batch, budget, share=share, costs=policy.costs)
    for rows in plan.cuts:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, cache_enabled=False):
            stats = policy(batch.rows(rows), as_tree=plan.as_tree)
            loss = (stats.logprobs.sum() - 0.001 * stats.entropy.sum()) / len(batch)
        loss.backward()
    policy.zero_grad()


def parity(policy: Policy, batch: RolloutBatch) -> dict[str, float]:
    """Return how far loss and gradient of both ways are apart in fp32, relative to their size."""
    found = []
    for share in (True, False):
        stats = policy(batch, as_tree=share)
        loss = (stats.logprobs.sum() - 0.001 * stats.entropy.sum()) / len(batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        policy.zero_grad()
        found.append((loss.detach(), gradient))
    (loss, gradient), (loss_of_rows, gradient_of_rows) = found
    return {
        "loss": float((loss - loss_of_rows).abs() / loss_of_rows.abs()),
        "gradient": float((gradient - gradient_of_rows).norm() / gradient_of_rows.norm()),
    }


def measure(policy: Policy, cell: tuple[int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and ratio of one cell."""
    prompt, completion, group = cell
    made_up = MadeUpRollouts(prompt, completion, group, policy.lm.config.vocab_size)
    batch = RolloutBatch.from_rollouts(made_up.rollouts).to(DEVICE)
    auto = plan_micro_batches(batch, options.tokens, costs=policy.costs)
    result: dict[str, Any] = {
        "prompt": prompt,
        "completion": completion,
        "group": group,
        "auto": "tree" if auto.as_tree else "rows",
    }
    if not auto.as_tree and not options.all:
        return result | {"ratio": 1.0}
    times: dict[bool, list[float]] = {True: [], False: []}
    for repetition in range(options.repetitions + 1):
        for share in (True, False):
            taken = seconds(lambda share=share: run(policy, batch, options.tokens, share=share))
            print(f"{prompt}x{completion}x{group} {'tree' if share else 'rows'}: {taken:.2f} s", file=sys.stderr, flush=True)
            if repetition:
                times[share].append(taken)
    ratios = [rows / tree for rows, tree in zip(times[False], times[True], strict=True)]
    tree_over_rows = statistics.median(ratios)
    return result | {
        "tree_s": statistics.median(times[True]),
        "rows_s": statistics.median(times[False]),
        "tree_speedup": tree_over_rows,
        "ratio": tree_over_rows if auto.as_tree else 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:SmolLM2-135M-Instruct")
    parser.add_argument("--cells", nargs="*", help="PROMPTxCOMPLETIONxGROUP; default: the grid")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=2_000_000 if DEVICE.type == "cuda" else 40_000)
    parser.add_argument("--tokens", type=int, default=24000 if DEVICE.type == "cuda" else 8192, help="per micro-batch")
    parser.add_argument("--all", action="store_true", help="measure also where rows are taken")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    policy = PolicyConfig(model=options.model).build().to(DEVICE)
    cells = [tuple(map(int, cell.split("x"))) for cell in options.cells] if options.cells else NAMED + GRID
    example = MadeUpRollouts(68, 14, 8, policy.lm.config.vocab_size).rollouts
    gaps = parity(policy, RolloutBatch.from_rollouts(example).to(DEVICE))
    results, left_out = [], []
    for cell in cells:
        prompt, completion, group = cell
        if (prompt + completion) * group > options.max_tokens:
            left_out.append("x".join(map(str, cell)))
            continue
        results.append(measure(policy, (prompt, completion, group), options))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in results[-1].items()}, file=sys.stderr, flush=True)
    summary = {
        "fp32_relative_gap": gaps,
        "cells": results,
        "left_out": left_out,
        "lowest_ratio": min(r["ratio"] for r in results),
    }
    if options.json:
        print(json.dumps(summary, indent=2))
        return
    print("| prompt | completion | group | tree, s | rows, s | rows / tree | auto |\n|---|---|---|---|---|---|---|")
    for r in results:
        timed = "tree_s" in r
        cells_ = [f"{r['tree_s']:.2f}", f"{r['rows_s']:.2f}", f"{r['tree_speedup']:.2f}"] if timed else ["", "", ""]
        print("| " + " | ".join([str(r["prompt"]), str(r["completion"]), str(r["group"]), *cells_, r["auto"]]) + " |")
    print(
        f"\nfp32: loss differs by {gaps['loss']:.1e}, gradient by {gaps['gradient']:.1e} (relative); lowest ratio of auto "
        f"{summary['lowest_ratio']:.2f}; left out: {' '.join(left_out) or 'nothing'}"
    )


if __name__ == "__main__":
    main()
