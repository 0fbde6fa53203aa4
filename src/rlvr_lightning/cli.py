"""``rlvr fit|validate|test|predict``: Lightning's command line over RLVRModule, a data module and the callbacks."""

import difflib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from rlvr_lightning.callbacks.checkpoint import CheckpointCallback
from rlvr_lightning.callbacks.evaluation import EvaluationCallback
from rlvr_lightning.callbacks.export import ExportCallback
from rlvr_lightning.callbacks.history import HistoryCallback
from rlvr_lightning.callbacks.progress import ProgressCallback
from rlvr_lightning.callbacks.rollout import RolloutCallback
from rlvr_lightning.callbacks.saturation import SaturationCallback
from rlvr_lightning.callbacks.transcripts import TranscriptCallback
from rlvr_lightning.checkpoints import check_checkpoint
from rlvr_lightning.critic import CriticConfig
from rlvr_lightning.data import EvalDataModule, ProblemDataModule, SingleExampleDataModule, SubsetDataModule
from rlvr_lightning.engines import Sampling
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.engines.server import VLLMServerEngine
from rlvr_lightning.engines.vllm import VLLMEngine
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.suite import EvalSet
from rlvr_lightning.loggers import MetricsFileLogger
from rlvr_lightning.losses import Objective
from rlvr_lightning.module import RLVRModule
from rlvr_lightning.optimizer import AdamW
from rlvr_lightning.perturb import Perturbation
from rlvr_lightning.policy import LoRA, PolicyConfig
from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.schedule import Schedule
from rlvr_lightning.sources import TrainSource
from rlvr_lightning.startup import limit_threads
from rlvr_lightning.verify import Verifier

CALLBACKS: dict[str, type] = {
    "evaluation": EvaluationCallback,  # before rollout, which samples what this one does not know
    "rollout": RolloutCallback,  # the others read what it attaches
    "transcripts": TranscriptCallback,
    "history": HistoryCallback,
    "saturation": SaturationCallback,
    "checkpoint": CheckpointCallback,
    "export": ExportCallback,
    "progress": ProgressCallback,
}
"""Every callback has a top-level key of its own: Hydra cannot override the elements of a list."""


