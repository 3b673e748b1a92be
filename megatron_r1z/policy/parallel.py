"""Process groups of one rank: the default group, and Megatron's groups over it."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_r1z.layout.topology import Topology
from megatron_r1z.policy.cpu import megatron_device, prepare_process


def start_process_group(timeout_s: float = 1800.0) -> None:
    """Join the default group that torchrun's environment describes: gloo for CPU tensors, NCCL for CUDA tensors."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def start_megatron(topology: Topology, seed: int) -> None:
    """Make Megatron's process groups and seed its random number trackers. Dropout is off everywhere, so no draw follows."""
    prepare_process()
    with megatron_device():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tp,
            pipeline_model_parallel_size=topology.pp,
            virtual_pipeline_model_parallel_size=topology.vpp if topology.vpp > 1 else None,
            context_parallel_size=topology.cp,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
