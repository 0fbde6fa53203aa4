"""The paper's experiments as files: complete, composed by Hydra, read by the parser that users meet, and fed their data."""

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from rlvr_lightning.cli import RLVRCLI
from rlvr_lightning.critic import CriticConfig
from rlvr_lightning.data import SubsetDataModule
from rlvr_lightning.evaluation.suite import EvalSet
from rlvr_lightning.losses import Objective
from rlvr_lightning.perturb import Perturbation
from rlvr_lightning.ranking import rank_problems, read_history
from rlvr_lightning.verify import Verifier

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAPER = CONF / "experiment" / "paper"
DOC = (ROOT / "docs" / "paper.md").read_text()
TRAIN = Path(os.environ.get("RLVR_DATA") or ROOT.parent / "shared" / "data") / "train"
needs_data = pytest.mark.skipif(not TRAIN.is_dir(), reason="the published data files are not here")

SINGLES = (2, 4, 7, 11, 16, 17, 605, 606, 1201, 1207, 1208, 1209)
ROWS = range(1, 14)
FAMILIES = {
    "q15m": "pi1 pi13 pi1_pi13 pi1_pi2 4shot 16shot dsrsub math7500 pi1_noent pi1_T1.0 pi1_simplified "
    "format_dsrsub format_dsrsub_noent format_pi1 format_pi1_noent " + " ".join(f"single_{n}" for n in SINGLES),
    "abl": " ".join(f"row{n}" for n in ROWS),
    "entonly": "q15m llama3b q7m",
    "q7m": "pi1 pi605 pi1209 pi1_pi13 4shot 16shot random16 dsrsub format",
    "llama3b": "pi1 pi1_pi13 4shot dsrsub",
    "r1d15": "pi1 4shot 16shot dsrsub",
    "q25_15b": "pi1 4shot 16shot dsrsub",
    "q15mI": "pi1 dsrsub",
}
NAMES = [f"{family}_{name}" for family, names in FAMILIES.items() for name in names.split()]
PPO = {"ppo_pi1": "q15m_pi1", "ppo_dsrsub": "q15m_dsrsub", "noise60_ppo": "noise60", "noise90_ppo": "noise90"}
NAMES += ["noise60", "noise90", "select_run", *PPO]
"""Every training of the paper."""
TWINS = [f"cpu/row{n}" for n in ROWS]

PG, KL, ENTROPY = "surrogate", "0.001 * KL(policy || reference)", "0.001 * entropy"
OBJECTIVES = {
    1: "loss = 0 (nothing but weight decay moves the weights)",
    2: f"loss = {PG}",
    3: f"loss = {PG}",
    4: f"loss = {PG} + {KL}",
    5: f"loss = {PG} + {KL} - {ENTROPY}",
    6: f"loss = {PG} + {KL} - 0.003 * entropy",
    7: f"loss = {PG} - {ENTROPY}",
    8: f"loss = {KL}",
    9: f"loss = {KL} - {ENTROPY}",
    10: f"loss = - {ENTROPY}",
} | dict.fromkeys((11, 12, 13), f"loss = {PG} + {KL} - {ENTROPY}")
WITHOUT_DECAY = {1, 2, 7, 10}
LABELS = {11: "12.7", 12: "4", 13: "929725"}

Parse = Callable[[str], Any]


