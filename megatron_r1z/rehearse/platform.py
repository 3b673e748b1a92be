"""vLLM 0.33 on a pretended device: what it asks NVML, and what it would start other processes for. Before vLLM's platform is looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_r1z.rehearse.device import Device

DRIVER, CUDA = "580.65", 13000
"""Versions that NVML gives: a driver for CUDA 13.0."""
SCALES_IN_WORD, ALIGNED_ROWS = 4, 4
"""Of DeepGEMM's scales on Blackwell: exponents in 4 bytes, and rows in the 16 bytes that a copy is aligned to."""


def pretend_platform(device: Device) -> None:
    """Have vLLM see such devices, by replacing functions of the NVML binding that it brings along."""
    from vllm.utils.import_utils import import_pynvml

    binding = import_pynvml()
    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": device.count,
        "nvmlDeviceGetCudaComputeCapability": device.capability,
        "nvmlDeviceGetName": device.name,
        "nvmlDeviceGetUUID": "GPU-0",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=device.memory_bytes, free=device.memory_bytes, used=0),
        "nvmlDeviceGetP2PStatus": 0,
        "nvmlSystemGetDriverVersion": DRIVER,
        "nvmlSystemGetCudaDriverVersion": CUDA,
        "nvmlDeviceGetNumaNodeId": 0,
    }
    for name, answer in answers.items():
        setattr(binding, name, _answering(answer))
    binding.nvmlDeviceGetHandleByIndex = binding.nvmlDeviceGetIndex = lambda index: index
    binding.nvmlDeviceGetPciInfo = lambda index: SimpleNamespace(busId=f"00000000:{index:02x}:00.0")


def stay_in_process() -> None:
    """Model classes are asked for their properties here; vLLM would start a process for that, which pretends nothing."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()


def pretend_deep_gemm(capability: tuple[int, int]) -> None:
    """What of DeepGEMM is called while weights get ready: the form that its products want of the scales of 128 x 128 blocks.

    On Hopper, or where scales stay float32, that is the one they have; on Blackwell exponents alone, four to a word, for each row of the
    matrix, rows next to each other (DeepGEMM `csrc/apis/layout.hpp`).
    """
    import torch
    from vllm.utils import deep_gemm

    def transform(sf: Any, mn: int, disable_ue8m0_cast: bool = False, **_options: Any) -> Any:
        if capability[0] == 9 or disable_ue8m0_cast:
            return sf
        groups, words = sf.shape[0], -(-sf.shape[-1] // SCALES_IN_WORD)
        rows = -(-mn // ALIGNED_ROWS) * ALIGNED_ROWS
        return torch.empty_strided((groups, mn, words), (words * rows, 1, rows), dtype=torch.int32, device=sf.device)

    module = deep_gemm._import_deep_gemm()
    if module is not None:
        module.set_pdl = _answering(None)
        module.transform_sf_into_required_layout = transform


def pretend_groups_of_engine(rank: int, tp: int) -> None:
    """vLLM's coordinators of process groups: this rank of an engine of `tp`, with nobody to talk to; after `world.start_world`."""
    import torch
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    class Alone(parallel_state.GroupCoordinator):  # type: ignore[misc]  # vLLM has no types
        def __init__(self, ranks: list[int]) -> None:
            self.ranks, self.world_size, self.rank, self.rank_in_group = ranks, len(ranks), rank, ranks.index(rank)
            self.local_rank, self.device, self.unique_name = 0, torch.device("cuda", 0), "rehearsal:0"
            self.device_communicator = self.mq_broadcaster = None
            self.use_device_communicator = self.use_custom_op_call = False
            self.cpu_group = self.device_group = dist.group.WORLD

        def __del__(self) -> None: ...

    parallel_state._WORLD = parallel_state._TP = Alone(list(range(tp)))
    for name in ("_PP", "_DP", "_EP", "_DCP", "_PCP", "_EPLB"):
        if hasattr(parallel_state, name):
            setattr(parallel_state, name, Alone([rank]))


def _answering(answer: Any) -> Any:
    return lambda *_arguments, **_options: answer
