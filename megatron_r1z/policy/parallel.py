"""Process groups of one rank: the default group, and Megatron's groups over it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_r1z.layout.topology import Topology
from megatron_r1z.policy.cpu import megatron_device, prepare_process

INTERFACE = "GLOO_SOCKET_IFNAME"
ELSEWHERE = "192.0.2.1"
"""An address that nobody has (RFC 5737): the way to it is the default route."""


def start_process_group(timeout_s: float = 1800.0) -> None:
    """Join the default group that torchrun's environment describes: gloo for CPU tensors, NCCL for CUDA tensors.

    All ranks take part in NCCL's first operation, which connects them: a first one of some ranks only, such as a refit's, is undefined
    (`torch.distributed.batch_isend_irecv`). The group is not bound to the device: torch would connect each of Megatron's groups at once,
    used or not, and keep NCCL's buffers for all of them.
    """
    _name_interface()
    patience = timedelta(seconds=timeout_s)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=patience)
        return
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=patience)
    dist.all_reduce(torch.zeros(1, device=own))


def _name_interface() -> None:
    """Tell gloo which network the other nodes are in, unless the user has.

    By itself it takes the one that the host's name stands for, and /etc/hosts often says 127.0.1.1 there.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < int(os.environ.get("WORLD_SIZE", "1")) and INTERFACE not in os.environ:
        name = interface_to(os.environ["MASTER_ADDR"])
        if name is not None:
            os.environ[INTERFACE] = name


def interface_to(*hosts: str) -> str | None:
    """The network interface by which packets for the first of `hosts` leave that is not this machine alone; None: there is none."""
    for host in (*hosts, ELSEWHERE):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = probe.getsockname()[0]
            if not own.startswith("127."):
                return next((name for name, known in psutil.net_if_addrs().items() if own in (item.address for item in known)), None)
    return None


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
