"""Builds the collaborators of a run on this rank, in the one order that works, and ends them again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1z import ranks
from megatron_r1z.agreement import check_start
from megatron_r1z.analysis.analyse import Analysis, OnDemand, cells_of
from megatron_r1z.config import AnalyseConfig, AnyConfig, EvaluateConfig, PretrainConfig, TrainConfig
from megatron_r1z.cost.cache import cache_beside
from megatron_r1z.cost.checks import check_engine_room
from megatron_r1z.cost.cluster import GIB
from megatron_r1z.cost.engine_memory import EngineMemory
from megatron_r1z.cost.formats import engine_format
from megatron_r1z.data.changes import go_on, record_work
from megatron_r1z.data.corpus import DocumentStream, load_texts
from megatron_r1z.data.fingerprint import RowsMark
from megatron_r1z.data.prompts import PromptSet, PromptStream, load_prompts
from megatron_r1z.data.templates import make_stops, make_template
from megatron_r1z.data.tokenizer import load_tokenizer
from megatron_r1z.errors import ConfigError
from megatron_r1z.evaluation.evaluate import EVALUATED, Evaluation, evaluation_sampling
from megatron_r1z.fp8.machine import read_facts
from megatron_r1z.fp8.recipes import describe
from megatron_r1z.grading.grader import MathGrader
from megatron_r1z.host.float32 import keep_float32
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.layout.blocks import POLICY_VOCAB_MULTIPLE, Layout, Spec, engine_layout, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import ModelShape, load_shape
from megatron_r1z.layout.fp8 import fp8_matrices, fp8_parameters, left_out, modules_to_not_convert
from megatron_r1z.layout.topology import Topology
from megatron_r1z.loop import Run, RunState
from megatron_r1z.objective import make_loss
from megatron_r1z.policy.attention import Attention, check_attention, chosen_attention
from megatron_r1z.policy.critic import make_critic
from megatron_r1z.policy.model import DTYPES, has_transformer_engine, this_machine
from megatron_r1z.policy.parallel import start_megatron, start_process_group
from megatron_r1z.policy.policy import MegatronPolicy
from megatron_r1z.policy.trained import Settings
from megatron_r1z.pretrain import NEXT_TOKEN_LOSS, Pretraining, PretrainState
from megatron_r1z.protocols import Stop
from megatron_r1z.record.metrics import Console, RunLog, SilentLog
from megatron_r1z.record.receipts import drop_receipts
from megatron_r1z.record.rollouts import ROLLOUTS, drop_rollouts
from megatron_r1z.record.versions import library_versions
from megatron_r1z.reshard.gather import GatheredRefit, WholeTensors
from megatron_r1z.reshard.quantise import QuantisedSource, plans_by_format
from megatron_r1z.reshard.refit import ROUND_BYTES, Refit
from megatron_r1z.rollout.vllm_engine import EngineSettings, VllmEngine
from megatron_r1z.speed import CPU_CACHE_BYTES, engine_speed
from megatron_r1z.types import RefitReceipt
from megatron_r1z.weights.checkpoint import Checkpoints, check_finite, load_weights
from megatron_r1z.weights.export import load_hf_weights, save_hf
from megatron_r1z.weights.initialise import random_weights
from megatron_r1z.weights.resume_point import ResumePoint


@dataclass(frozen=True)
class Weights:
    """Which rank holds what of the policy."""

    shape: ModelShape
    topology: Topology
    layout: Layout

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all tensor-parallel ranks."""
        return padded_vocab_size(self.shape.vocab_size, POLICY_VOCAB_MULTIPLE[layer_spec()] * self.topology.tp)


def plan_weights(config: Settings) -> Weights:
    """The policy's layout; raises what cannot be split."""
    shape, parallel = load_shape(config.model.path), config.parallel
    topology = parallel.topology
    spec = layer_spec()
    layout = megatron_layout(shape, topology, POLICY_VOCAB_MULTIPLE[spec], spec)
    return Weights(shape, topology, layout)


def layer_spec() -> Spec:
    """Of the policy's layers on this machine."""
    return "te" if has_transformer_engine() else "local"


