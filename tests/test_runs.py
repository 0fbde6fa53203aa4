"""Whole runs through the command line, in processes of their own: real vLLM, real signals, real sweeps."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import psutil
import pytest

from rlvr_lightning.jsonl import read_jsonl

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def fit_arguments(model: Path, root: Path, *, engine: str = "vllm.VLLMEngine", steps: int) -> list[str]:
    """Arguments of `rlvr fit` for the tiny model: one problem, 2 x 4 rollouts of 8 tokens, no evaluation."""
    return [
        *("--model.policy.model", str(model)),
        *("--model.optimizer.lr", "1e-4"),
        *(
            "--data",
            "SingleExampleDataModule",
            "--data.question",
            "3 + 4",
            "--data.answer",
            "7",
            "--data.problems_per_step",
            "2",
        ),
        *("--rollout.engine", f"rlvr_lightning.engines.{engine}"),
        *("--rollout.sampling.rollouts_per_problem", "4", "--rollout.sampling.temperature", "0.8"),
        *("--rollout.sampling.max_tokens", "8", "--rollout.eval_sampling.max_tokens", "8"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", str(steps), "--trainer.default_root_dir", str(root)),
    ]


def start(*arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlvr_lightning", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        start_new_session=True,  # whatever it leaves behind is found by its session
    )


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if (match := re.match(r"step +(\d+)", line)) and int(match[1]) >= step:
            return
    raise AssertionError(f"the run ended before step {step}")


def processes_of_session(session: int) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, ProcessLookupError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.vllm
def test_memory_stays_flat_over_300_steps_and_no_process_is_left(tiny_model: Path, tmp_path: Path) -> None:
    process = start("fit", *fit_arguments(tiny_model, tmp_path / "run", steps=300))
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-3000:]
    memory = [row["memory/rss_gib"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "memory/rss_gib" in row]
    assert len(memory) == 300
    after_warm_up, end = mean(memory[20:40]), mean(memory[-20:])
    assert end - after_warm_up < 0.03, f"{after_warm_up:.3f} GiB after step 20, {end:.3f} GiB at the end"
    assert processes_of_session(process.pid) == []


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_a_checkpoint_that_resumes(
    tiny_model: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    root = tmp_path / "run"
    process = start("fit", *fit_arguments(tiny_model, root, steps=60))
    wait_for_step(process, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output[-3000:]
    assert f"--ckpt_path {root}/checkpoints/interrupted.ckpt" in output
    assert processes_of_session(process.pid) == []
    done = max(row["step"] for row in read_jsonl(root / "history.jsonl"))
    assert 2 <= done < 59

    resumed = start(
        "fit", "--config", str(root / "run.yaml"), "--ckpt_path", str(root / "checkpoints" / "interrupted.ckpt"),
        "--trainer.max_steps", str(done + 4),
    )  # fmt: skip
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output[-3000:]
    steps = [row["step"] for row in read_jsonl(root / "history.jsonl") if row["slot"] == 0]
    assert steps == list(range(done + 4))  # every step once, none missing
    logged = [row["step"] for row in read_jsonl(root / "metrics.jsonl") if "train/loss" in row]
    assert logged == list(range(1, done + 5))


@pytest.mark.slow
def test_a_second_interrupt_ends_a_run_at_once(tiny_model: Path, tmp_path: Path) -> None:
    process = start("fit", *fit_arguments(tiny_model, tmp_path / "run", engine="hf.HFEngine", steps=100000))
    wait_for_step(process, 2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - started < 30
    assert processes_of_session(process.pid) == []


@pytest.mark.slow
def test_a_multirun_trains_every_combination_and_ends_with_a_table(tiny_model: Path, tmp_path: Path) -> None:
    process = start(
        "sweep", "-m", "experiment=quickstart", "rollout=hf", "model.objective.entropy_coef=0,0.001,.nan",
        "trainer.max_steps=1", "evaluate_first=false", "seed_everything=0,1",
        f"model.policy.model={tiny_model}", "rollout.sampling.max_tokens=8",
        "trainer.val_check_interval=100",
        cwd=tmp_path,
    )  # fmt: skip
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output[-3000:]  # two jobs of the six fail, and the others are not lost
    [sweep] = (tmp_path / "runs" / "sweep").iterdir()
    head, *rows = output[output.index("setting") :].splitlines()
    assert head.split() == ["setting", "jobs", "rollout/reward", "train/entropy"]
    assert [row.split()[:2] for row in rows[:3]] == [
        ["entropy_coef=0", "2"], ["entropy_coef=0.001", "2"], ["entropy_coef=.nan", "0/2"]
    ]  # fmt: skip
    assert [f"job {number} failed with exit status 2" in output for number in range(6)] == [False] * 4 + [True] * 2
    assert "objective.entropy_coef is nan" in output
    assert (sweep / "figure.png").stat().st_size > 10_000
    assert [row["failed"] for row in json.loads((sweep / "table.json").read_text())] == [[], [], [4, 5]]
    for number, coefficient in ((0, 0), (3, 0.001)):
        folder = sweep / str(number)
        assert f"runs/sweep/{sweep.name}/{number}" in output
        assert f"entropy_coef: {coefficient}" in (folder / "run.yaml").read_text()
        assert any("train/loss" in row for row in read_jsonl(folder / "metrics.jsonl"))


@pytest.mark.parametrize("override", ["model.objective.entropi_coef=0", "experiment=quikstart", "rollout=no-such-engine"])
def test_a_misspelled_override_is_one_message(tmp_path: Path, override: str) -> None:
    process = start("sweep", "experiment=quickstart", override, cwd=tmp_path)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert override.split("=")[0].split(".")[-1] in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_failed_job_ends_the_sweep_with_its_own_message(tmp_path: Path) -> None:
    process = start("sweep", "experiment=quickstart", "model.policy.model=./no-such-folder", f"hydra.run.dir={tmp_path}")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "model folder './no-such-folder' does not exist" in output


@pytest.mark.slow
@pytest.mark.vllm
def test_quickstart_trains_the_real_llm_and_exports_what_both_libraries_load(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "rlvr_lightning", "quickstart", "--steps", "1", "--engine", "vllm", "--out", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= {
        "train_problem", "engine", "model", "steps", "seconds_total", "seconds_training", "accuracy_before", "accuracy_after",
    }  # fmt: skip
    assert summary["engine"] == "vllm"
    assert set(summary["accuracy_after"]) == {"addition_1digit", "subtraction_1digit", "addition_2digit"}
    assert summary["accuracy_before"]["addition_1digit"] <= 0.2
    assert (out / "figure.png").stat().st_size > 10_000
    load = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert m.dtype == torch.bfloat16, m.dtype\n"
        "from rlvr_lightning.engines.vllm import import_vllm\n"
        "vllm = import_vllm(); llm = vllm.LLM(sys.argv[1], enforce_eager=True, max_model_len=128, dtype='auto')\n"
        "ids = t('What is 3 + 4?').input_ids\n"
        "out = llm.generate(vllm.TokensPrompt(prompt_token_ids=ids), vllm.SamplingParams(max_tokens=1, temperature=0))\n"
        "assert out[0].outputs[0].token_ids[0] == m(torch.tensor([ids])).logits[0, -1].argmax().item()\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", load, str(out / "final")],
        capture_output=True, text=True, timeout=200, env={**environment, "VLLM_CPU_KVCACHE_SPACE": "1"}, check=False,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr[-3000:]
