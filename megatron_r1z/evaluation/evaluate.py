"""Held-out questions put to an engine: every n iterations of a run, and by `megatron-r1z evaluate`."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist

from megatron_r1z import ranks
from megatron_r1z.config import EvaluateConfig, EvaluationConfig, RolloutConfig
from megatron_r1z.data.prompts import PromptSet
from megatron_r1z.errors import DataError
from megatron_r1z.evaluation.scores import Attempt, QuestionResult, SetScore, make_results, render, score
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.protocols import Grader, Sampler, Sampling, Stop
from megatron_r1z.record.metrics import Console, Metrics
from megatron_r1z.record.result_files import append_rows, replace_text, to_json
from megatron_r1z.types import FinishReason, Prompt, VerdictKind

EVALUATED = 0
"""Policy version of the weights that `megatron-r1z evaluate` puts into its engine; they are the only ones."""


def evaluation_sampling(evaluation: EvaluationConfig, rollout: RolloutConfig, stop: tuple[Stop, ...]) -> Sampling:
    """How the responses of an evaluation are sampled."""
    return Sampling(
        num_samples=evaluation.samples,
        max_tokens=rollout.max_response_tokens,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        top_k=-1,
        stop=stop,
        seed=rollout.seed,
    )


def evaluate_prompts(
    prompts: Sequence[Prompt], engine: Sampler, grader: Grader, sampling: Sampling, policy_version: int, stop_flag: StopFlag
) -> list[QuestionResult] | None:
    """The record of each prompt, in order; all ranks call this and get the same records, None where one of them was asked to stop."""

    def of_this_rank() -> list[tuple[int, QuestionResult]]:
        graded = sorted(grader.grade(engine.generate(prompts, sampling, policy_version)), key=lambda item: item.group.group_id)
        judge = grader.judge if grader.finds_answers else None
        return list(zip((item.group.group_id for item in graded), make_results(graded, judge), strict=True))

    numbered = ranks.unless_stopped(of_this_rank, stop_flag)
    if numbered is None:
        return None
    return [result for _, result in sorted(ranks.gather(numbered), key=lambda pair: pair[0])]


def evaluation_metrics(item: SetScore) -> Metrics:
    """The figures of a set that are worth a curve."""
    metrics = {
        f"evaluation/{item.name}_accuracy": item.accuracy,
        f"evaluation/{item.name}_length_tokens": item.length.mean or 0.0,
        f"evaluation/{item.name}_truncated_share": item.truncated_share,
    }
    if item.formatted_share is not None:
        metrics[f"evaluation/{item.name}_formatted_share"] = item.formatted_share
    if item.majority is not None:
        metrics[f"evaluation/{item.name}_majority"] = item.majority
        metrics |= {f"evaluation/{item.name}_pass_at_{k}": value for k, value in item.pass_at.items() if k > 1}
    return metrics


@dataclass
class Evaluation:
    """The collaborators of one `megatron-r1z evaluate` on this rank."""

    config: EvaluateConfig
    sets: Sequence[PromptSet]
    engine: Sampler
    grader: Grader
    sampling: Sampling
    log: Console
    stop_flag: StopFlag

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.config.folder

    @property
    def questions_per_chunk(self) -> int:
        """Questions after which the responses are on disk: what all engines sample side by side."""
        engines = self.config.parallel.num_ranks // self.config.rollout.tensor_parallel_size
        return max(1, self.config.rollout.max_concurrent_sequences * engines // self.config.evaluation.samples)


def evaluate(run: Evaluation) -> bool:
    """Evaluate what is left of every set and write scores; True when all is done, False when the run was asked to stop."""
    scores = []
    for item in run.sets:
        results = evaluate_set(run, item, run.folder / f"{item.name}.jsonl")
        if len(results) < len(item.prompts):
            return False
        scores.append(score(item.name, results))
    if dist.get_rank() == 0:
        _write_scores(run.folder / "scores.json", run.config, scores)
    run.log.say("\n" + render(scores) + "\n")
    return True


def evaluate_set(run: Evaluation, item: PromptSet, path: Path) -> list[QuestionResult]:
    """The records of a set, those in `path` first and the others appended to it; fewer than its questions where a stop was asked for.

    Chunks are the same in every run, so that a resumed one samples what was missed alike, also the one that was given up at a stop.
    """
    size = run.questions_per_chunk
    results = ranks.broadcast(_read_results(path, size, item.prompts) if dist.get_rank() == 0 else [])
    if results:
        run.log.say(f"{item.name}: {len(results)} of {len(item.prompts)} questions are in {path}")
    while len(results) < len(item.prompts) and not ranks.any_rank(run.stop_flag.requested):
        run.log.phase(f"{item.name}: question {len(results) + 1} of {len(item.prompts)}")
        asked = item.prompts[len(results) : len(results) + size]
        chunk = evaluate_prompts(asked, run.engine, run.grader, run.sampling, EVALUATED, run.stop_flag)
        if chunk is None:
            break
        if dist.get_rank() == 0:
            append_rows(path, map(_to_row, chunk))
        results += chunk
        accuracy = fmean(result.num_right / len(result.attempts) for result in results)
        run.log.say(f"{item.name}: {len(results)} of {len(item.prompts)} questions, accuracy so far {accuracy:.1%}")
    return results


def _read_results(path: Path, chunk: int, prompts: Sequence[Prompt]) -> list[QuestionResult]:
    """The records of the complete chunks on disk; the rest of the file, which a killed run may have left, is cut off."""
    if not path.exists():
        return []
    complete = _complete_lines(path)
    kept = complete if len(complete) == len(prompts) else complete[: len(complete) // chunk * chunk]
    results = [_from_row(json.loads(line)) for line in kept]
    _check_questions(path, results, prompts)
    with path.open("r+b") as file:
        file.truncate(sum(map(len, kept)))
    return [replace(result, question_id=prompt.prompt_id) for result, prompt in zip(results, prompts, strict=False)]


def check_records(path: Path, prompts: Sequence[Prompt]) -> None:
    """Refuse responses on disk that are to other prompts, or were graded against other answers, than those of a set.

    Raises:
        DataError: names the first question that differs, and how.
    """
    if path.exists():
        _check_questions(path, [_from_row(json.loads(line)) for line in _complete_lines(path)], prompts)


def _complete_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _check_questions(path: Path, results: Sequence[QuestionResult], prompts: Sequence[Prompt]) -> None:
    advice = "choose another logging.folder, or delete that file to start again"
    if len(results) > len(prompts):
        raise DataError(f"{path} holds responses to {len(results)} questions, and the set has {len(prompts)} now; {advice}.")
    for line, (result, prompt) in enumerate(zip(results, prompts, strict=False), 1):
        if result.prompt != prompt.text:
            raise DataError(
                f"{path} holds responses to other questions; the first is on line {line} ({reprlib.repr(result.prompt)}), where "
                f"{prompt.prompt_id} is now {reprlib.repr(prompt.text)}; {advice}."
            )
        if result.answers != prompt.answers:
            raise DataError(
                f"{path} holds verdicts on {prompt.prompt_id} by the answer {list(result.answers)}, which is now {list(prompt.answers)}; "
                f"{advice}."
            )


def _to_row(result: QuestionResult) -> dict[str, Any]:
    row = asdict(result)
    for attempt in row["attempts"]:
        attempt |= {"finish_reason": attempt["finish_reason"].value, "verdict": attempt["verdict"].value}
    return row


def _from_row(row: dict[str, Any]) -> QuestionResult:
    attempts = tuple(
        Attempt(**item | {"finish_reason": FinishReason(item["finish_reason"]), "verdict": VerdictKind(item["verdict"])})
        for item in row["attempts"]
    )
    return QuestionResult(**row | {"answers": tuple(row["answers"]), "attempts": attempts})


def _write_scores(path: Path, config: EvaluateConfig, scores: Sequence[SetScore]) -> None:
    tree = {
        "model": config.model.checkpoint or config.model.path,
        "template": config.data.template,
        "grading": config.grading.function or config.grading.mode,
        "temperature": config.evaluation.temperature,
        "mean_accuracy": fmean(item.accuracy for item in scores),
        "sets": [item.to_tree() for item in scores],
    }
    replace_text(path, to_json(tree, indent=1) + "\n")
