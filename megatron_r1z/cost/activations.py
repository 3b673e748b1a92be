"""Memory of activations: what autograd keeps of one micro-batch, and what a backward pass needs on top of that.

The accounting of Korthikanti et al. (arXiv 2205.05198, section 4), for what this policy keeps: no attention scores (the kernels recompute
them), no dropout, no [tokens, vocabulary] matrix (`policy/logprob.py`), a gated feed-forward layer that may be fused with its activation
(megatron-core 0.16.1 `MLP.forward`, `glu` and `bias_swiglu_impl`). The local layers, which a CPU has, keep more than Transformer Engine's:
norms in float32, a copy of the attention's output, sines and cosines for each layer. `tests/loop/test_cost.py` holds the local ones against
autograd.

Per token of a micro-batch, h hidden, q and k width of all queries and of all keys, f feed-forward, d head size, s bytes of an activation;
everything inside a tensor-parallel region is divided by t, the rest by t only under sequence parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_r1z.config import Recompute
from megatron_r1z.cost.formats import FP32_BYTES, NumberFormat
from megatron_r1z.layout import tiles
from megatron_r1z.layout.blocks import Spec
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.tiles import tile_shape
from megatron_r1z.layout.topology import Topology

TILE_BYTES = {"local": tiles.TILE_BYTES["cpu"], "te": tiles.TILE_BYTES["cuda"]}
"""Of the device that each spec is for."""


@dataclass(frozen=True)
class TokenBytes:
    """What autograd keeps of one token in one layer, bytes on one rank."""

    attention: float
    """Up to the residual sum after attention, norms of both halves and the input of the feed-forward layer included."""
    feed_forward: float
    """Inside the feed-forward layer."""
    layer_input: float

    @property
    def whole(self) -> float:
        """Of a layer that recomputes nothing."""
        return self.attention + self.feed_forward

    def kept(self, recompute: Recompute) -> float:
        """Of a layer between its forward and its backward pass."""
        return {"none": self.whole, "selective": self.attention, "full": self.layer_input}[recompute]

    def recomputed(self, recompute: Recompute) -> float:
        """What comes back for the one layer whose backward pass is running."""
        return {"none": 0.0, "selective": self.feed_forward, "full": self.whole}[recompute]


def token_bytes(
    shape: ModelShape, tp: int, *, sequence_parallel: bool, form: NumberFormat, spec: Spec, is_fused: bool = False
) -> TokenBytes:
    """Of one layer on one of `tp` ranks; `is_fused`: its gated activation is one kernel, which keeps what it was given."""
    itemsize, operand = form.itemsize, form.operand_bytes
    hidden = shape.hidden_size / (tp if sequence_parallel else 1)
    queries, keys = shape.num_heads * shape.head_dim / tp, shape.num_kv_heads * shape.head_dim / tp
    norm = _norm_bytes(hidden, itemsize, spec) + FP32_BYTES * hidden / shape.hidden_size  # its input, and one root per token
    normed = hidden * operand  # the input of qkv, and that of the feed-forward layer
    # Values are a view of the fused projection, which stays as a whole; Transformer Engine wants them by themselves and copies them.
    values = ((queries + 2 * keys) if spec == "local" else keys) * itemsize
    rotated = (queries + keys) * itemsize
    output = queries * itemsize + FP32_BYTES * shape.num_heads / tp  # of attention, with the logarithm of each sum
    if form.is_fp8:
        output += queries * operand  # attention keeps its output, and the projection its own copy
    if spec == "local":
        output += queries * itemsize + 4 * shape.head_dim * itemsize  # joined from its sequences; sine and cosine for queries and for keys
    if shape.qk_norm:
        heads = (shape.num_heads + shape.num_kv_heads) / tp
        output += FP32_BYTES * heads + _norm_bytes(queries + keys, itemsize, spec)
    # gate and up in one and, unless fused, activated gate and up plus its offset of 0; and the product, the input of the last matrix
    feed_forward = shape.ffn_size / tp * ((2 if is_fused else 4) * itemsize + operand)
    attention = 2 * norm + normed + values + rotated + output
    if spec == "local":
        return TokenBytes(attention + normed, feed_forward, hidden * itemsize)
    root = FP32_BYTES * hidden / shape.hidden_size  # the norm is a part of the first matrix, so of the feed-forward layer
    return TokenBytes(attention - root, feed_forward + normed + root, hidden * itemsize)


def _norm_bytes(width: float, itemsize: int, spec: Spec) -> float:
    """The input of a norm; torch's composite of the local spec keeps it and its normalised value in float32."""
    return width * (2 * FP32_BYTES if spec == "local" else itemsize)


