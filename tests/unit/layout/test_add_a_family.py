"""docs/add-a-family.md is true: its row makes a family of Seed-OSS, which then passes what the families of the table pass."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from megatron_r1z.layout.blocks import Layout, box_slices, engine_layout, hf_layout, megatron_layout
from megatron_r1z.layout.families import FAMILIES, ExpertNames, Family, ModelShape, hf_tensors, load_shape
from megatron_r1z.layout.plan import make_plan
from megatron_r1z.layout.topology import Topology

PAGE = (Path(__file__).parents[3] / "docs" / "add-a-family.md").read_text(encoding="utf-8")
ROW = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelShape:
    """Of a small model that transformers has written, with the row added."""
    assert len(ROW) == 1
    assert "seed_oss" not in FAMILIES
    for name, family in eval(f"{{{ROW[0]}}}", {"Family": Family, "ExpertNames": ExpertNames}).items():
        monkeypatch.setitem(FAMILIES, name, family)  # type: ignore[arg-type]  # a dict, declared read-only
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "head_dim": 4, "intermediate_size": 24, "vocab_size": 70}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "seed_oss", "num_key_value_heads": 2, **sizes}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return load_shape(tmp_path)


def test_the_row_is_short() -> None:
    assert f"In all {len(ROW[0].splitlines())} + 2 lines." in PAGE
    assert len(ROW[0].splitlines()) + 2 < 30


def test_the_tensors_are_those_of_the_files(shape: ModelShape, tmp_path: Path) -> None:
    written = load_file(tmp_path / "model.safetensors")
    assert {spec.name: spec.shape for spec in hf_tensors(shape)} == {name: tuple(tensor.shape) for name, tensor in written.items()}


def test_weights_go_from_files_to_policy_and_engine_and_back_bit_for_bit(shape: ModelShape, tmp_path: Path) -> None:
    files, written = hf_layout(shape, 1), load_file(tmp_path / "model.safetensors")
    held = {(0, name): tensor for name, tensor in written.items()}
    for source, destination in (
        (files, megatron_layout(shape, Topology(4, tp=2, pp=2), 8)),
        (megatron_layout(shape, Topology(4, tp=2, pp=2), 8), engine_layout(shape, 4, 4, first_rank=4)),
        (engine_layout(shape, 4, 4, first_rank=4), files),
    ):
        held = moved(source, destination, held)
    assert all(torch.equal(held[0, name].view(torch.int32), tensor.view(torch.int32)) for name, tensor in written.items())


def moved(source: Layout, destination: Layout, held: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
    plan = make_plan(source, destination, itemsize=4)
    arrived = {(rank, name): torch.zeros(size) for rank, sizes in destination.parameters.items() for name, size in sizes.items()}
    for copy in [*plan.local, *(copy for copies in plan.rounds for copy in copies)]:
        value = held[copy.source_rank, copy.source_parameter][box_slices(copy.source_start, copy.size)]
        arrived[copy.destination_rank, copy.destination_parameter][box_slices(copy.destination_start, copy.size)] = value
    return arrived


def test_what_the_page_says_is_refused(shape: ModelShape, tmp_path: Path) -> None:
    assert shape.qkv_bias
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("attention_out_bias", "mlp_bias"):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: True}))
        with pytest.raises(Exception, match=r"bias"):
            load_shape(tmp_path)


@pytest.mark.parametrize("name", ["layer_tensors", "_MEGATRON_LAYER", "_ENGINE_LAYER", "_UNSUPPORTED", "_COMMON", "FAMILIES"])
def test_the_names_on_the_page_exist(name: str) -> None:
    sources = Path(__file__).parents[3] / "megatron_r1z" / "layout"
    assert name in PAGE
    assert any(re.search(rf"^(def )?{name}\b", (sources / file).read_text(), flags=re.MULTILINE) for file in ("families.py", "blocks.py"))
