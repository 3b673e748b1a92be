"""`VllmEngine`: the rollout engine of this rank, one vLLM per `tensor_parallel_size` consecutive ranks.

The engine starts with arbitrary weights: every weight it ever samples with came through a refit, and it refuses to generate before one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1z.errors import EngineError, Interrupted
from megatron_r1z.host.collector import paused_collector
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.host.segments import record_segments
from megatron_r1z.layout.fp8 import quantization_config
from megatron_r1z.protocols import Result, Sampling
from megatron_r1z.rollout.cpu import prepare_engine, prepare_import
from megatron_r1z.speed import EngineSpeed
from megatron_r1z.types import FinishReason, Group, Prompt, Response

if TYPE_CHECKING:
    from torch import Tensor

STEPS_BETWEEN_LOOKS = 8
"""Steps of the engine, one token of every running response each, after which it looks whether the rank was asked to stop. Counted, not
timed, so that the ranks of a tensor-parallel engine look at the same step."""

HEAD = {"head_dtype": "float32"}
"""vLLM's key for the number format of logits, among those of the model's configuration: on a GPU products of bf16 operands with float32
results, as the policy's (`policy/logprob.py`), on a CPU of operands that are copied in float32 at every step."""


@dataclass(frozen=True)
class EngineSettings:
    """What one engine is built with."""

    model_folder: str
    """Configuration and tokenizer; its weights are not read."""
    dtype: str
    """`fp32` or `bf16`."""
    rank: int
    num_ranks: int
    tensor_parallel_size: int
    max_model_tokens: int
    max_concurrent_sequences: int
    kv_cache_bytes: int
    seed: int
    speed: EngineSpeed
    not_in_fp8: tuple[str, ...] | None = None
    """Linear layers that are not in block FP8 where all others are (`layout/fp8.modules_to_not_convert`); None: nothing is in FP8."""


class VllmEngine:
    """vLLM inside the rank's process. The default process group must exist; other groups of the process are left alone.

    `stop_flag` is looked at while responses are sampled.
    """

    def __init__(self, settings: EngineSettings, stop_flag: StopFlag | None = None) -> None:
        self._settings = settings
        self._stop_flag = stop_flag or StopFlag()
        self._version: int | None = None
        with paused_collector():
            self._llm = _start(settings)
        record_segments()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, policy_version: int) -> list[Group]:
        """Sample for this engine's share of `prompts`; return the groups for which this rank answers (see `protocols.Engine`)."""
        self._require_version(policy_version)
        settings = self._settings
        engine, tp_rank = divmod(settings.rank, settings.tensor_parallel_size)
        share = range(engine, len(prompts), settings.num_ranks // settings.tensor_parallel_size)
        if not share:
            return []
        names = _distinct_names(prompts)
        requests = self._llm.enqueue(
            [{"prompt_token_ids": list(prompts[index].token_ids)} for index in share],
            [_parameters(_seed(sampling.seed, name), sampling) for name in (names[index] for index in share)],
            use_tqdm=False,
        )
        outputs = self._outputs(requests)
        groups = [
            Group(index, prompts[index], tuple(_response(completion, policy_version) for completion in output.outputs))
            for index, output in zip(share, outputs, strict=True)
        ]
        return groups[tp_rank :: settings.tensor_parallel_size]

    def _outputs(self, requests: Sequence[str]) -> list[Any]:
        """What becomes of the requests, in their order: vLLM's `LLM.wait_for_completion` with a look at who wants to stop."""
        engine, finished = self._llm.llm_engine, []
        for step in count():
            if not engine.has_unfinished_requests():
                break
            if step % STEPS_BETWEEN_LOOKS == 0 and self._engine_stops():
                engine.abort_request(list(requests))
                raise Interrupted
            finished += [output for output in engine.step() if output.finished]
        return sorted(finished, key=lambda output: int(output.request_id))

    def _engine_stops(self) -> bool:
        """Whether one of the ranks that the engine spans was asked to stop; all of them call this at the same step."""
        if self._settings.tensor_parallel_size == 1:
            return self._stop_flag.requested
        import torch
        import torch.distributed as dist
        from vllm.distributed import get_tp_group

        flag = torch.tensor(int(self._stop_flag.requested))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=get_tp_group().cpu_group)
        return bool(flag)

    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters of this rank's shard that a refit writes, by vLLM's names (see `weights.written_parameters`)."""
        from megatron_r1z.rollout.weights import written_parameters

        parameters: dict[str, Tensor] = self._llm.apply_model(written_parameters)[0]
        return parameters

    def receive(self, write: Callable[[Mapping[str, Tensor]], Result]) -> Result:
        """Let `write` fill the parameters; from here on the engine refuses to generate until the weights are accepted."""
        results: list[Result] = []
        self._update({"write": lambda parameters: results.append(write(parameters))})
        return results[0]

    def receive_whole(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """As `receive`, for whole tensors by checkpoint name, which vLLM cuts itself."""
        self._update({"tensors": tensors})

    def _update(self, info: dict[str, Any]) -> None:
        self._version = None
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": info})

    def accept(self, policy_version: int) -> None:
        """Take the weights just received as those of `policy_version`, and drop the cached keys and values of older ones."""
        self._llm.finish_weight_update(weight_version=str(policy_version))
        if not self._llm.reset_prefix_cache():
            raise EngineError(f"the engine could not drop its prefix cache after refit {policy_version}; it is still generating.")
        self._version = policy_version

    def _require_version(self, policy_version: int) -> None:
        held = self._llm.get_weight_version()
        if self._version is None:
            raise EngineError(
                f"the engine holds no accepted weights, so it cannot sample as version {policy_version}; a refit must come first."
            )
        if self._version != policy_version or held != str(policy_version):
            raise EngineError(
                f"the engine holds version {held} of the weights; version {policy_version} was asked for. Refit before a rollout."
            )

    def close(self) -> None:
        """End the engine and its process groups, the default group among them; all ranks call this."""
        self._llm.llm_engine.engine_core.shutdown()


def _start(settings: EngineSettings) -> Any:
    """vLLM's `LLM`."""
    prepare_import()
    from vllm import LLM

    return LLM(**engine_arguments(settings))


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """What vLLM is called with; makes this process ready for it (`cpu.prepare_engine`) and our weight transfer known."""
    from megatron_r1z.rollout.weights import register_receiver

    return {
        "model": settings.model_folder,
        "load_format": "dummy",
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings.dtype],
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_tokens,
        "max_num_seqs": settings.max_concurrent_sequences,
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "weight_transfer_config": {"backend": register_receiver()},
        "seed": settings.seed,
        "hf_overrides": HEAD | quantisation(settings.model_folder, settings.not_in_fp8),
        **prepare_engine(settings.max_model_tokens),
        **speed_options(settings.speed),
    }


