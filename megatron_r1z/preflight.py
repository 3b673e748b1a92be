"""What can be refused before any rank starts: one sentence, exit status 2.

The records of `config.py` refuse what they can see alone; this is what needs the model folder, the files or the machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_r1z.config import PretrainConfig, QuestionSource, TrainConfig
from megatron_r1z.corpus import check_corpus
from megatron_r1z.errors import ConfigError, MissingExtraError
from megatron_r1z.export import locate_tensors
from megatron_r1z.grading.grader import check_reward_function
from megatron_r1z.layout.blocks import engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, RopeScaling, load_shape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.prompts import load_questions, load_tokenizer, make_template

CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM 0.32's CPU attention computes (its list, and 48, which was measured to work)."""
MEGATRON_ROPE_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
"""What megatron-core 0.16.1 has built in (`RotaryEmbedding._apply_scaling`); all Llama 3 models have these, apart from the factor."""
ITEMSIZE = {"fp32": 4, "bf16": 2}


def check_train(config: TrainConfig) -> None:
    """Refuse a reinforcement learning run that cannot work.

    Raises:
        UsageError: one sentence with the numbers and what to do next.
    """
    require_libraries(("torch", "megatron.core", "vllm", "transformers", "sympy", "math_verify"))
    shape = _check_model(config)
    engine_layout(shape, config.parallel.num_ranks, config.rollout.tensor_parallel_size)
    _check_head_size(shape)
    _check_lengths(config, shape)
    tokenizer = load_tokenizer(config.model.path)
    make_template(config.data, tokenizer)
    _check_sources([*config.data.train, *config.evaluation.sets])
    if config.grading.function is not None:
        check_reward_function(config.grading.function)


def check_pretrain(config: PretrainConfig) -> None:
    """Refuse a pre-training run that cannot work.

    Raises:
        UsageError: one sentence with the numbers and what to do next.
    """
    require_libraries(("torch", "megatron.core", "transformers"))
    shape = _check_model(config)
    if config.corpus.max_document_tokens > shape.max_positions:
        raise ConfigError(
            f"corpus.max_document_tokens is {config.corpus.max_document_tokens}; the model has {shape.max_positions} positions."
        )
    load_tokenizer(config.model.path)
    check_corpus(config.corpus)


def require_libraries(modules: Sequence[str]) -> None:
    """Refuse to start without a library of the `cpu` or `gpu` extra.

    Raises:
        MissingExtraError: names the module and the extra to install.
    """
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise MissingExtraError(
                f"{module} is not installed; run `make env`, or install the package with its extra: pip install 'megatron-r1z[cpu]' "
                "on a machine without a GPU, 'megatron-r1z[gpu]' with one."
            )


def _check_model(config: TrainConfig | PretrainConfig) -> ModelShape:
    _check_folder(Path(config.logging.folder), config.checkpoint.resume)
    shape, parallel = load_shape(config.model.path), config.parallel
    topology = Topology(parallel.num_ranks, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.virtual_pipeline_size)
    megatron_layout(shape, topology, 1)
    if not config.model.random_init:
        locate_tensors(config.model.path)
    if shape.rope_scaling is not None and shape.rope_scaling != replace(MEGATRON_ROPE_SCALING, factor=shape.rope_scaling.factor):
        raise ConfigError(
            f"the model scales its rotary frequencies by {shape.rope_scaling}; of these Megatron takes the factor only and has "
            f"{MEGATRON_ROPE_SCALING} for the rest."
        )
    if config.optimizer.distributed and not _has_cuda():
        raise ConfigError(
            "optimizer.distributed keeps state that megatron-core cannot restore from a checkpoint without Transformer Engine or apex; "
            "set optimizer.distributed=false on a machine without a GPU."
        )
    return shape


def _check_folder(folder: Path, resume: bool) -> None:
    latest = folder / "checkpoints" / "latest"
    if latest.exists() and not resume:
        raise ConfigError(
            f"{folder} holds checkpoint {latest.read_text().strip()} and checkpoint.resume is false; choose another logging.folder, "
            "or delete this one to start again."
        )


def _check_head_size(shape: ModelShape) -> None:
    if shape.head_dim not in CPU_HEAD_SIZES and not _has_cuda():
        raise ConfigError(
            f"the model has a head size of {shape.head_dim}, which vLLM cannot compute on a CPU; "
            f"sizes that it can are {', '.join(map(str, CPU_HEAD_SIZES))}."
        )


def _check_lengths(config: TrainConfig, shape: ModelShape) -> None:
    length, rollout = config.max_model_tokens, config.rollout
    if length > shape.max_positions:
        raise ConfigError(
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_response_tokens {rollout.max_response_tokens} "
            f"= {length}, but the model has {shape.max_positions} positions; lower one of them by {length - shape.max_positions}."
        )
    heads = max(1, shape.num_kv_heads // rollout.tensor_parallel_size)
    needed = 2 * shape.num_layers * heads * shape.head_dim * ITEMSIZE[config.precision.engine] * length
    if needed > rollout.kv_cache_bytes:
        raise ConfigError(
            f"rollout.kv_cache_bytes is {rollout.kv_cache_bytes}, but one sequence of {length} tokens needs {needed}; "
            "raise it to many times that, as sequences run side by side."
        )


def _check_sources(sources: Sequence[QuestionSource]) -> None:
    for source in sources:
        load_questions(source)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
