"""The algorithm, top to bottom: rollouts in, one or more optimizer updates out.

Legend: ``P`` problems of a step, ``G`` rollouts per problem, ``B`` of the ``P * G`` rollouts are this rank's rows, ``S`` padded
tokens. The module never sees an engine: the rollout callback has attached rollouts to the batch before a step begins.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlvr_lightning.advantages import ADVANTAGES, Advantage, pass_at_k
from rlvr_lightning.batching import Plan, RolloutBatch, plan_micro_batches, split_evenly
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.module import EvaluationModule
from rlvr_lightning.losses import LossTerms, Objective, kl_penalty, token_weights
from rlvr_lightning.metrics import REFLECTION_WORDS
from rlvr_lightning.models import bf16_speedup
from rlvr_lightning.optimizer import AdamW
from rlvr_lightning.policy import Policy, PolicyConfig, PolicyWeights, TokenStats
from rlvr_lightning.records import ProblemBatch


class RLVRModule(EvaluationModule):
    """Policy-gradient training of a causal LM on verifiable rewards.

    Args:
        policy: which model to train.
        objective: the loss per token.
        advantage: how rewards become advantages.
        pass_k: k of ``pass_at_k``; at most the rollouts of a group.
        optimizer: AdamW on fp32 master weights.
        updates_per_step: optimizer updates on one batch of rollouts; 1 is exactly on-policy (the paper's code).
        tokens_per_micro_batch: padded tokens that one forward and backward pass may hold.
        max_grad_norm: gradients are clipped to this global L2 norm.
        term_norms_every: steps between measurements of the gradient norm of each term of the loss by itself, which costs one
            more backward pass per term; 0: never.
        mismatch_limit: end the run, before any update, when engine and learner disagree about the log-probs of sampled
            tokens by more than this on average (nats); that is a bug or a stale engine, not noise.
        reflection_words: evaluation counts the responses that contain one of them (`metrics.ReflectionRate`).
    """

    policy: Policy

    def __init__(
        self,
        *,
        policy: PolicyConfig,
        objective: Objective = Objective(),  # noqa: B008 - frozen
        advantage: Advantage = "group_norm",
        pass_k: int = 4,
        optimizer: AdamW = AdamW(),  # noqa: B008 - frozen
        updates_per_step: int = 1,
        tokens_per_micro_batch: int = 16384,
        max_grad_norm: float = 1.0,
        term_norms_every: int = 0,
        mismatch_limit: float = 0.1,
        reflection_words: Sequence[str] = REFLECTION_WORDS,
    ) -> None:
        super().__init__(reflection_words)
        for key, value in (("updates_per_step", updates_per_step), ("tokens_per_micro_batch", tokens_per_micro_batch)):
            if value < 1:
                raise ConfigError(f"model.{key} is {value}: set it to 1 or more")
        for key, limit in (("max_grad_norm", max_grad_norm), ("mismatch_limit", mismatch_limit)):
            if not limit > 0:
                raise ConfigError(f"model.{key} is {limit}: set it above 0 (.inf switches it off)")
        if term_norms_every < 0:
            raise ConfigError(f"model.term_norms_every is {term_norms_every}: set it to 0 (never) or more")
        self.automatic_optimization = False
        self.policy_config = policy
        self.objective = objective
        self.advantage = advantage
        self.pass_k = pass_k
        self.optimizer_config = optimizer
        self.updates_per_step = updates_per_step
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.max_grad_norm = max_grad_norm
        self.term_norms_every = term_norms_every
        self.mismatch_limit = mismatch_limit
        self._objective = objective  # of the current step: numbers in place of schedules
        self._reference: tuple[Policy, ...] = ()  # in a tuple: not a submodule, so never saved and never optimized
        self._seconds: dict[str, float] = defaultdict(float)
        self._loaded_version = 0

    # --- what the rollout callback needs -------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """Optimizer updates behind the current weights; an engine whose version differs is stale."""
        return max(self.trainer.global_step, self._loaded_version)

    @property
    def steps_done(self) -> int:
        """Rollout batches trained on so far: the x-axis of every log."""
        return self.policy_version // self.updates_per_step

    def weights(self) -> PolicyWeights:
        """Return the policy as an engine may see it."""
        return PolicyWeights(self.policy, self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the forward pass: bfloat16 with ``trainer.precision: bf16-mixed``, else float32."""
        return torch.bfloat16 if str(self.trainer.precision).startswith("bf16") else torch.float32

    @property
    def uses_reference(self) -> bool:
        """Whether a reference pass is needed; a coefficient of 0 switches it off."""
        return self.objective.uses_kl

    @property
    def uses_old(self) -> bool:
        """Whether a pass for old log-probs is needed: with one update the policy is its own old policy, and the ratio 1."""
        return self.updates_per_step > 1 or (self.objective.kl_in == "reward" and self.uses_reference)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Return the advantages of rewards (P, G), in the same shape."""
        if self.advantage == "pass_at_k":
            return pass_at_k(rewards, k=self.pass_k)
        return ADVANTAGES[self.advantage](rewards)

    # --- Lightning's set-up --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse trainer settings that would have no effect or would spoil the run."""
        self.check_trainer(self.trainer, training=stage == "fit")

    def check_trainer(self, trainer: Trainer, *, training: bool) -> None:
        """Raise ConfigError for trainer settings that this module cannot work with; ``training``: for a fit."""
        if str(trainer.precision) in ("bf16-true", "16-true") and self.optimizer_config.lr < 1e-4:
            raise ConfigError(
                f"trainer.precision {trainer.precision} keeps master weights in 16 bits, and updates at lr "
                f"{self.optimizer_config.lr:g} round to nothing: set trainer.precision to bf16-mixed"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError("trainer.accumulate_grad_batches has no effect here: set data.problems_per_step instead")
        if trainer.gradient_clip_val:
            raise ConfigError("trainer.gradient_clip_val has no effect here: set model.max_grad_norm instead")
        if training and trainer.max_steps == -1:
            raise ConfigError("trainer.max_steps is not set and the problems never run out: set it to a number of updates")
        if training and trainer.max_steps % self.updates_per_step:
            raise ConfigError(
                f"trainer.max_steps is {trainer.max_steps} updates, no multiple of model.updates_per_step "
                f"{self.updates_per_step}: the last rollout batch would overrun it; set a multiple"
            )

    def configure_model(self) -> None:
        """Load the policy once; shard it under FSDP2."""
        if not hasattr(self, "policy"):
            self.policy = self._shard(self.policy_config.build())

    def on_fit_start(self) -> None:
        """Load the frozen reference if the objective has a KL term; with LoRA it is the adapter switched off."""
        self._loaded_version = 0  # from here on the trainer counts, from the checkpoint's updates if there is one
        if self.uses_reference and self.policy_config.lora is None and not self._reference:
            sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)  # FSDP2 casts by itself
            reference = self.policy_config.build().freeze(torch.float32 if sharded else self.compute_dtype)
            self._reference = (self._shard(reference).to(self.trainer.strategy.root_device),)
        reason = self.policy.check_sharing()
        if reason and self.trainer.is_global_zero:
            print(f"prefixes are not shared: {reason}", flush=True)
        if self.device.type == "cpu" and self.compute_dtype == torch.bfloat16 and (speedup := bf16_speedup()) < 1:
            slower = f"bfloat16 matrix products run at {speedup:.2f} of the speed of float32 on this CPU"
            print(f"warning: {slower}: set trainer.precision to 32-true", flush=True)

    def _shard(self, policy: Policy) -> Policy:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            policy.shard(self.device_mesh["data_parallel"], torch.bfloat16 if self.compute_dtype == torch.bfloat16 else None)
        return policy

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the weights that train."""
        return self.optimizer_config.build(self.policy.parameters())

    # --- one training step ---------------------------------------------------------------------------------------------

    def training_step(self, batch: ProblemBatch, batch_idx: int) -> None:
        """Advantages, reference and old log-probs, then ``updates_per_step`` updates over the batch's rollouts."""
        assert batch.rollouts is not None, "no rollouts attached: add RolloutCallback to the trainer"
        self._seconds.clear()
        self._objective = self.objective.at(self.steps_done)
        data = RolloutBatch.from_rollouts(batch.rollouts).to(self.device)  # (B, S)
        if self.uses_reference:
            with self._timed("reference"):
                data = replace(data, reference_logprobs=self._reference_logprobs(data))
        if self.uses_old:
            with self._timed("old"):
                data = replace(data, old_logprobs=self.score(data))
        advantages = self.advantages(self._rewards(batch, data))  # (P, G)
        mine = advantages.flatten()[list(batch.indices)] if batch.rollouts else torch.zeros(1, device=self.device)
        data = replace(data, advantages=mine)  # (B,)
        with self._timed("update"):
            for index, minibatch in enumerate(split_evenly(advantages.numel(), self.updates_per_step)):
                rows = [row for row, number in enumerate(batch.indices) if number in minibatch]
                metrics = self._update(data.rows(rows) if rows else data.rows([0]).without_completions(), first=index == 0)
                self.log_dict(metrics, batch_size=len(data))
        silent = (advantages == 0).all(dim=1)  # (P,)
        self.log("rollout/zero_advantage_fraction", silent.float().mean(), batch_size=len(data))
        self.log("rollout/effective_samples", (~silent).sum() * float(batch.group_size), batch_size=len(data))
        self.log_dict({f"time/{part}_s": seconds for part, seconds in self._seconds.items()}, batch_size=len(data))
        self.log("step", float(self.steps_done))  # Lightning takes the x-axis from here

    def _rewards(self, batch: ProblemBatch, data: RolloutBatch) -> Tensor:
        """Return the rewards of all ranks, (P, G), less the KL penalty if it is in the reward."""
        mine = torch.tensor([r.score.reward for r in batch.rollouts or ()], device=self.device)  # (B,)
        objective = self._objective
        if objective.kl_in == "reward" and self.uses_reference and batch.rollouts:
            assert data.old_logprobs is not None
            assert data.reference_logprobs is not None
            kl = kl_penalty(data.old_logprobs, data.reference_logprobs, data.completion_mask, objective.kl_estimator)
            mine = mine - objective.kl_coef * kl
        rewards = torch.zeros(len(batch.problems) * batch.group_size, device=self.device)
        rewards[list(batch.indices)] = mine
        return self._sum(rewards).view(len(batch.problems), batch.group_size)

    def _update(self, minibatch: RolloutBatch, *, first: bool) -> dict[str, Tensor | float]:
        """Take one optimizer step on a mini-batch; return what to log.

        The gradient is that of the mean over all completion tokens of the mini-batch on all ranks, however they are cut: every
        micro-batch adds its tokens with weights that follow from global counts, which are known beforehand.
        """
        assert minibatch.advantages is not None
        optimizer = self.optimizers(use_pl_optimizer=True)
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        mask = minibatch.completion_mask
        num_tokens, num_rows = self._sum(torch.stack([mask.sum(), mask.any(dim=1).sum()])).unbind()
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        worst = torch.zeros((), device=self.device)
        plan = self._plan(minibatch)
        reduction = partial(token_weights, reduction=self._objective.reduction, num_tokens=num_tokens, num_rows=num_rows)
        norms = self._term_norms(minibatch, plan, reduction) if first and self._term_norms_are_due() else {}
        loss = torch.zeros((), device=self.device)
        for micro, stats, terms in self._losses(minibatch, plan):
            mask = micro.completion_mask
            weights = reduction(mask)
            # FSDP averages gradients over ranks; the factor makes the result that of one device.
            self.manual_backward((terms.total * weights).sum() * self.trainer.world_size)
            with torch.no_grad():
                loss += (terms.total * weights).sum()
                gap = torch.where(mask, stats.logprobs - micro.sampler_logprobs, 0.0)
                for name, value in (
                    ("train/policy_loss", terms.surrogate),
                    ("train/kl", terms.kl),
                    ("train/entropy", terms.entropy),
                    ("train/clip_fraction", terms.clipped),
                    ("mismatch/bias", gap),
                    ("mismatch/mean_abs", gap.abs()),
                    ("mismatch/kl", gap.exp() - gap - 1),
                ):
                    sums[name] += (value * mask).sum()
                worst = torch.maximum(worst, gap.abs().max())
        names = list(sums)
        means = self._sum(torch.stack([sums[n] for n in names])) / num_tokens
        metrics: dict[str, Tensor | float] = norms | {"train/loss": self._sum(loss)} | dict(zip(names, means, strict=True))
        if first:
            if self.trainer.world_size > 1:
                torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
            metrics["mismatch/max"] = worst
            self._check_mismatch(float(metrics["mismatch/mean_abs"]))
        else:  # the policy has moved on from the sampler: the gap no longer says anything about the engine
            metrics = {n: v for n, v in metrics.items() if not n.startswith("mismatch/")}
        grad_norm = self._clip(self.max_grad_norm)
        if not torch.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient is {grad_norm} at update {self.policy_version}: lower the learning rate")
        learning_rate = self.optimizer_config.lr_at(self.policy_version)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        metrics |= {"train/grad_norm": grad_norm, "train/lr": learning_rate, "train/tokens": num_tokens.float()}
        metrics["train/computed_tokens"] = self._sum(torch.tensor(float(plan.tokens), device=self.device))
        optimizer.step()  # Lightning counts it: policy_version += 1
        return metrics

    def _losses(self, minibatch: RolloutBatch, plan: Plan) -> Iterator[tuple[RolloutBatch, TokenStats, LossTerms]]:
        """Yield each micro-batch after its forward pass, with every term of its loss per token."""
        for rows in plan.cuts:
            micro = minibatch.rows(rows) if rows else minibatch.rows([0]).without_completions()
            stats = self.policy(micro, as_tree=plan.as_tree)
            old = micro.old_logprobs if self.updates_per_step > 1 else None
            assert micro.advantages is not None
            yield (
                micro,
                stats,
                self._objective(
                    logprobs=stats.logprobs,
                    entropy=stats.entropy,
                    old_logprobs=stats.logprobs.detach() if old is None else old,
                    reference_logprobs=micro.reference_logprobs,
                    advantages=micro.advantages,
                    sampler_logprobs=micro.sampler_logprobs,
                    mask=micro.completion_mask,
                ),
            )

    def _term_norms_are_due(self) -> bool:
        return self.term_norms_every > 0 and self.steps_done % self.term_norms_every == 0

    def _term_norms(
        self, minibatch: RolloutBatch, plan: Plan, reduction: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor | float]:
        """Return the norm of the gradient of each term of the loss by itself, its coefficient included; leaves no gradient."""
        norms: dict[str, Tensor | float] = {}
        for name, factor in self._objective.coefficients.items():
            for micro, _, terms in self._losses(minibatch, plan):
                weights = factor * self.trainer.world_size * reduction(micro.completion_mask)
                self.manual_backward((getattr(terms, name) * weights).sum())
            norms[f"train/grad_norm_{name}"] = self._clip(float("inf"))
            self.policy.zero_grad()
        return norms

    def _clip(self, limit: float) -> Tensor:
        """Scale the gradient down to at most this norm; return the norm it had."""
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # --- passes without gradient ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, data: RolloutBatch, policy: Policy | None = None) -> Tensor:
        """Return log-probs (B, S) of the completion tokens under ``policy`` (default: the one in training), no gradient."""
        policy = policy or self.policy
        logprobs = torch.zeros(data.input_ids.shape, device=data.input_ids.device)
        plan = self._plan(data)
        for rows in plan.cuts:
            stats = policy(data.rows(rows or [0]), as_tree=plan.as_tree)
            if rows:
                logprobs[rows, : stats.logprobs.shape[1]] = stats.logprobs.float()
        if isinstance(policy, FSDPModule):
            policy.reshard()  # without a backward pass FSDP2 would keep the outermost parameters gathered
        return logprobs

    def _reference_logprobs(self, data: RolloutBatch) -> Tensor:
        if self._reference:
            return self.score(data, self._reference[0])
        with self.policy.without_adapters():
            return self.score(data)

    # --- cutting and summing over ranks --------------------------------------------------------------------------------

    def _plan(self, data: RolloutBatch) -> Plan:
        """Cut into micro-batches; every rank gets the same number of them, empty ones at the end.

        Under FSDP2 a forward pass is collective, so unequal counts would hang.
        """
        plan = plan_micro_batches(data, self.tokens_per_micro_batch, share=self.policy.share, costs=self.policy.costs)
        if self.trainer.world_size > 1:
            count = torch.tensor(len(plan.cuts), device=self.device)
            torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
            plan = replace(plan, cuts=plan.cuts + [[]] * (int(count) - len(plan.cuts)))
        return plan

    def _sum(self, value: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        if self.trainer.world_size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def _check_mismatch(self, mean_abs: float) -> None:
        if not mean_abs <= self.mismatch_limit:
            raise RuntimeError(
                f"engine and learner disagree about the sampled tokens by {mean_abs:.3f} nats on average (limit "
                f"{self.mismatch_limit}): the engine holds other weights, another dtype or another prompt. Try "
                "rollout.engine.dtype=float32 to tell rounding from a bug, or raise model.mismatch_limit knowingly"
            )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[part] += time.perf_counter() - started

    # --- checkpoints ---------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember how many updates the loaded weights have seen: evaluation alone does not restore the trainer's count."""
        self._loaded_version = checkpoint["global_step"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which model the weights belong to, so that a checkpoint explains itself."""
        checkpoint["rlvr_model"] = self.policy_config.model