class ParsingCLI(RLVRCLI):
    """Stops where parsing ends."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


@pytest.fixture(scope="module")
def parse(tmp_path_factory: pytest.TempPathFactory) -> Parse:
    """Return the configuration that ``rlvr fit`` makes of a preset."""
    file = tmp_path_factory.mktemp("composed") / "run.yaml"

    @cache
    def run(name: str) -> Any:
        file.write_text(OmegaConf.to_yaml(OmegaConf.create(composed(name))))
        return parser.parse_args(["fit", "--config", str(file)]).fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["rlvr"])
        parser = ParsingCLI(["fit", f"--model={CONF}/model/smollm2.yaml", f"--data={CONF}/data/three-plus-four.yaml",
                             f"--rollout={CONF}/rollout/hf.yaml"]).parser  # fmt: skip
    return run


@pytest.fixture(autouse=True)
def _hydra(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RLVR_PAPER_DATA", str(TRAIN))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@cache
def composed(name: str, *overrides: str) -> dict[str, Any]:
    """The resolved content of one preset."""
    content = OmegaConf.to_container(compose("config", [f"experiment=paper/{name}", *overrides]), resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def flat(content: Any, key: str = "") -> dict[str, Any]:
    """Full key -> value."""
    if not isinstance(content, dict) or not content:
        return {key: content}
    return {k: v for name, value in content.items() for k, v in flat(value, f"{key}.{name}" if key else str(name)).items()}


def changes(name: str, base: str = "q15m_pi1") -> dict[str, Any]:
    """What a preset has otherwise than its base; None for what it lacks."""
    one, other = flat(composed(name)), flat(composed(base))
    missing = object()
    return {k: one.get(k) for k in sorted(one | other) if one.get(k, missing) != other.get(k, missing)}


def printed(objective: Any) -> str:
    """The formula that a run prints."""
    return str(Objective(**{k: objective[k] for k in ("policy_coef", "kl_coef", "entropy_coef", "clip_low", "clip_high")}))


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of docs/paper.md, without its head."""
    section = DOC.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in section.splitlines() if line[:1] == "|"][
        2:
    ]


# --- complete ------------------------------------------------------------------------------------------------------------


def test_every_training_of_the_paper_is_a_file() -> None:
    assert {file.stem for file in PAPER.glob("*.yaml")} == set(NAMES)
    assert {f"cpu/{file.stem}" for file in PAPER.glob("cpu/*.yaml")} == set(TWINS)


def test_the_documentation_has_every_preset_with_its_command_and_numbers() -> None:
    rows = table("Presets")
    assert {row[0].strip("`") for row in rows} == set(NAMES)
    twins = table("On a CPU")
    assert [row[0].strip("`") for row in twins] == TWINS
    for name, command, *_ in rows + twins:
        assert command == f"`rlvr sweep experiment=paper/{name.strip('`')}`"
    for name, _, expected, _source in rows:  # the numbers beside a preset are those in its file
        comment = " ".join(
            line[2:] for line in (PAPER / f"{name.strip('`')}.yaml").read_text().splitlines() if line[:2] == "# "
        )
        numbers = re.findall(r"\d+\.\d", expected)
        assert numbers
        assert set(numbers) <= set(re.findall(r"\d+\.\d", comment)), name


@pytest.mark.parametrize("name", [*NAMES, *TWINS])
def test_a_preset_opens_with_the_command_that_runs_it(name: str) -> None:
    package, command, source, *rest = (PAPER / f"{name}.yaml").read_text().splitlines()
    assert package == "# @package _global_"
    assert command == f"# rlvr sweep experiment=paper/{name}"
    assert re.search("arXiv 2504.20571, (Table|Figure|section)" if name in NAMES else "abl_row", f"{source} {rest[0]}")


# --- composed and parsed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, *TWINS])
def test_a_preset_composes_and_parses(parse: Parse, name: str) -> None:
    parsed = flat(json.loads(json.dumps(parse(name).as_dict(), default=str)))  # tuples become lists
    for key, value in flat(composed(name)).items():  # nothing that the files say is lost
        assert parsed[key] == value or str(parsed[key]) == str(value), key


@pytest.mark.parametrize("name", PPO)
def test_ppo_has_the_critic_of_the_papers_code(parse: Parse, name: str) -> None:
    added = {"advantage", "critic.updates_per_step", "critic.head_std"}
    assert set(changes(name, PPO[name])) - {"model.critic"} == {f"model.{key}" for key in added}
    model = parse(name).model
    critic = model.critic
    assert (model.advantage, critic.shared_trunk, critic.gamma, critic.lam, critic.head_start) == ("gae", False, 1.0, 1.0, 0)
    assert (critic.value_clip, critic.updates_per_step, critic.head_std) == (0.5, 8, 0.02)
    assert (critic.optimizer.lr, critic.optimizer.weight_decay) == (1e-5, 0.01)