@contextmanager
def joined_ranks(config: Settings, folder: Path) -> Iterator[None]:
    """Inside, this rank is part of the default process group, and all of them agree on what they are to do and write into `folder`."""
    check_world_size(config.parallel.num_ranks)
    torch.set_num_threads(config.parallel.threads_per_rank)
    keep_float32(config.precision.policy, config.precision.engine)
    start_process_group()
    check_start(config, folder)
    yield
    if dist.is_initialized():  # an engine that was closed has ended it
        dist.destroy_process_group()


def check_world_size(num_ranks: int) -> None:
    """Refuse a torchrun of another size than the configuration's.

    Raises:
        ConfigError: with both numbers.
    """
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != num_ranks:
        raise ConfigError(f"torchrun started {world_size} ranks but parallel.num_ranks is {num_ranks}; make them equal.")


def make_policy(config: Settings, weights: Weights) -> MegatronPolicy:
    """The policy with the weights that the configuration names, not yet ready to train."""
    start_megatron(weights.topology, config.model.seed)
    policy = MegatronPolicy(config, weights.shape, weights.topology, padded_vocab_size=weights.padded_vocab_size)
    if config.model.random_init:
        random_weights(weights.shape, weights.layout, dist.get_rank(), policy.parameters(), config.model.seed)
    elif config.model.checkpoint is not None:
        load_weights(Path(config.model.checkpoint), policy)
    else:
        load_hf_weights(config.model.path, weights.shape, weights.layout, dist.get_rank(), policy.parameters())
    return policy


def _attention(config: TrainConfig | PretrainConfig) -> Attention:
    """Of the policy on this GPU, refused where it keeps scores."""
    longest = config.max_model_tokens if isinstance(config, TrainConfig) else config.corpus.max_document_tokens
    found = chosen_attention(load_shape(config.model.path), config.parallel, longest)
    check_attention(found, config.parallel, longest)
    return found


def make_log(folder: Path, finished: Mapping[str, int]) -> RunLog:
    """The log of this rank; `finished`: see `RunLog`."""
    return RunLog(folder, finished) if dist.get_rank() == 0 else SilentLog()


def write_origin(folder: Path, config: AnyConfig, log: Console, rows: Sequence[RowsMark] = (), *, goes_on: bool = True) -> None:
    """What the work in a folder is made of, and the versions; rank 0 writes them before there are results. See `record_work`."""
    if dist.get_rank() != 0:
        return
    log.phase("reading the weights for their digest")
    for line in record_work(folder, config, rows, goes_on=goes_on):
        log.say(line)
    (folder / "versions.json").write_text(json.dumps(library_versions(), indent=1) + "\n")


def export_policy(config: TrainConfig | PretrainConfig, weights: Weights, policy: MegatronPolicy, folder: Path) -> None:
    """Write the policy in Hugging Face format; all ranks call this.

    Raises:
        TrainingError: a weight is not finite; an earlier export stays as it is.
    """
    check_finite(policy.parameters(), "the policy")
    save_hf(
        folder,
        config.model.path,
        weights.shape,
        weights.layout,
        policy.parameters(),
        dist.get_rank(),
        dist.get_world_size(),
        DTYPES[config.precision.policy_format],
    )


