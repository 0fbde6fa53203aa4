"""Every shipped YAML file is read by the parser that users meet; nothing is built."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from rlvr_lightning.cli import RLVRCLI
from rlvr_lightning.data import EvalDataModule
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.paper import SIX
from rlvr_lightning.prompts import PAPER_SYSTEM

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = ("model", "data", "rollout", "trainer")
FILES = sorted(file for group in GROUPS for file in (CONF / group).glob("*.yaml"))
EXPERIMENTS = sorted(CONF.glob("experiment/*.yaml"))
SWEEPS = sorted(CONF.glob("sweep/*.yaml"))

Parse = Callable[..., Any]


class ParsingCLI(RLVRCLI):
    """Stops where parsing ends."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Return the configuration that ``rlvr fit`` would run with, or the command that comes first."""

    def run(*args: object) -> Any:
        command = str(args[0]) if args[0] in ("fit", "test") else "fit"
        rest = args[1:] if args[0] == command else args
        monkeypatch.setattr(sys, "argv", ["rlvr", command, *map(str, rest)])
        return ParsingCLI().config[command]

    return run


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def said(parsed: Any, content: Any, key: str = "") -> None:
    """Assert that everything a file says is in the parsed configuration."""
    if isinstance(content, dict):
        for name, value in content.items():
            said(parsed[name], value, f"{key}.{name}")
    elif isinstance(content, list):
        assert len(parsed) == len(content), key
        for one, value in zip(parsed, content, strict=True):
            said(one, value, key)
    else:
        assert parsed == content or str(parsed) == str(content), key


def test_all_groups_have_files() -> None:
    assert {file.parent.name for file in FILES} == set(GROUPS)
    assert {file.stem for file in EXPERIMENTS} >= {"quickstart", "pi1"}
    assert SWEEPS


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_group_file_parses_alone(parse: Parse, file: Path) -> None:
    group = file.parent.name
    smallest = {
        "model": CONF / "model/smollm2.yaml",
        "data": CONF / "data/three-plus-four.yaml",
        "rollout": CONF / "rollout/hf.yaml",
    }
    arguments = [f"--{name}={path}" for name, path in (smallest | {group: file}).items()]
    config = parse(*arguments)
    said(config.as_dict()[group], yaml.safe_load(file.read_text()))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_an_experiment_composes_and_parses(parse: Parse, file: Path, tmp_path: Path) -> None:
    composed = compose("config", [f"experiment={file.stem}"])
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(composed, resolve=True))
    config = parse("--config", tmp_path / "run.yaml")
    said(config.as_dict(), OmegaConf.to_container(composed, resolve=True))
    own = {k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "defaults"}
    said(config.as_dict(), own)  # what an experiment is about wins over the groups


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_an_experiment_opens_with_the_command_that_runs_it(file: Path) -> None:
    package, command, *_ = file.read_text().splitlines()
    assert package == "# @package _global_"
    assert command.startswith(f"# rlvr sweep experiment={file.stem}")


def test_the_entry_point_composes_and_parses_without_an_experiment(parse: Parse, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(compose("config"), resolve=True))
    config = parse("--config", tmp_path / "run.yaml")
    assert config.rollout.engine.class_path == "rlvr_lightning.engines.hf.HFEngine"
    assert config.seed_everything == 0


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_sweep_composes_and_every_value_of_it_parses(parse: Parse, file: Path, tmp_path: Path) -> None:
    composed = compose("config", ["experiment=quickstart", f"sweep={file.stem}"], return_hydra_config=True)
    assert composed.hydra.mode.name == "MULTIRUN"  # no -m is needed
    parameters = OmegaConf.to_container(composed.hydra.sweeper.params)
    assert parameters
    assert isinstance(parameters, dict)
    for key, values in parameters.items():
        choices = str(values).split(",")
        assert len(choices) > 1
        for value in choices:
            one = compose("config", ["experiment=quickstart", f"{key}={value}"])  # no '+': the key is in the files
            (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(one, resolve=True))
            assert parse("--config", tmp_path / "run.yaml")[key] == float(value)


