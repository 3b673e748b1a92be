"""Megatron's pipeline schedule over the micro-batches of one step: log-probs without gradient, or loss and gradient.

The loss of a micro-batch is a sum; Megatron adds the sums and divides the gradients once by the summed denominators, which add up to
the D of `objective.py`. There is no other division.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_r1z.objective import Loss, PolicyTokens, TokenLosses, kl_terms
from megatron_r1z.packing import MicroBatch
from megatron_r1z.policy.fp8_state import scales_kept
from megatron_r1z.policy.parallel import device

Item = TypeVar("Item")


@dataclass(frozen=True)
class Model:
    """What a forward pass needs."""

    chunks: list[DistributedDataParallel]
    arguments: tuple[object, ...] = ()
    """Of the chunks' forward, besides the micro-batch."""


@dataclass(frozen=True)
class Work:
    """A micro-batch on its device, with the log-probs of its response tokens that are known before the step."""

    batch: MicroBatch
    old_logprobs_R: Tensor | None = None
    """None: the step is the only one of its iteration, so the policy that is stepped is the old policy, and the ratio is 1."""
    reference_logprobs_R: Tensor | None = None
    """None: the loss has no KL term."""


def response_logprobs(model: Model, batches: Sequence[MicroBatch]) -> list[Tensor | None]:
    """Log-probs of the response tokens of each micro-batch, float32 [R], on the CPU. None on all but the last pipeline stage."""
    return collect(model, batches, lambda output_2R: output_2R[0])


def collect(model: Model, batches: Sequence[MicroBatch], pick: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """A forward pass without gradient; returns what `pick` takes of each output, on the CPU. None on all but the last pipeline stage."""

    def bind(_work: Work) -> Callable[..., Tensor]:
        return lambda output, non_loss_data=True: pick(output).detach()

    with torch.no_grad(), scales_kept(model.chunks):
        outputs = run_schedule(model, [Work(batch) for batch in batches], bind, forward_only=True)
    return [output.cpu() for output in outputs] if outputs else [None] * len(batches)  # nothing waits for the device before the end


def forward_backward(model: Model, work: Sequence[Work], loss: Loss) -> StepFigures:
    """Accumulate the gradient of one step; returns its figures, reduced over all ranks."""

    def bind(item: Work) -> Callable[[Tensor], tuple[Tensor, Tensor, Tallies]]:
        return functools.partial(_micro_batch_loss, loss, item)

    return _reduce(run_schedule(model, work, bind, forward_only=False))


@dataclass(frozen=True)
class Sums:
    """Added up over response tokens, micro-batches and ranks."""

    loss: float
    tokens: float
    ratio: float
    clipped: float
    clipped_high: float
    """Tokens with a positive advantage whose ratio is above the range."""
    clipped_low: float
    """Tokens with a negative advantage whose ratio is below the range."""
    dual_clipped: float
    """Tokens with a negative advantage whose ratio is above the dual clip."""
    importance: float
    truncated: float
    """Tokens whose importance factor was cut at its cap."""
    entropy: float
    sampler_kl: float
    reference_kl: float
    mismatch: float


@dataclass(frozen=True)
class StepFigures:
    """The figures of one step, the same on every rank."""

    sums: Sums
    ratio_max: float
    mismatch_max: float
    mismatch_p999: float
    non_finite: tuple[str, ...]
    """Ids of the samples whose loss was not finite."""


@dataclass(frozen=True)
class Tallies:
    """What a micro-batch adds to the figures, left on its device so that nothing waits for it before the end of the step."""

    batch: MicroBatch
    sums: Tensor
    """The fields of `Sums`; float64 so that the order of micro-batches does not show."""
    losses_R: Tensor
    ratio_R: Tensor
    mismatch_R: Tensor


def _micro_batch_loss(loss: Loss, work: Work, output_2R: Tensor) -> tuple[Tensor, Tensor, Tallies]:
    """Megatron's triple: the summed loss, this micro-batch's part of the denominator, and the figures."""
    logprobs, entropy = output_2R
    old = logprobs.detach() if work.old_logprobs_R is None else work.old_logprobs_R
    terms = loss.terms(PolicyTokens(logprobs, entropy, old, work.reference_logprobs_R), work.batch)
    total = terms.losses_R.sum()
    denominator = torch.full((), work.batch.denominator, dtype=torch.int, device=total.device)  # a copy from the host would wait
    return total, denominator, _tally(work.batch, terms, entropy.detach(), logprobs.detach(), old)


def _tally(batch: MicroBatch, terms: TokenLosses, entropy_R: Tensor, logprobs_R: Tensor, old_logprobs_R: Tensor) -> Tallies:
    losses = terms.losses_R.detach()
    mismatch = (batch.engine_logprobs_R - old_logprobs_R).abs()
    by_name = {
        "loss": losses,
        "tokens": torch.ones_like(losses),
        "ratio": terms.ratio_R,
        "clipped": terms.clipped_R,
        "clipped_high": terms.clipped_R & (batch.advantages_R > 0),
        "clipped_low": terms.clipped_R & (batch.advantages_R < 0) & (terms.ratio_R < 1),
        "dual_clipped": terms.clipped_R & (batch.advantages_R < 0) & (terms.ratio_R > 1),
        "importance": terms.importance_R,
        "truncated": terms.truncated_R,
        "entropy": entropy_R,
        "sampler_kl": kl_terms(logprobs_R, batch.engine_logprobs_R),
        "reference_kl": terms.reference_kl_R,
        "mismatch": mismatch,
    }
    sums = torch.stack([by_name[field.name].double().sum() for field in fields(Sums)])
    return Tallies(batch, sums, losses, terms.ratio_R, mismatch)


def _reduce(parts: Sequence[Tallies]) -> StepFigures:
    """Over micro-batches and ranks."""
    counted = _counted(parts)
    sums = Sums(*sum_over_ranks([part.sums for part in parts], len(fields(Sums))))
    where = device()
    nothing = torch.zeros(0, device=where)
    ratio = torch.cat([nothing, *(part.ratio_R for part in counted)])
    mismatch = torch.cat([nothing, *(part.mismatch_R for part in counted)])
    tail = largest_values(mismatch, tail_size(round(sums.tokens)))
    return StepFigures(
        sums=sums,
        ratio_max=largest_values(ratio, 1)[0].item(),
        mismatch_max=tail[0].item(),
        mismatch_p999=tail[-1].item(),
        non_finite=() if math.isfinite(sums.loss) else non_finite_over_ranks([(part.batch, part.losses_R) for part in parts]),
    )


def sum_over_ranks(parts: Sequence[Tensor], count: int) -> list[float]:
    """The sums [count] of all micro-batches on all ranks, added up."""
    totals = torch.zeros(count, dtype=torch.float64, device=device())
    for part in _counted(parts):
        totals += part
    dist.all_reduce(totals)
    found: list[float] = totals.tolist()
    return found


def _counted(parts: Sequence[Item]) -> Sequence[Item]:
    """What a rank adds to figures. Only first tensor-parallel ranks of the last stage count: the others hold nothing or the same.

    Context-parallel ranks hold different tokens, as data-parallel ranks do.
    """
    return parts if parallel_state.get_tensor_model_parallel_rank() == 0 else []


def tail_size(num_tokens: int) -> int:
    """How many of the largest values it takes to see the 99.9th percentile of so many: it is the smallest of them.

    The percentile is the smallest value that at least 99.9 % of all values do not exceed; below 1000 values it is the largest.

    >>> tail_size(120), tail_size(1000), tail_size(1_000_000)
    (1, 2, 1001)
    """
    return num_tokens // 1000 + 1


def largest_values(values: Tensor, count: int) -> Tensor:
    """The `count` largest values of all ranks, largest first; a rank sends no more than that many. 0 stands in for values that lack."""
    mine = torch.zeros(count, device=values.device)
    found = values.topk(min(count, values.numel())).values
    mine[: found.numel()] = found
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone).topk(count).values


