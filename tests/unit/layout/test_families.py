"""Reading config.json in old and new spelling, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.errors import DataError
from megatron_r1z.layout.families import FAMILIES, hf_tensors, load_shape, make_shape
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
        ("mistral", {}, r"sliding attention window \(sliding_window 4096\)"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, r"sliding attention window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types \['full_attention', 'sliding_attention'\]"),
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


COMMON = {
    **{"_name_or_path": "x", "transformers_version": "4.43.0", "torch_dtype": "bfloat16", "use_cache": True, "hidden_act": "silu"},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "initializer_range": 0.02, "rms_norm_eps": 1e-5, "vocab_size": 32000},
    **{"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96},
    "tie_word_embeddings": False,
}
QWEN = COMMON | {"attention_dropout": 0.0, "max_window_layers": 2, "sliding_window": 32768, "use_sliding_window": False, "rope_theta": 1e6}
PUBLIC: dict[str, dict[str, Any]] = {
    "Llama 2": COMMON | {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, "max_position_embeddings": 4096},
    "Llama 3.1": COMMON
    | {"model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 5e5}
    | {"rope_scaling": LLAMA3, "max_position_embeddings": 131072, "eos_token_id": [128001, 128008, 128009], "head_dim": 16},
    "TinyLlama": COMMON | {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, "max_position_embeddings": 2048},
    "SmolLM2": COMMON
    | {"model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "is_llama_config": True, "mlp_bias": False}
    | {"pretraining_tp": 1, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True}
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}, "max_position_embeddings": 8192},
    "Mistral 0.3": COMMON | {"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768, "rope_theta": 1e6},
    "Mistral 0.2": COMMON | {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096, "attention_dropout": 0.0},
    "Qwen2.5": QWEN | {"model_type": "qwen2", "max_position_embeddings": 131072, "use_mrope": False},
    "Qwen2.5-Math": QWEN | {"model_type": "qwen2", "max_position_embeddings": 4096, "sliding_window": 4096, "use_mrope": False},
    "R1-Distill-Qwen": QWEN | {"model_type": "qwen2", "max_position_embeddings": 131072, "use_mrope": False, "rope_theta": 10000},
    "Qwen3": QWEN
    | {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "rope_scaling": None, "sliding_window": None}
    | {"max_position_embeddings": 40960},
    "Mixtral": COMMON
    | {"model_type": "mixtral", "attention_dropout": 0.0, "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False}
    | {"router_aux_loss_coef": 0.02, "sliding_window": None, "max_position_embeddings": 32768, "rope_theta": 1e6},
    "Qwen3-MoE": QWEN
    | {"model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "mlp_only_layers": []}
    | {"moe_intermediate_size": 48, "norm_topk_prob": True, "num_experts": 8, "num_experts_per_tok": 2, "output_router_logits": False}
    | {"router_aux_loss_coef": 0.001, "rope_scaling": None, "sliding_window": None, "max_position_embeddings": 40960},
    "fine-tuned": COMMON
    | {
        "model_type": "llama",
        "unsloth_fixed": True,
        "unsloth_version": "2025.3.1",
        "_attn_implementation_autoset": True,
        "max_length": 4096,
    }
    | {
        "pad_token_id": 0,
        "max_sequence_length": 2048,
        "temperature": 0.9,
        "top_p": 0.6,
        "task_specific_params": None,
        "id2label": {"0": "A"},
    },
}
"""The keys of public configurations, with small sizes."""


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC[name]))
    assert load_shape(tmp_path).num_layers == 4


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_missing_key_stands_for_what_transformers_takes(family: str) -> None:
    """Of the file alone: an empty one and the one that transformers makes of it describe the same shape."""
    import transformers

    config = transformers.AutoConfig.for_model(family)
    given = {name: getattr(config, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")}
    sizes = given | {"model_type": family, "intermediate_size": config.intermediate_size, "sliding_window": None}
    written = json.loads(config.to_json_string(use_diff=False)) | {"sliding_window": None}
    assert make_shape(sizes, "sizes") == make_shape(written, "written")


PARTS = st.sampled_from(
    ["multiplier", "scale", "softcapping", "bias", "window", "rope", "rotary", "norm", "clip", "chunk", "experts", "router", "activation"]
)
WORDS = st.sampled_from(["attn", "final", "mlp", "use", "layer", "my", "v2", "embed"])


@given(
    words=st.lists(WORDS, max_size=2), part=PARTS, family=st.sampled_from(list(FAMILIES)), value=st.sampled_from([2, 0.5, True, "x", [1]])
)
def test_whatever_sounds_like_maths_is_refused_unless_it_is_off(words: list[str], part: str, family: str, value: Any) -> None:
    name = "_".join([*words, part, "of", "a", "stranger"])
    config = BASE | {"model_type": family, "sliding_window": None}
    with pytest.raises(DataError, match=rf"has {name} "):
        make_shape(config | {name: value}, "config.json")
    for off in (None, False, "", [], 1 if part in ("multiplier", "scale") else 0):
        assert make_shape(config | {name: off}, "config.json") == make_shape(config, "config.json")


@given(
    name=st.sampled_from(["unsloth_version", "license", "_commit_hash", "x_dropout", "finetuned_by", "max_length"]),
    value=st.integers() | st.text(),
)
def test_whatever_does_not_is_accepted(name: str, value: Any) -> None:
    config = BASE | {"model_type": "llama"}
    assert make_shape(config | {name: value}, "config.json") == make_shape(config, "config.json")


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