def test_the_first_preset_is_the_papers_setting(parse: Parse) -> None:
    """Section by section: batch, loss, optimizer, sampling, reward, evaluation."""
    config = parse("q15m_pi1")
    model, sampling = config.model, config.rollout.sampling
    assert config.data.init_args.problems_per_step * sampling.rollouts_per_problem == 1024
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.6, 1.0, 3072)
    assert printed(model.objective) == OBJECTIVES[5]
    assert (model.objective.clip_low, model.objective.clip_high, model.advantage) == (0.2, 0.2, "group_norm")
    assert (model.optimizer.lr, model.optimizer.weight_decay, model.optimizer.warmup_steps) == (1e-6, 0.01, 0)
    assert (tuple(model.optimizer.betas), model.optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert (model.updates_per_step, model.max_grad_norm, model.tokens_per_micro_batch) == (1, 1.0, 24000)
    assert config.rollout.verifier.init_args.grader == "paper-train"
    assert config.rollout.prompt.suffix == " Let's think step by step and output the final answer within \\boxed{}."
    assert (config.rollout.eval_prompt.suffix, config.rollout.eval_sampling.temperature) == ("", 0)
    assert (config.trainer.max_steps, config.trainer.val_check_interval, config.checkpoint.every_n_steps) == (2000, 20, 20)


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_preset_samples_outside_its_processes_and_otherwise_alike(name: str) -> None:
    content, plain = composed(name), yaml.safe_load((CONF / "rollout" / "vllm-paper.yaml").read_text())
    sharded = "FSDP2Strategy" in str(content["trainer"].get("strategy", ""))
    assert content["rollout"]["engine"]["class_path"].endswith("VLLMServerEngine" if sharded else "VLLMEngine")
    other = yaml.safe_load((CONF / "rollout" / "vllm-process-paper.yaml").read_text())
    assert other.pop("engine")["init_args"] == plain.pop("engine")["init_args"]
    assert other == plain


def test_without_a_folder_the_files_are_those_of_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLVR_PAPER_DATA")
    assert composed.__wrapped__("q15m_pi1")["data"]["init_args"]["sources"] == ["./pi1_r128.parquet"]


def test_a_group_of_the_command_line_wins_over_that_of_a_preset() -> None:
    assert composed("q15m_pi1", "trainer=fsdp")["trainer"]["strategy"]["class_path"].endswith("FSDP2Strategy")


# --- the ablation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("paper", [True, False], ids=["paper", "cpu"])
def test_an_ablation_row_has_its_terms_and_nothing_else(parse: Parse, row: int, paper: bool) -> None:
    name = f"abl_row{row}" if paper else f"cpu/row{row}"
    config = parse(name)
    assert printed(config.model.objective) == OBJECTIVES[row]
    assert config.model.optimizer.weight_decay == (0.0 if row in WITHOUT_DECAY else 0.01)
    changed = set(changes(name, "q15m_pi1" if paper else "../quickstart"))
    label = "data.init_args.perturb.answers" if paper else "data.init_args.answer"
    changed = {key for key in changed if not key.startswith(("model.objective.", "model.optimizer.weight_decay", label))}
    assert changed <= ({"trainer.max_steps"} if paper and row in (9, 10) else set())


def test_the_labels_of_rows_11_to_13() -> None:
    for row in ROWS:
        assert composed(f"abl_row{row}")["data"]["init_args"]["perturb"]["answers"] == (
            {"124": LABELS[row]} if row in LABELS else {}
        )
        twin = composed(f"cpu/row{row}")["data"]["init_args"]
        assert (twin["answer"] != "7") == (row in LABELS), "3 + 4 is 7"


def test_the_ablation_sweep_holds_the_rows_that_are_one_of_its_runs() -> None:
    params = yaml.safe_load((CONF / "sweep" / "ablation.yaml").read_text())["hydra"]["sweeper"]["params"]
    runs = list(product(*[[float(value) for value in values.split(",")] for values in params.values()]))
    for row in set(ROWS) - {6, 11, 12, 13}:
        content = flat(composed(f"abl_row{row}"))
        assert runs.count(tuple(content[key] for key in params)) == 1, row


# --- what differs from the first preset, and nothing else ------------------------------------------------------------------

DATA, MODEL, STEPS = "data.init_args.", "model.policy.model", "trainer.max_steps"


def test_a_row_of_data_changes_the_data_alone() -> None:
    kinds = ("pi13", "pi1_pi13", "pi1_pi2", "4shot", "16shot", "dsrsub", "math7500", "pi1_simplified")
    names = [f"q15m_{kind}" for kind in kinds]
    names += [f"q15m_single_{n}" for n in SINGLES] + ["noise60", "noise90"]
    for name in names:
        assert changes(name), name
        assert all(key.startswith(DATA) for key in changes(name)), name


def test_the_other_rows_change_what_they_say() -> None:
    grader, entropy = {"rollout.verifier.init_args.grader": "format", STEPS: 500}, {"model.objective.entropy_coef": 0.0}
    assert changes("q15m_pi1_noent") == entropy
    assert changes("q15m_pi1_T1.0") == {"rollout.sampling.temperature": 1.0}
    assert changes("q15m_format_pi1") == changes("q15m_format_dsrsub", "q15m_dsrsub") == grader
    assert changes("q15m_format_pi1_noent", "q15m_format_pi1") == entropy
    assert changes("q15m_format_dsrsub_noent", "q15m_format_dsrsub") == entropy
    assert changes("select_run", "q15m_dsrsub") == {STEPS: 500}
    assert changes("entonly_q15m", "abl_row10") == {STEPS: 20, "trainer.val_check_interval": 2}


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("q7m", "llama3b", "r1d15", "q25_15b", "q15mI", "entonly"))])
def test_another_model_keeps_data_and_hyperparameters(name: str) -> None:
    models = {
        "q7m": ("Qwen/Qwen2.5-Math-7B", 1000),
        "llama3b": ("meta-llama/Llama-3.2-3B-Instruct", 1000),
        "r1d15": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1200),
        "q25_15b": ("Qwen/Qwen2.5-1.5B", 2000),
        "q15mI": ("Qwen/Qwen2.5-Math-1.5B-Instruct", 2000),
        "q15m": ("Qwen/Qwen2.5-Math-1.5B", 20),
    }
    family, _, rest = name.rpartition("_") if name.startswith("entonly") else name.partition("_")
    family, rest = ("q25_15b", rest.removeprefix("15b_")) if family == "q25" else (family, rest)
    base = {"pi605": "single_605", "pi1209": "single_1209", "format": "format_dsrsub", "random16": "dsrsub"}.get(rest, rest)
    model, steps = models[rest if family == "entonly" else family]
    if family == "entonly":
        steps = {"q15m": 20, "llama3b": 10, "q7m": 4}[rest]
    content = flat(composed(name))
    assert (content[MODEL], content[STEPS]) == (model, steps)
    changed = changes(name, "entonly_q15m" if family == "entonly" else f"q15m_{base}")
    skipped = (MODEL, STEPS, "rollout.engine.class_path")
    changed = {k: v for k, v in changed.items() if k not in skipped and not k.startswith("trainer.")}
    longer = {"rollout.sampling.max_tokens": 8192, "rollout.eval_sampling.max_tokens": 8192}
    assert changed == (longer if family == "r1d15" else {"data.init_args.random": 16} if rest == "random16" else {})


