"""`megatron-r1z convert`: what comes back is what went in, bit for bit, whatever the layout on the way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_r1z.weights.hf_files import locate_tensors

VOCAB_SIZE = 71
"""Padded to 72 rows under tp 2."""


def make_model(folder: Path, family: str, tied: bool) -> None:
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        sliding_window=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


def hf_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: load_file(path)[name] for name, path in locate_tensors(folder).items()}


def megatron_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Megatron checkpoint, read by torch without Megatron."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def unpadded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ends = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {name: tensor[:VOCAB_SIZE] if name in ends else tensor for name, tensor in tensors.items()}


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def convert(cli: Any, *arguments: object) -> Any:
    outcome = cli.run("convert", *map(str, arguments))
    assert (outcome.status, outcome.stderr) == (0, "")
    assert (outcome.processes, outcome.segments) == ([], [])
    return outcome


def test_weights_come_back_bit_for_bit(cli: Any, tmp_path: Path) -> None:
    make_model(tmp_path / "model", "qwen2", tied=True)
    expected = hf_tensors(tmp_path / "model")
    said = convert(cli, tmp_path / "model", tmp_path / "saved", "--tp", 2, "--pp", 2).stdout
    assert f"wrote {tmp_path / 'saved'}: {len(expected)} tensors, " in said
    convert(cli, tmp_path / "saved", tmp_path / "saved_again", "--to", "megatron", "--pp", 2)
    convert(cli, tmp_path / "saved_again", tmp_path / "hf", "--tp", 2, "--shard-gb", 0.00002)
    assert equal(hf_tensors(tmp_path / "hf"), expected)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 5
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"
    before, after = (unpadded(megatron_tensors(tmp_path / name)) for name in ("saved", "saved_again"))
    assert equal(before, after)


def test_numbers_are_rounded_once_and_folders_are_replaced_on_request(cli: Any, tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama", tied=False)
    rounded = {name: tensor.bfloat16() for name, tensor in hf_tensors(tmp_path / "model").items()}
    convert(cli, tmp_path / "model", tmp_path / "saved", "--tp", 2, "--dtype", "bf16")
    convert(cli, tmp_path / "saved", tmp_path / "hf", "--pp", 2, "--dtype", "fp32")
    assert equal(hf_tensors(tmp_path / "hf"), {name: tensor.float() for name, tensor in rounded.items()})
    again = ("convert", str(tmp_path / "model"), str(tmp_path / "hf"), "--to", "hf", "--dtype", "bf16")
    refused = cli.run(*again)
    assert (refused.status, refused.stdout) == (2, "")
    assert refused.stderr == f"megatron-r1z: {tmp_path / 'hf'} exists; name another folder, or replace it by adding --overwrite.\n"
    convert(cli, *again[1:], "--overwrite")
    assert equal(hf_tensors(tmp_path / "hf"), rounded)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_checkpoints_of_a_run_go_out_and_come_in_again(cli: Any, pretraining: list[str], tmp_path: Path) -> None:
    few = [*pretraining, "corpus.steps=2", "optimizer.warmup_steps=0", "optimizer.decay_steps=2"]
    assert cli.run("pretrain", *few, f"logging.folder={tmp_path / 'run'}").status == 0
    convert(cli, tmp_path / "run" / "checkpoints" / "step_000002", tmp_path / "hf", "--tp", 2)
    assert equal(hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "run" / "hf" / "final"))
    convert(cli, tmp_path / "hf", tmp_path / "weights", "--pp", 2)
    still = [*few, "model.random_init=false", f"model.checkpoint={tmp_path / 'weights'}"]
    still += ["corpus.steps=1", "optimizer.lr=1e-30", "optimizer.min_lr=0"]
    outcome = cli.run("pretrain", *still, f"logging.folder={tmp_path / 'next'}")
    assert (outcome.status, outcome.stderr) == (0, "")
    expected = hf_tensors(tmp_path / "hf")
    found = hf_tensors(tmp_path / "next" / "hf" / "final")  # after a step that is too small to be seen
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-20) for name in expected)
