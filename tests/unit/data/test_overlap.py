"""Questions that are the same, nearly the same, and only alike."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron_r1z.config import QuestionSource
from megatron_r1z.data.overlap import MIN_SHARE, NUM_WORDS, find_overlaps, normalise, split_words
from megatron_r1z.data.questions import Question, load_questions

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the question sets are not at {SHARED}")

TEXT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did she sell altogether?"
)


def questions(*texts: str, name: str = "train", answers: tuple[str, ...] = ("1",)) -> list[Question]:
    return [Question(f"{name}/{index}", text, answers, name) for index, text in enumerate(texts)]


def find(train: str, evaluation: str, **answers: tuple[str, ...]) -> list[tuple[str, float]]:
    """Kind and share of what a question of the answer "1" is to another one of the same answer or of `answers`."""
    found = find_overlaps(questions(train), questions(evaluation, name="test", **answers))
    return [(overlap.kind, overlap.share) for overlap in found]


class TestNormalisation:
    @pytest.mark.parametrize(
        "other",
        [
            "What is $x+1$ if $x = 1,000$?",
            "what is  x + 1\nif x=1000",
            r"What is \( x+1 \), if $x \, = \, 1{,}000$ ?",
            r"\text{What is }$\left. x+1 \right.$ if $x\quad =\;1000$.",
            "“What is x+1 if x=1000?”",
            r"What is $x+1$ if $x=1,\!000^{}_{}$?",
        ],
    )
    def test_looks_do_not_count(self, other: str) -> None:
        assert normalise(other) == "what is x + 1 if x = 1000"

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("x + 1", "x - 1"),
            ("1.5", "15"),
            (".5", "5"),
            (r"\frac{1}{23}", r"\frac{12}{3}"),
            ("(a+b)c", "a+(b)c"),
            ("x_1", "x^1"),
            (r"\sin x", r"\cos x"),
            (r"\leftarrow", r"\rightarrow"),
            ("12 3", "1 23"),
            ("?", "!"),
        ],
    )
    def test_what_is_asked_does(self, one: str, other: str) -> None:
        assert normalise(one) != normalise(other)

    def test_fractions_of_any_size_are_the_same(self) -> None:
        assert normalise(r"$\dfrac{1}{2}$") == normalise(r"\frac{1}{2}") == normalise(r"\tfrac 1 2")

    def test_words(self) -> None:
        assert split_words("Ann's 2 caf\u00e9s: $3.50 \\cdot 2 = 7$.") == ["ann", "s", "2", "caf\u00e9s", "3.50", "cdot", "2", "=", "7"]


class TestOverlap:
    def test_the_same_question(self) -> None:
        assert find(TEXT, TEXT.upper().replace(" ", "  ")) == [("exact", 1.0)]

    def test_a_word_changed(self) -> None:
        ((kind, share),) = find(TEXT, TEXT.replace("altogether", "in April and May"))
        assert kind == "near"
        assert MIN_SHARE <= share < 1

    def test_the_share_is_of_the_longer_question(self) -> None:
        words = TEXT.split()
        ((_, share),) = find(" ".join(words[:20]), TEXT)
        assert share == (20 - NUM_WORDS + 1) / (len(words) - NUM_WORDS + 1)
        assert find(" ".join(words[:10]), TEXT) == find(TEXT, " ".join(words[:10])) == []

    @pytest.mark.parametrize("other", [TEXT.replace("48", "84"), TEXT.replace("48 of her", "her"), TEXT + " There are 2 months."])
    def test_other_numbers_make_another_question(self, other: str) -> None:
        assert find(TEXT, other) == []

    def test_another_answer_makes_another_question(self) -> None:
        other = TEXT.replace("altogether", "in April and May")
        assert find(TEXT, other, answers=("2", "3")) == []
        assert [kind for kind, _ in find(TEXT, other, answers=("2", " $1$ "))] == ["near"]
        assert find(TEXT, TEXT, answers=("2",)) == [("exact", 1.0)]

    def test_a_template_with_its_numbers_exchanged(self) -> None:
        text = "Tom has {} red marbles and buys {} more red marbles at the shop next to his school. How many red marbles has Tom now?"
        assert find(text.format(3, 5), text.format(5, 3)) == []

    def test_short_questions_are_compared_as_a_whole(self) -> None:
        assert find("Find x.", "find X") == [("exact", 1.0)]
        assert find("Find x.", "Find y.") == []
        assert find("", "?") == []

    def test_every_pair_is_named(self) -> None:
        found = find_overlaps(questions("a", TEXT, TEXT), questions("b", TEXT, name="test"))
        assert [(overlap.train_id, overlap.evaluation_id) for overlap in found] == [("train/1", "test/1"), ("train/2", "test/1")]
        assert find_overlaps([], questions(TEXT)) == find_overlaps(questions(TEXT), []) == []

    def test_many_questions_take_seconds(self) -> None:
        generator = Random(0)
        words = [f"word{chr(97 + number % 26)}{chr(97 + number // 26)}" for number in range(600)]
        texts = [" ".join(generator.choices(words, k=60)) for _ in range(11_000)]
        found = find_overlaps(questions(*texts[:10_000]), questions(*texts[10_000:], texts[7], name="test"))
        assert [(overlap.train_id, overlap.evaluation_id) for overlap in found] == [("train/7", "test/1000")]


@needs_shared
@pytest.mark.parametrize(
    ("train", "evaluation", "num_exact", "num_near"),
    [
        ({"path": "train/gsm_8k.jsonl", "limit": 7473}, {"path": "train/gsm_8k.jsonl", "offset": 7473}, 0, 0),
        ({"path": "train/gsm_8k.jsonl"}, {"path": "train/gsm_8k.jsonl", "offset": 7473}, 1319, 0),  # as the paper trains on it
        ({"path": "train/math_lvl3to5_8k.jsonl"}, {"path": "eval/math.jsonl"}, 0, 3),
        ({"path": "train/math_lvl3to5_8k.jsonl"}, {"path": "eval/olympiad_bench.jsonl"}, 3, 5),
        ({"path": "train/aime_975.jsonl"}, {"path": "eval/math.jsonl"}, 6, 2),
        ({"path": "train/aime_975.jsonl"}, {"path": "eval/aime.jsonl"}, 0, 0),
    ],
    ids=lambda value: value["path"] if isinstance(value, dict) else "",
)
def test_the_papers_sets(train: dict[str, Any], evaluation: dict[str, Any], num_exact: int, num_near: int) -> None:
    """The figures of docs/data.md."""
    one, other = (load_questions(QuestionSource(**fields | {"path": str(SHARED / fields["path"])})) for fields in (train, evaluation))
    found = find_overlaps(one, other)
    exact = {overlap.evaluation_id for overlap in found if overlap.kind == "exact"}
    assert len(exact) == num_exact
    assert len({overlap.evaluation_id for overlap in found} - exact) == num_near