def speed_options(speed: EngineSpeed) -> dict[str, Any]:
    """What is on, in vLLM's words. Refits write weights where they are, so that CUDA graphs find them."""
    options: dict[str, Any] = {"enforce_eager": not speed.cuda_graphs, "enable_prefix_caching": bool(speed.prefix_caching)}
    return options if speed.max_num_batched_tokens is None else options | {"max_num_batched_tokens": speed.max_num_batched_tokens}


def quantisation(model_folder: str, not_in_fp8: Sequence[str] | None) -> dict[str, Any]:
    """What makes vLLM build linear layers for block FP8 weights, or for plain ones, whatever the model's own configuration says."""
    if not_in_fp8 is not None:
        return {"quantization_config": quantization_config(not_in_fp8)}
    config = Path(model_folder) / "config.json"
    is_quantised = config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    return {"quantization_config": None} if is_quantised else {}


def _parameters(seed: int, sampling: Sampling) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        n=sampling.num_samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop=[stop for stop in sampling.stop if isinstance(stop, str)] or None,
        stop_token_ids=[stop for stop in sampling.stop if isinstance(stop, int)] or None,
        include_stop_str_in_output=True,
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
    )


def _distinct_names(prompts: Sequence[Prompt]) -> list[str]:
    """A name for each prompt; one that is asked twice gets two, so that its groups differ."""
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        names.append(f"{prompt.prompt_id}/{seen[prompt.prompt_id]}")
        seen[prompt.prompt_id] += 1
    return names


def _seed(seed: int, name: str) -> int:
    """A request's seed, below 2**48 so that vLLM can add the sample's index to it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=6).digest(), "big")


def _response(completion: Any, version: int) -> Response:
    """vLLM's `CompletionOutput` as our record; with `logprobs=0` there is one entry per sampled token."""
    return Response(
        text=completion.text,
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(completion.logprobs.logprobs),
        finish_reason=_finish_reason(completion.finish_reason),
        policy_version=version,
    )


def _finish_reason(reason: str | None) -> FinishReason:
    try:
        return FinishReason(reason)
    except ValueError as error:
        raise EngineError(f"vLLM ended a response with '{reason}'; its own log says why, see VLLM_LOGGING_LEVEL=INFO.") from error
