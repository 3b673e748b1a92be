"""What megatron-core needs from `torch.cuda` on a machine that has none.

Written for megatron-core 0.16.1 and 0.19 on torch 2.13 (`tests/unit/policy/test_cpu.py` fails when either moves what is relied on).
Nothing of Megatron is changed. A few names of `torch.cuda` get a CPU meaning, once per process:

- `current_device()` is only used as a `device=` value, so it answers `cpu`;
- `synchronize()` has nothing to wait for, nor has `current_stream()` (megatron-core 0.19);
- `random.get_rng_state()` and the queue of calls that wait for CUDA are for recomputed activations, which keep the generator's state and
  put it back: there is none, and nothing draws from it, so the state is empty and such calls are dropped instead of piling up.

Everything else is a `TorchFunctionMode`, a public torch hook, which answers for literal `device="cuda"` arguments, `Tensor.cuda()` and
comparisons with `"torch.cuda.FloatTensor"`. The mode is thread-local, and vLLM's engine is built outside it, so it is a context around
each call into Megatron.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_r1z.host.shared_memory import SharedTensors


@contextmanager
def megatron_device() -> Iterator[None]:
    """A context, or `@megatron_device()`, for calls into Megatron: the CPU stand-in without CUDA, nothing with it."""
    with nullcontext() if torch.cuda.is_available() else _CudaMeansCpu():
        yield


def prepare_process() -> None:
    """Give `torch.cuda.current_device` and a few others their CPU meaning; does nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    torch.cuda.current_stream = lambda *_args, **_kwargs: _NoStream()  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = lambda *_args, **_kwargs: torch.empty(0, dtype=torch.uint8)
    torch.cuda._queued_calls = deque(maxlen=0)  # type: ignore[assignment]


def release_free_memory() -> None:
    """Give free heap memory back to the system; does nothing where CUDA is available.

    glibc keeps tensors of up to 32 MB on its heap, where activations of ever different sizes leave holes: without this a rank that
    trains SmolLM2-135M grows by some 80 MB an iteration.
    """
    if torch.cuda.is_available() or not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def share_weights(chunks: Sequence[torch.nn.Module]) -> SharedTensors | None:
    """Put weights where the other ranks of the machine can read them, while the result lives; does nothing where CUDA is available.

    One after the other, so that no more than one weight is there twice.
    """
    if torch.cuda.is_available() or not sys.platform.startswith("linux"):
        return None
    parameters = {f"{index}.{name}": value for index, chunk in enumerate(chunks) for name, value in chunk.named_parameters()}
    shared = SharedTensors({name: value.data for name, value in parameters.items()})
    for name, value in parameters.items():
        shared.tensors[name].copy_(value.data)
        value.data = shared.tensors[name]
    return shared


class _NoStream:
    """The stream of a CPU, where everything has happened when a call returns."""

    def wait_stream(self, _stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, _event: object) -> None:
        """Nothing to wait for."""


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return func(*(torch.device("cpu") if _is_cuda(arg) else arg for arg in args), **kwargs)


def _is_cuda(value: object) -> bool:
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"