@contextmanager
def made_run(config: TrainConfig, weights: Weights) -> Iterator[Run]:
    """The run of this rank, ready at its latest checkpoint; its processes and files are closed at the end."""
    folder = Path(config.logging.folder)
    tokenizer = load_tokenizer(config.model.path)
    train_sets = load_prompts(config.data, config.data.train, tokenizer)
    evaluation = load_prompts(config.data, config.evaluation.sets, tokenizer)
    policy = make_policy(config, weights)
    if config.algorithm.kl_coef:
        policy.keep_reference()
    critic = make_critic(config, policy, padded_vocab_size=weights.padded_vocab_size) if config.algorithm.has_critic else None
    policy.start_training(make_loss(config.algorithm), config.optimizer)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    digests = [item.digest for item in train_sets]
    prompts = PromptStream([(item.prompts, item.weight) for item in train_sets], config.data.seed, digests)
    remark: str | None = None
    state, saved = RunState(0, 0, prompts.to_state(), put_off=("evaluation",)), None
    latest = checkpoints.resume_point()
    if latest is not None:
        state = saved = RunState.from_tree(checkpoints.load(latest.path, policy, critic))
        remark = go_on(prompts, state.prompts, config)
    log = make_log(folder, {"iteration": state.iteration, "step": state.steps} if latest else {"iteration": -1, "step": -1})
    if dist.get_rank() == 0:
        drop_receipts(folder, state.iteration)
        drop_rollouts(folder / ROLLOUTS, state.iteration)
    _say_sets(log, [*train_sets, *evaluation], config)
    _say_precision(log, config)
    if latest is not None:
        _say_resumed(log, latest, f"{state.iteration} of {config.algorithm.iterations} iterations", remark)
    write_origin(folder, config, log, mark_prompts(config, train_sets), goes_on=latest is not None)
    matrices = matrices_in_fp8(config, weights.shape, weights.layout)
    if matrices:
        kept = left_out(weights.shape, matrices)
        log.say(f"engine: {len(matrices)} matrices in FP8" + (f", in bf16 {', '.join(kept)}" if kept else ""))
    stop_flag = StopFlag()
    engine = _make_engine(config, weights.shape, matrices, stop_flag, log)
    grader = MathGrader(config.grading, config.data.template, stop_flag)
    grader.self_test()
    try:
        yield Run(
            config=config,
            policy=policy,
            critic=critic,
            engine=engine,
            grader=grader,
            refit=make_refit(config, weights, policy, engine, matrices),
            prompts=prompts,
            stop=_stops(config, tokenizer),
            evaluation=evaluation,
            checkpoints=checkpoints,
            log=log,
            stop_flag=stop_flag.install(),
            state=state,
            saved=saved,
        )
    finally:
        grader.close()
        log.close()
    engine.close()


def matrices_in_fp8(config: TrainConfig | EvaluateConfig, shape: ModelShape, *sources: Layout) -> frozenset[str]:
    """What an FP8 engine gets in FP8, as far as engine and `sources` can be cut into its blocks; nothing for any other engine."""
    if config.precision.engine != "fp8":
        return frozenset()
    return fp8_matrices(shape, [*sources, _engine_layout(config, shape)], config.precision.bf16_layers(shape.num_layers))


def _make_engine(
    config: TrainConfig | EvaluateConfig, shape: ModelShape, matrices: Collection[str], stop_flag: StopFlag, log: Console | SilentLog
) -> VllmEngine:
    cache_bytes = _cache_bytes(config, shape)
    if config.rollout.kv_cache_bytes == "auto":
        log.say(f"engine: a key-value cache of {cache_bytes / GIB:.2f} GiB on each rank")
    _check_engine_room(config, shape, cache_bytes)
    return VllmEngine(
        EngineSettings(
            model_folder=config.model.path,
            dtype=config.precision.engine_format,
            rank=dist.get_rank(),
            num_ranks=dist.get_world_size(),
            tensor_parallel_size=config.rollout.tensor_parallel_size,
            max_model_tokens=config.max_model_tokens,
            max_concurrent_sequences=config.rollout.max_concurrent_sequences,
            kv_cache_bytes=cache_bytes,
            seed=config.rollout.seed,
            speed=engine_speed(config.rollout, config.max_model_tokens, this_machine()),
            not_in_fp8=tuple(modules_to_not_convert(shape, matrices)) if config.precision.engine == "fp8" else None,
        ),
        stop_flag,
    )


def _cache_bytes(config: TrainConfig | EvaluateConfig, shape: ModelShape) -> int:
    """Of the key-value cache of this rank: the smallest of those that ranks have room for, as an engine's must be alike."""
    asked = config.rollout.kv_cache_bytes
    if asked != "auto":
        return asked
    if not torch.cuda.is_available():
        return CPU_CACHE_BYTES
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    left = cache_beside(config, shape, total, total - free - torch.cuda.memory_reserved())
    smallest = torch.tensor(left, dtype=torch.int64)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest)


