"""FP8 recipes: what each needs of a machine and of a model, and what it is called in megatron-core. Standard library only.

Where there is no GPU the matrix products of recipe `blockwise` are emulated (`policy/fp8_linear.py`); the others need Transformer Engine.
What a GPU must be able to do is said by Transformer Engine 2.20.2, `pytorch/quantization.py:145-189` (`_compute_fp8_support`,
`_compute_mxfp8_support`, `_compute_fp8_block_scaling_support`); from which of its versions on megatron-core takes a recipe, by
`get_fp8_recipe` in `fp8_utils.py` of megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_r1z.config import Fp8Config, Fp8Recipe, ParallelConfig, PrecisionConfig, Recompute
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.families import ModelShape

Version = tuple[int, ...]
"""Such as (12, 9)."""


@dataclass(frozen=True)
class Facts:
    """What decides about FP8 on a machine."""

    capability: Version | None = None
    """Compute capability of the GPU, such as (9, 0); None: there is none."""
    cuda: Version | None = None
    """That torch was built with."""
    transformer_engine: Version | None = None
    """None: its torch part cannot be imported."""

    @property
    def emulates(self) -> bool:
        """Without a GPU the policy computes FP8 products in bf16."""
        return self.capability is None


class Needs(NamedTuple):
    """What a recipe asks for."""

    capability: Version
    below: Version | None
    """First compute capability that can no longer."""
    cuda: Version
    """Of the lowest capability."""
    transformer_engine: Version
    multiple: int
    """Rows and columns of every matrix on every rank."""
    tokens: int
    """Tokens of a micro-batch: the matrices are multiplied along them for the gradient of the weights."""
    format: str
    """megatron-core's name: `e4m3` everywhere, or `hybrid`, with gradients in e5m2."""


NEEDS: dict[Fp8Recipe, Needs] = {
    "blockwise": Needs((9, 0), None, (12, 9), (2, 3), 128, 16, "e4m3"),
    "mxfp8": Needs((10, 0), (12, 0), (12, 8), (2, 1), 32, 32, "e4m3"),
    "tensorwise": Needs((8, 9), None, (12, 1), (2, 2), 16, 16, "hybrid"),
    "delayed": Needs((8, 9), None, (12, 1), (2, 1), 16, 16, "hybrid"),
}
"""`blockwise` would do with multiples of 16 in Transformer Engine; with 128, blocks do not depend on how many ranks share a matrix, and an
engine can take them over as they are. `tokens`: the leading dimension that its products check (`common/gemm/cublaslt_gemm.cu:161-295`),
and 32 where 32 tokens share a scale."""
GATHERED_TOKENS: dict[Fp8Recipe, int] = {"blockwise": 128}
"""Tokens of a rank under sequence parallelism, where activations travel in FP8: Transformer Engine sends whole blocks, and anything else in
bf16, to be quantised a second time (`pytorch/distributed.py:1148`, `_start_all_gather_fp8_blockwise`)."""
GRADIENT_FREE_CHECKPOINTS = (2, 20, 2)
"""The first Transformer Engine whose `checkpoint()` leaves nothing behind in a pass without gradient (`pytorch/distributed.py:750-755`)."""
AMAX_HISTORY = 1024
"""Length of the history of `delayed`, and its maximum is taken: Transformer Engine's defaults. megatron-core's is the last value alone."""


