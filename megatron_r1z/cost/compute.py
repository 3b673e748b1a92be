"""Arithmetic of one pass, in floating-point operations (a multiplication and an addition are two).

Matrix products only: the rest of a layer is in the share of the peak that is assumed to be reached. Attention is causal, so a token meets
half of its sequence on average.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1z.config import Recompute
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.layout.families import ModelShape


@dataclass(frozen=True)
class SampleFlops:
    """Forward pass of one sample of mean length, for the whole model."""

    attention: float
    """Projections and attention itself, one layer."""
    feed_forward: float
    """One layer."""
    head: float
    """Output layer, response tokens only."""

    @property
    def layer(self) -> float:
        """One layer."""
        return self.attention + self.feed_forward

    def model(self, num_layers: int) -> float:
        """The model's own operations, forward and backward, with nothing computed twice: what an MFU counts."""
        return 3 * (num_layers * self.layer + self.head)

    def trained_layer(self, recompute: Recompute) -> float:
        """One layer forward and backward (twice as much as forward), with what is computed again."""
        again = {"none": 0.0, "selective": self.feed_forward, "full": self.layer}[recompute]
        return 3 * self.layer + again

    @property
    def trained_head(self) -> float:
        """Forward and backward; the backward pass computes each tile of logits again (`policy/logprob.py`)."""
        return 4 * self.head


def sample_flops(shape: ModelShape, lengths: Lengths) -> SampleFlops:
    """Of one sample of mean length."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    projections = 2 * lengths.total * shape.hidden_size * (2 * queries + 2 * keys)
    pairs = lengths.mean_square / 2
    scores_and_values = 2 * 2 * pairs * queries
    feed_forward = 2 * lengths.total * 3 * shape.hidden_size * shape.ffn_size
    head = 2 * lengths.response * shape.hidden_size * shape.vocab_size
    return SampleFlops(projections + scores_and_values, feed_forward, head)


def decode_flops(shape: ModelShape, context: float) -> float:
    """Of one token of one sequence that has `context` tokens so far, for the whole model."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = 2 * shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.ffn_size) + 4 * context * queries
    return shape.num_layers * layer + 2 * shape.hidden_size * shape.vocab_size
