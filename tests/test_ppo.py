"""PPO: the critic's loss, its gradient, what it leaves alone, and a whole step against one computed by hand."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlvr_lightning.callbacks.checkpoint import CheckpointCallback
from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.critic import CriticConfig, explained_variance, value_loss
from rlvr_lightning.data import SingleExampleDataModule
from rlvr_lightning.engines import Sampling
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.losses import Objective
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.optimizer import AdamW
from rlvr_lightning.policy import LoRA, PolicyConfig
from test_training import (
    CUTS,
    PLAIN,
    SAMPLING,
    MoveAtStart,
    Record,
    RuleVerifier,
    Run,
    assert_weights_equal,
    crafted,
    fit,
    lasting,
    move,
    no_digit,
    relative_gap,
    weights,
)

FREE: dict[str, Any] = {"max_grad_norm": float("inf"), "mismatch_limit": float("inf")}
GREEDY = Sampling(rollouts_per_problem=1, temperature=0.0, max_tokens=4)
TERMS = Objective(kl_coef=0.1, entropy_coef=0.05)


def critic_weights(run: Run) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.module.critic.named_parameters()}


# --- the loss of one token ---------------------------------------------------------------------------------------------


def test_the_value_loss_of_a_token_by_hand():
    # value, old value, return, clip -> 0.5 * max((v - R)^2, (v_clipped - R)^2)
    for value, old, target, clip, expected in [
        (0.2, 0.0, 1.0, 0.5, 0.5 * 0.8**2),  # inside the clip
        (0.9, 0.0, 1.0, 0.5, 0.5 * 0.5**2),  # towards the return, but too far: 0.5 counts, and pulls no further
        (-0.9, 0.0, 1.0, 0.5, 0.5 * 1.9**2),  # away from it: the value itself counts
        (3.0, 0.0, 1.0, 0.5, 0.5 * 2.0**2),  # past it: the larger of 2 and 0.5
    ]:
        v = torch.tensor([[value]], requires_grad=True)
        loss = value_loss(v, torch.tensor([[old]]), torch.tensor([[target]]), clip)
        (gradient,) = torch.autograd.grad(loss.sum(), v)
        assert loss.item() == pytest.approx(expected)
        near = min(max(value, old - clip), old + clip)
        assert gradient.item() == pytest.approx(value - target if abs(value - target) >= abs(near - target) else 0.0)


def test_explained_variance_of_critics_of_every_kind():
    returns = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((5,), 0.3), returns).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(1 - returns, returns).item() == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(5)).isnan()


# --- one step by hand --------------------------------------------------------------------------------------------------


def step_by_hand(model: Path, critic: CriticConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of policy and critic on ``crafted()``, one row at a time in float64.

    The policy has moved, the critic is the model as it was, with every weight of its value head 0.01.
    """
    policy, reference, base = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager") for _ in range(3)
    )
    move(policy)
    for lm in (policy, reference, base):
        lm.double()
    trunk = policy if critic.shared_trunk else base
    head = torch.full((base.config.hidden_size,), 0.01, dtype=torch.float64, requires_grad=True)
    tokens = []  # of all rows: log-prob, KL, entropy, value, return, raw advantage
    for row in crafted():
        start, completion = len(row.prompt_ids), row.completion.token_ids
        ids = torch.tensor([row.prompt_ids + completion])
        log_p = (policy(ids).logits[0] / 0.6).log_softmax(-1)
        log_ref = (reference(ids).logits[0] / 0.6).log_softmax(-1).detach()
        values = trunk.model(ids).last_hidden_state[0] @ head
        n = len(completion)
        v = [values[start + t - 1] for t in range(n)]
        for t, token in enumerate(completion):
            now, ref = log_p[start + t - 1], log_ref[start + t - 1]
            d = ref[token] - now[token]
            kl, entropy = (d.exp() - d - 1).clamp(max=10), -(now.exp() * now).sum()
            advantage = sum(
                (critic.gamma * critic.lam) ** (s - t)
                * ((row.score.reward if s == n - 1 else critic.gamma * v[s + 1].item()) - v[s].item())
                for s in range(t, n)
            )
            tokens.append((now[token], kl, entropy, v[t], advantage + v[t].item(), advantage))
    raw = torch.tensor([t[5] for t in tokens], dtype=torch.float64)
    whitened = (raw - raw.mean()) / (raw.var() + 1e-8).sqrt()
    of_policy = sum(-a * t[0] + 0.1 * t[1] - 0.05 * t[2] for a, t in zip(whitened, tokens, strict=True)) / len(tokens)
    of_critic = sum(0.5 * (t[3] - t[4]) ** 2 for t in tokens) / len(tokens)
    if critic.shared_trunk:
        (of_policy + critic.coef * of_critic).backward()
        return {n: p.grad.float() for n, p in policy.named_parameters()}, {"value_head.linear.weight": head.grad[None].float()}
    (of_policy + of_critic).backward()
    found = {f"lm.{n.removeprefix('model.')}": p.grad.float() for n, p in base.named_parameters() if p.grad is not None}
    return {n: p.grad.float() for n, p in policy.named_parameters()}, found | {
        "value_head.linear.weight": head.grad[None].float()
    }


