"""Whole training steps with a real Trainer, HFEngine and a tiny model: what moves the weights, what must not, what resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlvr_lightning.batching import share_of_rank
from rlvr_lightning.callbacks.checkpoint import CheckpointCallback
from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.data import ProblemDataModule, ProblemLoader, SingleExampleDataModule, SubsetDataModule
from rlvr_lightning.engines import Sampling, WeightSource
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.losses import LossTerms, Objective
from rlvr_lightning.models import bf16_speedup
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.optimizer import AdamW
from rlvr_lightning.policy import LoRA, PolicyConfig
from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.records import Completion, Problem, ProblemBatch, Rollout, Score
from rlvr_lightning.rollout import Collector
from rlvr_lightning.schedule import Schedule

EOS = PAD = 0
OFF = Objective(policy_coef=1.0, kl_coef=0.0, entropy_coef=0.0)
SAMPLING = Sampling(rollouts_per_problem=4, temperature=1.0, max_tokens=8)
PLAIN = AdamW(lr=1e-3, weight_decay=0.0)


# --- what the runs are made of -----------------------------------------------------------------------------------------


@dataclass
class RuleVerifier:
    """Reward 1 for a text that follows the rule."""

    rule: Callable[[str], bool]

    def __call__(self, pairs: Sequence[tuple[Problem, Completion]]) -> list[Score]:
        verdicts = [self.rule(completion.text) for _, completion in pairs]
        return [Score(float(v), v, "correct" if v else "wrong", None) for v in verdicts]

    def check(self, problems: Sequence[Problem]) -> None:
        """Any answer will do."""

    def close(self) -> None:
        """Nothing to free."""


def no_digit(text: str) -> bool:
    return not any(c.isdigit() for c in text)


class Scripted(Callback):
    """Attaches given rollouts instead of sampling any."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.rollouts = rollouts

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: ProblemBatch, batch_idx: int) -> None:
        batch.problems = tuple({id(r.problem): r.problem for r in self.rollouts}.values())
        batch.slots = tuple(range(len(batch.problems)))
        batch.group_size = len(self.rollouts) // len(batch.problems)
        batch.rollouts = self.rollouts


@dataclass
class Record(Callback):
    """What happened: batches, metrics and versions per step, gradients and weights per update."""

    batches: list[ProblemBatch] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in parameters(pl_module).items() if p.grad is not None})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.versions.append(pl_module.policy_version)

    def rollouts(self) -> list[list[Rollout]]:
        return [batch.rollouts or [] for batch in self.batches]


