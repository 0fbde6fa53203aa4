"""Problems change as asked and no further; a wrong label is of its kind, near, and never right."""

import os
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.reading import training_row
from rlvr_lightning.grading.math import compare
from rlvr_lightning.grading.math.normalize import normalize
from rlvr_lightning.grading.math.reader import read
from rlvr_lightning.perturb import REACH, Perturbation, wrong_label
from rlvr_lightning.records import Completion, Problem
from rlvr_lightning.verify import Verifier

SEEDS = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def problems(count: int = 40) -> list[Problem]:
    return [Problem(str(i), f"question {i}", str(3 * i - 20), source="file", subject="algebra") for i in range(count)]


def wrong(label: str, seed: int) -> str:
    new = wrong_label(label, rng(seed))
    assert new is not None
    return new


def neighbours(value: int) -> set[int]:
    """Every integer that 1 to 10 up or down, and a change of sign, can make of one."""
    return {sign * (value + step) for step in range(-REACH, REACH + 1) if step for sign in (1, -1)}


# --- wrong labels ------------------------------------------------------------------------------------------------------


@given(st.integers(-(10**30), 10**30) | st.integers(-12, 12), SEEDS)
def test_an_integer_moves_within_reach(value: int, seed: int) -> None:
    new = wrong(str(value), seed)
    assert re.fullmatch(r"0|-?[1-9]\d*", new)
    assert int(new) in neighbours(value) - {value}


def test_an_integer_goes_everywhere_within_reach() -> None:
    assert {int(wrong("25", seed)) for seed in range(800)} == neighbours(25)
    assert {int(wrong("-0", seed)) for seed in range(800)} == neighbours(0)


@given(st.decimals(-1000, 1000, places=3), SEEDS)
def test_a_decimal_keeps_its_places(value: object, seed: int) -> None:
    new = wrong(str(value), seed)
    assert re.fullmatch(r"-?\d+\.\d{3}", new)
    old = Fraction(str(value))
    assert Fraction(new) != old
    assert any(
        abs(sign * Fraction(new) - old).denominator == 1 and abs(sign * Fraction(new) - old) <= REACH for sign in (1, -1)
    )


FORMS = [r"\frac{%d}{%d}", r"\dfrac{%d}{%d}", r"\tfrac {%d} {%d}", "%d/%d", "%d / %d", r"$\frac{%d}{%d}$", r"-\frac{%d}{%d}"]


@given(st.sampled_from(FORMS), st.integers(0, 99), st.integers(1, 99), SEEDS)
def test_both_parts_of_a_fraction_move(form: str, above: int, below: int, seed: int) -> None:
    new = wrong(form % (above, below), seed)
    new_above, new_below = map(int, re.findall(r"\d+", new))
    assert new_below != 0
    assert {new_above, -new_above} & (neighbours(above) | neighbours(-above))
    assert {new_below, -new_below} & neighbours(below)
    value = Fraction(new_above, new_below) * (-1 if "-" in new else 1)
    assert value != Fraction(above, below) * (-1 if form.startswith("-") else 1)
    command = re.search(r"\\[a-z]+|/", form)
    assert command is not None
    assert command[0] in new
    assert new.count("$") == form.count("$")
    assert read(normalize(new))


def test_the_same_value_in_other_digits_is_no_change() -> None:
    assert not {"2/4", "3/6", "4/8", "5/10", "6/12", "1/2"} & {wrong("1/2", seed) for seed in range(3000)}


@pytest.mark.parametrize("label", [r"22\frac{1}{2}", r"22 \frac12", "22 1/2"])
def test_a_mixed_number_moves_as_an_improper_fraction(label: str) -> None:
    for seed in range(100):
        above, below = map(int, re.findall(r"\d+", wrong(label, seed)))
        assert {above, -above} & neighbours(45)
        assert {below, -below} & neighbours(2)


