"""What the cost model assumes beyond the vendor's numbers, in one place. None of it is fitted to a run; docs/plan.md compares with runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares of peaks that are reached, and what is spent beside the model."""

    compute_share: float = 0.5
    """Of the peak, by the kernels of a forward or backward pass on long packed sequences, element-wise ones and idle gaps included,
    communication and pipeline bubbles apart. Megatron-LM reports 41 to 48 % with those included, for large models on H100 (its README,
    "Training Speed and Scalability")."""
    decode_compute_share: float = 0.4
    """Of the peak, by the matrix products of a decode step once it has so many sequences that memory no longer bounds it."""
    memory_share: float = 0.7
    """Of a device's memory bandwidth, by reads of weights and of the key-value cache, and by the optimizer."""
    link_share: float = 0.7
    """Of a link's bandwidth, by collectives and transfers of many megabytes."""
    small_collective_us: float = 15.0
    """One all-reduce of a decode step, whose few kilobytes take no time of their own."""
    engine_step_us: float = 2000.0
    """Host work of an engine for one decode step, whatever the number of sequences."""
    engine_sequence_us: float = 50.0
    """Host work for each sequence of a decode step (scheduling, log-probs, detokenisation), in the rank's own process and so not hidden.
    vLLM 0.32 took 90 on one core of a 2-core machine (a model of one layer, hidden size 128); a server's core is assumed about twice as
    fast."""
    host_optimizer_ns: float = 30.0
    """One parameter's AdamW step on the host with torch's unfused operations, all ranks of a node at once sharing its memory bandwidth."""
    eager_layer_us: float = 60.0
    """One layer's kernels of a decode step that are launched one by one, where the engine has no CUDA graphs."""
    cuda_graphs_gib: float = 1.0
    """Of a device's memory, for vLLM's CUDA graphs, captured for up to 512 sequences."""
    reserved_gib: float = 3.0
    """Of a device's memory, for the CUDA context, NCCL's buffers and holes in the allocator."""


DEFAULT = Assumptions()
