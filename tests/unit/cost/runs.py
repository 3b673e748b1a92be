"""Runs and clusters that several tests plan."""

from __future__ import annotations

from typing import Any

from megatron_r1z.config import TrainConfig, make_config
from megatron_r1z.cost.assumptions import DEFAULT
from megatron_r1z.cost.cluster import Cluster, Gpu
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.cost.run_cost import RunCost
from megatron_r1z.layout.families import ModelShape

SHAPE = ModelShape("llama", 8, 256, 8, 4, 32, 512, 5000, False, False, False, 1e4, None, 1e-6, 4096)


def cluster(nodes: int = 1, memory_gib: float = 80.0, gpus_per_node: int = 8, **links: float) -> Cluster:
    gpu = Gpu(name="test", memory_gib=memory_gib, hbm_gbs=3000.0, bf16_tflops=1000.0, fp32_tflops=60.0, fp8_tflops=2000.0)
    speeds = {"node_gbs": 400.0, "network_gbs": 50.0, "host_gbs": 50.0, "host_memory_gib": 1000.0} | links
    return Cluster(gpu=gpu, nodes=nodes, gpus_per_node=gpus_per_node, **speeds)


def config(**sections: dict[str, Any]) -> TrainConfig:
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": "model"},
        "data": {"train": [{"path": "questions.jsonl"}], "max_prompt_tokens": 100},
        "algorithm": {"iterations": 10, "train_batch_size": 64},
        "logging": {"folder": "runs/x"},
        "parallel": {"num_ranks": 8, "micro_batch_tokens": 2048},
        "rollout": {"prompts_per_iteration": 32, "samples_per_prompt": 8, "max_response_tokens": 1000, "kv_cache_bytes": 1 << 30},
        "optimizer": {"distributed": True},
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return make_config(TrainConfig, tree)


def cost(shape: ModelShape = SHAPE, on: Cluster | None = None, response: float = 400.0, **sections: dict[str, Any]) -> RunCost:
    run = config(**sections)
    return RunCost(run, shape, Lengths(50.0, response, run.rollout.max_response_tokens), on or cluster(), DEFAULT)
