"""Layouts cover every tensor, and fused parameters have the order that Megatron and vLLM give them."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import pytest

from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.blocks import Layout, covered, engine_layout, hf_layout, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import ModelShape, hf_tensors
from megatron_r1z.layout.topology import Topology

SHAPE = ModelShape("qwen3", 4, 12, 8, 2, 4, 24, 311, False, True, True, 1e4, None, 1e-6, 128)
LAYOUTS = [
    megatron_layout(SHAPE, Topology(1), 8),
    megatron_layout(SHAPE, Topology(8, tp=2, pp=2, vpp=2), 8),
    megatron_layout(SHAPE, Topology(4, tp=2), 64, spec="te"),
    engine_layout(SHAPE, 2, 1),
    engine_layout(SHAPE, 4, 4),
    hf_layout(SHAPE, 3),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_element_of_every_tensor_is_somewhere(layout: Layout) -> None:
    boxes: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(set)
    for block in layout.blocks:
        boxes[block.tensor].add((block.start, block.size))
    for spec in hf_tensors(SHAPE):
        assert sum(math.prod(size) for _, size in boxes[spec.name]) == spec.numel, spec.name
    assert set(boxes) == {spec.name for spec in hf_tensors(SHAPE)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
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


def test_engines_are_consecutive_ranks_and_data_parallel_copies_are_equal() -> None:
    engine = engine_layout(SHAPE, 4, 2)
    placed = [[block._replace(rank=0) for block in engine.blocks_of(rank)] for rank in range(4)]
    assert placed[0] == placed[2] != placed[1] == placed[3]
    policy = megatron_layout(SHAPE, Topology(4, tp=2), 1)
    placed = [[block._replace(rank=0) for block in policy.blocks_of(rank)] for rank in range(4)]
    assert placed[0] == placed[2] != placed[1] == placed[3]


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
        (lambda: engine_layout(SHAPE, 6, 4), r"engine: num_ranks is 6, which tp 4"),
        (lambda: engine_layout(replace(SHAPE, num_heads=12, num_kv_heads=3, ffn_size=12), 2, 2), r"3 key-value heads can neither .* tp 2"),
        (lambda: engine_layout(replace(SHAPE, num_heads=6, num_kv_heads=3), 3, 3), r"padded vocabulary is 320, which tp 3"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_numbers(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
