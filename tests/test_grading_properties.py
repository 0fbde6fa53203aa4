"""What the `math` grader promises for every answer: which rewritings are equal, which near-misses are not, and no exception."""

from collections.abc import Callable
from fractions import Fraction
from typing import get_args

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rlvr_lightning.grading.math import compare, extract
from rlvr_lightning.grading.verdict import Verdict

Rewriting = Callable[[str], str]

integers = st.integers(-(10**12), 10**12)
rationals = st.builds(Fraction, st.integers(-9999, 9999), st.integers(1, 999))
decimals = st.builds(lambda n, places: Fraction(n, 10**places), st.integers(-(10**8), 10**8), st.integers(0, 6))

SPACES: dict[str, Rewriting] = {
    "spaces around operators": lambda text: text.replace("+", " + ").replace("=", " = "),
    "thin spaces": lambda text: text.replace("+", r"\,+\;").replace(",", r",\ "),
    "surrounding space": lambda text: f"  {text}\n",
    "dollars": lambda text: f"${text}$",
    "display": lambda text: rf"\[ {text} \]",
    "dfrac": lambda text: text.replace(r"\frac", r"\dfrac"),
    "tfrac": lambda text: text.replace(r"\frac", r"\tfrac"),
    "left right": lambda text: text.replace("(", r"\left(").replace(")", r"\right)"),
    "unicode minus": lambda text: text.replace("-", "\u2212"),
    "full stop": lambda text: text + ".",
    "braces": lambda text: f"{{{text}}}",
    "zero-width space": lambda text: text + "\u200b",
}
"""Rewritings that change how an answer looks and nothing else."""


@st.composite
def spellings(draw: st.DrawFn, value: Fraction) -> str:
    """One way to write an exact number."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    whole, rest = divmod(size.numerator, size.denominator)
    factor = draw(st.integers(1, 5))
    top, bottom = factor * size.numerator, factor * size.denominator
    forms = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{sign}{top}}}{{{bottom}}}"]
    forms.append(rf"\left({sign}\frac{{{top}}}{{{bottom}}}\right)")
    if whole and rest:
        forms.append(rf"{sign}{whole}\frac{{{rest}}}{{{size.denominator}}}")
    if size.denominator == 1:
        forms += [f"{sign}{whole}", f"{sign}{whole:,}", f"{sign}{whole:,}".replace(",", "{,}"), f"{sign}{whole}.0"]
        forms.append(f"\u2212{whole}" if sign else f"+{whole}")
    if 10**6 % size.denominator == 0:
        micros = size.numerator * 10**6 // size.denominator
        digits = f"{micros // 10**6}.{micros % 10**6:06d}"
        forms += [sign + digits, sign + digits.rstrip("0"), rf"{sign}{micros} \times 10^{{-6}}", f"{sign}{micros}e-6"]
    return draw(st.sampled_from(forms))


def _compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Terms that are finite wherever their parts are, and never of a size where adding 1 drowns."""
    return st.one_of(
        st.builds("{}+{}".format, inner, inner),
        st.builds("{}-({})".format, inner, inner),
        st.builds("({})({})".format, inner, inner),
        st.builds(r"\frac{{{}}}{{{}}}".format, inner, st.integers(2, 9)),
        st.builds(r"\frac{{{}}}{{x^2+{}}}".format, inner, st.integers(1, 9)),
        st.builds("({})^{{{}}}".format, inner, st.integers(2, 3)),
        st.builds(r"\sin({})".format, inner),
        st.builds(r"{}\sqrt{{{}}}".format, st.integers(2, 9), st.integers(2, 50)),
    )


expressions = st.recursive(st.sampled_from(["x", "y", "a_1", r"\pi", "2", "3", "7", "x^2", r"\theta"]), _compound, max_leaves=5)


@given(st.data(), rationals | decimals | st.builds(Fraction, integers))
def test_spellings_of_one_number_are_equal_both_ways(data: st.DataObject, value: Fraction) -> None:
    one, other = data.draw(spellings(value)), data.draw(spellings(value))
    assert (compare(one, other), compare(other, one)) == ("correct", "correct")


@given(st.data(), rationals | decimals | st.builds(Fraction, integers))
def test_different_numbers_are_wrong_both_ways(data: st.DataObject, value: Fraction) -> None:
    steps = [Fraction(1), Fraction(-1), Fraction(1, 10**6), -2 * value, 9 * value, 99 * value, -value * Fraction(99, 100)]
    other = value + data.draw(st.sampled_from(steps))
    assume(other != value)
    one, two = data.draw(spellings(value)), data.draw(spellings(other))
    assert (compare(one, two), compare(two, one)) == ("wrong", "wrong")


@given(rationals, st.integers(1, 12))
def test_rounded_decimal_does_not_meet_a_fraction(value: Fraction, places: int) -> None:
    rounded = f"{float(value):.{places}f}"
    assume(Fraction(rounded) != value)
    assert compare(rf"\frac{{{value.numerator}}}{{{value.denominator}}}", rounded) == "wrong"


@given(st.data(), st.integers(2, 10**6))
def test_irrational_number_is_met_by_no_decimal(data: st.DataObject, radicand: int) -> None:
    assume(int(radicand**0.5) ** 2 != radicand)
    decimal = f"{radicand**0.5:.{data.draw(st.integers(1, 15))}f}"
    assert compare(rf"\sqrt{{{radicand}}}", decimal) == "wrong"
    assert compare(rf"\sqrt{{{radicand}}}", rf"\frac{{{radicand}}}{{\sqrt{{{radicand}}}}}") == "correct"