@pytest.mark.parametrize(
    ("label", "form"),
    [
        (r"2\sqrt{3}", r"\d+\\sqrt\{\d+\}"),
        (r"\sqrt2", r"\\sqrt\{\d+\}"),
        (r"\sqrt[3]{5}", r"\\sqrt\[([2-9]|\d\d)\]\{\d+\}"),
        ("(1,2)", r"\(\d+,\d+\)"),
        ("(-4,1)", r"\(-\d+,\d+\)"),
        (r"5\pi", r"\d+\\pi"),
        ("10^5", r"\d+\^\{\d+\}"),
        ("x=3", r"x=\d+"),
        (r"12\%", r"\d+\\%"),
        (r"43.75\%", r"\d+\.75\\%"),
        (r"\$28.00", r"\\\$\d+\.00"),
        (r"\$23{,}000", r"\\\$2\d{4}"),
        (r"3200 \mathrm{~cm}^{3}", r"\d{4} \\mathrm\{~cm\}\^\{3\}"),
        ("20 cm^2", r"\d+ cm\^\{2\}"),
        (r"90^\circ", r"\d+\^\\circ"),
        ("1604_8", r"1[56][0-7]{2}_8"),
        ("1:1", r"\d+:\d+"),
        ("4:05 p.m.", r"\d+:\d\d p\.m\."),
        (r"\left(\frac43, 1\right)", r"\\left\(\\frac\{\d+\}\{\d+\}, \d+\\right\)"),
        (r"\frac{3\sqrt{2}}{2}", r"\\frac\{\d+\\sqrt\{\d+\}\}\{\d+\}"),
        (r"4/3 \text{ OR } \sqrt{7}", r"\d+/\d+"),
        (r"x_1 = 5", r"x_1 = \d+"),
    ],
)
def test_any_other_label_keeps_its_form(label: str, form: str) -> None:
    for seed in range(60):
        new = wrong(label, seed)
        assert re.fullmatch(form, new), new
        assert read(normalize(new)), new
        assert compare(label, new) == "wrong", new
        assert compare(new, label) == "wrong", new
        if "OR" not in label and "{,}" not in label:
            numbers = [
                [Fraction(n) for n in re.findall(r"\d+(?:\.\d+)?", re.sub(r"\\frac(\d)(\d)", r"\1 \2", s))]
                for s in (label, new)
            ]
            assert all(abs(a - b) <= REACH and (a == b or b > 0) for a, b in zip(*numbers, strict=True))


@pytest.mark.parametrize("label", ["A", "x", r"\pi", r"\text{(A)}", "", " ", "x_1", r"\sum_{k=1}^{9} k"])
def test_a_label_without_a_number_to_move_has_no_wrong_one(label: str) -> None:
    assert wrong_label(label, rng()) is None


@given(st.text(alphabet="0123456789-+/.,^_{}()\\$ frac sqrt x", max_size=30), SEEDS)
def test_any_text_has_another_label_or_none(label: str, seed: int) -> None:
    new = wrong_label(label, rng(seed))
    assert new is None or (new.strip() and new != label)


# --- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.6, 0.9, 1.0])
def test_exactly_the_share_is_made_wrong(rate: float) -> None:
    before = problems()
    after, changes = Perturbation(label_noise=rate)(before)
    changed = [(b, a) for b, a in zip(before, after, strict=True) if a != b]
    assert len(changed) == len(changes) == round(rate * len(before))
    assert [(c["id"], c["field"], c["before"], c["after"]) for c in changes] == [
        (b.id, "answer", b.answer, a.answer) for b, a in changed
    ]
    assert all((a.id, a.question, a.source, a.subject) == (b.id, b.question, b.source, b.subject) for b, a in changed)


def labels(noise: float, seed: int, of: list[Problem]) -> dict[str, str]:
    return {change["id"]: change["after"] for change in Perturbation(label_noise=noise, seed=seed)(of)[1]}


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1), st.randoms(use_true_random=False))
def test_order_has_no_say_and_a_higher_rate_only_adds(seed: int, one: float, other: float, shuffle: random.Random) -> None:
    low, high = sorted((one, other))
    shuffled = problems()
    shuffle.shuffle(shuffled)
    few, many = labels(low, seed, problems()), labels(high, seed, shuffled)
    assert few.items() <= many.items()


def test_the_seed_decides_which_and_how() -> None:
    first, second = labels(0.5, 0, problems()), labels(0.5, 1, problems())
    assert set(first) != set(second)
    assert any(first[id_] != second[id_] for id_ in set(first) & set(second))
    assert first == labels(0.5, 0, problems())


def test_copies_of_one_problem_are_drawn_one_by_one() -> None:
    after, _ = Perturbation(label_noise=0.5)([Problem("124", "?", "12.8")] * 128)
    assert sum(p.answer != "12.8" for p in after) == 64
    assert len({p.answer for p in after}) > 10


def test_different_problems_may_share_an_id() -> None:
    rows = [Problem("1", f"question {i}", str(i)) for i in range(30)]
    one = {p.question: p.answer for p in Perturbation(label_noise=0.5)(rows)[0]}
    assert one == {p.question: p.answer for p in Perturbation(label_noise=0.5)(rows[::-1])[0]}
    assert sum(one[p.question] != p.answer for p in rows) == 15


def test_what_cannot_be_made_wrong_is_not_drawn_and_counted() -> None:
    rows = [*problems(6), Problem("a", "?", "A"), Problem("b", "?", "x"), Problem("c", "?", r"\pi"), Problem("d", "?", "B")]
    assert labels(0.6, 0, rows).keys() == {p.id for p in rows[:6]}
    with pytest.raises(ConfigError, match=r"7 of 10 labels, but only 6 can .* set it to 0\.6 or less"):
        Perturbation(label_noise=0.7)(rows)
    with pytest.raises(ConfigError, match="only 5 can"):
        Perturbation(label_noise=0.6, answers={"0": "5"})(rows)


# --- overrides ---------------------------------------------------------------------------------------------------------


