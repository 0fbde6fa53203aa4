"""`rlvr compare` on evaluation folders written by hand."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlvr_lightning import __main__ as command_line
from rlvr_lightning.evaluation.compare import SetComparison, compare, load, main

Verdicts = dict[str, list[bool]]
FINGERPRINT = {"prompt": "p1", "sampling": "s1", "grader": "math", "data": "d1", "id": "i1"}
BASE: Verdicts = {"p0": [True, True], "p1": [False, False], "p2": [False, True], "p3": [False, False]}
BETTER: Verdicts = {"p0": [True, False], "p1": [True, True], "p2": [False, False], "p3": [True, True]}


def evaluated(root: Path, sets: dict[str, Verdicts], model: str = "a-model", **fingerprint: str) -> Path:
    """Write the evaluation of a run; return the run folder."""
    folder = root / "evaluation"
    folder.mkdir(parents=True)
    entries: dict[str, Any] = {}
    for name, verdicts in sets.items():
        rows = [{"id": i, "sample": n, "correct": c} for i, row in verdicts.items() for n, c in enumerate(row)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        samples = len(rows) // len(verdicts)
        entries[name] = {
            "fingerprint": FINGERPRINT | fingerprint,
            "problems": len(verdicts),
            "samples_per_problem": samples,
        }
    (folder / "results.json").write_text(json.dumps({"model": model, "policy_version": 7, "sets": entries}))
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlvr", "compare", *map(str, args)])
        status = command_line.main()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_numbers_by_hand(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", {"sums": BASE}), evaluated(tmp_path / "b", {"sums": BETTER})
    got = compare(load(a), load(b))["sums"]
    assert isinstance(got, SetComparison)
    # A: (1 + 0 + 1/2 + 0) / 4; B: (1/2 + 1 + 0 + 1) / 4
    assert (got.problems, got.accuracy_a, got.accuracy_b) == (4, 0.375, 0.625)
    assert (got.only_a, got.only_b) == (1, 2)  # p2; p1 and p3
    assert got.interval_a[0] < 0.375 < got.interval_a[1]
    assert got.paired.low < got.paired.difference == 0.25 < got.paired.high
    # |+-1/2 +-1 +-1/2 +-1| >= 1: all 16 signs but the 4 where both the halves and the ones cancel
    assert got.paired.p_value == pytest.approx(12 / 16)
    assert got.differing == ()


def test_rows_are_paired_by_id_and_not_by_position(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", {"sums": BASE})
    b = evaluated(tmp_path / "b", {"sums": dict(reversed(BASE.items()))})
    got = compare(load(a), load(b))["sums"]
    assert (got.paired.difference, got.paired.p_value, got.only_a, got.only_b) == (0.0, 1.0, 0, 0)


def test_the_table_and_the_json_file(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    a = evaluated(tmp_path / "a", {"sums": BASE, "old": BASE}, model="base")
    b = evaluated(tmp_path / "b", {"sums": BETTER, "new": BASE}, model="trained")
    file = tmp_path / "numbers.json"
    status, out, err = run(a, b, "--json", file)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"A  {a / 'evaluation'}  (base, policy version 7)"
    assert lines[1] == f"B  {b / 'evaluation'}  (trained, policy version 7)"
    row = next(line for line in lines if line.startswith("sums")).split()
    assert row[:3] == ["sums", "4", "37.5"]
    assert row[5] == "62.5"
    assert row[8] == "+25.0"
    assert row[-3:] == ["0.7500", "1", "2"]
    assert lines[-2:] == ["only in A: old", "only in B: new"]
    assert "warning" not in out

    content = json.loads(file.read_text())
    assert content["b"] == {"folder": str(b / "evaluation"), "model": "trained", "policy_version": 7}
    assert content["only_in"] == {"A": ["old"], "B": ["new"]}
    assert content["sets"]["sums"]["paired"]["difference"] == 0.25
    assert content["sets"]["sums"]["only_b"] == 2
    assert len(content["sets"]["sums"]["interval_a"]) == 2


def test_small_p_values_are_not_printed_as_zero(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    none, all_ = ({f"p{i}": [right] for i in range(40)} for right in (False, True))
    out = run(evaluated(tmp_path / "a", {"sums": none}), evaluated(tmp_path / "b", {"sums": all_}))[1]
    assert "+100.0 [+100.0, +100.0]" in out
    assert "<0.0001" in out


@pytest.mark.parametrize("key", ["prompt", "sampling", "grader"])
def test_other_conditions_are_a_warning(key: str, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    a, b = evaluated(tmp_path / "a", {"sums": BASE}), evaluated(tmp_path / "b", {"sums": BASE}, **{key: "other"})
    status, out, _ = run(a, b)
    assert status == 0
    assert out.splitlines()[-1].startswith(f"warning: sums: A and B differ in {key}; ")


def test_the_fingerprints_id_alone_is_no_warning(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    a, b = evaluated(tmp_path / "a", {"sums": BASE}), evaluated(tmp_path / "b", {"sums": BASE}, id="other")
    assert "warning" not in run(a, b)[1]


def test_a_run_folder_its_evaluation_folder_and_its_file_are_the_same(tmp_path: Path) -> None:
    root = evaluated(tmp_path / "a", {"sums": BASE})
    loaded = [load(path) for path in (root, root / "evaluation", root / "evaluation" / "results.json")]
    assert loaded[0] == loaded[1] == loaded[2]


def refused(outcome: tuple[int, str, str], *parts: str) -> None:
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert err.startswith("rlvr: error: ")
    assert [part for part in parts if part not in err] == []


def test_other_data_is_refused(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    a = evaluated(tmp_path / "a", {"sums": BASE})
    refused(run(a, evaluated(tmp_path / "b", {"sums": BASE}, data="other")), "sums", "different problems", "data.evals.sums")
    renamed = {f"q{i}": row for i, row in enumerate(BASE.values())}  # the hash may be missing what the ids say
    refused(run(a, evaluated(tmp_path / "c", {"sums": renamed})), "different problems")


def test_no_common_set_is_refused(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    a, b = evaluated(tmp_path / "a", {"old": BASE}), evaluated(tmp_path / "b", {"new": BASE})
    refused(run(a, b), "no set in common", "old", "new")


def test_a_folder_without_evaluation_is_refused(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    a = evaluated(tmp_path / "a", {"sums": BASE})
    refused(run(a, tmp_path / "absent"), "absent", "`rlvr test`")


def test_a_json_file_that_cannot_be_written_is_refused(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    a = evaluated(tmp_path / "a", {"sums": BASE})
    status, _, err = run(a, a, "--json", tmp_path / "absent" / "numbers.json")
    assert status == 2
    assert "--json" in err
    assert "No such file" in err


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("results.json", "{", ["results.json", "not JSON"]),
        ("results.json", "[]", ["results.json", "not a results.json"]),
        ("sums.jsonl", '{"id": "p0", "sample": 0, "correct": true}\n', ["sums.jsonl", "1 rows", "says 8"]),
        ("sums.jsonl", '{"id": "p0"}\n' * 8, ["sums.jsonl:1", "'correct'"]),
        ("sums.jsonl", "no\n" * 8, ["sums.jsonl:1", "not JSON"]),
    ],
)
def test_damaged_files_are_refused(
    file: str, content: str, parts: list[str], tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    a, b = evaluated(tmp_path / "a", {"sums": BASE}), evaluated(tmp_path / "b", {"sums": BASE})
    (b / "evaluation" / file).write_text(content)
    refused(run(a, b), *parts)


def test_help_lists_the_command_and_comparing_imports_no_torch(tmp_path: Path) -> None:
    assert "rlvr compare A B" in command_line.HELP
    a, b = evaluated(tmp_path / "a", {"sums": BASE}), evaluated(tmp_path / "b", {"sums": BETTER})
    code = (
        f"import sys; sys.argv = ['rlvr', 'compare', {str(a)!r}, {str(b)!r}]; "
        "from rlvr_lightning.__main__ import main; assert main() == 0; "
        "print(sorted({'torch', 'lightning', 'transformers', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_missing_arguments_end_with_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["compare", "only-one"])
    assert exit_.value.code == 2
    assert "usage: rlvr compare" in capsys.readouterr().err
