"""Megatron's pipeline schedule over the micro-batches of one step: log-probs without gradient, or loss and gradient.

The loss of a micro-batch is a sum; Megatron adds the sums and divides the gradients once by the summed denominators, which add up to
the D of `objective.py`. There is no other division.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_r1z.objective import TokenLosses
from megatron_r1z.packing import MicroBatch
from megatron_r1z.policy.parallel import device

Loss = Callable[[Tensor, Tensor, MicroBatch], TokenLosses]
"""Current log-probs, old log-probs and their micro-batch to the loss of each response token."""


@dataclass(frozen=True)
class Model:
    """What a forward pass needs."""

    chunks: list[DistributedDataParallel]
    vocab_size: int
    """Without padding."""
    temperature: float


@dataclass(frozen=True)
class Work:
    """A micro-batch on its device, with the old log-probs of its response tokens.

    None means that the step is the only one of its iteration: the policy that is stepped is the old policy, and the ratio is 1.
    """

    batch: MicroBatch
    old_logprobs_R: Tensor | None


def response_logprobs(model: Model, batches: Sequence[MicroBatch]) -> list[Tensor | None]:
    """Log-probs of the response tokens of each micro-batch, float32 [R], on the CPU. None on all but the last pipeline stage."""

    def collect(output_2R: Tensor, non_loss_data: bool = True) -> Tensor:
        return output_2R[0].detach().cpu()

    with torch.no_grad():
        outputs = _run_schedule(model, [Work(batch, None) for batch in batches], lambda _work: collect, forward_only=True)
    return list(outputs) if outputs else [None] * len(batches)


def forward_backward(model: Model, work: Sequence[Work], loss: Loss) -> StepSums:
    """Accumulate the gradient of one step; returns its figures, reduced over all ranks."""

    def bind(item: Work) -> Callable[[Tensor], tuple[Tensor, Tensor, StepSums]]:
        return functools.partial(_micro_batch_loss, loss, item)

    return _reduce(_run_schedule(model, work, bind, forward_only=False))


@dataclass(frozen=True)
class StepSums:
    """Sums and maxima over response tokens; float64 so that the order of micro-batches does not show."""

    loss: float = 0.0
    clipped: float = 0.0
    entropy: float = 0.0
    mismatch: float = 0.0
    tokens: float = 0.0
    ratio_max: float = 0.0
    mismatch_max: float = 0.0


MAXIMA = ("ratio_max", "mismatch_max")


def _micro_batch_loss(loss: Loss, work: Work, output_2R: Tensor) -> tuple[Tensor, Tensor, StepSums]:
    """Megatron's triple: the summed loss, this micro-batch's part of the denominator, and the figures."""
    logprobs, entropy = output_2R[0], output_2R[1].detach()
    old = logprobs.detach() if work.old_logprobs_R is None else work.old_logprobs_R
    terms = loss(logprobs, old, work.batch)
    total = terms.losses_R.sum()
    denominator = torch.tensor(work.batch.denominator, dtype=torch.int, device=total.device)
    return total, denominator, _sums(total, terms, entropy, (work.batch.engine_logprobs_R - old).abs())


def _sums(total: Tensor, terms: TokenLosses, entropy: Tensor, mismatch: Tensor) -> StepSums:
    if not entropy.numel():
        return StepSums()
    return StepSums(
        loss=total.detach().double().item(),
        clipped=terms.clipped_R.double().sum().item(),
        entropy=entropy.double().sum().item(),
        mismatch=mismatch.double().sum().item(),
        tokens=float(entropy.numel()),
        ratio_max=terms.ratio_R.max().item(),
        mismatch_max=mismatch.max().item(),
    )


def _reduce(parts: Sequence[StepSums]) -> StepSums:
    """Over micro-batches and ranks. Only the first tensor-parallel rank of the last stage counts: the others hold nothing or the same."""
    counted = parts if parallel_state.get_tensor_model_parallel_rank() == 0 else []
    names = [field.name for field in fields(StepSums)]
    added = [sum(getattr(part, name) for part in counted) for name in names if name not in MAXIMA]
    largest = [max((getattr(part, name) for part in counted), default=0.0) for name in MAXIMA]
    sums = torch.tensor(added, dtype=torch.float64, device=device())
    maxima = torch.tensor(largest, dtype=torch.float64, device=device())
    dist.all_reduce(sums)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return StepSums(*sums.tolist(), *maxima.tolist())


def _run_schedule(model: Model, work: Sequence[Work], bind: Callable[[Work], Any], *, forward_only: bool) -> list[Any]:
    """Run the schedule; returns what the loss functions gave for each micro-batch, nothing on all but the last stage."""

    def forward_step(items: Iterator[Work], chunk: DistributedDataParallel) -> tuple[Tensor, Any]:
        item = next(items)
        return chunk(item.batch, model.vocab_size, model.temperature), bind(item)

    on_device = [_to_device(item) for item in work]
    iterators = [iter(on_device) for _ in model.chunks]
    outputs: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
        num_microbatches=len(on_device),
        seq_length=max(item.batch.num_tokens for item in on_device),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return outputs


def _to_device(work: Work) -> Work:
    where = device()
    moved = {field.name: getattr(work.batch, field.name) for field in fields(MicroBatch)}
    moved = {name: value.to(where) if isinstance(value, Tensor) else value for name, value in moved.items()}
    old = work.old_logprobs_R
    return Work(replace(work.batch, **moved), None if old is None else old.to(where))
