"""What a run says when its responses teach it nothing: at once, once, and with where to look."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_r1z.config import TrainConfig, make_config
from megatron_r1z.record.advice import NEXT_STEP, SILENT_ITERATIONS, Advice
from megatron_r1z.types import FinishReason, GradedGroup, Group, Prompt, Response, Sample, Verdict, VerdictKind

RIGHT, WRONG, CUT, TIMEOUT, ERROR = (
    VerdictKind.CORRECT,
    VerdictKind.WRONG,
    VerdictKind.TRUNCATED,
    VerdictKind.TIMEOUT,
    VerdictKind.ERROR,
)
TRAINED = [Sample("0/0", (1, 2), 1, 0.5, 1.0, (-0.1,), 0)]
UNTRAINED = [Sample("0/0", (1, 2), 1, 0.0, 1.0, (-0.1,), 0)]


def make_advice(prompts: int = 1) -> Advice:
    tree = {
        "model": {"path": "model"},
        "data": {"train": [{"path": "questions.jsonl"}]},
        "algorithm": {"iterations": 1, "train_batch_size": 4 * prompts},
        "rollout": {"prompts_per_iteration": prompts, "samples_per_prompt": 4},
        "logging": {"folder": "runs/x"},
    }
    return Advice(make_config(TrainConfig, tree))


def group(kinds: Sequence[VerdictKind], texts: Sequence[str] = (), reason: FinishReason = FinishReason.STOP) -> list[GradedGroup]:
    """One group whose right responses have reward 1."""
    responses = [Response(text, (3,), (-0.1,), reason, 0) for text in texts or ["so it is 5"] * len(kinds)]
    verdicts = [Verdict(kind, float(kind is RIGHT), None) for kind in kinds]
    return [GradedGroup(Group(0, Prompt("q/0", "?", (1,), ("5",), "q"), tuple(responses)), tuple(verdicts))]


def test_a_run_that_learns_says_nothing() -> None:
    advice = make_advice()
    for iteration in range(1, 30):
        assert advice.about(iteration, group([RIGHT] * 2 + [CUT] * 8), TRAINED) == []


@pytest.mark.parametrize("kind", NEXT_STEP)
def test_nearly_all_responses_without_an_answer_are_told_with_their_commonest_ending(kind: VerdictKind) -> None:
    texts = [f"{number} words and then the answer\n\nis {number % 3 // 2}" for number in range(9)] + ["7"]
    reason = FinishReason.LENGTH if kind is CUT else FinishReason.STOP
    (sentence,) = make_advice().about(1, group([kind] * 9 + [RIGHT], texts, reason), TRAINED)
    assert sentence.startswith(f"warning: 9 of 10 responses are unformatted, cut off, unreadable or not graded, 9 of them {kind.value} ")
    assert f"(9 with finish reason {reason.value}; the commonest ending, of 6, is 'answer\\n\\nis 0')" in sentence
    assert NEXT_STEP[kind] in sentence
    assert ("grading.timeout_s" in sentence) == (kind is TIMEOUT), "nothing else is cured by more time"


def test_under_a_function_of_the_users_own_a_cut_response_is_told_too() -> None:
    (sentence,) = make_advice().about(1, group([WRONG] * 10, reason=FinishReason.LENGTH), TRAINED)
    assert "10 of them truncated (10 with finish reason length" in sentence
    assert "rollout.max_response_tokens" in sentence


def test_it_is_said_once_and_again_when_it_comes_back_or_becomes_another_thing() -> None:
    advice = make_advice()
    unformatted, cut, fine = group([VerdictKind.UNFORMATTED] * 10), group([CUT] * 10), group([RIGHT] * 10)
    assert len(advice.about(1, unformatted, TRAINED)) == 1
    assert [advice.about(iteration, unformatted, TRAINED) for iteration in range(2, 6)] == [[]] * 4
    assert len(advice.about(6, cut, TRAINED)) == 1
    assert advice.about(7, fine, TRAINED) == []
    assert advice.about(8, unformatted, TRAINED) == [], "it comes and goes"
    assert len(advice.about(9 + SILENT_ITERATIONS, unformatted, TRAINED)) == 1


@pytest.mark.parametrize(
    ("timeouts", "errors", "cure"),
    [(0, 0, None), (1, 1, None), (3, 0, "raise it or grading.workers"), (0, 3, "try the reward function"), (2, 3, "try the reward")],
)
def test_a_grader_that_gives_up_is_told(timeouts: int, errors: int, cure: str | None) -> None:
    kinds = [TIMEOUT] * timeouts + [ERROR] * errors
    sentences = make_advice().about(1, group([*kinds, *[RIGHT] * (100 - len(kinds))]), TRAINED)
    assert len(sentences) == (cure is not None)
    if cure is not None:
        assert f"timeout {timeouts}.0%, error {errors}.0% of the responses, which are not trained on" in sentences[0]
        assert cure in sentences[0]
        assert ("grading.timeout_s" in sentences[0]) == (timeouts >= errors)


def test_an_iteration_without_a_sample_that_is_trained_on_is_told() -> None:
    advice = make_advice()
    (sentence,) = advice.about(1, group([RIGHT] * 4) * 3, UNTRAINED)
    assert (
        "no sample was trained on, since rewards differ in none of the 3 groups in 3 rounds of sampling, whose mean reward is 1;"
        in sentence
    )
    assert advice.about(2, group([RIGHT] * 4), UNTRAINED) == []
    (sentence,) = make_advice(2).about(1, group([WRONG] * 4) * 2, UNTRAINED)
    assert "none of the 2 groups, whose mean reward is 0;" in sentence
    found = make_advice().about(1, group([TIMEOUT] * 4), UNTRAINED)
    assert len(found) == 2
    assert "none of whose responses was judged" in found[1]
