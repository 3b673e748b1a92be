"""`MathGrader`: verdicts of the built-in rewards, hostile responses, and reward functions of the user's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from megatron_r1z.config import GradingConfig
from megatron_r1z.errors import DataError, R1ZError
from megatron_r1z.grading import grader as grader_module
from megatron_r1z.grading.grader import MathGrader, check_reward_function, make_grader
from megatron_r1z.types import FinishReason, Group, Prompt, Response, Verdict, VerdictKind

LIMIT_S = 1.5


def _group(
    responses: Sequence[str], answers: tuple[str, ...] = ("5",), finish: FinishReason = FinishReason.STOP, group_id: int = 0
) -> Group:
    prompt = Prompt(f"test/{group_id}", "question", (1,), answers, "test")
    return Group(group_id, prompt, tuple(Response(text, (2,), (-0.1,), finish, 0) for text in responses))


def _grade(grader: MathGrader, *groups: Group) -> list[Verdict]:
    return [verdict for graded in grader.grade(groups) for verdict in graded.verdicts]


@pytest.fixture(scope="module")
def boxed() -> Iterator[MathGrader]:
    grader = MathGrader("boxed", None, 1, LIMIT_S)
    yield grader
    grader.close()


def test_each_kind_of_verdict(boxed: MathGrader) -> None:
    responses = (r"\boxed{x+x}", r"\boxed{3x}", "2x", r"\boxed{(2x}", r"\boxed{2x}")
    verdicts = _grade(boxed, _group(responses, ("2x",)))
    assert verdicts == [
        Verdict(VerdictKind.CORRECT, 1.0, "x+x"),
        Verdict(VerdictKind.WRONG, 0.0, "3x"),
        Verdict(VerdictKind.UNFORMATTED, 0.0, None),
        Verdict(VerdictKind.UNPARSABLE, 0.0, "(2x"),
        Verdict(VerdictKind.CORRECT, 1.0, "2x"),
    ]


@pytest.mark.parametrize("finish", [FinishReason.LENGTH, FinishReason.ABORT])
def test_an_unfinished_response_has_reward_0_even_with_the_right_box(boxed: MathGrader, finish: FinishReason) -> None:
    verdicts = _grade(boxed, _group([r"\boxed{5}", "5"], finish=finish))
    assert verdicts == [Verdict(VerdictKind.TRUNCATED, 0.0, "5"), Verdict(VerdictKind.TRUNCATED, 0.0, None)]


def test_groups_keep_their_order_and_any_reference_will_do(boxed: MathGrader) -> None:
    groups = [_group([rf"\boxed{{{number}}}", r"\boxed{\sqrt{7}}"], (str(number), r"7^{1/2}"), group_id=number) for number in range(4)]
    graded = boxed.grade(groups)
    assert [item.group for item in graded] == groups
    assert all(verdict.kind is VerdictKind.CORRECT for item in graded for verdict in item.verdicts)
    assert boxed.grade([]) == []
    assert _grade(boxed, _group([r"\boxed{5}"], ())) == [Verdict(VerdictKind.WRONG, 0.0, "5")]


def test_answer_tags() -> None:
    grader = MathGrader("answer_tag", None, 1, LIMIT_S)
    responses = ["r</think> <answer>5</answer>", "r</think><answer>5</answer>", r"r</think> <answer>\boxed{5</answer>"]
    assert _grade(grader, _group(responses)) == [
        Verdict(VerdictKind.CORRECT, 1.0, "5"),
        Verdict(VerdictKind.UNFORMATTED, 0.0, None),
        Verdict(VerdictKind.WRONG, 0.0, None),
    ]


def test_plain_answers_need_no_worker() -> None:
    grader = MathGrader("boxed", None, 1, LIMIT_S)
    verdicts = _grade(grader, _group([r"\boxed{5}", r"\boxed{5.0}", r"\boxed{6}", r"\boxed{}", "no"]))
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert grader._comparisons.worker_pids == ()


def test_outcomes_are_remembered_but_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader_module, "CACHE_SIZE", 2)
    grader = MathGrader("boxed", None, 1, 30.0)
    group = _group([rf"\boxed{{{number}/2}}" for number in range(8, 12)])
    first = _grade(grader, group)
    assert [verdict.kind for verdict in first] == [VerdictKind.WRONG, VerdictKind.WRONG, VerdictKind.CORRECT, VerdictKind.WRONG]
    assert list(grader._cache) == [("10/2", "5"), ("11/2", "5")]
    grader.close()
    assert _grade(grader, _group([r"\boxed{10/2}"])) == [first[2]]
    assert grader._comparisons.worker_pids == ()


def test_hostile_answers_are_contained(boxed: MathGrader, tmp_path: Path) -> None:
    witness = tmp_path / "x"
    hanging = ["(99^9)!", "9^{9^{9^9}}"]
    quick = [
        "x" * 1_000_000,
        "9" * 1_000_000,
        "{" * 500_000 + "}" * 500_000,
        "{" * 900 + "}" * 900,
        "(" * 900 + "1" + ")" * 900,
        r"\frac{1}{" * 200 + "1" + "}" * 200,
        r"\sqrt{" * 300 + "2" + "}" * 300,
        "1," * 900 + "2",
        "9" * 1_900 + "/7",
        f"__import__('os').system('touch {witness}')",
        rf"\text{{__import__('os').system('touch {witness}')}}",
        "\x00\ud800\N{ZERO WIDTH JOINER}",
        "\\",
    ]
    good = [r"\frac{10}{2}", "2+3", r"\sqrt{25}"]
    _grade(boxed, _group([r"\boxed{1/3}"], (r"\frac{2}{6}",)))  # the worker is up
    start = time.monotonic()
    verdicts = _grade(boxed, _group([rf"\boxed{{{answer}}}" for answer in good[:1] + hanging + good[1:2] + quick + good[2:]]))
    elapsed = time.monotonic() - start
    kinds = {(verdict.extracted or "")[:40]: verdict.kind for verdict in verdicts}
    assert all(kinds[answer] is VerdictKind.CORRECT for answer in good)
    assert all(kinds[answer] is VerdictKind.TIMEOUT for answer in hanging)
    assert all(kinds[answer[:40]] not in (VerdictKind.CORRECT, VerdictKind.ERROR) for answer in quick)
    assert not witness.exists()
    assert elapsed < 6 * LIMIT_S + 5


def test_hostile_references_are_contained(boxed: MathGrader) -> None:
    verdicts = _grade(boxed, _group([r"\boxed{x}"], ("(99^9)!",)), _group([r"\boxed{x}"], ("{" * 900,)), _group([r"\boxed{2/4}"], ("1/2",)))
    assert [verdict.kind for verdict in verdicts] == [VerdictKind.TIMEOUT, VerdictKind.WRONG, VerdictKind.CORRECT]


def test_self_test(boxed: MathGrader, monkeypatch: pytest.MonkeyPatch) -> None:
    boxed.self_test()
    monkeypatch.setattr(grader_module, "_SELF_TEST", (("1", "2", True),))
    with pytest.raises(R1ZError, match="self-test on '1' against '2'"):
        boxed.self_test()


@pytest.mark.parametrize(
    ("reward", "template", "right"),
    [
        ("auto", "r1", r"</think> <answer>5</answer>"),
        ("auto", "qwen_math", r"\boxed{5}"),
        ("auto", "no", r"\boxed{5}"),
        ("boxed", "r1", r"\boxed{5}"),
        ("answer_tag", "chat", r"</think> <answer>5</answer>"),
    ],
)
def test_make_grader(reward: str, template: str, right: str) -> None:
    grader = make_grader(GradingConfig(reward=reward), template)  # type: ignore[arg-type]
    assert [verdict.kind for verdict in _grade(grader, _group([right]))] == [VerdictKind.CORRECT]


@pytest.fixture
def write_function(tmp_path: Path) -> Callable[[str], str]:
    def write(source: str) -> str:
        path = tmp_path / "reward.py"
        path.write_text(source, encoding="utf-8")
        return f"{path}:reward"

    return write


FUNCTION = """
import time

