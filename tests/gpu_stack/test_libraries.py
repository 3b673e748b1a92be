"""What the package relies on in the libraries of a GPU environment, one by one: whichever moves fails here by name."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import megatron_r1z

PACKAGE = Path(megatron_r1z.__file__).parent


def run(program: str, **environment: str) -> str:
    """What a program prints in a process of its own."""
    import os

    child = subprocess.run([sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout.strip().splitlines()[-1]


def test_the_names_of_kernels_are_of_the_transformer_engine_that_is_installed() -> None:
    version = json.loads((PACKAGE / "rehearse" / "bindings.json").read_text())["version"]
    assert metadata.version("transformer-engine").split(".")[:2] == version.split(".")[:2], "run tools/te_bindings.py"


def test_whole_tensors_are_a_source_of_weights() -> None:
    """vLLM 0.33 reads `metadata` as an attribute and goes over the tensors as often as it likes."""
    program = """
from megatron_r1z.rehearse.native import load_libraries
load_libraries()
import torch
from megatron_r1z.rollout.weights import CheckpointSource
source = CheckpointSource([("a", (2, 3)), ("b", (4,))], torch.bfloat16, [("a", torch.zeros(2, 3)), ("b", torch.zeros(4))])
assert source.implements_iter_full()
assert [(item.name, tuple(item.shape)) for item in source.metadata] == [("a", (2, 3)), ("b", (4,))]
assert source.owned_names(0) == ["a", "b"]
assert all([name for name, _ in source.iter_full()] == ["a", "b"] for _ in range(2))
print("good")
"""
    assert run(program) == "good"


@pytest.mark.parametrize(("value", "precision"), [("ieee", "ieee"), ("tf32", "tf32")])
def test_triton_multiplies_float32_as_its_variable_says(value: str, precision: str) -> None:
    program = "from triton import knobs; print(knobs.language.fp32_default)"
    assert run(program, TRITON_F32_DEFAULT=value) == precision


def test_cublas_knows_the_variable_that_keeps_float32() -> None:
    folder = next(Path(path) for path in sys.path if (Path(path) / "nvidia").is_dir()) / "nvidia"
    libraries = sorted(folder.glob("*/lib/libcublasLt.so.*"))
    assert libraries
    assert all(b"NVIDIA_TF32_OVERRIDE" in library.read_bytes() for library in libraries)


def test_micro_batches_go_to_the_device_from_pinned_memory_without_waiting() -> None:
    """The copies of a step, whose results come back after its last pass alone."""
    program = """
from megatron_r1z.rehearse.native import load_libraries
load_libraries()
from megatron_r1z.rehearse.device import Device, pretend_device
from megatron_r1z.rehearse.engine_module import import_transformer_engine
pretend_device(Device("NVIDIA H100 80GB HBM3", 79 << 30, (9, 0)))
import_transformer_engine()
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from megatron_r1z.policy import step
said, move = [], torch.Tensor.to
torch.Tensor.pin_memory = lambda self: said.append("pinned") or self
torch.Tensor.to = lambda self, *where, **options: said.append(options) or move(self, *where, **options)
torch.Tensor.cpu = lambda self: said.append("fetched") or self
def schedule(model, work, bind, *, forward_only):
    on_device = [step._moved(item.batch) for item in work]
    said.append("passes")
    return [bind(item)(tensor) for item, tensor in zip(work, on_device)]
step.run_schedule = schedule
with FakeTensorMode():
    step.collect(step.Model([]), [torch.zeros(3), torch.zeros(4)], lambda output: output)
assert said == ["pinned", {"non_blocking": True}] * 2 + ["passes"] + ["fetched"] * 2, said
print("good")
"""
    assert run(program) == "good"


def test_the_head_multiplies_bf16_into_float32() -> None:
    """On a GPU every product of the policy's head, of both passes and with an entropy bonus, is cuBLAS's with float32 output."""
    program = """
from megatron_r1z.rehearse.native import load_libraries
load_libraries()
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from megatron_r1z.rehearse.device import Device, pretend_device
pretend_device(Device("NVIDIA H100 80GB HBM3", 79 << 30, (9, 0)))
from megatron_r1z.policy.logprob import vocab_parallel_logprobs

class Products(TorchDispatchMode):
    seen = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if "mm" in function.name():
            tensors = [item for item in (*args, found) if isinstance(item, torch.Tensor)]
            self.seen.append((function.name(), *(str(item.dtype).removeprefix("torch.") for item in tensors)))
        return found

with FakeTensorMode(allow_non_fake_inputs=True), Products() as products:
    place = {"device": torch.device("cuda", 0)}
    hidden = torch.empty(3000, 64, dtype=torch.bfloat16, requires_grad=True, **place)
    weight = torch.empty(20000, 64, dtype=torch.bfloat16, requires_grad=True, **place)
    targets = torch.zeros(3000, dtype=torch.int64, **place)
    found = vocab_parallel_logprobs(hidden, weight, targets, temperature=0.7, vocab_size=19990, vocab_start=0, group=None)
    sum(part.sum() for part in found).backward()
    assert hidden.grad.dtype is weight.grad.dtype is torch.bfloat16
print(len(products.seen), *set(products.seen))
"""
    assert run(program) == "16 ('aten::mm.dtype', 'bfloat16', 'bfloat16', 'float32')"
