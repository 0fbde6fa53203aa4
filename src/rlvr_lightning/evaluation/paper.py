"""What arXiv 2504.20571 reports, in percent, to stand beside our own numbers."""

from collections.abc import Mapping
from pathlib import PurePath

SIX: tuple[str, ...] = ("math500", "aime24", "amc23", "minerva_math", "olympiadbench", "aime25")
"""The paper's six benchmarks in the order of its tables; its average is their plain mean."""

ARC: tuple[str, ...] = ("arc_easy", "arc_challenge")


def _six(*values: float, arc: tuple[float, ...] = ()) -> Mapping[str, float]:
    return {**dict(zip(SIX, values, strict=True)), **dict(zip(ARC, arc, strict=bool(arc)))}


REPORTED: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "Qwen2.5-Math-1.5B": {
        "untrained": _six(36.0, 6.7, 28.1, 8.1, 22.2, 4.6, arc=(48.0, 30.2)),
        "pi1": _six(72.8, 15.4, 51.6, 29.8, 33.5, 7.1, arc=(52.0, 32.2)),
        "pi1+pi13": _six(74.8, 17.5, 53.1, 29.4, 36.7, 7.9, arc=(52.1, 32.4)),
    },
    "Qwen2.5-Math-7B": {
        "untrained": _six(51.0, 12.1, 35.3, 11.0, 18.2, 6.7),
        "pi1": _six(79.2, 23.8, 60.3, 27.9, 39.1, 10.8),
        "4-shot": _six(78.6, 22.5, 61.9, 36.0, 43.7, 12.1),
    },
    "Llama-3.2-3B-Instruct": {
        "untrained": _six(40.8, 8.3, 25.3, 15.8, 13.2, 1.7),
        "pi1": _six(45.8, 7.9, 25.3, 16.5, 17.0, 1.2),
        "pi1+pi13": _six(49.4, 7.1, 31.6, 18.4, 19.1, 0.4),
    },
    "Qwen2.5-1.5B": {
        "untrained": _six(3.2, 0.4, 3.1, 2.6, 1.2, 1.7),
        "pi1": _six(43.6, 0.8, 14.4, 12.9, 17.6, 0.4),
        "16-shot": _six(53.0, 3.8, 30.3, 19.1, 19.6, 0.0),
    },
    "Qwen2.5-Math-1.5B-Instruct": {
        "untrained": _six(73.4, 10.8, 55.0, 29.0, 38.5, 6.7),
        "pi1": _six(74.6, 12.1, 55.3, 30.9, 37.9, 12.1),
    },
}
"""model -> training data -> set -> percent: Table 7 (HF weights) untrained, Tables 4, 8 and 10 trained with GRPO (checkpoint
of the best average), Table 1 for ARC."""


def reported(model: str) -> Mapping[str, Mapping[str, float]]:
    """Return the paper's rows for a folder or hub id whose last part is the name of one of its models; else nothing."""
    return REPORTED.get(PurePath(model).name, {})
