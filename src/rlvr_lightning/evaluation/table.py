"""The table that ``rlvr test`` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlvr_lightning.evaluation.paper import SIX, reported


def table(results: Mapping[str, Any]) -> str:
    """Return results.json as a table of percents, its fingerprint beside every number and the paper's where it has one."""
    sets: Mapping[str, Any] = results["sets"]
    paper = {data: row for data, row in reported(results["model"]).items() if row.keys() & sets.keys()}
    head = ["set", "problems", "accuracy", "95% interval", "boxed", "truncated", "tokens", *(f"paper: {d}" for d in paper)]
    rows = [[*head, "fingerprint"]]
    for name, result in sets.items():
        metrics, (low, high) = result["metrics"], result["intervals"]["accuracy"]
        rows.append(
            [
                name,
                f"{result['problems']} x {result['samples_per_problem']}",
                _percent(metrics["accuracy"]),
                f"{100 * low:.1f} - {100 * high:.1f}",
                _percent(metrics.get("boxed")),
                _percent(metrics.get("truncated")),
                f"{metrics['length']:.0f}" if "length" in metrics else "",
                *(f"{row[name]:.1f}" if name in row else "" for row in paper.values()),
                result["fingerprint"]["id"],
            ]
        )
    if all(name in sets for name in SIX):
        mean = sum(sets[name]["metrics"]["accuracy"] for name in SIX) / len(SIX)
        theirs = [f"{sum(row[name] for name in SIX) / len(SIX):.1f}" for row in paper.values()]
        rows.append(["average of six", "", _percent(mean), "", "", "", "", *theirs, ""])
    title = f"{results['model']}, policy version {results['policy_version']}, accuracy in percent"
    return "\n".join([title, *_aligned(rows)])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
