"""Names and shapes in the layouts are those of megatron-core's and vLLM's own models; experts of transformers load bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_r1z.layout.blocks import engine_layout, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import FAMILIES, Family, ModelShape, load_shape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.weights.export import load_hf_weights

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("families_worker.py")
NUM_RANKS = 4
VOCAB_MULTIPLE = 8
SHAPE = ModelShape("qwen3", 4, 16, 8, 4, 8, 24, 70, False, False, True, 1e4, None, 1e-6, 64)
MIXTURE = replace(SHAPE, family="qwen3_moe", num_experts=4, experts_per_token=2)
UNEVEN = replace(SHAPE, num_layers=7)

BASE = {
    **{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"intermediate_size": 128, "vocab_size": 311, "max_position_embeddings": 64, "tie_word_embeddings": False},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}
MODELS = {
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **{"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 64, "norm_topk_prob": True},
    },
    "seed_oss": {"architectures": ["SeedOssForCausalLM"]},
}
"""What `config.json` has beside BASE; the last is the example of docs/add-a-family.md. A rank's share of an expert is a multiple of 32, to
which vLLM's CPU kernels would pad it after loading."""


# ------------------------------------------------------------------------------------------------------------------- megatron-core


CASES: dict[str, tuple[ModelShape, Topology, dict[str, Any]]] = {
    "tp4": (MIXTURE, Topology(NUM_RANKS, tp=4), {}),
    "ep4": (MIXTURE, Topology(NUM_RANKS, ep=4), {}),
    "tp2-ep2": (MIXTURE, Topology(NUM_RANKS, tp=2, ep=2), {}),
    "tp2-ep4-etp1": (MIXTURE, Topology(NUM_RANKS, tp=2, ep=4, etp=1), {}),
    "tp4-ep2-etp1": (MIXTURE, Topology(NUM_RANKS, tp=4, ep=2, etp=1), {}),
    "etp2": (MIXTURE, Topology(NUM_RANKS, ep=2, etp=2), {}),
    "pp2-ep2": (MIXTURE, Topology(NUM_RANKS, pp=2, ep=2), {}),
    "pp2-vpp2-tp2-ep2-etp1": (MIXTURE, Topology(NUM_RANKS, tp=2, pp=2, vpp=2, ep=2, etp=1), {}),
    "cp4": (SHAPE, Topology(NUM_RANKS, cp=4), {}),
    "tp2-cp2": (SHAPE, Topology(NUM_RANKS, tp=2, cp=2), {}),
    "cp2-dp2": (SHAPE, Topology(NUM_RANKS, cp=2), {}),
    "pp2-cp2": (SHAPE, Topology(NUM_RANKS, pp=2, cp=2), {}),
    "tp2-cp2-ep4-etp1": (MIXTURE, Topology(NUM_RANKS, tp=2, cp=2, ep=4, etp=1), {}),
    "first-stage": (
        UNEVEN,
        Topology(NUM_RANKS, pp=4, chunk_layers=(1, 2, 2, 2)),
        {"num_layers_in_first_pipeline_stage": 1},
    ),
    "both-ends": (
        UNEVEN,
        Topology(NUM_RANKS, pp=4, chunk_layers=(1, 2, 2, 2)),
        {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 2},
    ),
    "last-of-two": (UNEVEN, Topology(NUM_RANKS, tp=2, pp=2, chunk_layers=(4, 3)), {"num_layers_in_last_pipeline_stage": 3}),
    "virtual-ends": (
        replace(SHAPE, num_layers=10),
        Topology(NUM_RANKS, pp=4, vpp=2, chunk_layers=(1, 1, 1, 2) * 2),
        {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 4},
    ),
    "layout": (
        UNEVEN,
        Topology(NUM_RANKS, tp=2, pp=2, vpp=2, chunk_layers=(1, 2, 3, 1)),
        {"pipeline_model_parallel_layout": "Et|tt|ttt|tL"},
    ),
    "layout-mixture": (
        replace(MIXTURE, num_layers=7),
        Topology(NUM_RANKS, pp=4, chunk_layers=(2, 3, 1, 1)),
        {"pipeline_model_parallel_layout": "Ett|ttt|t|tL"},
    ),
}


def task(shape: ModelShape, topology: Topology, uneven: dict[str, Any]) -> dict[str, Any]:
    """What the worker builds, in megatron-core's words."""
    sizes = {
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "virtual_pipeline_model_parallel_size": topology.vpp if topology.vpp > 1 else None,
        "context_parallel_size": topology.cp,
        "expert_model_parallel_size": topology.ep,
        "expert_tensor_parallel_size": topology.expert_tp,
    }
    experts = {
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.ffn_size,
        "moe_grouped_gemm": False,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",  # that of alltoall makes a CUDA stream when it is built
    }
    config = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "qk_layernorm": shape.qk_norm,
        "sequence_parallel": topology.tp > 1,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        **(experts if shape.num_experts else {}),
    }
    return {
        "parallel": sizes,
        "config": config | {name: size for name, size in sizes.items() if size} | uneven,
        "vocab_size": padded_vocab_size(shape.vocab_size, VOCAB_MULTIPLE * topology.tp),
        "tied": shape.tied_embeddings,
    }


