"""The cost of a run as one screen of text, and as a tree for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1z.cost.cluster import GIB
from megatron_r1z.cost.memory import Phase, RankMemory
from megatron_r1z.cost.refit_report import in_units
from megatron_r1z.cost.rollout_time import Rollout
from megatron_r1z.cost.run_cost import RunCost
from megatron_r1z.cost.search import changes
from megatron_r1z.layout.families import ModelShape, hf_tensors
from megatron_r1z.layout.plan import Edge
from megatron_r1z.record.tables import align
from megatron_r1z.speed import Choice, choices


@dataclass(frozen=True)
class Report:
    """A run and its cost, under the names that a reader knows them by."""

    name: str
    """The configuration's."""
    model: str
    cluster_name: str
    """Of the file; empty where there is none."""
    cost: RunCost
    planning_s: float

    @property
    def iterations(self) -> int:
        """Length of the run."""
        return self.cost.config.algorithm.iterations

    def to_tree(self) -> dict[str, Any]:
        """The report as JSON has it: bytes and seconds."""
        cost = self.cost
        tree: dict[str, Any] = {
            "name": self.name,
            "model": self.model,
            "cluster": self.cluster_name,
            "parameters": num_parameters(cost.shape),
            "memory": [_memory_tree(rank) for rank in cost.ranks],
            "host_bytes": cost.host_bytes,
            "cache": {
                "bytes": cost.engine.cache_bytes,
                "bytes_per_token": cost.engine.cache_bytes_per_token,
                "tokens": cost.engine.cache_tokens,
                "longest_sequences": cost.engine.concurrent(cost.config.max_model_tokens),
            },
            "speed": {name: {"on": choice.is_on, "why": choice.reason} for name, choice in _speed(cost).items()},
            "refit": [part.to_tree() for part in cost.refit.parts],
            "planning_s": self.planning_s,
        }
        if cost.cluster is not None:
            tree |= {"time": _time_tree(cost, self.iterations), "shortfall": cost.shortfall()}
        return tree


def _speed(cost: RunCost) -> dict[str, Choice]:
    """What the settings for speed come to, on a GPU with all libraries."""
    return choices(*cost.policy.speed, cost.engine_speed)


def num_parameters(shape: ModelShape) -> int:
    """Of the whole model."""
    return sum(spec.numel for spec in hf_tensors(shape))


def _memory_tree(rank: RankMemory) -> dict[str, Any]:
    items = [{"name": item.name, "bytes": item.nbytes, "phase": item.phase.value if item.phase else None} for item in rank.items]
    return {"stage": rank.stage, "items": items, "totals": {phase.value: rank.total(phase) for phase in Phase}}


def _time_tree(cost: RunCost, iterations: int) -> dict[str, Any]:
    time = cost.time
    return {
        "seconds": {name: seconds for name, seconds, _ in _phases(cost)},
        "iteration_s": time.total,
        "tokens_per_gpu_second": cost.tokens_per_gpu_second,
        "mfu": cost.mfu,
        "gpu_hours": gpu_hours(cost, iterations),
    }


def gpu_hours(cost: RunCost, iterations: int) -> float:
    """Of the whole run; evaluations and checkpoints apart."""
    return iterations * cost.time.total * cost.config.parallel.num_ranks / 3600


# --- the terminal ---


