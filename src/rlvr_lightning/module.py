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

import torch
from torch import Tensor

from rlvr_lightning.advantages import ADVANTAGES, Advantage, gae, pass_at_k, whiten
from rlvr_lightning.batching import Plan, RolloutBatch, split_evenly
from rlvr_lightning.critic import CriticConfig, explained_variance, value_loss
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.learner import LearnerModule
from rlvr_lightning.losses import LossTerms, Objective, kl_estimate, token_weights
from rlvr_lightning.metrics import REFLECTION_WORDS
from rlvr_lightning.optimizer import AdamW
from rlvr_lightning.passes import clip_gradients, gather, greatest, micro_batch, plan, score, total
from rlvr_lightning.policy import PolicyConfig, TokenStats
from rlvr_lightning.records import ProblemBatch


class RLVRModule(LearnerModule):
    """Policy-gradient training of a causal LM on verifiable rewards.

    Args:
        policy: which model to train.
        objective: the loss per token.
        advantage: how rewards become advantages; ``gae`` is PPO and needs a critic.
        critic: what ``gae`` compares rewards with; None for every other advantage.
        pass_k: k of ``pass_at_k``; at most the rollouts of a group.
        optimizer: AdamW on fp32 master weights.
        updates_per_step: optimizer updates on one batch of rollouts; 1 is exactly on-policy (the paper's code).
        tokens_per_micro_batch: padded tokens that one forward and backward pass may hold.
        max_grad_norm: gradients are clipped to this global L2 norm.
        term_norms_every: steps between measurements of the gradient norm of each term of the loss by itself, which costs one
            more backward pass per term; 0: never.
        offload_reference: keep the frozen reference in main memory, and on the device for its pass only.
        mismatch_limit: end the run, before any update, when engine and learner disagree about the log-probs of sampled
            tokens by more than this on average (nats); that is a bug or a stale engine, not noise.
        reflection_words: evaluation counts the responses that contain one of them (`metrics.ReflectionRate`).
    """

    def __init__(
        self,
        *,
        policy: PolicyConfig,
        objective: Objective = Objective(),  # noqa: B008 - frozen
        advantage: Advantage = "group_norm",
        critic: CriticConfig | None = None,
        pass_k: int = 4,
        optimizer: AdamW = AdamW(),  # noqa: B008 - frozen
        updates_per_step: int = 1,
        tokens_per_micro_batch: int = 16384,
        max_grad_norm: float = 1.0,
        term_norms_every: int = 0,
        offload_reference: bool = False,
        mismatch_limit: float = 0.1,
        reflection_words: Sequence[str] = REFLECTION_WORDS,
    ) -> None:
        super().__init__(policy, critic, optimizer, updates_per_step, reflection_words, offload_reference)
        for key, value in (("updates_per_step", updates_per_step), ("tokens_per_micro_batch", tokens_per_micro_batch)):
            if value < 1:
                raise ConfigError(f"model.{key} is {value}: set it to 1 or more")
        for key, limit in (("max_grad_norm", max_grad_norm), ("mismatch_limit", mismatch_limit)):
            if not limit > 0:
                raise ConfigError(f"model.{key} is {limit}: set it above 0 (.inf switches it off)")
        if term_norms_every < 0:
            raise ConfigError(f"model.term_norms_every is {term_norms_every}: set it to 0 (never) or more")
        if (advantage == "gae") != (critic is not None):
            raise ConfigError(
                f"model.advantage is {advantage} and model.critic is {'not ' if critic is None else ''}set: gae needs a critic "
                "(`critic: {}` takes its defaults), and nothing else has a use for one"
            )
        self.objective = objective
        self.advantage = advantage
        self.pass_k = pass_k
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.max_grad_norm = max_grad_norm
        self.term_norms_every = term_norms_every
        self.mismatch_limit = mismatch_limit
        self._objective = objective  # of the current step: numbers in place of schedules
        self._stale = False
        self._seconds: dict[str, float] = defaultdict(float)

    @property
    def uses_reference(self) -> bool:
        """Whether a reference pass is needed; a coefficient of 0 switches it off."""
        return self.objective.uses_kl

    @property
    def uses_old(self) -> bool:
        """Whether the policy is read before the first update, for old log-probs or for the values of a shared trunk.

        With one update the policy is its own old policy, and the ratio 1.
        """
        reads_kl, critic = self.objective.kl_in == "reward" and self.uses_reference, self.critic_config
        return self.updates_per_step > 1 or reads_kl or (critic is not None and critic.shared_trunk)

    def training_step(self, batch: ProblemBatch, batch_idx: int) -> None:
        """Reference, old log-probs and values, advantages, then ``updates_per_step`` updates over the batch's rollouts."""
        assert batch.rollouts is not None, "no rollouts attached: add RolloutCallback to the trainer"
        self._seconds.clear()
        self._objective = self.objective.at(self.steps_done)
        stale = any(rollout.policy_version != self.policy_version for rollout in batch.rollouts)
        self._stale = bool(greatest(torch.tensor(stale, dtype=torch.int, device=self.device)))
        data = RolloutBatch.from_rollouts(batch.rollouts).to(self.device)  # (B, S)
        if self.uses_reference:
            with self._timed("reference"):
                data = replace(data, reference_logprobs=self._reference_logprobs(data))
        if self.uses_old:
            with self._timed("old"):
                logprobs, _, *values = score(data, self.policy, self.tokens_per_micro_batch)
                data = replace(data, old_logprobs=logprobs, values=values[0] if values else None)
        if hasattr(self, "critic"):
            with self._timed("critic"):
                data = replace(data, values=score(data, self.critic, self.tokens_per_micro_batch)[0])
        data = self._with_advantages(batch, data)
        if hasattr(self, "critic"):
            with self._timed("critic"):
                self._train_critic(batch, data)
        with self._timed("update"):
            self._train_policy(batch, data)
        assert data.advantages is not None
        largest = data.advantages.where(data.completion_mask, 0.0).abs().amax(dim=1)  # (B,)
        silent = (self._by_group(batch, largest) == 0).all(dim=1)  # (P,)
        self.log("rollout/zero_advantage_fraction", silent.float().mean(), batch_size=len(data))
        self.log("rollout/effective_samples", (~silent).sum() * float(batch.group_size), batch_size=len(data))
        self.log_dict({f"time/{part}_s": seconds for part, seconds in self._seconds.items()}, batch_size=len(data))
        self.log("step", float(self.steps_done))  # Lightning takes the x-axis from here

    def _with_advantages(self, batch: ProblemBatch, data: RolloutBatch) -> RolloutBatch:
        """Add advantages (B, S), with a critic also returns; groups and statistics are those of all ranks."""
        mask, rewards = data.completion_mask, self._token_rewards(batch, data)
        if self.critic_config is None:
            of_groups = self._by_group(batch, rewards.sum(dim=1))  # (P, G)
            advantage = partial(pass_at_k, k=self.pass_k) if self.advantage == "pass_at_k" else ADVANTAGES[self.advantage]
            mine = advantage(of_groups).flatten()[list(batch.indices)] if batch.rollouts else of_groups.new_zeros(1)  # (B,)
            return replace(data, advantages=mine[:, None].expand(mask.shape))
        assert data.values is not None
        advantages, returns = gae(rewards, data.values, mask, gamma=self.critic_config.gamma, lam=self.critic_config.lam)
        everywhere, values, all_returns = (gather(x[mask]) for x in (advantages, data.values, returns))
        means = {"critic/value": values.mean(), "critic/return": all_returns.mean()}
        if not torch.isnan(explained := explained_variance(values, all_returns)):
            means["critic/explained_variance"] = explained
        self.log_dict(means, batch_size=len(data))
        return replace(data, advantages=whiten(advantages, mask, everywhere=everywhere), returns=returns)

    def _token_rewards(self, batch: ProblemBatch, data: RolloutBatch) -> Tensor:
        """Return (B, S): the verifier's reward at the last completion token, less the KL penalty if it is in the reward."""
        rewards, objective = torch.zeros_like(data.sampler_logprobs), self._objective
        for row, rollout in enumerate(batch.rollouts or ()):
            rewards[row, data.lengths[row] - 1] = rollout.score.reward
        if objective.kl_in == "reward" and self.uses_reference:
            assert data.old_logprobs is not None
            assert data.reference_logprobs is not None
            kl = kl_estimate(data.old_logprobs, data.reference_logprobs, objective.kl_estimator)
            rewards -= objective.kl_coef * kl.where(data.completion_mask, 0.0)
        return rewards

    @staticmethod
    def _by_group(batch: ProblemBatch, mine: Tensor) -> Tensor:
        """Return a number per rollout of this rank, (B,), as one per rollout of all ranks, (P, G)."""
        everyone = torch.zeros(len(batch.problems) * batch.group_size, device=mine.device)
        everyone[list(batch.indices)] = mine[: len(batch.indices)]
        return total(everyone).view(len(batch.problems), batch.group_size)

    @staticmethod
    def _mini_batches(batch: ProblemBatch, data: RolloutBatch, parts: int) -> Iterator[RolloutBatch]:
        """Yield this rank's rows of each part of the step's rollouts."""
        for part in split_evenly(len(batch.problems) * batch.group_size, parts):
            yield micro_batch(data, [row for row, number in enumerate(batch.indices) if number in part])

    def _train_critic(self, batch: ProblemBatch, data: RolloutBatch) -> None:
        """Take the critic's optimizer steps, which Lightning does not count: a version is one of the policy."""
        config = self.critic_config
        assert config is not None
        _, optimizer = self.trainer.optimizers
        for index, minibatch in enumerate(self._mini_batches(batch, data, config.updates_per_step)):
            optimizer.zero_grad()
            _, weigh = self._token_weights(minibatch)
            cuts, loss = plan(minibatch, self.critic, self.tokens_per_micro_batch), torch.zeros((), device=self.device)
            for rows in cuts.cuts:
                micro = micro_batch(minibatch, rows)
                (values,) = self.critic(micro, as_tree=cuts.as_tree)
                share = (self._value_loss(values, micro) * weigh(micro.completion_mask)).sum()
                self.manual_backward(share * self.trainer.world_size)
                loss += share.detach()
            norm = self._finite(clip_gradients(self.critic.parameters(), self.max_grad_norm))
            learning_rate = config.optimizer.lr_at(self.steps_done * config.updates_per_step + index)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            metrics = {"critic/loss": total(loss), "critic/grad_norm": norm, "critic/lr": learning_rate}
            self.log_dict(metrics, batch_size=len(data))

    def _value_loss(self, values: Tensor, micro: RolloutBatch) -> Tensor:
        assert self.critic_config is not None
        assert micro.values is not None
        assert micro.returns is not None
        return value_loss(values, micro.values, micro.returns, self.critic_config.value_clip)

    def _train_policy(self, batch: ProblemBatch, data: RolloutBatch) -> None:
        """Take the step's updates, or, during the critic's head start, count them with the weights as they are."""
        for index, minibatch in enumerate(self._mini_batches(batch, data, self.updates_per_step)):
            if self.critic_config is not None and self.steps_done < self.critic_config.head_start:
                self.policy_optimizer.zero_grad()
                self.policy_optimizer.step()  # no gradient, no change
            else:
                self.log_dict(self._update(minibatch, first=index == 0), batch_size=len(data))

    def _token_weights(self, minibatch: RolloutBatch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the tokens of the mini-batch on all ranks, and from a micro-batch's mask to what each token counts in it."""
        mask = minibatch.completion_mask
        num_tokens, num_rows = total(torch.stack([mask.sum(), mask.any(dim=1).sum()])).unbind()
        reduction = self._objective.reduction
        return num_tokens, partial(token_weights, reduction=reduction, num_tokens=num_tokens, num_rows=num_rows)

    def _update(self, minibatch: RolloutBatch, *, first: bool) -> dict[str, Tensor | float]:
        """Take one optimizer step on a mini-batch; return what to log.

        The gradient is that of the mean over all completion tokens of the mini-batch on all ranks, however they are cut: every
        micro-batch adds its tokens with weights that follow from global counts, which are known beforehand.
        """
        self.policy_optimizer.zero_grad()
        num_tokens, weigh = self._token_weights(minibatch)
        cuts = plan(minibatch, self.policy, self.tokens_per_micro_batch)
        norms = self._term_norms(minibatch, cuts, weigh) if first and self._term_norms_are_due() else {}
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        worst = torch.zeros((), device=self.device)
        for micro, stats, terms in self._losses(minibatch, cuts):
            mask = micro.completion_mask
            weights = weigh(mask)
            loss = (terms.total * weights).sum()
            if stats.values is not None:
                assert self.critic_config is not None
                of_values = (self._value_loss(stats.values, micro) * weights).sum()
                loss = loss + self.critic_config.coef * of_values
                sums["critic/loss"] += of_values.detach()
            # FSDP averages gradients over ranks; the factor makes the result that of one device.
            self.manual_backward(loss * self.trainer.world_size)
            with torch.no_grad():
                sums["train/loss"] += loss
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
                    sums[name] += (value * mask).sum() / num_tokens
                worst = torch.maximum(worst, gap.abs().max())
        metrics: dict[str, Tensor | float] = norms | dict(zip(sums, total(torch.stack([*sums.values()])), strict=True))
        if first:
            metrics["mismatch/max"] = greatest(worst)
            if not self._stale:  # else the gap is what the policy has learned since, too
                self._check_mismatch(float(metrics["mismatch/mean_abs"]))
        else:  # the policy has moved on from the sampler: the gap no longer says anything about the engine
            metrics = {n: v for n, v in metrics.items() if not n.startswith("mismatch/")}
        metrics["train/grad_norm"] = self._finite(clip_gradients(self.policy.parameters(), self.max_grad_norm))
        metrics["train/lr"] = self.optimizer_config.lr_at(self.policy_version)
        configs = [self.optimizer_config, *([self.critic_config.optimizer] if self.critic_config is not None else [])]
        for group, config in zip(self.policy_optimizer.param_groups, configs, strict=False):
            group["lr"] = config.lr_at(self.policy_version)
        metrics["train/tokens"] = num_tokens.float()
        metrics["train/computed_tokens"] = total(torch.tensor(float(cuts.tokens), device=self.device))
        self.policy_optimizer.step()  # Lightning counts it: policy_version += 1
        return metrics

    def _losses(self, minibatch: RolloutBatch, cuts: Plan) -> Iterator[tuple[RolloutBatch, TokenStats, LossTerms]]:
        """Yield each micro-batch after its forward pass, with every term of its loss per token."""
        for rows in cuts.cuts:
            micro = micro_batch(minibatch, rows)
            stats = self.policy(micro, as_tree=cuts.as_tree)
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

    def _term_norms(self, minibatch: RolloutBatch, cuts: Plan, weigh: Callable[[Tensor], Tensor]) -> dict[str, Tensor | float]:
        """Return the norm of the gradient of each term of the loss by itself, its coefficient included; leaves no gradient."""
        norms: dict[str, Tensor | float] = {}
        for name, factor in self._objective.coefficients.items():
            for micro, _, terms in self._losses(minibatch, cuts):
                weights = factor * self.trainer.world_size * weigh(micro.completion_mask)
                self.manual_backward((getattr(terms, name) * weights).sum())
            norms[f"train/grad_norm_{name}"] = clip_gradients(self.policy.parameters(), float("inf"))
            self.policy.zero_grad()
        return norms

    def _finite(self, norm: Tensor) -> Tensor:
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is {norm} at update {self.policy_version}: lower the learning rate")
        return norm

    # --- passes without gradient ---------------------------------------------------------------------------------------

    def score(self, data: RolloutBatch) -> Tensor:
        """Return the policy's log-probs (B, S) of the completion tokens, no gradient."""
        return score(data, self.policy, self.tokens_per_micro_batch)[0]

    def _reference_logprobs(self, data: RolloutBatch) -> Tensor:
        with self.reference() as reference:
            return score(data, reference, self.tokens_per_micro_batch)[0]

    def _check_mismatch(self, mean_abs: float) -> None:
        if not mean_abs <= self.mismatch_limit:
            raise RuntimeError(
                f"engine and learner disagree about the sampled tokens by {mean_abs:.3f} nats on average (limit "
                f"{self.mismatch_limit}): the engine holds other weights, another dtype or another prompt. Try "
                "rollout.engine.init_args.dtype: float32 to tell rounding from a bug, or raise model.mismatch_limit knowingly"
            )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[part] += time.perf_counter() - started