class MoveAtStart(Callback):
    """Moves the policy away from the reference before the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        move(pl_module.policy.lm)


@torch.no_grad()
def move(lm: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    for parameter in lm.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def parameters(module: RLVRModule) -> dict[str, Tensor]:
    return dict(module.policy.lm.named_parameters())


def weights(module: RLVRModule) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in parameters(module).items()}


@dataclass
class Run:
    trainer: Trainer
    module: RLVRModule
    record: Record


def fit(
    model: Path,
    root: Path,
    *extra: Callback,
    steps: int = 1,
    rollouts: list[Rollout] | None = None,
    engine: HFEngine | None = None,
    sampling: Sampling = SAMPLING,
    rule: Callable[[str], bool] = no_digit,
    data: ProblemDataModule | None = None,
    problems_per_step: int = 2,
    share_prefixes: bool | None = None,
    lora: LoRA | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Run:
    """Train on given rollouts, or on those that the engine samples; ``steps`` counts updates."""
    record = Record()
    source = (
        Scripted(rollouts)
        if rollouts is not None
        else RolloutCallback(engine=engine or HFEngine(), sampling=sampling, verifier=RuleVerifier(rule))
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, CheckpointCallback) for c in extra),
        inference_mode=False,
        num_sanity_val_steps=0,
        max_steps=steps,
        default_root_dir=root,
        callbacks=[source, record, *extra],
    )
    module = RLVRModule(
        policy=PolicyConfig(model=str(model), share_prefixes=share_prefixes, lora=lora), **({"optimizer": PLAIN} | settings)
    )
    data = data or SingleExampleDataModule(question="say a word", answer="1", problems_per_step=problems_per_step)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return Run(trainer, module, record)


def rollout(problem: Problem, prompt: Sequence[int], completion: Sequence[int], reward: float) -> Rollout:
    made = Completion(tuple(completion), (-1.0,) * len(completion), "", "stop" if completion[-1] == EOS else "length")
    return Rollout(problem, tuple(prompt), made, Score(reward, reward == 1, "wrong", None), 0.6, 0)


def crafted() -> list[Rollout]:
    """Two groups of four of lengths 1 to 12. End-of-sequence is also the padding id, and two completions are nothing else."""
    first, second = Problem("a", "?", "1"), Problem("b", "??", "2")
    p, q = tuple(range(10, 16)), tuple(range(60, 69))
    return [
        rollout(first, p, (20, 21, 22, EOS), 1.0),
        rollout(first, p, (EOS,), 0.0),
        rollout(first, p, tuple(range(30, 42)), 0.0),
        rollout(first, p, (50, EOS), 1.0),
        rollout(second, q, (21, 22, 23, 24, 25, 26, EOS), 0.0),
        rollout(second, q, (31, 32), 0.0),
        rollout(second, q, (EOS,), 1.0),
        rollout(second, q, (41, 42, 43), 0.0),
    ]


def silent_crafted() -> list[Rollout]:
    """The same without any advantage: every reward is 1."""
    return [rollout(r.problem, r.prompt_ids, r.completion.token_ids, 1.0) for r in crafted()]


def gradient_by_hand(model: Path, *, count_eos: bool = True) -> dict[str, Tensor]:
    """Of surrogate + 0.1 KL - 0.05 H on ``crafted()``, for a moved policy, one row at a time, in float64.

    At ratio 1 the gradient of the surrogate is that of -A log p.
    """
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    move(policy)
    policy.double()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    # group 1: (1, 0, 0, 1), mean 1/2, std sqrt(1/3); group 2: (0, 0, 1, 0), mean 1/4, std 1/2
    advantages = [a / (3**-0.5 + 1e-6) for a in (0.5, -0.5, -0.5, 0.5)] + [
        a / (0.5 + 1e-6) for a in (-0.25, -0.25, 0.75, -0.25)
    ]
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row, advantage in zip(crafted(), advantages, strict=True):
        start, completion = len(row.prompt_ids), row.completion.token_ids
        kept = range(len(completion) - (completion[-1] == EOS and not count_eos))
        ids = torch.tensor([row.prompt_ids + completion])
        log_p = (policy(ids).logits[0] / 0.6).log_softmax(-1)
        with torch.no_grad():
            log_ref = (reference(ids).logits[0] / 0.6).log_softmax(-1)
        for t in kept:
            now, ref = log_p[start + t - 1], log_ref[start + t - 1, completion[t]]
            d = ref - now[completion[t]]
            total = (
                total - advantage * now[completion[t]] + 0.1 * (d.exp() - d - 1).clamp(max=10) + 0.05 * (now.exp() * now).sum()
            )
            tokens += 1
    assert tokens == (32 if count_eos else 27)  # 4 + 1 + 12 + 2 + 7 + 2 + 1 + 3 = 32, five of them end-of-sequence
    (total / tokens).backward()
    return {n: p.grad.float() for n, p in policy.named_parameters()}


def relative_gap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of any weight's gradient, in units of its largest entry."""
    assert first.keys() == second.keys()
    return max(float((first[n] - second[n]).abs().max() / second[n].abs().max()) for n in first)


def assert_weights_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


# --- the gradient ------------------------------------------------------------------------------------------------------

CUTS = [(10**6, True), (10**6, False), (40, True), (40, False), (1, True), (1, False)]


@pytest.mark.parametrize(("tokens_per_micro_batch", "share_prefixes"), CUTS)
def test_gradient_does_not_depend_on_the_micro_batch_cut_and_equals_the_sum_by_hand(
    tiny_model: Path, tmp_path: Path, tokens_per_micro_batch: int, share_prefixes: bool
):
    run = fit(
        tiny_model,
        tmp_path,
        MoveAtStart(),
        rollouts=crafted(),
        objective=Objective(kl_coef=0.1, entropy_coef=0.05),
        tokens_per_micro_batch=tokens_per_micro_batch,
        share_prefixes=share_prefixes,
        max_grad_norm=float("inf"),
        mismatch_limit=float("inf"),
    )
    (gradient,) = run.record.gradients
    assert relative_gap(gradient, gradient_by_hand(tiny_model)) < 2e-5
    assert run.record.metrics[0]["train/tokens"] == 32


def test_the_sampled_end_of_sequence_is_trained_and_padding_is_not(tiny_model: Path, tmp_path: Path):
    run = fit(
        tiny_model,
        tmp_path,
        MoveAtStart(),
        rollouts=crafted(),
        objective=Objective(kl_coef=0.1, entropy_coef=0.05),
        max_grad_norm=float("inf"),
        mismatch_limit=float("inf"),
    )
    (gradient,) = run.record.gradients
    assert relative_gap(gradient, gradient_by_hand(tiny_model)) < 2e-5
    # A mask that compared with the padding id would lose five tokens, and this much of the gradient:
    assert relative_gap(gradient, gradient_by_hand(tiny_model, count_eos=False)) > 0.05


