"""What can be refused before any rank starts: one sentence, exit status 2.

The records of `config.py` refuse what they can see alone; this is what needs the model folder, the files or the machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_r1z.analysis.examine import read_levels
from megatron_r1z.analysis.judge import read_key
from megatron_r1z.config import AnalyseConfig, AnyConfig, EvaluateConfig, ParallelConfig, PretrainConfig, TrainConfig, load_config, to_tree
from megatron_r1z.corpus import check_corpus
from megatron_r1z.data_report import leak_warnings
from megatron_r1z.errors import ConfigError, MissingExtraError
from megatron_r1z.folders import kind_of
from megatron_r1z.fp8.machine import read_facts
from megatron_r1z.fp8.recipes import check_policy
from megatron_r1z.grading.functions import check_reward_function
from megatron_r1z.hf_files import locate_tensors
from megatron_r1z.layout.blocks import engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, RopeScaling, load_shape
from megatron_r1z.layout.fp8 import BLOCK, fp8_matrices
from megatron_r1z.model_checks import check_dense, check_layers, check_lengths
from megatron_r1z.prompts import load_question_sets, load_tokenizer, make_template

CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM 0.32's CPU attention computes (its list, and 48, which was measured to work)."""
MEGATRON_ROPE_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
"""What megatron-core 0.16.1 has built in (`RotaryEmbedding._apply_scaling`); all Llama 3 models have these, apart from the factor."""
WITHOUT_EFFECT_ON_RESPONSES = (
    *("data.train", "data.seed", "evaluation.sets", "evaluation.every", "grading.workers", "logging.folder", "logging.rollouts"),
    *("rollout.prompts_per_iteration", "rollout.samples_per_prompt", "rollout.temperature", "rollout.top_p", "rollout.top_k"),
    *("rollout.refit", "rollout.tensor_parallel_size", "rollout.kv_cache_bytes", "rollout.max_concurrent_sequences"),
)
"""What may differ, besides the ranks, when an evaluation goes on; the question files are compared question by question."""
WITHOUT_EFFECT_IN_ANALYSES = (
    *WITHOUT_EFFECT_ON_RESPONSES,
    *("analysis.questions", "analysis.level_column", "analysis.templates", "analysis.temperatures", "analysis.k", "analysis.keywords"),
    *("analysis.judge", "analysis.shots_path", "analysis.system_prompt"),
)
"""The same of an analysis: each template at each temperature has a file, prompts are compared, and a judge's replies are kept by what
they depend on."""


