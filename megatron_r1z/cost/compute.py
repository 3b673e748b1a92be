"""Arithmetic of one pass, in floating-point operations (a multiplication and an addition are two).

Matrix products only: the rest of a layer is in the share of the peak that is assumed to be reached. Attention is causal, so a token meets
half of its sequence on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_r1z.config import Recompute
from megatron_r1z.cost.cluster import Gpu
from megatron_r1z.cost.formats import NumberFormat
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.layout.families import ModelShape


class Work(NamedTuple):
    """Operations, by what bounds them."""

    matrices: float
    """Products with the layers' matrices."""
    others: float
    """Attention, and the output layer."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.matrices + self.others

    def times(self, count: float) -> Work:
        """So many of these."""
        return Work(self.matrices * count, self.others * count)

    def plus(self, other: Work) -> Work:
        """Both."""
        return Work(self.matrices + other.matrices, self.others + other.others)

    def seconds(self, form: NumberFormat, gpu: Gpu, share: float) -> float:
        """On one device that reaches a share of its peaks."""
        return (self.matrices / form.matrix_tflops(gpu) + self.others / form.tflops(gpu)) / (share * 1e12)


@dataclass(frozen=True)
class SampleFlops:
    """Forward pass of one sample of mean length, for the whole model."""

    projections: float
    """Of attention, one layer."""
    attention: float
    """Scores and values, one layer."""
    feed_forward: float
    """One layer."""
    response_head: float
    """Output layer, response tokens only."""

    @property
    def layer(self) -> Work:
        """One layer, forward."""
        return Work(self.projections + self.feed_forward, self.attention)

    @property
    def head(self) -> Work:
        """Output layer, forward."""
        return Work(0.0, self.response_head)

    def model(self, num_layers: int) -> float:
        """The model's own operations, forward and backward, with nothing computed twice: what an MFU counts."""
        return 3 * (num_layers * self.layer.total + self.head.total)

    def trained_layer(self, recompute: Recompute) -> Work:
        """One layer forward and backward (twice as much as forward), with what is computed again."""
        again = {"none": Work(0.0, 0.0), "selective": Work(self.feed_forward, 0.0), "full": self.layer}[recompute]
        return self.layer.times(3).plus(again)

    @property
    def trained_head(self) -> Work:
        """Forward and backward; the backward pass computes each tile of logits again (`policy/logprob.py`)."""
        return self.head.times(4)


def sample_flops(shape: ModelShape, lengths: Lengths) -> SampleFlops:
    """Of one sample of mean length."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return SampleFlops(
        projections=2 * lengths.total * shape.hidden_size * (2 * queries + 2 * keys),
        attention=2 * 2 * lengths.mean_square / 2 * queries,
        feed_forward=2 * lengths.total * 3 * shape.hidden_size * shape.ffn_size,
        response_head=2 * lengths.response * shape.hidden_size * shape.vocab_size,
    )


def decode_flops(shape: ModelShape, context: float) -> Work:
    """Of one token of one sequence that has `context` tokens so far, for the whole model."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    matrices = 2 * shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.ffn_size)
    others = shape.num_layers * 4 * context * queries + 2 * shape.hidden_size * shape.vocab_size
    return Work(shape.num_layers * matrices, others)
