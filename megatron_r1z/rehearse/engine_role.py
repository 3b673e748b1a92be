"""One rank of an engine: vLLM's configuration, its model with its weights in place, and a refit through its weight transfer.

A program: `python -m megatron_r1z.rehearse.engine_role TASK`, with `roles.Task` as JSON; `rank` is that within an engine. vLLM is called
with the arguments of `rollout/vllm_engine.py`, and `rollout/weights.py` receives as in a run. No engine is started: no scheduler, no cache.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_r1z.config import TrainConfig, load_config
from megatron_r1z.cost.cache import cache_beside
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.cost.memory import REFIT_WORK_BYTES
from megatron_r1z.cost.run_cost import RunCost
from megatron_r1z.layout.blocks import engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.fp8 import by_format, fp8_matrices, modules_to_not_convert
from megatron_r1z.layout.known import find_shape, known_models
from megatron_r1z.rehearse.native import load_libraries
from megatron_r1z.rehearse.policy_role import heard, run_role
from megatron_r1z.rehearse.roles import Found, Phase, Task
from megatron_r1z.rehearse.versions import check_versions
from megatron_r1z.speed import GPU_MACHINE, engine_speed

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""What config.json of these families calls its model."""


def play(task: Task) -> Found:
    """The role of a rank of an engine; once in a process."""
    check_versions("torch", "vllm")
    load_libraries()
    with heard() as said, tempfile.TemporaryDirectory() as folder:
        config = load_config(TrainConfig, task.config, task.overrides)
        _pretend(task, config.rollout.tensor_parallel_size)
        found = _play(task, config, Path(folder))
        return Found(**found | {"warnings": tuple(dict.fromkeys(said))})


