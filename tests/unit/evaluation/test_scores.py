"""Statistics of an evaluation against simulation, enumeration and values from elsewhere."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.evaluation.scores import Attempt, QuestionResult, interval, make_results, pass_at_k, render, score, vote
from megatron_r1z.types import FinishReason, GradedGroup, Group, Prompt, Response, Verdict, VerdictKind


def attempt(
    answer: str | None, kind: VerdictKind = VerdictKind.WRONG, length: int = 5, finish: FinishReason = FinishReason.STOP
) -> Attempt:
    return Attempt(f"so {answer}", length, finish, kind, answer)


def right(answer: str = "7") -> Attempt:
    return attempt(answer, VerdictKind.CORRECT)


def same_number(pairs: Sequence[tuple[str, str]]) -> Mapping[tuple[str, str], VerdictKind]:
    """Equal where the numbers are, so that `2` and `2.0` are one answer."""
    return {pair: VerdictKind.CORRECT if float(pair[0]) == float(pair[1]) else VerdictKind.WRONG for pair in pairs}


def result(name: str, *attempts: Attempt, majority: float | None = None) -> QuestionResult:
    return QuestionResult(name, "?", ("7",), attempts, majority)


@given(samples=st.integers(1, 7), data=st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(samples: int, data: st.DataObject) -> None:
    right_ones, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    subsets = list(itertools.combinations(range(samples), k))
    assert pass_at_k(samples, right_ones, k) == pytest.approx(fmean(any(place < right_ones for place in subset) for subset in subsets))


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([right(), right("14/2"), attempt("2")], 1.0),
        ([right(), attempt("2"), attempt("2.0")], 0.0),
        ([right(), attempt("2"), attempt("3")], 1 / 3),
        ([right(), right(), attempt("2"), attempt("2.0"), attempt("3")], 1 / 2),
        ([attempt("2"), attempt("3")], 0.0),
        ([attempt(None), attempt(None), right()], 1.0),
        ([attempt(None), attempt(None)], 0.0),
        (
            [
                right(),
                attempt("2", VerdictKind.TRUNCATED, finish=FinishReason.LENGTH),
                attempt("2", VerdictKind.TRUNCATED, finish=FinishReason.LENGTH),
            ],
            1.0,
        ),
    ],
)
def test_majority_vote(votes: list[Attempt], expected: float) -> None:
    assert vote([votes], same_number) == [pytest.approx(expected)]


def test_votes_of_different_questions_do_not_mix() -> None:
    rows = [[attempt("2"), attempt("2"), right()], [right(), right(), attempt("2")]]
    assert vote(rows, same_number) == [0.0, 1.0]


def test_interval_of_single_responses_is_wilsons() -> None:
    """Brown, Cai and DasGupta 2001 give no table; statsmodels' proportion_confint(10, 100, method="wilson") gives these."""
    assert interval([1.0] * 10 + [0.0] * 90, 1) == pytest.approx((0.0552291, 0.1743657), abs=1e-6)
    low, high = interval([0.0] * 30, 1)
    assert low == 0.0
    assert 0.05 < high < 0.2
    assert interval([1.0] * 30, 1)[1] == 1.0


def test_interval_covers_the_true_accuracy() -> None:
    """Questions of very different difficulty with four responses each: near 95 % of the intervals hold the expectation."""
    generator = random.Random(0)
    difficulties = [0.02, 0.1, 0.5, 0.9]
    covered = 0
    for _ in range(1000):
        chances = [generator.choice(difficulties) for _ in range(60)]
        means = [fmean(generator.random() < chance for _ in range(4)) for chance in chances]
        low, high = interval(means, 4)
        covered += low <= fmean(difficulties) <= high
    assert 0.92 <= covered / 1000 <= 0.98


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=20))
def test_interval_holds_the_mean(means: list[float]) -> None:
    low, high = interval(means, 4)
    assert 0 <= low <= fmean(means) + 1e-12
    assert fmean(means) - 1e-12 <= high <= 1


