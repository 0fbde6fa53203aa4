"""Graders: what counts as an answer, and when it is right. One module each, named in the configuration.

A grader is a module with two functions. ``extract(response)`` finds the answer in a response; it runs in the trainer, in
linear time, and never raises. ``compare(ground_truth, extracted)`` judges it; it runs in a process that can be killed
(:mod:`.worker`), so it may be slow, and may raise. Neither evaluates text as code.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol, cast

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.grading.verdict import Verdict

GRADERS: Mapping[str, str] = {
    "math": "rlvr_lightning.grading.math",
    "paper-train": "rlvr_lightning.grading.paper_train",
    "paper-eval": "rlvr_lightning.grading.paper_eval",
    "paper-eval-keep-units": "rlvr_lightning.grading.paper_eval_keep_units",
    "exact": "rlvr_lightning.grading.exact",
    "choice": "rlvr_lightning.grading.choice",
    "format": "rlvr_lightning.grading.format",
}
"""Name -> module. Any other importable module with the two functions can be named by its dotted path."""


class Grader(Protocol):
    """The two functions of a grader's module."""

    def extract(self, response: str) -> str | None:
        """Return the answer that a response gives, or None."""
        ...

    def compare(self, ground_truth: str, extracted: str) -> Verdict:
        """Return the verdict on an answer."""
        ...


def load_grader(name: str) -> Grader:
    """Return a grader by its name, or by the dotted path of a module.

    Raises:
        ConfigError: if there is none.
    """
    path = GRADERS.get(name, name)
    choices = f"choose one of {', '.join(GRADERS)}, or the dotted path of a module with extract() and compare()"
    if path == name and "." not in name:
        raise ConfigError(f"no grader {name!r}: {choices}")
    try:
        module = import_module(path)
    except ImportError as error:
        raise ConfigError(f"grader {name!r} cannot be imported ({error}): {choices}") from error
    if not callable(getattr(module, "extract", None)) or not callable(getattr(module, "compare", None)):
        raise ConfigError(f"grader {name!r} lacks extract() or compare(): {choices}")
    return cast(Grader, module)
