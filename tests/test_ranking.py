"""`rlvr rank`: scores against independent references, histories and rankings as files, and the command."""

import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.plots import plot_history
from rlvr_lightning.rank import list_override, main
from rlvr_lightning.ranking import (
    RankedProblem,
    lim_scores,
    mean_scores,
    rank_problems,
    read_history,
    read_ranking,
    std_scores,
    var_scores,
)

TRAIN = Path(os.environ.get("RLVR_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "train"
needs_data = pytest.mark.skipif(
    not (TRAIN / "acc_step_500.json").is_file(),
    reason="the paper's data is not here: set RLVR_DATA to a folder with train/acc_step_500.json",
)

eighths = st.lists(st.integers(0, 8), min_size=1, max_size=12).map(lambda counts: [n / 8 for n in counts])
histories = st.dictionaries(st.text(max_size=4), eighths, min_size=1, max_size=12)


def ids(ranking: list[RankedProblem]) -> list[str]:
    return [row.id for row in ranking]


# --- the paper's own history ------------------------------------------------------------------------------------------


@needs_data
def test_the_papers_ranking_comes_out() -> None:
    ranking = rank_problems(read_history(TRAIN / "acc_step_500.json"))
    order = [int(row.id) for row in ranking]
    assert len(order) == 1209
    # 14 and 15 are an exact tie: the file's order decides
    assert order[:20] == [
        124, 267, 531, 931, 212, 25, 568, 131, 649, 724, 875, 925, 682, 100, 291, 50, 870, 229, 948, 1146
    ]  # fmt: skip
    assert ranking[13].score == ranking[14].score
    assert order[604:606] == [60, 906]
    assert order[1200:] == [847, 979, 114, 395, 485, 1167, 174, 770, 789]
    assert [row.rank for row in ranking] == list(range(1, 1210))
    assert sum(row.visits for row in ranking) == 500 * 128
    assert (round(ranking[0].score, 4), round(ranking[0].mean, 3), ranking[0].visits) == (0.4068, 0.441, 53)
    assert [row.score == 0 for row in ranking] == [False] * 1105 + [True] * 104
    assert {row.id for row in ranking[1105:] if row.mean == 1} == {"196", "921", "454", "768", "559"}
    assert sum(row.mean == 0 for row in ranking[1105:]) == 99


@needs_data
def test_learning_impact_ranks_the_first_problem_of_the_paper_500th() -> None:
    assert ids(rank_problems(read_history(TRAIN / "acc_step_500.json"), "lim")).index("124") == 499


# --- scores -----------------------------------------------------------------------------------------------------------


@given(histories)
def test_spreads_and_means_are_those_of_exact_arithmetic(history: dict[str, list[float]]) -> None:
    exact = [[Fraction(a) for a in accuracies] for accuracies in history.values()]
    variances = [float(statistics.pvariance(a)) for a in exact]
    assert var_scores(history) == pytest.approx(variances)
    assert std_scores(history) == pytest.approx([v**0.5 for v in variances])
    assert mean_scores(history) == pytest.approx([float(statistics.mean(a)) for a in exact])


@given(st.floats(0, 1), st.integers(1, 60))
def test_a_problem_that_never_varied_has_a_spread_of_exactly_zero(accuracy: float, visits: int) -> None:
    history = {"a": [accuracy] * visits}
    assert (std_scores(history)[0], var_scores(history)[0]) == (0, 0)


@given(histories)
def test_learning_impact_is_that_of_a_plain_loop(history: dict[str, list[float]]) -> None:
    rows = [[Fraction(a) for a in accuracies] for accuracies in history.values()]
    num_visits = min(len(row) for row in rows)
    average = [sum(row[k] for row in rows) / len(rows) for k in range(num_visits)]
    total = sum((1 - average[k]) ** 2 for k in range(num_visits))
    expected = [1 - float(sum((row[k] - average[k]) ** 2 for k in range(num_visits)) / total) if total else 1.0 for row in rows]
    assert lim_scores(history) == pytest.approx(expected)


def test_learning_impact_by_hand() -> None:
    # averages 0.5, 0.5; the third visit counts for nobody; a: 1 - (1/4 + 1/4) / (1/4 + 1/4); c follows the average
    history = {"a": [0.0, 1.0, 1.0], "b": [1.0, 0.0], "c": [0.5, 0.5, 0.0]}
    assert lim_scores(history).tolist() == [0, 0, 1]
    assert lim_scores({"a": [1.0, 1.0], "b": [1.0]}).tolist() == [1, 1]


@given(histories, st.sampled_from(["std", "var", "lim", "mean", "random"]))
def test_a_ranking_holds_every_problem_once_best_first_and_ties_in_the_files_order(
    history: dict[str, list[float]], by: str
) -> None:
    ranking = rank_problems(history, by)
    order = list(history)
    assert sorted(ids(ranking)) == sorted(order)
    assert [row.rank for row in ranking] == list(range(1, len(order) + 1))
    keys = [(-row.score, order.index(row.id)) for row in ranking]
    assert keys == sorted(keys)
    assert all(row.visits == len(history[row.id]) for row in ranking)
    assert [row.mean for row in ranking] == pytest.approx([statistics.mean(history[row.id]) for row in ranking])


@given(histories)
def test_without_ties_the_order_of_the_file_does_not_matter(history: dict[str, list[float]]) -> None:
    items = list(history.items())
    random.Random(0).shuffle(items)
    scores = {row.id: row.score for row in rank_problems(history)}
    assert {row.id: row.score for row in rank_problems(dict(items))} == scores
    if len(set(scores.values())) == len(scores):
        assert ids(rank_problems(dict(items))) == ids(rank_problems(history))


def test_a_random_order_depends_on_the_seed_alone() -> None:
    history = {str(i): [i / 50] for i in range(50)}
    orders = [ids(rank_problems(history, "random", seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != list(history)
    assert ids(rank_problems({i: [0.5] for i in history}, "random")) == orders[0]


# --- histories in files -----------------------------------------------------------------------------------------------


def visit(step: int, problem: str, slot: int, correct: int, wrong: int, **more: Any) -> dict[str, Any]:
    rollouts = correct + wrong
    reasons = ({"correct": correct} if correct else {}) | ({"wrong": wrong} if wrong else {})
    rewards = [1.1] * correct + [0.1] * wrong  # a bonus of 0.1 that accuracy must not show
    row = {"step": step, "id": problem, "slot": slot, "rewards": rewards, "lengths": [3] * rollouts, "truncated": 0}
    return row | {"reasons": reasons} | more


ROWS = [
    visit(0, "b", 0, 1, 3),
    visit(0, "a", 1, 4, 0),
    visit(0, "b", 2, 4, 0),  # the same step and problem: one visit with the row above, (1 + 4) / 8
    visit(1, "a", 0, 0, 4),
    visit(1, "c", 1, 1, 2),
    visit(2, "b", 0, 2, 2),
]
EXPECTED = {"b": [5 / 8, 2 / 4], "a": [1.0, 0.0], "c": [1 / 3]}


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_json(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content))
    return file


def test_rows_of_one_step_and_problem_are_one_visit(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "history.jsonl", ROWS)
    history = read_history(tmp_path)
    assert history == read_history(file) == EXPECTED
    assert list(history) == ["b", "a", "c"]


def test_visits_are_in_the_order_of_the_steps(tmp_path: Path) -> None:
    history = read_history(write_rows(tmp_path / "history.jsonl", ROWS[::-1]))
    assert history == EXPECTED
    assert list(history) == ["b", "c", "a"]


def test_a_history_can_be_read_wherever_its_last_row_is_torn(tmp_path: Path) -> None:
    whole = write_rows(tmp_path / "history.jsonl", ROWS).read_bytes()
    last = len(json.dumps(ROWS[-1])) + 1
    for cut in range(2, last + 1):
        (tmp_path / "history.jsonl").write_bytes(whole[:-cut])
        assert read_history(tmp_path) == EXPECTED | {"b": [5 / 8]}


def test_a_json_file_keeps_its_order(tmp_path: Path) -> None:
    history = read_history(write_json(tmp_path / "acc.json", {"7": [0, 1], "10": [0.125], "8": [1]}))
    assert history == {"7": [0.0, 1.0], "10": [0.125], "8": [1.0]}
    assert list(history) == ["7", "10", "8"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("acc.json", "[[0.5]]", ["not an object of lists"]),
        ("acc.json", '{"a": 0.5}', ["not an object of lists"]),
        ("acc.json", "{}", ["no problems"]),
        ("acc.json", '{"a": [1], "b": []}', ["'b' is empty"]),
        ("acc.json", '{"a": [0.5, 1.5]}', ["'a'", "1.5", "from 0 to 1"]),
        ("acc.json", '{"a": [-0.1]}', ["-0.1"]),
        ("acc.json", '{"a": [NaN]}', ["nan"]),
        ("acc.json", '{"a": [null]}', ["None"]),
        ("acc.json", '{"a": [true]}', ["True"]),
        ("acc.json", '{"a": ["1"]}', ["'1'"]),
        ("acc.json", '{"a": [1]', ["not JSON"]),
        ("acc.json", "\xff", ["not JSON"]),
        ("acc.json", "[" * 100_000, ["not JSON"]),
        ("acc.csv", "a,1", ["neither .jsonl nor .json"]),
        ("history.jsonl", "", ["no rows"]),
        ("history.jsonl", '{"torn": ', ["no rows"]),
        ("history.jsonl", "no\n{}\n", ["history.jsonl:1", "not JSON"]),
        ("history.jsonl", '{"a": [0.5]}\n', ["history.jsonl:1", "'id'"]),
        ("history.jsonl", "[1]\n", ["history.jsonl:1", "'id'"]),
        ("history.jsonl", json.dumps(visit(0, "a", 0, 1, 1, id=3)) + "\n", ["'id'"]),
        ("history.jsonl", json.dumps(visit(0, "a", 0, 1, 1, reasons=None)) + "\n", ["'reasons'"]),
        ("history.jsonl", json.dumps(visit(0, "a", 0, 1, 1, reasons={"correct": -1})) + "\n", ["'reasons'"]),
        ("history.jsonl", json.dumps(visit(0, "a", 0, 1, 1, reasons={"correct": 3})) + "\n", ["2 rewards and 3 reasons"]),
        ("history.jsonl", json.dumps(visit(0, "a", 0, 0, 0)) + "\n", ["0 rewards"]),
    ],
)
def test_other_files_are_refused(name: str, content: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError) as caught:
        read_history(tmp_path / name)
    assert all(part in str(caught.value) for part in [name, *parts]), str(caught.value)


def test_a_history_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ConfigError, match="does not exist"):
            read_history(path)


# --- rankings in files ------------------------------------------------------------------------------------------------

GOOD = {"rank": 1, "id": "a", "score": 0.5, "mean": 0.25, "visits": 3}


def test_a_part_of_a_ranking_is_a_ranking(tmp_path: Path) -> None:
    rows = [GOOD | {"rank": 4}, GOOD | {"rank": 7, "id": "b", "score": -1, "mean": 0}]
    assert read_ranking(write_rows(tmp_path / "part.jsonl", rows)) == [
        RankedProblem(4, "a", 0.5, 0.25, 3), RankedProblem(7, "b", -1.0, 0.0, 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ([], "not an object"),
        ({"question": "1+1", "answer": "2"}, "'rank'"),
        (GOOD | {"rank": 0}, "'rank'"),
        (GOOD | {"rank": True}, "'rank'"),
        (GOOD | {"rank": 1, "id": "b"}, "does not follow 1"),
        (GOOD | {"rank": 2}, "'a' was there before"),
        (GOOD | {"rank": 2, "id": 5}, "'id'"),
        (GOOD | {"rank": 2, "id": "b", "score": None}, "'score'"),
        (GOOD | {"rank": 2, "id": "b", "score": float("inf")}, "'score'"),
        (GOOD | {"rank": 2, "id": "b", "mean": 1.01}, "'mean'"),
        (GOOD | {"rank": 2, "id": "b", "visits": 1.5}, "'visits'"),
    ],
)
def test_a_bad_row_of_a_ranking_is_named(row: Any, part: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "ranking.jsonl", [GOOD, row])
    with pytest.raises(ConfigError, match=re.escape(part)) as caught:
        read_ranking(file)
    assert f"{file}:2" in str(caught.value)


def test_a_ranking_that_is_absent_empty_or_no_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ranking.jsonl"
    for content, part in ((None, "does not exist"), ("", "no rows"), ("no\n", "not JSON")):
        if content is not None:
            file.write_text(content)
        with pytest.raises(ConfigError, match=part):
            read_ranking(file)


# --- the command ------------------------------------------------------------------------------------------------------

DATA = [{"id": i, "question": f"What is {i}?", "answer": i.upper()} for i in ("a", "b", "c", "unused")]
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: object) -> str:
        assert main(["rank", *map(str, args)]) == 0
        return capsys.readouterr().out

    return run


def refused(folder: Path, *args: object) -> str:
    """Run the command, which must fail and leave the folder as it is; return the message."""
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError) as caught:
        main(["rank", *map(str, args)])
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    return str(caught.value)


