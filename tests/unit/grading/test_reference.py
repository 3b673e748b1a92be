"""The paper's grader: its rules one by one, the stored verdicts, and that no answer is executed."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1z.grading.answers import extract_answer_tag, extract_answer_tag_lenient, extract_boxed_answer, extract_think_then_boxed
from megatron_r1z.grading.equality import Equality
from megatron_r1z.grading.reference import compare_fast, compare_math_verify, warm_up
from megatron_r1z.grading.reference_algebra import FUNCTIONS, is_difference_zero, is_equal_by_math_verify, is_harmless, is_repetitive
from megatron_r1z.grading.reference_text import (
    is_integer,
    is_integer_fraction,
    join_thousands,
    normalise_expression,
    normalise_string,
    split_elements,
)

DATA = Path(__file__).parents[3].parent / "shared" / "data"
MODES = {"fast": compare_fast, "math_verify": compare_math_verify}
EXTRACTORS = {
    "boxed": extract_boxed_answer,
    "answer_tag": extract_answer_tag,
    "answer_tag_lenient": extract_answer_tag_lenient,
    "think_then_boxed": extract_think_then_boxed,
}

# (text, its normal form), in the order of the rules
STRING_FORMS = [
    (" 5 ", "5"),
    (r"\text{ Yes }", "Yes"),
    ("1\n2", "12"),
    (r"1\!2", "12"),
    (r"\\pi", r"\pi"),
    (r"\begin{array}{lr}1\end{array}", r"\begin{pmatrix}1\end{pmatrix}"),
    (r"\begin{bmatrix}1\end{bmatrix}", r"\begin{pmatrix}1\end{pmatrix}"),
    (r"\tfrac{1}{2}", r"\frac{1}{2}"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"x\neq y\leq z\geq 1", r"x\ney\lez\ge1"),
    (r"\left(1,2\right]", "(1,2]"),
    (r"5\text{ nm}", "5"),
    (r"1\text{ and }2", "1"),
    (r"\text{cm}", "cm"),
    ("5 cm", "5"),
    ("5 gallons", "5"),
    ("3 monkeys", "3"),
    ("2 a", "2"),
    ("a + b", "b"),
    ("at", "at"),
    ("cm", "cm"),
    ("h cm", ""),
    (r"\frac12 a + b", r"\frac{1}{2}b"),
    (r"120^{\circ}", "120"),
    (r"120^\circ", "120"),
    (r"\$5", "5"),
    (r"5\text{ x }6", "5"),
    (r" 1\text{ x }2\text{ y }3", r"1\text{ x }2\text{ y }3"),
    (r"5\%", "5"),
    (".25", "0.25"),
    ("x+ .25", "x+0.25"),
    ("x+{.25}", "x+{0.25}"),
    ("x=5", "5"),
    ("xy=5", "5"),
    ("xyz=5", "xyz=5"),
    ("x=y=5", "x=y=5"),
    (r"2\sqrt3", r"2\sqrt{3}"),
    (r"2\sqrt 3", r"2\sqrt{}3"),
    (r"2 + \sqrt", r"2 + \sqrt"),
    ("x + y", "x+y"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\frac1{2}", r"\frac{1}{2}"),
    (r"\frac{1}2", r"\frac{1}2"),
    (r"\frac12\frac3", r"\frac12\frac3"),
    (r"1 + \frac", r"1 + \frac"),
    ("0.5", r"\frac{1}{2}"),
    (".5", r"\frac{1}{2}"),
    ("0.50", "0.50"),
    ("3/4", r"\frac{3}{4}"),
    ("-3/4", r"\frac{-3}{4}"),
    ("03/4", "03/4"),
    ("x/4", "x/4"),
    ("1/2/3", "1/2/3"),
    ("", ""),
]
EXPRESSION_FORMS = [
    (r"\text{Yes}", "yes"),
    (r"50\%", "50"),
    (r"\$5$", "5"),
    ("1 or 2 and 3", "1,2,3"),
    ("3 million", "3*10^6"),
    ("2.5 billion", "2.5*10^9"),
    ("1 trillion", "1*10^12"),
    ("5 cm^2", "5"),
    ("10 minutes", "10"),
    ("2 inches", "2"),
    ("monday", "mon"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90^∘"),
    ("{x+1}", "x+1"),
    (r"1,\! 000", "1000"),
    ("5.0", "5"),
    ("5.00000001", "5"),
    ("1.6e-19", "0"),
    ("inf", "inf"),
    (r"\frac{1}{2}", "1/2"),
    (r"\tfrac{x+1}{2}", "x+1/2"),
    (r"\frac{1}{x+1}", "1/x+1"),
    (r"2\frac{1}{2}", "2+1/2"),
    ("7 3/4", "7+3/4"),
    ("- 3", "-3"),
    (r"\sqrt{2}", "sqrt(2)"),
    (r"\sqrt[3]{2}", "sqrt(2)"),
    (r"2\pi", "2pi"),
    (r"\infty", "inf"),
    (r"A \cup B", "aub"),
    (r"2 \cdot 3 \times 4", "2*3*4"),
    (r"\binom{4}{2}", "42"),
    (r"0.\overline{3}", "0.3"),
    ("x y", "xy"),
    ("2^{n}", "2^n"),
    ("ABC", "abc"),
    ("1,000", "1000"),
    ("1,000,000", "1000000"),
    ("9.6\n", "9.6\n"),
    ("9\n", "9"),
    ("", ""),
]
# (answer, reference, verdict of the fast mode, verdict of the math_verify mode)
VERDICTS = [
    # string layer
    (r"\frac12", r"\frac{1}{2}", True, True),
    ("0.5", r"\frac{1}{2}", True, True),
    (r"9.6\text{ nm}", "9.6\n", True, True),
    ("2 a", "2", True, True),
    ("a + b", "c + b", True, True),
    (r"5:30\text{ a.m.}", r"5:30\text{ p.m.}", True, True),
    # reference in a box
    ("5", r"\boxed{5}", True, True),
    ("5", r"thus \boxed{4}, no, \boxed{5}.", True, True),
    ("5", r"\boxed 5", False, False),
    ("5", r"\boxed{5", False, False),
    ("", r"\boxed{}", True, True),
    # sympy layer: text, empty answers, elements
    ("(1, 2)", r"\left( 1,2 \right)", True, True),
    ("", "5", False, False),
    ("5", "", False, False),
    ("", "", True, True),
    ("(x+x,2]", "(2x,2]", True, True),
    ("(1,2)", "(1,2]", False, False),
    ("(1,2,3)", "(1,2)", False, False),
    ("(2,1)", "(1,2)", False, False),
    ("1,234", "1234", True, True),
    # sympy layer: fractions and integers are strict
    (r"\frac{2}{4}", r"\frac{1}{2}", False, True),
    (r"\frac{10}{2}", "5", False, True),
    ("2^3", "8", False, True),
    ("96/10", "9.6\n", True, True),
    ("5.0", "5", True, True),
    # sympy layer: algebra
    ("0.25", r"\frac{1}{4}", True, True),
    (r"\frac{x+1}{2}", r"x+\frac{1}{2}", True, True),
    ("x+2y", "2y+x", True, True),
    ("x+y+z", "z+y+x", False, True),
    (r"\sqrt{8}", r"2\sqrt{2}", True, True),
    (r"2^{10}x", "1024x", False, True),
    (r"3\frac{1}{2}", "3.5", True, True),
    (r"-3\frac{1}{2}", r"-\frac{5}{2}", True, True),
    (r"\frac{1}{x+1}", r"\frac{1}{x}+1", True, True),
    ("1.6e-19", "2.3e-25", True, True),
    ("x!", "x*(x-1)!", True, True),
    ("0.1[6]+x", "x+1/6", True, True),
    ("1/0", "2", False, False),
    ("0.333", r"\frac{1}{3}", False, False),
    # Math-Verify
    ("0.33333333", r"\frac{1}{3}", False, True),
    ("2x+y=3", "y=3-2x", False, True),
    (r"\{2,1\}", r"\{1,2\}", False, True),
    (r"3\times10^{8}", "300000000", False, True),
    ("101_2", "101", False, True),
    ("xy = 1", "1", False, True),
    ("0.0000001", "0.0000002", False, True),
    ("x=142", "142.0", False, True),
    ("The answer is 5", "5", False, True),
    ("1", "\\frac{1}{LCs^2 + RCs + 1}\n", False, True),
    ("10", "4.46 \\times 10^{19}\n", False, True),
    ("7.5e7", r"7.5 \times 10^7", False, False),
    (r"\ln 2", r"\log 2", False, False),
    ("five", "5", False, False),
    ("½", r"\frac12", False, False),
]


@pytest.mark.parametrize(("raw", "form"), STRING_FORMS)
def test_normal_form_of_the_string_layer(raw: str, form: str) -> None:
    assert normalise_string(raw) == form


@pytest.mark.parametrize(("raw", "form"), EXPRESSION_FORMS)
def test_normal_form_of_the_sympy_layer(raw: str, form: str) -> None:
    assert normalise_expression(raw) == form


@pytest.mark.parametrize(("answer", "reference", "fast", "math_verify"), VERDICTS)
def test_verdicts(answer: str, reference: str, fast: bool, math_verify: bool) -> None:
    assert compare_fast(answer, reference) is (Equality.EQUAL if fast else Equality.DIFFERENT)
    assert compare_math_verify(answer, reference) is (Equality.EQUAL if math_verify else Equality.DIFFERENT)


def test_thousands_are_joined_as_far_as_the_original_gets() -> None:
    assert [join_thousands(text) for text in ("1,000", "1,000,000", "1,234,567,890", "1,2345", "12,3", "(1,234,5)")] == [
        "1000",
        "1000000",
        "1234,567890",
        "1,2345",
        "12,3",
        "(1234,5)",
    ]


def test_elements() -> None:
    assert split_elements("(1, 2]") == ["1", "2"]
    assert split_elements("[1,234,x)") == ["1234", "x"]
    assert split_elements("((1,2),3)") == ["((1,2),3)"]
    assert split_elements("1,2") == ["1,2"]
    assert split_elements("()") == ["()"]
    assert split_elements("") == []


def test_integers_and_fractions() -> None:
    assert [text for text in ("5", "5.0", "-1,000", "1e3", "5.00000001", "5.1", "x", "inf", "nan", "") if not is_integer(text)] == [
        "5.1",
        "x",
        "inf",
        "nan",
        "",
    ]
    assert [text for text in ("1/2", "-10/4", "1)/2", "1/0", "x/2", "1/2/3", "1/02x") if is_integer_fraction(text)] == [
        "1/2",
        "-10/4",
        "1)/2",
        "1/02x",
    ]


@pytest.mark.parametrize(
    ("reference", "answer"), [("x+y+z", "z+y+x"), ("2^10x", "1024*x"), ("x^(2)", "x*x"), ("2^3^1", "8"), ("cos(0)", "1.0")]
)
def test_what_the_original_does_not_attempt_is_not_equal(reference: str, answer: str) -> None:
    assert not is_difference_zero(reference, answer)


@settings(max_examples=30, deadline=None)
@given(
    st.text(alphabet="012", min_size=129, max_size=160)
    | st.builds(lambda unit: unit * 130, st.text(alphabet="01,", min_size=1, max_size=3))
)
def test_repetition_is_the_share_of_substrings_that_occurred_before(text: str) -> None:
    num_all = len(text) * (len(text) + 1) // 2
    num_different = len({text[start:end] for start in range(len(text)) for end in range(start + 1, len(text) + 1)})
    assert is_repetitive(text) == ((num_all - num_different) / num_all > 0.2)


def test_short_texts_are_never_repetitive_and_repetition_is_never_equal_by_math_verify() -> None:
    assert not is_repetitive("1" * 128)
    assert is_repetitive("1" * 129)
    assert is_equal_by_math_verify("1" * 100, "1" * 100)
    assert not is_equal_by_math_verify("1" * 129, "1" * 129)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=r"\frac{}()[]12x,.^_=<+-*/ $%!'" + "\n\N{DEGREE SIGN}", max_size=24))
def test_any_text_equals_itself_and_no_text_raises(raw: str) -> None:
    assert compare_fast(raw, raw) is Equality.EQUAL or r"\boxed" in raw
    assert compare_fast(raw, r"x+\frac{1}{2}") in (Equality.EQUAL, Equality.DIFFERENT)


@pytest.mark.parametrize("compare", MODES.values())
def test_nothing_in_an_answer_is_executed(tmp_path: Path, compare: Callable[[str, str], Equality]) -> None:
    witness = tmp_path / "x"
    call = f"__import__('os').system('touch {witness}')"
    octal = "".join(f"\\{ord(character):03o}" for character in call)
    flattened_to_octal = "".join(rf"\textbackslash{{}}{ord(character):03o}" for character in call)
    for hostile in (
        call,
        f'sqrt("{octal}")',
        f'sqrt("{octal}")*x',
        f'frac("{octal}")',
        f'frac("{flattened_to_octal}")',  # runs in the original, from a box to the shell
        rf"\text{{{call}}}",
        rf"\sqrt{{{call}}}",
        f'exec("{call}")',
        f'eval("{octal}")',
        f"open('{witness}', 'w')",
        f"(lambda: {call})()",
        "lambda: 1",
        f"x.__class__.__init__.__globals__['sys'].modules['os'].system('touch {witness}')",
        "().__class__.__base__.__subclasses__()",
        f'"".join("{octal}")',
        f"[{call} for x in (1,)]",
    ):
        for reference in ("5", "x", "(x,5)", "[touch]"):
            assert compare(hostile, reference) is Equality.DIFFERENT
        assert compare("x", hostile) is Equality.DIFFERENT
        assert not is_difference_zero(hostile, "x")
        assert not is_harmless(hostile)
    assert not witness.exists()


@pytest.mark.parametrize(
    "source",
    [
        *("x.n", "x.n()", "(1).x", "1..x", "x .n", "x\n.n"),
        *("x[0]", "[x]", "[x][0]", "{x}", "{1:x}", "x[0.1[6]]", "0.1[6].n"),
        *("'x'", '"x"', "''", "'x", "b'x'", "f'x'", "'''x'''", r"'\170'"),
        *("lambda: 1", "x if x else x", "f(x=1)", "(x:=1)", "x;x", "x@x", "...", "as", "if"),
        *("__", "__x__", "x__x", "id", "all", "exec", "print", "None"),
        *("(", "x)'(", "\\", "#", "`x`", "$", "?"),
    ],
)
def test_the_guard_refuses(source: str) -> None:
    assert not is_harmless(source)


@pytest.mark.parametrize(
    "source", ["(2x)-(x+x)", "sqrt(2)/2", "x!", "0.1[6]", ".[3]!", "5.x", "1e3", "x_1", "θ", "(9.6\n)-(9.6)", "1 or 2", "ff(x,2)", "(1,2)"]
)
def test_the_guard_passes(source: str) -> None:
    assert is_harmless(source)


def test_the_functions_in_reach_are_those_the_original_could_be_made_to_call() -> None:
    names: dict[str, object] = {}
    exec("from sympy import *", names)  # what `parse_expr` does
    names |= {name: value for name, value in vars(builtins).items() if isinstance(value, types.BuiltinFunctionType)}
    callable_by_answers = {
        name for name in names if name == name.lower() and len({*filter(str.isalpha, name.replace("sqrt", "").replace("frac", ""))}) <= 2
    }
    assert callable_by_answers - FUNCTIONS == {"id", "all"}
    assert FUNCTIONS - callable_by_answers == set()


def test_importing_the_modules_loads_no_heavy_library() -> None:
    code = (
        "import sys, megatron_r1z.grading.reference\n"
        "assert not {'sympy', 'math_verify', 'latex2sympy2_extended', 'pylatexenc', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_warm_up_can_be_repeated() -> None:
    warm_up()
    warm_up()


@pytest.mark.parametrize("mode", MODES)
def test_every_stored_verdict_is_reproduced(mode: str) -> None:
    rows = _stored_rows("grader/cases.jsonl")
    assert len(rows) == 184
    assert [row for row in rows if (MODES[mode](row["answer"], row["reference"]) is Equality.EQUAL) != row[mode]] == []


def test_every_stored_reward_is_reproduced() -> None:
    rows = [row for row in _stored_rows("grader/reward_cases.jsonl") if "raises" not in row]
    assert len(rows) == 54
    for row in rows:
        found = EXTRACTORS[row["fn"]](row["response"])
        references = row["reference"] if isinstance(row["reference"], list) else [row["reference"]]
        rewards = [
            float(any(found.answer is not None and compare(found.answer, str(reference)) is Equality.EQUAL for reference in references))
            for compare in MODES.values()
        ]
        assert (found.formatted, *rewards) == (row["formatted"], row["reward"], row["reward_math_verify"]), row


@pytest.mark.parametrize("mode", MODES)
def test_every_reference_is_right_against_itself(mode: str) -> None:
    references = _stored_references("eval", 1) + _stored_references("train", 20)
    assert len(references) > 2500
    assert [reference for reference in references if MODES[mode](reference, reference) is not Equality.EQUAL] == []


def test_a_constant_answer_scores_on_minerva_what_the_recipe_reports() -> None:
    rows = _stored_rows("eval/minerva.jsonl")
    scores = {
        mode: sum(any(compare("10", reference) is Equality.EQUAL for reference in row["answers"]) for row in rows)
        for mode, compare in MODES.items()
    }
    assert scores == {"fast": 2, "math_verify": 36}


def _stored_references(folder: str, every: int) -> list[str]:
    if not (DATA / folder).is_dir():
        pytest.skip(f"shared/data/{folder} is not beside this checkout")
    rows = [row for path in sorted((DATA / folder).glob("*.jsonl")) for row in _stored_rows(f"{folder}/{path.name}")]
    return [reference for row in rows[::every] for reference in row.get("answers") or [row["answer"]]]


def _stored_rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"shared/data/{name} is not beside this checkout")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