def test_the_command_line_and_the_sweep_agree_on_a_run(parse: Parse, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(compose("config", ["experiment=quickstart"]), resolve=True))
    swept = parse("--config", tmp_path / "run.yaml").as_dict()
    names = {"model": "smollm2", "data": "three-plus-four", "rollout": "vllm", "trainer": "cpu"}
    direct = parse(*[f"--{group}={CONF / group / name}.yaml" for group, name in names.items()]).as_dict()
    for config in (swept, direct):
        config.pop("config")
        for group in names:
            config[group].pop("__path__", None)
    assert swept == direct


@pytest.mark.parametrize(
    "override", ["++model.objective.entropy_coeff=0.1", "++trainer.max_step=3", "++rollout.sampling.temprature=1"]
)
def test_a_misspelled_key_of_a_sweep_is_refused_by_the_parser(parse: Parse, tmp_path: Path, override: str) -> None:
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(compose("config", [override]), resolve=True))
    with pytest.raises(ConfigError, match=override.split("=")[0].split(".")[-1]):
        parse("--config", tmp_path / "run.yaml")


def test_the_papers_experiment_is_the_papers_setting(parse: Parse, tmp_path: Path) -> None:
    """Batch 128 x 8, T = 0.6, 3072 tokens, lr 1e-6, KL and entropy 0.001, clip 0.2 (arXiv 2504.20571)."""
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(compose("config", ["experiment=pi1"]), resolve=True))
    config = parse("--config", tmp_path / "run.yaml")
    assert config.model.policy.model == "Qwen/Qwen2.5-Math-1.5B"
    assert config.data.init_args.problems_per_step == 128
    sampling = config.rollout.sampling
    assert (sampling.rollouts_per_problem, sampling.temperature, sampling.max_tokens) == (8, 0.6, 3072)
    objective = config.model.objective
    assert (objective.kl_coef, objective.entropy_coef) == (0.001, 0.001)
    assert (objective.clip_low, objective.clip_high) == (0.2, 0.2)
    assert config.model.optimizer.lr == 1e-6
    assert config.model.updates_per_step == 1
    assert config.rollout.eval_sampling.temperature == 0


@pytest.mark.parametrize("data", [None, "paper-eval", "arc", "synthetic-eval"])
def test_the_evaluation_file_parses_with_every_set_of_sets(parse: Parse, data: str | None) -> None:
    other = [] if data is None else [f"--data={CONF / 'data' / data}.yaml"]
    config = parse("test", "--config", CONF / "evaluate.yaml", *other, "--data.init_args.eval_folder=here")
    module = EvalDataModule(**config.data.init_args.as_dict())
    assert module.eval_folder == "here"
    assert list(module.eval_sets) == list(config.data.init_args.evals)
    if data is None:
        assert tuple(module.eval_sets) == SIX
        assert {name: s.rollouts_per_problem for name, s in module.eval_sets.items() if s.temperature} == {
            "aime24": 8, "amc23": 8, "aime25": 8
        }  # fmt: skip
        assert {s.grader for s in module.eval_sets.values()} == {"math"}
    if data == "paper-eval":
        graders = {name: s.grader for name, s in module.eval_sets.items()}
        assert graders.pop("minerva_math") == "paper-eval-keep-units"
        assert set(graders.values()) == {"paper-eval"}


def test_the_papers_evaluation_prompt_is_its_system_message_and_no_suffix(parse: Parse) -> None:
    prompt = parse("test", "--config", CONF / "evaluate.yaml").rollout.eval_prompt
    assert (prompt.system, prompt.suffix, list(prompt.examples)) == (PAPER_SYSTEM, "", [])


def test_no_file_needs_a_key_that_means_something_else_in_yaml() -> None:
    for file in [*FILES, *EXPERIMENTS, *SWEEPS]:
        keys = {part for key, _ in leaves(yaml.safe_load(file.read_text())) for part in str(key).split(".")}
        assert not keys & {"y", "n", "yes", "no", "on", "off", "True", "False"}
