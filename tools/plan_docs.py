"""Print what the documentation shows of `megatron-r1z plan`.

    python tools/plan_docs.py configs > docs/configs.md
    python tools/plan_docs.py published          # the table in docs/plan.md, which stands between its marks there

`tests/unit/test_plan_docs.py` compares both with the pages.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from megatron_r1z.config import TrainConfig, make_config
from megatron_r1z.cost.cluster import GIB, Cluster, load_cluster
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.cost.plan_run import PROMPT_TOKENS, plan_run
from megatron_r1z.cost.report import Report, gpu_hours
from megatron_r1z.cost.run_cost import RunCost
from megatron_r1z.layout.known import find_shape
from megatron_r1z.layout.topology import Topology

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "configs" / "clusters"
RESPONSE_TOKENS = 800
"""Mean response in the table of configurations: between the 528 and 1,086 tokens at which the paper's 1.5B runs end."""

INTRODUCTION = f"""\
# Configurations and what they cost

<!-- Written by tools/plan_docs.py; run `python tools/plan_docs.py configs > docs/configs.md`. -->

Every training configuration of `configs/` that is meant for GPUs, as `megatron-r1z plan` sees it on the cluster that it is meant for:
memory of the fullest rank in its fullest phase, seconds of an iteration, and GPU-hours of the run without its evaluations. **None of them
was run.** [plan.md](plan.md) has the model and how far off it is. Assumed are prompts of {PROMPT_TOKENS} tokens and responses of
{RESPONSE_TOKENS} on average.

A file names a `base` and says what differs ([configuration.md](configuration.md)): the paper's runs build on `base/recipe.yaml`, ours on
that by way of `base/large.yaml` and a layout such as `base/70b-h100.yaml`, those in FP8 on the same run in bf16. Qwen2.5-72B has none in
FP8: a tensor-parallel rank's share of its feed-forward size, 29568 / 8, is no multiple of 128. Engines on ranks of their own are not in the
code, so there is no configuration for them.
"""


class Row(NamedTuple):
    """A published figure and the run that it is compared with."""

    name: str
    published: float
    """Tokens per second and GPU."""
    published_s: float
    """Seconds of an iteration (of the whole step for a trainer alone)."""
    cost: RunCost
    update_only: bool
    layout: str


def main() -> None:
    """Print one of the two."""
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    pages = {"configs": configs_page, "published": published_table}
    if what not in pages:
        raise SystemExit(f"usage: python tools/plan_docs.py {' | '.join(pages)}")
    print(pages[what](), end="")


# --- configurations ---


def configs_page() -> str:
    """The whole page."""
    head = "| Configuration | Cluster | Policy | Engines | Memory, GiB | Rollout | Log-probs | Update | Refit | Iteration | GPU-hours |"
    rows = [head, "| --- " * 11 + "|", *(config_row(path) for path in gpu_configs())]
    return INTRODUCTION + "\n" + "\n".join(rows) + "\n"


def gpu_configs() -> list[Path]:
    """Training configurations whose header names a cluster."""
    return [path for path in sorted((ROOT / "configs").glob("*.yaml")) if cluster_of(path) is not None]


def cluster_of(path: Path) -> Path | None:
    """The cluster file that the header of a configuration names."""
    found = re.search(r"configs/clusters/([\w.-]+\.yaml)", path.read_text(encoding="utf-8"))
    return None if found is None else CLUSTERS / found[1]


@cache
def planned(path: Path) -> Report:
    """A configuration on the cluster that it is meant for."""
    return plan_run(str(path), (), str(cluster_of(path)), response_tokens=RESPONSE_TOKENS)


