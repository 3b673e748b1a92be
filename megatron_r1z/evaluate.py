"""Accuracy on held-out questions, sampled by the run's own engine."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megatron_r1z import ranks
from megatron_r1z.metrics import Metrics
from megatron_r1z.prompts import PromptSet
from megatron_r1z.protocols import Engine, Grader, Sampling


def evaluate_sets(sets: Sequence[PromptSet], engine: Engine, grader: Grader, sampling: Sampling) -> Metrics:
    """Share of rewards of 1 and mean response length of each set; all ranks call this and get the same figures."""
    metrics: Metrics = {}
    for item in sets:
        graded = ranks.gather(grader.grade(engine.generate(item.prompts, sampling)))
        rewards = [verdict.reward for group in graded for verdict in group.verdicts]
        metrics[f"evaluation/{item.name}_accuracy"] = sum(reward == 1.0 for reward in rewards) / len(rewards)
        metrics[f"evaluation/{item.name}_length_tokens"] = fmean(response.length for group in graded for response in group.group.responses)
    return metrics
