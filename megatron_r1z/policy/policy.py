"""`MegatronPolicy`: the model being trained, its optimizer and the steps it can take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from torch import Tensor

from megatron_r1z.config import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.errors import DataError
from megatron_r1z.fp8.recipes import tokens_multiple
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.objective import Loss
from megatron_r1z.packing import GlobalBatch, MicroBatch, PackingRules, SampleCost
from megatron_r1z.policy import step
from megatron_r1z.policy.cpu import megatron_device, release_free_memory, share_weights
from megatron_r1z.policy.fp8_state import check_same_number
from megatron_r1z.policy.model import EXTRA_STATE, build_chunks
from megatron_r1z.policy.optimizer import build_optimizer, build_schedule, gradient_norm, wrap_chunks
from megatron_r1z.policy.parallel import device
from megatron_r1z.policy.reference import ReferenceWeights
from megatron_r1z.types import UpdateStats


class Settings(Protocol):
    """The sections of a configuration that decide how a policy is built."""

    @property
    def model(self) -> ModelConfig:
        """Where the weights come from."""

    @property
    def parallel(self) -> ParallelConfig:
        """How the model is split."""

    @property
    def precision(self) -> PrecisionConfig:
        """Number formats."""


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


class MegatronPolicy:
    """The policy on this rank.

    Build it, write weights into `parameters()`, then call `start_training()`: from there on it owns an optimizer.
    """

    def __init__(self, settings: Settings, shape: ModelShape, topology: Topology, *, padded_vocab_size: int) -> None:
        self.shape = shape
        self.topology = topology
        self._settings = settings
        self._reference: ReferenceWeights | None = None
        with megatron_device():
            self._bare = build_chunks(shape, settings.parallel, settings.precision, padded_vocab_size)
        self._shared = share_weights(self._bare)
        release_free_memory()  # on a CPU Megatron makes initial weights whole and in float32 first

    def parameters(self) -> dict[str, Tensor]:
        """This rank's weights by the names of the Megatron layout, without gradient history; writing into them changes the model."""
        return {
            f"chunks.{index}.{name}": tensor.data for index, chunk in enumerate(self._bare) for name, tensor in chunk.named_parameters()
        }

    def keep_reference(self) -> None:
        """Make the weights that are now in place those of the reference model, whatever becomes of them."""
        self._reference = ReferenceWeights(self.parameters)

    @megatron_device()
    def start_training(self, loss: Loss, config: OptimizerConfig) -> None:
        """Add gradient buffers, optimizer and schedule around the weights that are now in place."""
        self._loss = loss
        self._optimizer_config = config
        chunks = wrap_chunks(self._bare, config)
        self.model = step.Model(chunks, self.shape.vocab_size, loss.has_entropy)
        self.optimizer = build_optimizer(chunks, config)
        self.schedule = build_schedule(self.optimizer, config)
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss

    def packing_rules(self) -> PackingRules:
        """What a micro-batch of this policy may look like."""
        parallel = self._settings.parallel
        return PackingRules(
            data_parallel_size=self.topology.dp,
            micro_batch_tokens=parallel.micro_batch_tokens,
            context_parallel_size=self.topology.cp,
            tokens_multiple=tokens_multiple(self._settings.precision) * (self.topology.tp if parallel.sequence_parallel else 1),
            micro_batches_multiple=self.topology.pp if self.topology.vpp > 1 else 1,
            equal_micro_batches=self.topology.pp > 1,
            pad_sequences=parallel.pad_sequences,
            cost=SampleCost.of_model(self.shape),
        )

    @megatron_device()
    def response_logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor | None]:
        """Log-probs of the response tokens under the present weights, float32 [R] each; None on all but the last pipeline stage."""
        self._check_passes(len(batches))
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
        self._check_passes(len(train_batch.batch.micro_batches))
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        figures = step.forward_backward(self.model, train_batch.work(), self._loss)
        learning_rate = get_canonical_lr_for_logging(self.optimizer.param_groups)
        grad_norm = gradient_norm(self.optimizer)
        is_finite = math.isfinite(figures.sums.loss) and math.isfinite(grad_norm)
        if is_finite:
            self.optimizer.step()
            self.schedule.step(increment=1)
        release_free_memory()
        return _stats(figures, train_batch.batch.denominator, grad_norm, float(learning_rate or 0.0), skipped=not is_finite)

    def _check_passes(self, num_micro_batches: int) -> None:
        if self._settings.precision.policy == "fp8":
            check_same_number(num_micro_batches, device())

    @megatron_device()
    def sharded_weights(self) -> dict[str, Any]:
        """The weights for Megatron's distributed checkpoint, one entry per model chunk."""
        return {f"model{index}": chunk.sharded_state_dict(prefix="") for index, chunk in enumerate(self._bare)}

    @megatron_device()
    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Weights, optimizer and schedule for Megatron's distributed checkpoint."""
        state = self.sharded_weights()
        weights = state if len(self._bare) > 1 else {"model": state["model0"]}
        state["optimizer"] = self.optimizer.sharded_state_dict(weights, is_loading=is_loading)
        state["schedule"] = self.schedule.state_dict()
        return state

    @megatron_device()
    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Take over what `sharded_weights` saved."""
        for index, chunk in enumerate(self._bare):
            found = chunk.load_state_dict(state[f"model{index}"], strict=False)
            wrong = [name for name in (*found.missing_keys, *found.unexpected_keys) if not name.endswith(EXTRA_STATE)]
            if wrong:
                raise DataError(f"the checkpoint and this model differ in {len(wrong)} tensors, the first is {wrong[0]}.")

    @megatron_device()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `sharded_state` saved; learning rate, betas, decay and schedule stay those of the configuration."""
        self.load_weights(state)
        self.optimizer.load_state_dict(state["optimizer"])
        config = self._optimizer_config
        for group in self.optimizer.param_groups:
            group |= {"max_lr": config.lr, "min_lr": config.min_lr, "betas": config.betas, "eps": config.eps}
        self.schedule.load_state_dict(state["schedule"])


def _stats(figures: step.StepFigures, denominator: int, grad_norm: float, learning_rate: float, *, skipped: bool) -> UpdateStats:
    """Sums to means over response tokens."""
    sums = figures.sums
    tokens = max(sums.tokens, 1.0)
    return UpdateStats(
        loss=sums.loss / denominator,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        clip_fraction=sums.clipped / tokens,
        clipped_high=sums.clipped_high / tokens,
        clipped_low=sums.clipped_low / tokens,
        dual_clipped=sums.dual_clipped / tokens,
        tis_weight=sums.importance / tokens,
        tis_truncated=sums.truncated / tokens,
        ratio_mean=sums.ratio / tokens,
        ratio_max=figures.ratio_max,
        entropy=sums.entropy / tokens,
        sampler_kl=sums.sampler_kl / tokens,
        reference_kl=sums.reference_kl / tokens,
        mismatch_mean=sums.mismatch / tokens,
        mismatch_p999=figures.mismatch_p999,
        mismatch_max=figures.mismatch_max,
        num_tokens=int(sums.tokens),
        skipped=skipped,
        non_finite=figures.non_finite,
    )
