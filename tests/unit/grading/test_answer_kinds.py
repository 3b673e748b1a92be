"""Strict equality over thousands of answers of every kind against every other, right and wrong by construction; both directions."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest

from megatron_r1z.grading.equality import Equality, compare
from megatron_r1z.grading.figures import join_figures
from megatron_r1z.grading.text import normalise
from tests.unit.grading.answer_generators import GROUPINGS, OPAQUE, PERCENTS, SEVERAL, SINGLE, UNITS, grouped, pairs
from tests.unit.grading.test_equality import _stored_rows

PAIRS = 1500
LEAST_RIGHT = 0.99


@pytest.mark.parametrize("seed", range(3))
def test_no_wrong_answer_is_accepted_and_right_ones_are_read(seed: int) -> None:
    accepted_wrong, refused_right, num_right = [], [], 0
    for left, right, equal in pairs(seed, PAIRS):
        outcomes = {compare(left.text, right.text) is Equality.EQUAL, compare(right.text, left.text) is Equality.EQUAL}
        num_right += equal
        if equal and outcomes != {True}:
            refused_right.append((left, right))
        if not equal and True in outcomes:
            accepted_wrong.append((left, right))
    assert accepted_wrong == []
    assert num_right > PAIRS / 8
    assert len(refused_right) <= (1 - LEAST_RIGHT) * num_right, refused_right


def test_every_kind_meets_every_other() -> None:
    kinds = {kind for left, right, _ in pairs(0, 4 * PAIRS) for kind in [(left.kind, right.kind)]}
    names = {name for pair in kinds for name in pair}
    assert len(names) == len({*SINGLE, *SEVERAL})
    assert len(kinds) > 0.95 * len(names) ** 2


@pytest.mark.parametrize("separator", sorted({*GROUPINGS}))
def test_a_number_is_one_token_whatever_is_around_it(separator: str) -> None:
    chooser = random.Random(0)
    for frame in (
        "{}",
        r"\${}",
        "({},2)",
        r"\{{{},2\}}",
        "[{},{})",
        r"x={}\text{{ cm}}",
        r"\frac{{{}}}{{7}}",
        r"\left(\sqrt{{{}}}, 1\right)",
        "{}%",
    ):
        value = chooser.randint(1000, 99_999_999)
        written, plain = grouped(str(value), separator), str(value)
        count = frame.count("{}")
        assert normalise(frame.format(*[written] * count)) == normalise(frame.format(*[plain] * count))


@pytest.mark.parametrize(
    "text", [r"1{,}23", r"12{,}3456", r"0{,}500", r"\frac1 234", "2^3 500", "3 100/7", "(1,500)", r"x_1 000", r"1\\ 234"]
)
def test_what_is_no_group_of_three_digits_stays(text: str) -> None:
    assert join_figures(text) == text


@pytest.mark.parametrize("percent", PERCENTS)
def test_a_percentage_equals_no_quantity(percent: str) -> None:
    for unit in [spelling for spellings in UNITS.values() for spelling in spellings] + [r"\text{ dollars}", "€"]:
        assert compare(f"5{percent}", f"5{unit}") is Equality.DIFFERENT
        assert compare(f"0.05{unit}", f"5{percent}") is Equality.DIFFERENT
    assert all(compare(f"5{percent}", figure) is Equality.EQUAL for figure in ("5", "0.05", r"\frac{1}{20}", r"5\%"))


@pytest.mark.parametrize("word", [word.replace("~", " ") for word in OPAQUE])
def test_a_word_that_is_no_noun_is_kept(word: str) -> None:
    for value in ("5", r"\frac{7}{2}", "1500"):
        for spelling in (rf"{value}\text{{ {word}}}", rf"{value}\ \mathrm{{{word}}}"):
            assert compare(spelling, value) is not Equality.EQUAL
            assert compare(value, spelling) is not Equality.EQUAL
        assert compare(rf"{value}\text{{ {word}}}", rf"{value}\;\mathrm{{ {word}}}.") is Equality.EQUAL


def test_the_references_of_the_question_sets_equal_themselves_with_any_separator() -> None:
    names = ("eval/math", "eval/math_train_500", "train/math_lvl3to5_8k", "train/math_train_7k", "train/gsm_8k", "train/asdiv_2k")
    references = {
        str(answer) for name in names for row in _stored_rows(f"{name}.jsonl") for answer in row.get("answers") or [row["answer"]]
    }
    assert len(references) > 3000
    different = []
    for reference in references:
        for spelling in (
            rf"$\boxed{{{reference}}}$",
            reference.replace(r",\!", "{,}"),
            reference.replace(r",\!", r",\! "),
            rf"\( {reference} \)",
        ):
            different += [(spelling, reference)] * (compare(spelling, reference) is not Equality.EQUAL)
    assert different == []


@pytest.mark.parametrize(
    "piece",
    ["1 m ", r"1,\! 000", "f(2)+", "P(2)+", r"\alpha + ", "x:", r"5\text{ ", "AB+BC+", "five ", "x=", "p=1;", r"\$5 ", "1 234 ", "2m+"],
)
@pytest.mark.parametrize("end", ["", "!", "=5", r"\text{ m}"])
def test_repeated_pieces_are_answered_at_once(piece: str, end: str) -> None:
    """Each of these is a place where a pattern might go back over every way of dividing the text; then this would not end."""
    assert compare((piece * 500)[: 1990 - len(end)] + end, r"\frac{1}{2}\text{ cm}") is not Equality.EQUAL


def test_meanings_are_compared_as_documented() -> None:
    """The judge of the generators, at its corners."""
    from tests.unit.grading.answer_generators import Choice, Collection, Quantity, Text, are_equal

    half, bare = Quantity(Fraction(50), "%"), Quantity(Fraction(1, 2))
    assert are_equal(half, bare)
    assert not are_equal(half, Quantity(Fraction(50), "m"))
    assert not are_equal(Quantity(Fraction(5), "!K"), Quantity(Fraction(5)))
    assert are_equal(Choice("C", bare), Text("C"))
    assert not are_equal(Choice("C", bare), Choice("D", bare))
    pair: tuple[Any, ...] = (Quantity(Fraction(1)), Quantity(Fraction(2)))
    assert are_equal(Collection("list", pair), Collection("set", pair[::-1]))
    assert not are_equal(Collection("tuple", pair), Collection("tuple", pair[::-1]))