class RLVRParser(LightningArgumentParser):
    """The parser with errors of one message: what is wrong, and the key that was probably meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing a page of usage.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(_explain(message)) from ex


class SaveRunConfig(SaveConfigCallback):
    """Writes ``run.yaml`` into the run directory: ``rlvr fit --config run.yaml`` repeats the run, from its beginning."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        config = config.clone()
        config["ckpt_path"] = None
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save for a fit only: evaluating a run must not overwrite what it was trained with."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class RLVRCLI(LightningCLI):
    """Adds the callbacks as top-level keys, one seed for everything, and the local metrics file."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            RLVRModule,
            ProblemDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=RLVRParser,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True, "config_filename": "run.yaml"},
            trainer_defaults={
                # These belong to the algorithm, not to a machine.
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "inference_mode": False,
                "log_every_n_steps": 1,
                "val_check_interval": 20,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Register the callbacks and tie every seed to the one of the run."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.add_argument(
            "--evaluate_first", type=bool, default=True, help="Evaluate before the first update of a fresh run."
        )
        parser.link_arguments("seed_everything", "rollout.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def _parse_ckpt_path(self) -> None:
        """Take no hyperparameters from the checkpoint: run.yaml is the configuration; but check that the file is one."""
        path = self.config[self.config["subcommand"]].get("ckpt_path")
        if path is not None:
            check_checkpoint(str(path))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the local metrics file in front of the configured loggers: it is always written."""
        config = self._get(self.config_init, "trainer")
        root = config.get("default_root_dir") or "runs/default"
        configured = config.get("logger")
        others = configured if isinstance(configured, list) else [configured] if configured not in (None, True, False) else []
        return super().instantiate_trainer(default_root_dir=root, logger=[MetricsFileLogger(root), *others], **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Test without Lightning's own table, which knows no fingerprint."""
        self._evaluate(self.trainer.test, **kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Validate without Lightning's own table."""
        self._evaluate(self.trainer.validate, **kwargs)

    def _evaluate(self, run: Callable[..., Any], **kwargs: Any) -> None:
        try:
            run(**(kwargs | {"verbose": False}))
        except SystemExit:  # how Lightning ends an interrupted run
            if self.trainer.interrupted:
                raise KeyboardInterrupt from None
            raise

    def before_fit(self) -> None:
        """Evaluate the untrained policy, unless this run continues another; refuse before that what cannot be trained."""
        self.model.check_trainer(self.trainer, training=True)
        rollout: RolloutCallback = self._get(self.config_init, "rollout")
        rollout.check_training(self.model, self.datamodule.problems_per_step)
        if self._get(self.config, "ckpt_path") is not None:
            return
        for logger in self.trainer.loggers:
            if isinstance(logger, MetricsFileLogger):
                logger.truncate_after(-1)  # a fresh run in an old folder starts its file anew
        if self._get(self.config, "evaluate_first") and self.datamodule.eval_sets:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def main(args: list[str]) -> int:
    """Run one subcommand; return the exit status.

    Returns:
        0 when done, 128 + signal number when asked to stop (the checkpoint is saved).
    """
    return run(args)[0]


def run(args: list[str]) -> "tuple[int, RLVRCLI]":
    """Run one subcommand; return the exit status and the command line object with its trainer."""
    sys.argv = [sys.argv[0], *args]  # Lightning starts further ranks by repeating this command
    _quiet()
    limit_threads()
    try:
        cli = RLVRCLI()
    except ValueError as error:  # jsonargparse wraps what a constructor raised
        raise _own_error(error) or error from None
    callbacks = cli.trainer.checkpoint_callbacks
    stopped = [c.stopped_by for c in callbacks if isinstance(c, CheckpointCallback) and c.stopped_by]
    return (128 + stopped[0] if stopped else 0), cli


def _own_error(error: BaseException | None) -> ConfigError | None:
    """Return the first ConfigError in an exception's chain."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def _quiet() -> None:
    """Silence what says nothing about this run: device tables, tips, and warnings about things done on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    for message in (
        r".*module\(s\) in eval mode at the start of training.*",  # dropout is off: the ratio compares one network
        r".*It is recommended to use `self\.log\(.*sync_dist.*",  # evaluators have summed over ranks already
        r".*isinstance\(treespec, LeafSpec\).*",
    ):
        warnings.filterwarnings("ignore", message=message)


_UNKNOWN_KEY = re.compile(
    r"[Uu]nrecognized arguments?: --([\w.]+)|[Kk]ey '([\w.]+)' is not expected|does not accept option '([\w.]+)'"
    r"|Option '([\w.]+)' is not accepted"
)


def _explain(message: str) -> str:
    """Shorten jsonargparse's message and add the known key that is closest to one it did not know."""
    text = "\n".join(line.rstrip() for line in message.strip().splitlines() if line.strip())
    unknown = _UNKNOWN_KEY.search(text)
    if unknown is None:
        return text
    key = next(group for group in unknown.groups() if group)
    place = re.search(r'Parser key "([\w.]+)"', text)
    full = f"{place[1]}.{key}" if place and not key.startswith(place[1]) else key
    prefix, _, name = full.rpartition(".")
    close = difflib.get_close_matches(name, _key_names(), n=1, cutoff=0.7)
    hint = f"did you mean '{prefix}.{close[0]}'?".replace("'.", "'") if close else "`rlvr fit --help` lists the keys"
    return f"unknown key '{full}': {hint}\n{text}"


def _key_names() -> list[str]:
    """Return the last part of every key: the parameters of all classes that a configuration may name, and the top level."""
    classes = [Trainer, RLVRModule, PolicyConfig, LoRA, Objective, CriticConfig, Schedule, AdamW, Sampling]
    classes += [
        PromptTemplate,
        Verifier,
        ProblemDataModule,
        SingleExampleDataModule,
        SubsetDataModule,
        EvalDataModule,
        EvalSet,
        TrainSource,
        Perturbation,
    ]
    classes += [HFEngine, VLLMEngine, VLLMServerEngine, *CALLBACKS.values()]
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    return sorted(names | {"seed_everything", "trainer", "model", "data", "evaluate_first", "ckpt_path", "config", *CALLBACKS})
