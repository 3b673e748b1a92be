"""Hugging Face folders in and out, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_r1z.errors import DataError
from megatron_r1z.export import load_hf_weights, locate_tensors, make_shards, save_hf
from megatron_r1z.layout.blocks import Layout, engine_layout, hf_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, hf_tensors, load_shape
from megatron_r1z.layout.topology import Topology

FAMILIES = [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False), ("mistral", False)]


def make_model(folder: Path, family: str, tied: bool, **options: object) -> ModelShape:
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=70,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        sliding_window=None,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, **options)
    return load_shape(folder)


def empty(layout: Layout, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.full(size, 7.0, dtype=dtype) for name, size in layout.parameters[rank].items()}


def loaded(folder: Path, shape: ModelShape, layout: Layout, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    parameters = empty(layout, rank, dtype)
    load_hf_weights(folder, shape, layout, rank, parameters)
    return parameters


def reassembled(shape: ModelShape, layout: Layout, ranks: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Checkpoint tensors out of every rank's parameters; copies of the same element must agree."""
    tensors = {spec.name: torch.full(spec.shape, torch.nan) for spec in hf_tensors(shape)}
    for block in layout.blocks:
        here = tuple(slice(first, first + count) for first, count in zip(block.local_start, block.size, strict=True))
        there = tuple(slice(first, first + count) for first, count in zip(block.start, block.size, strict=True))
        value, known = ranks[block.rank][block.parameter][here], tensors[block.tensor][there]
        assert torch.equal(torch.where(known.isnan(), value, known), value)
        known.copy_(value)
    return tensors


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_round_trip_through_one_rank(tmp_path: Path, family: str, tied: bool) -> None:
    shape = make_model(tmp_path / "model", family, tied)
    layout = megatron_layout(shape, Topology(1), 64)
    save_hf(tmp_path / "out", tmp_path / "model", shape, layout, loaded(tmp_path / "model", shape, layout, 0), 0, 1, torch.float32)
    before, after = load_file(tmp_path / "model" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    tokens = torch.arange(20)[None]
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("model", "out")]
    assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_every_layout_of_many_ranks_holds_the_checkpoint(tmp_path: Path, family: str, tied: bool) -> None:
    shape = make_model(tmp_path / "model", family, tied, max_shard_size="20KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    expected = {name: load_file(path)[name] for name, path in locate_tensors(tmp_path / "model").items()}
    for layout in (
        megatron_layout(shape, Topology(4, tp=2, pp=2, vpp=2), 64),
        megatron_layout(shape, Topology(4, tp=2), 8, spec="te"),
        engine_layout(shape, 4, 4),
        hf_layout(shape, 3),
    ):
        ranks = {rank: loaded(tmp_path / "model", shape, layout, rank) for rank in layout.parameters}
        found = reassembled(shape, layout, ranks)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), layout.name


def test_padding_becomes_zero(tmp_path: Path) -> None:
    shape = make_model(tmp_path, "llama", False)
    parameters = loaded(tmp_path, shape, megatron_layout(shape, Topology(1), 64), 0)
    assert torch.equal(parameters["chunks.0.output_layer.weight"][70:], torch.zeros(58, 32))
    assert parameters["chunks.0.embedding.word_embeddings.weight"][:70].count_nonzero() > 0


def test_number_formats(tmp_path: Path) -> None:
    shape = make_model(tmp_path / "model", "qwen2", False)
    layout = megatron_layout(shape, Topology(1), 64)
    weights = loaded(tmp_path / "model", shape, layout, 0, torch.bfloat16)
    save_hf(tmp_path / "out", tmp_path / "model", shape, layout, weights, 0, 1, torch.bfloat16)
    before, after = load_file(tmp_path / "model" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_companions_and_replacement(tmp_path: Path) -> None:
    shape = make_model(tmp_path / "model", "llama", False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "optimizer.pt"):
        (tmp_path / "model" / name).write_text(name)
    layout = megatron_layout(shape, Topology(1), 64)
    weights = loaded(tmp_path / "model", shape, layout, 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").touch()
    (tmp_path / "out.partial").mkdir()
    save_hf(tmp_path / "out", tmp_path / "model", shape, layout, weights, 0, 1, torch.float32)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_shards_are_bounded_and_complete(tmp_path: Path) -> None:
    shape = make_model(tmp_path, "llama", False)
    sizes = {spec.name: spec.numel * 2 for spec in hf_tensors(shape)}
    shards = make_shards(hf_layout(shape, 3), 2, 5000)
    assert sorted(name for shard in shards for name in shard.tensors) == sorted(sizes)
    assert all(sum(sizes[name] for name in shard.tensors) <= 5000 for shard in shards)
    assert [shard.file for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert [shard.file for shard in make_shards(hf_layout(shape, 1), 2, 10**9)] == ["model.safetensors"]


def drop_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")


def widen_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(33)
    save_file(tensors, folder / "model.safetensors")


def lie_in_index(folder: Path) -> None:
    drop_head(folder)
    names = [*load_file(folder / "model.safetensors"), "lm_head.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_head, r"has no tensor lm_head.weight, which chunks.0.output_layer.weight of rank 0 needs"),
        (widen_norm, r"model.norm.weight has shape \[33\]; config.json says \[32\]"),
        (lie_in_index, r"has no tensor lm_head.weight, though the index says so"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"neither model.safetensors nor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), r"cannot read .*model.safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), r"is not the index of a safetensors checkpoint"),
        (
            lambda folder: shutil.copyfile(folder / "config.json", folder / "model.safetensors.index.json"),
            r"is not the index of a safetensors checkpoint",
        ),
    ],
)
def test_unusable_folders_are_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    shape = make_model(tmp_path, "llama", False)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, shape, megatron_layout(shape, Topology(1), 64), 0)