@pytest.fixture(scope="module")
def policies(torchrun: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What megatron-core built, by case and rank."""
    folder = tmp_path_factory.mktemp("policies")
    (folder / "tasks.json").write_text(json.dumps([task(*case) for case in CASES.values()]))
    torchrun(NUM_RANKS, WORKER, "megatron", folder)
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    return {name: [described[number] for described in ranks] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_the_policy_s_parameters_are_those_of_megatron_core(policies: dict[str, list[dict[str, Any]]], case: str) -> None:
    shape, topology, _ = CASES[case]
    layout = megatron_layout(shape, topology, VOCAB_MULTIPLE)
    for rank, built in enumerate(policies[case]):
        found = {
            f"chunks.{stage}.{name}": tuple(size)
            for stage, parameters in enumerate(built["parameters"])
            for name, size in parameters.items()
        }
        assert found == layout.parameters[rank], f"rank {rank}"


@pytest.mark.parametrize("case", CASES)
def test_ranks_layers_and_experts_are_where_megatron_core_has_them(policies: dict[str, list[dict[str, Any]]], case: str) -> None:
    shape, topology, _ = CASES[case]
    for rank, built in enumerate(policies[case]):
        expert = topology.expert_coordinates(rank)
        chunks = topology.chunks(shape.num_layers, topology.coordinates(rank).pp_rank)
        count = shape.num_experts // topology.ep
        assert built["coordinates"] == list(topology.coordinates(rank))
        assert built["expert_coordinates"] == list(expert)
        assert built["layers"] == [[chunk.layers.start, len(chunk.layers)] for chunk in chunks]
        assert built["experts"] == [list(range(expert.ep_rank * count, (expert.ep_rank + 1) * count))]


# ---------------------------------------------------------------------------------------------------------------------------- vLLM


def write_model(folder: Path, family: str) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": family, **BASE, **MODELS[family]}))
    return folder


@pytest.mark.parametrize(("family", "tp"), [*((family, 1) for family in MODELS), ("mixtral", 2), ("qwen3_moe", 2)])
def test_the_engine_s_parameters_are_those_of_vllm(
    torchrun: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tp: int
) -> None:
    if family not in FAMILIES:
        page = (Path(__file__).parents[2] / "docs" / "add-a-family.md").read_text(encoding="utf-8")
        row = eval(f"{{{page.partition('```python')[2].partition('```')[0]}}}", {"Family": Family})
        monkeypatch.setitem(FAMILIES, family, row[family])  # type: ignore[arg-type]  # a dict, declared read-only
    torchrun(tp, WORKER, "vllm", write_model(tmp_path, family))
    layout = engine_layout(load_shape(tmp_path), tp, tp)
    for rank in range(tp):
        found = {name: tuple(size) for name, size in json.loads((tmp_path / f"rank_{rank}.json").read_text()).items()}
        assert found == layout.parameters[rank], f"rank {rank}"


# -------------------------------------------------------------------------------------------------------------------- transformers


def loaded(folder: Path, shape: ModelShape, topology: Topology, rank: int) -> dict[str, Tensor]:
    layout = megatron_layout(shape, topology, VOCAB_MULTIPLE)
    parameters = {name: torch.full(size, torch.nan) for name, size in layout.parameters[rank].items()}
    load_hf_weights(folder, shape, layout, rank, parameters)
    return parameters


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_of_transformers_load_bit_for_bit(tmp_path: Path, family: str) -> None:
    """The reference is the model in memory, which has a layer's experts stacked: [experts, gate and up, hidden], [experts, hidden, ffn]."""
    config = transformers.AutoConfig.from_pretrained(write_model(tmp_path, family))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    shape, topology = load_shape(tmp_path), Topology(4, tp=2, ep=2, etp=2)
    assert shape.num_experts == 4
    for rank in range(topology.num_ranks):
        etp_rank, ep_rank, _ = topology.expert_coordinates(rank)
        parameters = loaded(tmp_path, shape, topology, rank)
        for number, layer in enumerate(model.model.layers):
            prefix = f"chunks.0.decoder.layers.{number}.mlp"
            assert torch.equal(parameters[f"{prefix}.router.weight"], layer.mlp.gate.weight)
            for local in range(2):
                expert = f"{prefix}.experts.local_experts.{local}"
                gate, up = (half.chunk(2)[etp_rank] for half in layer.mlp.experts.gate_up_proj[2 * ep_rank + local].chunk(2))
                down = layer.mlp.experts.down_proj[2 * ep_rank + local].chunk(2, dim=1)[etp_rank]
                assert torch.equal(parameters[f"{expert}.linear_fc1.weight"], torch.cat([gate, up]))
                assert torch.equal(parameters[f"{expert}.linear_fc2.weight"], down)
