"""`megatron-r1z plan CONFIG`: from files to a report. Standard library and the YAML reader, so that a login node can say no."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_r1z.config import TrainConfig, load_config
from megatron_r1z.cost.checks import check_shape
from megatron_r1z.cost.cluster import load_cluster
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.cost.report import Report
from megatron_r1z.cost.run_cost import RunCost
from megatron_r1z.layout.known import find_shape

PROMPT_TOKENS = 160
"""Mean prompt where none is given: a MATH question under the r1 template."""
RESPONSE_SHARE = 3
"""Mean response where none is given: the generation budget over this. The paper's runs have means of 500 to 1000 in a budget of 3000."""


def plan_run(
    config_path: str,
    overrides: Sequence[str] = (),
    cluster_path: str | None = None,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
) -> Report:
    """What a run costs; nothing is started.

    Args:
        config_path: of a training run.
        overrides: `section.field=value`.
        cluster_path: without it there are no seconds and nothing to fit.
        prompt_tokens: mean length of prompts.
        response_tokens: mean length of responses.

    Raises:
        UsageError: a file, a key or a model that cannot be used, in one sentence.
    """
    start = time.perf_counter()
    config = load_config(TrainConfig, config_path, overrides)
    cluster = load_cluster(cluster_path) if cluster_path else None
    found = find_shape(config.model.path)
    check_shape(config, found.shape, cluster)
    budget = config.rollout.max_response_tokens
    lengths = Lengths(
        prompt_tokens if prompt_tokens is not None else min(PROMPT_TOKENS, config.data.max_prompt_tokens),
        response_tokens if response_tokens is not None else max(1.0, budget / RESPONSE_SHARE),
        budget,
    )
    cost = RunCost(config, found.shape, lengths, cluster)
    cost.refit  # noqa: B018  # the only part that takes long
    return Report(Path(config_path).stem, found.source, Path(cluster_path).stem if cluster_path else "", cost, time.perf_counter() - start)
