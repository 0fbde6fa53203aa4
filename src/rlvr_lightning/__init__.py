"""One-example RLVR as a Lightning trainer. Names load on first use, so that importing the package costs nothing."""

from importlib import import_module

__version__ = "0.1.0"
_EXPORTS = {
    "Problem": "records",
    "Completion": "records",
    "Score": "records",
    "Rollout": "records",
    "ProblemBatch": "records",
    "ConfigError": "errors",
    "RolloutBatch": "batching",
    "Verifier": "verify",
    "PromptTemplate": "prompts",
    "Objective": "losses",
    "Schedule": "schedule",
    "PolicyConfig": "policy",
    "RLVRModule": "module",
    "SingleExampleDataModule": "data",
    "SubsetDataModule": "data",
    "EvalDataModule": "data",
    "Sampling": "engines",
    "HFEngine": "engines.hf",
    "VLLMEngine": "engines.vllm",
    "VLLMServerEngine": "engines.server",
    "EngineDiedError": "engines",
    "StaleEngineError": "engines",
    "CriticConfig": "critic",
    "RolloutCallback": "callbacks.rollout",
    "EvaluationCallback": "callbacks.evaluation",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
