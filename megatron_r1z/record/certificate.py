"""The proof, before the first update of a process, that engine and policy hold the same weights: equal log-probs of the same tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1z.config import TrainConfig
from megatron_r1z.errors import RefitError
from megatron_r1z.host.float32 import may_round_float32
from megatron_r1z.packing import MicroBatch
from megatron_r1z.policy.policy import MegatronPolicy
from megatron_r1z.record.result_files import to_json

LIMIT_NATS = 1e-4
"""Of the largest difference: float32 weights on both sides that differ by more cannot be the same model (measured on CPU: below 1e-5)."""
LIMIT_NATS_TF32 = 5e-2
"""The same where products round their operands to 10 bits of mantissa, three more than bf16 has: in bf16 equal weights differ by 0.02 nats
in the mean (docs/gpu.md), other weights by whole nats."""
MEAN_LIMIT_NATS = {"bf16": 0.2, "fp8": 0.5}
"""Of the mean difference at temperature 1, by the coarser format of the two sides. Rounding gives 0.017 in bf16 (SmolLM2-135M at
temperature 0.7) and up to 0.125 where FP8 meets another format (docs/metrics.md, docs/fp8.md); a wrong rotary embedding, 1.9."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Absolute difference of engine and policy log-probs over response tokens, at the sampling temperature."""

    max_nats: float
    mean_nats: float
    num_tokens: int
    engine: str
    """Number format of the engine."""
    policy: str
    """Number format of the policy."""
    temperature: float
    top_p: float
    top_k: int
    """Under top-p or top-k the engine's log-probs are of a cut distribution, which the policy's are not."""
    has_digests: bool
    """The refit has compared both sides' weights, so that a difference is none of weights."""
    is_tf32: bool = False
    """True where float32 products may be rounded to TF32 (`float32.py`)."""

    @property
    def is_whole_distribution(self) -> bool:
        """Whether both sides' log-probs are of the same distribution."""
        return self.top_p == 1.0 and self.top_k == -1

    @property
    def limit_nats(self) -> float:
        """The largest difference that equal float32 weights can show."""
        return LIMIT_NATS_TF32 if self.is_tf32 else LIMIT_NATS

    @property
    def mean_limit_nats(self) -> float | None:
        """What the mean may be; None under top-k, which leaves a share of the distribution that is not known.

        Top-p leaves a share of at least p, so it adds at most -log p to the log-prob of a token. Dividing logits by a temperature below 1
        enlarges what rounding does to them.
        """
        if self.top_k != -1:
            return None
        coarser = next((MEAN_LIMIT_NATS[name] for name in ("fp8", "bf16") if name in (self.engine, self.policy)), self.limit_nats)
        return coarser / min(self.temperature, 1.0) - math.log(self.top_p)

    def sentence(self) -> str:
        """One line for the person who watches."""
        formats = f"engine {self.engine}, policy {self.policy}, {self.num_tokens} tokens"
        figures = f"max difference {self.max_nats:.1e}, mean {self.mean_nats:.1e} nats"
        if self.is_whole_distribution:
            return f"engine and policy log-probs at equal weights ({formats}): {figures}"
        cuts = [f"rollout.top_p {self.top_p:g}"] * (self.top_p != 1.0) + [f"rollout.top_k {self.top_k}"] * (self.top_k != -1)
        return (
            f"engine log-probs of what {' and '.join(cuts)} leave of the distribution, policy log-probs of the whole ({formats}): "
            f"{figures}; the cut alone makes them differ"
        )

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        tree = dataclasses.asdict(self) | {"is_whole_distribution": self.is_whole_distribution}
        path.write_text(to_json(tree) + "\n")

    def check(self) -> None:
        """Refuse what rounding cannot show, in any format.

        Raises:
            RefitError: with the difference, the limit and the likely causes.
        """
        if not math.isfinite(self.mean_nats):
            raise RefitError(
                f"log-probs of engine or policy are not finite (difference {self.mean_nats}); the weights hold NaN or infinity, or "
                f"numbers are too large for {self.engine} and {self.policy}: look at the model folder or the checkpoint that was loaded."
            )
        is_exact = self.engine == self.policy == "fp32" and self.is_whole_distribution
        if is_exact and self.max_nats > self.limit_nats:
            raise self._refusal(f"{self.max_nats:.2e} nats", f"in float32 (limit {self.limit_nats:g})")
        limit = self.mean_limit_nats
        if limit is not None and self.mean_nats > limit:
            raise self._refusal(f"{self.mean_nats:.2e} nats in the mean", f"in {self.engine} and {self.policy} (limit {limit:.2g})")

    def _refusal(self, difference: str, formats: str) -> RefitError:
        known = "hold the same weights (the refit's digests agree) but" if self.has_digests else "should hold the same weights but"
        return RefitError(
            f"engine and policy disagree by {difference} on the same tokens {formats}: they {known} compute different models, so nothing "
            "that is sampled can be trained on; look for a key of config.json that one side ignores (rotary embedding, scales, biases), "
            "a model.checkpoint of another model than model.path, or another version of vLLM or Megatron than setup.py pins."
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
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        has_digests=config.rollout.refit == "planned",
        is_tf32=may_round_float32(),
    )