def machine_refusal(recipe: Fp8Recipe, facts: Facts) -> str | None:
    """Why a recipe cannot run here: the rule and the number, without a full stop; None: it can."""
    needs = NEEDS[recipe]
    if facts.capability is None:
        return None if recipe == "blockwise" else "it needs a GPU, and there is none (blockwise is emulated without one)"
    if facts.capability < needs.capability:
        return f"it needs compute capability {_dots(needs.capability)} or higher, and the GPU has {_dots(facts.capability)}"
    if needs.below is not None and facts.capability >= needs.below:
        return f"it needs a compute capability below {_dots(needs.below)}, and the GPU has {_dots(facts.capability)}"
    if facts.cuda is None or facts.cuda < needs.cuda:
        return f"it needs CUDA {_dots(needs.cuda)} or higher, and torch has {_dots(facts.cuda)}"
    if facts.transformer_engine is None:
        return "it needs Transformer Engine on a GPU, and transformer_engine.pytorch cannot be imported; install the extra gpu"
    if facts.transformer_engine < needs.transformer_engine:
        return (
            f"it needs Transformer Engine {_dots(needs.transformer_engine)} or higher, and {_dots(facts.transformer_engine)} is installed"
        )
    return None


def check_policy(fp8: Fp8Config, shape: ModelShape, parallel: ParallelConfig, facts: Facts) -> None:
    """Refuse a policy in FP8 that this machine cannot compute, or whose matrices do not fit the recipe.

    Raises:
        ConfigError: the rule, the number and what to change.
    """
    refusal = machine_refusal(fp8.recipe, facts)
    if refusal is not None:
        raise ConfigError(f"precision.fp8.recipe {fp8.recipe} cannot run here: {refusal}; or set precision.policy=bf16.")
    _check_matrices(fp8.recipe, shape, parallel.tensor_parallel_size)
    _check_layers(fp8, shape, parallel)
    _check_recompute(fp8.recipe, parallel.recompute, facts)


def linear_shapes(shape: ModelShape, tensor_parallel_size: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of each matrix of a layer on one rank, by its name in Megatron.

    `linear_fc1` is the gate above the projection that it multiplies; one of them is given, as both have to fit.
    """
    attention = shape.num_heads * shape.head_dim // tensor_parallel_size
    keys_and_values = 2 * shape.num_kv_heads * shape.head_dim // tensor_parallel_size
    feed_forward = shape.ffn_size // tensor_parallel_size
    return {
        "linear_qkv": (attention + keys_and_values, shape.hidden_size),
        "linear_proj": (shape.hidden_size, attention),
        "linear_fc1": (feed_forward, shape.hidden_size),
        "linear_fc2": (shape.hidden_size, feed_forward),
    }


def tokens_multiple(precision: PrecisionConfig, *, sequence_parallel: bool = False) -> int:
    """The tokens of a micro-batch on a rank are padded to a multiple of this; without a GPU too, so that the same samples share one.

    >>> tokens_multiple(PrecisionConfig(policy="fp8")), tokens_multiple(PrecisionConfig())
    (16, 1)
    """
    if precision.policy != "fp8":
        return 1
    recipe = precision.fp8.recipe
    return GATHERED_TOKENS.get(recipe, NEEDS[recipe].tokens) if sequence_parallel else NEEDS[recipe].tokens


def megatron_fields(fp8: Fp8Config) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig; the same in 0.16.1 and 0.19.2.

    >>> megatron_fields(Fp8Config(first_layers_bf16=1))["fp8"]
    'e4m3'
    """
    fields: dict[str, Any] = {"fp8": NEEDS[fp8.recipe].format, "fp8_recipe": fp8.recipe}
    if fp8.recipe == "delayed":
        fields |= {"fp8_amax_history_len": AMAX_HISTORY, "fp8_amax_compute_algo": "max"}
    if fp8.first_layers_bf16 + fp8.last_layers_bf16:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
            "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
        }
    return fields


def is_fp8_layer(fp8: Fp8Config, number: int, num_layers: int) -> bool:
    """Whether layer `number`, from 0, of the whole model is computed in FP8."""
    return fp8.first_layers_bf16 <= number < num_layers - fp8.last_layers_bf16


