"""The documentation against the code: logged keys, files, commands, the script of the README, paths."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "rlvr_lightning"
README = (ROOT / "README.md").read_text()
METRICS = (ROOT / "docs" / "metrics.md").read_text()
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
KEY = re.compile(r"(?:train|rollout|critic|mismatch|time|memory|val|test)/[\w@<>{}/]*[\w>}]")


def table_names(text: str) -> list[str]:
    """The first cell of every table row, where it is a name in backticks."""
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of the same or a higher level."""
    level = heading.split()[0]
    body = text.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{len(level)}}} ", body, flags=re.MULTILINE)[0]


def blocks(language: str) -> list[str]:
    """The code blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


# --- logged keys -------------------------------------------------------------------------------------------------------


def documented_keys() -> set[str]:
    names = table_names(section(METRICS, "## Logged keys"))
    assert len(names) == len(set(names)), "a key is documented twice"
    return set(names)


def strings(tree: ast.AST) -> Iterator[str]:
    """Every string of a module; in f-strings a value becomes {its source}."""
    inside = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(v.value) if isinstance(v, ast.Constant) else "{" + ast.unparse(v.value) + "}"
                for v in node.values
                if isinstance(v, ast.Constant | ast.FormattedValue)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def keys_in_source() -> set[str]:
    """Keys spelled in the source, with every f-string expanded to what its loop can yield."""
    from rlvr_lightning.losses import Objective
    from rlvr_lightning.metrics import evaluation_metrics, rollout_metrics

    trees = {path: ast.parse(path.read_text()) for path in SRC.rglob("*.py")}
    means = set(rollout_metrics())
    evaluated = {generic(key) for key in evaluation_metrics(2, subjects=["<subject>"])}
    timed = {
        call.args[0].value
        for call in ast.walk(trees[SRC / "module.py"])
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "_timed"
        and isinstance(call.args[0], ast.Constant)
    }
    parts = timed | {"sync", "generate", "grade", "wait"}  # Sampler.attach and Collector.seconds
    expansions = {
        "rollout/{key}": {f"rollout/{m}" for m in means},
        "time/{part}_s": {f"time/{p}_s" for p in parts},
        "{stage}/{name}/{k}": {f"{stage}/<set>/{m}" for stage in ("val", "test") for m in evaluated},
        "val/{name}/accuracy": {"val/<set>/accuracy"},  # read back by the quickstart
        "train/grad_norm_{name}": {f"train/grad_norm_{n}" for n in Objective(kl_coef=1.0, entropy_coef=1.0).coefficients},
    }
    found: set[str] = {"step"}
    for tree in trees.values():
        for text in strings(tree):
            if text in expansions:
                found |= expansions[text]
            elif KEY.fullmatch(text):
                assert "{" not in text, f"an f-string that this test does not know: {text!r}"
                found.add(text)
    return found


def generic(key: str) -> str:
    """A metric's name with its number of samples and its subject left open."""
    key = re.sub(r"(avg|maj)@\d+", r"\1@<n>", key)
    key = re.sub(r"pass@\d+", "pass@<k>", key)
    return re.sub(r"accuracy/.+", "accuracy/<subject>", key)


def test_every_key_in_the_source_is_documented_and_every_documented_key_is_in_the_source() -> None:
    assert keys_in_source() == documented_keys()


