"""What the shape of a model refuses of a configuration. Standard library only, so that a plan is refused for what a run would be."""

from __future__ import annotations

from megatron_r1z.config import ITEMSIZE, EvaluateConfig, ParallelConfig, TrainConfig
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.topology import nearly_even


def check_dense(path: str, shape: ModelShape) -> None:
    """Refuse a mixture of experts, for which no policy is built.

    Raises:
        ConfigError: with the number of experts.
    """
    if shape.num_experts:
        raise ConfigError(
            f"{path} is a mixture of {shape.num_experts} experts, and the policy is built for dense models only; "
            "`megatron-r1z plan --model` works with it, as do import and export of its weights."
        )


def check_layers(parallel: ParallelConfig, num_layers: int) -> None:
    """Refuse a pipeline that the layers cannot be split over.

    Raises:
        ConfigError: with a split that would do.
    """
    sizes, chunks = parallel.pipeline_layers, parallel.num_chunks
    if sum(sizes) == num_layers or (not sizes and num_layers % chunks == 0):
        return
    if sizes:
        wrong = f"parallel.pipeline_layers {list(sizes)} adds up to {sum(sizes)}, but the model has {num_layers} layers"
    else:
        wrong = f"the model's {num_layers} layers cannot be split evenly over {parallel.chunks_in_words}"
    if num_layers < chunks:
        remedy = f"lower parallel.pipeline_parallel_size or parallel.virtual_pipeline_size to at most {num_layers} chunks"
    else:
        remedy = f"set parallel.pipeline_layers, for example to {list(nearly_even(num_layers, chunks))}"
    raise ConfigError(f"{wrong}; {remedy}.")


def check_lengths(config: TrainConfig | EvaluateConfig, shape: ModelShape, auto_cache_bytes: int | None = None) -> None:
    """Refuse prompts and responses that exceed the model's positions or the key-value cache.

    `auto_cache_bytes` is what an automatic cache has; None: at least what it needs.

    Raises:
        ConfigError: with the numbers.
    """
    length, rollout = config.max_model_tokens, config.rollout
    if length > shape.max_positions:
        raise ConfigError(
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_response_tokens {rollout.max_response_tokens} "
            f"= {length}, but the model has {shape.max_positions} positions; lower one of them by {length - shape.max_positions}."
        )
    heads = max(1, shape.num_kv_heads // rollout.tensor_parallel_size)
    needed = 2 * shape.num_layers * heads * shape.head_dim * ITEMSIZE[config.precision.engine_format] * length
    cache = auto_cache_bytes if rollout.kv_cache_bytes == "auto" else rollout.kv_cache_bytes
    if cache is not None and needed > cache:
        raise ConfigError(
            f"rollout.kv_cache_bytes is {cache}, but one sequence of {length} tokens needs {needed}; "
            "raise it to many times that, as sequences run side by side."
        )