def _check_engine_room(config: TrainConfig | EvaluateConfig, shape: ModelShape, cache_bytes: int) -> None:
    """What is left beside a policy shows only when it is there."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        memory = EngineMemory(shape, config.rollout, engine_format(config.precision), config.max_model_tokens, cache_bytes)
        check_engine_room(memory, torch.cuda.mem_get_info()[0])


def make_refit(
    config: TrainConfig | EvaluateConfig, weights: Weights, policy: MegatronPolicy, engine: VllmEngine, matrices: Collection[str]
) -> Callable[[int], RefitReceipt]:
    """The hand-over of weights from `policy` to `engine` on this rank, called with the policy version."""
    dtype, rank = DTYPES[config.precision.engine_format], dist.get_rank()
    if config.rollout.refit == "gathered":
        return GatheredRefit(WholeTensors(weights.shape, weights.layout, rank, policy.parameters, dtype), engine)
    round_bytes = ROUND_BYTES["cuda" if torch.cuda.is_available() else "cpu"]
    layouts = weights.layout, _engine_layout(config, weights.shape)
    plans = plans_by_format(*layouts, matrices, dtype, round_bytes, ranks.per_node())
    if not matrices:
        return Refit(plans, rank, policy.parameters, engine)
    refit = Refit(plans, rank, QuantisedSource(policy.parameters, fp8_parameters(weights.layout, rank, matrices)), engine)
    names = tuple(left_out(weights.shape, matrices))
    return lambda policy_version: replace(refit(policy_version), not_in_fp8=names)


def _engine_layout(config: TrainConfig | EvaluateConfig, shape: ModelShape) -> Layout:
    return engine_layout(shape, dist.get_world_size(), config.rollout.tensor_parallel_size)


def _stops(config: TrainConfig | EvaluateConfig, tokenizer: Any) -> tuple[Stop, ...]:
    stop = config.rollout.stop if config.rollout.stop is not None else make_template(config.data, tokenizer).stop
    return make_stops(stop, tokenizer)


def _say_resumed(log: Console, point: ResumePoint, done: str, remark: str | None) -> None:
    for line in (point.note, f"resumed from {point.path}: {done} done", remark):
        if line is not None:
            log.say(line)


def mark_prompts(config: TrainConfig, sets: Sequence[PromptSet]) -> list[RowsMark]:
    """What the sources of training are recognised by."""
    pairs = zip(config.data.train, sets, strict=True)
    return [RowsMark.of(source, len(item.prompts) + item.num_dropped, item.digest) for source, item in pairs]


def _say_sets(log: Console, sets: Sequence[PromptSet], config: TrainConfig | EvaluateConfig) -> None:
    for item in sets:
        log.say(f"{item.name}: {len(item.prompts)} prompts, {item.num_dropped} dropped (over {config.data.max_prompt_tokens} tokens)")
        for remark in item.remarks:
            log.say(f"warning: {item.name}: {remark}")


def _say_precision(log: Console, config: TrainConfig | PretrainConfig) -> None:
    if config.precision.policy == "fp8":
        log.say(f"policy: {describe(config.precision.fp8, read_facts())}")
    if has_transformer_engine() and config.precision.policy != "fp32":
        log.say(f"policy: {_attention(config)} attention")


@contextmanager
def made_pretraining(config: PretrainConfig, weights: Weights) -> Iterator[Pretraining]:
    """The pre-training run of this rank, ready at its latest checkpoint; its files are closed at the end."""
    folder = Path(config.logging.folder)
    tokenizer, vocab_size = load_tokenizer(config.model.path), weights.shape.vocab_size
    texts = load_texts(config.corpus, config.corpus.sources, tokenizer, vocab_size)
    evaluation = load_texts(config.corpus, config.corpus.evaluation, tokenizer, vocab_size)
    policy = make_policy(config, weights)
    policy.start_training(NEXT_TOKEN_LOSS, config.optimizer)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    rows = [item.rows for item in texts]
    stream = DocumentStream([(item.documents, item.rows.weight) for item in texts], config.corpus.seed, [item.digest for item in rows])
    remark: str | None = None
    state, saved = PretrainState(0, stream.to_state(), is_evaluation_due=True), None
    latest = checkpoints.resume_point()
    if latest is not None:
        state = saved = PretrainState(**checkpoints.load(latest.path, policy))
        remark = go_on(stream, state.documents, config)
    log = make_log(folder, {"step": state.step if latest else -1})
    _say_precision(log, config)
    for item in (*texts, *evaluation):
        log.say(item.describe(config.corpus))
    if latest is not None:
        _say_resumed(log, latest, f"{state.step} of {config.corpus.steps} steps", remark)
    write_origin(folder, config, log, rows, goes_on=latest is not None)
    try:
        yield Pretraining(config, policy, stream, evaluation, checkpoints, log, StopFlag().install(), state, saved)
    finally:
        log.close()


@contextmanager
def made_evaluation(config: EvaluateConfig) -> Iterator[Evaluation]:
    """The evaluation of this rank, its engine holding the weights to be evaluated; its processes are ended at the end."""
    tokenizer = load_tokenizer(config.model.path)
    sets = load_prompts(config.data, config.evaluation.sets, tokenizer)
    log = Console() if dist.get_rank() == 0 else SilentLog()
    _say_sets(log, sets, config)
    write_origin(config.folder, config, log)
    stop_flag = StopFlag()
    engine = _make_filled_engine(config, stop_flag, log)
    grader = MathGrader(config.grading, config.data.template, stop_flag)
    grader.self_test()
    sampling = evaluation_sampling(config.evaluation, config.rollout, _stops(config, tokenizer))
    try:
        yield Evaluation(config, sets, engine, grader, sampling, log, stop_flag.install())
    finally:
        grader.close()
        log.close()
    engine.close()


@contextmanager
def made_analysis(config: AnalyseConfig) -> Iterator[Analysis]:
    """The analysis of this rank; one engine, made when it is first needed, serves all templates and temperatures."""
    tokenizer = load_tokenizer(config.model.path)
    log, stop_flag = Console() if dist.get_rank() == 0 else SilentLog(), StopFlag().install()
    write_origin(config.folder, config, log)
    cells = {cell: config.evaluation(cell.template, cell.temperature) for cell in cells_of(config)}
    by_template = {cell.template: evaluation for cell, evaluation in cells.items()}
    sets = {name: load_prompts(item.data, item.evaluation.sets, tokenizer) for name, item in by_template.items()}
    engine = OnDemand(lambda: _make_filled_engine(next(iter(cells.values())), stop_flag, log))
    with ExitStack() as stack:
        graders = {name: stack.enter_context(closing(MathGrader(item.grading, name, stop_flag))) for name, item in by_template.items()}
        for name, grader in graders.items():
            log.say(f"template {name}:")
            _say_sets(log, sets[name], by_template[name])
            grader.self_test()
        stack.callback(log.close)
        yield Analysis(
            config,
            {
                cell: Evaluation(
                    config=item,
                    sets=sets[cell.template],
                    engine=engine,
                    grader=graders[cell.template],
                    sampling=evaluation_sampling(item.evaluation, item.rollout, _stops(item, tokenizer)),
                    log=log,
                    stop_flag=stop_flag,
                )
                for cell, item in cells.items()
            },
            log,
            stop_flag,
        )
    if isinstance(engine.made, VllmEngine):
        engine.made.close()


def _make_filled_engine(config: EvaluateConfig, stop_flag: StopFlag, log: Console | SilentLog) -> VllmEngine:
    """An engine that holds the weights that the configuration names."""
    shape = load_shape(config.model.path)
    sources = [] if config.model.checkpoint is None else [plan_weights(config).layout]
    matrices = matrices_in_fp8(config, shape, *sources)
    engine = _make_engine(config, shape, matrices, stop_flag, log)
    _fill_engine(config, engine, matrices)
    return engine


def _fill_engine(config: EvaluateConfig, engine: VllmEngine, matrices: Collection[str]) -> None:
    """Weights from the model folder straight into the engine, or from a checkpoint by way of a policy that is dropped again."""
    if config.model.checkpoint is not None:
        weights = plan_weights(config)
        make_refit(config, weights, make_policy(config, weights), engine, matrices)(EVALUATED)
        return
    shape = load_shape(config.model.path)
    layout, rank = _engine_layout(config, shape), dist.get_rank()

    def load(parameters: Mapping[str, torch.Tensor]) -> None:
        load_hf_weights(config.model.path, shape, layout, rank, parameters)

    def load_and_quantise(parameters: Mapping[str, torch.Tensor]) -> None:
        whole = {name: torch.empty(size, dtype=torch.bfloat16) for name, size in layout.parameters[rank].items()}
        load(whole)
        for name, tensor in QuantisedSource(lambda: whole, fp8_parameters(layout, rank, matrices))().items():
            parameters[name].copy_(tensor)

    engine.receive(load_and_quantise if matrices else load)
    engine.accept(EVALUATED)
