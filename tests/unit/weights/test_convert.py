"""What a conversion takes from its source, and what it refuses. `tests/loop/test_convert.py` has the conversions themselves."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from megatron_r1z.config import ModelConfig, ParallelConfig
from megatron_r1z.errors import ConfigError, DataError
from megatron_r1z.layout.families import hf_tensors, load_shape
from megatron_r1z.weights.convert import Conversion, check_target, plan_conversion
from megatron_r1z.weights.export import SHARD_BYTES

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 31,
}
QKV = "decoder.layers.self_attention.linear_qkv.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def step(model: Path, tmp_path: Path) -> Path:
    """A checkpoint of a run on `model`."""
    checkpoint = make_checkpoint(tmp_path / "run" / "checkpoints" / "step_000005", "state.json")
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  path: {model}\n")
    return checkpoint


def make_model(folder: Path, dtype: torch.dtype = torch.bfloat16, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    tensors = {spec.name: torch.ones(spec.shape, dtype=dtype) for spec in hf_tensors(load_shape(folder))}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_checkpoint(folder: Path, last_file: str, content: object = None) -> Path:
    folder.mkdir(parents=True)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp.save({QKV: torch.ones(2, 32, 16)}, checkpoint_id=folder, no_dist=True)
    (folder / last_file).write_text(json.dumps(content or {}))
    return folder


def plan(source: Path, target: Path = Path("target"), **options: Any) -> Conversion:
    nothing = {"kind": None, "model": None, "dtype": None, "shard_gb": None}
    return plan_conversion(source, target, ParallelConfig(num_ranks=2, tensor_parallel_size=2), **nothing | options)


def test_a_model_folder_becomes_a_checkpoint_in_its_own_format(model: Path) -> None:
    conversion = plan(model)
    assert (conversion.kind, conversion.precision.policy, conversion.shard_bytes) == ("megatron", "bf16", SHARD_BYTES)
    assert conversion.model == ModelConfig(path=str(model))
    assert (conversion.source, conversion.target, conversion.parallel.tensor_parallel_size) == (model, Path("target"), 2)


def test_a_folder_that_would_lose_a_tensor_is_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.o_proj.bias": torch.ones(16)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"has a tensor model\.layers\.0\.self_attn\.o_proj\.bias"):
        plan(model)


def test_a_checkpoint_of_a_run_becomes_a_folder_of_the_runs_model(step: Path, model: Path) -> None:
    conversion = plan(step, shard_gb=0.5)
    assert (conversion.kind, conversion.precision.policy, conversion.shard_bytes) == ("hf", "fp32", 500_000_000)
    assert conversion.model == ModelConfig(path=str(model), checkpoint=str(step))


def test_a_checkpoint_of_weights_names_its_model(model: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "weights", "weights.json", {"source": "?", "model": str(model)})
    assert plan(checkpoint).model == ModelConfig(path=str(model), checkpoint=str(checkpoint))


def test_what_is_asked_for_goes_before_what_the_source_says(step: Path, model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    conversion = plan(step, kind="megatron", model=other, dtype="bf16")
    assert (conversion.kind, conversion.precision.policy, conversion.model.path) == ("megatron", "bf16", str(other))
    assert plan(model, kind="hf", dtype="fp32").precision.policy == "fp32"


def test_sources_that_cannot_be_converted(tmp_path: Path, model: Path, step: Path) -> None:
    half = make_model(tmp_path / "half", torch.float16)
    lost = make_checkpoint(tmp_path / "lost" / "step", "state.json")
    wide = make_model(tmp_path / "wide", hidden_size=32)
    for source, options, error, message in (
        (tmp_path, {}, DataError, r"is neither a model folder .* nor a complete checkpoint .*; name a folder such as"),
        (half, {}, ConfigError, r"half holds float16; say with --dtype what to write: bf16 or fp32"),
        (lost, {}, DataError, r"config.yaml does not say which model .*lost/step is of; name its folder with --model"),
        (step, {"model": wide}, DataError, r"is not of the model in .*wide: .*linear_qkv.weight is \[2, 32, 16\] there and \[2, 64, 32\]"),
        (model, {"model": wide}, ConfigError, r"--model is for checkpoints"),
        (model, {"shard_gb": 1.0}, ConfigError, r"--shard-gb bounds the files of a Hugging Face folder"),
        (step, {"shard_gb": 0.0}, ConfigError, r"--shard-gb is 0; it must be more than 0"),
    ):
        with pytest.raises(error, match=message):
            plan(source, **options)
    assert plan(half, dtype="fp32").precision.policy == "fp32"


def test_targets_that_would_lose_something(tmp_path: Path, model: Path, step: Path) -> None:
    (tmp_path / "notes").mkdir()
    for target, overwrite, message in (
        (model, False, r"model exists; name another folder, or replace it by adding --overwrite"),
        (tmp_path / "notes", True, r"notes exists and holds no weights"),
        (step, True, r"holds what is converted"),
        (step.parents[1], True, r"holds what is converted"),
    ):
        source = step if target != model else make_model(tmp_path / "another")
        with pytest.raises(ConfigError, match=message):
            check_target(plan(source, target), overwrite=overwrite)
    check_target(plan(step, tmp_path / "new"), overwrite=False)
    check_target(plan(make_model(tmp_path / "third"), model), overwrite=True)
