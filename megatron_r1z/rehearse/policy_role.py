"""One rank of the policy: build it, an optimizer step, a pass for log-probs, another step, and the state of a checkpoint; critic too.

A program: `python -m megatron_r1z.rehearse.policy_role TASK`, with `roles.Task` as JSON. It is the package's own code as `train` runs it;
in its place stand only weights (there are none to load), the engine, and samples of full length.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_r1z.config import TrainConfig, load_config
from megatron_r1z.cost.activations import BatchSize
from megatron_r1z.cost.critic import CriticMemory
from megatron_r1z.cost.formats import policy_format
from megatron_r1z.cost.policy_memory import PolicyMemory
from megatron_r1z.layout.blocks import POLICY_VOCAB_MULTIPLE, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.known import find_shape
from megatron_r1z.rehearse.native import load_libraries
from megatron_r1z.rehearse.roles import Found, Phase, Task, read_task, refuse, say
from megatron_r1z.rehearse.versions import check_versions

LAST_UPDATE, CRITIC_UPDATE = "update 2", "critic's update 2"
"""The moments of Adam come with the first one."""
LIBRARIES = ("megatron", "transformer_engine", "torch", "vllm")


def play(task: Task) -> Found:
    """The role of `task.rank`; once in a process."""
    check_versions("torch", "megatron-core", "transformer-engine")
    load_libraries()
    with heard() as said:
        _pretend(task)
        return _play(task, said)


def _pretend(task: Task) -> None:
    from megatron_r1z.rehearse.device import Device, pretend_device
    from megatron_r1z.rehearse.world import pretend_groups

    pretend_device(Device(task.gpu, task.memory_bytes, task.capability, task.gpus_per_node))
    pretend_groups()
    from megatron_r1z.rehearse import kernels
    from megatron_r1z.rehearse.engine_module import import_transformer_engine

    import_transformer_engine()
    kernels.pretend_compiled()


def _play(task: Task, said: list[str]) -> Found:
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    from megatron_r1z.objective import make_loss
    from megatron_r1z.policy import trained
    from megatron_r1z.policy.attention import check_attention, chosen_attention
    from megatron_r1z.policy.critic import make_critic
    from megatron_r1z.policy.parallel import start_megatron
    from megatron_r1z.policy.policy import MegatronPolicy
    from megatron_r1z.rehearse import kernels
    from megatron_r1z.rehearse.live import LiveBytes
    from megatron_r1z.rehearse.world import start_world

    config = load_config(TrainConfig, task.config, task.overrides)
    shape, topology = find_shape(config.model.path).shape, config.parallel.topology
    start_world(task.rank, topology.num_ranks)
    start_megatron(topology, config.model.seed)
    setattr(trained, "check_same_number", lambda *_arguments: None)  # noqa: B010  # its numbers would come from the other ranks
    live = LiveBytes()
    phases = _Phases(live)
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        padded = padded_vocab_size(shape.vocab_size, POLICY_VOCAB_MULTIPLE["te"] * topology.tp)
        policy = MegatronPolicy(config, shape, topology, padded_vocab_size=padded)
        differences, count = _compare_layout(config, shape, task.rank, policy.parameters())
        phases.end("weights")
        if config.precision.policy != "fp32":
            check_attention(chosen_attention(shape, config.parallel, config.max_model_tokens), config.parallel, config.max_model_tokens)
        policy.start_training(make_loss(config.algorithm), config.optimizer)
        phases.end("gradients and master weights")
        critic = make_critic(config, policy, padded_vocab_size=padded) if config.algorithm.has_critic else None
        if critic is not None:
            count += len(critic.parameters())
            phases.end("critic")
        with unset_fake_temporarily():
            batch = full_batch(config, policy, task)
        _take_steps(policy, critic, batch, phases)
        entries = 0
        if not _has_histories(config):
            entries = len(policy.sharded_state(is_loading=False)["optimizer"].get("param_state") or ())
            if critic is not None:
                critic.sharded_state(is_loading=False)
            phases.end("state for a checkpoint")
        figures = {
            "tokens": batch.micro_batches[0].num_tokens,
            "responses": batch.micro_batches[0].targets_R.numel(),
            "micro_batches": len(batch.micro_batches),
            "optimizer_entries": entries,
            "speed": _speed(policy),
            "operations": live.num_operations,
        }
    stage = topology.coordinates(task.rank).pp_rank
    planned = planned_bytes(config, shape, stage, BatchSize(figures["tokens"], figures["responses"], figures["micro_batches"]))
    return Found(
        role=f"policy, stage {stage} of {topology.pp}",
        rank=task.rank,
        phases=tuple(_with_plan(phase, planned) for phase in phases.ended),
        num_parameters=count,
        layout_differences=differences,
        attention=attention_taken(),
        warnings=tuple(dict.fromkeys(said)),
        kernels=dict(kernels.calls),
        figures=figures,
    )


class _Phases:
    """What was alive, phase by phase."""

    def __init__(self, live: Any) -> None:
        self.ended: list[Phase] = []
        self._live, self._start = live, time.monotonic()

    def end(self, name: str) -> None:
        self.ended.append(Phase(name, self._live.now, self._live.most, time.monotonic() - self._start))
        self._live.restart()
        self._start = time.monotonic()


def _take_steps(policy: Any, critic: Any, batch: Any, phases: _Phases) -> None:
    """An iteration's updates, and what comes before and in those of the next one."""
    from megatron_r1z.policy.policy import TrainBatch

    policy.update(TrainBatch(batch))
    if critic is not None:
        critic.update(batch)
    phases.end("update 1")
    if critic is not None:
        critic.values(batch.micro_batches)
    policy.response_logprobs(batch.micro_batches)
    phases.end("log-probs")
    policy.update(TrainBatch(batch))
    phases.end(LAST_UPDATE)
    if critic is not None:
        critic.update(batch)
        phases.end(CRITIC_UPDATE)


