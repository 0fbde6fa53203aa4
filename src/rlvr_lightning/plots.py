"""Figures from a run directory. Reads logs, never trainers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

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


def plot_history(history: Mapping[str, Sequence[float]], file: Path, *, scores: Sequence[float], label: str) -> None:
    """Draw the accuracy of every problem at each of its visits as a heat map beside the problems' scores, as a PNG.

    Args:
        history: problem id -> accuracies (0 to 1), one row of the map per problem, in this order from the top.
        file: the PNG to write.
        scores: [P] one per problem.
        label: what the scores are.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_problems, num_visits = len(history), max(map(len, history.values()))
    accuracy = np.full((num_problems, num_visits), np.nan)  # nan stays blank
    for row, accuracies in zip(accuracy, history.values(), strict=True):
        row[: len(accuracies)] = accuracies
    figure = Figure(figsize=(9, min(1.8 + 0.2 * num_problems, 10)), layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    edges = np.arange(num_problems + 1) + 0.5
    extent = (0.5, num_visits + 0.5, edges[-1], edges[0])
    image = heat.imshow(accuracy, vmin=0, vmax=1, aspect="auto", extent=extent)
    bars.stairs(scores, edges, orientation="horizontal", fill=True, color="tab:gray")
    heat.set(title=f"{num_problems} problem{'s' * (num_problems > 1)}, sorted by {label}", xlabel="visit")
    bars.set(xlabel=label, ylim=(edges[-1], edges[0]))
    heat.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if num_problems <= 40:
        names = [name if len(name) <= 24 else name[:21] + "..." for name in history]
        heat.set_yticks(range(1, num_problems + 1), names, fontsize="small", parse_math=False)
    else:
        heat.set_ylabel("rank")
    figure.colorbar(image, ax=bars, label="accuracy")
    figure.savefig(file, dpi=150)


def plot_settings(curves: Mapping[str, Sequence[Mapping[str, Sequence[tuple[int, float]]]]], file: Path) -> None:
    """Draw each evaluation set's accuracy, the training reward and the entropy over the steps, one line per setting, as a PNG.

    Args:
        curves: setting -> its runs, each as `read_curves` returns it; the line is the mean, the band from the lowest run to
            the highest.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure

    runs = [run for found in curves.values() for run in found]
    sets = sorted({key for run in runs for key in run if key.startswith("val/") and key.endswith("/accuracy")})
    panels = [*(key for key in sets if key.count("/") == 2), "rollout/reward", "train/entropy"]
    figure = Figure(figsize=(3.2 * len(panels), 3.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for setting, found in curves.items():
            values: dict[int, list[float]] = {}
            for run in found:
                for step, value in run.get(key, []):
                    values.setdefault(step, []).append(value)
            steps = sorted(values)
            if not steps:
                continue
            [line] = axes.plot(steps, [fmean(values[step]) for step in steps], label=setting, lw=1.2)
            low, high = ([pick(values[step]) for step in steps] for pick in (min, max))
            axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), lw=0)
        axes.set(title=key.removeprefix("val/").removesuffix("/accuracy"), xlabel="step")
        if key != "train/entropy":
            axes.set(ylim=(-0.02, 1.02))
    if curves:
        figure.axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)
