"""What can be refused before any rank starts: one sentence, exit status 2.

The records of `config.py` refuse what they can see alone; this is what needs the model folder, the files or the machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_r1z.analysis.examine import read_levels
from megatron_r1z.analysis.judge import make_sender, read_key
from megatron_r1z.config import AnalyseConfig, AnyConfig, EvaluateConfig, ParallelConfig, PretrainConfig, TrainConfig
from megatron_r1z.config.model_checks import check_dense, check_layers, check_lengths
from megatron_r1z.data.changes import check_goes_on, check_same, on_first_rank
from megatron_r1z.data.corpus import check_corpus
from megatron_r1z.data.naming import name_sources
from megatron_r1z.data.prompts import load_prompts
from megatron_r1z.data.questions import QuestionSet, load_question_sets, mark_questions
from megatron_r1z.data.report import leak_warnings
from megatron_r1z.data.templates import make_stops, make_template
from megatron_r1z.data.tokenizer import added_tokens, load_tokenizer
from megatron_r1z.errors import ConfigError, MissingExtraError
from megatron_r1z.fp8.machine import read_facts
from megatron_r1z.fp8.recipes import check_policy
from megatron_r1z.grading.functions import check_reward_function
from megatron_r1z.layout.blocks import engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, load_shape
from megatron_r1z.layout.fp8 import BLOCK, fp8_matrices
from megatron_r1z.layout.rope import RopeScaling
from megatron_r1z.speed import CPU_CACHE_BYTES, Machine, engine_speed, gradient_speed, model_speed
from megatron_r1z.weights.folders import kind_of
from megatron_r1z.weights.model_folder import check_tensors, check_tokens
from megatron_r1z.weights.resume_point import damage_of, find_resume_point, holds_checkpoints, steps_of

CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM 0.32's CPU attention computes (its list, and 48, which was measured to work)."""
MEGATRON_ROPE_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
"""What megatron-core 0.16.1 has built in (`RotaryEmbedding._apply_scaling`); all Llama 3 models have these, apart from the factor."""


