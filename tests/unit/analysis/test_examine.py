"""What is found in one response."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1z.analysis.examine import Examined, Judgement, Outcome, Task, examine, find_keywords, make_inquiries, read_levels
from megatron_r1z.config import REFLECTION_KEYWORDS, QuestionSource
from megatron_r1z.data.questions import Question, load_questions
from megatron_r1z.errors import DataError
from megatron_r1z.evaluation.scores import Attempt, QuestionResult
from megatron_r1z.types import FinishReason, VerdictKind
from tests.unit.analysis.made import make_response


@pytest.mark.parametrize("keyword", REFLECTION_KEYWORDS)
def test_each_keyword_of_the_paper_is_found_in_any_case(keyword: str) -> None:
    assert keyword in find_keywords(f"Now {keyword.upper()} it.", REFLECTION_KEYWORDS)


def test_the_keywords_are_the_paper_s() -> None:
    assert len(REFLECTION_KEYWORDS) == 15
    assert find_keywords("Wait, try again. Aha!", REFLECTION_KEYWORDS) == ()
    assert find_keywords("a reevaluation", REFLECTION_KEYWORDS) == ("reevaluation",)
    assert find_keywords("Reevaluating", REFLECTION_KEYWORDS) == ()
    assert find_keywords("rechecked", REFLECTION_KEYWORDS) == ("recheck",)


@pytest.mark.parametrize(
    ("letter", "text", "answers"),
    [
        ("r", "so \\boxed{7}", True),
        ("w", "</think> <answer>7</answer>", True),
        ("u", "The ANSWER IS 7.", True),
        ("u", "Question: 1 + 1?\nQuestion: 2 + 2?", False),
        ("u", "", False),
        ("c", "The answer is 7. Question: 1 + 1? The answer", False),
    ],
)
def test_an_answer_by_form_has_ended_and_has_a_mark(letter: str, text: str, answers: bool) -> None:
    assert make_response(letter, text).answers_by_form is answers


@pytest.mark.parametrize("kind", VerdictKind)
def test_every_verdict_is_one_outcome(kind: VerdictKind) -> None:
    expected = {
        VerdictKind.CORRECT: Outcome.RIGHT,
        VerdictKind.UNFORMATTED: Outcome.UNFORMATTED,
        VerdictKind.TRUNCATED: Outcome.CUT,
    }
    examined = Examined(Attempt("", 1, FinishReason.STOP, kind, None), (), None)
    assert examined.outcome is expected.get(kind, Outcome.WRONG)


@pytest.mark.parametrize("category", [0, 1, 2, 3, None])
@pytest.mark.parametrize("text", ["Let me recheck.", "7"])
def test_both_detectors_must_agree(category: int | None, text: str) -> None:
    examined = make_response("r", text, judgement=Judgement(1, category))
    assert examined.reflects_by_judge is (category == 2)
    assert examined.reflects_by_both is (category == 2 and text != "7")
    assert not make_response("r", text).reflects_by_both


@pytest.mark.parametrize(("reply", "answers"), [(1, True), (0, False), (None, False)])
def test_a_reply_without_a_verdict_is_a_no(reply: int | None, answers: bool) -> None:
    assert make_response("r", judgement=Judgement(reply, 1)).answers_by_judge is answers


def test_equal_responses_to_a_question_are_judged_once() -> None:
    questions = {f"q/{index}": Question(f"q/{index}", f"{index}?", ("7",), "q") for index in range(2)}
    results = [make_result("q/0", "a", "b", "a"), make_result("q/1", "a", "c", "c")]
    inquiries = make_inquiries(results, questions)
    assert inquiries == [(task, problem, text) for problem, text in [("0?", "a"), ("0?", "b"), ("1?", "a"), ("1?", "c")] for task in Task]
    verdicts: dict[tuple[Task, str, str], int | None] = dict.fromkeys(inquiries, 1)
    verdicts[Task.REFLECTION, "0?", "a"] = 2
    examined = examine(results, questions, {"q/1": "3"}, ["b"], verdicts)
    assert [[item.reflects_by_judge for item in question.responses] for question in examined] == [[True, False, True], [False] * 3]
    assert [question.level for question in examined] == [None, "3"]
    assert [item.keywords for item in examined[0].responses] == [(), ("b",), ()]
    assert all(item.judgement is None for question in examine(results, questions, {}, [], None) for item in question.responses)


def make_result(question_id: str, *texts: str) -> QuestionResult:
    attempts = tuple(Attempt(text, 1, FinishReason.STOP, VerdictKind.WRONG, text) for text in texts)
    return QuestionResult(question_id, f"prompt of {question_id}", ("7",), attempts, None)


def test_levels_are_those_of_the_chosen_rows(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    rows = [{"problem": f"{index}?", "answer": "7", "level": index % 2 + 1} for index in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = QuestionSource(path=str(path), offset=1, limit=2, where={"level": (2,)})
    questions = {question.question_id: question for question in load_questions(source, "name")}
    assert read_levels(source, "level", questions) == {"name/3": "2", "name/5": "2"}
    assert read_levels(source, None, questions) == {}
    with pytest.raises(DataError, match="no column 'difficulty'; the columns are 'problem', 'answer', 'level'"):
        read_levels(source, "difficulty", questions)
