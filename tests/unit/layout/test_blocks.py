"""Layouts cover every tensor, and fused parameters have the order that Megatron and vLLM give them."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import pytest

from megatron_r1z.errors import UsageError
from megatron_r1z.layout.blocks import Layout, covered, engine_layout, hf_layout, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import ModelShape, hf_tensors
from megatron_r1z.layout.topology import Topology

SHAPE = ModelShape("qwen3", 4, 12, 8, 2, 4, 24, 311, False, True, True, 1e4, None, 1e-6, 128)
MIXTURE = replace(SHAPE, family="mixtral", qk_norm=False, num_experts=4, experts_per_token=2)
LAYOUTS = [
    megatron_layout(SHAPE, Topology(1), 8),
    megatron_layout(SHAPE, Topology(8, tp=2, pp=2, vpp=2), 8),
    megatron_layout(SHAPE, Topology(4, tp=2), 64, spec="te"),
    engine_layout(SHAPE, 2, 1),
    engine_layout(SHAPE, 4, 4),
    hf_layout(SHAPE, 3),
]
MIXTURE_LAYOUTS = [
    megatron_layout(MIXTURE, Topology(8, tp=2, pp=2, ep=2, etp=1), 8),
    megatron_layout(MIXTURE, Topology(8, ep=2, etp=4), 8, spec="te"),
    engine_layout(MIXTURE, 4, 2, first_rank=8),
]
CASES = [*((SHAPE, layout) for layout in LAYOUTS), *((MIXTURE, layout) for layout in MIXTURE_LAYOUTS)]


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=lambda value: value.name if isinstance(value, Layout) else value.family)
def test_every_element_of_every_tensor_is_somewhere(shape: ModelShape, layout: Layout) -> None:
    boxes: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(set)
    for block in layout.blocks:
        boxes[block.tensor].add((block.start, block.size))
    for spec in hf_tensors(shape):
        assert sum(math.prod(size) for _, size in boxes[spec.name]) == spec.numel, spec.name
    assert set(boxes) == {spec.name for spec in hf_tensors(shape)}


@pytest.mark.parametrize("layout", LAYOUTS + MIXTURE_LAYOUTS, ids=lambda layout: layout.name)
def test_blocks_lie_inside_their_parameter_and_only_the_vocabulary_has_padding(layout: Layout) -> None:
    for rank, parameters in layout.parameters.items():
        blocks = layout.blocks_of(rank)
        for block in blocks:
            ends = [first + count for first, count in zip(block.local_start, block.size, strict=True)]
            assert all(end <= size for end, size in zip(ends, parameters[block.parameter], strict=True))
        filled = covered(blocks)
        padded = {name for name, size in parameters.items() if filled.get(name, 0) != math.prod(size)}
        assert all("embed" in name or name.endswith(("output_layer.weight", "lm_head.weight")) for name in padded)


def rows(layout: Layout, rank: int, parameter: str) -> list[tuple[str, int, int]]:
    """Tensor, first row and number of rows, in the order in which they lie."""
    blocks = sorted((block for block in layout.blocks_of(rank) if block.parameter == parameter), key=lambda block: block.local_start)
    return [(block.tensor.split(".")[-2], block.start[0], block.size[0]) for block in blocks]


def test_megatron_interleaves_per_group() -> None:
    one, two = megatron_layout(SHAPE, Topology(1), 1), megatron_layout(SHAPE, Topology(2, tp=2), 1)
    name = "chunks.0.decoder.layers.0.self_attention.linear_qkv.weight"
    first, second = (
        [("q_proj", 0, 16), ("k_proj", 0, 4), ("v_proj", 0, 4)],
        [("q_proj", 16, 16), ("k_proj", 4, 4), ("v_proj", 4, 4)],
    )
    assert rows(one, 0, name) == first + second
    assert [rows(two, rank, name) for rank in (0, 1)] == [first, second]
    assert rows(two, 1, "chunks.0.decoder.layers.3.mlp.linear_fc1.weight") == [("gate_proj", 12, 12), ("up_proj", 12, 12)]


def test_vllm_stacks_and_copies_key_value_heads() -> None:
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert rows(engine_layout(SHAPE, 1, 1), 0, name) == [("q_proj", 0, 32), ("k_proj", 0, 8), ("v_proj", 0, 8)]
    four = engine_layout(SHAPE, 4, 4)
    assert [rows(four, rank, name) for rank in range(4)] == [
        [("q_proj", 0, 8), ("k_proj", 0, 4), ("v_proj", 0, 4)],
        [("q_proj", 8, 8), ("k_proj", 0, 4), ("v_proj", 0, 4)],
        [("q_proj", 16, 8), ("k_proj", 4, 4), ("v_proj", 4, 4)],
        [("q_proj", 24, 8), ("k_proj", 4, 4), ("v_proj", 4, 4)],
    ]


def test_padding_of_the_vocabulary() -> None:
    assert [padded_vocab_size(size, 64) for size in (1, 64, 65)] == [64, 64, 128]
    engine = engine_layout(SHAPE, 2, 2)
    assert engine.parameters[1]["model.embed_tokens.weight"] == (160, 12)
    assert rows(engine, 1, "model.embed_tokens.weight") == [("embed_tokens", 160, 151)]
    policy = megatron_layout(replace(SHAPE, vocab_size=65), Topology(2, tp=2), 64)
    assert policy.parameters[1]["chunks.0.output_layer.weight"] == (64, 12)
    assert rows(policy, 1, "chunks.0.output_layer.weight") == [("lm_head", 64, 1)]
    tiny = megatron_layout(replace(SHAPE, vocab_size=5), Topology(2, tp=2), 64)
    assert rows(tiny, 1, "chunks.0.output_layer.weight") == []


def test_a_tied_output_layer_is_a_second_copy_only_across_pipeline_stages() -> None:
    tied = replace(SHAPE, tied_embeddings=True)
    assert "chunks.0.output_layer.weight" not in megatron_layout(tied, Topology(1), 1).parameters[0]
    split = megatron_layout(tied, Topology(2, pp=2, vpp=2), 1)
    assert rows(split, 0, "chunks.0.embedding.word_embeddings.weight") == rows(split, 1, "chunks.1.output_layer.weight")
    assert not {"chunks.0.output_layer.weight", "chunks.1.output_layer.weight"} & set(split.parameters[0])
    assert "lm_head.weight" not in engine_layout(tied, 1, 1).parameters[0]


def test_transformer_engine_names() -> None:
    local, fused = (megatron_layout(SHAPE, Topology(1), 1, spec=spec).parameters[0] for spec in ("local", "te"))
    prefix = "chunks.0.decoder.layers.0."
    assert set(fused) - set(local) >= {f"{prefix}self_attention.linear_qkv.layer_norm_weight", f"{prefix}mlp.linear_fc1.layer_norm_weight"}
    assert set(local) - set(fused) >= {f"{prefix}input_layernorm.weight", f"{prefix}pre_mlp_layernorm.weight"}


def experts(layout: Layout, rank: int) -> dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Tensor, start and size of what lies in the first layer's experts of a rank, by the end of the parameter's name."""
    found: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)
    for block in layout.blocks_of(rank):
        if ".layers.0." in block.parameter and ".experts." in block.parameter:
            tensor = block.tensor.partition(".experts.")[2].removesuffix(".weight")
            found[block.parameter.partition(".experts.")[2]].append((tensor, block.start, block.size))
    return found


