"""``rlvr compare A B``: which of two evaluations is better, on the problems that both have, and how sure that is."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.statistics import PairedDifference, accuracy, bootstrap_interval, paired_difference
from rlvr_lightning.jsonl import read_jsonl

CONDITIONS = ("prompt", "sampling", "grader")
"""Parts of a fingerprint that ought to be equal, or the difference is not the model's alone."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One ``evaluation/`` folder, as ``rlvr test`` writes it."""

    folder: Path
    results: dict[str, Any]
    """The content of results.json."""

    @property
    def sets(self) -> dict[str, dict[str, Any]]:
        """What results.json says about each set."""
        return self.results["sets"]

    def verdicts(self, name: str) -> dict[str, list[bool]]:
        """Return problem id -> whether each sample was correct, read from ``<name>.jsonl``.

        Raises:
            ConfigError: The file is absent, damaged, or does not have as many rows as results.json says.
        """
        file = self.folder / f"{name}.jsonl"
        try:
            rows = list(read_jsonl(file))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        expected = self.sets[name]["problems"] * self.sets[name]["samples_per_problem"]
        if len(rows) != expected:
            raise ConfigError(f"{file}: {len(rows)} rows, and results.json says {expected}; run `rlvr test` again")
        verdicts: dict[str, list[bool]] = {}
        for number, row in enumerate(rows, start=1):
            if "id" not in row or not isinstance(row.get("correct"), bool):
                raise ConfigError(f"{file}:{number}: this row lacks 'id' or 'correct' (true or false); run `rlvr test` again")
            verdicts.setdefault(row["id"], []).append(row["correct"])
        return verdicts


@dataclass(frozen=True, slots=True)
class SetComparison:
    """Two evaluations of one set. Accuracies are shares; intervals cover 95 %."""

    problems: int
    accuracy_a: float
    interval_a: tuple[float, float]
    accuracy_b: float
    interval_b: tuple[float, float]
    paired: PairedDifference
    """B minus A."""
    only_a: int
    """Problems that A solves in at least one sample and B in none."""
    only_b: int
    """The other way round."""
    differing: tuple[str, ...]
    """Which of `CONDITIONS` were not the same."""


def load(path: Path) -> Evaluation:
    """Read an evaluation from a run folder, its ``evaluation/`` folder, or the results.json in there.

    Raises:
        ConfigError: There is none, or its results.json is damaged.
    """
    candidates = [path] if path.is_file() else [path / "evaluation" / "results.json", path / "results.json"]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise ConfigError(f"{path}: no evaluation/results.json in there; `rlvr test` writes one")
    try:
        results = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file}: this is not JSON; give a run folder or the results.json of `rlvr test`") from error
    if not isinstance(results, dict) or not {"model", "policy_version", "sets"} <= results.keys():
        raise ConfigError(f"{file}: not a results.json of `rlvr test`; give a run folder or such a file")
    return Evaluation(file.parent, results)


def compare(a: Evaluation, b: Evaluation) -> dict[str, SetComparison]:
    """Return the comparison of every set that both evaluated, in the order of ``a``.

    Raises:
        ConfigError: No set is in both, or a set's problems are not the same in both.
    """
    common = [name for name in a.sets if name in b.sets]
    if not common:
        raise ConfigError(f"no set in common: {a.folder} has {_listed(a.sets)}, {b.folder} has {_listed(b.sets)}")
    return {name: _compare_set(a, b, name) for name in common}


def _compare_set(a: Evaluation, b: Evaluation, name: str) -> SetComparison:
    fingerprint_a, fingerprint_b = a.sets[name]["fingerprint"], b.sets[name]["fingerprint"]
    verdicts_a, verdicts_b = a.verdicts(name), b.verdicts(name)
    if fingerprint_a["data"] != fingerprint_b["data"] or verdicts_a.keys() != verdicts_b.keys():
        raise ConfigError(
            f"{name}: {a.folder} and {b.folder} evaluated different problems under this name; run `rlvr test` for both with "
            f"the same data.evals.{name}"
        )
    rows_a, rows_b = list(verdicts_a.values()), [verdicts_b[problem] for problem in verdicts_a]
    return SetComparison(
        problems=len(rows_a),
        accuracy_a=accuracy(rows_a),
        interval_a=bootstrap_interval(rows_a),
        accuracy_b=accuracy(rows_b),
        interval_b=bootstrap_interval(rows_b),
        paired=paired_difference(rows_a, rows_b),
        only_a=sum(any(x) and not any(y) for x, y in zip(rows_a, rows_b, strict=True)),
        only_b=sum(any(y) and not any(x) for x, y in zip(rows_a, rows_b, strict=True)),
        differing=tuple(key for key in CONDITIONS if fingerprint_a[key] != fingerprint_b[key]),
    )


def main(args: list[str]) -> int:
    """Compare what the command line names (its first word is ``compare``) and print it; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="rlvr compare",
        description="Compare two evaluations problem by problem: accuracies in percent with 95 % bootstrap intervals, the "
        "difference B - A with its interval and the p-value of a paired permutation test.",
    )
    where = "run folder, its evaluation/ folder, or the results.json in there"
    parser.add_argument("a", metavar="A", type=Path, help=where)
    parser.add_argument("b", metavar="B", type=Path, help="the same, for the other evaluation")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers there, as shares and not percent")
    options = parser.parse_args(args[1:])
    a, b = load(options.a), load(options.b)
    comparisons = compare(a, b)
    only_in = {"A": sorted(a.sets.keys() - b.sets), "B": sorted(b.sets.keys() - a.sets)}
    print("\n".join(_report(a, b, comparisons, only_in)))
    if options.json:
        sets = {name: asdict(comparison) for name, comparison in comparisons.items()}
        content = {"a": _described(a), "b": _described(b), "sets": sets, "only_in": only_in}
        try:
            options.json.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {options.json}: {error.strerror}; name a file in a folder that exists") from error
    return 0


def _report(
    a: Evaluation, b: Evaluation, comparisons: dict[str, SetComparison], only_in: dict[str, list[str]]
) -> Iterable[str]:
    for label, evaluation in (("A", a), ("B", b)):
        yield "{}  {folder}  ({model}, policy version {policy_version})".format(label, **_described(evaluation))
    yield ""
    width = max(len(name) for name in ("set", *comparisons))
    row = f"{{:<{width}}}  {{:>8}}  {{:<20}}  {{:<20}}  {{:<22}}  {{:>7}}  {{:>6}}  {{:>6}}"
    yield row.format("set", "problems", "A, %", "B, %", "B - A", "p", "only A", "only B")
    for name, c in comparisons.items():
        yield row.format(
            name,
            c.problems,
            f"{100 * c.accuracy_a:5.1f} {_percent(*c.interval_a)}",
            f"{100 * c.accuracy_b:5.1f} {_percent(*c.interval_b)}",
            f"{100 * c.paired.difference:+6.1f} {_percent(c.paired.low, c.paired.high, sign='+')}",
            "<0.0001" if c.paired.p_value < 1e-4 else f"{c.paired.p_value:.4f}",
            c.only_a,
            c.only_b,
        )
    for label, names in only_in.items():
        if names:
            yield f"only in {label}: {', '.join(names)}"
    for name, c in comparisons.items():
        if c.differing:
            yield f"warning: {name}: A and B differ in {', '.join(c.differing)}; the difference is not the model's alone"


def _described(evaluation: Evaluation) -> dict[str, Any]:
    results = evaluation.results
    return {"folder": str(evaluation.folder), "model": results["model"], "policy_version": results["policy_version"]}


def _percent(low: float, high: float, sign: str = "") -> str:
    return f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
