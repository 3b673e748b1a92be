"""FP8 recipes: what is refused, with which rule and number, and what megatron-core is told."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args

import pytest

from megatron_r1z.config import Fp8Config, Fp8Recipe, ParallelConfig, PrecisionConfig
from megatron_r1z.errors import ConfigError
from megatron_r1z.fp8.recipes import (
    NEEDS,
    Facts,
    check_policy,
    describe,
    is_fp8_layer,
    linear_shapes,
    machine_refusal,
    megatron_fields,
    tokens_multiple,
)
from megatron_r1z.layout.families import ModelShape

CPU = Facts()
ADA = Facts((8, 9), (12, 9), (2, 20, 2))
HOPPER = Facts((9, 0), (13, 0), (2, 20, 2))
BLACKWELL = Facts((10, 0), (13, 0), (2, 20, 2))
BLACKWELL_WORKSTATION = Facts((12, 0), (13, 0), (2, 20, 2))
LLAMA_8B = ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, False, False, 5e5, None, 1e-5, 8192)
SMOLLM2 = ModelShape("llama", 30, 576, 9, 3, 64, 1536, 49152, True, False, False, 1e5, None, 1e-5, 8192)
QWEN_HALF = ModelShape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, True, False, 1e6, None, 1e-6, 32768)


def refusal(recipe: Fp8Recipe = "blockwise", shape: ModelShape = LLAMA_8B, facts: Facts = HOPPER, **options: Any) -> str:
    parallel = ParallelConfig(
        **{name: options.pop(name) for name in list(options) if name in {item.name for item in fields(ParallelConfig)}}
    )
    with pytest.raises(ConfigError) as caught:
        check_policy(Fp8Config(recipe=recipe, **options), shape, parallel, facts)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def test_every_recipe_of_the_configuration_has_its_needs() -> None:
    assert set(NEEDS) == set(get_args(Fp8Recipe))


@pytest.mark.parametrize(
    ("facts", "possible"),
    [
        (CPU, {"blockwise"}),
        (ADA, {"tensorwise", "delayed"}),
        (HOPPER, {"blockwise", "tensorwise", "delayed"}),
        (BLACKWELL, {"blockwise", "mxfp8", "tensorwise", "delayed"}),
        (BLACKWELL_WORKSTATION, {"blockwise", "tensorwise", "delayed"}),
        (replace(HOPPER, cuda=(12, 8)), {"tensorwise", "delayed"}),
        (replace(HOPPER, transformer_engine=(2, 2)), {"tensorwise", "delayed"}),
        (replace(HOPPER, transformer_engine=None), set()),
        (Facts((8, 0), (13, 0), (2, 20, 2)), set()),
    ],
)
def test_which_machine_can_run_which_recipe(facts: Facts, possible: set[str]) -> None:
    """As Transformer Engine's own functions say (2.20.2, pytorch/quantization.py:149-189) and megatron-core's `get_fp8_recipe`."""
    assert {recipe for recipe in NEEDS if machine_refusal(recipe, facts) is None} == possible


@pytest.mark.parametrize(
    ("recipe", "facts", "words"),
    [
        ("mxfp8", CPU, "it needs a GPU, and there is none (blockwise is emulated without one)"),
        ("blockwise", ADA, "it needs compute capability 9.0 or higher, and the GPU has 8.9"),
        ("mxfp8", BLACKWELL_WORKSTATION, "it needs a compute capability below 12.0, and the GPU has 12.0"),
        ("blockwise", replace(HOPPER, cuda=(12, 8)), "it needs CUDA 12.9 or higher, and torch has 12.8"),
        ("blockwise", replace(HOPPER, cuda=None), "it needs CUDA 12.9 or higher, and torch has none"),
        ("delayed", replace(HOPPER, transformer_engine=None), "transformer_engine.pytorch cannot be imported; install the extra gpu"),
        ("blockwise", replace(HOPPER, transformer_engine=(2, 2, 1)), "it needs Transformer Engine 2.3 or higher, and 2.2.1 is installed"),
    ],
)
def test_refusals_of_a_machine_name_the_rule_and_the_number(recipe: Fp8Recipe, facts: Facts, words: str) -> None:
    assert words in (machine_refusal(recipe, facts) or "")
    assert words in refusal(recipe, facts=facts)


def test_what_can_run_is_not_refused() -> None:
    for facts in (CPU, HOPPER):
        check_policy(Fp8Config(), LLAMA_8B, ParallelConfig(num_ranks=8, tensor_parallel_size=8), facts)
    check_policy(Fp8Config(recipe="tensorwise"), SMOLLM2, ParallelConfig(), HOPPER)
    check_policy(Fp8Config(), QWEN_HALF, ParallelConfig(), CPU)
    check_policy(Fp8Config(recipe="delayed"), LLAMA_8B, ParallelConfig(recompute="full"), HOPPER)


def test_shapes_of_the_matrices_of_a_rank() -> None:
    assert linear_shapes(LLAMA_8B, 4) == {
        "linear_qkv": (1536, 4096),
        "linear_proj": (4096, 1024),
        "linear_fc1": (3584, 4096),
        "linear_fc2": (4096, 3584),
    }


def test_matrices_that_do_not_fit_are_refused_with_what_would() -> None:
    assert refusal(shape=SMOLLM2) == (
        "precision.fp8.recipe blockwise needs multiples of 128 in every matrix of a rank: linear_qkv has 960 rows under "
        "parallel.tensor_parallel_size 1; tensorwise does with multiples of 16; or set precision.policy=bf16."
    )
    two = {"num_ranks": 2, "tensor_parallel_size": 2}
    small = replace(LLAMA_8B, hidden_size=256, num_heads=2, num_kv_heads=2, ffn_size=384)
    assert "linear_fc1 has 192 rows in either half under parallel.tensor_parallel_size 2; parallel.tensor_parallel_size 1 does." in refusal(
        shape=small, **two
    )
    assert "linear_qkv has 576 columns" in refusal(shape=replace(SMOLLM2, num_heads=8, num_kv_heads=4), facts=CPU)
    odd = replace(SMOLLM2, hidden_size=100)
    assert refusal("tensorwise", odd).endswith(
        "linear_qkv has 100 columns under parallel.tensor_parallel_size 1; set precision.policy=bf16."
    )


def test_layers_in_bf16() -> None:
    assert "first_layers_bf16 is 17; a pipeline stage has 16 layers" in refusal(first_layers_bf16=17, num_ranks=2, pipeline_parallel_size=2)
    assert "1 + 2 of the 3 layers in bf16, which is all" in refusal(
        shape=replace(LLAMA_8B, num_layers=3), first_layers_bf16=1, last_layers_bf16=2
    )
    kept = Fp8Config(first_layers_bf16=1, last_layers_bf16=2)
    assert [is_fp8_layer(kept, number, 5) for number in range(5)] == [False, True, True, False, False]


def test_delayed_scaling_with_recompute_needs_checkpoints_that_leave_nothing_behind() -> None:
    old = replace(HOPPER, transformer_engine=(2, 19, 0))
    sentence = refusal("delayed", facts=old, recompute="full")
    assert "needs Transformer Engine 2.20.2 or higher, and 2.19.0 is installed; set parallel.recompute=none" in sentence
    check_policy(Fp8Config(recipe="tensorwise"), LLAMA_8B, ParallelConfig(recompute="full"), old)
    check_policy(Fp8Config(recipe="delayed"), LLAMA_8B, ParallelConfig(), old)


def test_a_run_says_what_it_does() -> None:
    assert describe(Fp8Config(first_layers_bf16=2, last_layers_bf16=1), HOPPER) == (
        "FP8 blockwise, by Transformer Engine; the first 2 layers and the last layer in bf16"
    )


@pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")  # megatron-core about its own default
@pytest.mark.parametrize("recipe", get_args(Fp8Recipe))
def test_megatron_takes_the_fields(recipe: Fp8Recipe) -> None:
    """The installed megatron-core: 0.16.1, or 0.19 in the environment of `make test-megatron-latest`."""
    transformer_config = pytest.importorskip("megatron.core.transformer.transformer_config")
    ends = 0 if recipe == "delayed" else 1
    chosen = megatron_fields(Fp8Config(recipe=recipe, first_layers_bf16=ends, last_layers_bf16=ends))
    made = transformer_config.TransformerConfig(num_layers=4, hidden_size=128, num_attention_heads=2, bf16=True, **chosen)
    assert made.fp8 == ("hybrid" if recipe in ("tensorwise", "delayed") else "e4m3")
    assert {name: getattr(made, name) for name in chosen} == chosen
    enums = pytest.importorskip("megatron.core.enums")
    assert recipe in {item.value for item in enums.Fp8Recipe}


@pytest.mark.parametrize("recipe", NEEDS)
def test_what_travels_between_ranks_is_made_of_whole_blocks(recipe: Fp8Recipe) -> None:
    """Transformer Engine gathers blocks of 1 x 128 both ways as they are and quantises anything else again."""
    precision = PrecisionConfig(policy="fp8", fp8=Fp8Config(recipe=recipe))
    alone, shared = tokens_multiple(precision), tokens_multiple(precision, sequence_parallel=True)
    assert shared == (128 if recipe == "blockwise" else alone)
    assert shared % alone == 0
    assert tokens_multiple(PrecisionConfig(policy="bf16"), sequence_parallel=True) == 1
