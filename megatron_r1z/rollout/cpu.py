"""What vLLM needs on a machine without a GPU so that its weights can be rewritten in place and two runs can share the machine.

Written for vLLM 0.32 (`tests/unit/rollout/test_cpu.py` fails when what is relied on moves):

- its CPU linear layers pack their weights at load and empty the parameter; two switches keep them as they are on a GPU, live
  (measured: 2 % of the speed in float32, 17 % in bfloat16);
- tensor-parallel CPU engines talk through shared memory whose name comes from the init method, the same for every run on the machine;
  `RankExecutor` puts the run's port into it, and `host/segments.py` removes what a killed run leaves;
- its kernels are chosen by what the processor can do, whatever oneDNN is held to by `ONEDNN_MAX_CPU_ISA`. Linux gives AMX to a process that
  has asked for it, and it is oneDNN that asks: where it is held below, such a kernel ends the process by SIGILL;
- chunked prefill and per-request seeds do not go together, and eager mode must not compile its sampler.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from megatron_r1z.speed import CPU_BATCHED_TOKENS

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
"""The engine lives in the rank's process and says nothing but errors."""
GPU_MEMORY_UTILIZATION = 0.01
"""Share of the device that vLLM asks for. `kv_cache_memory_bytes` alone sizes the cache, but vLLM 0.33 first refuses to start where less
than this share is free, by default nine tenths, and policy and optimizer are there before it (`v1/worker/utils.py`, `request_memory`)."""
CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}
"""Eager mode would still compile its sampler at the first token."""


def prepare_import() -> None:
    """Set what vLLM reads when it is imported; a value that the user has set stays. oneDNN's instruction set holds for vLLM as well."""
    for name, value in (ENVIRONMENT | ({} if torch.cuda.is_available() else CPU_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
    left: Mapping[str, Any] = MappingProxyType(held_back(torch.cpu.get_capabilities(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")))
    torch.cpu.get_capabilities = functools.cache(lambda: left)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # it speaks before it reads its own setting


def held_back(capabilities: Mapping[str, Any], instruction_set: str) -> dict[str, Any]:
    """What is left of a processor's capabilities, by torch's names, under a value of `ONEDNN_MAX_CPU_ISA`; an empty one holds nothing back.

    >>> held_back({"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_tile": True}, "AVX512_CORE_BF16")
    {'avx2': True, 'avx512_f': True, 'avx512_bf16': True, 'amx_tile': False}
    """
    name, beyond = instruction_set.upper(), ["amx", "avx512"]
    if name in ("", "ALL", "DEFAULT") or "AMX" in name:
        beyond = []
    elif name.startswith("AVX10") or name in ("AVX512_CORE_BF16", "AVX512_CORE_FP16"):
        beyond = ["amx"]
    elif name.startswith("AVX512"):
        beyond = ["amx", "avx512_bf16"]
    return {feature: False if feature.startswith(tuple(beyond)) else value for feature, value in capabilities.items()}


def prepare_engine(max_model_tokens: int) -> dict[str, Any]:
    """Make this process ready for a CPU engine and return the arguments that only a CPU engine gets; nothing with CUDA.

    Must run before the engine is built.
    """
    if torch.cuda.is_available():
        return {"distributed_executor_backend": "external_launcher", "gpu_memory_utilization": GPU_MEMORY_UTILIZATION}
    import vllm._custom_ops
    import vllm.model_executor.layers.utils

    from megatron_r1z.rollout.fp8_cpu import prefer_emulation

    prefer_emulation()
    vllm._custom_ops._supports_onednn = False
    vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda *_args, **_kwargs: False
    return {
        "distributed_executor_backend": _rank_executor(),
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_tokens, CPU_BATCHED_TOKENS),
        "enforce_eager": True,
    }


def _rank_executor() -> type:
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class RankExecutor(ExecutorWithExternalLauncher):  # type: ignore[misc]
        """vLLM's external-launcher executor under a name of its own: shared memory is called after what follows the last colon."""

        def _distributed_args(self) -> tuple[str, int, int]:
            method, rank, local_rank = super()._distributed_args()
            return f"{method}:{os.environ['MASTER_PORT']}", rank, local_rank

    return RankExecutor