def test_the_gradient_is_clipped_to_the_global_norm(tiny_model: Path, tmp_path: Path):
    loose = fit(tiny_model, tmp_path, rollouts=crafted(), max_grad_norm=1e9, mismatch_limit=float("inf"))
    tight = fit(tiny_model, tmp_path, rollouts=crafted(), max_grad_norm=0.5, mismatch_limit=float("inf"))

    def norm(run: Run) -> float:
        return float(torch.stack([g.square().sum() for g in run.record.gradients[0].values()]).sum().sqrt())

    assert norm(loose) > 1
    assert norm(tight) == pytest.approx(0.5, rel=1e-4)
    for run in (loose, tight):  # what is logged is the norm before the clip
        assert run.record.metrics[0]["train/grad_norm"] == pytest.approx(norm(loose), rel=1e-4)


# --- steps in which all rollouts scored the same -----------------------------------------------------------------------


def silent_run(model: Path, root: Path, objective: Objective, *extra: Callback, steps: int = 1) -> Run:
    return fit(model, root, *extra, rollouts=silent_crafted(), objective=objective, mismatch_limit=float("inf"), steps=steps)


def start_weights(model: Path, *, moved: bool = False) -> dict[str, Tensor]:
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if moved:
        move(lm)
    return {n: p.detach() for n, p in lm.named_parameters()}


def test_without_advantages_and_without_coefficients_nothing_moves_at_all(tiny_model: Path, tmp_path: Path):
    run = silent_run(tiny_model, tmp_path, OFF, MoveAtStart(), steps=3)
    assert len(run.record.gradients) == 3
    assert_weights_equal(weights(run.module), start_weights(tiny_model, moved=True))
    assert run.record.metrics[0]["rollout/zero_advantage_fraction"] == 1.0


def test_with_advantages_and_without_coefficients_the_weights_move(tiny_model: Path, tmp_path: Path):
    run = fit(tiny_model, tmp_path, rollouts=crafted(), objective=OFF, mismatch_limit=float("inf"))
    start = start_weights(tiny_model)
    assert all(not torch.equal(w, start[n]) for n, w in weights(run.module).items())
    assert run.record.metrics[0]["rollout/zero_advantage_fraction"] == 0.0


def test_learning_rate_by_update():
    def rates(**settings: Any) -> list[float]:
        return [AdamW(lr=1.0, **settings).lr_at(updates) for updates in range(6)]

    assert rates() == [1.0] * 6
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(warmup_steps=4, start_at_zero=True) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(start_at_zero=True) == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # the paper's code


def weights_after(model: Path, root: Path, **settings: Any) -> dict[str, Tensor]:
    limits = {"mismatch_limit": float("inf"), "max_grad_norm": float("inf")}
    return weights(fit(model, root, MoveAtStart(), rollouts=crafted(), **limits, **settings).module)


@pytest.mark.parametrize("reduction", ["token", "sequence", "micro_batch"])
def test_only_the_papers_reduction_depends_on_the_micro_batch_cut(tiny_model: Path, tmp_path: Path, reduction: Any):
    objective = Objective(kl_coef=0.1, entropy_coef=0.05, reduction=reduction)
    whole, cut = (
        weights_after(tiny_model, tmp_path, objective=objective, tokens_per_micro_batch=budget, share_prefixes=False)
        for budget in (1_000_000, 40)
    )
    gap = max(float((w - cut[n]).abs().max()) for n, w in whole.items())
    assert (gap > 1e-4) == (reduction == "micro_batch"), gap


def test_a_schedule_is_the_number_of_its_step(tiny_model: Path, tmp_path: Path):
    falling = Objective(kl_coef=0.0, entropy_coef=Schedule(start=0.1, end=0.0, steps=1))
    first = weights_after(tiny_model, tmp_path, objective=falling)
    assert_weights_equal(first, weights_after(tiny_model, tmp_path, objective=Objective(kl_coef=0.0, entropy_coef=0.1)))
    run = silent_run(tiny_model, tmp_path, falling, steps=3)  # from the second step on, nothing moves
    assert [float(sum(g.abs().sum() for g in gradients.values())) > 0 for gradients in run.record.gradients] == [
        True,
        False,
        False,
    ]


