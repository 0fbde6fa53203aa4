"""Figures from a run directory. Reads logs, never trainers."""

from pathlib import Path

from rlvr_lightning.jsonl import read_jsonl


def read_curves(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Return every logged metric of a run as (step, value) pairs in the order of writing.

    Args:
        root: a run directory with ``metrics.jsonl``.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_jsonl(root / "metrics.jsonl"):
        for key, value in row.items():
            if key not in ("step", "time", "epoch") and value is not None:
                curves.setdefault(key, []).append((row["step"], value))
    return curves


def plot_run(root: Path, file: Path, *, title: str) -> None:
    """Draw held-out accuracy beside training reward and entropy over the steps, as a PNG.

    Args:
        root: a run directory with ``metrics.jsonl``.
        file: the PNG to write.
        title: first line of the figure.
    """
    from matplotlib.figure import Figure

    curves = read_curves(root)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    held_out, training = figure.subplots(1, 2)
    for key in sorted(k for k in curves if k.startswith("val/") and k.endswith("/accuracy")):
        held_out.plot(*zip(*curves[key], strict=True), marker="o", markersize=3, label=key.split("/")[1])
    held_out.set(title="greedy accuracy on problems never trained on", xlabel="step", ylim=(-0.02, 1.02))
    held_out.legend(frameon=False, fontsize="small")
    training.plot(*zip(*curves.get("rollout/reward", [(0, 0.0)]), strict=True), label="reward", color="tab:green")
    training.set(title="the one training problem", xlabel="step", ylim=(-0.02, 1.02))
    entropy = training.twinx()
    entropy.plot(*zip(*curves.get("train/entropy", [(0, 0.0)]), strict=True), label="entropy (nats)", color="tab:gray", lw=1)
    entropy.set(ylim=(0, None))
    lines = [*training.lines, *entropy.lines]
    training.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize="small", loc="center right")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(file, dpi=150)