def test_figures_of_a_set() -> None:
    results = [
        result("a/0", right(), attempt("2", length=9), majority=0.5),
        result(
            "a/1", attempt(None, VerdictKind.UNFORMATTED, 3), attempt(None, VerdictKind.TRUNCATED, 48, FinishReason.LENGTH), majority=0.0
        ),
    ]
    found = score("a", results)
    assert (found.questions, found.samples, found.accuracy, found.majority) == (2, 2, 0.25, 0.25)
    assert found.pass_at == {1: 0.25, 2: 0.5}
    assert (found.length.mean, found.length.max) == (16.25, 48)
    assert (found.length_right.mean, found.length_right.max) == (5, 5)
    assert (found.length_wrong.mean, found.length_wrong.max) == (20, 48)
    assert (found.formatted_share, found.truncated_share) == (0.5, 0.25)
    assert found.verdict_shares == {
        kind.value: 0.25 * (kind.value in ("correct", "wrong", "unformatted", "truncated")) for kind in VerdictKind
    }


def test_single_responses_have_neither_pass_at_k_nor_majority() -> None:
    found = score("a", [result("a/0", right())])
    assert found.pass_at == {}
    assert found.majority is None
    assert found.length_wrong.mean is None


def test_responses_that_are_all_cut_off_are_unformatted() -> None:
    cut = attempt(None, VerdictKind.TRUNCATED, 48, FinishReason.LENGTH)
    assert score("a", [result("a/0", cut, cut, majority=0.0)]).formatted_share == 0.0


def test_table() -> None:
    one, several = score("long-name", [result("a/0", right())]), score("b", [result("b/0", right(), attempt("2"), majority=0.5)])
    lines = render([one, several]).splitlines()
    assert lines[0].split() == [
        *(
            "set",
            "questions",
            "samples",
            "accuracy",
            "95",
            "%",
            "pass@2",
            "majority",
            "length",
            "longest",
            "right",
            "wrong",
            "formatted",
            "cut",
        )
    ]
    assert lines[1].startswith("long-name")
    assert " - " in lines[1]
    assert lines[-1].split() == ["mean", "75.0%"]
    assert len({len(line) for line in lines}) == 1
    assert "pass@" not in render([one])


def test_records_follow_from_graded_groups() -> None:
    responses = tuple(Response(text, (1,) * size, (0.0,) * size, FinishReason.STOP, 0) for text, size in (("7", 3), ("2", 4), ("2.0", 2)))
    kinds = (VerdictKind.CORRECT, VerdictKind.WRONG, VerdictKind.WRONG)
    verdicts = tuple(Verdict(kind, float(kind is VerdictKind.CORRECT), item.text) for kind, item in zip(kinds, responses, strict=True))
    group = Group(0, Prompt("a/0", "?", (1,), ("7",), "a"), responses)
    (found,) = make_results([GradedGroup(group, verdicts)], same_number)
    assert (found.question_id, found.prompt, found.answers, found.majority, found.num_right) == ("a/0", "?", ("7",), 0.0, 1)
    assert found.attempts[1] == Attempt("2", 4, FinishReason.STOP, VerdictKind.WRONG, "2")


def test_without_answers_there_is_no_vote() -> None:
    group = Group(0, Prompt("a/0", "?", (1,), ("7",), "a"), (Response("7", (1,), (0.0,), FinishReason.STOP, 0),) * 2)
    verdicts = (Verdict(VerdictKind.CORRECT, 1.0, None), Verdict(VerdictKind.WRONG, 0.0, None))
    found = make_results([GradedGroup(group, verdicts)], None)
    assert found[0].majority is None
    assert score("a", found).pass_at == {1: 0.5, 2: 1.0}
    assert score("a", found).formatted_share is None
    assert " - " in render([score("a", found)])


def test_one_response_asks_for_no_comparison() -> None:
    def refuse(pairs: object) -> Mapping[tuple[str, str], VerdictKind]:
        raise AssertionError(pairs)

    group = Group(0, Prompt("a/0", "?", (1,), ("7",), "a"), (Response("7", (1,), (0.0,), FinishReason.STOP, 0),))
    assert make_results([GradedGroup(group, (Verdict(VerdictKind.CORRECT, 1.0, "7"),))], refuse)[0].majority is None
