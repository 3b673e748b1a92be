"""What `policy/cpu.py` and `weights/checkpoint.py` rely on, so that an upgrade shows here and not in a run."""

from __future__ import annotations

import inspect
import queue
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.version.cuda is not None:
    pytest.skip("the stand-in is for builds of torch without CUDA", allow_module_level=True)

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import random

from megatron_r1z.policy.cpu import megatron_device, prepare_process
from megatron_r1z.weights import checkpoint

REPLACED = ("current_device", "synchronize", "current_stream", "_queued_calls")


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process after `prepare_process`, for the length of a test."""
    for name in REPLACED:
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    monkeypatch.setattr(torch.cuda.random, "get_rng_state", torch.cuda.random.get_rng_state)
    prepare_process()


def test_versions() -> None:
    version = metadata.version("megatron-core")
    assert version.startswith("0.16."), (
        f"megatron-core is {version}: re-check policy/cpu.py, written for 0.16.1 (which calls into torch.cuda does it make without a "
        "GPU?), policy/local_layers.py and checkpoint.py, run tests/loop, then change this test."
    )
    assert torch.__version__.startswith("2.13."), f"torch is {torch.__version__}: re-check policy/cpu.py, written for 2.13."


# ---------------------------------------------------------------------------------------------------------------------- torch.cuda


def test_the_replaced_functions_exist_and_fail_without_cuda() -> None:
    """Where they work by themselves there is nothing to replace any more."""
    for function in (torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.random.get_rng_state):
        with pytest.raises((RuntimeError, AssertionError)):
            function()
    before = len(torch.cuda._queued_calls)
    random._set_cuda_rng_state(torch.empty(0, dtype=torch.uint8))
    assert len(torch.cuda._queued_calls) == before + 1
    torch.cuda._queued_calls.pop()


@pytest.mark.usefixtures("prepared")
def test_the_replaced_functions_mean_the_cpu() -> None:
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.cuda.synchronize() is None
    assert torch.cuda.synchronize(torch.device("cpu")) is None
    stream: Any = torch.cuda.current_stream()
    assert stream.wait_stream(stream) is stream.wait_event(None) is None


def test_the_rest_of_torch_cuda_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before, before_random = dict(vars(torch.cuda)), dict(vars(torch.cuda.random))
    for name in REPLACED:
        monkeypatch.setattr(torch.cuda, name, before[name])
    monkeypatch.setattr(torch.cuda.random, "get_rng_state", before_random["get_rng_state"])
    prepare_process()
    assert {name for name, value in vars(torch.cuda).items() if before.get(name) is not value} == set(REPLACED)
    assert {name for name, value in vars(torch.cuda.random).items() if before_random.get(name) is not value} == {"get_rng_state"}


@pytest.mark.usefixtures("prepared")
def test_recomputed_activations_keep_and_put_back_the_state_of_no_generator() -> None:
    """Megatron's checkpoint function, which runs the function again in the backward pass; nothing waits for a CUDA that never comes."""
    calls = []

    def square(values: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return values**2

    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    with megatron_device():
        random.checkpoint(square, False, values).sum().backward()
    assert calls == [False, True]
    assert torch.equal(values.grad, torch.tensor([2.0, 6.0]))
    assert len(torch.cuda._queued_calls) == 0


def test_with_cuda_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device, torch.cuda.synchronize
    prepare_process()
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    with megatron_device(), pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


# ---------------------------------------------------------------------------------------------------------------------------- mode

CUDA_DEVICES = ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)]


@pytest.mark.parametrize("device", CUDA_DEVICES, ids=str)
def test_device_arguments_mean_the_cpu(device: Any) -> None:
    with megatron_device():
        assert torch.tensor([1.0, 2.0], device=device).tolist() == [1.0, 2.0]
        assert torch.zeros(2, device=device, dtype=torch.bfloat16).dtype is torch.bfloat16
        assert torch.empty(2, device=device, pin_memory=True).device.type == "cpu"
        assert torch.ones(2).to(device).tolist() == [1.0, 1.0]
        assert torch.ones(2).to(device=device, dtype=torch.float64).dtype is torch.float64
        assert torch.arange(3, device=device).device.type == "cpu"


def test_other_devices_stay() -> None:
    with megatron_device():
        assert torch.zeros(2, device="meta").device.type == "meta"
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert torch.zeros(2, device=torch.device("meta")).device.type == "meta"
        assert torch.zeros(2).to("meta").device.type == "meta"


def test_tensor_cuda_is_the_tensor_itself() -> None:
    tensor = torch.ones(2, requires_grad=True)
    with megatron_device():
        assert tensor.cuda() is tensor
        assert tensor.cuda(0) is tensor
        assert tensor.cuda(torch.device("cpu"), non_blocking=True) is tensor


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "torch.cuda.FloatTensor"), (torch.bfloat16, "torch.cuda.BFloat16Tensor"), (torch.float16, "torch.cuda.HalfTensor")],
)
def test_tensors_say_that_they_are_on_cuda(dtype: torch.dtype, name: str) -> None:
    tensor = torch.ones(2, dtype=dtype)
    with megatron_device():
        assert tensor.type() == torch.nn.Parameter(tensor).type() == name
        assert tensor.type(torch.float64).dtype is torch.float64
        assert tensor.type(dtype=torch.float64).dtype is torch.float64
        assert tensor.device.type == "cpu"


def test_gradients_pass_through() -> None:
    weight = torch.ones(3, requires_grad=True)
    with megatron_device():
        (weight.cuda() * torch.full((3,), 2.0, device="cuda")).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))


def test_nothing_is_changed_outside_the_mode() -> None:
    with megatron_device():
        pass
    assert torch.ones(2).type() == "torch.FloatTensor"
    for call in (lambda: torch.zeros(1, device="cuda"), lambda: torch.ones(1).cuda()):
        with pytest.raises((RuntimeError, AssertionError)):
            call()


def test_an_exception_ends_the_mode() -> None:
    with pytest.raises(ValueError, match="inside"), megatron_device():
        raise ValueError("inside")
    assert torch.ones(2).type() == "torch.FloatTensor"


# ---------------------------------------------------------------------------------------------------------------------- checkpoint


@pytest.fixture
def results_queue() -> Iterator[None]:
    before = filesystem_async._results_queue
    filesystem_async._results_queue = None
    yield
    filesystem_async._results_queue = before


@pytest.mark.usefixtures("results_queue")
def test_a_queue_that_is_there_is_used_instead_of_a_manager_process() -> None:
    checkpoint._write_results_in_process()
    mine = filesystem_async._results_queue
    assert isinstance(mine, queue.SimpleQueue)
    assert filesystem_async._get_write_results_queue() is mine
    checkpoint._write_results_in_process()
    assert filesystem_async._results_queue is mine


def test_the_writer_asks_for_that_queue() -> None:
    """When it no longer does, `checkpoint._write_results_in_process` has no effect: look for a manager process that outlives a run."""
    assert "_get_write_results_queue()" in inspect.getsource(filesystem_async.FileSystemWriterAsync)