def non_finite_over_ranks(parts: Sequence[tuple[MicroBatch, Tensor]]) -> tuple[str, ...]:
    """Ids of the samples of which a token's loss [R] is not finite, each once; all ranks know that there is one, and call this."""
    mine = [sample_id for batch, losses_R in _counted(parts) for sample_id in non_finite_samples(batch, losses_R)]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return tuple(dict.fromkeys(sample_id for found in everyone for sample_id in found))


def non_finite_samples(batch: MicroBatch, losses_R: Tensor) -> list[str]:
    """Ids of the samples of which a token's loss is not finite."""
    return [batch.sample_ids[number] for number in sorted(set(batch.sequences_R[~losses_R.isfinite()].tolist()))]


def run_schedule(model: Model, work: Sequence[Work], bind: Callable[[Work], Any], *, forward_only: bool) -> list[Any]:
    """Run the schedule; returns what the loss functions gave for each micro-batch, nothing on all but the last stage."""

    def forward_step(items: Iterator[Work], chunk: DistributedDataParallel) -> tuple[Tensor, Any]:
        item = next(items)
        return chunk(item.batch, *model.arguments), bind(item)

    on_device = [_to_device(item) for item in work]
    iterators = [iter(on_device) for _ in model.chunks]
    outputs: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
        num_microbatches=len(on_device),
        seq_length=max(item.batch.num_tokens for item in on_device) * parallel_state.get_context_parallel_world_size(),  # divided again
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return outputs


def _to_device(work: Work) -> Work:
    moved = {field.name: getattr(work.batch, field.name) for field in fields(MicroBatch)}
    moved = {name: _moved(value) if isinstance(value, Tensor) else value for name, value in moved.items()}
    known = (None if item is None else _moved(item) for item in (work.old_logprobs_R, work.reference_logprobs_R))
    return Work(replace(work.batch, **moved), *known)


def _moved(tensor: Tensor) -> Tensor:
    """On this rank's device; from pinned memory, so that a GPU fetches it while the next one is prepared."""
    where = device()
    return tensor.pin_memory().to(where, non_blocking=True) if where.type == "cuda" and tensor.device.type == "cpu" else tensor.to(where)
