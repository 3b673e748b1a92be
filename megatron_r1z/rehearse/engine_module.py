"""`transformer_engine_torch` without having been compiled: the names and enums of its own bindings, kernels by `kernels.py` or not at all.

`bindings.json` is what `tools/te_bindings.py` read in the source of the version that it names. Transformer Engine's Python is the real one.
"""

from __future__ import annotations

import enum
import importlib
import json
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from megatron_r1z.rehearse import kernels

NAME = "transformer_engine_torch"
ANSWERS = {"get_num_cublas_streams": 4, "get_stream_priority_range": (0, -5), "get_cudnn_version": 92400, "get_cublasLt_version": 130100}
"""Of functions that ask the device or a library: cuDNN 9.24 and cuBLAS 13.1, which the `gpu` extra installs."""


def import_transformer_engine() -> None:
    """Transformer Engine with the stand-in as its compiled part; after `device.pretend_device`."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it then loads no library of its own
    os.environ["NVTE_FRAMEWORK"] = "none"
    sys.modules[NAME] = _module()
    common = importlib.import_module("transformer_engine.common")
    setattr(common, "load_framework_extension", lambda _framework: None)  # noqa: B010  # a module has no such attribute to mypy
    importlib.import_module("transformer_engine.pytorch")
    _count_fakes_as_tensors()


def _module() -> ModuleType:
    found = json.loads(Path(__file__).with_name("bindings.json").read_text(encoding="utf-8"))
    module = ModuleType(NAME)
    module.__spec__ = ModuleSpec(NAME, None)
    for name, members in found["enums"].items():
        setattr(module, name, enum.IntEnum(name, members))
    for name in found["functions"]:
        setattr(module, name, _missing(name))
    for name in found["classes"]:
        setattr(module, name, type(name, (), {}))
    for name, answer in ANSWERS.items():
        setattr(module, name, _answering(answer))
    for name, function in kernels.shape_functions(module).items():
        if not hasattr(module, name):
            raise AttributeError(f"{NAME} of Transformer Engine {found['version']} has no {name}: kernels.py was written for another.")
        setattr(module, name, function)
    return module


def _missing(name: str) -> Callable[..., Any]:
    def call(*_arguments: Any, **_options: Any) -> Any:
        raise NotImplementedError(f"a rehearsal does not know the shapes of Transformer Engine's {name}; add it to rehearse/kernels.py.")

    return call


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda *_arguments, **_options: answer


def _count_fakes_as_tensors() -> None:
    """Fused attention is for `torch.Tensor`, by its type, and offload to the host for everything but FakeTensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    utils = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    real = utils.AttentionParams.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        if options.get("qkv_type") is FakeTensor:
            options["qkv_type"] = torch.Tensor
        real(self, *arguments, **options)

    utils.AttentionParams.__init__ = init
    offload = importlib.import_module("transformer_engine.pytorch.cpu_offload")
    setattr(offload, "torch", _TorchWithoutFakes())  # noqa: B010


class _TorchWithoutFakes:
    """torch to a module that is not to know fakes: it finds a type of which there is nothing."""

    _subclasses = SimpleNamespace(FakeTensor=type("FakeTensor", (), {}))

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch"), name)
