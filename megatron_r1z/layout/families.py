"""Model families: what `config.json` says about a model, and the tensors its Hugging Face checkpoint holds.

A family is one row of `FAMILIES`. The rest of the package sees a `ModelShape` and never asks which family it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1z.errors import DataError


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (transformers `modeling_rope_utils._compute_llama3_parameters`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelShape:
    """Everything that decides names, sizes and maths of a dense decoder.

    >>> ModelShape("llama", 2, 64, 4, 2, 16, 128, 311, True, False, False, 1e4, None, 1e-6, 512).queries_per_group
    2
    """

    family: str
    """Key of `FAMILIES`."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    """Rows of the embedding in the checkpoint, without any padding that a side adds."""
    tied_embeddings: bool
    """The output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    """RMSNorm over each head of q and k."""
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    max_positions: int

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size", "max_positions"):
            if getattr(self, name) < 1:
                raise DataError(f"the model has {name} {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise DataError(f"the model has {self.num_heads} heads, which {self.num_kv_heads} key-value heads do not divide.")

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads


class TensorSpec(NamedTuple):
    """Name and shape of one tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Family:
    """One row of the table: what a family has that others lack, and the defaults of its transformers configuration class."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that a missing key stands for; source: `transformers/models/<family>/configuration_<family>.py`."""


_COMMON: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "sliding_window": None,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", defaults={"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "use_sliding_window": True, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, defaults={"num_key_value_heads": 32, "max_window_layers": 28}),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28}),
}
"""Known families by `model_type`."""


def _slides(config: Mapping[str, Any]) -> bool:
    """Whether some layer attends to less than a full sequence."""
    if "sliding_attention" in (config.get("layer_types") or ()):
        return True
    window, limit = config["sliding_window"], config["max_position_embeddings"]
    first_sliding_layer = config.get("max_window_layers", 0)
    return bool(config["use_sliding_window"] and window and window < limit and first_sliding_layer < config["num_hidden_layers"])


_UNSUPPORTED: tuple[tuple[Callable[[Mapping[str, Any]], object], str], ...] = (
    (_slides, "a sliding attention window ({sliding_window} tokens)"),
    (lambda config: config["hidden_act"] != "silu", "activation '{hidden_act}' (silu is supported)"),
    (lambda config: config.get("mlp_bias"), "mlp_bias: biases in the feed-forward layers"),
    (lambda config: config.get("attention_bias"), "attention_bias: a bias on the attention output projection"),
    (lambda config: config.get("partial_rotary_factor", 1.0) not in (None, 1.0), "partial_rotary_factor {partial_rotary_factor}"),
    (lambda config: config.get("quantization_config"), "quantised weights (quantization_config)"),
)
"""Tests of the configuration with its defaults filled in, and what a model that answers true has that is not supported."""


def load_shape(folder: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face folder, from its `config.json`.

    Raises:
        DataError: the file is missing or malformed, the family is not in `FAMILIES`, or the model has an unsupported feature.
    """
    path = Path(folder) / "config.json"
    config = _read_config(path)
    name = _family_name(config, path)
    family = FAMILIES[name]
    config = {**_COMMON, **family.defaults, **config}
    try:
        _refuse_unsupported(config, path)
        return _make_shape(name, family, config, path)
    except KeyError as error:
        raise DataError(f"{path} lacks {error}; it is not the configuration of a {name} model.") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DataError(f"{path} is malformed: {error}.") from error


def hf_tensors(shape: ModelShape) -> tuple[TensorSpec, ...]:
    """All tensors of the checkpoint in model order; `lm_head.weight` only where it is not the embedding."""
    head = [] if shape.tied_embeddings else [TensorSpec("lm_head.weight", (shape.vocab_size, shape.hidden_size))]
    return (
        TensorSpec("model.embed_tokens.weight", (shape.vocab_size, shape.hidden_size)),
        *(
            TensorSpec(f"model.layers.{layer}.{spec.name}", spec.shape)
            for layer in range(shape.num_layers)
            for spec in layer_tensors(shape)
        ),
        TensorSpec("model.norm.weight", (shape.hidden_size,)),
        *head,
    )


def layer_tensors(shape: ModelShape) -> tuple[TensorSpec, ...]:
    """Tensors of one decoder layer, named from `model.layers.N.` on."""
    hidden, ffn, head_dim = shape.hidden_size, shape.ffn_size, shape.head_dim
    queries, keys = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    table = (
        ("input_layernorm.weight", (hidden,), True),
        ("self_attn.q_proj.weight", (queries, hidden), True),
        ("self_attn.k_proj.weight", (keys, hidden), True),
        ("self_attn.v_proj.weight", (keys, hidden), True),
        ("self_attn.q_proj.bias", (queries,), shape.qkv_bias),
        ("self_attn.k_proj.bias", (keys,), shape.qkv_bias),
        ("self_attn.v_proj.bias", (keys,), shape.qkv_bias),
        ("self_attn.q_norm.weight", (head_dim,), shape.qk_norm),
        ("self_attn.k_norm.weight", (head_dim,), shape.qk_norm),
        ("self_attn.o_proj.weight", (hidden, queries), True),
        ("post_attention_layernorm.weight", (hidden,), True),
        ("mlp.gate_proj.weight", (ffn, hidden), True),
        ("mlp.up_proj.weight", (ffn, hidden), True),
        ("mlp.down_proj.weight", (hidden, ffn), True),
    )
    return tuple(TensorSpec(name, size) for name, size, present in table if present)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; model.path must be a folder in Hugging Face format.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} must hold a JSON object.")
    return config


def _family_name(config: Mapping[str, Any], path: Path) -> str:
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    architectures = [str(item) for item in config.get("architectures") or ()]
    names = [by_architecture.get(item) for item in architectures] or [str(config.get("model_type"))]
    if names[0] not in FAMILIES:
        found = ", ".join(architectures) or config.get("model_type")
        raise DataError(f"{path} describes {found}, which is not supported; known families: {', '.join(FAMILIES)}.")
    return str(names[0])


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    for has_feature, sentence in _UNSUPPORTED:
        if has_feature(config):
            raise DataError(f"{path} asks for {sentence.format_map(config)}, which is not supported.")


def _make_shape(name: str, family: Family, config: Mapping[str, Any], path: Path) -> ModelShape:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    theta, scaling = _rope(config, path)
    return ModelShape(
        family=name,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        ffn_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        tied_embeddings=bool(config["tie_word_embeddings"]),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(config["rms_norm_eps"]),
        max_positions=int(config["max_position_embeddings"]),
    )


def _rope(config: Mapping[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise DataError(f"{path} asks for rope type '{kind}', which is not supported; default and llama3 are.")
    theta = float(rope.get("rope_theta", config["rope_theta"]))
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )
