"""Evaluation on one rank with an engine that answers from a script: figures, chunks on disk, resume."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z import ranks
from megatron_r1z.config import EvaluateConfig, EvaluationConfig, LoggingConfig, ModelConfig, QuestionSource, RolloutConfig
from megatron_r1z.data.prompts import PromptSet
from megatron_r1z.errors import DataError
from megatron_r1z.evaluation.evaluate import (
    Evaluation,
    check_records,
    evaluate,
    evaluate_prompts,
    evaluate_set,
    evaluation_metrics,
    evaluation_sampling,
)
from megatron_r1z.evaluation.scores import score
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.protocols import Sampling
from megatron_r1z.record.metrics import SilentLog
from megatron_r1z.types import FinishReason, GradedGroup, Group, Prompt, Response, Verdict, VerdictKind

pytestmark = pytest.mark.usefixtures("one_rank")


class Script:
    """Engine and grader in one: question n has n + 1 tokens and is right where n is even; stops after `limit` calls."""

    def __init__(self, limit: int = 1000) -> None:
        self.flag = StopFlag()
        self.calls: list[list[str]] = []
        self.limit = limit

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, policy_version: int) -> list[Group]:
        self.calls.append([prompt.prompt_id for prompt in prompts])
        self.flag.requested = len(self.calls) >= self.limit
        return [Group(place, prompt, self._respond(prompt, sampling)) for place, prompt in reversed(list(enumerate(prompts)))]

    def _respond(self, prompt: Prompt, sampling: Sampling) -> tuple[Response, ...]:
        size = int(prompt.answers[0]) + 1
        return (Response(prompt.answers[0], (1,) * size, (0.0,) * size, FinishReason.STOP, 0),) * sampling.num_samples

    def grade(self, groups: Sequence[Group]) -> list[GradedGroup]:
        return [GradedGroup(item, tuple(self._verdict(response) for response in item.responses)) for item in groups]

    def _verdict(self, response: Response) -> Verdict:
        is_right = int(response.text) % 2 == 0
        return Verdict(VerdictKind.CORRECT if is_right else VerdictKind.WRONG, float(is_right), response.text)

    finds_answers = True

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Mapping[tuple[str, str], VerdictKind]:
        return dict.fromkeys(pairs, VerdictKind.WRONG)


def make_set(name: str, size: int) -> PromptSet:
    return PromptSet(name, [Prompt(f"{name}/{index}", f"{name} {index}?", (1,), (str(index),), name) for index in range(size)], 1.0, 0)


def make_config(folder: Path, samples: int = 1) -> EvaluateConfig:
    return EvaluateConfig(
        model=ModelConfig(path="nowhere"),
        evaluation=EvaluationConfig(sets=(QuestionSource(path="a.jsonl"),), samples=samples, temperature=1.0),
        logging=LoggingConfig(folder=str(folder)),
        rollout=RolloutConfig(max_concurrent_sequences=4),
    )


def make_run(folder: Path, script: Script, sets: Sequence[PromptSet], samples: int = 1) -> Evaluation:
    config = make_config(folder, samples)
    sampling = evaluation_sampling(config.evaluation, config.rollout, ("stop",))
    return Evaluation(config, sets, script, script, sampling, SilentLog(), script.flag)  # type: ignore[arg-type]


def scores_of(folder: Path) -> Any:
    return json.loads((folder / "evaluation" / "scores.json").read_text())


def test_sampling_follows_the_configuration() -> None:
    evaluation = EvaluationConfig(samples=3, temperature=0.6, top_p=0.95)
    assert evaluation_sampling(evaluation, RolloutConfig(max_response_tokens=9, seed=4), ("x",)) == Sampling(3, 9, 0.6, 0.95, -1, ("x",), 4)


def test_records_are_in_order_and_become_metrics() -> None:
    script = Script()
    sampling = Sampling(2, 8, 1.0, 1.0, -1, (), 0)
    results = evaluate_prompts(make_set("a", 3).prompts, script, script, sampling, 0, script.flag)  # type: ignore[arg-type]
    assert results is not None
    assert [result.question_id for result in results] == ["a/0", "a/1", "a/2"]
    assert evaluation_metrics(score("a", results)) == {
        "evaluation/a_accuracy": pytest.approx(2 / 3),
        "evaluation/a_length_tokens": 2.0,
        "evaluation/a_formatted_share": 1.0,
        "evaluation/a_truncated_share": 0.0,
        "evaluation/a_majority": pytest.approx(2 / 3),
        "evaluation/a_pass_at_2": pytest.approx(2 / 3),
    }


def test_scores_and_records_are_written(tmp_path: Path) -> None:
    script = Script()
    assert evaluate(make_run(tmp_path, script, [make_set("a", 6), make_set("b", 3)]))
    assert script.calls == [["a/0", "a/1", "a/2", "a/3"], ["a/4", "a/5"], ["b/0", "b/1", "b/2"]]
    tree = scores_of(tmp_path)
    assert [(item["name"], item["questions"], item["accuracy"]) for item in tree["sets"]] == [("a", 6, 0.5), ("b", 3, pytest.approx(2 / 3))]
    assert tree["mean_accuracy"] == pytest.approx(7 / 12)
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "a.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [f"a/{index}" for index in range(6)]
    assert rows[2]["attempts"] == [{"text": "2", "length": 3, "finish_reason": "stop", "verdict": "correct", "extracted": "2"}]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_stopped_evaluation_goes_on_to_the_same_scores(tmp_path: Path, samples: int) -> None:
    sets = [make_set("a", 10), make_set("b", 3)]
    assert evaluate(make_run(tmp_path / "whole", whole := Script(), sets, samples))
    assert not evaluate(make_run(tmp_path / "broken", first := Script(limit=2), sets, samples))
    assert not (tmp_path / "broken" / "evaluation" / "scores.json").exists()
    assert evaluate(make_run(tmp_path / "broken", second := Script(), sets, samples))
    assert first.calls[:-1] + second.calls == whole.calls  # the chunk at which the stop came is sampled again
    assert scores_of(tmp_path / "broken") == scores_of(tmp_path / "whole")
    assert evaluate(make_run(tmp_path / "broken", third := Script(), sets, samples))
    assert third.calls == []


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_a_file_cut_off_anywhere_is_completed(tmp_path: Path, cut: int) -> None:
    sets = [make_set("a", 10)]
    evaluate(make_run(tmp_path, Script(), sets))
    path = tmp_path / "evaluation" / "a.jsonl"
    complete = path.read_bytes()
    path.write_bytes(complete[:-cut])
    evaluate(make_run(tmp_path, script := Script(), sets))
    assert path.read_bytes() == complete
    assert script.calls[0][0] in ("a/0", "a/4", "a/8")


def test_responses_to_other_questions_are_refused(tmp_path: Path) -> None:
    sets = [make_set("a", 6)]
    evaluate(make_run(tmp_path, Script(), sets))
    other = replace(sets[0], prompts=[replace(prompt, text=f"{prompt.text}!") for prompt in sets[0].prompts])
    with pytest.raises(DataError, match="holds responses to other questions"):
        evaluate(make_run(tmp_path, Script(), [other]))


def test_verdicts_by_another_reference_are_refused(tmp_path: Path) -> None:
    sets = [make_set("a", 6)]
    evaluate(make_run(tmp_path, Script(), sets))
    path = tmp_path / "evaluation" / "a.jsonl"
    prompts = [*sets[0].prompts[:4], replace(sets[0].prompts[4], answers=("40",)), sets[0].prompts[5]]
    with pytest.raises(DataError, match=r"holds verdicts on a/4 by the answer \['4'\], which is now \['40'\]; choose another"):
        evaluate(make_run(tmp_path, Script(), [replace(sets[0], prompts=prompts)]))
    with pytest.raises(DataError, match=r"verdicts on a/4"):
        check_records(path, prompts)
    check_records(path, sets[0].prompts)
    with pytest.raises(DataError, match="responses to 6 questions, and the set has 5 now"):
        check_records(path, sets[0].prompts[:5])


def test_records_of_a_renamed_file_have_the_ids_of_the_present_one(tmp_path: Path) -> None:
    first = make_set("a", 6)
    evaluate(make_run(tmp_path, Script(), [first]))
    renamed = replace(first, prompts=[replace(prompt, prompt_id=f"b/{index}") for index, prompt in enumerate(first.prompts)])
    run = make_run(tmp_path, script := Script(), [renamed])
    results = evaluate_set(run, renamed, tmp_path / "evaluation" / "a.jsonl")
    assert script.calls == []
    assert [result.question_id for result in results] == [f"b/{index}" for index in range(6)]


def test_messages_of_one_rank() -> None:
    assert ranks.gather([3, 1, 2]) == [3, 1, 2]
    assert ranks.gather([]) == []
    assert ranks.broadcast([3, 1]) == [3, 1]
    assert ranks.any_rank(True) is True
    assert ranks.any_rank(False) is False
