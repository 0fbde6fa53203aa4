"""The `math` grader agrees with the labelled pairs of benchmarks/verifier_pairs.jsonl, and rewards no wrong answer."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rlvr_lightning.records import Completion, Problem
from rlvr_lightning.verify import Verifier

TABLE = Path(__file__).parents[1] / "benchmarks" / "verifier_pairs.jsonl"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


def test_table_is_well_formed_and_balanced(rows: list[dict]) -> None:
    assert {frozenset(row) - {"note"} for row in rows} == {frozenset({"kind", "ground_truth", "response", "correct"})}
    assert {type(row["correct"]) for row in rows} == {bool}
    pairs = Counter((row["ground_truth"], row["response"]) for row in rows)
    assert [pair for pair, count in pairs.items() if count > 1] == []
    labels = {kind: Counter(row["correct"] for row in rows if row["kind"] == kind) for kind in {row["kind"] for row in rows}}
    assert {kind: count for kind, count in labels.items() if min(count[True], count[False]) < 0.25 * count.total()} == {}


def test_math_agrees_with_the_table(rows: list[dict]) -> None:
    verifier = Verifier("math", timeout_s=5)
    try:
        items = [(Problem("row", "?", row["ground_truth"]), Completion((), (), row["response"], "stop")) for row in rows]
        scores = verifier(items)
    finally:
        verifier.close()
    mistakes = [
        f"row {number}, {score.reason}: {json.dumps(row, ensure_ascii=False)}"
        for number, (row, score) in enumerate(zip(rows, scores, strict=True), 1)
        if score.correct != row["correct"]
    ]
    listed = "\n".join(mistakes)
    assert not [line for line in mistakes if ", correct: " in line], f"wrong answers rewarded; all mistakes:\n{listed}"
    assert len(mistakes) <= 0.01 * len(rows), f"{len(mistakes)} of {len(rows)} verdicts are mistakes:\n{listed}"
