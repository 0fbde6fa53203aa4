"""Problems from files: every bad row is named, and the order is a function of the seed and the step."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlvr_lightning import check
from rlvr_lightning.data import EvalDataModule, EvalLoader, ProblemLoader, SingleExampleDataModule, SubsetDataModule
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.reading import load_problems, read_problems
from rlvr_lightning.evaluation.suite import suite_set
from rlvr_lightning.perturb import Perturbation
from rlvr_lightning.prompts import PAPER_SUFFIX
from rlvr_lightning.records import Problem, ProblemBatch
from rlvr_lightning.rollout import seed_for
from rlvr_lightning.selection import Selection

SHARED_DATA = Path(os.environ.get("RLVR_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
BUILTIN_SIZES = {"addition_1digit": 81, "addition_2digit": 80, "subtraction_1digit": 36}


def write_jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int) -> list[object]:
    return [{"id": f"p{i}", "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(count)]


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{i}", f"What is {i} + 1?", str(i + 1)) for i in range(count)]


def paper_row(index: int, question: str, answer: str) -> dict[str, object]:
    """One row of the files that arXiv 2504.20571 published."""
    return {
        "data_source": "math",
        "prompt": [{"content": question, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
    }


def write_paper_parquet(path: Path, content: list[dict[str, object]]) -> str:
    pq.write_table(pa.Table.from_pylist(content), path)
    return str(path)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_every_bad_row_is_named_in_one_message(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    good = b'{"question": "1+1?", "answer": "2"}\n'
    file.write_bytes(
        good
        + b'{"question": "1+2?"}\n'  # row 2
        + b'{"question": "1+3?", "answer": null}\n'
        + b'{"question": "1+4?", "answer": "  "}\n'
        + b'{"question": " ", "answer": "1"}\n'  # row 5
        + b'{"answer": "1"}\n'
        + b'{"question": 7, "answer": "1"}\n'
        + b'{"question": "\xff", "answer": "1"}\n'  # row 8
        + b'{"question": "1+5?", "answer"\n'
        + b'["1+6?", "7"]\n'
        + b"\n"  # a blank line is no row, but it counts
        + good
        + b'"1+7?"'  # row 13, without a newline
    )
    with pytest.raises(ConfigError) as caught:
        load_problems(str(file))
    head, *lines = str(caught.value).splitlines()
    assert head == "10 bad row(s); mend or remove them:"
    told = [re.fullmatch(rf"  {re.escape(str(file))} row (\d+): (.*)", line) for line in lines]
    assert all(told)
    reasons = {int(m[1]): m[2] for m in told if m}
    assert sorted(reasons) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 13]
    expected = {2: "no answer", 3: "no answer", 4: "no answer", 5: "no question", 6: "no question", 7: "no question"}
    expected |= {8: "not UTF-8 text", 9: "not JSON", 10: "must be an object", 13: "must be an object"}
    assert all(part in reasons[number] for number, part in expected.items())


def test_every_bad_parquet_row_is_named(tmp_path: Path) -> None:
    content = [paper_row(0, "1+1?", "2"), paper_row(1, "1+2?", ""), paper_row(2, "", "4"), paper_row(3, "1+4?", "5")]
    file = write_paper_parquet(tmp_path / "p.parquet", content)
    with pytest.raises(ConfigError) as caught:
        load_problems(file)
    assert f"{file} row 2 (id 1): no answer" in str(caught.value)
    assert f"{file} row 3 (id 2): no question" in str(caught.value)
    assert str(caught.value).startswith("2 bad row(s)")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "1+1?", "reward_model": "2"},
        {"prompt": ["1+1?"], "answer": "2"},
        {"question": "1+1?", "answer": "2", "extra_info": ["x"]},
    ],
    ids=["reward_model", "prompt", "extra_info"],
)
def test_a_nested_value_of_another_type_is_a_bad_row(tmp_path: Path, row: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"row 1: ({'|'.join(row)}) holds "):
        load_problems(write_jsonl(tmp_path / "p.jsonl", [row]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "does not exist: give the path"),
        ("empty.jsonl", b"", "is empty: it needs at least one problem"),
        ("blank.jsonl", b"\n  \n", "is empty: it needs at least one problem"),
        ("p.csv", b"question,answer\n1+1?,2\n", "is none of .jsonl, .json, .parquet: convert it"),
        ("p.json", b"[]", "is empty: it needs at least one problem"),
        ("p.json", b'{"question": "1+1?"}', "holds no list: write [{...}, ...]"),
        ("p.json", b"[", "cannot be read as JSON"),
        ("p.parquet", b"PAR1 cut off", "cannot be read as parquet"),
        ("zero.parquet", b"", "cannot be read as parquet"),
    ],
)
def test_an_unusable_file_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"data file {str(file)!r} {message}")):
        load_problems(str(file))


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_problems(str(tmp_path))


def test_an_unknown_builtin_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=f"no built-in set 'sums': choose one of {', '.join(BUILTIN_SIZES)}"):
        load_problems("builtin:sums")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "data.question is missing"),
        ({"question": "1+1?"}, "data.answer is missing"),
        ({"question": "1+1?", "answer": " "}, "data.answer is missing"),
        ({"question": "1+1?", "answer": "2", "file": "p.jsonl"}, "exclude each other"),
        ({"answer": "2", "file": "p.jsonl"}, "exclude each other"),
        ({"question": "1+1?", "answer": "2", "problems_per_step": 0}, "data.problems_per_step is 0"),
        ({"question": "1+1?", "answer": "2", "eval_batch_size": 0}, "data.eval_batch_size is 0"),
        ({"question": "1+1?", "answer": "2", "evals": {"train": "p.jsonl"}}, "'train' names the training batches"),
    ],
)
def test_contradictory_arguments_are_refused_at_construction(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SingleExampleDataModule(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "key"), [({"sources": []}, "data.sources is empty"), ({"sources": ["p"], "ids": []}, "data.ids is empty")]
)
def test_empty_lists_are_refused_at_construction(arguments: dict[str, list[str]], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        SubsetDataModule(**arguments)  # type: ignore[arg-type]


# --- what a row says --------------------------------------------------------------------------------------------------


def test_the_papers_schema_loads(tmp_path: Path) -> None:
    file = write_paper_parquet(tmp_path / "p.parquet", [paper_row(124, "Speed? Answer \\boxed{}.", "12.8")])
    assert load_problems(file) == [Problem("124", "Speed? Answer \\boxed{}.", "12.8", f"{file}:1")]


def test_the_papers_suffix_is_the_templates_and_not_the_questions(tmp_path: Path) -> None:
    content = [paper_row(0, "1+1?" + PAPER_SUFFIX, "2"), paper_row(1, "1+2? Let's think.", "3")]
    loaded = load_problems(write_paper_parquet(tmp_path / "p.parquet", content))
    assert [p.question for p in loaded] == ["1+1?", "1+2? Let's think."]


def test_index_zero_is_an_id(tmp_path: Path) -> None:
    assert load_problems(write_paper_parquet(tmp_path / "p.parquet", [paper_row(0, "1+1?", "2")]))[0].id == "0"


def test_the_last_message_of_a_prompt_is_the_question(tmp_path: Path) -> None:
    row = paper_row(3, "1+1?", "2")
    row["prompt"] = [{"role": "system", "content": "You add."}, *row["prompt"]]  # type: ignore[misc]
    assert load_problems(write_paper_parquet(tmp_path / "p.parquet", [row]))[0].question == "1+1?"


def test_jsonl_keys_ids_and_sources(tmp_path: Path) -> None:
    content = [
        {"id": "a", "question": "1+1?", "answer": "2"},
        {"problem": "1+2?", "answer": 3},
        {"id": 0, "question": "1+3?", "answer": "4"},
        {"question": "1-1?", "answer": 0},
    ]
    file = write_jsonl(tmp_path / "p.jsonl", content)
    assert load_problems(file) == [
        Problem("a", "1+1?", "2", f"{file}:1"),
        Problem("2", "1+2?", "3", f"{file}:2"),
        Problem("0", "1+3?", "4", f"{file}:3"),
        Problem("4", "1-1?", "0", f"{file}:4"),
    ]


def test_builtin_sets_hold_correct_sums_and_unique_ids() -> None:
    for name, size in BUILTIN_SIZES.items():
        loaded = load_problems(f"builtin:{name}")
        assert len(loaded) == len({p.id for p in loaded}) == len({p.question for p in loaded}) == size
        for p in loaded:
            a, operator, b = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", p.question).groups()  # type: ignore[union-attr]
            assert int(p.answer) == (int(a) + int(b) if operator == "+" else int(a) - int(b))


# --- which problems are trained on and which evaluated ----------------------------------------------------------------


def test_copies_of_one_row_are_one_problem(tmp_path: Path) -> None:
    file = write_paper_parquet(tmp_path / "p.parquet", [paper_row(124, "Speed?", "12.8")] * 128)
    data = SingleExampleDataModule(file=file, problems_per_step=4)
    data.setup("fit")
    assert [p.id for p in data.train_problems] == ["124"]
    batch = next(iter(data.train_dataloader()))
    assert batch.slots == (0, 1, 2, 3)  # four groups of the one problem
    assert {p.id for p in batch.problems} == {"124"}


def test_one_problem_of_several_has_to_be_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", rows(3))
    with pytest.raises(ConfigError, match=r"holds 3 problems: choose one by data\.id"):
        SingleExampleDataModule(file=file).setup("fit")
    chosen = SingleExampleDataModule(file=file, id="p2")
    chosen.setup("fit")
    assert [p.question for p in chosen.train_problems] == ["What is 2 + 1?"]


def test_ids_select_in_their_order_over_all_files(tmp_path: Path) -> None:
    first, second = rows(5)[:3], rows(5)[3:]
    files: list[str | dict[str, Any]] = [write_jsonl(tmp_path / "a.jsonl", first), write_jsonl(tmp_path / "b.jsonl", second)]
    data = SubsetDataModule(sources=files, ids=["p4", "p0"])
    data.setup("fit")
    assert [p.id for p in data.train_problems] == ["p4", "p0"]
    everything = SubsetDataModule(sources=files)
    everything.setup("fit")
    assert [p.id for p in everything.train_problems] == ["p0", "p1", "p2", "p3", "p4"]


@pytest.mark.parametrize("module", ["single", "subset"])
def test_unknown_ids_are_all_named(tmp_path: Path, module: str) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", rows(3))
    data = (
        SingleExampleDataModule(file=file, id="x1")
        if module == "single"
        else SubsetDataModule(sources=[file], ids=["p1", "x1", "x2"])
    )
    with pytest.raises(ConfigError, match="no problem with id 'x1'" + ("" if module == "single" else ", 'x2'")) as e:
        data.setup("fit")
    assert "it has ids like p0, p1, p2" in str(e.value).replace("which has", "it has").replace("\n", " ")


def test_a_trained_problem_is_left_out_of_the_evaluation_sets(tmp_path: Path) -> None:
    evals = {"sums": "builtin:addition_1digit", "own": write_jsonl(tmp_path / "p.jsonl", rows(3))}
    data = SingleExampleDataModule(question="What  is 3 + 4?\n", answer="7", evals=evals)  # other blanks, same problem
    data.setup("fit")
    sums = data.eval_problems["sums"]
    assert len(sums) == BUILTIN_SIZES["addition_1digit"] - 1
    assert "What is 3 + 4?" not in {p.question for p in sums}
    data = SingleExampleDataModule(question="What is 1 + 1?", answer="2", evals=evals)
    data.setup("fit")
    assert [p.id for p in data.eval_problems["own"]] == ["p0", "p2"]


def test_an_evaluation_set_of_training_problems_only_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", rows(1))
    with pytest.raises(ConfigError, match=r"data\.evals\.own: every problem of .* is a training problem"):
        SingleExampleDataModule(file=file, evals={"own": file}).setup("fit")


def test_evaluation_needs_no_training_problem_and_fitting_does() -> None:
    data = EvalDataModule(evals={"sums": "builtin:addition_1digit"}, eval_batch_size=50)
    for _ in range(2):
        data.setup("test")
    assert [len(batch.problems) for loader in data.test_dataloader() for batch in loader] == [50, 31]
    with pytest.raises(ConfigError, match="no training problem: fit with SingleExampleDataModule"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match=r"data\.evals is empty: name at least one"):
        EvalDataModule(evals={})


def test_bad_rows_of_an_evaluation_set_end_the_run_in_setup(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"question": "1+1?"}])
    with pytest.raises(ConfigError, match="row 1: no answer"):
        SingleExampleDataModule(question="q", answer="1", evals={"own": file}).setup("validate")


# --- several sources --------------------------------------------------------------------------------------------------


def test_every_bad_row_of_every_source_is_in_one_report(tmp_path: Path) -> None:
    good = {"id": "a", "question": "1+1?", "answer": "2"}
    first = write_jsonl(
        tmp_path / "first.jsonl", [good, {**good, "id": "b", "answer": ""}, {**good, "id": "c", "question": " "}]
    )
    second = tmp_path / "second.jsonl"
    second.write_bytes(b'{"id": "d", "question": "\xff", "answer": "1"}\n' + json.dumps({**good, "question": "2+2?"}).encode())
    third = write_jsonl(tmp_path / "third.jsonl", [{"id": "e", "question": "x" * 2_000_000, "answer": "1"}])
    fourth = str(tmp_path / "fourth.parquet")
    pq.write_table(pa.Table.from_pylist([{"text": "1+1?", "answer": "2"}] * 3), fourth)
    evals = {"own": write_jsonl(tmp_path / "own.jsonl", [{"question": "1+1?"}])}
    with pytest.raises(ConfigError) as caught:
        SubsetDataModule(sources=[first, str(second), third, fourth, str(tmp_path / "fifth.jsonl")], evals=evals).setup("fit")
    told = str(caught.value)
    for part in (
        f"{first} row 2 (id b): no answer",
        f"{first} row 3 (id c): no question",
        f"{second} row 1: not UTF-8 text",
        f"{second} row 2: its id 'a' is that of {first} row 1",
        f"{third} row 1 (id e): the question has 2,000,000 characters",
        f"{fourth}, each of its 3 rows: no question (keys read: question, problem, prompt; the row has text, answer)",
        "fifth.jsonl' does not exist",
        f"{evals['own']} row 1: no answer",
    ):
        assert part in told
    assert len(told) < 4000


def test_a_source_that_is_not_there_is_never_skipped(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "p.jsonl", [*rows(2), {"id": "bad", "question": "1+1?"}])
    with pytest.raises(ConfigError, match=r"absent\.jsonl' does not exist"):
        SubsetDataModule(sources=[good, str(tmp_path / "absent.jsonl")], skip_bad_rows=True).setup("fit")
    data = SubsetDataModule(sources=[good], skip_bad_rows=True)
    data.setup("fit")
    assert [p.id for p in data.train_problems] == ["p0", "p1"]


def test_a_folder_is_read_file_by_file_and_numbered_rows_keep_apart(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": f"{name} {i}?", "answer": "1"} for i in range(2)])
    (tmp_path / "readme.txt").write_text("no data")
    data = SubsetDataModule(sources=[str(tmp_path)])
    data.setup("fit")
    assert [p.id for p in data.train_problems] == ["a:1", "a:2", "b:1", "b:2"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \.jsonl, \.json, \.parquet file"):
        SubsetDataModule(sources=[str(tmp_path / "none")]).setup("fit")


def test_sources_with_columns_prefix_generator_and_weight(tmp_path: Path) -> None:
    hard = write_jsonl(tmp_path / "hard.jsonl", [{"id": i, "text": f"{i} hard?", "solution": "so #### 3"} for i in range(2)])
    easy = write_jsonl(tmp_path / "easy.jsonl", [{"id": i, "question": f"{i} easy?", "answer": "1"} for i in range(4)])
    sources: list[str | dict[str, Any]] = [
        {"file": hard, "question": ["text"], "answer": ["solution|after_hashes"], "prefix": "h", "weight": 3},
        {"file": easy, "weight": 1},
        {"generator": "arithmetic:addition:2", "count": 10, "weight": 2},
    ]
    data = SubsetDataModule(sources=sources, problems_per_step=60)
    data.setup("fit")
    by_id = {p.id: p for p in data.train_problems}
    assert (len(by_id), by_id["h0"].answer, by_id["0"].answer) == (16, "3", "1")
    counts = Counter(
        "h" if p.id[0] == "h" else "e" if "easy" in p.question else "g" for p in next(iter(data.train_dataloader())).problems
    )
    assert all(abs(counts[kind] - share) <= 2 for kind, share in (("h", 30), ("e", 10), ("g", 20)))
    for bad, message in (
        ([easy, {"file": hard, "weight": 2}], "some have a weight and some have none"),
        ([{"file": easy, "weight": 0}], r"data\.sources\[0\]: weight is 0"),
        ([easy, {"file": easy, "wieght": 1}], r"data\.sources\[1\] has no field wieght"),
        ([{"file": easy, "hub": "a/b"}], "this one has file and hub"),
        ([{"file": easy, "count": "many"}], r"data\.sources\[0\] is no source: .*count"),
    ):
        with pytest.raises(ConfigError, match=message):
            SubsetDataModule(sources=bad).setup("fit")  # type: ignore[arg-type]


def test_a_fit_leaves_its_problems_and_what_was_changed_in_them(tmp_path: Path) -> None:
    data = SubsetDataModule(
        sources=[write_jsonl(tmp_path / "p.jsonl", rows(3))], perturb=Perturbation(answers={"p1": "929725"})
    )
    data.setup("fit")
    assert [p.answer for p in data.train_problems] == ["1", "929725", "3"]
    data.save(tmp_path / "run")
    written = SubsetDataModule(sources=[str(tmp_path / "run" / "problems.jsonl")])
    written.setup("fit")
    assert [(p.id, p.question, p.answer) for p in written.train_problems] == [
        (p.id, p.question, p.answer) for p in data.train_problems
    ]
    [change] = map(json.loads, (tmp_path / "run" / "perturbed.jsonl").read_text().splitlines())
    assert change == {"id": "p1", "field": "answer", "before": "2", "after": "929725"}


# --- which of them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ranking(tmp_path: Path) -> str:
    """Ranks p3, p0, p2, p1, p4 with mean accuracies 0.5, 0.25, 0.75, 0, 1."""
    ranked = zip(("p3", "p0", "p2", "p1", "p4"), (0.5, 0.25, 0.75, 0.0, 1.0), strict=True)
    content = [{"rank": r, "id": i, "score": 1 / r, "mean": m, "visits": 9} for r, (i, m) in enumerate(ranked, start=1)]
    return write_jsonl(tmp_path / "ranking.jsonl", [dict(row) for row in content])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"ids": ("pi_1",)}, ["p3"]),
        ({"ids": ("pi_5", "p2", "pi_1")}, ["p4", "p2", "p3"]),
        ({"top": 2}, ["p3", "p0"]),
        ({}, ["p3", "p0", "p2", "p1", "p4"]),
        ({"accuracy": (0.25, 0.75)}, ["p3", "p0", "p2"]),
        ({"accuracy": (0.0, 0.6), "top": 2}, ["p3", "p0"]),
    ],
)
def test_a_ranking_chooses(ranking: str, choice: dict[str, Any], expected: list[str]) -> None:
    assert [p.id for p in Selection(ranking=ranking, **choice)(problems(5))] == expected


def test_a_random_few_are_a_function_of_the_seed() -> None:
    draws = {seed: tuple(p.id for p in Selection(random=4, seed=seed)(problems(9))) for seed in range(20)}
    assert all(len(set(draw)) == 4 and list(draw) == sorted(draw) for draw in draws.values())
    assert len(set(draws.values())) > 10
    assert [p.id for p in Selection(random=4, seed=3)(problems(9))] == list(draws[3])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"ids": ("pi_1",)}, "pi_N needs data.ranking"),
        ({"ids": ("p1", "p1")}, "names p1 twice"),
        ({"ids": ("p1",), "random": 1}, "leave out data.top"),
        ({"top": 2}, "need data.ranking"),
        ({"random": 0}, "data.random is 0"),
        ({"random": 6}, "there are only 5 problems"),
        ({"ranking": "R", "top": 9}, "data.top is 9 but there are only 5"),
        ({"ranking": "R", "accuracy": (0.8, 0.9)}, "widen the band"),
        ({"ranking": "R", "accuracy": (0.8, 0.2)}, "give the lower and the upper end"),
        ({"ranking": "absent.jsonl"}, "does not exist"),
    ],
)
def test_impossible_choices_are_refused(ranking: str, choice: dict[str, Any], message: str) -> None:
    choice = {key: ranking if value == "R" else value for key, value in choice.items()}
    with pytest.raises(ConfigError, match=message):
        Selection(**choice)(problems(5))


def test_a_ranking_of_other_problems_is_refused(ranking: str) -> None:
    with pytest.raises(ConfigError, match=r"ranks 2 problem\(s\) that the data does not hold, such as 'p3'"):
        Selection(ranking=ranking)(problems(3))


# --- order ------------------------------------------------------------------------------------------------------------


def loader(count: int, per_step: int, *, seed: int = 0) -> ProblemLoader:
    return ProblemLoader(problems(count), per_step, seed)


def ids(batches: list[ProblemBatch]) -> list[list[str]]:
    return [[p.id for p in batch.problems] for batch in batches]


def test_order_is_a_function_of_seed_and_step() -> None:
    first = ids(list(islice(loader(7, 3), 10)))
    assert ids(list(islice(loader(7, 3), 10))) == first
    assert ids(list(islice(loader(7, 3, seed=1), 10))) != first
    assert [batch.step for batch in islice(loader(7, 3), 4)] == [0, 1, 2, 3]


def test_order_is_the_one_of_every_earlier_run() -> None:
    assert ids(list(islice(loader(5, 2), 3))) == [["p2", "p4"], ["p3", "p0"], ["p1", "p1"]]


def test_every_problem_comes_once_per_epoch_and_epochs_differ() -> None:
    stream = [i for batch in ids(list(islice(loader(7, 3), 14))) for i in batch]  # 42 = six epochs of seven
    epochs = [tuple(stream[i : i + 7]) for i in range(0, 42, 7)]
    assert all(sorted(epoch) == [f"p{i}" for i in range(7)] for epoch in epochs)
    assert len(set(epochs)) == 6


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_restored_loader_continues_where_the_saved_one_stopped(done: int) -> None:
    whole = list(islice(loader(7, 3), 9))
    interrupted = loader(7, 3)
    list(islice(interrupted, done))
    resumed = loader(7, 3)
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    rest = list(islice(resumed, 9 - done))
    assert ids(rest) == ids(whole[done:])
    assert [batch.step for batch in rest] == list(range(done, 9))


def test_weights_say_how_often_each_problem_comes() -> None:
    weights = [1.0, 2.0, 5.0, 0.5, 1.5]
    stream = [p.id for batch in islice(ProblemLoader(problems(5), 7, 0, weights), 200) for p in batch.problems]
    again = [p.id for batch in islice(ProblemLoader(problems(5), 1400, 0, weights), 1) for p in batch.problems]
    assert stream == again  # a function of the position, however it is cut into steps
    for start, length in ((0, 40), (13, 100), (500, 900)):
        counts = Counter(stream[start : start + length])
        for i, weight in enumerate(weights):
            assert abs(counts[f"p{i}"] - length * weight / sum(weights)) < 2
    assert [p.id for batch in islice(ProblemLoader(problems(5), 7, 1, weights), 200) for p in batch.problems] != stream


def test_equal_weights_are_no_weights() -> None:
    assert ids(list(islice(ProblemLoader(problems(5), 2, 0, [3.0] * 5), 9))) == ids(list(islice(loader(5, 2), 9)))


@pytest.mark.parametrize(("count", "batch_size", "world"), [(7, 2, 1), (7, 2, 2), (7, 2, 3), (1, 4, 3), (12, 2, 3)])
def test_evaluation_gives_equal_batch_counts_and_every_problem_once(count: int, batch_size: int, world: int) -> None:
    loaders = [EvalLoader("set", problems(count), batch_size, rank, world) for rank in range(world)]
    batches = [list(one) for one in loaders]
    assert {len(b) for b in batches} == {len(one) for one in loaders} == {-(-count // (batch_size * world))}
    served = Counter(p.id for rank in batches for batch in rank for p in batch.problems)
    assert served == Counter(f"p{i}" for i in range(count))
    slots = [s for rank in batches for batch in rank for s in batch.slots]
    assert sorted(slots) == list(range(count))  # a slot decides a seed: no two problems may share one
    assert all(len(batch.problems) <= batch_size and batch.name == "set" for rank in batches for batch in rank)


def test_evaluation_keeps_the_files_order() -> None:
    assert [p.id for batch in EvalLoader("set", problems(5), 2, 0, 1) for p in batch.problems] == [f"p{i}" for i in range(5)]


def test_no_two_completions_of_a_run_share_a_seed() -> None:
    grid = list(product((0, 1, 7), ("train", "eval"), range(20), range(8), range(8)))
    found = {seed_for(run, stream=name, step=step, slot=slot, sample=i) for run, name, step, slot, i in grid}
    assert len(found) == len(grid)
    assert all(0 <= seed < 2**63 for seed in found)


@pytest.mark.parametrize(
    ("run", "stream", "step", "slot", "sample", "seed"),
    [
        (0, "train", 0, 0, 0, 4334430513956379144),
        (0, "eval", 0, 0, 0, 1530797556263114877),
        (0, "train", 1, 0, 0, 8752209972951327998),
        (0, "train", 0, 1, 0, 1854104972956726827),
        (0, "train", 0, 0, 1, 2440950710608614359),
        (1, "train", 0, 0, 0, 4215923173971654960),
        (7, "train", 1999, 127, 7, 5728099726659628894),
    ],
)
def test_seeds_are_those_of_every_earlier_run(run: int, stream: str, step: int, slot: int, sample: int, seed: int) -> None:
    assert seed_for(run, stream=stream, step=step, slot=slot, sample=sample) == seed


# --- the published files ----------------------------------------------------------------------------------------------

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the published data files are not here")


def published(kind: str) -> list[Path]:
    return sorted(SHARED_DATA.rglob(f"*.{kind}")) if SHARED_DATA.is_dir() else []


@needs_shared_data
def test_every_published_training_file_loads_but_for_one_row_without_an_answer() -> None:
    files = published("parquet")
    assert len(files) >= 8
    for file in files:
        found, faults = read_problems(str(file))
        assert len(found) + len(faults) == pq.read_metadata(file).num_rows
        if file.name == "dsr_sub.parquet":
            [fault] = faults
            assert fault.startswith(
                f"{file} row 266 (id 265): no answer (keys read: answer, reward_model.ground_truth; the row has "
            )
        else:
            assert not faults


@needs_shared_data
def test_the_papers_set_trains_without_its_bad_row_and_its_duplicates_are_told() -> None:
    file = str(SHARED_DATA / "train" / "dsr_sub.parquet")
    with pytest.raises(ConfigError, match=r"1 bad row.*\n.*row 266 .id 265.: no answer.*\n.*skip_bad_rows"):
        SubsetDataModule(sources=[file]).setup("fit")
    data = SubsetDataModule(sources=[file], skip_bad_rows=True)
    data.setup("fit")
    assert (len(data.train_problems), len({p.id for p in data.train_problems})) == (1208, 1208)
    assert [note for note in data.notes if note.startswith("left out: ") and "row 266" in note]
    [same] = [note for note in data.notes if "hold the same question: " in note]
    assert same.startswith("3 rows hold")
    assert all(f"id {i} ({file} row {i + 1})" in same for i in (136, 780, 899))


@needs_shared_data
def test_a_file_of_copies_is_its_problems_in_its_proportions() -> None:
    data = SubsetDataModule(sources=[str(SHARED_DATA / "train" / "merge_pi1_pi2_pi13_pi1209_r128.parquet")])
    data.setup("fit")
    assert [p.id for p in data.train_problems] == ["124", "267", "682", "789"]
    assert [note for note in data.notes if "124 of 128 rows are copies of other rows, 4 problem(s)" in note]
    assert Counter(p.id for p in next(iter(data.train_dataloader())).problems) == dict.fromkeys(
        ["124", "267", "682", "789"], 32
    )


@needs_shared_data
def test_the_papers_one_example_file_is_one_problem() -> None:
    data = SingleExampleDataModule(file=str(SHARED_DATA / "train" / "pi1_r128.parquet"))
    data.setup("fit")
    assert [(p.id, p.answer) for p in data.train_problems] == [("124", "12.8")]
    [published_prompt] = pq.read_table(data.file).to_pylist()[0]["prompt"]
    assert data.train_problems[0].question + PAPER_SUFFIX == published_prompt["content"]


SUITE_SIZES = {
    "aime24": 30, "aime25": 30, "amc23": 40, "gsm8k": 1319, "math500": 500, "minerva_math": 272, "olympiadbench": 675
}  # fmt: skip


@needs_shared_data
def test_every_published_evaluation_file_loads_by_the_keys_of_its_declaration() -> None:
    found = {name: suite_set(name).load(str(SHARED_DATA / "eval")) for name in SUITE_SIZES}
    assert {name: len(problems) for name, problems in found.items()} == SUITE_SIZES
    for name, problems in found.items():
        assert len({p.id for p in problems}) == len(problems), name
        assert not [p for p in problems if "boxed" in p.answer or "####" in p.answer], name
    assert found["minerva_math"][0].answer == "1.6"  # the box of its solution
    assert found["olympiadbench"][0].answer == "2"  # the first entry of a list
    assert found["amc23"][0].answer == "27"  # the file says 27.0
    assert found["gsm8k"][0].answer == "18"  # what follows the hashes
    subjects = Counter(p.subject for p in found["math500"])
    assert (len(subjects), subjects["Algebra"], subjects["Number Theory"]) == (7, 124, 62)
    assert {p.subject for p in found["olympiadbench"]} == {"Algebra", "Combinatorics", "Geometry", "Number Theory"}


def test_loading_does_not_depend_on_how_often_setup_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load: Callable[..., Any] = read_problems
    monkeypatch.setattr("rlvr_lightning.sources.read_problems", lambda file, *rest: (read.append(file), load(file, *rest))[1])
    data = SingleExampleDataModule(question="1+1?", answer="2", evals={"own": write_jsonl(tmp_path / "p.jsonl", rows(2))})
    for stage in ("validate", "fit", "test"):
        data.setup(stage)
    assert len(read) == 1
    assert len(data.eval_problems["own"]) == 2


def test_the_command_reports_files_and_joins_the_good_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(
        tmp_path / "p.jsonl",
        [*rows(2), {"id": "bad", "question": "1+1?"}, {"id": "p9", "question": "What is 0 + 1?", "answer": "1"}],
    )
    out = tmp_path / "good.jsonl"
    assert check.main(["problems", file, "--out", str(out)]) == 2
    told = capsys.readouterr().out
    assert told.startswith("3 problems; question of 14 to 14 characters\n")
    assert f"left out: {file} row 3 (id bad): no answer" in told
    assert f"2 rows hold the same question: id p0 ({file} row 1), id p9 ({file} row 4)" in told
    assert check.main(["problems", str(out)]) == 0
    solutions = write_jsonl(tmp_path / "s.jsonl", [{"task": "1+1?", "solution": r"so \boxed{2}"}])
    assert check.main(["problems", solutions, "--question", "task", "--answer", "solution|last_box", "--out", str(out)]) == 0
    assert [(p.id, p.question, p.answer) for p in load_problems(str(out))] == [("1", "1+1?", "2")]