class Known(Record):
    """Gives the value head known weights before the first step, and keeps the critic's gradients."""

    def on_train_start(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        self.critic: dict[str, Tensor] = {}
        owner = pl_module.critic if hasattr(pl_module, "critic") else pl_module.policy
        assert owner.value_head is not None
        torch.nn.init.constant_(owner.value_head.linear.weight, 0.01)
        for name, parameter in owner.named_parameters():
            if name.startswith("value_head.") or hasattr(pl_module, "critic"):
                parameter.register_post_accumulate_grad_hook(
                    lambda p, name=name: self.critic.__setitem__(name, p.grad.clone())  # of all micro-batches up to now
                )


@pytest.mark.parametrize(("tokens_per_micro_batch", "share_prefixes"), CUTS)
@pytest.mark.parametrize("shared_trunk", [False, True])
def test_gradients_do_not_depend_on_the_micro_batch_cut_and_equal_those_by_hand(
    tiny_model: Path, tmp_path: Path, shared_trunk: bool, tokens_per_micro_batch: int, share_prefixes: bool
):
    critic = CriticConfig(shared_trunk=shared_trunk, coef=0.3 if shared_trunk else 1.0, gamma=0.9, lam=0.8, head_std=0.02)
    known = Known()
    run = fit(
        tiny_model,
        tmp_path,
        MoveAtStart(),
        known,
        rollouts=crafted(),
        objective=TERMS,
        advantage="gae",
        critic=critic,
        tokens_per_micro_batch=tokens_per_micro_batch,
        share_prefixes=share_prefixes,
        **FREE,
    )
    of_policy, of_critic = step_by_hand(tiny_model, critic)
    (gradient,) = run.record.gradients
    assert relative_gap(gradient, of_policy) < 3e-5
    found = {n: g for n, g in known.critic.items() if n != "value_head.linear.bias"}
    assert relative_gap(found, of_critic) < 3e-5


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_what_is_logged(tiny_model: Path, tmp_path: Path, shared_trunk: bool):
    critic = CriticConfig(shared_trunk=shared_trunk)
    run = fit(tiny_model, tmp_path, rollouts=crafted(), advantage="gae", critic=critic, **FREE)
    (metrics,) = run.record.metrics
    tokens = [(r.score.reward, len(r.completion.token_ids)) for r in crafted()]
    mean = sum(reward * n for reward, n in tokens) / 32
    assert metrics["critic/return"] == pytest.approx(mean)  # gamma = lambda = 1: the reward, at every token
    assert metrics["critic/value"] == 0  # the head begins with nothing
    assert metrics["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert metrics["critic/loss"] == pytest.approx(mean / 2)  # 0.5 * R^2, and R is 0 or 1
    assert metrics["rollout/zero_advantage_fraction"] == 0


def test_a_critic_leaves_rewards_of_one_kind_without_an_explanation(tiny_model: Path, tmp_path: Path):
    run = fit(tiny_model, tmp_path, rollouts=crafted()[2:3] * 2, advantage="gae", critic=CriticConfig(), **FREE)
    assert "critic/explained_variance" not in run.record.metrics[0]  # all returns are 0
    assert run.record.metrics[0]["rollout/zero_advantage_fraction"] == 1


# --- what trains what --------------------------------------------------------------------------------------------------


def test_the_critic_makes_its_own_number_of_updates_at_its_own_rate(tiny_model: Path, tmp_path: Path):
    rate = AdamW(lr=1e-3, warmup_steps=8)
    settings: dict[str, Any] = {"rollouts": crafted(), "advantage": "gae", "steps": 2} | FREE
    run = fit(tiny_model, tmp_path, critic=CriticConfig(updates_per_step=4, optimizer=rate), **settings)
    assert run.record.versions == [1, 2]  # the policy's updates alone
    assert [m["critic/lr"] for m in run.record.metrics] == pytest.approx([rate.lr_at(3), rate.lr_at(7)])
    state = run.trainer.optimizers[1].state
    assert {float(s["step"]) for s in state.values()} == {8.0}
    once = fit(tiny_model, tmp_path, critic=CriticConfig(optimizer=rate), **settings)
    assert any(not torch.equal(p, critic_weights(once)[n]) for n, p in critic_weights(run).items())


def test_in_its_head_start_the_critic_trains_alone(tiny_model: Path, tmp_path: Path):
    settings: dict[str, Any] = {"rollouts": crafted(), "advantage": "gae", "optimizer": AdamW(lr=1e-3), **FREE}
    waiting = fit(tiny_model, tmp_path, critic=CriticConfig(head_start=2), steps=2, **settings)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert_weights_equal(weights(waiting.module), {n: p.detach() for n, p in lm.named_parameters()})
    assert waiting.record.versions == [1, 2]  # still counted: a step is a step
    moved = critic_weights(waiting)
    assert all(bool(moved[f"value_head.linear.{n}"].any()) for n in ("weight", "bias"))
    assert waiting.record.metrics[1]["critic/loss"] < waiting.record.metrics[0]["critic/loss"]
    third = fit(tiny_model, tmp_path, critic=CriticConfig(head_start=2), steps=3, **settings)
    assert any(not torch.equal(p, weights(waiting.module)[n]) for n, p in weights(third.module).items())


def test_the_policy_of_a_shared_trunk_exports_and_syncs_without_the_value_head(tiny_model: Path, tmp_path: Path):
    run = fit(tiny_model, tmp_path, rollouts=crafted(), advantage="gae", critic=CriticConfig(shared_trunk=True), **FREE)
    assert run.module.policy.value_head is not None
    names = {name for name, _ in run.module.weights().tensors()}
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert names == {n for n, _ in lm.named_parameters()}


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_a_lora_policy_has_a_critic_too(tiny_model: Path, tmp_path: Path, shared_trunk: bool):
    critic = CriticConfig(shared_trunk=shared_trunk, optimizer=AdamW(lr=1e-2))
    settings: dict[str, Any] = {"rollouts": crafted(), "advantage": "gae", "lora": LoRA(rank=4, alpha=8), "steps": 8} | FREE
    run = fit(tiny_model, tmp_path, critic=critic, **settings)
    losses = [m["critic/loss"] for m in run.record.metrics]
    assert losses[-1] < losses[0]
    if not shared_trunk:
        trained = {n for n, p in run.module.critic.named_parameters() if p.requires_grad}
        assert all("lora_" in n or n.startswith("value_head.") for n in trained)


def steady(metrics: dict[str, float]) -> dict[str, float]:
    """Without wall-clock times, and without what Lightning keeps from the step before where a step has nothing to explain."""
    return {key: value for key, value in lasting(metrics).items() if key != "critic/explained_variance"}


# --- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "critic", [CriticConfig(updates_per_step=2, head_start=3, head_std=0.02), CriticConfig(shared_trunk=True)]
)
def test_six_steps_are_three_and_a_checkpoint_and_three_bit_by_bit(tiny_model: Path, tmp_path: Path, critic: CriticConfig):
    settings: dict[str, Any] = {"optimizer": AdamW(lr=3e-3), "objective": TERMS, "advantage": "gae", "critic": critic}
    torch.manual_seed(1)
    whole = fit(tiny_model, tmp_path / "whole", steps=6, **settings)
    torch.manual_seed(1)
    first = fit(tiny_model, tmp_path / "cut", CheckpointCallback(every_n_steps=3), steps=3, **settings)
    (path,) = (tmp_path / "cut" / "checkpoints").glob("*.ckpt")
    torch.manual_seed(2)  # another first head, which the checkpoint replaces
    second = fit(tiny_model, tmp_path / "cut", steps=6, ckpt_path=path, **settings)
    halves = first.record.metrics + second.record.metrics
    assert [*map(steady, whole.record.metrics)] == [*map(steady, halves)]
    assert_weights_equal(dict(second.module.state_dict()), dict(whole.module.state_dict()))


def test_evaluating_a_checkpoint_builds_no_critic(tiny_model: Path, tmp_path: Path):
    settings: dict[str, Any] = {"advantage": "gae", "critic": CriticConfig()}
    fit(tiny_model, tmp_path, CheckpointCallback(every_n_steps=1), steps=1, optimizer=PLAIN, **settings)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert any(name.startswith("critic.") for name in torch.load(path, weights_only=False)["state_dict"])
    module = RLVRModule(policy=PolicyConfig(model=str(tiny_model)), **settings)
    source = RolloutCallback(engine=HFEngine(), sampling=SAMPLING, eval_sampling=GREEDY, verifier=RuleVerifier(no_digit))
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, callbacks=[source])
    data = SingleExampleDataModule(question="say a word", answer="1", problems_per_step=1)
    trainer.validate(module, datamodule=data, ckpt_path=path, weights_only=False, verbose=False)
    assert not hasattr(module, "critic")
    assert module.policy_version == 1