def test_experts_are_spread_and_split() -> None:
    policy = megatron_layout(MIXTURE, Topology(4, tp=2, ep=2, etp=2), 8)
    name = "chunks.0.decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
    assert policy.parameters[3][name] == (24, 12)
    assert experts(policy, 3) == {
        "local_experts.0.linear_fc1.weight": [("2.w1", (12, 0), (12, 12)), ("2.w3", (12, 0), (12, 12))],
        "local_experts.0.linear_fc2.weight": [("2.w2", (0, 12), (12, 12))],
        "local_experts.1.linear_fc1.weight": [("3.w1", (12, 0), (12, 12)), ("3.w3", (12, 0), (12, 12))],
        "local_experts.1.linear_fc2.weight": [("3.w2", (0, 12), (12, 12))],
    }
    assert list(experts(megatron_layout(MIXTURE, Topology(4, ep=4), 8, spec="te"), 1)) == ["linear_fc1.weight0", "linear_fc2.weight0"]


def test_the_norm_before_experts_is_not_fused() -> None:
    fused = megatron_layout(MIXTURE, Topology(1), 1, spec="te").parameters[0]
    assert {name for name in fused if "layers.0" in name and "norm" in name} == {
        "chunks.0.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "chunks.0.decoder.layers.0.pre_mlp_layernorm.weight",
    }