def render(report: Report) -> str:
    """One screen."""
    cost = report.cost
    parts = [_title(report), _memory_table(cost), _engine_lines(cost)]
    if cost.cluster is not None:
        parts += [_time_table(cost), _summary(report)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _title(report: Report) -> list[str]:
    cost, config = report.cost, report.cost.config
    parallel, topology = config.parallel, cost.policy.topology
    where = (
        f", {cost.cluster.gpu.name}, {cost.cluster.nodes} x {cost.cluster.gpus_per_node} ({report.cluster_name})" if cost.cluster else ""
    )
    degrees = {"tp": topology.tp, "pp": topology.pp, "vpp": topology.vpp, "cp": topology.cp, "dp": topology.dp}
    split = [f"{name}{size}" for name, size in degrees.items() if size > 1 or name in ("tp", "pp", "dp")]
    policy = [
        " ".join(split),
        *(["sequence parallel"] if parallel.sequence_parallel else []),
        f"recompute {parallel.recompute}",
        f"micro-batches of {parallel.micro_batch_tokens} tokens",
        *(["distributed optimizer"] if config.optimizer.distributed else []),
        *(["offloaded"] if config.optimizer.offload_to_host else []),
    ]
    engines = parallel.num_ranks // config.rollout.tensor_parallel_size
    formats = f"{config.precision.policy} policy, {config.precision.engine} engines"
    return [
        f"{report.name}: {report.model}, {num_parameters(cost.shape) / 1e9:.2f} billion parameters, {parallel.num_ranks} ranks{where}",
        f"policy {', '.join(policy)}; {engines} engines of tp{config.rollout.tensor_parallel_size}; {formats}",
    ]


def _memory_table(cost: RunCost) -> list[str]:
    """The fullest stage; one column per phase."""
    rank = cost.fullest
    names = list(dict.fromkeys(item.name for item in rank.items))
    stage = f" (pipeline stage {rank.stage} of {len(cost.ranks)}, the fullest)" if len(cost.ranks) > 1 else ""
    head = [f"GiB on a rank{stage}", *(phase.value for phase in Phase)]
    rows = [[name, *(_gib(_of(rank, name, phase)) for phase in Phase)] for name in names]
    limit = f" of {cost.cluster.gpu.memory_gib:.1f}" if cost.cluster else ""
    total = [f"total{limit}", *(_gib(rank.total(phase)) for phase in Phase)]
    lines = align([head, *rows, total])
    if cost.host_bytes:
        lines.append(f"host memory of a node, for {cost.host_uses}: {cost.host_bytes / GIB:.0f} GiB")
    return lines


def _of(rank: RankMemory, name: str, phase: Phase) -> int:
    return sum(item.nbytes for item in rank.items if item.name == name and item.phase in (None, phase))


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"


def _engine_lines(cost: RunCost) -> list[str]:
    engine, refit, config = cost.engine, cost.refit, cost.config
    longest, mean = engine.concurrent(config.max_model_tokens), engine.concurrent(cost.lengths.total)
    edges = ", ".join(f"{edge.value} {in_units(refit.nbytes(edge))}" for edge in Edge)
    size = "" if config.rollout.kv_cache_bytes != "auto" else f"auto: {_gib(engine.cache_bytes)} GiB, "
    if size and cost.cluster is None:
        size = f"auto, of which a cluster decides: {_gib(engine.cache_bytes)} GiB, "
    found = _speed(cost)
    off = [f"{name} ({choice.reason})" for name, choice in found.items() if not choice]
    return [
        f"KV cache  {size}{engine.cache_tokens:,} tokens in an engine: {longest} sequences of {config.max_model_tokens} tokens, {mean} of "
        f"{cost.lengths.total:.0f} (at most {engine.rollout.max_concurrent_sequences}: rollout.max_concurrent_sequences)",
        f"refit     {edges}; {refit.num_rounds} rounds",
        f"speed     on: {', '.join(name for name, choice in found.items() if choice) or 'nothing'}",
        *([f"          off: {', '.join(off)}"] if off else []),
    ]


def _phases(cost: RunCost) -> list[tuple[str, float, str]]:
    """Name, seconds, and what they are spent on."""
    time, passes = cost.time, cost.time.passes
    rows = [("rollout", time.rollout.total, _rollout_words(time.rollout))]
    if time.logprobs is not None:
        bubble = time.logprobs.bubble / time.logprobs.total
        rows.append(("log-probs", time.logprobs.total, f"passes over all samples: {cost.logprob_passes}; bubble {bubble:.0%}"))
    spent = _shares(
        passes.total,
        {
            "tensor parallel": passes.tensor_parallel,
            "context parallel": passes.context_parallel,
            "pipeline exchange": passes.exchange,
            "bubble": passes.bubble,
        },
    )
    counts = f"{cost.steps} steps of {cost.update_time.micro_batches} micro-batches"
    return [
        *rows,
        ("update", passes.total, f"{counts}; {spent}"),
        ("gradients", time.gradient_sum, f"summed over data-parallel ranks{_hidden(cost)}"),
        ("optimizer", time.optimizer, "on the host" if cost.config.optimizer.offload_to_host else "in device memory"),
        *([("critic", time.critic, "values of all samples, then the same steps")] if cost.critic else []),
        ("refit", time.refit, "with the digests of both sides"),
    ]


def _hidden(cost: RunCost) -> str:
    """What of it passes does not show."""
    share = 1 - cost.update_time.gradient_sum() / whole if (whole := cost.update_time.whole_gradient_sum()) else 0.0
    return f", {share:.0%} of it during passes" if share >= 0.005 else ""


def _rollout_words(rollout: Rollout) -> str:
    decode = rollout.decode
    names = {
        "weights": decode.weights,
        "KV cache": decode.cache,
        "arithmetic": decode.compute,
        "tensor parallel": decode.tensor_parallel,
        "engine's host": decode.host,
        "prefill": rollout.prefill,
    }
    return f"{rollout.concurrent} sequences at once; {_shares(rollout.total, names)}"


def _shares(total: float, parts: dict[str, float]) -> str:
    """Parts of at least one per cent."""
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items() if seconds >= 0.01 * total) or "arithmetic alone"