def test_the_models_of_the_paper_differ_in_nothing_but_their_name() -> None:
    names = ["qwen2.5-math-7b", "qwen2.5-1.5b", "qwen2.5-math-1.5b-instruct", "llama-3.2-3b-instruct", "r1-distill-qwen-1.5b"]
    contents = [yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()) for name in ["qwen2.5-math-1.5b", *names]]
    models = {content["policy"].pop("model").rpartition("/")[2].lower() for content in contents}
    assert models == {"qwen2.5-math-1.5b", "deepseek-r1-distill-qwen-1.5b", *names} - {"r1-distill-qwen-1.5b"}
    assert all(content == contents[0] for content in contents)


# --- settings in the documentation ------------------------------------------------------------------------------------------


def test_every_key_of_the_documented_settings_exists(parse: Parse) -> None:
    config = parse("q15m_pi1")
    for _, keys, _, _ in table("Settings"):
        first, *others = re.findall(r"`([^`]+)`", keys) or [""]
        prefix = first.rpartition(".")[0]
        for key in [first, *(other if "." in other or other in config else f"{prefix}.{other}" for other in others)]:
            node: Any = config.as_dict()
            if key.startswith("evals.NAME."):  # a field of an evaluation set
                assert key.removeprefix("evals.NAME.") in EvalSet.__dataclass_fields__, key
                continue
            if key.startswith("model.critic."):  # this preset has none
                assert key.removeprefix("model.critic.") in CriticConfig.__dataclass_fields__, key
                continue
            for part in key.split(".") if key else []:
                assert part in node, key
                node = node[part]