def test_a_kl_in_the_reward_is_a_reward_that_is_lower_by_it(tiny_model: Path, tmp_path: Path):
    objective = Objective(kl_coef=0.5, entropy_coef=0.0, kl_in="reward", kl_estimator="k1")
    run = fit(tiny_model, tmp_path, MoveAtStart(), rollouts=crafted(), objective=objective, mismatch_limit=1e9)
    assert run.record.metrics[0]["time/old_s"] > 0  # one update, and still it needs the policy's own log-probs
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    move(policy)
    rewards = []
    for row in crafted():
        ids, start = torch.tensor([row.prompt_ids + row.completion.token_ids]), len(row.prompt_ids)
        with torch.no_grad():
            now, ref = ((lm(ids).logits[0] / 0.6).log_softmax(-1) for lm in (policy, reference))
        gap = sum(float(now[t - 1, ids[0, t]] - ref[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
        rewards.append(row.score.reward - 0.5 * gap)
    lowered = [
        rollout(r.problem, r.prompt_ids, r.completion.token_ids, reward) for r, reward in zip(crafted(), rewards, strict=True)
    ]
    plain = Objective(kl_coef=0.0, entropy_coef=0.0)
    expected = fit(tiny_model, tmp_path, MoveAtStart(), rollouts=lowered, objective=plain, mismatch_limit=1e9)
    found, wanted = weights(run.module), weights(expected.module)
    assert max(float((found[n] - w).abs().max()) for n, w in wanted.items()) < 2e-5
    without = weights_after(tiny_model, tmp_path, objective=plain)
    assert max(float((found[n] - w).abs().max()) for n, w in without.items()) > 1e-3


@pytest.mark.parametrize(
    ("field", "value"), [("policy_loss", "gspo"), ("policy_loss", "cispo"), ("dual_clip", 1.5), ("importance_cap", 0.9)]
)
def test_every_switch_of_the_policy_loss_reaches_training(tiny_model: Path, tmp_path: Path, field: str, value: Any):
    """With several updates the ratio is not 1, so that each of them acts."""
    narrow: dict[str, Any] = {"kl_coef": 0.0, "entropy_coef": 0.0, "clip_low": 0.01, "clip_high": 0.01}
    changed, usual = (
        weights_after(tiny_model, tmp_path, objective=Objective(**(narrow | extra)), updates_per_step=4, steps=4)
        for extra in ({field: value}, {})
    )
    assert any(not torch.equal(w, usual[n]) for n, w in changed.items())


def test_k_of_pass_at_k_is_a_setting(tiny_model: Path, tmp_path: Path):
    two, four = (weights_after(tiny_model, tmp_path, advantage="pass_at_k", pass_k=k) for k in (2, 4))
    assert any(not torch.equal(w, four[n]) for n, w in two.items())


def test_the_norm_of_each_term_is_that_of_a_run_with_this_term_alone(tiny_model: Path, tmp_path: Path):
    def run(objective: Objective, **settings: Any) -> Run:
        limits = {"mismatch_limit": float("inf"), "max_grad_norm": float("inf"), "tokens_per_micro_batch": 30}
        return fit(tiny_model, tmp_path, MoveAtStart(), rollouts=crafted(), objective=objective, **limits, **settings)

    together = Objective(policy_coef=0.7, kl_coef=0.1, entropy_coef=0.05)
    measured = run(together, term_norms_every=1)
    off = {"policy_coef": 0.0, "kl_coef": 0.0, "entropy_coef": 0.0}
    for name, alone in (("surrogate", {"policy_coef": 0.7}), ("kl", {"kl_coef": 0.1}), ("entropy", {"entropy_coef": 0.05})):
        norm = run(Objective(**(off | alone))).record.metrics[0]["train/grad_norm"]
        assert measured.record.metrics[0][f"train/grad_norm_{name}"] == pytest.approx(norm, rel=1e-5)
        assert norm > 1e-3
    assert_weights_equal(weights(measured.module), weights(run(together).module))  # measuring leaves no trace
    assert measured.record.metrics[0]["rollout/effective_samples"] == 8


def test_norms_are_measured_when_due_and_only_of_terms_that_are_on(tiny_model: Path, tmp_path: Path):
    found: list[set[str]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            found.append({key for key in trainer.callback_metrics if key.startswith("train/grad_norm_")})
            trainer.callback_metrics.clear()

    objective = Objective(kl_coef=0.0, entropy_coef=0.1)
    silent_run(tiny_model, tmp_path, objective, Look(), steps=1)
    assert found == [set()]
    with pytest.raises(ConfigError, match="term_norms_every is -1"):
        fit(tiny_model, tmp_path, rollouts=crafted(), term_norms_every=-1)
    fit(tiny_model, tmp_path, Look(), rollouts=crafted(), objective=objective, term_norms_every=2, steps=1, mismatch_limit=1e9)
    assert found[1:] == [{"train/grad_norm_surrogate", "train/grad_norm_entropy"}]


def test_the_entropy_term_acts_without_advantages(tiny_model: Path, tmp_path: Path):
    up = silent_run(tiny_model, tmp_path, Objective(kl_coef=0.0, entropy_coef=0.1), steps=5)
    down = silent_run(tiny_model, tmp_path, Objective(kl_coef=0.0, entropy_coef=-0.1), steps=5)
    rising, falling = ([m["train/entropy"] for m in run.record.metrics] for run in (up, down))
    assert rising == sorted(rising)
    assert rising[-1] > rising[0] + 0.05
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < falling[0] - 0.05


def test_the_kl_term_alone_is_still_until_the_policy_has_moved(tiny_model: Path, tmp_path: Path):
    objective = Objective(kl_coef=1.0, entropy_coef=0.0)
    still = silent_run(tiny_model, tmp_path, objective, steps=3)
    assert_weights_equal(weights(still.module), start_weights(tiny_model))
    assert [m["train/kl"] for m in still.record.metrics] == [0.0] * 3
    back = silent_run(tiny_model, tmp_path, objective, MoveAtStart(), steps=5)
    kl = [m["train/kl"] for m in back.record.metrics]
    assert kl[0] > 0.01
    assert kl[-1] < 0.5 * kl[0]  # pulled back to the reference


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8)], ids=["copy", "adapter off"])
def test_the_reference_is_the_model_before_training(tiny_model: Path, tmp_path: Path, lora: LoRA | None):
    if lora is not None:
        pytest.importorskip("peft")
    run = fit(
        tiny_model, tmp_path, rollouts=crafted(), steps=3, lora=lora, mismatch_limit=float("inf"), optimizer=AdamW(lr=1e-2)
    )
    kl = [m["train/kl"] for m in run.record.metrics]
    assert kl[0] == 0.0
    assert kl[1] > 1e-4
    if lora is None:
        (reference,) = run.module._reference
        assert_weights_equal({n: p.detach() for n, p in reference.lm.named_parameters()}, start_weights(tiny_model))
        assert not any(p.requires_grad for p in reference.parameters())
    else:
        assert run.module._reference == ()
        start = start_weights(tiny_model)
        after = {n.replace(".base_layer", ""): w for n, w in weights(run.module).items() if "lora_" not in n}
        assert_weights_equal(after, start)


def test_no_reference_is_built_without_a_kl_term(tiny_model: Path, tmp_path: Path):
    run = fit(tiny_model, tmp_path, rollouts=crafted(), objective=OFF, mismatch_limit=float("inf"))
    assert run.module._reference == ()
    assert "time/reference_s" not in run.record.metrics[0]


# --- several updates per batch of rollouts -----------------------------------------------------------------------------


class SpyObjective(Objective):
    """Remembers what every call saw."""

    def __call__(self, **inputs: Any) -> LossTerms:
        terms = super().__call__(**inputs)
        seen.append((inputs["logprobs"].detach() - inputs["old_logprobs"], terms.clipped))
        return terms


seen: list[tuple[Tensor, Tensor]] = []


def test_four_updates_per_step_train_on_a_quarter_each_with_an_active_ratio(tiny_model: Path, tmp_path: Path):
    seen.clear()
    run = fit(
        tiny_model,
        tmp_path,
        steps=8,
        updates_per_step=4,
        objective=SpyObjective(),
        optimizer=AdamW(lr=3e-2),
        problems_per_step=4,
    )
    assert run.trainer.global_step == 8
    assert run.record.versions == [4, 8]  # updates, at the end of each of two batches
    assert [{r.policy_version for r in rollouts} for rollouts in run.record.rollouts()] == [{0}, {4}]
    assert [b.step for b in run.record.batches] == [0, 1]
    assert run.module.steps_done == 2
    assert len(run.record.gradients) == len(seen) == 8  # one micro-batch per update
    tokens = sum(len(r.completion.token_ids) for r in run.record.rollouts()[0][12:])
    assert run.record.metrics[0]["train/tokens"] == tokens  # the last of four updates saw the last 4 of 16 rollouts
    for batch in (seen[:4], seen[4:]):
        assert batch[0][0].abs().max() < 1e-5  # ratio 1 in the first update
        assert all(log_ratio.abs().max() > 0.1 for log_ratio, _ in batch[1:])
        assert batch[0][1].sum() == 0
    assert any(clipped.sum() > 0 for _, clipped in seen)


def test_one_update_per_step_is_exactly_on_policy(tiny_model: Path, tmp_path: Path):
    seen.clear()
    run = fit(tiny_model, tmp_path, steps=3, objective=SpyObjective(), optimizer=AdamW(lr=3e-2))
    assert run.record.versions == [1, 2, 3]
    assert [{r.policy_version for r in rollouts} for rollouts in run.record.rollouts()] == [{0}, {1}, {2}]
    assert all(log_ratio.abs().max() == 0 for log_ratio, _ in seen)
    assert "time/old_s" not in run.record.metrics[0]


# --- rollouts ----------------------------------------------------------------------------------------------------------


def test_several_problems_per_step_arrive_group_major_with_their_own_prompts(tiny_model: Path, tmp_path: Path):
    file = tmp_path / "three.jsonl"
    file.write_text("\n".join(json.dumps({"id": q, "question": q, "answer": "1"}) for q in ("say a", "say bb", "say ccc")))
    data = SubsetDataModule(sources=[str(file)], problems_per_step=3)
    run = fit(tiny_model, tmp_path, data=data, steps=2)
    for batch, rollouts in zip(run.record.batches, run.record.rollouts(), strict=True):
        assert sorted(p.id for p in batch.problems) == ["say a", "say bb", "say ccc"]
        assert [r.problem for r in rollouts] == [p for p in batch.problems for _ in range(4)]
        assert all(r.prompt_ids == PromptTemplate()(r.problem, run.module.policy.tokenizer) for r in rollouts)
        assert len({r.completion.token_ids for r in rollouts}) == 12


def test_all_rollouts_of_one_prompt_differ_and_keep_their_seed_in_any_batch(tiny_model: Path, tmp_path: Path):
    many = fit(tiny_model, tmp_path, problems_per_step=5, engine=HFEngine(batch_size=3)).record.rollouts()[0]
    few = fit(tiny_model, tmp_path, problems_per_step=2, engine=HFEngine(batch_size=128)).record.rollouts()[0]
    tokens = [r.completion.token_ids for r in many]
    assert len(set(tokens)) == 20
    assert [r.completion.token_ids for r in few] == tokens[:8]


def test_engine_and_learner_agree_on_what_was_sampled(tiny_model: Path, tmp_path: Path):
    run = fit(tiny_model, tmp_path, steps=3, optimizer=AdamW(lr=1e-2))  # moving, so that a stale engine would show
    assert max(m["mismatch/max"] for m in run.record.metrics) < 1e-4


class RecordSeeds:
    """An engine that answers nothing but remembers who asked for which seeds."""

    version = 0

    def __init__(self) -> None:
        self.seeds: list[list[int]] = []

    def generate(self, prompts: Any, sampling: Any, seeds: list[list[int]], _: Any = None) -> list[list[Completion]]:
        self.seeds = seeds
        return [[Completion((5,), (-1.0,), "a", "length") for _ in row] for row in seeds]


def test_problems_and_seeds_do_not_depend_on_the_number_of_ranks():
    problems = [Problem(f"p{i}", f"say {i}", "1") for i in range(3)]

    def plan(rank: int, world: int, step: int) -> dict[tuple[int, int], tuple[str, int]]:
        loader: Iterator[ProblemBatch] = iter(ProblemLoader(problems, 5, 0))
        batch = [next(loader) for _ in range(step + 1)][step]
        batch.group_size = SAMPLING.rollouts_per_problem
        batch.share = share_of_rank(5 * batch.group_size, 1, rank, world)
        engine = RecordSeeds()
        template: Any = lambda problem, tokenizer: (1, 2)  # noqa: E731
        rollouts = Collector(engine, RuleVerifier(no_digit), None, run_seed=7).collect(batch, template, SAMPLING)  # type: ignore[arg-type]
        assert batch.step == step
        seeds = [seed for row in engine.seeds for seed in row]
        assert [r.problem for r in rollouts] == [batch.problems[index] for index, _ in batch.places]
        return {place: (r.problem.id, seed) for place, r, seed in zip(batch.places, rollouts, seeds, strict=True)}

    every: list[int] = []
    for step in (0, 1, 3):
        alone = plan(0, 1, step)
        assert sorted(alone) == [(slot, sample) for slot in range(5) for sample in range(4)]
        for world in (2, 3, 7, 30):  # the last: more ranks than rollouts
            parts = [plan(rank, world, step) for rank in range(world)]
            assert {place: value for part in parts for place, value in part.items()} == alone
            assert sum(map(len, parts)) == len(alone)
        every += [seed for _, seed in alone.values()]
    assert len(set(every)) == 3 * 5 * 4  # no two completions of a run share a seed


class ShiftedEngine(HFEngine):
    """Lies about its log-probs by a constant."""

    def generate(self, prompts: Any, sampling: Sampling, seeds: Any, _: Any = None) -> list[list[Completion]]:
        groups = super().generate(prompts, sampling, seeds)
        return [
            [Completion(c.token_ids, tuple(p - 0.2 for p in c.logprobs), c.text, c.finish_reason) for c in group]
            for group in groups
        ]


class StaleEngine(HFEngine):
    """Keeps sampling from the weights of its first sync, whatever it is told."""

    def sync(self, weights: WeightSource, version: int, *, window: int) -> None:
        if self._model is None:
            super().sync(weights, version, window=window)
            model: Any = AutoModelForCausalLM.from_pretrained(weights.model_path, dtype=torch.float32)
            self._model = model.eval()
        self.version = version


@pytest.mark.parametrize("updates_per_step", [1, 2])
def test_a_mismatch_above_the_limit_ends_the_run_before_any_update(tiny_model: Path, tmp_path: Path, updates_per_step: int):
    class KeepModule(Callback):
        def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
            left.append((trainer.global_step, weights(pl_module)))

    left: list[tuple[int, dict[str, Tensor]]] = []
    with pytest.raises(RuntimeError, match=r"disagree about the sampled tokens by 0\.200 nats"):
        fit(
            tiny_model,
            tmp_path,
            KeepModule(),
            engine=ShiftedEngine(),
            updates_per_step=updates_per_step,
            steps=updates_per_step,
        )
    ((updates, after),) = left
    assert updates == 0
    assert_weights_equal(after, start_weights(tiny_model))


def test_a_mismatch_below_the_limit_is_logged_with_its_sign(tiny_model: Path, tmp_path: Path):
    metrics = fit(tiny_model, tmp_path, engine=ShiftedEngine(), mismatch_limit=0.3).record.metrics[0]
    assert metrics["mismatch/mean_abs"] == pytest.approx(0.2, abs=1e-4)
    assert metrics["mismatch/bias"] == pytest.approx(0.2, abs=1e-4)  # learner minus engine
    assert metrics["mismatch/kl"] == pytest.approx(0.0214, abs=1e-3)  # e^0.2 - 0.2 - 1


def test_an_engine_that_stays_behind_is_found_out(tiny_model: Path, tmp_path: Path):
    with pytest.raises(RuntimeError, match="disagree about the sampled tokens"):
        fit(tiny_model, tmp_path, steps=5, engine=StaleEngine(), optimizer=AdamW(lr=1e-2))


# --- stopping and going on ---------------------------------------------------------------------------------------------

WALL_CLOCK = ("time/", "memory/", "rollout/tokens_per_s")


def lasting(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(WALL_CLOCK)}


@pytest.mark.parametrize("updates_per_step", [1, 2])
def test_ten_steps_are_five_and_a_checkpoint_and_five_bit_by_bit(tiny_model: Path, tmp_path: Path, updates_per_step: int):
    updates = 10 * updates_per_step
    settings: dict[str, Any] = {
        "updates_per_step": updates_per_step,
        "optimizer": AdamW(lr=3e-3, warmup_steps=8 * updates_per_step),
        "objective": Objective(kl_coef=0.05, entropy_coef=0.01),
    }
    whole = fit(tiny_model, tmp_path / "whole", steps=updates, **settings)
    first = fit(tiny_model, tmp_path / "cut", CheckpointCallback(every_n_steps=5), steps=updates // 2, **settings)
    (path,) = (tmp_path / "cut" / "checkpoints").glob("*.ckpt")
    second = fit(tiny_model, tmp_path / "cut", steps=updates, ckpt_path=path, **settings)

    assert [b.step for b in second.record.batches] == [5, 6, 7, 8, 9]
    assert second.record.versions == whole.record.versions[5:]
    assert first.record.rollouts() + second.record.rollouts() == whole.record.rollouts()  # log-probs too, bit by bit
    assert [*map(lasting, whole.record.metrics)] == [*map(lasting, first.record.metrics + second.record.metrics)]
    assert_weights_equal(weights(second.module), weights(whole.module))
    assert not torch.equal(weights(first.module)["model.norm.weight"], weights(whole.module)["model.norm.weight"])
    assert len({m["train/lr"] for m in whole.record.metrics}) > 5  # the warm-up went on where it was


def test_a_checkpoint_holds_the_policy_once_and_no_reference(tiny_model: Path, tmp_path: Path):
    run = fit(tiny_model, tmp_path, CheckpointCallback(every_n_steps=1), steps=1)
    assert len(run.module._reference) == 1
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["state_dict"].keys() == {f"policy.lm.{n}" for n in run.module.policy.lm.state_dict()}
    assert checkpoint["rlvr_model"] == str(tiny_model)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert len(group["params"]) == len(list(run.module.policy.parameters()))


def test_only_the_latest_checkpoints_are_kept(tiny_model: Path, tmp_path: Path):
    fit(tiny_model, tmp_path, CheckpointCallback(every_n_steps=2, keep=2), rollouts=crafted(), steps=7, mismatch_limit=1e9)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000004.ckpt", "step-000006.ckpt"]


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_training as t

class Report(t.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        print("begin", batch.step, flush=True)
        time.sleep(float({pause!r}))

t.fit(Path({model!r}), Path({root!r}), Report(), t.CheckpointCallback(), steps=100000)
print("end", flush=True)
"""


def start_run(model: Path, root: Path, *, pause: float) -> "subprocess.Popen[str]":
    script = SCRIPT.format(tests=str(Path(__file__).parent), model=str(model), root=str(root), pause=str(pause))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def read_until(process: "subprocess.Popen[str]", text: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if text in line:
            return lines
    raise AssertionError("\n".join(lines))


@pytest.mark.slow
def test_sigterm_finishes_the_step_and_leaves_a_checkpoint_that_resumes_at_the_next(tiny_model: Path, tmp_path: Path):
    process = start_run(tiny_model, tmp_path, pause=0.1)
    try:
        read_until(process, "begin 2")
        process.send_signal(signal.SIGTERM)
        lines = read_until(process, "end")
        assert process.wait(60) == 0
    finally:
        process.kill()
    last = max([2, *(int(line.split()[1]) for line in lines if line.startswith("begin"))])
    path = tmp_path / "checkpoints" / "interrupted.ckpt"
    assert [p.name for p in path.parent.iterdir()] == ["interrupted.ckpt"]
    assert torch.load(path, weights_only=False)["global_step"] == last + 1
    resumed = fit(tiny_model, tmp_path, steps=last + 3, ckpt_path=path)
    assert [b.step for b in resumed.record.batches] == [last + 1, last + 2]
    # The same steps without interruption: nothing of the interrupted step is missing or doubled.
    straight = fit(tiny_model, tmp_path / "straight", steps=last + 3)
    assert_weights_equal(weights(resumed.module), weights(straight.module))


@pytest.mark.slow
def test_a_second_interrupt_ends_the_run_at_once(tiny_model: Path, tmp_path: Path):
    process = start_run(tiny_model, tmp_path, pause=300)
    try:
        read_until(process, "begin 0")
        process.send_signal(signal.SIGINT)
        read_until(process, "again to end at once")
        assert process.poll() is None  # waits for the step, which would take minutes
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert process.wait(60) != 0
        assert time.monotonic() - started < 20
    finally:
        process.kill()
    assert not (tmp_path / "checkpoints" / "interrupted.ckpt").exists()


def test_the_signals_are_given_back_after_a_run(tiny_model: Path, tmp_path: Path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    fit(tiny_model, tmp_path, CheckpointCallback(), rollouts=crafted(), mismatch_limit=float("inf"))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(RuntimeError):
        fit(tiny_model, tmp_path, CheckpointCallback(), engine=ShiftedEngine())
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# --- the point of it all -----------------------------------------------------------------------------------------------


def test_the_toy_run_learns(tiny_model: Path, tmp_path: Path):
    started = time.monotonic()
    run = fit(
        tiny_model,
        tmp_path,
        steps=40,
        problems_per_step=8,
        sampling=Sampling(rollouts_per_problem=8, temperature=1.0, max_tokens=10),
        rule=lambda text: no_digit(text) and not any(c in "xyzXYZ" for c in text),
        objective=Objective(),
        optimizer=AdamW(lr=3e-3),
    )
    rewards = [m["rollout/reward"] for m in run.record.metrics]
    assert rewards[0] < 0.5
    assert sum(rewards[-5:]) / 5 > 0.9, rewards
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("speedup", "precision", "warned"), [(0.4, "bf16-mixed", True), (2.0, "bf16-mixed", False), (0.4, "32-true", False)]
)
def test_a_cpu_that_is_slow_in_bfloat16_is_told_to_take_float32(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    speedup: float,
    precision: str,
    warned: bool,
):
    monkeypatch.setattr("rlvr_lightning.learner.bf16_speedup", lambda: speedup)
    module = RLVRModule(policy=PolicyConfig(model=str(tiny_model)), objective=Objective(kl_coef=0.0))
    module.trainer = Trainer(accelerator="cpu", precision=precision, logger=False)
    module.configure_model()
    module.on_fit_start()
    assert ("set trainer.precision to 32-true" in capsys.readouterr().out) == warned


def test_this_cpu_is_measured():
    assert 0.01 < bf16_speedup() < 100