def reward(response, answers, finish_reason):
    if response == "raise":
        raise ValueError("I was told to")
    if response == "hang":
        time.sleep(60)
    if response == "nan":
        return float("nan")
    if response == "text":
        return "1.0"
    if finish_reason == "length":
        return -1
    return {"great": 2.5, "good": True, "fair": 0.5}.get(response, float(response in answers))
"""


def test_a_reward_function_of_the_users_own(write_function: Callable[[str], str], caplog: pytest.LogCaptureFixture) -> None:
    grader = MathGrader("boxed", write_function(FUNCTION), 1, 1.0)
    grader.self_test()
    texts = ["5", "6", "great", "good", "fair", "raise", "nan", "text", "hang", "5"]
    verdicts = _grade(grader, _group(texts), _group(["5"], finish=FinishReason.LENGTH))
    grader.close()
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 2.5, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, -1.0]
    kinds = ["correct", "wrong", "correct", "correct", "wrong", "error", "error", "error", "timeout", "correct", "wrong"]
    assert [verdict.kind.value for verdict in verdicts] == kinds
    assert caplog.messages == ["the reward function failed on 3 of 11 responses; the first: ValueError: I was told to"]


def test_a_good_reward_function_passes_the_check(write_function: Callable[[str], str]) -> None:
    check_reward_function(write_function(FUNCTION))
    check_reward_function(write_function("reward = lambda response, answers, finish_reason='stop': 1.0"))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def rewards(response, answers, finish_reason): ...", "defines no 'reward'"),
        ("reward = 3", "is not a function"),
        ("def reward(response, answers): ...", "must take"),
        ("def reward(response, answers, finish_reason, more): ...", "must take"),
        ("def reward(:", "fails to load: SyntaxError"),
        ("import no_such_module_of_ours", "fails to load: ModuleNotFoundError"),
    ],
)
def test_a_bad_reward_function_is_refused(write_function: Callable[[str], str], source: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        check_reward_function(write_function(source))


@pytest.mark.parametrize(("function", "complaint"), [("reward", "path.py:name"), ("/no/such.py:reward", "no file"), (":x", "path.py:name")])
def test_a_missing_reward_function_is_refused(function: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        check_reward_function(function)
