"""What policy and critic have in common: a Megatron model's chunks on this rank, their optimizer, their step and their state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from torch import Tensor

from megatron_r1z.config import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.errors import DataError
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.policy.cpu import megatron_device, release_free_memory
from megatron_r1z.policy.fp8_state import check_same_number
from megatron_r1z.policy.model import EXTRA_STATE, ResponseModel, this_machine
from megatron_r1z.policy.optimizer import build_optimizer, build_schedule, complete_weights, gradient_norm, step_along, wrap_chunks
from megatron_r1z.policy.parallel import device
from megatron_r1z.speed import gradient_speed

CRITIC_PREFIX = "critic."
"""Of the names that a checkpoint has the critic's tensors under."""

OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}
"""In which form megatron-core keeps the state of the distributed optimizer: that of an undivided one, so that every degree may change.

It is gathered in the host's memory of the first of the ranks that share it, 12 bytes for a parameter of their part of the model; when it is
read, on each of them. megatron-core's default form cannot be written by its own releases since 0.16.
"""


class Settings(Protocol):
    """The sections of a configuration that decide how a model is built."""

    @property
    def model(self) -> ModelConfig:
        """Where the weights come from."""

    @property
    def parallel(self) -> ParallelConfig:
        """How the model is split."""

    @property
    def precision(self) -> PrecisionConfig:
        """Number formats."""


@dataclass(frozen=True)
class Taken:
    """How an optimizer step ended, the same on every rank."""

    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    skipped: bool
    """True when a loss or gradient that is not finite left the weights as they were."""


class TrainedModel:
    """Chunks with weights that are written from outside; `start_optimizer` adds gradient buffers, optimizer and schedule around them."""

    def __init__(self, settings: Settings, shape: ModelShape, topology: Topology, chunks: Sequence[ResponseModel]) -> None:
        self.shape = shape
        self.topology = topology
        self._settings = settings
        self._bare = list(chunks)
        self._wrapped: list[DistributedDataParallel] = []

    def parameters(self) -> dict[str, Tensor]:
        """This rank's weights by the names of the Megatron layout, without gradient history; writing into them changes the model.

        All ranks call this: a step may have left weights that are still to be fetched from others.
        """
        self._complete()
        return {
            f"chunks.{index}.{name}": tensor.data for index, chunk in enumerate(self._bare) for name, tensor in chunk.named_parameters()
        }

    def start_optimizer(self, config: OptimizerConfig) -> list[DistributedDataParallel]:
        """The chunks with gradient buffers. `has_moments` then tells whether a step was ever taken, here or before a resume."""
        self._optimizer_config = config
        self.has_moments = False
        self._wrapped = wrap_chunks(self._bare, config, gradient_speed(self._settings.parallel, config, this_machine()))
        self.optimizer = build_optimizer(self._wrapped, config)
        self.schedule = build_schedule(self.optimizer, config)
        for chunk in self._wrapped:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss
        return self._wrapped

    def start_step(self, num_micro_batches: int) -> None:
        """Forget the gradients of the step before."""
        self.check_passes(num_micro_batches)
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def take_step(self, loss: float) -> Taken:
        """Step along the accumulated gradient; weights, moments and schedule stay as they are where that or `loss` is not finite."""
        learning_rate = get_canonical_lr_for_logging(self.optimizer.param_groups)
        grad_norm = gradient_norm(self.optimizer)
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite:
            step_along(self.optimizer, grad_norm)
            self.has_moments = True
            self.schedule.step(increment=1)
        release_free_memory()
        return Taken(grad_norm, float(learning_rate or 0.0), skipped=not is_finite)

    @megatron_device()
    def _complete(self) -> None:
        complete_weights(self._wrapped)

    def check_passes(self, num_micro_batches: int) -> None:
        """Under FP8 all ranks must have as many."""
        if self._settings.precision.policy == "fp8":
            check_same_number(num_micro_batches, device())

    @megatron_device()
    def sharded_weights(self) -> dict[str, Any]:
        """The weights for Megatron's distributed checkpoint, one entry per model chunk."""
        self._complete()
        return {f"model{index}": chunk.sharded_state_dict(prefix="") for index, chunk in enumerate(self._bare)}

    @megatron_device()
    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Weights, optimizer and schedule for Megatron's distributed checkpoint."""
        state = self.sharded_weights()
        weights = state if len(self._bare) > 1 else {"model": state["model0"]}
        state["optimizer"] = self.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(OPTIMIZER_FORMAT))
        state["schedule"] = self.schedule.state_dict()
        return state

    @megatron_device()
    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Take over what `sharded_weights` saved."""
        for index, chunk in enumerate(self._bare):
            found = chunk.load_state_dict(state[f"model{index}"], strict=False)
            wrong = [name for name in (*found.missing_keys, *found.unexpected_keys) if not name.endswith(EXTRA_STATE)]
            if wrong:
                raise DataError(f"the checkpoint and this model differ in {len(wrong)} tensors, the first is {wrong[0]}.")

    @megatron_device()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `sharded_state` saved; learning rate, betas, decay and schedule stay those of the configuration."""
        self.load_weights(state)
        config = self._optimizer_config
        own = {"max_lr": config.lr, "min_lr": config.min_lr, "betas": config.betas, "eps": config.eps}
        for group in _groups_of(state["optimizer"]):
            group |= own  # megatron-core 0.19 finds a saved group by its learning rates
        self.optimizer.load_state_dict(state["optimizer"])
        self.has_moments = True
        for group in self.optimizer.param_groups:
            group |= own
        self.schedule.load_state_dict(state["schedule"])


def _groups_of(state: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    """The groups of parameters in the state of any of Megatron's optimizers, however deep: some are made of others."""
    for name, part in state.items():
        if name == "param_groups":
            yield from part
        elif isinstance(part, Mapping):
            yield from _groups_of(part)
