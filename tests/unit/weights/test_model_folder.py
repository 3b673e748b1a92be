"""Every variant of a model folder is, to the policy, the model that transformers reads, or it is refused with the field or the tensor."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_r1z.errors import DataError
from megatron_r1z.fp8.blocks import quantise_weight
from megatron_r1z.layout.families import BLOCK_FP8, hf_tensors, load_shape, make_shape
from megatron_r1z.layout.fp8 import SCALES
from megatron_r1z.weights.model_folder import check_tensors, check_tokens

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "quickstart"))
make_task = importlib.import_module("make_task")

WORKER = Path(__file__).with_name("folder_rank.py")
TOKENS = tuple(range(2, 38))  # of the worker, which this process does not load Megatron for
BASE: dict[str, Any] = {
    **{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
    **{"vocab_size": 40, "max_position_embeddings": 128},
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LONG = {"max_position_embeddings": 65536}
FULL = {"rope_theta": 5e5, "rope_type": "default"}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """A folder that departs from a plain one of `family`; None as a value of `config` takes the key away."""

    family: str = "llama"
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[Tensors], Tensors] = lambda tensors: tensors
    files: Callable[[Path], object] = lambda folder: None
    refused: str = ""
    """With what words; nothing: it is not."""


def add(**more: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    """Tensors of random numbers; two underscores stand for a dot."""
    return lambda tensors: tensors | {name.replace("__", "."): torch.randn(size) for name, size in more.items()}


def drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def recast(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


def split(folder: Path) -> dict[str, str]:
    """Two files and their index in place of the one file; returns the index's map."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    write_index(folder, files)
    return files


def write_index(folder: Path, files: Mapping[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict(files)}))


