"""Extraction against the table of measured behaviour of the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.grading.answers import (
    UNFORMATTED,
    Extraction,
    extract_answer_tag,
    extract_answer_tag_lenient,
    extract_boxed,
    extract_boxed_answer,
    extract_think_then_boxed,
)
from megatron_r1z.grading.equality import Equality
from megatron_r1z.grading.reference import compare_fast

CASES = Path(__file__).parents[3].parent / "shared" / "data" / "grader" / "reward_cases.jsonl"
EXTRACTORS = {
    "boxed": extract_boxed_answer,
    "answer_tag": extract_answer_tag,
    "answer_tag_lenient": extract_answer_tag_lenient,
    "think_then_boxed": extract_think_then_boxed,
}

# (response, reference, answer found or None where unformatted, reward of the reference implementation's fast mode)
BOXED = [
    (r"The answer is \boxed{5}.", "5", "5", 1),
    (r"\boxed{4} then \boxed{5}", "5", "5", 1),
    (r"\boxed{5} then \boxed{4}", "5", "4", 0),
    (r"\boxed{5", "5", None, 0),
    (r"\boxed{5} and \boxed{6", "5", None, 0),
    (r"\boxed 5", "5", None, 0),
    (r"\boxed {5}", "5", None, 0),
    (r"\fbox{5}", "5", None, 0),
    (r"\boxed{\frac{1}{2}}", "0.5", r"\frac{1}{2}", 1),
    (r"\boxed{\boxed{5}}", "5", "5", 1),
    (r"\boxed{}", "5", "", 0),
    (r"\boxed{}", "", "", 1),
    ("5", "5", None, 0),
    ("", "5", None, 0),
    (r"\boxed{5}", "5", "5", 1),
    (r"\boxed{5}", "5.0", "5", 1),
    (r"\boxed{{5}}", "5", "{5}", 1),
    (r"\boxed{\{1,2\}}", r"\{1,2\}", r"\{1,2\}", 1),
    (r"\boxed{5\}}", "5", "5\\", 1),
    (r"\boxed{\text{A}}", "A", r"\text{A}", 1),
    (r"\boxed{5}", r"\boxed{5}", "5", 1),
    (r"\boxed{5}", r"\boxed 5", "5", 0),
    (r"\boxed{5}", "", "5", 0),
]
ANSWER_TAG = [
    ("r</think> <answer>5</answer>", "5", "5", 1),
    ("r</think> <answer> 5 </answer>", "5", " 5 ", 1),
    ("r </think> <answer> 5\n</answer>", "5", " 5\n", 1),
    ("r</think><answer>5</answer>", "5", None, 0),
    ("r</think>\n<answer>5</answer>", "5", None, 0),
    ("r</think>  <answer>5</answer>", "5", None, 0),
    ("r</think> <answer>5", "5", None, 0),
    ("<answer>5</answer>", "5", None, 0),
    (r"r</think> <answer>\boxed{5}</answer>", "5", "5", 1),
    (r"r</think> <answer>The answer is \boxed{5}.</answer>", "5", "5", 1),
    ("r</think> <answer>The answer is 5</answer>", "5", "The answer is 5", 0),
    (r"r</think> <answer>$5$</answer>", "5", "$5$", 1),
    ("r</think> <answer>5.</answer>", "5", "5.", 1),
    ("r</think> <answer>x = 5</answer>", "5", "x = 5", 1),
    ("r</think> <answer>**5**</answer>", "5", "**5**", 0),
    ("r</think> <answer>5</answer> junk", "5", "5 junk", 0),
    ("r</think> <answer>4</answer> x</think> <answer>5</answer>", "5", "5", 1),
    ("r</think> <answer>5</answer><answer>6</answer>", "5", "6", 0),
    ("</answer> r</think> <answer>5", "5", "5", 1),
    ("r</think> <answer></answer>", "5", "", 0),
    ("r</think> <answer></answer>", "", "", 1),
    ("r</think> <answer>5</answer>", "5.0", "5", 1),
]
# A response and what is found in it.
LENIENT = [
    ("r</think><answer>5</answer>", Extraction(formatted=True, answer="5")),
    ("<answer>5</answer>", Extraction(formatted=True, answer="5")),
    (r"<answer>\boxed{5}</answer>", Extraction(formatted=True, answer="5")),
    (r"<answer>\boxed{5</answer>", Extraction(formatted=True, answer=None)),
    ("</answer><answer>4<answer>5", Extraction(formatted=True, answer="5")),
    ("<answer>5", UNFORMATTED),
    ("5</answer>", UNFORMATTED),
    ("", UNFORMATTED),
]
THINK_THEN_BOXED = [
    (r"x</think> \boxed{5}", Extraction(formatted=True, answer="5")),
    (r"\boxed{4}</think> \boxed{5}", Extraction(formatted=True, answer="5")),
    (r"</think>\boxed{5} or \boxed{6}", Extraction(formatted=True, answer="6")),
    (r"\boxed{5}", UNFORMATTED),
    (r"\boxed{5}</think>", UNFORMATTED),
    (r"x</think> y</think> \boxed{5}", UNFORMATTED),
    (r"x</think> \boxed{5", UNFORMATTED),
    ("x</think> 5", UNFORMATTED),
    ("", UNFORMATTED),
]


@pytest.mark.parametrize(("response", "reference", "answer", "reward"), BOXED)
def test_boxed_table(response: str, reference: str, answer: str | None, reward: int) -> None:
    assert extract_boxed(response) == answer
    assert extract_boxed_answer(response) == Extraction(formatted=answer is not None, answer=answer)
    assert (answer is not None and compare_fast(answer, reference) is Equality.EQUAL) == reward


@pytest.mark.parametrize(("response", "reference", "answer", "reward"), ANSWER_TAG)
def test_answer_tag_table(response: str, reference: str, answer: str | None, reward: int) -> None:
    assert extract_answer_tag(response) == Extraction(formatted=answer is not None, answer=answer)
    assert (answer is not None and compare_fast(answer, reference) is Equality.EQUAL) == reward


@pytest.mark.parametrize(("response", "found"), LENIENT)
def test_lenient_answer_tag_table(response: str, found: Extraction) -> None:
    assert extract_answer_tag_lenient(response) == found


@pytest.mark.parametrize(("response", "found"), THINK_THEN_BOXED)
def test_think_then_boxed_table(response: str, found: Extraction) -> None:
    assert extract_think_then_boxed(response) == found


@pytest.mark.parametrize("response", [row[0] for row in ANSWER_TAG])
def test_what_the_strict_tag_finds_the_lenient_one_finds_too(response: str) -> None:
    assert extract_answer_tag(response) in (UNFORMATTED, extract_answer_tag_lenient(response))


def test_a_broken_box_inside_the_tag_is_formatted_without_an_answer() -> None:
    assert extract_answer_tag(r"r</think> <answer>\boxed{5</answer>") == Extraction(formatted=True, answer=None)


def test_the_form_of_every_stored_case_is_judged_as_by_the_reference_implementation() -> None:
    if not CASES.exists():
        pytest.skip("shared/data/grader/reward_cases.jsonl is not beside this checkout")
    rows = [row for row in map(json.loads, CASES.read_text(encoding="utf-8").splitlines()) if "raises" not in row]
    assert len(rows) == 54
    assert [row for row in rows if EXTRACTORS[row["fn"]](row["response"]).formatted != row["formatted"]] == []


@given(st.text(alphabet=r"\boxed{}5 ", max_size=40))
def test_a_box_that_is_written_is_found(content: str) -> None:
    balanced = all(content[:end].count("{") >= content[:end].count("}") for end in range(len(content) + 1))
    if balanced and content.count("{") == content.count("}") and r"\boxed" not in content:
        assert extract_boxed(rf"thus \boxed{{{content}}} ok") == content
        assert extract_boxed(rf"thus \boxed{{{content}") is None


@given(st.text(max_size=60))
def test_any_text_is_handled(text: str) -> None:
    assert extract_boxed_answer(text).formatted == (extract_boxed(text) is not None)
    if "</think>" not in text:
        assert extract_answer_tag(text) == UNFORMATTED


def test_a_megabyte_of_braces_takes_linear_time() -> None:
    assert extract_boxed(r"\boxed{" + "{" * 500_000 + "}" * 500_000 + "}") == "{" * 500_000 + "}" * 500_000
    assert extract_boxed(r"\boxed{" * 150_000) is None
