"""Memory of one rank, item by item and phase by phase, for the code as it is: policy, critic and engine are there all the time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from megatron_r1z.cost.critic import CriticMemory
from megatron_r1z.cost.engine_memory import EngineMemory
from megatron_r1z.cost.formats import QUANTISED_BYTES
from megatron_r1z.cost.policy_memory import PolicyMemory

REFIT_WORK_BYTES = 64 << 20
"""Room for one piece in the engine's number format (`reshard.execute.PIECE_BYTES` of a GPU)."""


class Phase(Enum):
    """What a rank is doing."""

    ROLLOUT = "rollout"
    LOGPROBS = "log-probs"
    UPDATE = "update"
    REFIT = "refit"


@dataclass(frozen=True)
class Item:
    """One use of memory on a rank."""

    name: str
    nbytes: int
    phase: Phase | None = None
    """When it is there; None: always."""


@dataclass(frozen=True)
class RankMemory:
    """What a rank of one pipeline stage needs."""

    stage: int
    items: tuple[Item, ...]

    def total(self, phase: Phase) -> int:
        """Bytes in a phase."""
        return sum(item.nbytes for item in self.items if item.phase in (None, phase))

    @property
    def fullest(self) -> Phase:
        """The phase that needs most."""
        return max(Phase, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes in that phase."""
        return self.total(self.fullest)

    def largest(self, phase: Phase) -> Item:
        """The item that takes most in a phase."""
        return max((item for item in self.items if item.phase in (None, phase)), key=lambda item: item.nbytes)


def rank_memory(
    policy: PolicyMemory,
    critic: CriticMemory | None,
    engine: EngineMemory,
    fp8_share: float,
    refit_buffers: int,
    graphs: int,
    reserved: int,
) -> tuple[RankMemory, ...]:
    """A rank of each pipeline stage.

    Args:
        policy: the policy's part.
        critic: the critic's part; None without one.
        engine: the engine's part, the same on every rank.
        fp8_share: share of the layers' matrices that go over in FP8.
        refit_buffers: send and receive buffers of the rank that needs most.
        graphs: what the engine's CUDA graphs take.
        reserved: what no tensor of ours takes.
    """
    fixed = [
        Item("engine weights", engine.weights),
        *([Item("engine staging", engine.staging)] if engine.staging else []),
        Item("KV cache", engine.cache_bytes),
        *([Item("CUDA graphs", graphs)] if graphs else []),
        Item("refit buffers", refit_buffers),
        Item("reserved", reserved),
        Item("engine at work", engine.work, Phase.ROLLOUT),
        Item("refit at work", REFIT_WORK_BYTES, Phase.REFIT),
    ]
    return tuple(RankMemory(stage, (*_policy_items(policy, critic, stage, fp8_share), *fixed)) for stage in range(policy.topology.pp))


def _policy_items(policy: PolicyMemory, critic: CriticMemory | None, stage: int, fp8_share: float) -> Iterator[Item]:
    """Of policy and critic, whose passes come one after the other."""
    models: list[PolicyMemory] = [policy] if critic is None else [policy, critic]
    for model, name in zip(models, ("", "critic's "), strict=False):
        yield Item(f"{name}weights", model.weights(stage))
        yield Item(f"{name}gradients", model.gradients(stage))
        yield Item(f"{name}optimizer", model.optimizer_state(stage))
    if placeholders := max(model.placeholders for model in models):
        yield Item("gradient placeholders", placeholders)
    if fp8_share:
        yield Item("quantised for engines", math.ceil(policy.parameters[stage].matrices * fp8_share * QUANTISED_BYTES))
    yield Item("activations", max(model.logprobs(stage) for model in models), Phase.LOGPROBS)
    yield Item("activations", max(model.update(stage) for model in models), Phase.UPDATE)
