"""What only a GPU can show: a policy of 1.5B in bfloat16, an engine that sleeps beside it, and the plan for their memory."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import write_tiny_model
from rlvr_lightning.batching import RolloutBatch
from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.data import SingleExampleDataModule
from rlvr_lightning.engines import Sampling
from rlvr_lightning.engines.vllm import VLLMEngine
from rlvr_lightning.losses import Objective
from rlvr_lightning.memory import plan_run
from rlvr_lightning.memory_plan import GIB
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.passes import score
from rlvr_lightning.policy import PolicyConfig, PolicyWeights
from rlvr_lightning.records import Problem, Rollout, Score
from test_fsdp2 import NoDigit, train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a policy of 1.5B and its engine: needs a GPU")
PROMPT = (20, 30, 40)


def qwen_1_5b(folder: Path) -> Path:
    """Save a model of the shape of Qwen2.5-1.5B with random weights, and the tests' tokenizer."""
    write_tiny_model(folder)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_1_5b(tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[needs_gpu, pytest.mark.gpu, pytest.mark.slow])])
def test_a_step_in_bfloat16_is_that_in_float32_up_to_rounding(request: pytest.FixtureRequest, tmp_path: Path, device: str):
    model = request.getfixturevalue("large_model" if device == "cuda" else "tiny_model")
    runs = {}
    for precision in ("32-true", "bf16-mixed"):
        _, record = train(str(model), tmp_path / precision, world=1, accelerator=device, precision=precision, steps=2)
        runs[precision] = record.metrics
    for full, low in zip(runs["32-true"], runs["bf16-mixed"], strict=True):
        assert low["mismatch/bias"] == pytest.approx(full["mismatch/bias"], abs=0.03)  # of log-probs given as -3
        assert low["train/entropy"] == pytest.approx(full["train/entropy"], rel=0.02)
        assert low["train/grad_norm"] == pytest.approx(full["train/grad_norm"], rel=0.1)
    assert runs["32-true"][0]["mismatch/bias"] != runs["32-true"][1]["mismatch/bias"]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.vllm
def test_an_engine_that_sleeps_gives_its_memory_back_and_wakes_with_the_weights_it_is_given(large_model: Path):
    policy = PolicyConfig(model=str(large_model)).build().to("cuda")
    engine, greedy = VLLMEngine(gpu_memory_utilization=0.2), Sampling(rollouts_per_problem=1, temperature=0.0, max_tokens=24)
    try:
        outputs = []
        before = torch.cuda.mem_get_info()[0]
        for version in (0, 1):
            engine.sync(PolicyWeights(policy, torch.bfloat16), version, window=64)
            held = before - torch.cuda.mem_get_info()[0]
            outputs.append(engine.generate([PROMPT], greedy, [[0]])[0][0].token_ids)
            engine.sleep()
            assert engine.version is None
            assert before - torch.cuda.mem_get_info()[0] < held / 3
        assert outputs[0] == outputs[1]
    finally:
        engine.close()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.vllm
def test_the_engine_and_the_learner_agree_about_a_policy_of_1_5b(large_model: Path):
    policy = PolicyConfig(model=str(large_model)).build().to("cuda")
    engine, sampling = VLLMEngine(gpu_memory_utilization=0.2), Sampling(rollouts_per_problem=8, temperature=0.6, max_tokens=64)
    try:
        engine.sync(PolicyWeights(policy, torch.bfloat16), 0, window=128)
        ((*completions,),) = engine.generate([PROMPT], sampling, [range(8)])
    finally:
        engine.close()
    verdict = Score(0.0, False, "wrong", None)
    rollouts = [Rollout(Problem("p", "q", "1"), PROMPT, completion, verdict, 0.6, 0) for completion in completions]
    data = RolloutBatch.from_rollouts(rollouts).to("cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        logprobs = score(data, policy, 16384)[0]
    assert (logprobs - data.sampler_logprobs)[data.completion_mask].abs().mean() < 0.05


@contextmanager
def watching() -> Iterator[list[float]]:
    """Collect how much of the GPU is in use, GiB, fifty times a second."""
    seen, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            seen.append((total - free) / GIB)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.vllm
def test_the_plan_for_a_gpu_is_near_the_measured_peak(large_model: Path, tmp_path: Path):
    source = RolloutCallback(
        engine=VLLMEngine(gpu_memory_utilization=0.2),
        sampling=Sampling(rollouts_per_problem=8, temperature=1.0, max_tokens=256),
        verifier=NoDigit(),
    )
    trainer = Trainer(
        accelerator="cuda",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        inference_mode=False,
        num_sanity_val_steps=0,
        max_steps=2,
        default_root_dir=tmp_path,
        callbacks=[source],
    )
    policy = PolicyConfig(model=str(large_model))
    module = RLVRModule(policy=policy, objective=Objective(kl_coef=0.001), tokens_per_micro_batch=4096)
    data = SingleExampleDataModule(question="say a word", answer="1", problems_per_step=4)
    with watching() as seen:
        trainer.fit(module, datamodule=data)
    plan = plan_run(module, trainer, data, source, window=512)
    print(plan, f"measured {max(seen):.1f} GiB")
    assert 0.75 < plan.total / max(seen) < 1.25
