"""What the doctor says of made-up and of real machines, and of configurations."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from huggingface_hub import constants

from rlvr_lightning import doctor
from rlvr_lightning.doctor import Finding, Process
from rlvr_lightning.errors import ConfigError


def by_subject(findings: Any) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


# --- the machine -------------------------------------------------------------------------------------------------------


def test_this_machine_is_described_in_one_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    status = doctor.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning", "error"}
    assert status == any(line.startswith("error") for line in lines)
    subjects = " ".join(lines)
    for subject in ("python", "torch", "transformers", "vllm", "peft", "wandb", "cores", "memory", "/dev/shm", "hub", "W&B"):
        assert f" {subject} " in subjects, subject


def install(folder: Path, name: str, version: str, *requirements: str) -> None:
    """Write the metadata of a distribution, as pip would leave it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Requires-Python: >=3.11"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requirements)]) + "\n")


def test_versions_are_compared_with_the_ranges_of_the_installed_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(
        tmp_path,
        "made-up",
        "1.0",
        "fits-well<2,>=1",
        "too_old>=3",
        "missing-one<5",
        "vllm<0.33,>=0.26; extra == 'vllm'",
        "made-up-peft>=1; extra == 'peft'",
        "of-developers>=1; extra == 'dev'",
    )
    install(tmp_path, "fits_well", "1.5rc1")
    install(tmp_path, "too-old", "2.9")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = by_subject(doctor.packages("made-up"))
    assert found["fits-well"].level == "ok"
    assert "(" not in found["fits-well"].text.replace("(<2,>=1)", "")
    assert (found["too_old"].level, found["too_old"].text) == (
        "warning",
        "2.9 is not in the tested range: pip install 'too_old>=3'",
    )
    assert (found["missing-one"].level, found["missing-one"].text) == ("error", "not installed: pip install 'missing-one<5'")
    assert found["made-up-peft"].level == "ok"
    assert "rlvr-lightning[peft]" in found["made-up-peft"].text
    assert "of-developers" not in found
    assert found["python"].level == "ok"


def test_without_metadata_ranges_are_unknown() -> None:
    (finding,) = doctor.packages("not-installed-at-all")
    assert finding.level == "warning"


@pytest.mark.parametrize(("quota", "threads", "level"), [("50000 100000", 2, "warning"), ("max 100000", 1, "ok")])
def test_more_threads_than_cores_are_a_warning(tmp_path: Path, quota: str, threads: int, level: str) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        finding = doctor.cores(tmp_path / "cpu.max", tmp_path)
    finally:
        torch.set_num_threads(before)
    assert finding.level == level
    assert ("OMP_NUM_THREADS=1" in finding.text) == (level == "warning")


def test_a_quota_of_version_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "cpu.cfs_quota_us").write_text("25000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert "0.25 granted" in doctor.cores(tmp_path / "none", tmp_path).text


def test_little_space_is_a_warning_and_a_folder_that_is_read_only_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "LOW_GIB", dict.fromkeys(doctor.LOW_GIB, 1e9))
    assert {f.level for f in doctor.disks()} == {"warning"}
    assert doctor.memory().level == "warning"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert by_subject(doctor.disks())["current folder"].level == "error"


def test_helpers_whose_run_is_gone_are_listed() -> None:
    run = Process(10, (1,), "/venv/bin/python -m rlvr_lightning fit --config a.yaml", 3.0, "")
    server = "python supervise.py 10 /tmp/rlvr-server-x python -m vllm.entrypoints.openai.api_server"
    found = [
        run,
        Process(11, (10, 1), server, 0.0, ""),
        Process(12, (11, 10, 1), "VLLM::EngineCore", 1.0, "/tmp/rlvr-server-x"),
        Process(20, (1,), server, 0.0, ""),
        Process(21, (20, 1), "VLLM::EngineCore", 1.0, "/tmp/rlvr-server-y"),
        Process(30, (31, 1), "python -m rlvr_lightning.grading.worker 1 2", 0.1, ""),  # of somebody's script
        Process(40, (1,), "rlvr quickstart", 0.1, ""),
        Process(41, (1,), "vim rlvr_lightning/fit.py", 0.1, ""),
    ]
    lines = list(doctor.processes(found))
    assert [re.findall(r"kill (\d+)", line.text) for line in lines if line.subject == "left over"] == [["20"], ["21"]]
    assert [re.findall(r"process (\d+)", line.text) for line in lines if line.subject == "running"] == [["10"], ["40"]]
    assert [line.level for line in doctor.processes([run])] == ["ok", "ok"]


