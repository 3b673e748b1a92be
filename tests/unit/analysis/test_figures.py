"""The figures, on responses made by hand."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.analysis.examine import ExaminedQuestion, Judgement
from megatron_r1z.analysis.figures import best_cell, make_effect, make_figures, make_outcomes, make_spread, share_of
from megatron_r1z.evaluation.scores import clustered_interval, interval
from tests.unit.analysis.made import make_question, make_response


def test_accuracy_pass_at_k_and_mixed_questions() -> None:
    questions = [make_question("rrww"), make_question("wwww"), make_question("rrrr"), make_question("ruuc")]
    cell = make_figures("no", 0.6, questions, (1, 2, 4))
    assert (cell.template, cell.temperature, cell.questions, cell.samples) == ("no", 0.6, 4, 4)
    assert cell.accuracy.value == pytest.approx((2 + 0 + 4 + 1) / 16)
    assert (cell.accuracy.low, cell.accuracy.high) == interval([0.5, 0.0, 1.0, 0.25], 4)
    assert cell.pass_at[1] == cell.accuracy
    assert cell.pass_at[2].value == pytest.approx((5 / 6 + 0 + 1 + 0.5) / 4)
    assert cell.pass_at[4].value == cell.best_pass.value == pytest.approx(3 / 4)
    assert (cell.pass_at[4].low, cell.pass_at[4].high) == interval([1.0, 0.0, 1.0, 1.0], 1)
    assert cell.mixed.value == pytest.approx(2 / 4)


def test_outcomes_have_shares_and_lengths() -> None:
    responses = [make_response("r", "ab", 2), make_response("r", "abcd", 4), make_response("w", "abc", 3), make_response("c", "a", 9)]
    found = make_outcomes(responses)
    assert {name: (item.count, item.share) for name, item in found.items()} == {
        "right": (2, 0.5),
        "wrong": (1, 0.25),
        "unformatted": (0, 0.0),
        "cut off": (1, 0.25),
    }
    assert (found["right"].mean_tokens, found["right"].mean_characters) == (3, 3)
    assert (found["unformatted"].mean_tokens, found["unformatted"].mean_characters) == (None, None)
    assert (found["cut off"].mean_tokens, found["cut off"].mean_characters) == (9, 1)


def test_levels_are_in_the_order_of_their_numbers() -> None:
    questions = [make_question("rw", "10"), make_question("ww", "9"), make_question("rr", "easy"), make_question("rr", "9")]
    levels = make_figures("no", 1.0, questions, (1,)).levels
    assert [(name, level.questions, level.accuracy.value) for name, level in levels.items()] == [
        ("9", 2, 0.5),
        ("10", 1, 0.5),
        ("easy", 1, 1.0),
    ]
    assert levels["10"].outcomes["wrong"].share == 0.5
    assert make_figures("no", 1.0, [make_question("rw")], (1,)).levels == {}


def test_keywords_alone_detect_where_no_judge_was_asked() -> None:
    cell = make_figures("no", 1.0, [make_question("rRw"), make_question("rrr"), make_question("WWw")], (1,))
    assert list(cell.reflection) == ["keywords"]
    found = cell.reflection["keywords"]
    assert (found.responses.value, found.questions, found.question_share.value) == (pytest.approx(3 / 9), 2, pytest.approx(2 / 3))
    assert cell.keyword_counts == {"recheck": 3}
    assert (cell.detector, cell.answering_by_judge, cell.without_verdict) == ("keywords", None, 0)
    assert cell.answering is cell.answering_by_form


def test_with_a_judge_the_paper_s_detector_is_both() -> None:
    texts = [("Let me recheck.", 2, 1), ("Let me recheck.", 1, 1), ("Hm, no.", 2, 0), ("7", None, None)]
    responses = tuple(make_response("r", text, judgement=Judgement(answers, category)) for text, category, answers in texts)
    cell = make_figures("no", 1.0, [ExaminedQuestion("q/0", None, responses)], (1,))
    assert {name: item.responses.value for name, item in cell.reflection.items()} == {"keywords": 0.5, "judge": 0.5, "both": 0.25}
    assert (cell.detector, cell.effect.num_with, cell.without_verdict) == ("both", 1, 2)
    assert cell.answering_by_judge is not None
    assert cell.answering.value == cell.answering_by_judge.value == 0.5
    assert cell.answering_by_form.value == 0


def test_reflection_is_compared_within_questions() -> None:
    """Pooled, the two kinds differ by which questions they belong to; question by question they do not."""
    questions = [make_question("RRrr"), make_question("Wwww"), make_question("RWrw"), make_question("rrrr"), make_question("WWWW")]
    effect = make_effect(questions, "keywords")
    assert (effect.num_with, effect.num_without) == (9, 11)
    assert effect.accuracy_with is not None
    assert effect.accuracy_without is not None
    assert (effect.accuracy_with.value, effect.accuracy_without.value) == (pytest.approx(3 / 9), pytest.approx(7 / 11))
    assert (effect.accuracy_with.low, effect.accuracy_with.high) == clustered_interval([1.0, 0.0, 0.5, 0.0], [2, 1, 2, 4])
    assert effect.differences == (0.0, 0.0, 0.0)
    assert effect.difference is not None
    assert (effect.difference.mean, effect.difference.no_gain_share) == (0.0, 1.0)


def test_without_reflection_there_is_nothing_to_compare() -> None:
    effect = make_effect([make_question("rw"), make_question("ww")], "keywords")
    assert (effect.num_with, effect.accuracy_with, effect.difference, effect.differences) == (0, None, None, ())
    effect = make_effect([make_question("RW")], "keywords")
    assert (effect.num_without, effect.accuracy_without, effect.difference) == (0, None, None)


def test_a_spread_has_mean_interval_and_quartiles() -> None:
    spread = make_spread([-0.5, 0.0, 0.0, 0.25, 0.5])
    assert (spread.questions, spread.mean, spread.minimum, spread.maximum) == (5, pytest.approx(0.05), -0.5, 0.5)
    assert (spread.lower_quartile, spread.median, spread.upper_quartile) == (0.0, 0.0, 0.25)
    assert spread.no_gain_share == pytest.approx(3 / 5)
    assert spread.high == pytest.approx(0.05 + 1.959964 * 0.37081 / 5**0.5, abs=1e-5)
    alone = make_spread([0.25])
    assert (alone.mean, alone.low, alone.lower_quartile, alone.no_gain_share) == (0.25, None, 0.25, 0.0)


def test_the_best_cell_is_the_first_with_the_highest_pass_at_most_k() -> None:
    cells = [make_figures("no", t, [make_question(letters)], (1, 2)) for t, letters in [(0.1, "ww"), (0.2, "rw"), (0.3, "rr")]]
    assert best_cell(cells).temperature == 0.2


letters = st.lists(st.sampled_from("rwucRWUC"), min_size=3, max_size=3).map("".join)
sets = st.lists(st.tuples(letters, st.sampled_from(["1", "2", "3"])), min_size=1, max_size=12)


@given(sets)
def test_parts_add_up(rows: list[tuple[str, str]]) -> None:
    """Over outcomes, over levels, over responses with and without self-reflection."""
    questions = [make_question(text, level, place) for place, (text, level) in enumerate(rows)]
    cell = make_figures("no", 1.0, questions, (1, 3))
    assert sum(item.share for item in cell.outcomes.values()) == pytest.approx(1)
    assert cell.outcomes["right"].share == pytest.approx(cell.accuracy.value)
    assert sum(level.questions * level.accuracy.value for level in cell.levels.values()) / len(rows) == pytest.approx(cell.accuracy.value)
    for name, outcome in cell.outcomes.items():
        assert sum(level.outcomes[name].count for level in cell.levels.values()) == outcome.count
    effect = cell.effect
    right = sum(
        share.value * n for share, n in ((effect.accuracy_with, effect.num_with), (effect.accuracy_without, effect.num_without)) if share
    )
    assert effect.num_with + effect.num_without == 3 * len(rows)
    assert right == pytest.approx(cell.accuracy.value * 3 * len(rows))
    assert cell.reflection["keywords"].responses.value == pytest.approx(effect.num_with / (3 * len(rows)))
    assert cell.accuracy.value <= cell.pass_at[3].value + 1e-12
    for share in (cell.accuracy, cell.mixed, *cell.pass_at.values(), cell.reflection["keywords"].question_share):
        assert 0 <= share.low <= share.value + 1e-12
        assert share.value <= share.high + 1e-12 <= 1 + 2e-12


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=8))
def test_a_clustered_interval_is_of_the_share_of_all(rows: list[list[bool]]) -> None:
    low, high = clustered_interval([fmean(row) for row in rows], [len(row) for row in rows])
    share = sum(map(sum, rows)) / sum(map(len, rows))
    assert 0 <= low <= share + 1e-12
    assert share <= high + 1e-12 <= 1 + 2e-12
    doubled = clustered_interval([fmean(row) for row in rows * 4], [len(row) for row in rows * 4])
    assert doubled[1] - doubled[0] < high - low


def test_share_of_takes_any_test() -> None:
    questions = [ExaminedQuestion("q/0", None, (make_response("r", "a"), make_response("w", "b")))]
    assert share_of(questions, lambda item: item.attempt.text == "b").value == 0.5