def index_of_one(folder: Path) -> None:
    write_index(folder, dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors"))


def stray_file(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    split(folder)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def outside(folder: Path) -> None:
    files = split(folder)
    away = folder.with_name(f"{folder.name}-away.safetensors")
    first = min(files.values())
    shutil.move(folder / first, away)
    write_index(folder, {name: f"../{away.name}" if file == first else file for name, file in files.items()})


def swapped(folder: Path) -> None:
    files = split(folder)
    first, second = sorted(set(files.values()))
    write_index(folder, {name: second if file == first else first for name, file in files.items()})


def unlisted(folder: Path) -> None:
    files = split(folder)
    write_index(folder, {name: file for name, file in files.items() if name != "model.layers.1.mlp.up_proj.weight"})


def twice(folder: Path) -> None:
    files = split(folder)
    path = folder / files["model.norm.weight"]
    other = folder / next(file for file in files.values() if file != path.name)
    save_file(load_file(other) | {"model.norm.weight": load_file(path)["model.norm.weight"]}, other, {"format": "pt"})


def shard(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / min(split(folder).values()))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(100))


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4932307584\n")


def only_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_fp8(tensors: Tensors) -> Tensors:
    name = "model.layers.0.mlp.up_proj.weight"
    data, scales = quantise_weight(tensors[name])
    return tensors | {name: data, name + SCALES: scales}


def odd(name: str, value: Any, family: str = "llama") -> Variant:
    return Variant(family, {name: value}, refused=rf"{name} ")


TIED = {"tie_word_embeddings": True}
SAME = {
    **{family: Variant(family) for family in ("llama", "mistral", "qwen2", "qwen3")},
    **{f"{family}_tied": Variant(family, TIED) for family in ("llama", "mistral", "qwen2", "qwen3")},
    **{f"{family}_tie_key_absent": Variant(family, {"tie_word_embeddings": None}) for family in ("llama", "qwen2")},
    "tied_and_equal": Variant(
        config=TIED, tensors=lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    ),
    "own_head_size": Variant("qwen3", {"head_dim": 32}),
    "head_size_null": Variant(files=lambda folder: edit(folder, head_dim=None)),
    "all_heads": Variant("qwen2", files=lambda folder: edit(folder, num_key_value_heads=None), tensors=lambda tensors: whole_keys(tensors)),
    "theta": Variant(config={"rope_theta": 5e5}),
    "theta_in_table": Variant(config={"rope_parameters": FULL}),
    "theta_null_beside_table": Variant(config={"rope_parameters": FULL}, files=lambda folder: edit(folder, rope_theta=None)),
    "theta_in_both": Variant(config={"rope_parameters": FULL, "rope_theta": 5e5}),
    "llama3": Variant(config=LONG | {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama3_in_table": Variant(config=LONG | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    "llama3_twice": Variant(config=LONG | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "all_dimensions": Variant(config={"partial_rotary_factor": 1.0}),
    "window_off": Variant("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}),
    "window_of_all": Variant("mistral", {"sliding_window": 128}),
    "full_layers": Variant("qwen3", {"layer_types": ["full_attention"] * 2}),
    "off": Variant(config={"logit_scale": 1.0, "attn_logit_softcapping": None, "final_logit_softcapping": 0, "residual_multiplier": 1}),
    "off_too": Variant(
        config={"clip_qkv": None, "query_pre_attn_scalar": None, "use_qk_norm": False, "is_causal": True, "use_mrope": False}
    ),
    "of_old": Variant(
        config={
            **{"_name_or_path": "x", "transformers_version": "4.31.0", "torch_dtype": "float16", "use_cache": True, "pretraining_tp": 2},
            **{"initializer_range": 0.02, "attention_dropout": 0.1, "unsloth_fixed": True, "unsloth_version": "2025.1", "pad_token_id": 0},
            **{
                "is_llama_config": True,
                "rope_interleaved": False,
                "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4": "f16"}},
            },
            **{"_attn_implementation_autoset": True, "max_sequence_length": 2048, "rope_scaling": None, "temperature": 0.6},
        }
    ),
    "own_code": Variant(config={"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}),
    "buffers": Variant(
        tensors=add(model__layers__0__self_attn__rotary_emb__inv_freq=(8,), model__layers__1__self_attn__rotary_emb__inv_freq=(8,))
    ),
    "shards": Variant(files=split),
    "index_of_one": Variant(files=index_of_one),
    "half": Variant(tensors=lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()}),
}
REFUSED = {
    "tied_and_another": Variant(
        config=TIED, tensors=add(lm_head__weight=(40, 64)), refused=r"lm_head\.weight that differs .*tie_word_embeddings"
    ),
    "tied_and_another_format": Variant(
        config=TIED,
        tensors=lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].half()},
        refused=r"lm_head\.weight that differs",
    ),
    "untied_without": Variant(tensors=drop("lm_head.weight"), refused=r"no tensor lm_head\.weight"),
    "missing": Variant(tensors=drop("model.layers.1.mlp.up_proj.weight"), refused=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
    "missing_bias": Variant("qwen2", tensors=drop("model.layers.0.self_attn.q_proj.bias"), refused=r"no tensor .*q_proj\.bias"),
    "other_prefix": Variant(
        tensors=lambda tensors: {f"base.{name}": tensor for name, tensor in tensors.items()},
        refused=r"no tensor model\.embed_tokens\.weight \(and 20 others\)",
    ),
    "further_layers": Variant(config={"num_hidden_layers": 1}, refused=r"has a tensor model\.layers\.1\.\S+ \(and 8 others\)"),
    **{
        f"stray_{name}_bias": Variant(
            tensors=add(**{f"model__layers__0__{block}__{name}_proj__bias": (size,)}),
            refused=rf"tensor model\.layers\.0\.{block}\.{name}_proj\.bias",
        )
        for block, name, size in (("self_attn", "q", 64), ("self_attn", "k", 32), ("self_attn", "o", 64), ("mlp", "down", 64))
    },
    "stray_o_bias_beside_qkv": Variant("qwen2", tensors=add(model__layers__0__self_attn__o_proj__bias=(64,)), refused=r"o_proj\.bias"),
    "value_head": Variant(tensors=add(v_head__summary__weight=(1, 64)), refused=r"has a tensor v_head\.summary\.weight"),
    "shape": Variant(
        tensors=recast("model.norm.weight", lambda tensor: tensor[:32].clone()),
        refused=r"model\.norm\.weight has shape \[32\]; config\.json says \[64\]",
    ),
    "transposed": Variant(
        tensors=recast("model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.T.contiguous()),
        refused=r"up_proj\.weight has shape \[64, 96\]",
    ),
    "integers": Variant(tensors=recast("model.norm.weight", lambda tensor: tensor.int()), refused=r"model\.norm\.weight is stored as I32"),
    "fp8_unsaid": Variant(tensors=in_fp8, refused=r"in FP8, and config\.json has no quantization_config"),
    "fp8_without_scales": Variant(
        config={"quantization_config": BLOCK_FP8},
        tensors=recast("model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.to(torch.float8_e4m3fn)),
        refused=r"there is no model\.layers\.0\.mlp\.up_proj\.weight_scale_inv",
    ),
    "stray_file": Variant(
        files=stray_file, refused=r"holds model\.safetensors and model\.safetensors\.index\.json, which does not list it"
    ),
    "outside": Variant(files=outside, refused=r"must lie beside its index"),
    "swapped": Variant(files=swapped, refused=r"though model\.safetensors\.index\.json says so; it is in "),
    "unlisted": Variant(files=unlisted, refused=r"has a tensor model\.layers\.1\.mlp\.up_proj\.weight, which .* does not list"),
    "twice": Variant(files=twice, refused=r"model\.norm\.weight is in .* and in "),
    "shard_missing": Variant(files=shard(Path.unlink), refused=r"cannot read .*model-00001-of-00002\.safetensors: No such file"),
    "shard_cut": Variant(files=shard(cut), refused=r"model-00001-of-00002\.safetensors is cut off: its header announces \d+ bytes"),
    "shard_pointer": Variant(files=shard(pointer), refused=r"model-00001-of-00002\.safetensors is a pointer of Git LFS"),
    "cut": Variant(files=lambda folder: cut(folder / "model.safetensors"), refused="is cut off"),
    "longer": Variant(files=lambda folder: lengthen(folder / "model.safetensors"), refused="is longer than it should be"),
    "pointer": Variant(files=lambda folder: pointer(folder / "model.safetensors"), refused="is a pointer of Git LFS"),
    "empty": Variant(files=lambda folder: (folder / "model.safetensors").write_bytes(b""), refused="is not a safetensors file"),
    "only_bin": Variant(files=only_bin, refused="holds neither model.safetensors nor"),
    "half_the_dimensions": Variant(config={"partial_rotary_factor": 0.5}, refused=r"partial_rotary_factor 0\.5"),
    "half_in_table": Variant(
        config={"rope_parameters": FULL | {"partial_rotary_factor": 0.5}}, refused=r"partial_rotary_factor 0\.5 in rope_parameters"
    ),
    "half_in_scaling": Variant(
        config={"rope_scaling": FULL | {"partial_rotary_factor": 0.5}}, refused=r"partial_rotary_factor 0\.5 in rope_scaling"
    ),
    "two_thetas": Variant(
        config={"rope_theta": 1e4, "rope_parameters": FULL}, refused=r"rope_theta 10000\.0 and 500000 in rope_parameters"
    ),
    "two_tables": Variant(
        config=LONG | {"rope_scaling": LLAMA3, "rope_parameters": FULL}, refused=r"rope_scaling and rope_parameters, which disagree"
    ),
    "two_lengths": Variant(
        config=LONG | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096},
        refused=r"original_max_position_embeddings 4096 and 8192",
    ),
    "two_types": Variant(config={"rope_scaling": LLAMA3 | {"type": "yarn"}}, refused=r"rope type 'llama3 and yarn'"),
    "no_type": Variant(config={"rope_scaling": {"factor": 4.0}}, refused=r"factor 4\.0 in rope_scaling"),
    "sections": Variant("qwen2", {"rope_scaling": FULL | {"mrope_section": [4, 2, 2]}}, refused=r"mrope_section \[4, 2, 2\]"),
    "by_layer": Variant("qwen3", {"rope_parameters": {"full_attention": FULL}}, refused="full_attention"),
    "window": Variant("mistral", {"sliding_window": 16}, refused="sliding_window 16"),
    "window_that_mistral_does_not_turn_off": Variant(
        "mistral", {"sliding_window": 16, "use_sliding_window": False}, refused="sliding_window 16"
    ),
    "window_that_vllm_has": Variant(config={"sliding_window": 16}, refused="sliding_window 16"),
    "linear_layers": Variant("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, refused="layer_types"),
    "head_size_of_qwen2": Variant("qwen2", {"head_dim": 32}, refused="head_dim is 32"),
    "head_size_null_in_qwen3": Variant("qwen3", files=lambda folder: edit(folder, head_dim=None), refused="head_dim is null"),
    "other_architecture": Variant(
        config={"architectures": ["MistralForCausalLM"]}, refused=r"model_type 'llama' and architectures \['Mistral"
    ),
    "no_type_at_all": Variant(config={"model_type": None, "architectures": ["LlamaForCausalLM"]}, refused="lacks 'model_type'"),
    "tied_as_text": Variant(config={"tie_word_embeddings": "false"}, refused=r"tie_word_embeddings is \"false\""),
    "quantised_otherwise": Variant(config={"quantization_config": {"quant_method": "awq", "bits": 4}}, refused="quantization_config"),
    "awq_that_says_blocks": Variant(config={"quantization_config": BLOCK_FP8 | {"quant_method": "gptq"}}, refused="quantization_config"),
    "cache_in_fp8": Variant(
        config={"quantization_config": BLOCK_FP8 | {"kv_cache_scheme": {"num_bits": 8}}}, refused="quantization_config"
    ),
    **{
        name: odd(name, value)
        for name, value in {
            **{
                "logit_scale": 0.5,
                "attention_multiplier": 0.1,
                "residual_multiplier": 0.2,
                "embedding_multiplier": 12.0,
                "logits_scaling": 8.0,
            },
            **{
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "clip_qkv": 8.0,
                "query_pre_attn_scalar": 144,
                "scale_emb": 12,
            },
            **{
                "qkv_bias": True,
                "use_qk_norm": True,
                "qk_layernorm": True,
                "norm_type": "layernorm",
                "rotary_pct": 0.25,
                "rope_interleaved": True,
            },
            **{
                "rotary_emb_base": 5e5,
                "attention_chunk_size": 8192,
                "attn_temperature_tuning": True,
                "is_causal": False,
                "is_encoder_decoder": True,
            },
            **{
                "num_local_experts": 8,
                "compression_config": {"format": "x"},
                "text_config": {"hidden_size": 64},
                "dual_chunk_attention_config": {"a": 1},
            },
            **{
                "use_bidirectional_attention": True,
                "block_configs": [{}],
                "hidden_activation": "gelu",
                "layer_norm_eps": 1e-5,
                "use_parallel_residual": True,
            },
        }.items()
    },
    "qk_norm_in_qwen2": odd("qk_norm", True, "qwen2"),
    "activation": Variant(config={"hidden_act": "gelu"}, refused="activation 'gelu'"),
    "mlp_bias": Variant(config={"mlp_bias": True}, refused="mlp_bias"),
    "attention_bias": Variant("qwen3", {"attention_bias": True}, refused="attention_bias"),
}


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def whole_keys(tensors: Tensors) -> Tensors:
    """As many key-value heads as heads."""
    return {name: torch.cat([tensor, tensor * 0.9]) if "k_proj" in name or "v_proj" in name else tensor for name, tensor in tensors.items()}


def write(folder: Path, variant: Variant) -> Path:
    """A plain folder of the family, then what the variant changes."""
    plain: dict[str, Any] = {"model_type": variant.family, "tie_word_embeddings": False, **BASE}
    plain |= {"head_dim": 16, "sliding_window": None} if variant.family in ("mistral", "qwen3") else {}
    sized = plain | {name: value for name, value in variant.config.items() if name in ("tie_word_embeddings", "head_dim")}
    if not isinstance(sized["tie_word_embeddings"], bool) or (variant.family == "qwen2"):
        sized |= {"tie_word_embeddings": sized["tie_word_embeddings"] is True, "head_dim": 16}
    generator = torch.Generator().manual_seed(0)
    specs = hf_tensors(make_shape(sized, "plain"))
    tensors = {spec.name: torch.randn(spec.shape, generator=generator) * 0.25 + ("norm" in spec.name) for spec in specs}
    folder.mkdir(parents=True)
    config = plain | dict(variant.config)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    save_file(variant.tensors(tensors), folder / "model.safetensors", {"format": "pt"})
    variant.files(folder)
    return folder


@pytest.fixture(scope="module")
def policies(run_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The folders that are to be read, and the policy's log-probs of TOKENS in each."""
    pytest.importorskip("megatron.core")
    folder = tmp_path_factory.mktemp("folders")
    for name, variant in SAME.items():
        write(folder / name, variant)
    run_ranks(WORKER, 1, str(folder))
    return folder, torch.load(folder / "logprobs.pt")


@pytest.mark.parametrize("name", SAME)
def test_the_policy_is_the_model_that_transformers_reads(policies: tuple[Path, dict[str, Tensor]], name: str) -> None:
    folder, logprobs = policies
    check_tensors(folder / name, load_shape(folder / name))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    assert logits.std() > 0.5  # a model that says something
    assert (logprobs[name] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_to_another_reader_is_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "model", REFUSED[name])
    with pytest.raises(DataError, match=REFUSED[name].refused) as caught:
        check_tensors(folder, load_shape(folder))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert str(folder) in sentence


# ------------------------------------------------------------------------------------------------------------------------ tokenizer


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    make_task.save_model(tmp_path)
    return tmp_path


def test_more_rows_than_tokens_are_padding_and_fewer_are_refused(quickstart: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(quickstart)
    config = json.loads((quickstart / "config.json").read_text())
    for rows in (27, 64):
        check_tokens(quickstart, make_shape(config | {"vocab_size": rows}, "x"), tokenizer)
    with pytest.raises(DataError, match=r"has token '}' with id 26, and the model has 26 rows"):
        check_tokens(quickstart, make_shape(config | {"vocab_size": 26}, "x"), tokenizer)


def test_a_token_that_was_added_without_a_row_is_refused(quickstart: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(quickstart)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    with pytest.raises(DataError, match=r"has token '<new>' with id 27, and the model has 27 rows"):
        check_tokens(quickstart, load_shape(quickstart), tokenizer)


@pytest.mark.parametrize("text", ['{"eos_token_id": 1}', '{"eos_token_id": [1, 5]}', '{"eos_token_id": null}', "{}"])
def test_a_generation_config_that_can_be_read(quickstart: Path, text: str) -> None:
    (quickstart / "generation_config.json").write_text(text)
    check_tokens(quickstart, load_shape(quickstart), transformers.AutoTokenizer.from_pretrained(quickstart))


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": 1', "[]", "", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, 27]}', '{"eos_token_id": true}']
)
def test_a_generation_config_whose_ends_would_be_lost(quickstart: Path, text: str) -> None:
    (quickstart / "generation_config.json").write_text(text)
    with pytest.raises(DataError, match=r"generation_config\.json") as caught:
        check_tokens(quickstart, load_shape(quickstart), transformers.AutoTokenizer.from_pretrained(quickstart))
    assert "\n" not in str(caught.value)