def _pretend(task: Task, tp: int) -> None:
    os.environ.update(RANK=str(task.rank), LOCAL_RANK="0", WORLD_SIZE=str(tp), MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    from megatron_r1z.rehearse.device import Device, pretend_device
    from megatron_r1z.rehearse.world import pretend_groups
    from megatron_r1z.rollout.cpu import prepare_import

    device = Device(task.gpu, task.memory_bytes, task.capability, task.gpus_per_node)
    pretend_device(device)
    prepare_import()
    pretend_groups()
    from megatron_r1z.rehearse.platform import pretend_deep_gemm, pretend_platform, stay_in_process

    pretend_platform(device)
    pretend_deep_gemm(device.capability)
    stay_in_process()


def _play(task: Task, config: TrainConfig, folder: Path) -> dict[str, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.usage.usage_lib import UsageContext

    from megatron_r1z.rehearse.live import LiveBytes
    from megatron_r1z.rehearse.platform import pretend_groups_of_engine
    from megatron_r1z.rehearse.world import start_world
    from megatron_r1z.rollout.vllm_engine import EngineSettings, engine_arguments

    shape, tp, start = find_shape(config.model.path).shape, config.rollout.tensor_parallel_size, time.monotonic()
    matrices, cache_bytes = _matrices(config, shape), config.rollout.kv_cache_bytes
    settings = EngineSettings(
        model_folder=_model_folder(config.model.path, folder),
        dtype=config.precision.engine_format,
        rank=task.rank,
        num_ranks=config.parallel.num_ranks,
        tensor_parallel_size=tp,
        max_model_tokens=config.max_model_tokens,
        max_concurrent_sequences=config.rollout.max_concurrent_sequences,
        kv_cache_bytes=cache_bytes if cache_bytes != "auto" else cache_beside(config, shape, task.memory_bytes, 0),
        seed=config.rollout.seed,
        speed=engine_speed(config.rollout, config.max_model_tokens, GPU_MACHINE),
        not_in_fp8=tuple(modules_to_not_convert(shape, matrices)) if config.precision.engine == "fp8" else None,
    )
    arguments = engine_arguments(settings)
    engine = EngineArgs(**arguments, skip_tokenizer_init=True).create_engine_config(UsageContext.LLM_CLASS)
    phases = [Phase("configuration", 0, 0, time.monotonic() - start)]
    start_world(task.rank, tp)
    pretend_groups_of_engine(task.rank, tp)
    live, start = LiveBytes(), time.monotonic()
    with set_current_vllm_config(engine), FakeTensorMode(allow_non_fake_inputs=True), live:
        model = get_model_loader(engine.load_config).load_model(vllm_config=engine, model_config=engine.model_config)
        phases.append(Phase("weights", live.now, live.most, time.monotonic() - start))
        live.restart()
        start = time.monotonic()
        names = _receive(model, engine)
        phases.append(Phase("refit", live.now, live.most, time.monotonic() - start, _planned(config, shape)))
    wanted: dict[str, tuple[int, ...]] = {}
    for part in by_format(engine_layout(shape, tp, tp), matrices):
        wanted |= {name: tuple(size) for name, size in part.parameters[task.rank].items()}
    return {
        "role": "engine",
        "rank": task.rank,
        "phases": tuple(phases),
        "num_parameters": len(names),
        "layout_differences": tuple(
            f"{name}: layout {wanted.get(name)}, engine {names.get(name)}"
            for name in sorted(wanted.keys() | names.keys())
            if wanted.get(name) != names.get(name)
        ),
        "figures": _figures(engine, model),
    }


def _planned(config: TrainConfig, shape: ModelShape) -> int:
    """What `plan` says of a refit: weights, a second copy where kernels have a layout of their own, and the piece that is written."""
    engine = RunCost(config, shape, Lengths.at_most(config)).engine
    return engine.weights + engine.staging + REFIT_WORK_BYTES


def _matrices(config: TrainConfig, shape: ModelShape) -> frozenset[str]:
    if config.precision.engine != "fp8":
        return frozenset()
    layouts = (
        megatron_layout(shape, config.parallel.topology, 1),
        engine_layout(shape, config.parallel.num_ranks, config.rollout.tensor_parallel_size),
    )
    return fp8_matrices(shape, layouts, config.precision.bf16_layers(shape.num_layers))


def _model_folder(path: str, folder: Path) -> str:
    """A folder with the model's config.json: its own, or one that is made of what is known of it by name."""
    found = find_shape(path)
    if found.is_local:
        return path
    fields = known_models()[found.source]
    tree = fields | {"architectures": [ARCHITECTURES[fields["model_type"]]], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    return str(folder)


def _receive(model: Any, engine: Any) -> dict[str, tuple[int, ...]]:
    """A refit that writes nothing, twice, through vLLM's own steps; the parameters that it would write."""
    import torch

    from megatron_r1z.rollout.weights import Receiver, UpdateInfo

    receiver = Receiver.__new__(Receiver)  # its own constructor joins vLLM's workers
    receiver.model, receiver.model_config, receiver.device = model, engine.model_config, torch.device("cuda", 0)
    receiver._staged, receiver._is_reloading = {}, False
    written: list[dict[str, tuple[int, ...]]] = []

    def write(parameters: Mapping[str, torch.Tensor]) -> None:
        written.append({name: tuple(tensor.shape) for name, tensor in parameters.items()})
        for tensor in parameters.values():
            tensor.copy_(torch.empty_like(tensor))

    for _ in range(2):
        receiver.start_weight_update()
        receiver.receive_weights(UpdateInfo(write=write))
        receiver.finish_weight_update()
    if written[0] != written[1]:
        raise ValueError("the second refit finds other parameters than the first")
    return written[0]


def _figures(engine: Any, model: Any) -> dict[str, Any]:
    """What vLLM made of the arguments."""
    formats = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters()})
    return {
        "model": type(model).__name__,
        "formats": ", ".join(formats),
        "quantisation": type(engine.quant_config).__name__,
        "gpu_memory_utilization": engine.cache_config.gpu_memory_utilization,
        "kv_cache_bytes": engine.cache_config.kv_cache_memory_bytes,
        "head": str(engine.model_config.head_dtype).removeprefix("torch."),
        "executor": str(engine.parallel_config.distributed_executor_backend),
        "cuda_graphs": str(engine.compilation_config.cudagraph_mode),
        "max_num_batched_tokens": engine.scheduler_config.max_num_batched_tokens,
        "prefix_caching": engine.cache_config.enable_prefix_caching,
        "starts_beside_a_full_device": _starts(engine),
    }


def _starts(engine: Any) -> bool:
    """Whether vLLM would start with a twentieth of the device free, which is left beside a policy."""
    from vllm.v1.worker.utils import request_memory

    total = 80 << 30
    snapshot = SimpleNamespace(total_memory=total, free_memory=total // 20, device_="cuda:0")
    try:
        request_memory(snapshot, engine.cache_config)
    except ValueError:
        return False
    return True


def main(argv: Sequence[str]) -> int:
    """The program."""
    return run_role(play, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