@given(integers, st.sampled_from([",", "{,}", r"\,", r",\!", r"{,}\!"]))
def test_thousands_separators_change_nothing(value: int, separator: str) -> None:
    grouped = f"{value:,}".replace(",", separator)
    assert (compare(str(value), grouped), compare(grouped, str(value))) == ("correct", "correct")
    assert compare(str(value + 1), grouped) == "wrong"


@settings(max_examples=50)
@given(expressions, st.sampled_from(sorted(SPACES)))
def test_looks_do_not_matter(expression: str, name: str) -> None:
    rewritten = SPACES[name](expression)
    assert compare(expression, expression) == "correct"
    assert (compare(expression, rewritten), compare(rewritten, expression)) == ("correct", "correct")


@settings(max_examples=50)
@given(expressions, expressions)
def test_algebra_does_not_matter_and_one_more_does(one: str, other: str) -> None:
    assert compare(f"{one}+{other}", f"{other}+{one}") == "correct"
    assert compare(f"({one})({other})", f"({other}) \\cdot ({one})") == "correct"
    assert compare(one, rf"\frac{{3({one})}}{{3}}") == "correct"
    assert compare(one, f"({one})+1") == "wrong"


@settings(max_examples=50)
@given(st.data(), st.lists(rationals, min_size=2, max_size=6, unique=True))
def test_order_counts_in_tuples_and_not_in_sets(data: st.DataObject, values: list[Fraction]) -> None:
    shuffled = data.draw(st.permutations(values))
    texts = [f"{value.numerator}/{value.denominator}" for value in values]
    others = [rf"\frac{{{value.numerator}}}{{{value.denominator}}}" for value in shuffled]
    gold, answer = ", ".join(texts), ", ".join(others)
    assert compare(rf"\{{{gold}\}}", rf"\left\{{{answer}\right\}}") == "correct"
    assert compare(gold, answer) == "correct"
    assert compare(f"({gold})", f"({answer})") == ("correct" if values == shuffled else "wrong")


@settings(max_examples=50)
@given(st.lists(rationals, min_size=2, max_size=6, unique=True), rationals)
def test_all_of_a_list_is_needed_and_nothing_more(values: list[Fraction], extra: Fraction) -> None:
    assume(extra not in values)
    texts = [rf"\frac{{{value.numerator}}}{{{value.denominator}}}" for value in values]
    more = rf"\frac{{{extra.numerator}}}{{{extra.denominator}}}"
    for template in ("{}", r"\{{{}\}}", "({})"):
        gold = template.format(", ".join(texts))
        assert compare(gold, template.format(", ".join(texts[:-1]))) == "wrong"
        assert compare(gold, template.format(", ".join([*texts, more]))) == "wrong"
        assert compare(gold, template.format(", ".join([*texts[:-1], more]))) == "wrong"


@settings(max_examples=50)
@given(rationals, rationals, st.sampled_from(["()", "[]", "(]", "[)"]), st.sampled_from(["()", "[]", "(]", "[)"]))
def test_interval_is_its_inequality_and_its_brackets_count(one: Fraction, other: Fraction, kind: str, wrong: str) -> None:
    assume(one != other)
    low, high = (f"{value.numerator}/{value.denominator}" for value in sorted((one, other)))
    less = [r"\le" if bracket in "[]" else "<" for bracket in kind]
    inequality = f"{low} {less[0]} x {less[1]} {high}"
    interval = f"{kind[0]}{low}, {high}{kind[1]}"
    assert compare(interval, interval) == "correct"
    assert compare(interval, f"{wrong[0]}{low}, {high}{wrong[1]}") == ("correct" if wrong == kind else "wrong")
    assert compare(f"x \\in {interval}", inequality) == "correct"
    assert compare(inequality, interval) == "correct"


TOKENS = [*r"0123456789xyiCe+-*/^_=<>(){}[]|,.:;!%$&'~ ", "\\", "\\\\", "\n", "\x00", "\ud800", "\u2212", "\u00bd", "\u221a"]
TOKENS += [r"\frac", r"\sqrt", r"\sqrt[", r"\left(", r"\right)", r"\pm", r"\cup", r"\infty", r"\pi", r"\text{", r"\mathrm{"]
TOKENS += [r"\begin{pmatrix}", r"\end{pmatrix}", r"\le", r"\in", r"\{", r"\}", r"\binom", r"\log_", r"\sin", r"\%", r"\$"]
TOKENS += [r"^\circ", r"\cdot", r"\overline{", r"\lfloor", r"\boxed{", " or ", " OR ", "cm", "a.m.", "10^{", r"\sum_{k=1}^{"]
noise = st.lists(st.sampled_from(TOKENS), max_size=14).map("".join) | st.text(max_size=20)


@settings(max_examples=300)
@given(noise, noise | st.sampled_from(["24", r"\frac{1}{2}", "(1, 2)", r"\{1, 2\}", "x + 1", "Yes", "C"]))
@example(" or ", "24")
@example("", "=")
def test_noise_gets_a_verdict_and_the_same_one_twice(one: str, other: str) -> None:
    for gold, answer in ((one, other), (other, one), (one, one)):
        verdict = compare(gold, answer)
        assert verdict in get_args(Verdict)
        assert compare(gold, answer) == verdict


@given(noise, st.text(alphabet=st.characters(exclude_characters="\\{}"), min_size=1, max_size=20))
def test_extraction_returns_the_last_box_of_any_text(before: str, content: str) -> None:
    assume(content.strip())
    assert extract(before) is None or extract(before)
    assert extract(f"{before} \n\\boxed{{1}}, then \\boxed{{{content}}}") == content.strip()