def check_train(config: TrainConfig) -> list[str]:
    """Refuse a reinforcement learning run that cannot work.

    Returns:
        What can work and is hardly meant, one sentence each: evaluation questions that are also trained on, a tokenizer that ends prompts.

    Raises:
        UsageError: one sentence with the numbers and what to do next.
    """
    require_libraries(("torch", "megatron.core", "vllm", "transformers", "sympy", "math_verify"))
    said = _check_sampling(config, _check_model(config))
    train, evaluation = load_question_sets(config.data.train), load_question_sets(config.evaluation.sets)
    _check_questions(config, [*train, *evaluation])
    on_first_rank(lambda: check_goes_on(config, mark_questions(config.data.train, train)))
    return said + leak_warnings(train, evaluation)


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse an evaluation that cannot work, or that would mix its responses with those of another.

    Raises:
        UsageError: one sentence with the numbers and what to do next.
    """
    require_libraries(("torch", "megatron.core", "vllm", "transformers", "sympy", "math_verify"))
    shape = load_shape(config.model.path)
    _check_weights(config, shape)
    _check_sampling(config, shape)
    _check_questions(config, load_question_sets(config.evaluation.sets))
    on_first_rank(lambda: _check_evaluated(config))


def check_analyse(config: AnalyseConfig) -> None:
    """Refuse an analysis that cannot work, or that would mix its responses with those of another.

    Raises:
        UsageError: one sentence with the numbers and what to do next.
    """
    judge = config.analysis.judge
    own = ("openai",) if judge.url is not None else ()
    require_libraries(("torch", "megatron.core", "vllm", "transformers", "sympy", "math_verify", *own))
    if judge.url is None:
        read_key(judge.api_key_env)
    else:
        make_sender(judge)
    shape = load_shape(config.model.path)
    _check_weights(config, shape)
    (questions,) = load_question_sets([config.analysis.questions])
    for template in config.analysis.templates:
        evaluation = config.evaluation(template, config.analysis.temperatures[0])
        _check_sampling(evaluation, shape)
        _check_questions(evaluation, [questions])
    read_levels(config.analysis.questions, config.analysis.level_column, {item.question_id: item for item in questions.questions})
    on_first_rank(lambda: _check_analysed(config))


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
    check_tokens(config.model.path, shape, load_tokenizer(config.model.path))
    rows = check_corpus(config.corpus)
    on_first_rank(lambda: check_goes_on(config, rows))


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
    model_speed(config.parallel, _machine())
    gradient_speed(config.parallel, config.optimizer, _machine())
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
    wrong = None if checkpoint is None else damage_of(Path(checkpoint))
    if wrong is not None:
        raise ConfigError(f"model.checkpoint {checkpoint} is damaged: {wrong}; name another one.")
    if checkpoint is None and not config.model.random_init:
        check_tensors(config.model.path, shape)


def _check_folder(folder: Path, resume: bool) -> None:
    checkpoints = folder / "checkpoints"
    if not resume and holds_checkpoints(checkpoints):
        raise ConfigError(
            f"{folder} holds checkpoints ({', '.join(path.name for path in steps_of(checkpoints).values()) or 'none is left'}) and "
            "checkpoint.resume is false; choose another logging.folder, or move this one away."
        )
    find_resume_point(checkpoints)


def _check_head_size(shape: ModelShape) -> None:
    if shape.head_dim not in CPU_HEAD_SIZES and not _has_cuda():
        raise ConfigError(
            f"the model has a head size of {shape.head_dim}, which vLLM cannot compute on a CPU; "
            f"sizes that it can are {', '.join(map(str, CPU_HEAD_SIZES))}."
        )


def _check_sampling(config: TrainConfig | EvaluateConfig, shape: ModelShape) -> list[str]:
    """The engine, and how questions are put and graded; returns what is repaired, one sentence each."""
    _check_fp8_engine(config, shape)
    _check_head_size(shape)
    check_lengths(config, shape, None if _has_cuda() else CPU_CACHE_BYTES)
    engine_speed(config.rollout, config.max_model_tokens, _machine())
    tokenizer = load_tokenizer(config.model.path)
    check_tokens(config.model.path, shape, tokenizer)
    template = make_template(config.data, tokenizer)
    make_stops(template.stop if config.rollout.stop is None else config.rollout.stop, tokenizer)
    behind = added_tokens(tokenizer).behind
    return [f"the tokenizer of {config.model.path} ends a text with {tokenizer.decode(behind)!r}; prompts go without it."] if behind else []


def _check_questions(config: TrainConfig | EvaluateConfig, sets: Sequence[QuestionSet]) -> None:
    """That the template takes every conversation, and that reward functions work on one of the questions."""
    questions = [question for item in sets for question in item.questions]
    conversations = [question for question in questions if question.messages]
    if conversations and config.data.template == "chat":
        template = make_template(config.data, load_tokenizer(config.model.path))
        for question in conversations:
            template.put(question)
    for function in [config.grading.function, *(item.function for item in config.grading.extra)]:
        if function is not None:
            check_reward_function(function, config.grading.timeout_s, questions[0].answers)


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


def _check_evaluated(config: EvaluateConfig) -> None:
    """That what is in the folder was sampled from the same model, for the same prompts, and graded alike."""
    check_same(config)
    paths = [config.folder / f"{name}.jsonl" for name in name_sources(config.evaluation.sets)]
    _check_records(config, paths)


def _check_analysed(config: AnalyseConfig) -> None:
    """The same of an analysis, which has one set of questions under each template."""
    from megatron_r1z.analysis.analyse import cells_of, records_path  # loads what `require_libraries` looks for

    check_same(config)
    for cell in cells_of(config):
        _check_records(config.evaluation(cell.template, cell.temperature), [records_path(config, cell)])


def _check_records(config: EvaluateConfig, paths: Sequence[Path]) -> None:
    """`paths`: where the responses to each set are."""
    from megatron_r1z.evaluation.evaluate import check_records  # loads what `require_libraries` looks for

    if any(path.exists() for path in paths):
        sets = load_prompts(config.data, config.evaluation.sets, load_tokenizer(config.model.path))
        for path, item in zip(paths, sets, strict=True):
            check_records(path, item.prompts)


def _machine() -> Machine:
    """What decides about settings for speed here."""
    return Machine(_has_cuda(), _has_cuda() and read_facts().transformer_engine is not None)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
