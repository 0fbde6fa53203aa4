"""The half of the Lightning module that holds models: loaded, sharded, optimized, saved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.tensor import DTensor

from rlvr_lightning.backbone import Backbone
from rlvr_lightning.checkpoints import CheckpointFiles, check_fits
from rlvr_lightning.critic import Critic, CriticConfig
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.module import EvaluationModule
from rlvr_lightning.models import bf16_speedup
from rlvr_lightning.optimizer import AdamW, build_optimizer
from rlvr_lightning.policy import Policy, PolicyConfig, PolicyWeights
from rlvr_lightning.strategies import FSDP2Strategy

_Model = TypeVar("_Model", bound=Backbone)


class LearnerModule(EvaluationModule):
    """Policy, reference and critic, and the optimizers of those that train.

    Args:
        policy: which model to train.
        critic: a second model that learns values, or a head on the policy's; None: no critic.
        optimizer: of the policy, on fp32 master weights.
        updates_per_step: the policy's optimizer updates on one batch of rollouts.
        reflection_words: evaluation counts the responses that contain one of them (`metrics.ReflectionRate`).
        offload_reference: keep the frozen reference in main memory, and on the device for its pass only.
    """

    policy: Policy
    critic: Critic
    """Only with ``critic.shared_trunk: false``, and only in a fit."""

    def __init__(
        self,
        policy: PolicyConfig,
        critic: CriticConfig | None,
        optimizer: AdamW,
        updates_per_step: int,
        reflection_words: Sequence[str],
        offload_reference: bool = False,
    ) -> None:
        super().__init__(reflection_words)
        self.automatic_optimization = False
        self.policy_config = policy
        self.critic_config = critic
        self.optimizer_config = optimizer
        self.updates_per_step = updates_per_step
        self.offload_reference = offload_reference
        self._reference: tuple[Policy, ...] = ()  # in a tuple: not a submodule, so never saved and never optimized
        self._loaded_version = 0

    @property
    def uses_reference(self) -> bool:
        """Whether the frozen first policy is needed."""
        raise NotImplementedError

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

    # --- Lightning's set-up --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse trainer settings that would have no effect or would spoil the run."""
        self.check_trainer(self.trainer, training=stage == "fit")
        self.trainer.strategy.checkpoint_io = CheckpointFiles(optimizers=stage == "fit")

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
        """Load the policy once, and for a fit the critic; shard them under FSDP2."""
        critic = self.critic_config
        if not hasattr(self, "policy"):
            head = critic.head(self.policy_config) if critic is not None and critic.shared_trunk else None
            self.policy = self._shard(self.policy_config.build(head), offload=self._offloads)
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if critic is not None and not critic.shared_trunk and fitting and not hasattr(self, "critic"):
            self.critic = self._shard(critic.build(self.policy_config), offload=self._offloads)

    @property
    def _offloads(self) -> bool:
        return isinstance(self.trainer.strategy, FSDP2Strategy) and self.trainer.strategy.offload

    def _shard(self, model: _Model, *, offload: bool) -> _Model:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            dtype = torch.bfloat16 if self.compute_dtype == torch.bfloat16 else None
            model.shard(self.device_mesh["data_parallel"], dtype, offload=offload)
        return model

    def on_fit_start(self) -> None:
        """Load the frozen reference if one is needed; with LoRA it is the adapter switched off."""
        self._loaded_version = 0  # from here on the trainer counts, from the checkpoint's updates if there is one
        if self.uses_reference and self.policy_config.lora is None and not self._reference:
            sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)  # FSDP2 casts by itself
            reference = self.policy_config.build().freeze(torch.float32 if sharded else self.compute_dtype)
            reference = self._shard(reference, offload=self.offload_reference)
            self._reference = (reference if self.offload_reference else reference.to(self.trainer.strategy.root_device),)
        reason = self.policy.check_sharing()
        if hasattr(self, "critic"):
            self.critic.share = self.policy.share  # the same decoder
        if reason and self.trainer.is_global_zero:
            print(f"prefixes are not shared: {reason}", flush=True)
        if self.device.type == "cpu" and self.compute_dtype == torch.bfloat16 and (speedup := bf16_speedup()) < 1:
            slower = f"bfloat16 matrix products run at {speedup:.2f} of the speed of float32 on this CPU"
            print(f"warning: {slower}: set trainer.precision to 32-true", flush=True)

    @contextmanager
    def reference(self) -> Iterator[Policy]:
        """Lend the frozen first policy, on the device: with LoRA the policy itself, its adapters switched off."""
        if not self._reference:
            with self.policy.without_adapters():
                yield self.policy
            return
        (reference,) = self._reference
        with on_device(reference, self.device) if self.offload_reference else nullcontext():
            yield reference

    def configure_optimizers(self) -> list[torch.optim.AdamW]:
        """Return the policy's AdamW, with a group for the value head of a shared trunk, and that of a critic's own copy."""
        weights, critic = dict(self.policy.named_parameters()), self.critic_config
        head = [weights.pop(name) for name in list(weights) if name.startswith("value_head.")]
        of_policy = (self.optimizer_config, weights.values())
        if critic is None:
            optimizers = [build_optimizer(of_policy)]
        elif critic.shared_trunk:
            optimizers = [build_optimizer(of_policy, (critic.optimizer, head))]
        else:
            optimizers = [build_optimizer(of_policy), build_optimizer((critic.optimizer, self.critic.parameters()))]
        for optimizer in optimizers:
            optimizer.register_load_state_dict_pre_hook(_keep_kernels)
        return optimizers

    @property
    def policy_optimizer(self) -> LightningOptimizer:
        """The optimizer whose steps Lightning counts: its number of steps is the policy's version."""
        optimizers = self.optimizers()
        first = optimizers[0] if isinstance(optimizers, list) else optimizers
        assert isinstance(first, LightningOptimizer)
        return first

    # --- checkpoints ---------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember how many updates the loaded weights have seen: evaluation alone does not restore the trainer's count."""
        self._loaded_version = checkpoint["global_step"]
        if not hasattr(self, "critic") and "state_dict" in checkpoint:  # evaluation has no use for one
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("critic.")}
        if "state_dict" in checkpoint:  # FSDP2 has loaded, and checked, its weights already
            shapes = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
            check_fits(shapes, self, f"of {checkpoint.get('rlvr_model')}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which model the weights belong to, so that a checkpoint explains itself."""
        checkpoint["rlvr_model"] = self.policy_config.model


@contextmanager
def on_device(model: _Model, device: torch.device) -> Iterator[_Model]:
    """Lend a model whose weights lie in main memory to ``device``; FSDP2 fetches and drops a sharded model's by itself."""
    tensors = [t for t in chain(model.parameters(), model.buffers()) if not isinstance(t, DTensor)]
    at_home = [t.data for t in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device, non_blocking=True)
    try:
        yield model
    finally:
        for tensor, data in zip(tensors, at_home, strict=True):
            tensor.data = data


def _keep_kernels(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Go on with this run's implementation of AdamW: a sharded and a whole model have different ones."""
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [saved | {key: own[key] for key in ("fused", "foreach")} for saved, own in pairs]
    return state | {"param_groups": groups}