# --- bad settings, and the point of it ---------------------------------------------------------------------------------


def test_a_critic_and_gae_need_each_other(tiny_model: Path):
    policy = PolicyConfig(model=str(tiny_model))
    with pytest.raises(ConfigError, match=r"model\.advantage is gae and model\.critic is not set"):
        RLVRModule(policy=policy, advantage="gae")
    with pytest.raises(ConfigError, match=r"model\.advantage is group_norm and model\.critic is set"):
        RLVRModule(policy=policy, critic=CriticConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.1}, "critic.gamma is 1.1"),
        ({"lam": -0.1}, "critic.lam is -0.1"),
        ({"value_clip": 0.0}, "critic.value_clip is 0.0"),
        ({"coef": 0.5}, "critic.coef has no effect"),
        ({"updates_per_step": 0}, "updates_per_step to 1 or more"),
        ({"head_start": -1}, "head_start and head_std to 0 or more"),
        ({"shared_trunk": True, "updates_per_step": 2}, "critic.shared_trunk trains the value head in the policy's updates"),
        ({"shared_trunk": True, "head_start": 1}, "critic.shared_trunk trains the value head in the policy's updates"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        CriticConfig(**settings)


@pytest.mark.parametrize(("shared_trunk", "group"), [*product([False, True], [1, 4])])
def test_the_toy_run_learns(tiny_model: Path, tmp_path: Path, shared_trunk: bool, group: int):
    """A group of one has no baseline of its own: here the critic is all there is."""
    run = fit(
        tiny_model,
        tmp_path,
        steps=20,
        sampling=Sampling(rollouts_per_problem=group, temperature=1.0, max_tokens=10),
        problems_per_step=32 // group,
        rule=lambda text: no_digit(text) and not any(c in "xyzXYZ" for c in text),
        advantage="gae",
        critic=CriticConfig(shared_trunk=shared_trunk, optimizer=AdamW(lr=3e-3)),
        objective=Objective(kl_coef=0.0, entropy_coef=0.0),
        optimizer=AdamW(lr=3e-3),
    )
    rewards = [m["rollout/reward"] for m in run.record.metrics]
    assert rewards[0] < 0.6
    assert sum(rewards[-3:]) / 3 > 0.8, rewards
