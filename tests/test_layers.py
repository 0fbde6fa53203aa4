"""Imports go left only, and heavy packages where they belong."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlvr_lightning

SOURCE = Path(rlvr_lightning.__file__).parent
LAYERS = [
    "errors records startup",
    "grading.verdict grading.boxed",
    "grading.math.tree grading.math.tokens grading.math.normalize grading.math.expression grading.math.rational "
    "grading.math.value grading.math.units grading.math.answers grading.math.relations "
    "grading.math.quantities grading.math.words grading.math.reader "
    "grading.math.fallback grading.math grading.exact grading.choice grading.format "
    "grading.paper_text grading.paper_normal grading.paper_expr grading.paper_train grading.paper_eval "
    "grading.paper_eval_keep_units",
    "grading grading.worker",
    "verify prompts advantages schedule losses logprobs prefix_tree batching models jsonl metrics checkpoints strategies "
    "optimizer engines engines.hf engines.vllm engines.client engines.device_transfer engines.process engines.server "
    "engines.supervise engines.transfer engines.worker grade",
    "evaluation evaluation.module evaluation.reading evaluation.synthetic evaluation.suite evaluation.statistics "
    "evaluation.results evaluation.likelihood evaluation.paper evaluation.table evaluation.compare "
    "sources ranking perturb selection check",
    "backbone policy memory_plan data rollout passes critic learner loggers plots rank saturation sweep_report",
    "module memory",
    "callbacks callbacks.rollout callbacks.evaluation callbacks.history callbacks.transcripts callbacks.checkpoint "
    "callbacks.export callbacks.progress callbacks.saturation callbacks.header callbacks.sampler",
    "cli sweep",
    "quickstart doctor export",
    "package __main__",
]
"""From left to right. Within a layer the order is free, as long as nothing goes in a circle."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer.split()}


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "package"


FILES = {module_name(file): file for file in sorted(SOURCE.rglob("*.py"))}


def imported(file: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports anywhere, lazily or for types included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write absolute imports"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(file: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    names = {name.removeprefix("rlvr_lightning").removeprefix(".") for name in imported(file) if name.startswith("rlvr_l")}
    return {name for name in names if name in FILES} - {"package"}


def test_every_module_has_its_layer() -> None:
    assert set(RANK) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_left_only(name: str) -> None:
    assert {other for other in own(FILES[name]) if RANK[other] > RANK[name]} == set()


def test_no_imports_in_a_circle() -> None:
    left = {name: own(file) - {name} for name, file in FILES.items()}
    while free := {name for name, needs in left.items() if not needs}:
        left = {name: needs - free for name, needs in left.items() if name not in free}
    assert left == {}


def test_vllm_is_imported_where_an_engine_meets_it() -> None:
    assert {n for n, f in FILES.items() if any(i.split(".")[0] == "vllm" for i in imported(f))} == {
        "engines.vllm",  # in this process
        "engines.worker",  # in a server's
        "engines.device_transfer",  # between the two
    }


@pytest.mark.parametrize("package", ["wandb", "peft", "hydra", "pyarrow", "matplotlib"])
def test_other_heavy_or_optional_packages_stay_where_they_belong(package: str) -> None:
    homes = {
        "wandb": set(),  # behind Lightning's WandbLogger
        "peft": {"policy"},
        "hydra": {"sweep", "quickstart", "doctor"},
        "pyarrow": {"evaluation.reading"},
        "matplotlib": {"plots"},
    }
    assert {n for n, f in FILES.items() if any(i.split(".")[0] == package for i in imported(f))} == homes[package]


def test_what_grading_processes_and_help_import_is_free_of_torch() -> None:
    heavy = {"torch", "lightning", "transformers", "numpy", "rlvr_lightning.module"}
    for name in ("errors", "records", "jsonl", "grading", "grading.worker", "verify", "grade", "package"):
        tree = ast.parse(FILES[name].read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top for alias in node.names} | {str(getattr(node, "module", "")) for node in top}
        assert not {n for n in names if n.split(".")[0] in heavy or n in heavy}, name
