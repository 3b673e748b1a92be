"""The proof, before the first update of a process, that engine and policy hold the same weights: equal log-probs of the same tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1z.config import TrainConfig
from megatron_r1z.errors import RefitError
from megatron_r1z.float32 import may_round_float32
from megatron_r1z.packing import MicroBatch
from megatron_r1z.policy.policy import MegatronPolicy

LIMIT_NATS = 1e-4
"""Above this, float32 weights on both sides cannot be the same weights (measured on CPU: below 1e-5)."""
LIMIT_NATS_TF32 = 5e-2
"""The same where products round their operands to 10 bits of mantissa, three more than bf16 has: in bf16 equal weights differ by 0.02 nats
in the mean (docs/gpu.md), other weights by whole nats."""


@dataclass(frozen=True)
class Certificate:
    """Absolute difference of engine and policy log-probs over response tokens, at the sampling temperature."""

    max_nats: float
    mean_nats: float
    num_tokens: int
    engine: str
    """Number format of the engine."""
    policy: str
    """Number format of the policy."""
    is_whole_distribution: bool
    """False under top-p or top-k: the engine's log-probs are then of a cut distribution, which the policy's are not."""
    is_tf32: bool = False
    """True where float32 products may be rounded to TF32 (`float32.py`)."""

    @property
    def limit_nats(self) -> float:
        """The largest difference that equal float32 weights can show."""
        return LIMIT_NATS_TF32 if self.is_tf32 else LIMIT_NATS

    def sentence(self) -> str:
        """One line for the person who watches."""
        formats = f"engine {self.engine}, policy {self.policy}, {self.num_tokens} tokens"
        return (
            f"engine and policy log-probs at equal weights ({formats}): max difference {self.max_nats:.1e}, mean {self.mean_nats:.1e} nats"
        )

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    def check(self) -> None:
        """Refuse what equal float32 weights cannot show.

        Raises:
            RefitError: with the difference and the limit.
        """
        if self.engine == self.policy == "fp32" and self.is_whole_distribution and not self.max_nats <= self.limit_nats:
            raise RefitError(
                f"engine and policy disagree by {self.max_nats:.2e} nats on the same tokens in float32 (limit {self.limit_nats:g}); "
                "the engine does not hold the policy's weights, so nothing it samples can be trained on."
            )


def make_certificate(policy: MegatronPolicy, micro_batches: Sequence[MicroBatch], config: TrainConfig) -> Certificate:
    """Compare over all ranks; each brings its own micro-batches, and all get the same certificate."""
    pairs = zip(policy.response_logprobs(micro_batches), micro_batches, strict=True)
    differences = [(mine - batch.engine_logprobs_R).abs() for mine, batch in pairs if mine is not None]
    difference = torch.cat([torch.zeros(0), *differences]).double()
    largest = difference.max() if difference.numel() else torch.zeros((), dtype=torch.float64)
    # Tensor-parallel ranks bring the same tokens: each copy counts as a share of one.
    sums = torch.stack([difference.sum(), torch.tensor(float(difference.numel()), dtype=torch.float64)]) / policy.topology.tp
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(sums)
    total, count = sums.tolist()
    return Certificate(
        max_nats=largest.item(),
        mean_nats=total / max(count, 1.0),
        num_tokens=round(count),
        engine=config.precision.engine,
        policy=config.precision.policy,
        is_whole_distribution=config.rollout.top_p == 1.0 and config.rollout.top_k == -1,
        is_tf32=may_round_float32(),
    )
