"""The policy as an ordinary Hugging Face folder, for vLLM, transformers and everybody else."""

from pathlib import Path
from typing import Literal

import torch
import yaml
from huggingface_hub import save_torch_state_dict
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer

from rlvr_lightning.checkpoints import check_checkpoint, check_fits, read_shards, written_whole
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.policy import PolicyConfig, PolicyWeights


class ExportCallback(Callback):
    """Writes ``<root>/final`` when training ends, and ``<root>/exports/<step>`` at intervals if asked.

    Args:
        dtype: stored precision. bfloat16 is also written into config.json: left at float32, vLLM would load the weights as
            float16 and score differently (arXiv 2504.20571, table 7: 39.6 instead of 36.0 on MATH500 for the same weights).
        every_n_steps: updates between exports; 0 writes only the final one.
    """

    def __init__(self, *, dtype: Literal["bfloat16", "float32"] = "bfloat16", every_n_steps: int = 0) -> None:
        if every_n_steps < 0:
            raise ConfigError(f"export.every_n_steps is {every_n_steps}: set it to 0 (only at the end) or more")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: RLVRModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Export at intervals."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._export(trainer, pl_module, Path(trainer.default_root_dir) / "exports" / f"{trainer.global_step:06d}")

    def on_train_end(self, trainer: Trainer, pl_module: RLVRModule) -> None:
        """Export the trained policy."""
        self._export(trainer, pl_module, Path(trainer.default_root_dir) / "final")

    def _export(self, trainer: Trainer, module: RLVRModule, folder: Path) -> None:
        failure = None
        try:
            export_policy(module.weights(), folder, self.dtype, write=trainer.is_global_zero)
        except ConfigError as error:
            failure = str(error)
        if failure := trainer.strategy.broadcast(failure):  # every rank ends, or waits until the folder is there
            raise ConfigError(failure)


def export_policy(weights: PolicyWeights, folder: Path, dtype: torch.dtype, *, write: bool = True) -> None:
    """Write weights, config, generation config and tokenizer to ``folder``, replacing it only when complete.

    Args:
        weights: the policy; LoRA adapters are merged.
        folder: target.
        dtype: stored precision.
        write: False on ranks that only take part in gathering a sharded policy.

    Raises:
        ConfigError: if the disk is full, or the place cannot be written to.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in weights.tensors():  # collective when sharded: every rank walks through all of it
        if write:
            state[name] = tensor.to("cpu", dtype).contiguous()
    if not write:
        return
    with written_whole(folder) as scratch:
        scratch.mkdir()
        save_torch_state_dict(state, scratch)
        config = weights.policy.lm.config.__class__.from_dict(weights.policy.lm.config.to_dict())
        config.dtype = dtype
        config.save_pretrained(scratch)
        weights.policy.generation_config.save_pretrained(scratch)
        weights.tokenizer.save_pretrained(scratch)


def export_checkpoint(config: Path, ckpt: Path, out: Path) -> None:
    """Write the policy of a checkpoint as :func:`export_policy` does, in one process and without training.

    Args:
        config: the run's ``run.yaml``: which model, with which adapters, in which precision it is exported.
        ckpt: a file, or a folder of shards from any number of processes.
        out: target folder.

    Raises:
        ConfigError: if one of them cannot be read, or they do not belong together.
    """
    check_checkpoint(str(ckpt))
    try:
        run = yaml.safe_load(config.read_text())
        declared, dtype = run["model"]["policy"], run.get("export", {}).get("dtype", "bfloat16")
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{config} is no configuration of a run ({error}): give the run.yaml of its folder") from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=PolicyConfig)
    policy_config: PolicyConfig = parser.instantiate(parser.parse_object({"policy": declared}))["policy"]
    # no optimizer state is read: a file is mapped, and of shards only the weights are fetched
    saved = read_shards(ckpt, optimizers=False) if ckpt.is_dir() else torch.load(ckpt, mmap=True, map_location="cpu")
    start, head = "policy.", "policy.value_head."
    weights = {
        k.removeprefix(start): v for k, v in saved["state_dict"].items() if k.startswith(start) and not k.startswith(head)
    }
    policy = policy_config.build()
    check_fits({name: tensor.shape for name, tensor in weights.items()}, policy, ckpt)
    policy.load_state_dict(weights)
    export_policy(PolicyWeights(policy, torch.float32), out, getattr(torch, dtype))