def backward_bytes(shape: ModelShape, tp: int, *, sequence_parallel: bool, itemsize: int) -> float:
    """Gradients per token at the fullest moment of a layer's backward pass: two of the feed-forward width and two of the hidden."""
    return 2 * itemsize * (shape.ffn_size / tp + shape.hidden_size / (tp if sequence_parallel else 1))


class BatchSize(NamedTuple):
    """The largest micro-batch of a rank."""

    tokens: int
    responses: int
    """Response tokens among them."""
    micro_batches: int
    """Of one optimizer step on one data-parallel rank."""


class HeadBytes(NamedTuple):
    """The log-probs of the last stage, bytes on one rank, besides the layers."""

    kept: int
    """By autograd, between forward and backward pass."""
    forward: int
    """In a forward pass, besides that."""
    backward: int
    """In its backward pass, besides that."""


def head_bytes(shape: ModelShape, columns: int, batch: BatchSize, *, hidden: float, itemsize: int, spec: Spec) -> HeadBytes:
    """Of the response tokens of a micro-batch against `columns` of the vocabulary (`policy/logprob.py`).

    `hidden` is the width of the final norm on this rank. The fullest moment is one of two: a tile of logits is made while the one before is
    there, or a product of the backward pass is added to a sum. Where the weights are narrower than the softmax, such a product is a matrix
    by itself, and a CPU has both operands of every product in float32.
    """
    tile_rows, tile_columns = tile_shape(batch.responses, TILE_BYTES[spec] // FP32_BYTES)
    tile_columns = min(tile_columns, columns)
    tile, is_narrow = tile_rows * tile_columns, itemsize < FP32_BYTES
    before = min(tile, batch.responses * columns - tile)
    rows_and_columns = (tile_rows + tile_columns) * shape.hidden_size * FP32_BYTES
    copies = rows_and_columns if is_narrow and spec == "local" else 0
    forward = (tile + before) * FP32_BYTES + copies
    adding = tile * (FP32_BYTES + itemsize) + max(tile_rows, tile_columns) * shape.hidden_size * FP32_BYTES
    if spec == "local":
        adding = tile * (2 * FP32_BYTES + itemsize) + rows_and_columns
    gradients = columns * shape.hidden_size * itemsize + batch.responses * shape.hidden_size * FP32_BYTES
    gradients += is_narrow * tile_columns * shape.hidden_size * FP32_BYTES
    passing = max(forward + before * itemsize, adding) if is_narrow else forward
    norm = final_norm_bytes(batch, hidden, itemsize, spec)
    return HeadBytes(norm + batch.responses * shape.hidden_size * itemsize, forward, passing + gradients)


def final_norm_bytes(batch: BatchSize, hidden: float, itemsize: int, spec: Spec) -> int:
    """What autograd keeps of the norm before a head: its input, `hidden` wide on this rank, and one root per token."""
    return round(batch.tokens * (_norm_bytes(hidden, itemsize, spec) + FP32_BYTES))


def chunks_in_flight(topology: Topology, stage: int, micro_batches: int) -> list[int]:
    """For each model chunk of a stage, the micro-batches that wait for their backward pass at the fullest moment.

    Of the 1F1B schedule a stage has run one micro-batch for itself and one for each stage after it; interleaved, twice as many and all of
    its other chunks besides (megatron-core `schedules.get_pp_rank_microbatches`, group size pp).
    """
    later = topology.pp - 1 - stage
    if topology.vpp == 1:
        return [min(later + 1, micro_batches)]
    passes = min(2 * later + (topology.vpp - 1) * topology.pp + 1, micro_batches * topology.vpp)
    waiting = [0] * topology.vpp
    for index in range(passes):
        waiting[index // topology.pp % topology.vpp] += 1
    return waiting
