"""What vLLM is called with, as far as vLLM itself can say without an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_r1z.layout.fp8 import quantization_config
from megatron_r1z.rollout.cpu import prepare_import
from megatron_r1z.rollout.vllm_engine import HEAD, quantisation

SHAPE = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 320},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}


@pytest.mark.parametrize("of_the_folder", [{}, {"head_dtype": "bfloat16"}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_head_is_in_float32_whatever_the_model_says(tmp_path: Path, dtype: str, of_the_folder: dict[str, str]) -> None:
    prepare_import()
    from vllm.config import ModelConfig

    (tmp_path / "config.json").write_text(json.dumps(SHAPE | of_the_folder))
    config = ModelConfig(model=str(tmp_path), dtype=dtype, hf_overrides=dict(HEAD), skip_tokenizer_init=True)
    assert config.head_dtype is torch.float32
    assert config.dtype is getattr(torch, dtype)


def test_linear_layers_are_in_the_format_of_the_run(tmp_path: Path) -> None:
    """Not in that of the folder."""
    assert quantisation(str(tmp_path), None) == {}
    assert quantisation(str(tmp_path), ["lm_head"]) == {"quantization_config": quantization_config(["lm_head"])}
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"quantization_config": {"quant_method": "fp8"}}))
    assert quantisation(str(tmp_path), None) == {"quantization_config": None}