def test_vllm_stacks_experts() -> None:
    engine = engine_layout(MIXTURE, 2, 2)
    prefix = "model.layers.0.block_sparse_moe.experts.routed_experts."
    assert engine.parameters[1][f"{prefix}w13_weight"] == (4 * 2 * 12, 12)
    assert engine.parameters[1][f"{prefix}w2_weight"] == (4 * 12, 12)
    starts = [block.local_start for block in engine.blocks_of(1) if block.parameter == f"{prefix}w2_weight"]
    assert starts == [(0, 0), (12, 0), (24, 0), (36, 0)]
    assert experts(engine, 1)["routed_experts.w13_weight"][2:4] == [("1.w1", (12, 0), (12, 12)), ("1.w3", (12, 0), (12, 12))]
    assert "model.layers.0.block_sparse_moe.gate.weight" in engine.parameters[0]


def test_engines_can_have_ranks_of_their_own() -> None:
    here, there = engine_layout(SHAPE, 4, 2), engine_layout(SHAPE, 4, 2, first_rank=6)
    assert set(there.parameters) == {6, 7, 8, 9}
    assert there.blocks == tuple(block._replace(rank=block.rank + 6) for block in here.blocks)


def test_engines_are_consecutive_ranks_and_data_parallel_copies_are_equal() -> None:
    engine = engine_layout(SHAPE, 4, 2)
    placed = [[block._replace(rank=0) for block in engine.blocks_of(rank)] for rank in range(4)]
    assert placed[0] == placed[2] != placed[1] == placed[3]
    policy = megatron_layout(SHAPE, Topology(4, tp=2), 1)
    placed = [[block._replace(rank=0) for block in policy.blocks_of(rank)] for rank in range(4)]
    assert placed[0] == placed[2] != placed[1] == placed[3]


@pytest.mark.parametrize("shape", [SHAPE, MIXTURE], ids=["dense", "mixture"])
def test_context_parallel_ranks_hold_what_data_parallel_ranks_do(shape: ModelShape) -> None:
    by_data = megatron_layout(shape, Topology(16, tp=2, pp=2), 1)
    by_context = megatron_layout(shape, Topology(16, tp=2, pp=2, cp=4), 1)
    assert by_context == by_data
    assert all(by_context.parameters[rank] is by_context.parameters[rank % 2 + rank // 8 * 8] for rank in range(16))


def test_writers_are_balanced() -> None:
    layout = hf_layout(SHAPE, 3)
    sizes = [sum(covered(layout.blocks_of(writer)).values()) for writer in range(3)]
    assert max(sizes) - min(sizes) <= max(spec.numel for spec in hf_tensors(SHAPE))


def test_more_writers_than_tensors() -> None:
    small = replace(SHAPE, num_layers=1, qkv_bias=False, qk_norm=False, tied_embeddings=True)
    assert len(hf_layout(small, 100).blocks) == len(hf_tensors(small))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: megatron_layout(SHAPE, Topology(3, tp=3), 1), r"policy: num_heads is 8, which tp 3 does not divide; tp 2 does"),
        (lambda: megatron_layout(SHAPE, Topology(4, tp=4), 1), r"policy: num_kv_heads is 2, which tp 4 does not divide; tp 2 does"),
        (lambda: megatron_layout(MIXTURE, Topology(3, ep=3), 1), r"policy: num_experts is 4, which ep 3 does not divide; ep 2 does"),
        (lambda: megatron_layout(MIXTURE, Topology(5, etp=5), 1), r"policy: ffn_size is 24, which etp 5 does not divide; etp 4 does"),
        (lambda: megatron_layout(SHAPE, Topology(2, ep=2), 1), r"policy: ep is 2, but the model has no experts"),
        (lambda: replace(SHAPE, num_experts=4), r"a qwen3 model has no experts"),
        (lambda: engine_layout(SHAPE, 6, 4), r"engine: num_ranks is 6, which tp 4"),
        (lambda: engine_layout(replace(SHAPE, num_heads=12, num_kv_heads=3, ffn_size=12), 2, 2), r"3 key-value heads can neither .* tp 2"),
        (lambda: engine_layout(replace(SHAPE, num_heads=6, num_kv_heads=3), 3, 3), r"padded vocabulary is 320, which tp 3"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_numbers(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()  # type: ignore[operator]