def _speed(policy: Any) -> dict[str, Any]:
    """Which settings for speed the first chunk has."""
    chunk = policy.model.chunks[0]
    return {
        "overlap_grad_reduce": chunk.ddp_config.overlap_grad_reduce,
        "overlap_param_gather": chunk.ddp_config.overlap_param_gather,
        "no_sync": chunk.config.no_sync_func is not None,
        "fused_layers": sum(bool(getattr(module, "fuse_wgrad_accumulation", False)) for module in chunk.modules()),
        "parts": len(chunk.bucket_groups),
    }


def _compare_layout(config: TrainConfig, shape: ModelShape, rank: int, live: Any) -> tuple[tuple[str, ...], int]:
    """Parameters that differ in name or size from the layout's, and how many there are."""
    planned = megatron_layout(shape, config.parallel.topology, POLICY_VOCAB_MULTIPLE["te"], "te").parameters[rank]
    wanted = {name: tuple(size) for name, size in planned.items()}
    found = {name: tuple(tensor.shape) for name, tensor in live.items()}
    names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return tuple(f"{name}: layout {wanted.get(name)}, model {found.get(name)}" for name in names), len(found)


def _has_histories(config: TrainConfig) -> bool:
    """Of recipe delayed, whose checkpoint pickles them, which tensors without numbers cannot be."""
    return config.precision.policy == "fp8" and config.precision.fp8.recipe == "delayed"


def full_batch(config: TrainConfig, policy: Any, task: Task) -> Any:
    """Full micro-batches of samples that are as long as they may be, as many as fill the pipeline twice."""
    from megatron_r1z.packing import pack
    from megatron_r1z.types import Sample

    topology = policy.topology
    length = config.data.max_prompt_tokens + task.response_tokens
    rules = policy.packing_rules()
    padded = math.ceil(length / rules.sequence_multiple) * rules.sequence_multiple
    in_micro_batch = max(1, rules.micro_batch_tokens // padded)
    count = in_micro_batch * 2 * topology.num_chunks * topology.dp
    zeros = (0.0,) * task.response_tokens
    sample = Sample("", (0,) * length, config.data.max_prompt_tokens, 1.0, 1.0, zeros, 0)
    if config.algorithm.has_critic:
        sample = dataclasses.replace(sample, advantage=zeros, has_further_terms=True, values=zeros)
    samples = [dataclasses.replace(sample, sample_id=f"{number}/0") for number in range(count)]
    place = topology.coordinates(task.rank)
    return pack(samples, rules, place.dp_rank, place.cp_rank, token_weight=lambda _length: 1.0, denominator=count)


def planned_bytes(config: TrainConfig, shape: ModelShape, stage: int, batch: BatchSize) -> dict[str, int]:
    """What `plan` says of each phase, of tensors on the device."""
    parts = shape, config.parallel, config.optimizer, policy_format(config.precision), batch
    policy, critic = PolicyMemory(*parts), CriticMemory(*parts) if config.algorithm.has_critic else None
    models = [policy] if critic is None else [policy, critic]
    statics = sum(model.weights(stage) + model.gradients(stage) + model.optimizer_state(stage) for model in models)
    found = {
        "log-probs": statics + max(model.logprobs(stage) for model in models),
        LAST_UPDATE: statics + policy.placeholders + policy.update(stage),
    }
    return found if critic is None else found | {CRITIC_UPDATE: statics + critic.placeholders + critic.update(stage)}


def _with_plan(phase: Phase, planned: dict[str, int]) -> Phase:
    return Phase(phase.name, phase.kept, phase.most, phase.seconds, planned.get(phase.name))


def attention_taken() -> tuple[str, ...]:
    """What Transformer Engine's choice was."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    chosen = dot_product_attention._attention_backends
    names = {"use_flash_attention": "flash", "use_fused_attention": "fused", "use_unfused_attention": "unfused"}
    return tuple(word for name, word in names.items() if chosen.get(name))


@contextmanager
def heard() -> Iterator[list[str]]:
    """What libraries say meanwhile, as warnings or to their loggers."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.name.split('.')[0]}: {record.getMessage()}")

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        said.append(f"{_library(filename)}: {message}")

    listener = Listener(logging.WARNING)
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(listener)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield said


def _library(filename: str) -> str:
    parts = filename.replace("\\", "/").split("/")
    return next((name for name in (*LIBRARIES, "megatron_r1z") if name in parts), parts[-1])


def run_role(play: Callable[[Task], Found], argv: Sequence[str]) -> int:
    """A role as a program: what it found, or what was refused, as its last line."""
    task = read_task(list(argv))
    try:
        say(play(task))
    except Exception as error:  # noqa: BLE001  # whatever a library raises is what it refuses
        refuse(error, is_limit=isinstance(error, NotImplementedError) or type(error).__module__.startswith("torch._subclasses"))
    return 0


def main(argv: Sequence[str]) -> int:
    """The program."""
    return run_role(play, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
