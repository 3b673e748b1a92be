"""How large a key-value cache becomes where the configuration says `auto`: a run asks when its policy is in place, `plan` beforehand."""

from __future__ import annotations

from megatron_r1z.config import EvaluateConfig, TrainConfig
from megatron_r1z.cost.assumptions import DEFAULT
from megatron_r1z.cost.cluster import GIB
from megatron_r1z.cost.engine_memory import EngineMemory
from megatron_r1z.cost.formats import count_parameters, engine_format, policy_format
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.cost.memory import REFIT_WORK_BYTES
from megatron_r1z.cost.run_cost import MAX_BUFFER_BYTES, RunCost
from megatron_r1z.layout.blocks import POLICY_VOCAB_MULTIPLE, megatron_layout
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.speed import GPU_MACHINE, batched_tokens, engine_speed


def cache_beside(config: TrainConfig | EvaluateConfig, shape: ModelShape, device_bytes: int, outside_bytes: int) -> int:
    """What the fullest moment leaves of a GPU's memory: of an iteration of training, or of an evaluation.

    Args:
        config: of the run.
        shape: of the model.
        device_bytes: of the GPU.
        outside_bytes: of them, what no tensor of this process takes.
    """
    if isinstance(config, TrainConfig):
        return RunCost(config, shape, Lengths.at_most(config)).cache_beside(device_bytes, outside_bytes)
    rollout = config.rollout
    form = engine_format(config.precision)
    engine = EngineMemory(shape, rollout, form, config.max_model_tokens, 0, batched_tokens(rollout, device_bytes / GIB))
    graphs = DEFAULT.cuda_graphs_gib if engine_speed(rollout, config.max_model_tokens, GPU_MACHINE).cuda_graphs else 0.0
    taken = max(int(DEFAULT.reserved_gib * GIB), outside_bytes) + int(graphs * GIB) + engine.weights + engine.staging
    refit = REFIT_WORK_BYTES + 3 * MAX_BUFFER_BYTES + _policy_weights(config, shape) if config.model.checkpoint is not None else 0
    return engine.cache_for(device_bytes - taken - max(engine.work, refit))


def _policy_weights(config: EvaluateConfig, shape: ModelShape) -> int:
    """Of a policy that is there until the engine has its weights."""
    layout, form = megatron_layout(shape, config.parallel.topology, POLICY_VOCAB_MULTIPLE["te"], "te"), policy_format(config.precision)
    return max(count_parameters(parameters).nbytes(form) for parameters in layout.parameters.values())
