"""Equality: what must be accepted, what must not, and how far it agrees with the stored cases of the reference grader."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1z.grading import expression, names, numbers, parts, symbolic, text, units
from megatron_r1z.grading.equality import MAX_LENGTH, Equality, compare, is_equal, settle

DATA = Path(__file__).parents[3].parent / "shared" / "data"

EQUAL = [
    (r"\tfrac12", r"\frac{1}{2}"),
    (r"\frac{10}{2}", "5"),
    ("0.33333333", r"\frac{1}{3}"),
    (r"0.\overline{3}", r"\frac13"),
    (r"-3\frac{1}{2}", r"-\frac{7}{2}"),
    ("3 1/2", "3.5"),
    (r"1,\!000", "1000"),
    ("1,000.50", "1000.5"),
    ("12,345,678", "12345678"),
    ("033", "33"),
    (r"50\%", "50"),
    ("0.5", r"50\%"),
    (r"\$18.90", "18.9"),
    ("5 cm", "5"),
    ("5 cm", r"5\text{ centimeters}"),
    (r"5\text{cm}^2", "5"),
    (r"120\text{ degrees}", r"120^\circ"),
    ("4.46e19", "4.46 \\times 10^{19}\n"),
    ("3\N{MULTIPLICATION SIGN}10^8", r"300000000"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("6,5,4", "4, 5, 6"),
    (r"2 \pm \sqrt{3}", r"2-\sqrt{3}, 2+\sqrt{3}"),
    (r"(3,\infty) \cup (-\infty,3)", r"(-\infty, 3)\cup(3, \infty)"),
    ("[2,5]", r"2 \le x \le 5"),
    ("x=1 or x=2", "1,2"),
    ("y = 2x+3", "y=3+2x"),
    ("2x+y=3", "y=3-2x"),
    ("x<2", "2>x"),
    ("sqrt(2)/2", r"\frac{1}{\sqrt2}"),
    ("2*pi", r"2\pi"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"2^{n+1}", r"2\cdot2^n"),
    (r"\frac{x+1}{2}", "(1+x)/2"),
    (r"\begin{bmatrix} 0.5 \\ 1 \end{bmatrix}", r"\begin{pmatrix}1/2\\1\end{pmatrix}"),
    (r"\text{Yes}", "yes"),
    (r"\text{(A)}", "A"),
    (r"\boxed{6}", "6"),
    ("1+2i", "2i+1"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    (r"\frac{1}{\sqrt[3]{4}}", r"\frac{\sqrt[3]{2}}{2}"),
    (r"\cos\frac{\pi}{5}", r"\frac{1+\sqrt5}{4}"),
    ("0.707107", r"\frac{\sqrt2}{2}"),
    ("2^{10}-1", "1023"),
    (r"\arctan 1", r"\frac{\pi}{4}"),
]
DIFFERENT = [
    ("0.333", r"\frac13"),
    (r"0.\overline{3}", "0.3"),
    (r"\frac{x+1}{2}", r"x+\frac12"),
    ("3 1/2", "31/2"),
    ("10", "10.0000001"),
    ("0.0000001", "0.0000002"),
    ("1.6e-19", "2.3e-25"),
    (r"1.6\times 10^{-19}", r"2.3 \cdot 10^{-25}"),
    (r"\sqrt{2}\times10^{-20}", r"\sqrt{3}\times10^{-20}"),
    ("0", "3.89e-10"),
    ("5 cm", "5 m"),
    ("5 cm", "6 cm"),
    (r"3\text{ in}", r"3\text{ ft}"),
    (r"5:30\text{ a.m.}", r"5:30\text{ p.m.}"),
    (r"5\text{ million}", "5"),
    ("2 a", "2"),
    ("3t", "3"),
    ("a + b", "c + b"),
    (r"1\text{ and }2", "1"),
    ("1,2,3", "1,2"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(0,1]", "(0,1)"),
    ("xy = 1", "1"),
    ("x=5", "y=5"),
    ("x^2", "X^2"),
    ("listen", "silent"),
    (r"\text{Monday}", r"\text{mon}"),
    (r"\sqrt[3]{2}", r"\sqrt{2}"),
    (r"\binom{4}{2}", "42"),
    ("3.14159", r"\pi"),
    ("|x|", "x"),
    ("1", "\\frac{1}{LCs^2 + RCs + 1}\n"),
    ("-1", "1"),
    ("1/0", "2"),
    (r"2^{1009}", r"2^{1009}-1"),
    (r"2^{100}+\sqrt{2}", r"2^{100}+1+\sqrt{2}"),
    ("10^{20}+1", "10^{20}"),
    (r"2^{100}x", r"(2^{100}+1)x"),
    (r"\infty", r"-\infty"),
    ("", "5"),
    (r"(-3)^2", "-9"),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_equal(answer: str, reference: str) -> None:
    assert is_equal(answer, reference)
    assert is_equal(reference, answer)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different(answer: str, reference: str) -> None:
    assert not is_equal(answer, reference)
    assert not is_equal(reference, answer)


@pytest.mark.parametrize("answer", ["((", r"\frac{", "__import__('os')", "f'(x)", "5%#", "(99^9)!", "9^{9^{9^9}}"])
def test_what_cannot_be_read_is_unparsable(answer: str) -> None:
    assert compare(answer, r"\sqrt{2}+x") is Equality.UNPARSABLE


@pytest.mark.parametrize("answer", ["(99^9)!", r"\Gamma(10^9)", r"9^{9^{9^9}}"])
def test_huge_numbers_reach_neither_sympy_nor_a_wrong_verdict(answer: str) -> None:
    for reference in ("5", r"\sqrt{2}+x", r"\sum_{k=1}^n k", r"\lim_{x\to 0}\frac{\sin x}{x}"):
        assert compare(answer, reference) is Equality.UNPARSABLE
        assert compare(reference, answer) is not Equality.EQUAL


def test_bases_are_part_of_a_number() -> None:
    assert is_equal("2516_8", "2516_{8}")
    assert not is_equal("2516_8", "2516")
    assert not is_equal("101", "101_2")


def test_settling_needs_no_algebra() -> None:
    assert settle(" 5 ", "5.0") is Equality.EQUAL
    assert settle("5", "6") is Equality.DIFFERENT
    assert settle("x", " x\n") is Equality.EQUAL
    assert settle("", "x") is Equality.DIFFERENT
    assert settle("x" * (MAX_LENGTH + 1), "x") is Equality.UNPARSABLE
    assert settle("1/2", "0.5") is None


def test_numbers_are_compared_without_sympy_and_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from megatron_r1z.grading import answers, equality, grader, pool, symbolic, text;"
        "assert equality.is_equal('0.5', '1/2') and equality.is_equal('7.5e7', '75000000') and not equality.is_equal('5 cm', '5 mm');"
        "assert not {'sympy', 'math_verify', 'numpy', 'torch', 'vllm', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_a_fraction_is_read_in_every_spelling(top: int, bottom: int) -> None:
    for spelling in (rf"\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", f"{top}/{bottom}\\%"):
        number = numbers.parse_number(text.normalise(spelling))
        assert number is not None
        assert number.value == Fraction(top, bottom) / (100 if number.percent else 1)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**12), max_value=10**12))
def test_thousands_separators_do_not_change_a_number(value: Fraction) -> None:
    assert is_equal(f"{value:,}", f"{value}")


@given(
    st.decimals(-1000, 1000, places=3), st.decimals(-1000, 1000, places=3), st.sampled_from(["", " cm", r"\%", r"^\circ", r"\text{ kg}"])
)
def test_numbers_that_differ_are_different_whatever_their_unit(left: Fraction, right: Fraction, unit: str) -> None:
    assert is_equal(f"{left}{unit}", f"{right}{unit}") == (left == right)


@settings(max_examples=60)
@given(st.text(alphabet=r"\frac{}()[]12x,.^_=<+-*/ $%!\N{DEGREE SIGN}", max_size=24))
def test_normal_form_is_stable_and_any_text_equals_itself(raw: str) -> None:
    normal = text.normalise(raw)
    assert text.normalise(raw) == normal
    assert compare(raw, raw) is Equality.EQUAL
    parts.split_parts(normal), units.split_unit(normal), names.split_name(normal), numbers.parse_number(normal), expression.parse(normal)


def test_nothing_in_an_answer_is_executed(tmp_path: Path) -> None:
    witness = tmp_path / "x"
    for hostile in (
        f"__import__('os').system('touch {witness}')",
        rf"\text{{__import__('os').system('touch {witness}')}}",
        f"x + open('{witness}', 'w').write('1')",
        f"(lambda: __import__('pathlib').Path('{witness}').touch())()",
        f"Symbol('x').__class__.__init__.__globals__['sys'].modules['os'].system('touch {witness}')",
    ):
        assert not is_equal(hostile, "5")
        assert not is_equal("x+1", hostile)
        symbolic.parse_latex(hostile)
    assert not witness.exists()


def test_agreement_with_the_stored_cases() -> None:
    """Our own judgement of the rows is the truth where there is one, else right is what either mode of the reference accepts."""
    rows = _stored_rows("grader/cases.jsonl")
    accepted_wrong: list[str] = []
    rejected_right: list[str] = []
    for row in rows:
        truth = {"accepts wrong": False, "rejects right": True}.get(row["misgrade"], row["fast"] or row["math_verify"])
        if is_equal(row["answer"], row["reference"]) != truth:
            (rejected_right if truth else accepted_wrong).append(row["answer"])
    assert len(rows) == 184
    assert accepted_wrong == []
    assert rejected_right == []


def test_every_evaluation_reference_equals_itself_in_a_box_and_with_a_full_stop() -> None:
    names = ("aime", "amc", "math", "minerva", "olympiad_bench")
    rows = [row for name in names for row in _stored_rows(f"eval/{name}.jsonl")]
    references = {reference for row in rows for reference in row.get("answers") or [row["answer"]]}
    assert len(references) > 900
    assert [reference for reference in references if not is_equal(rf"$\boxed{{{reference}}}$", f" {reference}.")] == []


def _stored_rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"shared/data/{name} is not beside this checkout")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