def test_the_keys_of_a_real_run_are_the_documented_ones(tiny_model: Path, tmp_path: Path) -> None:
    import lightning as L

    from rlvr_lightning import HFEngine, Objective, PolicyConfig, RLVRModule, RolloutCallback, Sampling, SingleExampleDataModule
    from rlvr_lightning.callbacks.history import HistoryCallback
    from rlvr_lightning.callbacks.saturation import SaturationCallback
    from rlvr_lightning.callbacks.transcripts import TranscriptCallback, read_transcripts
    from rlvr_lightning.critic import CriticConfig
    from rlvr_lightning.jsonl import read_jsonl
    from rlvr_lightning.loggers import MetricsFileLogger
    from rlvr_lightning.records import Score
    from rlvr_lightning.verify import Verifier

    class Parity(Verifier):
        """Rewards that differ: by whether the number of tokens' ids is even."""

        def __call__(self, pairs: Any, grader: str | None = None) -> list[Score]:
            return [Score(float(c.token_ids[0] % 2), c.token_ids[0] % 2 == 1, "correct", None) for _, c in pairs]

    # Two updates, a KL term and a critic: no key is left out.
    module = RLVRModule(
        policy=PolicyConfig(model=str(tiny_model)),
        objective=Objective(kl_coef=0.001),
        advantage="gae",
        critic=CriticConfig(),
        updates_per_step=2,
        term_norms_every=1,
        mismatch_limit=1e9,
    )
    (tmp_path / "sums.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "2", "field": "sums"}\n')
    sums = {"file": str(tmp_path / "sums.jsonl"), "subject": "field", "rollouts_per_problem": 2, "temperature": 1.0}
    data = SingleExampleDataModule(question="What is 3 + 4?", answer="7", problems_per_step=4, evals={"sums": sums})
    rollouts = RolloutCallback(
        engine=HFEngine(),
        sampling=Sampling(rollouts_per_problem=2, temperature=1.0, max_tokens=3),
        eval_sampling=Sampling(rollouts_per_problem=1, temperature=0.0, max_tokens=3),
        verifier=Parity(),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        inference_mode=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        logger=MetricsFileLogger(tmp_path),
        callbacks=[rollouts, TranscriptCallback(), HistoryCallback(), SaturationCallback()],
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)

    lines = list(read_jsonl(tmp_path / "metrics.jsonl"))
    logged = {generic(re.sub(r"^(val|test)/sums/", r"\1/<set>/", key)) for line in lines for key in line}
    assert logged - {"time"} == documented_keys() - {"memory/device_peak_gib"}  # there is no GPU
    assert {"step", "time"} <= set(table_names(section(METRICS, "### metrics.jsonl")))

    history = next(read_jsonl(tmp_path / "history.jsonl"))
    assert list(history) == table_names(section(METRICS, "### history.jsonl"))
    files = sorted((tmp_path / "rollouts").iterdir())
    assert len(files) == 2
    for file in files:
        assert list(next(read_transcripts(file))) == table_names(section(METRICS, "### rollouts/"))


def test_summary_fields_are_documented() -> None:
    tree = ast.parse((SRC / "quickstart.py").read_text())
    summary = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_summary")
    returned = next(n.value for n in ast.walk(summary) if isinstance(n, ast.Return))
    assert isinstance(returned, ast.Dict)
    fields = [key.value for key in returned.keys if isinstance(key, ast.Constant)]
    assert fields == table_names(section(METRICS, "### summary.json"))


# --- commands ----------------------------------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    """The words of every command in the README's shell blocks: continuation lines joined, comments and quotes gone."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [split for line in lines if (split := shlex.split(line, comments=True))]


def words(kind: str) -> list[list[str]]:
    """The words after ``rlvr`` of every command of one kind."""
    return [w[1:] for w in commands() if w[0] == "rlvr" and w[1] in kind.split("|")]


def parsed(monkeypatch: pytest.MonkeyPatch, args: list[str]) -> str:
    """What ``--print_config`` prints for a command; raises ConfigError if it does not parse."""
    from rlvr_lightning import cli

    monkeypatch.setattr(sys, "argv", ["rlvr"])
    out = StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as exit_:
        cli.RLVRCLI([*args, "--print_config"])
    assert exit_.value.code in (0, None)
    return out.getvalue()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the repository, with the run that some commands start from."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    first = next(w for w in words("fit") if "runs/mine" in w)
    (tmp_path / "runs" / "mine" / "run.yaml").write_text(parsed(monkeypatch, first))
    return tmp_path


def test_the_readme_has_commands_of_every_kind() -> None:
    for kind in ("fit", "validate", "test", "compare", "grade", "sweep", "quickstart"):
        assert words(kind), kind


@pytest.mark.parametrize("args", words("fit|validate|test"), ids=" ".join)
def test_fit_commands_of_the_readme_parse(args: list[str], checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "policy:" in parsed(monkeypatch, args)


@pytest.mark.parametrize("args", words("sweep"), ids=" ".join)
def test_sweep_commands_of_the_readme_compose_and_parse(
    args: list[str], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    overrides = [a for a in args[1:] if a != "-m"]
    jobs = [""]  # one job: the first value of what is swept
    for override in OverridesParser.create().parse_overrides(overrides):
        swept = override.is_sweep_override()
        assert swept <= ("-m" in args), "several values need -m"
        text = override.input_line or ""
        jobs.append(f"{override.get_key_element()}={next(override.sweep_string_iterator())}" if swept else text)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [job for job in jobs if job])
        if any("sweep=" in a for a in args):
            params = compose("config", [job for job in jobs if job], return_hydra_config=True).hydra.sweeper.params
            assert all(OmegaConf.select(config, key) is not None for key in params)
    OmegaConf.save(config, checkout / "composed.yaml")
    assert "policy:" in parsed(monkeypatch, ["fit", "--config", "composed.yaml"])


@pytest.mark.parametrize("args", words("quickstart"), ids=" ".join)
def test_quickstart_commands_of_the_readme_parse(args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from rlvr_lightning.quickstart import quickstart

    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(quickstart, as_positional=False)
    parser.parse_args(args[1:])


def test_every_other_command_of_the_readme_is_known() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for first, *rest in commands():
        assert first in ("rlvr", "make", "pip", "python3"), first
        assert first != "make" or rest[0] in targets, rest


def test_the_install_commands_are_those_of_the_makefile() -> None:
    recipe = (ROOT / "Makefile").read_text().replace("\\\n", " ").replace("--quiet ", "")
    lines = [" ".join(shlex.split(line)) for line in recipe.splitlines() if "-m pip install" in line]
    by_hand = [" ".join(c[1:]) for c in commands() if c[0] == "pip" and c[2:] != [".[vllm]"]]
    assert by_hand
    assert [line.split("-m pip ")[1].split(" ||")[0].strip() for line in lines] == by_hand


# --- code --------------------------------------------------------------------------------------------------------------


def test_the_objective_stands_in_the_source_as_in_the_readme() -> None:
    formula = next(b for b in blocks("python") if b.startswith("ratio"))
    source = {line.strip() for name in ("losses.py", "module.py") for line in (SRC / name).read_text().splitlines()}
    assert len(formula.splitlines()) == 7
    assert set(formula.splitlines()) <= source


@pytest.mark.slow
def test_the_script_of_the_readme_trains(tiny_model: Path, tmp_path: Path) -> None:
    script = next(b for b in blocks("python") if b.startswith("import lightning"))
    shorter = {
        "embedded:SmolLM2-135M-Instruct": str(tiny_model),
        "max_tokens=48": "max_tokens=3",
        "max_steps=30": "max_steps=2",
        "val_check_interval=5": "val_check_interval=1",
    }
    for old, new in shorter.items():
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs" / "script" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2]  # a training line and an evaluation each


# --- paths -------------------------------------------------------------------------------------------------------------


def test_the_map_names_what_exists_and_every_module() -> None:
    mapped = table_names(section(README, "## Map of the repository"))
    for path in mapped:
        assert (ROOT / path).exists(), path
    modules = {str(path.relative_to(ROOT)) for path in SRC.rglob("*.py")}
    assert modules <= set(mapped), f"not in the map: {sorted(modules - set(mapped))}"


@pytest.mark.parametrize("document", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not link.startswith(("http:", "https:", "mailto:")):
            target, _, anchor = link.partition("#")
            path = document.parent / target if target else document
            assert path.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}, link


@pytest.mark.parametrize("page", ["data-flow.md", "math.md"])
def test_what_a_page_points_at_exists(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert places
    for file, name in places:
        source = (SRC / file).read_text()
        for part in name.split("."):
            assert re.search(rf"(?:def|class) {part}\b|^{part}\b", source, flags=re.MULTILINE), f"{file}:{name}"


def test_no_number_of_the_readme_is_left_to_fill() -> None:
    assert not re.findall(r"\{\{\w*", README)
