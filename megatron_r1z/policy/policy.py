"""`MegatronPolicy`: the model being trained, its optimizer and the steps it can take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from megatron_r1z.config import OptimizerConfig
from megatron_r1z.fp8.recipes import tokens_multiple
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.objective import Loss
from megatron_r1z.packing import GlobalBatch, MicroBatch, PackingRules, SampleCost
from megatron_r1z.policy import step
from megatron_r1z.policy.cpu import megatron_device, release_free_memory, share_weights
from megatron_r1z.policy.model import PolicyModel, build_chunks
from megatron_r1z.policy.reference import ReferenceWeights
from megatron_r1z.policy.trained import Settings, Taken, TrainedModel
from megatron_r1z.types import UpdateStats


@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """One optimizer step's work: the batch and the log-probs that are known before it, those of all but the last pipeline stage None.

    `old_logprobs` is empty when the step is the only one of its iteration: then the policy that is stepped is the old policy, the ratio
    is 1 by definition and its gradient is that of the current log-probs. `reference_logprobs` is empty where the loss has no KL term.
    """

    batch: GlobalBatch
    old_logprobs: tuple[Tensor | None, ...] = ()
    reference_logprobs: tuple[Tensor | None, ...] = ()

    def work(self) -> list[step.Work]:
        """The micro-batches with their log-probs."""
        nothing = (None,) * len(self.batch.micro_batches)
        parts = zip(self.batch.micro_batches, self.old_logprobs or nothing, self.reference_logprobs or nothing, strict=True)
        return [step.Work(*part) for part in parts]


class MegatronPolicy(TrainedModel):
    """The policy on this rank.

    Build it, write weights into `parameters()`, then call `start_training()`: from there on it owns an optimizer.
    """

    def __init__(self, settings: Settings, shape: ModelShape, topology: Topology, *, padded_vocab_size: int) -> None:
        with megatron_device():
            chunks = build_chunks(PolicyModel, shape, settings.parallel, settings.precision, padded_vocab_size)
        super().__init__(settings, shape, topology, chunks)
        self._reference: ReferenceWeights | None = None
        self._shared = share_weights(chunks)
        release_free_memory()  # on a CPU Megatron makes initial weights whole and in float32 first

    def keep_reference(self) -> None:
        """Make the weights that are now in place those of the reference model, whatever becomes of them."""
        self._reference = ReferenceWeights(self.parameters)

    @megatron_device()
    def start_training(self, loss: Loss, config: OptimizerConfig) -> None:
        """Add gradient buffers, optimizer and schedule around the weights that are now in place."""
        self._loss = loss
        self.model = step.Model(self.start_optimizer(config), (self.shape.vocab_size, loss.has_entropy))

    def packing_rules(self) -> PackingRules:
        """What a micro-batch of this policy may look like."""
        parallel = self._settings.parallel
        shares = self.topology.tp if parallel.sequence_parallel else 1
        return PackingRules(
            data_parallel_size=self.topology.dp,
            micro_batch_tokens=parallel.micro_batch_tokens,
            context_parallel_size=self.topology.cp,
            tokens_multiple=tokens_multiple(self._settings.precision, sequence_parallel=parallel.sequence_parallel) * shares,
            micro_batches_multiple=self.topology.pp if self.topology.vpp > 1 else 1,
            equal_micro_batches=self.topology.pp > 1,
            pad_sequences=parallel.pad_sequences,
            cost=SampleCost.of_model(self.shape),
        )

    @megatron_device()
    def response_logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor | None]:
        """Log-probs of the response tokens under the present weights, float32 [R] each; None on all but the last pipeline stage."""
        self.check_passes(len(batches))
        return step.response_logprobs(self.model, batches)

    def as_reference(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights of the reference model; `keep_reference` came first."""
        assert self._reference is not None
        return self._reference.in_place()

    def with_logprobs(self, batches: Sequence[GlobalBatch]) -> list[TrainBatch]:
        """Attach, before any weight moves, the present policy's log-probs, of which a single step needs none, and the reference's."""

        def taken() -> list[tuple[Tensor | None, ...]]:
            return [tuple(self.response_logprobs(batch.micro_batches)) for batch in batches]

        nothing: list[tuple[Tensor | None, ...]] = [()] * len(batches)
        old = taken() if len(batches) > 1 else nothing
        with self.as_reference() if self._loss.has_kl else nullcontext():
            reference = taken() if self._loss.has_kl else nothing
        return [TrainBatch(*parts) for parts in zip(batches, old, reference, strict=True)]

    @megatron_device()
    def update(self, train_batch: TrainBatch) -> UpdateStats:
        """One optimizer step; weights, moments and schedule stay as they are where loss or gradient is not finite."""
        self.start_step(len(train_batch.batch.micro_batches))
        figures = step.forward_backward(self.model, train_batch.work(), self._loss)
        return _stats(figures, train_batch.batch.denominator, self.take_step(figures.sums.loss))


def _stats(figures: step.StepFigures, denominator: int, taken: Taken) -> UpdateStats:
    """Sums to means over response tokens."""
    sums = figures.sums

    def mean(total: float) -> float:
        return total / sums.tokens if sums.tokens else math.nan

    return UpdateStats(
        loss=sums.loss / denominator,
        grad_norm=taken.grad_norm,
        learning_rate=taken.learning_rate,
        clip_fraction=mean(sums.clipped),
        clipped_high=mean(sums.clipped_high),
        clipped_low=mean(sums.clipped_low),
        dual_clipped=mean(sums.dual_clipped),
        tis_weight=mean(sums.importance),
        tis_truncated=mean(sums.truncated),
        ratio_mean=mean(sums.ratio),
        ratio_max=figures.ratio_max if sums.tokens else math.nan,
        entropy=mean(sums.entropy),
        sampler_kl=mean(sums.sampler_kl),
        reference_kl=mean(sums.reference_kl),
        mismatch_mean=mean(sums.mismatch),
        mismatch_p999=figures.mismatch_p999 if sums.tokens else math.nan,
        mismatch_max=figures.mismatch_max if sums.tokens else math.nan,
        num_tokens=int(sums.tokens),
        skipped=taken.skipped,
        non_finite=figures.non_finite,
    )