# --- fed with the published files ---------------------------------------------------------------------------------------------


def problems(name: str) -> SubsetDataModule:
    """The data of a preset, loaded and perturbed."""
    arguments = composed(name)["data"]["init_args"]
    data = SubsetDataModule(**arguments | {"perturb": Perturbation(**arguments["perturb"])})
    data.setup("test")
    return data


@needs_data
def test_a_preset_named_after_ranks_holds_the_problems_of_these_ranks() -> None:
    """Ranked from the published accuracy history; a row of n problems has n, each drawn as often as the others."""
    rank = {row.rank: row.id for row in rank_problems(read_history(TRAIN / "acc_step_500.json"))}
    expected = {"q15m_pi1": [1], "q15m_pi13": [13], "q15m_pi1_pi13": [1, 13], "q15m_pi1_pi2": [1, 2]}
    expected |= {"q15m_4shot": [1, 2, 13, 1209], "q15m_16shot": list(range(1, 17))}
    expected |= {f"q15m_single_{n}": [n] for n in SINGLES}
    for name, ranks in expected.items():
        data = problems(name)
        assert [p.id for p in data.train_problems] == [rank[n] for n in ranks], name
        served = next(iter(data.train_dataloader()))
        counts = {i: sum(p.id == i for p in served.problems) for i in [rank[n] for n in ranks]}
        assert set(counts.values()) == {128 // len(ranks)}, name
        assert len(data.eval_problems["math500"]) == 500


@needs_data
def test_the_pool_is_all_of_it_but_the_row_without_an_answer() -> None:
    data = problems("q15m_dsrsub")
    rows = json.loads((TRAIN / "acc_step_500.json").read_text())
    assert len(data.train_problems) == len(rows) - 1 == 1208
    assert data.changes == []
    sixteen = problems("q7m_random16").train_problems
    assert len({p.id for p in sixteen}) == 16
    assert {p.id for p in sixteen} <= {p.id for p in data.train_problems}


@needs_data
def test_what_is_changed_in_the_problems_is_what_the_row_says() -> None:
    for row, label in LABELS.items():
        assert problems(f"abl_row{row}").changes == [{"id": "124", "field": "answer", "before": "12.8", "after": label}]
    (change,) = problems("q15m_pi1_simplified").changes
    assert (change["field"], change["after"]) == ("question", "Calculate $\\sqrt[3]{2048}$")
    wrong = {share: {c["id"] for c in problems(f"noise{share}").changes} for share in (60, 90)}
    assert {share: len(ids) for share, ids in wrong.items()} == {60: 725, 90: 1087}  # of 1208
    assert wrong[60] < wrong[90]


@needs_data
def test_no_ground_truth_of_the_paper_is_beyond_its_reward() -> None:
    verifier = Verifier("paper-train")
    try:
        assert verifier.unverifiable(problems("q15m_dsrsub").train_problems) == []
    finally:
        verifier.close()