def test_a_real_helper_that_lost_its_parent_is_found_and_left_alone() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)", "/tmp/rlvr-server-orphan"]
    starter = f"import subprocess as s; print(s.Popen({sleeper!r}, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
    pid = int(subprocess.run([sys.executable, "-c", starter], check=True, capture_output=True, text=True).stdout)
    process = psutil.Process(pid)
    try:
        deadline = time.monotonic() + 10
        while process.ppid() != 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.ppid() != 1:
            pytest.skip("orphans of this system are handed to another process than 1")
        assert any(str(pid) in line.text for line in doctor.processes() if line.subject == "left over")
        assert process.is_running()
    finally:
        process.kill()


def test_a_hub_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        found = by_subject(doctor.hub())
    assert found["hub"].level == "warning"
    assert "HF_HUB_OFFLINE=1" in found["hub"].text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert by_subject(doctor.hub())["hub"].level == "ok"


# --- a configuration ---------------------------------------------------------------------------------------------------


@pytest.fixture
def examine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Write a run on the tiny model; return what the doctor says of it with the given overrides."""
    config = {
        "model": {"policy": {"model": str(tiny_model)}, "optimizer": {"lr": 1e-3}},
        "data": {
            "class_path": "rlvr_lightning.data.SingleExampleDataModule",
            "init_args": {"question": "What is 3 + 4?", "answer": "7", "problems_per_step": 2},
        },
        "rollout": {
            "engine": {"class_path": "rlvr_lightning.engines.hf.HFEngine"},
            "sampling": {"rollouts_per_problem": 4, "max_tokens": 16},
            "eval_sampling": {"max_tokens": 16},
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2, "default_root_dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlvr"])

    def run(*overrides: str) -> tuple[int, str]:
        status = doctor.main(["doctor", "--config", str(tmp_path / "run.yaml"), *overrides])
        return status, capsys.readouterr().out

    return run


def test_a_configuration_is_checked_and_planned_and_nothing_is_written(
    examine: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    status, said = examine()
    assert status == 0, said
    assert "libraries             0.55 GiB" in said
    assert "ok      memory            fits: up to 0.6 GiB" in said
    assert "model.tokens_per_micro_batch: 16384 fits" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_overrides_count(examine: Callable[..., tuple[int, str]]) -> None:
    budget = ["--model.tokens_per_micro_batch", "50"]
    assert "micro-batch of 50 tokens" not in examine()[1]
    few = examine(*budget, "--model.policy.share_prefixes", "false")[1]
    assert "16384" not in few
    assert "50 fits" in few


def test_what_a_fit_would_refuse_is_an_error_line_and_the_plan_is_printed_all_the_same(
    examine: Callable[..., tuple[int, str]],
) -> None:
    status, said = examine("--rollout.sampling.temperature", "0")
    assert status == 1
    assert "error   sampling          rollout.sampling.temperature is 0" in said
    assert "at most" in said


def test_a_model_that_is_not_there_ends_the_report(examine: Callable[..., tuple[int, str]]) -> None:
    status, said = examine("--model.policy.model", "/no/such/folder")
    assert status == 1
    assert "error   model" in said
    assert "at most" not in said


def test_a_misspelled_key_is_refused(examine: Callable[..., tuple[int, str]]) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        examine("--model.objective.kl_coeff", "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must not be there")
def test_a_run_for_a_gpu_is_planned_without_one(examine: Callable[..., tuple[int, str]]) -> None:
    status, said = examine("--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed")
    assert status == 1
    assert "error   trainer" in said
    assert "needs up to" in said


def test_a_model_too_large_for_this_machine_is_an_error(
    examine: Callable[..., tuple[int, str]], tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    LlamaConfig(
        vocab_size=96, hidden_size=65536, intermediate_size=65536, num_hidden_layers=4, num_attention_heads=512
    ).save_pretrained(tmp_path / "huge")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "huge")
    status, said = examine("--model.policy.model", str(tmp_path / "huge"))
    assert status == 1
    assert "does not fit" in said
    assert "whatever the rollouts" in said


@pytest.mark.vllm
def test_the_quickstart_is_composed_as_the_sweep_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlvr"])
    assert doctor.main(["doctor", "experiment=quickstart", "model.tokens_per_micro_batch=512"]) in (0, 1)
    said = capsys.readouterr().out
    assert "engine cache" in said
    assert "micro-batch of 512 tokens" in said
    with pytest.raises(ConfigError, match="does not compose"):
        doctor.main(["doctor", "experiment=nothing"])
