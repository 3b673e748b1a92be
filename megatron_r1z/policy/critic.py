"""`MegatronCritic`: the value model of PPO, a model like the policy with one number per token in place of the output layer.

Its layers start as the policy's, its head as zeros, so that the first values are 0. It has an optimizer of its own and learns from the
policy's micro-batches under the same schedule and layout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch import Tensor

from megatron_r1z.config import OptimizerConfig, TrainConfig
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.objective import clipped_value_losses
from megatron_r1z.packing import GlobalBatch, MicroBatch
from megatron_r1z.policy import step
from megatron_r1z.policy.cpu import megatron_device, release_free_memory
from megatron_r1z.policy.model import ValueModel, build_chunks
from megatron_r1z.policy.trained import CRITIC_PREFIX, Settings, Taken, TrainedModel
from megatron_r1z.types import ValueStats

HEAD = "output_layer.weight"
"""Of the critic, in the name of its parameter."""


class MegatronCritic(TrainedModel):
    """The critic on this rank."""

    def __init__(self, settings: Settings, shape: ModelShape, topology: Topology, *, padded_vocab_size: int) -> None:
        with megatron_device():
            chunks = build_chunks(ValueModel, shape, settings.parallel, settings.precision, padded_vocab_size)
        super().__init__(settings, shape, topology, chunks)
        release_free_memory()

    @torch.no_grad()
    def start_as(self, policy: Mapping[str, Tensor]) -> None:
        """Take the layers of a policy, given as its `parameters()`, and a head of zeros."""
        for name, tensor in self.parameters().items():
            if name.endswith(HEAD):
                tensor.zero_()
            else:
                tensor.copy_(policy[name])

    @megatron_device()
    def start_training(self, value_clip: float, config: OptimizerConfig) -> None:
        """Add gradient buffers, optimizer and schedule around the weights that are now in place."""
        self._value_clip = value_clip
        self.model = step.Model(self.start_optimizer(config))

    @megatron_device()
    def values(self, batches: Sequence[MicroBatch]) -> list[Tensor | None]:
        """Values before each response token, float32 [R] each; None on all but the last pipeline stage."""
        self.check_passes(len(batches))
        return step.collect(self.model, batches, lambda values_R: values_R)

    @megatron_device()
    def update(self, batch: GlobalBatch) -> ValueStats:
        """One optimizer step towards the returns of the batch."""
        self.start_step(len(batch.micro_batches))
        parts = self._passes(batch)
        sums = ValueSums(*step.sum_over_ranks([part.sums for part in parts], len(fields(ValueSums))))
        culprits = () if math.isfinite(sums.loss) else step.non_finite_over_ranks([(part.batch, part.losses_R) for part in parts])
        return _stats(sums, batch.denominator, self.take_step(sums.loss), culprits)

    def _passes(self, batch: GlobalBatch) -> list[_Tallies]:
        """Forward and backward: accumulates the gradient of a step."""

        def bind(work: step.Work) -> Any:
            return functools.partial(_micro_batch_loss, work.batch, self._value_clip)

        return step.run_schedule(self.model, [step.Work(item) for item in batch.micro_batches], bind, forward_only=False)

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """As the policy's, under names of its own, so that both fit one checkpoint."""
        state = super().sharded_state(is_loading=is_loading)
        add_prefix_for_sharding(state, CRITIC_PREFIX)
        return state


@dataclass(frozen=True)
class ValueSums:
    """Added up over response tokens, micro-batches and ranks."""

    loss: float
    tokens: float
    clipped: float
    value: float
    return_: float
    squared_return: float
    squared_error: float
    """Of return minus value."""


@dataclass(frozen=True)
class _Tallies:
    """What a micro-batch adds to the figures."""

    batch: MicroBatch
    sums: Tensor
    """The fields of `ValueSums`, float64."""
    losses_R: Tensor


def _micro_batch_loss(batch: MicroBatch, value_clip: float, values_R: Tensor) -> tuple[Tensor, Tensor, _Tallies]:
    """Megatron's triple: the summed loss, this micro-batch's part of the denominator, and the figures."""
    losses_R, clipped_R = clipped_value_losses(values_R, batch.values_R, batch.returns_R, batch.weights_R, value_clip)
    values, returns = values_R.detach().double(), batch.returns_R.double()
    by_name = {
        "loss": losses_R.detach(),
        "tokens": torch.ones_like(values),
        "clipped": clipped_R,
        "value": values,
        "return_": returns,
        "squared_return": returns**2,
        "squared_error": (returns - values) ** 2,
    }
    sums = torch.stack([by_name[field.name].double().sum() for field in fields(ValueSums)])
    denominator = torch.full((), batch.denominator, dtype=torch.int, device=values.device)  # a copy from the host would wait
    return losses_R.sum(), denominator, _Tallies(batch, sums, losses_R.detach())


def make_critic(config: TrainConfig, policy: TrainedModel, *, padded_vocab_size: int) -> MegatronCritic:
    """The critic beside a policy, which starts from the weights that `policy` has, ready to train."""
    critic = MegatronCritic(config, policy.shape, policy.topology, padded_vocab_size=padded_vocab_size)
    critic.start_as(policy.parameters())
    critic.start_training(config.algorithm.value_clip, config.optimizer.of_critic)
    return critic


def _stats(sums: ValueSums, denominator: int, taken: Taken, non_finite: tuple[str, ...]) -> ValueStats:
    """Sums to means over response tokens."""

    def mean(total: float) -> float:
        return total / sums.tokens if sums.tokens else math.nan

    return ValueStats(
        loss=sums.loss / denominator,
        grad_norm=taken.grad_norm,
        learning_rate=taken.learning_rate,
        clip_fraction=mean(sums.clipped),
        value_mean=mean(sums.value),
        return_mean=mean(sums.return_),
        return_square=mean(sums.squared_return),
        error_square=mean(sums.squared_error),
        num_tokens=int(sums.tokens),
        skipped=taken.skipped,
        non_finite=non_finite,
    )
