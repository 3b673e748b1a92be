"""Log-probs of chosen tokens straight from hidden states, over a vocabulary that is split over tensor-parallel ranks.

No [tokens, vocabulary] matrix exists, in neither pass: the head works on tiles of some rows and some columns of it, of a size in bytes
that does not depend on the number of tokens, and the backward pass computes each tile again. Softmax in float32 whatever the weights'
type, float64 for float64 (recipe: OAT takes float32 log-softmax of logits over temperature).

A matrix product has operands in the weights' type and is summed and given in the softmax's: logits of bf16 weights are never rounded to
bf16. What is: the derivative by the logits, which is an operand of the two products of the backward pass, and the gradients as a whole,
once, when they leave. No operand is copied in float32 on a GPU, on a CPU one tile of it is.

A tile is in units of log2: logits times log2(e) / temperature, so that every exponential is an exp2. A GPU has it in hardware, and on
the CPU that was measured it takes 0.1 to 0.5 ns an element, where exp takes 0.6, and 7 to 18 below -87. The forward pass merges tiles as
flash attention does (arXiv 2205.14135, section 3.1), with one more sum for the entropy.

Shapes: R response tokens, H hidden, V this rank's slice of the padded vocabulary; r rows and C columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.layout.tiles import TILE_BYTES, tile_shape

LOG2_E = math.log2(math.e)


def vocab_parallel_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    temperature: float | Tensor,
    vocab_size: int,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    tile_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution at `temperature`, nats, float32 [R] (float64 from float64 weights).

    `temperature` is one for all or float32 [R]. `vocab_start` is the first token id of this rank's slice, `vocab_size` the unpadded total:
    padding columns get probability 0. `group` is None when the vocabulary is not split. The gradient of `hidden_RH` is this rank's part:
    the caller sums it over `group`. Both results carry a gradient; that of the entropy costs nothing where the entropy is in no loss, which
    the caller says by detaching it.
    """
    precision = torch.promote_types(weight_VH.dtype, torch.float32)
    temperature_R = torch.as_tensor(temperature, dtype=precision, device=hidden_RH.device).expand(hidden_RH.shape[0])
    head = _Head(
        inverse_R=temperature_R.reciprocal(),
        first=vocab_start,
        columns=min(max(vocab_size - vocab_start, 0), weight_VH.shape[0]),
        group=group,
        precision=precision,
        tile=tile_shape(hidden_RH.shape[0], (tile_bytes or TILE_BYTES[hidden_RH.device.type]) // precision.itemsize),
    )
    logprobs, entropy = _TiledLogProbs.apply(hidden_RH, weight_VH, targets_R, head)  # type: ignore[no-untyped-call]
    return logprobs, entropy


@dataclass(frozen=True)
class _Head:
    """Constants of one call."""

    inverse_R: Tensor
    """1 / temperature."""
    first: int
    """Token id of column 0."""
    columns: int
    """Columns of this rank that are real tokens."""
    group: dist.ProcessGroup | None
    precision: torch.dtype
    """Of the softmax and of sums over tiles."""
    tile: tuple[int, int]

    def row_slices(self) -> Iterator[slice]:
        """At least one, which may be empty."""
        return _slices(self.inverse_R.shape[0], self.tile[0]) if self.inverse_R.numel() else iter([slice(0, 0)])

    def column_slices(self) -> Iterator[slice]:
        """None on a rank that has nothing but padding."""
        return _slices(self.columns, self.tile[1])

    def logits(self, hidden_rH: Tensor, weight_CH: Tensor, rows: slice) -> Tensor:
        """[r, C] over the temperature, in units of log2."""
        products_rC = _product(hidden_rH, weight_CH.t(), self.precision)
        return products_rC.mul_((self.inverse_R[rows] * LOG2_E)[:, None])

    def places(self, targets_r: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Column of each target in a tile, [r, 1] (any where it is elsewhere), and whether it is there."""
        place_r1 = targets_r[:, None] - self.first - columns.start
        width = columns.stop - columns.start
        return place_r1.clamp(0, width - 1), (place_r1 >= 0) & (place_r1 < width)

    def reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, op=operation, group=self.group)
        return tensor


@dataclass(frozen=True)
class _Sums:
    """What is known of rows after some of their columns, logits x in units of log2. Before the first column the maximum is very low."""

    maximum_r: Tensor
    """Of x."""
    total_r: Tensor
    """Sum of 2^(x - maximum)."""
    weighted_r: Tensor
    """Sum of 2^(x - maximum) * (x - maximum)."""
    target_r: Tensor
    """x of the target; 0 if it was not among the columns."""

    @classmethod
    def empty(cls, like_r: Tensor) -> _Sums:
        zeros_r = torch.zeros_like(like_r)
        return cls(torch.full_like(like_r, torch.finfo(like_r.dtype).min), zeros_r, zeros_r, zeros_r)

    def relative_to(self, maximum_r: Tensor) -> _Sums:
        """The same relative to a maximum that is not lower."""
        shift_r = self.maximum_r - maximum_r
        factor_r = shift_r.exp2()
        return _Sums(maximum_r, self.total_r * factor_r, (self.weighted_r + shift_r * self.total_r) * factor_r, self.target_r)

    def with_tile(self, logits_rC: Tensor, place_r1: Tensor, here_r1: Tensor) -> _Sums:
        """After one more tile, which is overwritten."""
        target_r = logits_rC.gather(1, place_r1).mul_(here_r1).squeeze(1)
        before = self.relative_to(torch.maximum(self.maximum_r, logits_rC.amax(dim=1)))
        shifted_rC = logits_rC.sub_(before.maximum_r[:, None])
        powers_rC = shifted_rC.exp2()
        total_r = before.total_r + powers_rC.sum(dim=1)
        weighted_r = before.weighted_r + powers_rC.mul_(shifted_rC).sum(dim=1)
        return _Sums(before.maximum_r, total_r, weighted_r, self.target_r + target_r)

    def reduced(self, head: _Head) -> _Sums:
        """Over the columns of all ranks."""
        maximum_r = head.reduce(self.maximum_r.clone(), dist.ReduceOp.MAX)
        mine = self.relative_to(maximum_r)
        return _Sums(maximum_r, *head.reduce(torch.stack([mine.total_r, mine.weighted_r, mine.target_r]), dist.ReduceOp.SUM))


class _TiledLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
        parts = [_sums_of_rows(hidden_RH, weight_VH, targets_R, rows, head) for rows in head.row_slices()]
        sums = _Sums(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(_Sums))).reduced(head)
        log_total_R = sums.total_r.log2()
        logprobs_R = (sums.target_r - sums.maximum_r - log_total_R) / LOG2_E
        entropy_R = (log_total_R - sums.weighted_r / sums.total_r) / LOG2_E
        ctx.save_for_backward(hidden_RH, weight_VH, targets_R, sums.maximum_r + log_total_R, entropy_R)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return logprobs_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        hidden_RH, weight_VH, targets_R, normaliser_R, entropy_R = ctx.saved_tensors
        head: _Head = ctx.head
        slopes = _Slopes.of(gradients[0], gradients[1], entropy_R, head)
        grad_hidden_RH = torch.zeros_like(hidden_RH, dtype=head.precision)
        grad_weight_VH = torch.zeros_like(weight_VH)
        for columns in head.column_slices():
            weight_CH = weight_VH[columns]
            grad_weight_CH = grad_weight_VH[columns].to(head.precision)
            for rows in head.row_slices():
                logits_rC = head.logits(hidden_RH[rows], weight_CH, rows)
                grad_rC = slopes.of_logits(logits_rC, normaliser_R[rows], rows, *head.places(targets_R[rows], columns))
                grad_rC = grad_rC.to(weight_VH.dtype)
                _add_product(grad_hidden_RH[rows], grad_rC, weight_CH)
                _add_product(grad_weight_CH, grad_rC.t(), hidden_RH[rows])
            if head.precision != weight_VH.dtype:
                grad_weight_VH[columns] = grad_weight_CH
        return grad_hidden_RH.to(hidden_RH.dtype), grad_weight_VH, None, None


@dataclass(frozen=True)
class _Slopes:
    """Derivative of the loss by what the forward pass gave, over the temperature; what was given as None is in no loss."""

    logprob_R: Tensor
    entropy_R: Tensor | None
    """By the entropy."""
    offset_R: Tensor
    """Of the softmax column, whatever the logit: -logprob - entropy slope * entropy."""

    @classmethod
    def of(cls, by_logprob_R: Tensor | None, by_entropy_R: Tensor | None, entropy_R: Tensor, head: _Head) -> _Slopes:
        logprob_R = torch.zeros_like(head.inverse_R) if by_logprob_R is None else by_logprob_R * head.inverse_R
        if by_entropy_R is None:
            return cls(logprob_R, None, -logprob_R)
        slope_R = by_entropy_R * head.inverse_R
        return cls(logprob_R, slope_R, -logprob_R - slope_R * entropy_R)

    def of_logits(self, logits_rC: Tensor, normaliser_r: Tensor, rows: slice, place_r1: Tensor, here_r1: Tensor) -> Tensor:
        """By the logits of a tile, which are overwritten: onehot * logprob slope + softmax * (offset - entropy slope * log softmax).

        The entropy's derivative by a logit is -softmax * (log softmax + entropy).
        """
        log_softmax_rC = logits_rC.sub_(normaliser_r[:, None])
        if self.entropy_R is None:
            grad_rC = log_softmax_rC.exp2_().mul_(self.offset_R[rows, None])
        else:
            softmax_rC = log_softmax_rC.exp2()
            grad_rC = log_softmax_rC.mul_(-self.entropy_R[rows, None] / LOG2_E).add_(self.offset_R[rows, None]).mul_(softmax_rC)
        return grad_rC.scatter_add_(1, place_r1, self.logprob_R[rows, None] * here_r1)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _sums_of_rows(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, rows: slice, head: _Head) -> _Sums:
    """Over all columns of this rank."""
    sums = _Sums.empty(head.inverse_R[rows])
    for columns in head.column_slices():
        logits_rC = head.logits(hidden_RH[rows], weight_VH[columns], rows)
        sums = sums.with_tile(logits_rC, *head.places(targets_R[rows], columns))
    return sums


def _product(left_MK: Tensor, right_KN: Tensor, precision: torch.dtype) -> Tensor:
    """Matrix product of operands of one type, summed and given in `precision`: a CPU has no such product, so it copies the operands."""
    if left_MK.dtype == precision:
        return torch.mm(left_MK, right_KN)
    if left_MK.is_cuda:
        return torch.mm(left_MK, right_KN, out_dtype=precision)
    return torch.mm(left_MK.to(precision), right_KN.to(precision))


def _add_product(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """Add a matrix product; without a matrix more where the types are one.

    `torch.addmm` with float32 output would do without it too, but for a sum of one row it goes another way, through cuBLASLt, of which
    torch's source says that it has given wrong results (`Blas.cpp`, `use_bias_ptr_lt`).
    """
    if sum_MN.dtype == left_MK.dtype:
        sum_MN.addmm_(left_MK, right_KN)
    else:
        sum_MN.add_(_product(left_MK, right_KN, sum_MN.dtype))
