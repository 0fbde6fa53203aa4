"""Measure how long the quickstart and TRL's GRPOTrainer train until greedy accuracy on 80 held-out sums reaches 0.80.

    python benchmarks/time_to_accuracy.py [--target 0.8] [--max-steps 60] [--every 5] [--only ours|trl] [--json]

Both trainers are set up, started and run in turns as in vs_trl.py. Every 5 steps (``--every``) each evaluates the 80 sums of
single digits that it does not train on: the same prompts, greedy, at most 48 tokens, the same grader. Ours is the run's own
validation.

``training_s`` is the time of all steps until the target, rollouts included, evaluation not; in ours the engine starts within
the first step. ``with_startup_s`` adds what passes from the command to the first step. A run that never gets there has null.

Every step and evaluation is printed to stderr and appended to ``progress.jsonl`` as it happens: a run that is killed has
still said how far it came.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from vs_trl import DIFFERENCES, TrainerProcess, add_common_arguments, compose, machine, make_trainers, take_turns, trl_job


def reached(records: Sequence[dict[str, Any]], target: float) -> int | None:
    """Return the step of the first evaluation at or above ``target``, None if there is none.

    >>> reached([{"kind": "evaluation", "step": 5, "accuracy": 0.4}, {"kind": "evaluation", "step": 10, "accuracy": 0.9}], 0.8)
    10
    """
    return next((r["step"] for r in records if r["kind"] == "evaluation" and r["accuracy"] >= target), None)


def summarize(records: Sequence[dict[str, Any]], target: float, startup_s: float) -> dict[str, Any]:
    """Return when the target was reached, in steps and seconds, and the whole curve in both."""
    step = reached(records, target)
    seconds = [r["seconds"] for r in records if r["kind"] == "step"]
    training = None if step is None else sum(seconds[:step])
    return {
        "steps": step,
        "training_s": training,
        "with_startup_s": None if training is None else training + startup_s,
        "curve": [
            {"step": r["step"], "training_s": sum(seconds[: r["step"]]), "accuracy": r["accuracy"]}
            for r in records
            if r["kind"] == "evaluation"
        ],
        "startup_s": startup_s,
        "peak_gib": records[-1]["peak_gib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--max-steps", type=int, default=60, help="a multiple of --every")
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--only", choices=["ours", "trl"], help="one trainer alone")
    add_common_arguments(parser, "runs/time-to-accuracy")
    args = parser.parse_args()
    if args.every < 1 or args.max_steps < 1 or args.max_steps % args.every:
        parser.error("--every must be positive, and --max-steps a positive multiple of it")
    cfg = compose(args.out, args.max_steps, args.engine, seed=args.seed, evaluate_every=args.every)
    job = trl_job(cfg, args.out, evaluate_every=args.every, batch=args.trl_batch, gradient_checkpointing=args.trl_checkpointing)
    names = [args.only] if args.only else ["ours", "trl"]
    trainers = make_trainers(cfg, job, args.out, args.trl_python, names)
    if not args.only:
        print("what differs:", *DIFFERENCES, sep="\n- ", file=sys.stderr)

    def done(trainer: TrainerProcess) -> bool:
        return reached(trainer.records, args.target) is not None

    take_turns(trainers, done)
    results: dict[str, dict[str, Any]] = {t.name: summarize(t.records, args.target, t.startup_s) for t in trainers}
    speedup = None
    if not args.only and results["ours"]["steps"] and results["trl"]["steps"]:
        speedup = float(results["trl"]["training_s"]) / float(results["ours"]["training_s"])
    if args.json:
        summary = {"target": args.target, "evaluate_every": args.every, "speedup": speedup}
        print(json.dumps(summary | results | {"machine": machine(), "differences": DIFFERENCES}, indent=2))
        return
    for name, result in results.items():
        if result["steps"] is None:
            best = max((point["accuracy"] for point in result["curve"]), default=0.0)
            print(f"{name:>4}: accuracy {args.target:g} not reached in {args.max_steps} steps, best {best:.2f}")
        else:
            seconds = f"{result['training_s']:.0f} s of training, {result['with_startup_s']:.0f} s with start-up"
            print(f"{name:>4}: accuracy {args.target:g} after {result['steps']} steps, {seconds}")
    if speedup is not None:
        print(f"speed-up {speedup:.2f}")


if __name__ == "__main__":
    main()
