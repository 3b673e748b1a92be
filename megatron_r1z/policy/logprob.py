"""Log-probs of chosen tokens straight from hidden states, over a vocabulary that is split over tensor-parallel ranks.

The [tokens, vocabulary] matrix never exists as a whole: rows go through the head in chunks, and the backward pass computes each chunk
again. Softmax in float32 whatever the weights' type (recipe: OAT takes float32 log-softmax of logits over temperature).

Shapes: R response tokens, H hidden, V this rank's slice of the padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ROWS = 1024
"""Rows that go through the head at once: 1024 x 152k float32 logits are 0.6 GB."""


def vocab_parallel_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution at `temperature`, nats, float32 [R].

    `vocab_start` is the first token id of this rank's slice, `vocab_size` the unpadded total: padding columns get probability 0.
    `group` is None when the vocabulary is not split. The gradient of `hidden_RH` is this rank's part: the caller sums it over `group`.
    The entropy carries no gradient.
    """
    head = _Head(1.0 / temperature, vocab_start, min(max(vocab_size - vocab_start, 0), weight_VH.shape[0]), group, chunk_rows)
    logprobs, entropy = _ChunkedLogProbs.apply(hidden_RH, weight_VH, targets_R, head)  # type: ignore[no-untyped-call]
    return logprobs, entropy


class _Head:
    """Constants of one call."""

    def __init__(self, scale: float, vocab_start: int, columns: int, group: dist.ProcessGroup | None, chunk_rows: int) -> None:
        self.scale = scale
        self.vocab_start = vocab_start
        self.columns = columns
        """Columns of this rank that are real tokens."""
        self.group = group
        self.chunk_rows = chunk_rows

    def logits(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Float32 logits at the temperature; padding columns at -inf."""
        logits_RV = torch.matmul(hidden_RH, weight_VH.t()).float().mul_(self.scale)
        logits_RV[:, self.columns :] = -torch.inf
        return logits_RV

    def local_targets(self, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target on this rank (0 where it is elsewhere) and whether it is here."""
        column_R = targets_R - self.vocab_start
        here_R = (column_R >= 0) & (column_R < self.columns)
        return column_R.where(here_R, torch.zeros_like(column_R)), here_R

    def reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, op=operation, group=self.group)
        return tensor


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
        parts = [
            _forward_chunk(hidden, weight_VH, targets, head)
            for hidden, targets in zip(torch.split(hidden_RH, head.chunk_rows), torch.split(targets_R, head.chunk_rows), strict=True)
        ]
        logprobs_R, entropy_R, normaliser_R = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_RH, weight_VH, targets_R, normaliser_R)
        ctx.head = head
        ctx.mark_non_differentiable(entropy_R)
        return logprobs_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_RH, weight_VH, targets_R, normaliser_R = ctx.saved_tensors
        head: _Head = ctx.head
        grad_hidden_RH = torch.empty_like(hidden_RH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for start in range(0, hidden_RH.shape[0], head.chunk_rows):
            rows = slice(start, start + head.chunk_rows)
            probabilities_RV = head.logits(hidden_RH[rows], weight_VH).sub_(normaliser_R[rows, None]).exp_()
            grad_R = gradients[0][rows]
            grad_RV = probabilities_RV.mul_(-grad_R[:, None])
            column_R, here_R = head.local_targets(targets_R[rows])
            grad_RV.scatter_add_(1, column_R[:, None], (grad_R * here_R)[:, None])
            grad_logits_RV = grad_RV.mul_(head.scale).to(weight_VH.dtype)
            torch.matmul(grad_logits_RV, weight_VH, out=grad_hidden_RH[rows])
            grad_weight_VH += torch.matmul(grad_logits_RV.t(), hidden_RH[rows])
        return grad_hidden_RH, grad_weight_VH.to(weight_VH.dtype), None, None


def _forward_chunk(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, head: _Head) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and log of the sum of exponentials of one chunk."""
    logits_RV = head.logits(hidden_RH, weight_VH)
    maximum_R = head.reduce(logits_RV.amax(dim=1), dist.ReduceOp.MAX)
    column_R, here_R = head.local_targets(targets_R)
    target_R = logits_RV.gather(1, column_R[:, None]).squeeze(1).where(here_R, torch.zeros_like(maximum_R))
    logits_RV[:, head.columns :] = 0.0
    shifted_RV = logits_RV - maximum_R[:, None]
    exponentials_RV = shifted_RV.exp()
    exponentials_RV[:, head.columns :] = 0.0
    sums_3R = torch.stack([exponentials_RV.sum(dim=1), exponentials_RV.mul_(shifted_RV).sum(dim=1), target_R])
    total_R, weighted_R, target_R = head.reduce(sums_3R, dist.ReduceOp.SUM)
    log_total_R = total_R.log()
    return target_R - maximum_R - log_total_R, log_total_R - weighted_R / total_R, maximum_R + log_total_R