def describe(fp8: Fp8Config, facts: Facts) -> str:
    """What a run says at its start.

    >>> describe(Fp8Config(last_layers_bf16=1), Facts())
    'FP8 blockwise, emulated (bf16 products of rounded operands, as there is no GPU); the last layer in bf16'
    """
    how = "emulated (bf16 products of rounded operands, as there is no GPU)" if facts.emulates else "by Transformer Engine"
    ends = (("first", fp8.first_layers_bf16), ("last", fp8.last_layers_bf16))
    kept = [f"the {end} {f'{count} layers' if count > 1 else 'layer'}" for end, count in ends if count]
    return f"FP8 {fp8.recipe}, {how}" + (f"; {' and '.join(kept)} in bf16" if kept else "")


def _check_matrices(recipe: Fp8Recipe, shape: ModelShape, tensor_parallel_size: int) -> None:
    wrong = _misfit(recipe, shape, tensor_parallel_size)
    if wrong is None:
        return
    smaller = [size for size in range(tensor_parallel_size - 1, 0, -1) if tensor_parallel_size % size == 0]
    fitting = next((size for size in smaller if _misfit(recipe, shape, size) is None), None)
    alternatives: tuple[Fp8Recipe, ...] = ("tensorwise", "mxfp8")
    others = [other for other in alternatives if other != recipe and _misfit(other, shape, tensor_parallel_size) is None]
    if fitting is not None:
        remedy = f"parallel.tensor_parallel_size {fitting} does"
    elif others:
        remedy = f"{others[0]} does with multiples of {NEEDS[others[0]].multiple}; or set precision.policy=bf16"
    else:
        remedy = "set precision.policy=bf16"
    raise ConfigError(
        f"precision.fp8.recipe {recipe} needs multiples of {NEEDS[recipe].multiple} in every matrix of a rank: {wrong} under "
        f"parallel.tensor_parallel_size {tensor_parallel_size}; {remedy}."
    )


def _misfit(recipe: Fp8Recipe, shape: ModelShape, tensor_parallel_size: int) -> str | None:
    """The first matrix that does not fit, in words."""
    multiple = NEEDS[recipe].multiple
    for name, (rows, columns) in linear_shapes(shape, tensor_parallel_size).items():
        for count, what in ((rows, "rows"), (columns, "columns")):
            if count % multiple:
                half = " in either half" if name == "linear_fc1" and what == "rows" else ""
                return f"{name} has {count} {what}{half}"
    return None


def _check_layers(fp8: Fp8Config, shape: ModelShape, parallel: ParallelConfig) -> None:
    """megatron-core bounds either end by the layers of a pipeline stage (`TransformerConfig.__post_init__`)."""
    limit = shape.num_layers // parallel.pipeline_parallel_size
    for name in ("first_layers_bf16", "last_layers_bf16"):
        if getattr(fp8, name) > limit:
            raise ConfigError(
                f"precision.fp8.{name} is {getattr(fp8, name)}; a pipeline stage has {limit} layers, so it can be at most that."
            )
    if fp8.first_layers_bf16 + fp8.last_layers_bf16 >= shape.num_layers:
        raise ConfigError(
            f"precision.fp8 leaves {fp8.first_layers_bf16} + {fp8.last_layers_bf16} of the {shape.num_layers} layers in bf16, which is "
            "all; leave fewer, or set precision.policy=bf16."
        )


def _check_recompute(recipe: Fp8Recipe, recompute: Recompute, facts: Facts) -> None:
    """Earlier versions keep the scales of log-prob passes for a backward pass that never comes, and the next step would take them."""
    version = facts.transformer_engine
    if recipe == "delayed" and recompute != "none" and version is not None and version < GRADIENT_FREE_CHECKPOINTS:
        raise ConfigError(
            f"precision.fp8.recipe delayed with parallel.recompute {recompute} needs Transformer Engine "
            f"{_dots(GRADIENT_FREE_CHECKPOINTS)} or higher, and {_dots(version)} is installed; set parallel.recompute=none, or take recipe "
            "tensorwise, which keeps no state."
        )


def _dots(version: Version | None) -> str:
    return "none" if version is None else ".".join(map(str, version))
