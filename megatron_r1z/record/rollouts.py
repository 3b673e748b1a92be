"""Every response of a run on disk: `rollouts/iter_000012.jsonl.zst`.

With the weights before the iteration (of policy, reference model and critic, as far as there are), which give all log-probs but the
engine's, a file is enough to compute the updates of its iteration again without this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_r1z.record.result_files import to_json
from megatron_r1z.types import GradedGroup, Sample

ROLLOUTS = "rollouts"
"""Folder of these files in that of a run."""


def drop_rollouts(folder: Path, iteration: int) -> None:
    """Delete the files from `iteration` on: a run that goes on there samples them again."""
    for path in folder.glob("iter_*.jsonl.zst"):
        if int(path.name.removesuffix(".jsonl.zst").removeprefix("iter_")) >= iteration:
            path.unlink()


def save_rollouts(
    folder: Path, iteration: int, graded: Sequence[GradedGroup], samples: Sequence[Sample], step_of: Mapping[str, int]
) -> None:
    """One JSON object per response, in group order.

    `samples` are in the same order as the responses; `step_of` maps a sample id to the optimizer step of the iteration that it was in.
    """
    import zstandard

    folder.mkdir(parents=True, exist_ok=True)
    rows = iter(samples)
    lines = [to_json(_row(item, index, next(rows), step_of)) for item in graded for index in range(len(item.verdicts))]
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
        "is_counted": sample.is_counted,
        **({"values": sample.values} if sample.values else {}),
        "policy_version": response.policy_version,
        "step": step_of[sample.sample_id],
    }
