"""Reading config.json in old and new spelling, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.errors import DataError
from megatron_r1z.layout.families import FAMILIES, hf_tensors, load_shape
from megatron_r1z.layout.rope import RopeScaling

BASE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 311,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}


SMALL_MIXTURES: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}


def write(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**BASE, **config}))
    return folder


def test_values_and_defaults(tmp_path: Path) -> None:
    shape = load_shape(write(tmp_path, model_type="llama", rms_norm_eps=1e-5, max_position_embeddings=512))
    assert (shape.family, shape.head_dim, shape.num_kv_heads, shape.queries_per_group) == ("llama", 16, 2, 2)
    assert (shape.norm_eps, shape.max_positions, shape.rope_theta) == (1e-5, 512, 10000.0)
    assert (shape.tied_embeddings, shape.qkv_bias, shape.qk_norm, shape.rope_scaling) == (False, False, False, None)


def test_defaults_of_a_family(tmp_path: Path) -> None:
    assert load_shape(write(tmp_path, model_type="qwen3", architectures=["Qwen3ForCausalLM"])).head_dim == 128
    assert load_shape(write(tmp_path, model_type="llama", num_key_value_heads=None)).num_kv_heads == 4


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    ],
)
def test_both_spellings_of_rope(tmp_path: Path, spelling: dict[str, Any]) -> None:
    shape = load_shape(write(tmp_path, model_type="llama", **spelling))
    assert shape.rope_theta == 5e5
    assert shape.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_mixtures_of_experts(tmp_path: Path, key: str) -> None:
    shape = load_shape(write(tmp_path, model_type="qwen3_moe", moe_intermediate_size=48, num_experts_per_tok=3, **{key: 6}))
    assert (shape.ffn_size, shape.num_experts, shape.experts_per_token, shape.qk_norm) == (48, 6, 3, True)
    shape = load_shape(write(tmp_path, model_type="mixtral", architectures=["MixtralForCausalLM"]))
    assert (shape.ffn_size, shape.num_experts, shape.experts_per_token, shape.qk_norm) == (96, 8, 2, False)


def test_a_file_does_as_well_as_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, model_type="llama")
    (folder / "config.json").rename(folder / "llama.json")
    assert load_shape(folder / "llama.json").family == "llama"


def test_rope_without_scaling_in_new_spelling(tmp_path: Path) -> None:
    shape = load_shape(write(tmp_path, model_type="qwen2", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}))
    assert (shape.rope_theta, shape.rope_scaling) == (1e6, None)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gemma", {}, r"describes gemma, .*llama, mistral, qwen2, qwen3, mixtral, qwen3_moe"),
        ("qwen2", {"architectures": ["Qwen2VLForConditionalGeneration"]}, r"describes Qwen2VLForConditionalGeneration"),
        ("mistral", {}, r"sliding attention window \(4096 tokens\)"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, r"sliding attention window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, r"sliding attention window"),
        ("llama", {"hidden_act": "gelu"}, r"activation 'gelu'"),
        ("llama", {"mlp_bias": True}, r"mlp_bias"),
        ("llama", {"attention_bias": True}, r"attention_bias"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope type 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope type 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, r"lacks 'low_freq_factor'"),
        ("llama", {"hidden_size": "wide"}, r"malformed"),
        ("llama", {"num_attention_heads": 0}, r"malformed|num_heads 0"),
        ("llama", {"num_key_value_heads": 3}, r"4 heads, which 3 key-value heads do not divide"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, r"quantised"),
        ("qwen2", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5"),
        ("mixtral", {"sliding_window": 4096}, r"sliding attention window"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"dense layers between mixtures of experts \(mlp_only_layers \[1\]\)"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"dense layers between mixtures of experts \(decoder_sparse_step 2\)"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, r"shared experts"),
        ("mixtral", {"num_experts_per_tok": 9}, r"8 experts, of which a token cannot use 9"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, family: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_shape(write(tmp_path, model_type=family, **config))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_an_idle_window_is_accepted(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    assert load_shape(write(tmp_path, model_type=family, **config)).family == family


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*config\.json"):
        load_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        load_shape(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match="JSON object"):
        load_shape(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match="lacks 'num_attention_heads'"):
        load_shape(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_tensors_are_those_that_transformers_writes(tmp_path: Path, family: str, tied: bool) -> None:
    import transformers
    from safetensors import safe_open

    write(tmp_path, model_type=family, tie_word_embeddings=tied, head_dim=16, sliding_window=None, **SMALL_MIXTURES.get(family, {}))
    shape = load_shape(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "written")
    with safe_open(tmp_path / "written" / "model.safetensors", framework="pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a mapping
    assert {spec.name: spec.shape for spec in hf_tensors(shape)} == expected
    assert load_shape(tmp_path / "written") == shape
