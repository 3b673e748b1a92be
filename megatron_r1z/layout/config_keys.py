"""Which keys of a `config.json` may stand there: what one reader of a folder computes and another ignores must not pass in silence.

A key that is read, or that is known to have no effect on logits, passes with any value. Of the others a key that sounds like the maths of
a decoder passes only with the value that means "off", whoever reads it; one that does not (`unsloth_version`, `is_llama_config`) passes.
Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

READ = frozenset(
    (
        *("architectures", "model_type", "auto_map", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "hidden_act"),
        *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"),
        *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "attention_bias", "attention_out_bias", "mlp_bias"),
        *("quantization_config", "mlp_only_layers", "decoder_sparse_step"),
        *("shared_expert_intermediate_size", "num_shared_experts", "n_shared_experts"),
    )
)
"""What `families.py` reads or tests itself."""
_OF_EXPERTS = frozenset(("moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"))
"""Read too in a mixture of experts; in a dense model they are as odd as any."""
_WITHOUT_EFFECT = frozenset(
    (
        "output_router_logits",  # an output for the loss that balances experts
        "router_aux_loss_coef",
        "chunk_size_feed_forward",  # the same products in pieces
        "num_logits_to_keep",
        "logits_to_keep",
    )
)
"""Keys that sound like maths and change no logits."""
_MATHS = re.compile(
    "multiplier|scal|soft_?cap|logit|cap$|capping|bias|window|sliding|rope|rotary|norm|eps$|epsilon|alibi|causal|bidirectional|chunk|clip"
    "|expert|moe|router|lora|quant|compress|head_dim|per_head|temperature_tuning|residual|position_embed|layer_types|attn_type|block_configs"
    "|attention_type|attention_class|hybrid|heterogeneous|mamba|ssm|vision|embedding_size|nextn|mtp|mup|softmax|activation|parallel_"
    "|cross_attention|encoder_decoder|pruned|layer_count|attention_sink|canvas"
)
_FACTOR = re.compile("multiplier|scal")
"""Of which 1 means off; of all others 0 does."""


class OddKey(NamedTuple):
    """A key that may change the logits of some reader, and what it says."""

    name: str
    value: Any


def odd_key(config: Mapping[str, Any], *, has_experts: bool) -> OddKey | None:
    """The first key with a value that may change logits and that nobody here knows.

    >>> odd_key({"hidden_size": 64, "use_cache": True, "logit_scale": 0.5}, has_experts=False)
    OddKey(name='logit_scale', value=0.5)
    >>> odd_key({"attn_logit_softcapping": None, "logit_scale": 1.0, "unsloth_fixed": True}, has_experts=False)
    """
    known = READ | _WITHOUT_EFFECT | (_OF_EXPERTS if has_experts else frozenset())
    return next((OddKey(name, value) for name, value in config.items() if name not in known and _may_matter(name, value)), None)


def _may_matter(name: str, value: Any) -> bool:
    if name.startswith("_") or name.endswith(("dropout", "pdrop")):  # private to a library; of training only
        return False
    if isinstance(value, Mapping) and READ & value.keys():  # a model within the model, which some readers take for the decoder
        return True
    if name == "is_causal":
        return value not in (None, True)
    return bool(_MATHS.search(name)) and not _is_off(name, value)


def _is_off(name: str, value: Any) -> bool:
    if value is None or value is False or value in ("", [], {}):
        return True
    neutral = 1 if _FACTOR.search(name) else 0
    return not isinstance(value, bool) and value == neutral
