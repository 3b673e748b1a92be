"""`MathGrader`: verdicts of the built-in rewards, hostile responses, and reward functions of the user's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.config import ExtraReward, GradingConfig
from megatron_r1z.errors import R1ZError
from megatron_r1z.grading import comparer as comparer_module
from megatron_r1z.grading.grader import MathGrader
from megatron_r1z.grading.modes import MODES
from megatron_r1z.types import FinishReason, Group, Prompt, Response, Verdict, VerdictKind

LIMIT_S = 1.5


def _group(
    responses: Sequence[str], answers: tuple[str, ...] = ("5",), finish: FinishReason = FinishReason.STOP, group_id: int = 0
) -> Group:
    prompt = Prompt(f"test/{group_id}", "question", (1,), answers, "test")
    return Group(group_id, prompt, tuple(Response(text, (2,), (-0.1,), finish, 0) for text in responses))


def _grade(grader: MathGrader, *groups: Group) -> list[Verdict]:
    return [verdict for graded in grader.grade(groups) for verdict in graded.verdicts]


def _make(timeout_s: float = LIMIT_S, **settings: Any) -> MathGrader:
    return MathGrader(GradingConfig(timeout_s=timeout_s, **settings), "no")


@pytest.fixture(scope="module")
def boxed() -> Iterator[MathGrader]:
    grader = _make()
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
    grader = _make(reward="answer_tag")
    responses = ["r</think> <answer>5</answer>", "r</think><answer>5</answer>", r"r</think> <answer>\boxed{5</answer>"]
    assert _grade(grader, _group(responses)) == [
        Verdict(VerdictKind.CORRECT, 1.0, "5"),
        Verdict(VerdictKind.UNFORMATTED, 0.0, None),
        Verdict(VerdictKind.WRONG, 0.0, None),
    ]


def test_plain_answers_need_no_worker() -> None:
    grader = _make()
    verdicts = _grade(grader, _group([r"\boxed{5}", r"\boxed{5.0}", r"\boxed{6}", r"\boxed{}", "no"]))
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert grader._comparer._pool.worker_pids == ()


def test_outcomes_are_remembered_but_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparer_module, "CACHE_SIZE", 2)
    grader = _make(30.0)
    group = _group([rf"\boxed{{{number}/2}}" for number in range(8, 12)])
    first = _grade(grader, group)
    assert [verdict.kind for verdict in first] == [VerdictKind.WRONG, VerdictKind.WRONG, VerdictKind.CORRECT, VerdictKind.WRONG]
    assert list(grader._comparer._cache) == [("10/2", "5"), ("11/2", "5")]
    grader.close()
    assert _grade(grader, _group([r"\boxed{10/2}"])) == [first[2]]
    assert grader._comparer._pool.worker_pids == ()


def test_hostile_answers_are_contained(boxed: MathGrader, tmp_path: Path) -> None:
    witness = tmp_path / "x"
    hanging = [r"\sum_{k=1}^{10^9} \sin(k)", r"\prod_{k=1}^{999999}(k+x)"]
    quick = [
        "(99^9)!",
        "9^{9^{9^9}}",
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
    start = time.process_time()
    verdicts = _grade(boxed, _group([rf"\boxed{{{answer}}}" for answer in good[:1] + hanging + good[1:2] + quick + good[2:]]))
    own = time.process_time() - start
    kinds = {(verdict.extracted or "")[:40]: verdict.kind for verdict in verdicts}
    assert all(kinds[answer] is VerdictKind.CORRECT for answer in good)
    assert all(kinds[answer] is VerdictKind.TIMEOUT for answer in hanging)
    assert all(kinds[answer[:40]] not in (VerdictKind.CORRECT, VerdictKind.ERROR) for answer in quick)
    assert not witness.exists()
    assert sum(verdict.kind is VerdictKind.TIMEOUT for verdict in verdicts) <= 6  # each ends at its limit, however busy the machine
    assert own < 5, "what this process computes itself has no limit"


def test_hostile_references_are_contained(boxed: MathGrader) -> None:
    verdicts = _grade(
        boxed,
        _group([r"\boxed{x}"], (r"\sum_{k=1}^{10^9} \sin(k)",)),
        _group([r"\boxed{x}"], ("{" * 900,)),
        _group([r"\boxed{2/4}"], ("1/2",)),
    )
    assert [verdict.kind for verdict in verdicts] == [VerdictKind.TIMEOUT, VerdictKind.UNPARSABLE, VerdictKind.CORRECT]


def test_self_test(boxed: MathGrader, monkeypatch: pytest.MonkeyPatch) -> None:
    boxed.self_test()
    monkeypatch.setattr(boxed._comparer, "_mode", replace(MODES["strict"], self_test=(("1", "2", True),)))
    with pytest.raises(R1ZError, match="self-test on '1' against '2'"):
        boxed.self_test()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_passes_its_self_test_and_grades(mode: Any) -> None:
    """`5 cm` equals `5 m` under the paper's grader, which drops units; its fast path does not compute a power."""
    grader = _make(30.0, mode=mode)
    grader.self_test()
    verdicts = _grade(grader, _group([r"\boxed{5 cm}", r"\boxed{6 m}"], ("5 m",)), _group([r"\boxed{2^3}"], ("8",)))
    grader.close()
    expected = {
        "strict": ["wrong", "wrong", "correct"],
        "fast": ["correct", "wrong", "wrong"],
        "math_verify": ["correct", "wrong", "correct"],
    }
    assert [verdict.kind.value for verdict in verdicts] == expected[mode]