def test_overrides_are_applied_and_listed_in_the_order_of_the_problems() -> None:
    before = problems(4)
    perturb = Perturbation(answers={"3": "929725", "1": "12.7"}, questions={"1": r"Calculate $\sqrt[3]{2048}$"})
    after, changes = perturb(before)
    assert changes == [
        {"id": "1", "field": "question", "before": "question 1", "after": r"Calculate $\sqrt[3]{2048}$"},
        {"id": "1", "field": "answer", "before": "-17", "after": "12.7"},
        {"id": "3", "field": "answer", "before": "-11", "after": "929725"},
    ]
    assert [p.answer for p in after] == ["-20", "12.7", "-14", "929725"]
    assert (after[0], after[2]) == (before[0], before[2])
    assert before == problems(4)


def test_nothing_changes_by_default() -> None:
    assert Perturbation()(problems()) == (problems(), [])
    assert Perturbation(answers={"0": "-20"})(problems()) == (problems(), [])


def test_a_given_label_wins_over_noise() -> None:
    after, changes = Perturbation(label_noise=0.9, answers={"0": "7", "1": "-17"})(problems(20))
    assert [p.answer for p in after[:2]] == ["7", "-17"]
    assert len(changes) == 18 + 1


def test_every_copy_of_a_problem_is_overridden() -> None:
    after, changes = Perturbation(answers={"124": "4"})([Problem("124", "?", "12.8")] * 3)
    assert [p.answer for p in after] == ["4"] * 3
    assert len(changes) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answers": {"99": "1"}}, "data.perturb.answers has the id '99'.*ids like 0, 1, 2"),
        ({"questions": {"99": "?"}}, "data.perturb.questions has the id '99'"),
        ({"answers": {"1": " "}}, "data.perturb.answers holds nothing for id '1'"),
        ({"questions": {"1": ""}}, "data.perturb.questions holds nothing for id '1'"),
        ({"label_noise": 1.01}, "data.perturb.label_noise is 1.01"),
        ({"label_noise": float("nan")}, "data.perturb.label_noise is nan"),
        ({"seed": -1}, "data.perturb.seed is -1"),
    ],
)
def test_a_fault_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Perturbation(**settings)(problems())  # pyright: ignore


def test_an_override_of_an_id_that_different_problems_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="'1', which 2 different training problems share"):
        Perturbation(answers={"1": "5"})([Problem("1", "a", "3"), Problem("1", "b", "3")])


def test_yaml_may_leave_out_the_quotes(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text('perturb:\n  answers: {124: 12.7, "7": 929725, x: "12.70"}\n  label_noise: 0.9\n')
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--perturb", type=Perturbation | None)
    parser.add_argument("--config", action="config")
    perturb = parser.instantiate(parser.parse_args(["--config", str(config)])).perturb
    assert perturb == Perturbation(answers={"124": "12.7", "7": "929725", "x": "12.70"}, label_noise=0.9)


# --- the paper's problems ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    verifier = Verifier()
    yield verifier
    verifier.close()


def dsr_sub() -> list[Problem]:
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = Path(os.environ.get("RLVR_DATA", Path(__file__).parents[2] / "shared" / "data"))
    file = folder / "train" / "dsr_sub.parquet"
    if not file.is_file():
        pytest.skip("the paper's data is not here: set RLVR_DATA to a folder with train/dsr_sub.parquet")
    rows = enumerate(parquet.read_table(file).to_pylist())
    return [training_row(row, i, f"row {i}") for i, row in rows if row["reward_model"]["ground_truth"].strip()]


def meets(verifier: Verifier, truths: list[str], answers: list[str]) -> list[bool]:
    """Return whether each answer, in a box, is correct by its ground truth."""
    pairs = [
        (Problem("p", "?", truth), Completion((), (), rf"\boxed{{{answer}}}", "stop"))
        for truth, answer in zip(truths, answers, strict=True)
    ]
    return [score.correct for score in verifier(pairs)]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_wrong_label_of_the_papers_problems_meets_the_right_one(verifier: Verifier, seed: int) -> None:
    before = dsr_sub()
    after, changes = Perturbation(label_noise=0.9, seed=seed)(before)
    assert len(changes) == round(0.9 * len(before))
    old, new = [c["before"] for c in changes], [c["after"] for c in changes]
    assert not any(meets(verifier, old, new))
    assert not any(meets(verifier, new, old))
    unverifiable = {line.split(":")[0] for line in verifier.unverifiable(before)}
    assert {line.split(":")[0] for line in verifier.unverifiable(after)} <= unverifiable
    assert all(int(b) in neighbours(int(a)) for a, b in zip(new, old, strict=True) if re.fullmatch(r"-?\d{4,}", b))


def test_all_but_a_handful_of_the_papers_problems_can_be_made_wrong() -> None:
    unable = {p.answer for p in dsr_sub() if wrong_label(p.answer, rng()) is None}
    assert unable == {r"\div", r"\text{(A)}", r"\pi", r"\text{odd}", r"\[ v \]"}
