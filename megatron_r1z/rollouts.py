"""Every response of a run on disk, enough to recompute its updates without this package: `rollouts/iter_000012.jsonl.zst`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_r1z.types import GradedGroup, Sample


def save_rollouts(
    folder: Path, iteration: int, graded: Sequence[GradedGroup], samples: Sequence[Sample], step_of: Mapping[str, int]
) -> None:
    """One JSON object per response, in group order.

    `samples` are in the same order as the responses; `step_of` maps a sample id to the optimizer step of the iteration that it was in.
    """
    import zstandard

    folder.mkdir(parents=True, exist_ok=True)
    rows = iter(samples)
    lines = [json.dumps(_row(item, index, next(rows), step_of)) for item in graded for index in range(len(item.verdicts))]
    payload = zstandard.compress("".join(f"{line}\n" for line in lines).encode(), 3)
    (folder / f"iter_{iteration:06d}.jsonl.zst").write_bytes(payload)


def _row(item: GradedGroup, index: int, sample: Sample, step_of: Mapping[str, int]) -> dict[str, object]:
    response, verdict, prompt = item.group.responses[index], item.verdicts[index], item.group.prompt
    return {
        "sample_id": sample.sample_id,
        "prompt_id": prompt.prompt_id,
        "prompt_token_ids": prompt.token_ids,
        "answers": prompt.answers,
        "response": response.text,
        "response_token_ids": response.token_ids,
        "engine_logprobs": response.logprobs,
        "temperature": sample.temperature,
        "finish_reason": response.finish_reason.value,
        "verdict": verdict.kind.value,
        "extracted": verdict.extracted,
        "reward": verdict.reward,
        "extra_rewards": dict(verdict.extra),
        "advantage": sample.advantage,
        "policy_version": response.policy_version,
        "step": step_of[sample.sample_id],
    }
