"""Hugging Face folders in and out, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_r1z.errors import DataError, ExportError
from megatron_r1z.fp8.blocks import dequantise, quantise_weight
from megatron_r1z.layout.blocks import Layout, box_slices, engine_layout, hf_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, hf_tensors, load_shape
from megatron_r1z.layout.fp8 import SCALES, fp8_matrices
from megatron_r1z.layout.topology import Topology
from megatron_r1z.weights import hf_files
from megatron_r1z.weights.export import load_hf_weights, save_hf
from megatron_r1z.weights.hf_files import locate_tensors
from megatron_r1z.weights.model_folder import check_tensors

RunRanks = Callable[..., None]
WORKER = Path(__file__).with_name("export_ranks.py")
FAMILIES = [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False), ("mistral", False)]


FP8_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 128}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}


def make_model(folder: Path, family: str, tied: bool, sizes: Mapping[str, int] = SIZES, **options: object) -> ModelShape:
    config = transformers.AutoConfig.for_model(
        family,
        **sizes,
        vocab_size=70,
        num_attention_heads=4,
        num_key_value_heads=2,
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
    check_tensors(tmp_path / "out", shape)


def test_companions_and_replacement(tmp_path: Path) -> None:
    shape = make_model(tmp_path / "model", "llama", False)
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "optimizer.pt", "tokenizer.model", "setup.py")
    for name in names:
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
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_code_and_further_templates_go_along(tmp_path: Path, place: str) -> None:
    """With `auto_map` the Python files too: the one that it names imports its neighbour."""
    shape = make_model(tmp_path / "model", "llama", False)
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    kept = ("modeling_x.py", "layers_x.py", "additional_chat_templates/tool_use.jinja", "special_tokens_map.json", "added_tokens.json")
    for name in kept:
        (tmp_path / "model" / name).write_text(name)
    path = tmp_path / "model" / place
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tree | {"auto_map": {"AutoX": "modeling_x.X"}, "unsloth_version": "1"}))
    layout = megatron_layout(shape, Topology(1), 64)
    weights = loaded(tmp_path / "model", shape, layout, 0)
    save_hf(tmp_path / "out", tmp_path / "model", shape, layout, weights, 0, 1, torch.float32)
    assert {name: (tmp_path / "out" / name).read_text() for name in kept} == {name: name for name in kept}
    before, after = (json.loads((tmp_path / name / place).read_text()) for name in ("model", "out"))
    assert after == before


def files_of(folder: Path) -> dict[str, Tensor]:
    return {name: load_file(path)[name] for name, path in locate_tensors(folder).items()}


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True)])
def test_waves_and_ranks_do_not_change_what_is_written(tmp_path: Path, run_ranks: RunRanks, family: str, tied: bool) -> None:
    make_model(tmp_path / "model", family, tied)
    for num_ranks in (1, 2, 4):
        run_ranks(WORKER, num_ranks, "waves", str(tmp_path))
    expected = {name: tensor.bfloat16() for name, tensor in files_of(tmp_path / "model").items()}
    folders = sorted(tmp_path.glob("out_*"))
    assert len(folders) == 6
    for folder in folders:
        found = files_of(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), folder
        assert len(list(folder.glob("*.safetensors"))) > 5
        check_tensors(folder, load_shape(folder))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("case", ["full_disk", "bad_disk"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_export_that_fails_on_one_rank_fails_on_all_and_leaves_the_old_folder(
    tmp_path: Path, run_ranks: RunRanks, case: str, num_ranks: int
) -> None:
    make_model(tmp_path / "model", "llama", False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    run_ranks(WORKER, num_ranks, case, str(tmp_path))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]


def test_an_interrupted_export_leaves_the_old_folder_and_the_next_one_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = make_model(tmp_path / "model", "llama", False)
    layout = megatron_layout(shape, Topology(1), 64)
    weights = loaded(tmp_path / "model", shape, layout, 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hf_files.TensorWriter, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_hf(tmp_path / "out", tmp_path / "model", shape, layout, weights, 0, 1, torch.float32)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    save_hf(tmp_path / "out", tmp_path / "model", shape, layout, weights, 0, 1, torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "old").exists()


def test_an_export_where_no_folder_can_be_made_says_so(tmp_path: Path) -> None:
    shape = make_model(tmp_path / "model", "llama", False)
    layout = megatron_layout(shape, Topology(1), 64)
    weights = loaded(tmp_path / "model", shape, layout, 0)
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"cannot write .*file/out.partial: Not a directory; .* can be written and has 141952 bytes free"):
        save_hf(tmp_path / "file" / "out", tmp_path / "model", shape, layout, weights, 0, 1, torch.float32)


def test_an_import_in_small_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = make_model(tmp_path, "qwen2", True)
    layout = megatron_layout(shape, Topology(4, tp=2, pp=2), 64)
    expected = [loaded(tmp_path, shape, layout, rank) for rank in range(4)]
    for piece_bytes in (1, 300):
        monkeypatch.setattr(hf_files, "PIECE_BYTES", piece_bytes)
        for rank in range(4):
            found = loaded(tmp_path, shape, layout, rank)
            assert all(torch.equal(found[name], expected[rank][name]) for name in expected[rank])


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


def test_fp8_out_and_in(tmp_path: Path) -> None:
    """Matrices of layers in blocks with their scales, the rest in bf16; what is read is what the bytes stand for."""
    shape = make_model(tmp_path / "model", "llama", False, FP8_SIZES)
    layout = megatron_layout(shape, Topology(1), 1)
    parameters = loaded(tmp_path / "model", shape, layout, 0, torch.bfloat16)
    save_hf(tmp_path / "fp8", tmp_path / "model", shape, layout, parameters, 0, 1, torch.bfloat16, fp8=True)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    assert load_shape(tmp_path / "fp8") == shape
    check_tensors(tmp_path / "fp8", shape)
    original = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()}
    written = {name: load_file(path)[name] for name, path in locate_tensors(tmp_path / "fp8").items()}
    matrices = fp8_matrices(shape, [layout])
    assert len(matrices) == 2 * 7
    assert written.keys() == original.keys() | {name + SCALES for name in matrices}
    expected = {name: quantise_weight(original[name]) for name in matrices}
    for name, tensor in original.items():
        if name not in matrices:
            assert torch.equal(written[name], tensor)
            continue
        assert torch.equal(written[name].view(torch.uint8), expected[name].data.view(torch.uint8))
        assert torch.equal(written[name + SCALES], expected[name].scale_inv)
    meant = {name: dequantise(expected[name]) if name in matrices else tensor.float() for name, tensor in original.items()}
    for topology, rank in ((Topology(1), 0), (Topology(2, tp=2), 1)):
        layout = engine_layout(shape, 2, 2) if topology.tp == 2 else megatron_layout(shape, topology, 1)
        found = loaded(tmp_path / "fp8", shape, layout, rank)
        for block in layout.blocks_of(rank):
            here = found[block.parameter][box_slices(block.local_start, block.size)]
            assert torch.equal(here, meant[block.tensor][box_slices(block.start, block.size)])
    (tmp_path / "fp8" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: path.name for name, path in locate_tensors(tmp_path / "fp8").items() if SCALES not in name}})
    )
    with pytest.raises(DataError, match=r"is in FP8, but there is no model\.layers\.\S+_scale_inv; only blocks of 128 x 128 can be read"):
        loaded(tmp_path / "fp8", shape, layout, 0)
