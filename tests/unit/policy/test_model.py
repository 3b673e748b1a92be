"""What Megatron is told about a model, where no model can be built to see it: offload needs a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from megatron_r1z.config import ParallelConfig, PrecisionConfig
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.policy.model import transformer_config

SHAPE = ModelShape("llama", 4, 32, 4, 2, 8, 48, 70, False, False, False, 1e4, None, 1e-6, 128)


@pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")  # megatron-core about its own default
@pytest.mark.parametrize("layers", [0, 3])
def test_offloaded_layers(layers: int) -> None:
    made = transformer_config(SHAPE, ParallelConfig(offload_layers=layers), PrecisionConfig(policy="bf16"))
    assert (made.cpu_offloading, made.cpu_offloading_num_layers) == (layers > 0, layers)
    assert (made.cpu_offloading_activations, made.cpu_offloading_weights) == (True, False)


def test_megatron_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="CPU offloading can be done only for layers less than 4"):
        transformer_config(SHAPE, ParallelConfig(offload_layers=4), PrecisionConfig(policy="bf16"))
