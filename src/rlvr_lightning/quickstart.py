"""``rlvr quickstart``: a real LLM learns from one example on this machine, and the run explains itself at the end.

It is the experiment ``conf/experiment/quickstart.yaml`` and nothing else: composed from the same files as any other run,
trained by the same command line, then read back from its log files.
"""

import json
import time
from pathlib import Path
from typing import Any, Literal

import jsonargparse
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlvr_lightning.engines.vllm import VLLMEngine, import_vllm
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.jsonl import read_jsonl
from rlvr_lightning.models import bf16_speedup
from rlvr_lightning.plots import plot_run, read_curves
from rlvr_lightning.startup import imports
from rlvr_lightning.sweep import conf_dir

EVALS = ("addition_1digit", "subtraction_1digit", "addition_2digit")


def main(args: list[str]) -> int:
    """Parse the command line (its first word is ``quickstart``) and run; return the exit status."""
    status = jsonargparse.auto_cli(quickstart, args=args[1:], as_positional=False)
    assert isinstance(status, int)
    return status


def quickstart(
    question: str = "What is 3 + 4?",
    answer: str = "7",
    engine: Literal["auto", "vllm", "hf"] = "auto",
    seed: int = 0,
    steps: int = 30,
    out: Path = Path("runs/quickstart"),
) -> int:
    """Train SmolLM2-135M-Instruct on one problem and evaluate it on others before and after.

    Args:
        question: the one training problem.
        answer: its ground truth.
        engine: what samples; auto takes vLLM where it runs, else transformers.
        seed: decides every rollout.
        steps: optimizer updates, each on 64 rollouts.
        out: run directory; an earlier one is kept under another name.
    """
    started = time.time()
    if steps < 1:
        raise ConfigError(f"--steps is {steps}: set it to 1 or more")
    name = _choose_engine() if engine == "auto" else engine
    _keep_earlier_run(out)
    out.mkdir(parents=True)
    config = out / "run.yaml"
    OmegaConf.save(_compose(question, answer, name, seed, steps, out), config)

    with imports():
        from rlvr_lightning.cli import run  # after the vLLM import has set its environment

    status, _ = run(["fit", "--config", str(config)])
    if status:
        return status
    summary = _summary(out, question, answer, name, seed, steps, time.time() - started)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_run(
        out,
        out / "figure.png",
        title=f"SmolLM2-135M-Instruct, trained on {question!r} alone ({steps} steps of 64 rollouts)",
    )
    _report(out, summary)
    return 0


def _choose_engine() -> str:
    try:
        VLLMEngine().check()
        import_vllm()
    except Exception as error:  # an import may fail in any way on a machine that vLLM does not know
        print(f"vLLM cannot run here ({str(error).splitlines()[0]}); sampling with transformers instead, which is slower")
        return "hf"
    return "vllm"


def _compose(question: str, answer: str, engine: str, seed: int, steps: int, out: Path) -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", ["experiment=quickstart", f"rollout={engine}"])
    cfg.seed_everything = seed
    cfg.data.init_args.question, cfg.data.init_args.answer = question, answer
    cfg.trainer.max_steps = steps
    cfg.trainer.val_check_interval = 5 if steps % 5 == 0 else steps  # the last step is always evaluated
    cfg.trainer.default_root_dir = str(out)
    if bf16_speedup() < 1:
        cfg.trainer.precision = "32-true"
    return cfg


def _keep_earlier_run(out: Path) -> None:
    if out.exists():
        earlier = out.with_name(f"{out.name}-until-{time.strftime('%Y%m%d-%H%M%S', time.localtime(out.stat().st_mtime))}")
        out.rename(earlier)
        print(f"kept the earlier run as {earlier}")


def _summary(out: Path, question: str, answer: str, engine: str, seed: int, steps: int, seconds: float) -> dict[str, Any]:
    curves = read_curves(out)
    accuracy = {name: curves[f"val/{name}/accuracy"] for name in EVALS}
    return {
        "train_problem": {"question": question, "answer": answer},
        "engine": engine,
        "model": "SmolLM2-135M-Instruct",
        "steps": steps,
        "seed": seed,
        "seconds_total": round(seconds, 1),
        "seconds_training": round(sum(value for _, value in curves["time/step_s"]), 1),
        "saturation": json.loads((out / "summary.json").read_text())["saturation"],
        "accuracy_before": {name: round(curve[0][1], 4) for name, curve in accuracy.items()},
        "accuracy_after": {name: round(curve[-1][1], 4) for name, curve in accuracy.items()},
    }


def _report(out: Path, summary: dict[str, Any]) -> None:
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    print(f"\ngreedy accuracy          before   after     (trained on {summary['train_problem']['question']!r} alone)")
    for name in EVALS:
        print(f"  {name:<20}   {before[name]:6.2f}  {after[name]:6.2f}")
    steps = summary["steps"]
    for name in ("addition_1digit", "addition_2digit"):
        old = list(read_jsonl(out / "rollouts" / f"{name}-{0:08d}.jsonl"))
        new = {row["problem_id"]: row for row in read_jsonl(out / "rollouts" / f"{name}-{steps:08d}.jsonl")}
        for row in old[:: max(1, len(old) // 2)][:2]:
            print(f"\n  {row['problem_id']}   before: {_one_line(row)}")
            print(f"  {' ' * len(row['problem_id'])}   after:  {_one_line(new[row['problem_id']])}")
    print(
        f"\n{summary['seconds_total']:.0f} s in all, {summary['seconds_training']:.0f} s of them training. Written to {out}/: "
        "summary.json, metrics.jsonl, rollouts/, history.jsonl, figure.png, and final/, which transformers and vLLM load.\n\n"
        "next: another problem      rlvr quickstart --question 'What is 5 + 3?' --answer 8\n"
        "      without the entropy  rlvr sweep -m experiment=quickstart model.objective.entropy_coef=0,0.001"
    )


def _one_line(row: dict[str, Any]) -> str:
    text = " ".join(row["text"].split())
    return f"{text[:90]}{'...' if len(text) > 90 else ''}   [{row['reason']}]"