def config_row(path: Path) -> str:
    """One row of the table."""
    report = planned(path)
    cost, parallel = report.cost, report.cost.config.parallel
    time, gpu = cost.time, cost.cluster.gpu if cost.cluster else None
    cells = [
        f"[{path.stem}](../configs/{path.name})",
        report.cluster_name,
        f"{in_words(parallel.topology)}, recompute {parallel.recompute}",
        f"{parallel.num_ranks // cost.engine.tp} x tp{cost.engine.tp}",
        f"{cost.fullest.peak / GIB:.0f} of {gpu.memory_gib:.0f}, {cost.fullest.fullest.value}" if gpu else "",
        f"{time.rollout.total:.0f} s",
        f"{time.logprobs.total:.0f} s" if time.logprobs else "-",
        f"{time.update:.0f} s",
        f"{time.refit:.2f} s",
        f"{time.total:.0f} s",
        f"{gpu_hours(cost, report.iterations):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def in_words(topology: Topology) -> str:
    """Degrees that are not 1."""
    degrees = {"tp": topology.tp, "pp": topology.pp, "vpp": topology.vpp, "dp": topology.dp}
    return " ".join(f"{name}{size}" for name, size in degrees.items() if size > 1)


# --- published figures ---

NEMO = "NeMo-RL v0.5, GRPO on policy"


def published_rows() -> list[Row]:
    """The dense rows that have an equivalent here, with the settings of their recipes and no assumption changed for any of them."""
    h100 = load_cluster(CLUSTERS / "h100-8.yaml")
    two, four = (dataclasses.replace(h100, nodes=nodes) for nodes in (2, 4))
    small = {"pipeline_parallel_size": 2, "recompute": "full"}
    large = {"tensor_parallel_size": 4, "pipeline_parallel_size": 4, "sequence_parallel": True}
    return [
        nemo("Llama-3.1-8B", "16 H100", 1581, 92.8, two, small, engine=1, cache_gib=28, lengths=(127, 1019)),
        nemo("Qwen3-32B", "32 H100", 571, 376, four, large, engine=4, cache_gib=26, lengths=(104, 3251)),
        nemo("Llama-3.1-8B", "8 GB200", 3359, 91.0, gb200(8), {"recompute": "full"}, engine=1, cache_gib=86, lengths=(128, 1066)),
        nemo("Qwen3-32B", "16 GB200", 1127, 381, gb200(16), large | {"tensor_parallel_size": 2, "pipeline_parallel_size": 1}, engine=1,
             cache_gib=42, lengths=(101, 3253)),
        trainer(),
    ]  # fmt: skip


def gb200(gpus: int) -> Cluster:
    """Part of an NVL72 domain, in which all links are NVLink's: a B200 at 1,200 W (2,500 TFLOPS, 8 TB/s, 186 GB)."""
    base = load_cluster(CLUSTERS / "b200-8.yaml")
    gpu = dataclasses.replace(base.gpu, name="GB200", memory_gib=173.0, hbm_gbs=8000.0, bf16_tflops=2500.0, fp8_tflops=5000.0)
    return dataclasses.replace(base, gpu=gpu, gpus_per_node=gpus)


def nemo(
    model: str,
    gpus: str,
    published: float,
    seconds: float,
    cluster: Cluster,
    parallel: dict[str, object],
    *,
    engine: int,
    cache_gib: int,
    lengths: tuple[float, float],
) -> Row:
    """64 prompts x 32 samples, 4 steps of 512, sequences of at most 4096 tokens, packed. Lengths: mean prompt and response."""
    ranks = int(gpus.split()[0])
    config = run(
        model,
        {"num_ranks": ranks, "micro_batch_tokens": 4096, **parallel},
        {
            **{"prompts_per_iteration": 64, "samples_per_prompt": 32, "max_response_tokens": 4096, "tensor_parallel_size": engine},
            **{"kv_cache_bytes": cache_gib * GIB, "max_concurrent_sequences": 1024},
        },
        train_batch_size=512,
    )
    cost = RunCost(config, find_shape(model).shape, Lengths(*lengths, 4096), cluster)
    layout = f"{in_words(config.parallel.topology)}, engines tp{engine}, recompute {config.parallel.recompute}"
    return Row(f"{NEMO}: {model}, {gpus}", published, seconds, cost, update_only=False, layout=layout)


def trainer() -> Row:
    """prime-rl's trainer alone: one sequence of 65,536 tokens on each GPU, all parameters, recomputation."""
    config = run(
        "Qwen3-4B",
        {"num_ranks": 8, "micro_batch_tokens": 65536, "recompute": "full"},
        {"prompts_per_iteration": 4, "samples_per_prompt": 2, "max_response_tokens": 65535, "kv_cache_bytes": 40 * GIB},
        train_batch_size=8,
    )
    cluster = load_cluster(CLUSTERS / "h200-8.yaml")
    cost = RunCost(config, find_shape("Qwen3-4B").shape, Lengths(1, 65535, 65535), cluster)
    tokens_per_s = 29_500.0
    return Row("prime-rl, trainer alone: Qwen3-4B, 8 H200", tokens_per_s / 8, 8 * 65536 / tokens_per_s, cost, True, "dp8, recompute full")


def run(model: str, parallel: dict[str, object], rollout: dict[str, object], train_batch_size: int) -> TrainConfig:
    """A run of one model."""
    tree = {
        "model": {"path": model},
        "data": {"train": [{"path": "questions.jsonl"}], "max_prompt_tokens": 512},
        "algorithm": {"iterations": 1, "train_batch_size": train_batch_size},
        "logging": {"folder": "runs/published"},
        "parallel": parallel,
        "rollout": rollout,
        "optimizer": {"distributed": True},
    }
    return make_config(TrainConfig, tree)


def published_table() -> str:
    """Predicted over published, one row each."""
    columns = ("Published", "Layout", "tokens/s/GPU", "predicted", "ratio", "Seconds", "predicted", "of these rollout, log-probs, update")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in published_rows():
        time = row.cost.time
        seconds = time.update if row.update_only else time.total
        speed = row.cost.tokens / seconds / row.cost.config.parallel.num_ranks
        parts = f"{time.rollout.total:.0f}, {time.logprobs.total:.0f}, {time.update:.0f}" if time.logprobs else "update alone"
        cells = [row.name, row.layout, f"{row.published:,.0f}", f"{speed:,.0f}", f"{speed / row.published:.2f}"]
        lines.append(f"| {' | '.join([*cells, f'{row.published_s:.1f}', f'{seconds:.1f}', parts])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
