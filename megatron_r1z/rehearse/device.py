"""`torch.cuda` with pretended devices: tensors on `cuda:0` are FakeTensors, and no driver is asked. For torch 2.14.

After `native.load_libraries`, and before Megatron, Transformer Engine or vLLM are imported. It cannot be undone: a process of its own.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # its tables are made of the real functions
import torch._subclasses.fake_tensor as fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@dataclasses.dataclass(frozen=True)
class Device:
    """What is pretended of each device."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    count: int = 8
    num_multiprocessors: int = 132


class Stream:
    """On which everything has happened."""

    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, *_arguments: Any, **_options: Any) -> None: ...
    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_error: object) -> None: ...
    def wait_stream(self, *_arguments: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, *_arguments: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> Any:
        """An event that has happened."""
        return event or Event()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether all has happened."""
        return True


class Event:
    """Something that has happened."""

    def __init__(self, *_arguments: Any, **_options: Any) -> None: ...
    def record(self, *_arguments: Any) -> None:
        """Nothing to do."""

    def wait(self, *_arguments: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, _other: Any) -> float:
        """Milliseconds."""
        return 0.0


class Generator:
    """Of random numbers that nobody draws."""

    def get_state(self) -> torch.Tensor:
        """Nothing."""
        return torch.empty(0, dtype=torch.uint8)

    def set_state(self, _state: Any) -> None:
        """Nothing to set."""

    graphsafe_get_state = clone_state = get_state
    graphsafe_set_state = manual_seed = set_state


class _Context:
    """`torch.cuda.device(...)`."""

    def __init__(self, *_arguments: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_error: object) -> None: ...


def pretend_device(device: Device) -> None:
    """Have `torch.cuda` speak of such devices, of which 0 is this process's."""
    torch._C._ensureCUDADeviceGuardSet()  # torch's own guard for a build with CUDA on a machine without
    torch.autograd.set_multithreading_enabled(False)  # else a thread for each device
    stream = Stream()
    values = {
        "is_available": True,
        "device_count": device.count,
        "current_device": 0,
        "is_initialized": True,
        "get_device_properties": _properties(device),
        "get_device_capability": device.capability,
        "get_device_name": device.name,
        "current_stream": stream,
        "default_stream": stream,
        "stream": stream,
        "mem_get_info": (device.memory_bytes, device.memory_bytes),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "is_current_stream_capturing": False,
        "can_device_access_peer": True,
        "get_rng_state": torch.empty(0, dtype=torch.uint8),
    }
    nothing = ("set_device", "_lazy_init", "_lazy_call", "init", "synchronize", "empty_cache", "ipc_collect", "set_rng_state")
    for name in (*nothing, "reset_peak_memory_stats", "manual_seed", "manual_seed_all"):
        values[name] = None
    for name, value in values.items():
        setattr(torch.cuda, name, _answering(value))
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.device = Stream, Event, _Context  # type: ignore[misc, assignment]
    torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state = _answering(values["get_rng_state"]), _answering(None)
    torch.cuda.memory.empty_cache = _answering(None)
    torch.cuda.default_generators = (Generator(),) * device.count  # type: ignore[assignment]
    fake_tensor.init_gpu_context = _answering(None)
    FakeTensorMode.avoid_device_init = property(lambda _self: True)  # type: ignore[assignment, method-assign]
    torch.nn.Module.cuda = _moved  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self, *_arguments: self  # type: ignore[method-assign]  # torch has no fake kernel of it
    _give_numbers()


def _moved(module: torch.nn.Module, _device: Any = None) -> torch.nn.Module:
    """`Module.cuda`: what was made in the host's memory is made anew; fakes cannot be swapped as torch does it."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and parameter.device.type == "cpu":
                made = torch.nn.Parameter(torch.empty_like(parameter, device="cuda"), requires_grad=parameter.requires_grad)
                made.__dict__.update({key: value for key, value in parameter.__dict__.items() if key not in made.__dict__})
                part._parameters[name] = made
    return module


def _properties(device: Device) -> SimpleNamespace:
    major, minor = device.capability
    return SimpleNamespace(
        name=device.name,
        major=major,
        minor=minor,
        total_memory=device.memory_bytes,
        multi_processor_count=device.num_multiprocessors,
        gcnArchName="",
        is_integrated=False,
        warp_size=32,
        L2_cache_size=50 << 20,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        regs_per_multiprocessor=65536,
        uuid="GPU-0",
    )


def _answering(value: Any) -> Any:
    """A function of its own for each name: torch._dynamo wants no two alike."""
    return lambda *_arguments, **_options: value


def _give_numbers() -> None:
    """Where code asks a tensor without numbers for one, it gets 1: finite, and neither nothing nor infinitely much."""

    def answer(name: str, of_fake: Any) -> None:
        real = getattr(torch.Tensor, name)
        setattr(torch.Tensor, name, lambda self: of_fake(self) if isinstance(self, FakeTensor) else real(self))

    answer("item", lambda tensor: 1.0 if tensor.is_floating_point() else 1)
    answer("tolist", lambda tensor: _nested(tensor.shape))
    answer("__float__", lambda _tensor: 1.0)
    answer("__int__", lambda _tensor: 1)
    answer("__bool__", lambda _tensor: False)


def _nested(shape: Any) -> Any:
    return [_nested(shape[1:]) for _ in range(shape[0])] if len(shape) else 1.0