@pytest.mark.parametrize(
    ("reward", "template", "right"),
    [
        ("auto", "r1", r"</think> <answer>5</answer>"),
        ("auto", "qwen_math", r"\boxed{5}"),
        ("auto", "no", r"\boxed{5}"),
        ("boxed", "r1", r"\boxed{5}"),
        ("answer_tag", "chat", r"</think> <answer>5</answer>"),
        ("answer_tag_lenient", "chat", r"<answer>5</answer>"),
        ("think_then_boxed", "r1", r"so</think> \boxed{5}"),
    ],
)
def test_where_the_answer_is_looked_for(reward: str, template: str, right: str) -> None:
    grader = MathGrader(GradingConfig(reward=reward), template)  # type: ignore[arg-type]
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
    grader = _make(1.0, function=write_function(FUNCTION))
    grader.self_test()
    texts = ["5", "6", "great", "good", "fair", "raise", "nan", "text", "hang", "5"]
    verdicts = _grade(grader, _group(texts), _group(["5"], finish=FinishReason.LENGTH))
    grader.close()
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 2.5, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, -1.0]
    kinds = ["correct", "wrong", "correct", "correct", "wrong", "error", "error", "error", "timeout", "correct", "wrong"]
    assert [verdict.kind.value for verdict in verdicts] == kinds
    assert [message.partition(":reward ")[2] for message in caplog.messages] == [
        "failed on 3 of 11 responses; the first: ValueError: I was told to",
        "took longer than grading.timeout_s (1 s) on 1 of 11 responses",
    ]


EXTRA = """
import time

def brief(response, answers, finish_reason):
    if response == "hang":
        time.sleep(60)
    return len(response)

def broken(response, answers, finish_reason):
    raise RuntimeError("no")
"""


def test_extra_rewards_are_added_and_leave_the_verdict(write_function: Callable[[str], str]) -> None:
    path = write_function(EXTRA).removesuffix(":reward")
    grader = _make(1.0, extra=(ExtraReward(function=f"{path}:brief", weight=-0.5),))
    verdicts = _grade(grader, _group([r"\boxed{5}", "7 ", "hang"]))
    grader.close()
    assert verdicts == [
        Verdict(VerdictKind.CORRECT, 1.0 - 0.5 * 9, "5", (("brief", 9.0),)),
        Verdict(VerdictKind.UNFORMATTED, -1.0, None, (("brief", 2.0),)),
        Verdict(VerdictKind.TIMEOUT, 0.0, None),
    ]


def test_a_failing_extra_reward_is_told_not_hidden(write_function: Callable[[str], str]) -> None:
    path = write_function(EXTRA).removesuffix(":reward")
    grader = _make(30.0, extra=(ExtraReward(function=f"{path}:brief"), ExtraReward(function=f"{path}:broken", weight=2.0)))
    verdicts = _grade(grader, _group([r"\boxed{5}"]))
    grader.close()
    assert verdicts == [Verdict(VerdictKind.ERROR, 0.0, "5", (("brief", 9.0),))]
