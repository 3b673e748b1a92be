"""The doctor's answers: honest about a CPU, about what is missing, and about packages that are not what they are called."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_r1z.cli import main
from megatron_r1z.doctor import Finding, Probe, diagnose, probe

CPU = Probe("3.11.7", torch="2.13.0+cpu", megatron_core="0.16.1", vllm="0.32.0")
HOPPER = Probe(
    "3.12.1",
    torch="2.14.1+cu130",
    cuda="13.0",
    gpu="NVIDIA H100",
    num_gpus=8,
    capability=(9, 0),
    nccl="2.28.9",
    megatron_core="0.19.2",
    transformer_engine="2.20.2",
    apex=True,
    vllm="0.33.1",
    nemo_run="0.11.1",
)


def findings(found: Probe) -> dict[str, Finding]:
    return {item.name: item for item in diagnose(found)}


def test_a_gpu_with_everything_needs_no_fallback() -> None:
    report = findings(HOPPER)
    assert report["GPU"].found == "8 x NVIDIA H100, compute capability 9.0"
    assert {name: item.meaning for name, item in report.items() if item.meaning and not name.startswith(("FP8", "auto"))} == {}
    assert {name.removeprefix("FP8 "): item.found for name, item in report.items() if name.startswith("FP8")} == {
        "blockwise": "yes",
        "mxfp8": "no",
        "tensorwise": "yes",
        "delayed": "yes",
    }
    assert report["FP8 blockwise"].meaning == "by Transformer Engine"
    assert report["FP8 mxfp8"].meaning == "it needs compute capability 10.0 or higher, and the GPU has 9.0"


def test_a_cpu_is_told_each_fallback() -> None:
    report = findings(CPU)
    assert report["GPU"] == Finding("GPU", "none", "policy and engine run on the CPU")
    assert report["NCCL"].meaning == "ranks communicate by gloo"
    assert "attention by torch, FP8 emulated" in report["Transformer Engine"].meaning
    assert report["apex"].meaning.startswith("optimizer by torch;")
    assert report["nemo-run"].meaning == "start ranks with `train`, or with torchrun"
    assert report["FP8 blockwise"] == Finding("FP8 blockwise", "yes", "emulated in bf16 on the CPU")
    assert "it needs a GPU" in report["FP8 delayed"].meaning


def test_what_auto_comes_to_is_told_with_its_reason() -> None:
    """Of the machine; of a configuration what it must have besides."""
    gpu, cpu = ({name: item for name, item in findings(found).items() if name.startswith("auto")} for found in (HOPPER, CPU))
    assert {item.found for name, item in gpu.items() if name != "auto kv_cache_bytes"} == {"on"}
    assert gpu["auto overlap_param_gather"].meaning == "with optimizer.distributed and several data-parallel ranks"
    assert {name for name, item in cpu.items() if item.found == "on"} == {"auto prefix_caching"}
    assert cpu["auto cuda_graphs"].meaning == "there is no GPU"
    assert cpu["auto kv_cache_bytes"].found == "256 MiB"
    without = findings(replace(HOPPER, transformer_engine=None))["auto gradient_accumulation_fusion"]
    assert (without.found, without.meaning) == ("off", "there are no layers of Transformer Engine, which do it")


def test_a_torch_for_gpus_that_sees_none() -> None:
    assert "CUDA_VISIBLE_DEVICES" in findings(replace(CPU, cuda="13.0"))["GPU"].meaning


def test_transformer_engine_without_a_gpu_is_a_mistake() -> None:
    assert findings(replace(CPU, transformer_engine="2.20.2"))["Transformer Engine"].meaning == (
        "WARNING: without a GPU megatron-core fails with it; uninstall transformer-engine"
    )


def test_a_transformer_engine_that_cannot_be_imported() -> None:
    report = findings(replace(HOPPER, transformer_engine=None, transformer_engine_error="libnccl.so.2: cannot open"))
    assert report["Transformer Engine"].meaning.startswith("it cannot be imported: libnccl.so.2: cannot open; layers of megatron-core's")
    assert report["FP8 blockwise"].found == "no"


def test_the_package_of_pypi_called_apex_is_not_taken_for_nvidias() -> None:
    report = findings(replace(CPU, other_apex=True))
    assert report["apex"].found == "another"
    assert report["apex"].meaning.startswith("WARNING: the package called apex has no amp_C: PyPI's is another project, uninstall it;")


def test_what_is_needed_and_missing() -> None:
    report = findings(replace(CPU, megatron_core=None, vllm=None))
    assert report["megatron-core"].meaning == "install the extra cpu or gpu; it is needed to train"
    assert report["vLLM"].meaning == "install the extra cpu or gpu; it is needed to sample, so by `train` and `evaluate`"


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    found = probe()
    assert found.torch == torch.__version__
    assert (found.gpu is None) == (not torch.cuda.is_available())
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", output, re.MULTILINE)
    assert len(output.splitlines()) == len(diagnose(found))


def test_it_runs_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; from megatron_r1z.cli import main; sys.exit(main(['doctor']))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "torch" in result.stdout
    assert "until then `plan` and this command are all that works" in result.stdout
    assert "FP8" not in result.stdout
