"""Model families: what `config.json` says about a model, and the tensors its Hugging Face checkpoint holds.

A family is one row of `FAMILIES`. The rest of the package sees a `ModelShape` and never asks which family it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1z.errors import DataError
from megatron_r1z.layout.config_fields import integer, number, truth
from megatron_r1z.layout.config_keys import odd_key
from megatron_r1z.layout.rope import Rope, RopeScaling, read_rope


@dataclass(frozen=True)
class ModelShape:
    """Everything that decides names, sizes and maths of a decoder.

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
    """Intermediate size of the feed-forward layer, of each expert in a mixture."""
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
    num_experts: int = 0
    """Experts of each layer; 0 in a dense model."""
    experts_per_token: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size", "max_positions"):
            if getattr(self, name) < 1:
                raise DataError(f"the model has {name} {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise DataError(f"the model has {self.num_heads} heads, which {self.num_kv_heads} key-value heads do not divide.")
        if self.num_experts and FAMILIES[self.family].experts is None:
            raise DataError(f"a {self.family} model has no experts; this one should have {self.num_experts}.")
        if not min(1, self.num_experts) <= self.experts_per_token <= self.num_experts:
            raise DataError(f"the model has {self.num_experts} experts, of which a token cannot use {self.experts_per_token}.")

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def expert_names(self) -> ExpertNames | None:
        """How the checkpoint calls the experts; None in a dense model."""
        return FAMILIES[self.family].experts if self.num_experts else None


class TensorSpec(NamedTuple):
    """Name and shape of one tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class ExpertNames(NamedTuple):
    """How a mixture-of-experts layer is called, from `model.layers.N.` on, in the checkpoint and by vLLM."""

    layer: str
    gate: str
    up: str
    down: str

    @property
    def router(self) -> str:
        """The tensor that scores the experts, [experts, hidden]."""
        return f"{self.layer}.gate.weight"

    def gate_up(self, expert: int) -> tuple[str, str]:
        """Gate and up tensor of one expert, each [ffn, hidden]."""
        return f"{self.layer}.experts.{expert}.{self.gate}.weight", f"{self.layer}.experts.{expert}.{self.up}.weight"

    def down_of(self, expert: int) -> str:
        """Down tensor of one expert, [hidden, ffn]."""
        return f"{self.layer}.experts.{expert}.{self.down}.weight"


@dataclass(frozen=True)
class Family:
    """One row of the table: what a family has that others lack, and the defaults of its transformers configuration class."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: ExpertNames | None = None
    """Present where every feed-forward layer is a mixture of experts."""
    has_window_switch: bool = False
    """`use_sliding_window` turns the window off; elsewhere transformers or vLLM take a window that is given, whatever that key says."""
    has_derived_heads: bool = False
    """vLLM takes hidden size over heads for the size of a head, whatever `head_dim` says."""
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
    "head_dim": None,
    "num_key_value_heads": None,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", defaults={"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        has_window_switch=True,
        has_derived_heads=True,
        defaults={"num_key_value_heads": 32, "max_window_layers": 28},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        has_window_switch=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        experts=ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2"),
        defaults={
            **{"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
            **{"rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        has_window_switch=True,
        experts=ExpertNames("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        defaults={"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
}
"""Known families by `model_type`."""


BLOCK_FP8: Mapping[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
"""Hugging Face's description of matrices in FP8 with a scale for each block (transformers `FineGrainedFP8Config`, vLLM `Fp8Config`)."""
_FP8_KEYS = ("fmt", "scale_fmt", "modules_to_not_convert", "ignored_layers", "dequantize", "_pre_quantization_dtype")
"""What else such a description may say: which matrices stay as they are is told by their own formats."""


def _has_other_layers(config: Mapping[str, Any]) -> bool:
    return any(kind != "full_attention" for kind in config.get("layer_types") or ())


def _slides(config: Mapping[str, Any]) -> bool:
    """Whether a window is shorter than the longest sequence."""
    window, limit = config["sliding_window"], config["max_position_embeddings"]
    first_sliding_layer = config.get("max_window_layers", 0)
    return bool(config["use_sliding_window"] and window and window < limit and first_sliding_layer < config["num_hidden_layers"])


def _is_quantised_otherwise(config: Mapping[str, Any]) -> bool:
    found = config.get("quantization_config") or BLOCK_FP8
    described = {name: value for name, value in found.items() if name not in _FP8_KEYS and value is not None}
    return {"activation_scheme": BLOCK_FP8["activation_scheme"], **described} != BLOCK_FP8


def _shares_experts(config: Mapping[str, Any]) -> bool:
    return any(config.get(name) for name in ("shared_expert_intermediate_size", "num_shared_experts", "n_shared_experts"))


_UNSUPPORTED: tuple[tuple[Callable[[Mapping[str, Any]], object], str], ...] = (
    (_has_other_layers, "layers that are not full attention (layer_types {layer_types})"),
    (_slides, "a sliding attention window (sliding_window {sliding_window})"),
    (lambda config: config["hidden_act"] != "silu", "activation '{hidden_act}' (silu is supported)"),
    (lambda config: config.get("mlp_bias"), "mlp_bias: biases in the feed-forward layers"),
    (
        lambda config: config.get("attention_out_bias", config.get("attention_bias")),
        "attention_bias: a bias on the attention output projection",
    ),
    (lambda config: config.get("partial_rotary_factor", 1) not in (None, 1), "partial_rotary_factor {partial_rotary_factor}"),
    (_is_quantised_otherwise, "weights that are quantised in another way than in FP8 blocks of 128 x 128 (quantization_config)"),
    (lambda config: config.get("mlp_only_layers"), "dense layers between mixtures of experts (mlp_only_layers {mlp_only_layers})"),
    (
        lambda config: config.get("decoder_sparse_step", 1) != 1,
        "dense layers between mixtures of experts (decoder_sparse_step {decoder_sparse_step})",
    ),
    (_shares_experts, "shared experts, which see every token"),
)
"""Tests of the configuration with its defaults filled in, and what a model that answers true has that is not supported."""


def load_shape(folder: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face folder, from its `config.json`, or from such a file alone.

    Raises:
        DataError: the file is missing or malformed, the family is not in `FAMILIES`, or the model has an unsupported feature.
    """
    path = Path(folder) if Path(folder).is_file() else Path(folder) / "config.json"
    return make_shape(_read_config(path), path)


def make_shape(config: Mapping[str, Any], path: str | Path) -> ModelShape:
    """The shape that the contents of a `config.json` describe; `path` is what messages call it.

    Raises:
        DataError: the family is not in `FAMILIES`, a key is missing or malformed, or the model has an unsupported feature.
    """
    name = _family_name(config, path)
    family, given = FAMILIES[name], config
    config = {**_COMMON, **family.defaults, **given} | ({} if family.has_window_switch else {"use_sliding_window": True})
    try:
        _refuse_unsupported(config, path)
        _refuse_odd_keys(given, family, path)
        return _make_shape(name, family, config, read_rope(given, config, path))
    except KeyError as error:
        raise DataError(f"{path} lacks {error}; it is not the configuration of a {name} model.") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DataError(f"{path} is malformed: {error}.") from error


def hf_tensors(shape: ModelShape) -> tuple[TensorSpec, ...]:
    """All tensors of the checkpoint in model order."""
    embedding, *ends = end_tensors(shape)
    layer = layer_tensors(shape)
    layers = [TensorSpec(f"model.layers.{number}.{name}", size) for number in range(shape.num_layers) for name, size in layer]
    return (embedding, *layers, *ends)


def end_tensors(shape: ModelShape) -> tuple[TensorSpec, ...]:
    """The tensors outside the layers; `lm_head.weight` only where it is not the embedding."""
    vocabulary = (shape.vocab_size, shape.hidden_size)
    table = (
        ("model.embed_tokens.weight", vocabulary, True),
        ("model.norm.weight", (shape.hidden_size,), True),
        ("lm_head.weight", vocabulary, not shape.tied_embeddings),
    )
    return tuple(TensorSpec(name, size) for name, size, present in table if present)


def layer_tensors(shape: ModelShape) -> tuple[TensorSpec, ...]:
    """Tensors of one decoder layer, named from `model.layers.N.` on."""
    hidden, head_dim = shape.hidden_size, shape.head_dim
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
    )
    return (*(TensorSpec(name, size) for name, size, present in table if present), *_feed_forward_tensors(shape))


def _feed_forward_tensors(shape: ModelShape) -> Iterator[TensorSpec]:
    wide, narrow = (shape.ffn_size, shape.hidden_size), (shape.hidden_size, shape.ffn_size)
    names = shape.expert_names
    if names is None:
        yield from (TensorSpec("mlp.gate_proj.weight", wide), TensorSpec("mlp.up_proj.weight", wide))
        yield TensorSpec("mlp.down_proj.weight", narrow)
        return
    yield TensorSpec(names.router, (shape.num_experts, shape.hidden_size))
    for expert in range(shape.num_experts):
        yield from (TensorSpec(name, wide) for name in names.gate_up(expert))
        yield TensorSpec(names.down_of(expert), narrow)


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


def _family_name(config: Mapping[str, Any], path: str | Path) -> str:
    """What `model_type` says, by which transformers goes; vLLM goes by `architectures`, which must not say something else."""
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    architectures = [str(item) for item in config.get("architectures") or ()]
    model_type = config.get("model_type")
    names = [by_architecture.get(item) for item in architectures] or [str(model_type)]
    if names[0] not in FAMILIES:
        found = ", ".join(architectures) or model_type
        raise DataError(f"{path} describes {found}, which is not supported; known families: {', '.join(FAMILIES)}.")
    if model_type is None:
        raise DataError(f"{path} lacks 'model_type', by which transformers tells a model; {names[0]} is that of {architectures[0]}.")
    if set(names) != {model_type}:
        raise DataError(
            f"{path} has model_type '{model_type}' and architectures {architectures}, which are different models to different readers; "
            "correct the one that is wrong."
        )
    return str(names[0])


def _refuse_unsupported(config: Mapping[str, Any], path: str | Path) -> None:
    for has_feature, sentence in _UNSUPPORTED:
        if has_feature(config):
            raise DataError(f"{path} asks for {sentence.format_map(config)}, which is not supported.")


def _refuse_odd_keys(given: Mapping[str, Any], family: Family, path: str | Path) -> None:
    odd = odd_key(given, has_experts=family.experts is not None)
    if odd is not None:
        raise DataError(
            f"{path} has {odd.name} {json.dumps(odd.value)}, which some readers of a {family.architecture} compute and others ignore; "
            "it is not supported, so take it out if the weights were trained without it."
        )


def _make_shape(name: str, family: Family, config: Mapping[str, Any], rope: Rope) -> ModelShape:
    heads, hidden = integer(config, "num_attention_heads"), integer(config, "hidden_size")
    ffn_size, num_experts, experts_per_token = _feed_forward(family, config)
    return ModelShape(
        family=name,
        num_layers=integer(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads if config["num_key_value_heads"] is None else integer(config, "num_key_value_heads"),
        head_dim=_head_dim(family, config, hidden, heads),
        ffn_size=ffn_size,
        vocab_size=integer(config, "vocab_size"),
        tied_embeddings=truth(config, "tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        norm_eps=number(config, "rms_norm_eps"),
        max_positions=integer(config, "max_position_embeddings"),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
    )


def _head_dim(family: Family, config: Mapping[str, Any], hidden: int, heads: int) -> int:
    found = config["head_dim"]
    if found is None and "head_dim" not in family.defaults:
        return hidden // heads
    size = integer(config, "head_dim")
    if family.has_derived_heads and size * heads != hidden:
        raise ValueError(f"head_dim is {size}, which vLLM takes to be {hidden} / {heads}")
    return size


def _feed_forward(family: Family, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Intermediate size, experts, experts per token; transformers 5 writes `num_local_experts` where others have `num_experts`."""
    if family.experts is None:
        return integer(config, "intermediate_size"), 0, 0
    size = "moe_intermediate_size" if config.get("moe_intermediate_size") else "intermediate_size"
    count = "num_local_experts" if config.get("num_local_experts") else "num_experts"
    return integer(config, size), integer(config, count), integer(config, "num_experts_per_tok")