def check_train(config: TrainConfig) -> list[str]:
    """Refuse a reinforcement learning run that cannot work.

    Returns:
        What can work and is hardly meant, one sentence each: evaluation questions that are also trained on.

    Raises:
        UsageError: one sentence with the numbers and what to do next.
    """
    require_libraries(("torch", "megatron.core", "vllm", "transformers", "sympy", "math_verify"))
    _check_sampling(config, _check_model(config))
    return leak_warnings(load_question_sets(config.data.train), load_question_sets(config.evaluation.sets))


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse an evaluation that cannot work, or that would mix its responses with those of another.

    Raises:
        UsageError: one sentence with the numbers and what to do next.
    """
    require_libraries(("torch", "megatron.core", "vllm", "transformers", "sympy", "math_verify"))
    shape = load_shape(config.model.path)
    _check_weights(config, shape)
    _check_sampling(config, shape)
    load_question_sets(config.evaluation.sets)
    _check_same(config, WITHOUT_EFFECT_ON_RESPONSES)


def check_analyse(config: AnalyseConfig) -> None:
    """Refuse an analysis that cannot work, or that would mix its responses with those of another.

    Raises:
        UsageError: one sentence with the numbers and what to do next.
    """
    judge = config.analysis.judge
    own = ("openai",) if judge.url is not None else ()
    require_libraries(("torch", "megatron.core", "vllm", "transformers", "sympy", "math_verify", *own))
    read_key(judge.api_key_env)
    shape = load_shape(config.model.path)
    _check_weights(config, shape)
    for template in config.analysis.templates:
        _check_sampling(config.evaluation(template, config.analysis.temperatures[0]), shape)
    (questions,) = load_question_sets([config.analysis.questions])
    read_levels(config.analysis.questions, config.analysis.level_column, {item.question_id: item for item in questions.questions})
    _check_same(config, WITHOUT_EFFECT_IN_ANALYSES)


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
            raise MissingExtraError.of(module)


def _check_model(config: TrainConfig | PretrainConfig) -> ModelShape:
    _check_folder(Path(config.logging.folder), config.checkpoint.resume)
    shape = load_shape(config.model.path)
    _check_weights(config, shape)
    if shape.rope_scaling is not None and shape.rope_scaling != replace(MEGATRON_ROPE_SCALING, factor=shape.rope_scaling.factor):
        raise ConfigError(
            f"the model scales its rotary frequencies by {shape.rope_scaling}; of these Megatron takes the factor only and has "
            f"{MEGATRON_ROPE_SCALING} for the rest."
        )
    context = config.parallel.context_parallel_size
    if context > 1 and config.precision.policy == "fp32" and _has_cuda():
        raise ConfigError(
            f"parallel.context_parallel_size is {context}, and the attention of Transformer Engine shares sequences in bf16 only; set "
            "precision.policy=bf16, or context_parallel_size=1."
        )
    if config.optimizer.offload_to_host and not _has_cuda():
        raise ConfigError(
            "optimizer.offload_to_host moves optimizer state from a GPU to the host's memory, and this machine has no GPU; "
            "set optimizer.offload_to_host=false."
        )
    _check_offload(config.parallel, shape)
    if config.optimizer.distributed and not _has_cuda():
        raise ConfigError(
            "optimizer.distributed keeps state that megatron-core cannot restore from a checkpoint without Transformer Engine or apex; "
            "set optimizer.distributed=false on a machine without a GPU."
        )
    _check_fp8(config, shape)
    return shape


def _check_offload(parallel: ParallelConfig, shape: ModelShape) -> None:
    if parallel.offload_layers and not _has_cuda():
        raise ConfigError(
            "parallel.offload_layers moves activations from a GPU to the host's memory by Transformer Engine, and this machine has no GPU; "
            "set parallel.offload_layers=0."
        )
    if parallel.offload_layers >= shape.num_layers:
        raise ConfigError(f"parallel.offload_layers is {parallel.offload_layers}; it must be below the model's {shape.num_layers} layers.")


def _check_fp8(config: TrainConfig | PretrainConfig, shape: ModelShape) -> None:
    if config.precision.policy == "fp8":
        check_policy(config.precision.fp8, shape, config.parallel, read_facts())


def _check_weights(config: AnyConfig, shape: ModelShape) -> None:
    parallel, checkpoint = config.parallel, config.model.checkpoint
    check_dense(config.model.path, shape)
    check_layers(parallel, shape.num_layers)
    megatron_layout(shape, parallel.topology, 1)
    if checkpoint is not None and kind_of(checkpoint) != "megatron":
        raise ConfigError(
            f"model.checkpoint {checkpoint} is not a complete checkpoint; name a folder such as runs/x/checkpoints/step_000050."
        )
    if checkpoint is None and not config.model.random_init:
        locate_tensors(config.model.path)


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


def _check_sampling(config: TrainConfig | EvaluateConfig, shape: ModelShape) -> None:
    """The engine, and how questions are put and graded."""
    _check_fp8_engine(config, shape)
    _check_head_size(shape)
    check_lengths(config, shape)
    make_template(config.data, load_tokenizer(config.model.path))
    for function in [config.grading.function, *(item.function for item in config.grading.extra)]:
        if function is not None:
            check_reward_function(function)


def _check_fp8_engine(config: TrainConfig | EvaluateConfig, shape: ModelShape) -> None:
    """That the engine can be cut as it should, and in FP8 at least one matrix into blocks."""
    layout = engine_layout(shape, config.parallel.num_ranks, config.rollout.tensor_parallel_size)
    if config.precision.engine != "fp8":
        return
    if config.rollout.refit == "gathered":
        raise ConfigError("rollout.refit is gathered, which hands over no FP8; set rollout.refit=planned or precision.engine=bf16.")
    policy = megatron_layout(shape, config.parallel.topology, 1)
    if not fp8_matrices(shape, [policy, layout], config.precision.bf16_layers(shape.num_layers)):
        raise ConfigError(
            f"precision.engine is fp8, but with hidden size {shape.hidden_size}, head size {shape.head_dim} and feed-forward size "
            f"{shape.ffn_size} no rank has a matrix that can be cut into blocks of {BLOCK} x {BLOCK}; set precision.engine=bf16."
        )


def _check_same(config: EvaluateConfig | AnalyseConfig, without_effect: Sequence[str]) -> None:
    """Everything that a response depends on must be as it was; more or fewer question files are no matter."""
    path = config.folder / "config.yaml"
    if not path.exists():
        return
    earlier = load_config(EvaluateConfig, path) if isinstance(config, EvaluateConfig) else load_config(AnalyseConfig, path)
    was, now = to_tree(earlier), to_tree(config)
    for section, name in [(section, name) for section, fields in was.items() for name in fields]:
        if section != "parallel" and f"{section}.{name}" not in without_effect and was[section][name] != now[section][name]:
            raise ConfigError(
                f"{path.parent} holds responses with {section}.{name} {was[section][name]!r}, which is now "
                f"{now[section][name]!r}; choose another logging.folder, or delete that folder to start again."
            )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