def _time_table(cost: RunCost) -> list[str]:
    total = cost.time.total
    lengths = f"{cost.lengths.prompt:.0f} prompt and {cost.lengths.response:.0f} response tokens on average"
    rows = [(name, f"{_digits(seconds)} s", f"{seconds / total:.1%}") for name, seconds, _ in _phases(cost)]
    lines = align([("an iteration", "time", "share"), *rows, ("all", f"{_digits(total)} s", "")])
    words = [f"assumed: {lengths}", *(text for _, _, text in _phases(cost)), ""]
    return [f"{line}  {text}".rstrip() for line, text in zip(lines, words, strict=True)]


def _digits(value: float) -> str:
    """Three significant digits, without an exponent.

    >>> _digits(0.01234), _digits(12.34), _digits(1234.5)
    ('0.0123', '12.3', '1234')
    """
    if value <= 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _summary(report: Report) -> list[str]:
    cost = report.cost
    hours, total = report.iterations * cost.time.total / 3600, f"{gpu_hours(cost, report.iterations):,.0f} GPU-hours"
    rank, limit = cost.fullest, cost.cluster.gpu.memory_gib if cost.cluster else 0.0
    slowest = max(_phases(cost), key=lambda row: row[1])
    return [
        f"throughput  {cost.tokens_per_gpu_second:,.0f} tokens/s/GPU, MFU {cost.mfu:.1%} in the update; "
        f"{report.iterations} iterations take {hours:.1f} h, {total}",
        f"limits      memory: {rank.peak / GIB:.1f} of {limit:.1f} GiB in the {rank.fullest.value} phase, most of it "
        f"{rank.largest(rank.fullest).name}; time: {slowest[0]}, {slowest[1] / cost.time.total:.0%}",
        f"planned in  {report.planning_s:.1f} s; nothing of this was run: docs/plan.md has the model and its checks",
    ]


def refusal(cost: RunCost, near: RunCost | None, ranks: int | None) -> str:
    """One sentence: why it does not fit, and what does."""
    why = cost.shortfall()
    if near is not None:
        return f"{why}; the nearest layout that fits ({near.fullest.peak / GIB:.1f} GiB) is {' '.join(changes(cost.config, near.config))}."
    if ranks is not None and cost.cluster is not None:
        nodes = -(-ranks // cost.cluster.gpus_per_node)
        return f"{why}; no layout fits it, but one of parallel.num_ranks={ranks} on {nodes} such nodes does."
    return f"{why}; no layout fits, whatever the number of ranks: shorten data.max_prompt_tokens or rollout.max_response_tokens."


def render_search(found: Sequence[RunCost], cost: RunCost) -> str:
    """The best layouts as a table, and the overrides that make the first of them."""
    head = (
        "policy",
        "recompute",
        "micro-batch",
        "engines",
        "KV cache",
        "GiB",
        "rollout",
        "update",
        "refit",
        "iteration",
        "tokens/s/GPU",
        "MFU",
    )
    rows = [_search_row(item) for item in found]
    best = " ".join(changes(cost.config, found[0].config)) or "the configuration as it is"
    return "\n".join([*align([head, *rows]), "", f"the first is {best}"])


def _search_row(cost: RunCost) -> tuple[str, ...]:
    config, topology, time = cost.config, cost.policy.topology, cost.time
    more = "".join(f" {name}{size}" for name, size in (("vpp", topology.vpp), ("cp", topology.cp)) if size > 1)
    return (
        f"tp{topology.tp} pp{topology.pp}{more} dp{topology.dp}",
        config.parallel.recompute,
        str(config.parallel.micro_batch_tokens),
        f"{config.parallel.num_ranks // cost.engine.tp} x tp{cost.engine.tp}",
        f"{cost.engine.cache_bytes / GIB:.0f} GiB",
        f"{cost.fullest.peak / GIB:.1f}",
        f"{_digits(time.rollout.total)} s",
        f"{_digits(time.update + time.critic + (time.logprobs.total if time.logprobs else 0.0))} s",
        f"{_digits(time.refit)} s",
        f"{_digits(time.total)} s",
        f"{cost.tokens_per_gpu_second:,.0f}",
        f"{cost.mfu:.1%}",
    )