def is_png(file: Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG")


def test_a_run_folder_gives_a_ranking_its_problems_and_a_figure(tmp_path: Path, run: Run) -> None:
    write_rows(tmp_path / "run" / "history.jsonl", ROWS)
    write_rows(tmp_path / "run" / "problems.jsonl", [*DATA, DATA[0]])  # an exact copy is fine
    out = tmp_path / "new" / "folder" / "best.jsonl"
    printed = run(tmp_path / "run", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [list(row) for row in rows] == [["rank", "id", "score", "mean", "visits"]] * 3
    # a: 1, 0; b: 5/8, 4/8; c: one visit
    assert rows[0] == {"rank": 1, "id": "a", "score": 0.5, "mean": 0.5, "visits": 2}
    assert rows[1] == {"rank": 2, "id": "b", "score": 1 / 16, "mean": 9 / 16, "visits": 2}
    assert (rows[2]["id"], rows[2]["score"], rows[2]["visits"]) == ("c", 0, 1)
    assert read_ranking(out) == [RankedProblem(**row) for row in rows]
    problems = out.with_name("best.problems.jsonl")
    assert [json.loads(line) for line in problems.read_text().splitlines()] == DATA[:3]
    assert is_png(out.with_name("best.png"))
    assert sorted(file.name for file in out.parent.iterdir()) == ["best.jsonl", "best.png", "best.problems.jsonl"]
    lines = printed.splitlines()
    assert lines[0] == "3 problems, 5 visits; the first 3 by std:"
    assert [line.split() for line in lines[1:3]] == [
        ["rank", "id", "score", "mean", "visits"], ["1", "a", "0.5000", "0.500", "2"]
    ]  # fmt: skip
    assert len({len(line) for line in lines[1:5]}) == 1
    assert lines[5] == "1 of 3 problems never varied: 0 always wrong, 0 always right, 1 always in between"
    assert lines[6] == "warning: the score of 3 problems rests on fewer than 8 visits"
    assert [line.strip() for line in lines[7:11]] == ["written:", *map(str, (out, problems, out.with_name("best.png")))]
    assert lines[11] == (
        f"train on the first: rlvr sweep data=subset data.init_args.sources=[{problems}] data.init_args.ids=[a]"
    )


def test_without_data_there_are_no_problems_to_write(tmp_path: Path, run: Run) -> None:
    printed = run(write_rows(tmp_path / "history.jsonl", ROWS), "--out", tmp_path / "r.jsonl", "--by", "mean")
    assert ids(read_ranking(tmp_path / "r.jsonl")) == ["b", "a", "c"]
    assert not (tmp_path / "r.problems.jsonl").exists()
    assert "rlvr sweep" not in printed


def test_top_keeps_the_first(tmp_path: Path, run: Run) -> None:
    history = write_json(tmp_path / "acc.json", {"a": [0] * 8, "b": [0, 1] * 4, "c": [1] * 8})
    data = write_rows(tmp_path / "data.jsonl", DATA[1:2])  # nothing but the chosen one has to be there
    printed = run(history, "--top", 1, "--out", tmp_path / "r.jsonl", "--problems", data)
    assert read_ranking(tmp_path / "r.jsonl") == [RankedProblem(1, "b", 0.5, 0.5, 8)]
    assert "2 of 3 problems never varied: 1 always wrong, 1 always right\n" in printed
    assert "warning" not in printed
    for top in (0, -1, 4):
        assert "give 1 to 3" in refused(tmp_path, history, f"--top={top}", "--out", tmp_path / "x.jsonl")


def test_learning_impact_rests_on_the_visits_that_all_have(tmp_path: Path, run: Run) -> None:
    history = write_json(tmp_path / "acc.json", {"a": [0.5] * 20, "b": [0, 1]})
    assert "the score of 1 problems" in run(history, "--out", tmp_path / "r.jsonl")
    assert "the score of 2 problems" in run(history, "--by", "lim", "--out", tmp_path / "r.jsonl")
    assert "the score of" not in run(history, "--by", "random", "--out", tmp_path / "r.jsonl")


def test_an_unusable_row_matters_only_if_it_is_chosen(tmp_path: Path, run: Run) -> None:
    history = write_json(tmp_path / "acc.json", {"a": [0, 1], "b": [0, 0.5]})
    data = write_rows(tmp_path / "data.jsonl", [DATA[0], DATA[1] | {"answer": ""}])
    printed = run(history, "--top", 1, "--problems", data, "--out", tmp_path / "r.jsonl")
    assert f"left out: 1, such as {data} row 2 (id b): no answer" in printed
    message = refused(tmp_path, history, "--problems", data, "--out", tmp_path / "x.jsonl")
    assert "lacks 1 of the 2" in message
    assert "'b'" in message
    assert "no answer" in message


def test_data_that_does_not_fit_the_history_is_refused(tmp_path: Path) -> None:
    history = write_json(tmp_path / "acc.json", {str(i): [0, 1] for i in range(9)})
    out = ["--out", tmp_path / "deep" / "x.jsonl"]
    data = write_rows(tmp_path / "data.jsonl", DATA)
    assert "lacks 9 of the 9 ranked problems: '0', '1', '2', '3', '4', ..." in refused(
        tmp_path, history, "--problems", data, *out
    )
    twice = write_rows(tmp_path / "twice.jsonl", [DATA[0], DATA[0] | {"answer": "other"}])
    message = refused(tmp_path, history, "--problems", twice, *out)
    assert f"{twice}:1 and {twice}:2" in message
    assert "'a'" in message
    assert "does not exist" in refused(tmp_path, history, "--problems", tmp_path / "none.jsonl", *out)
    assert not (tmp_path / "deep").exists()


def test_inputs_are_never_overwritten(tmp_path: Path) -> None:
    write_rows(tmp_path / "history.jsonl", ROWS)
    write_rows(tmp_path / "problems.jsonl", DATA)
    data = write_rows(tmp_path / "x.problems.jsonl", DATA)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "history.jsonl")
    for out in ("history.jsonl", "problems.jsonl", "link.jsonl"):
        assert "overwrite the input" in refused(tmp_path, tmp_path, "--out", tmp_path / out)
    assert "overwrite the input" in refused(tmp_path, tmp_path, "--problems", data, "--out", tmp_path / "x.jsonl")
    for out in (".", "x.png"):
        assert "name a .jsonl file" in refused(tmp_path, tmp_path, "--out", tmp_path / out)
    assert "can write to" in refused(tmp_path, tmp_path, "--out", data / "x.jsonl")


def test_bad_arguments_are_one_message(tmp_path: Path) -> None:
    history = write_rows(tmp_path / "history.jsonl", ROWS)
    assert "--out" in refused(tmp_path, history)
    assert "invalid choice" in refused(tmp_path, history, "--out", tmp_path / "x.jsonl", "--by", "luck")
    assert "--seed -1" in refused(tmp_path, history, "--out", tmp_path / "x.jsonl", "--seed", -1)


@needs_data
def test_the_papers_first_problem_from_its_published_files(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "pi.jsonl"
    args = [TRAIN / "acc_step_500.json", "--problems", TRAIN / "dsr_sub.parquet", "--out", out]
    printed = run(*args, "--top", 2)
    problems = [json.loads(line) for line in (tmp_path / "pi.problems.jsonl").read_text().splitlines()]
    assert [(row["id"], row["answer"]) for row in problems] == [("124", "12.8"), ("267", "24")]
    assert problems[0]["question"].startswith("The pressure")
    assert "1209 problems, 64000 visits" in printed
    assert "104 of 1209 problems never varied: 99 always wrong, 5 always right" in printed
    assert printed.endswith("ids=[124]\n")
    assert "'265'" in refused(tmp_path, *args)  # the one row of the file without an answer


@example("NULL")
@example("1e3")
@example("007")
@example('a\\"')
@example("3+4, [x]'s\\")
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="$"), min_size=1, max_size=12))
def test_the_printed_command_means_the_same_to_shell_and_hydra(value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    [word] = shlex.split(list_override("ids", value))
    got = OverridesParser.create().parse_override(word)
    assert got.key_or_group == "data.init_args.ids"
    assert [str(item) for item in got.value()] == [value]  # type: ignore[union-attr]


# --- the figure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_problems", [1, 3, 40, 41, 1209])
def test_the_figure_shows_every_accuracy_and_leaves_the_rest_blank(
    num_problems: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    awkward = ["$x^", "long " * 20]
    history = {(awkward[i] if i < 2 else f"p{i}"): [i / num_problems] * (1 + i % 3) for i in range(num_problems)}
    scores = [1 - 2 * i / num_problems for i in range(num_problems)]
    plot_history(history, tmp_path / "f.png", scores=scores, label="lim")
    assert is_png(tmp_path / "f.png")
    heat, bars = drawn[0].axes[:2]
    image = np.ma.filled(heat.images[0].get_array(), np.nan)
    assert image.shape == (num_problems, min(num_problems, 3))
    for row, accuracies in zip(image, history.values(), strict=True):
        assert row[: len(accuracies)].tolist() == accuracies
        assert np.isnan(row[len(accuracies) :]).all()
    assert bars.patches[0].get_data().values.tolist() == scores
    assert heat.get_ylim() == (num_problems + 0.5, 0.5)  # the best on top
    labels = [label.get_text() for label in heat.get_yticklabels()]
    if num_problems <= 40:
        assert labels == ["$x^", "long long long long l...", *list(history)[2:]][:num_problems]
    else:
        assert len(labels) < 20


def test_ranking_imports_no_torch(tmp_path: Path) -> None:
    history = write_rows(tmp_path / "history.jsonl", ROWS)
    args = ["rank", str(history), "--out", str(tmp_path / "r.jsonl")]
    code = (
        f"import sys; from rlvr_lightning.rank import main; assert main({args!r}) == 0; "
        "print(sorted({'torch', 'lightning', 'transformers', 'hydra', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
