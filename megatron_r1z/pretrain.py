"""Next-token training on text with the same policy as the loop: `megatron-r1z pretrain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1z import ranks
from megatron_r1z.checkpoint import Checkpoints
from megatron_r1z.config import PretrainConfig
from megatron_r1z.corpus import Document, DocumentStream, TextSet
from megatron_r1z.metrics import Metrics, RunLog, Stopwatch, update_metrics
from megatron_r1z.objective import Loss, PolicyTokens, TokenLosses, likelihood_losses
from megatron_r1z.packing import GlobalBatch, MicroBatch, pack
from megatron_r1z.policy.policy import MegatronPolicy, TrainBatch
from megatron_r1z.skips import Skips
from megatron_r1z.supervisor import StopFlag
from megatron_r1z.types import Sample, UpdateStats

ROW_EVERY = 25
"""Steps between rows of the table; `metrics.jsonl` has every step."""


@dataclass(frozen=True)
class PretrainState:
    """What a checkpoint keeps besides the policy."""

    step: int
    documents: dict[str, Any]
    """Cursor of the document order."""


@dataclass
class Pretraining:
    """The collaborators of a pre-training run on this rank, and where it stands."""

    config: PretrainConfig
    policy: MegatronPolicy
    documents: DocumentStream
    evaluation: Sequence[TextSet]
    checkpoints: Checkpoints
    log: RunLog
    stop_flag: StopFlag
    state: PretrainState

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.logging.folder)


def pretrain(run: Pretraining) -> bool:
    """Take the steps that are left; True when all are done, False when the run was asked to stop. The last step is in a checkpoint.

    Raises:
        TrainingError: `optimizer.max_skipped_steps` steps in a row had a loss or gradient that is not finite.
    """
    watch, skips = Stopwatch(run.log), Skips(run.config.optimizer.max_skipped_steps)
    steps = run.config.corpus.steps
    saved = run.state if run.checkpoints.latest() else None
    if saved is None:
        _evaluate(run, watch)
    while run.state.step < steps and not skips.too_many and not ranks.any_rank(run.stop_flag.requested):
        samples = make_samples(run, run.documents.draw(run.config.corpus.documents_per_step))
        with watch.phase("update"):
            stats = run.policy.update(TrainBatch(make_batch(run, samples)))
        run.state = PretrainState(run.state.step + 1, run.documents.to_state())
        _record(run, stats, watch)
        warning = skips.count(run.state.step, stats, samples)
        if warning is not None:
            run.log.say(warning)
        if run.state.step % run.config.corpus.evaluation_every == 0 or run.state.step == steps:
            _evaluate(run, watch)
        if run.state.step % run.config.checkpoint.every == 0:
            saved = _save(run)
    if saved != run.state:
        _save(run)
    skips.check(f"step {run.state.step}" if run.checkpoints.latest() else None)
    return run.state.step == steps


def next_token_terms(tokens: PolicyTokens, batch: MicroBatch) -> TokenLosses:
    """Minus log-prob of every predicted token; the step divides by their number."""
    return likelihood_losses(tokens.logprobs_R, batch.weights_R)


NEXT_TOKEN_LOSS = Loss(next_token_terms)


def make_samples(run: Pretraining, documents: Sequence[Document]) -> list[Sample]:
    """The documents of one step; a sample is called `<steps before>/<number within the step>`."""
    only_response = run.config.corpus.loss_on == "response"
    return [
        Sample(
            sample_id=f"{run.state.step}/{index}",
            token_ids=document.token_ids,
            prompt_length=max(document.prompt_length if only_response else 0, 1),  # the first token has nothing to be predicted from
            advantage=1.0,
            temperature=1.0,
            engine_logprobs=(),
            policy_version=run.state.step,
        )
        for index, document in enumerate(documents)
    ]


def make_batch(run: Pretraining, samples: list[Sample]) -> GlobalBatch:
    """One step: every predicted token weighs 1, the denominator is their number over all ranks."""
    where = run.policy.topology.coordinates(dist.get_rank())
    return pack(
        samples,
        run.policy.packing_rules(),
        where.dp_rank,
        where.cp_rank,
        token_weight=lambda _length: 1.0,
        denominator=max(sum(sample.response_length for sample in samples), 1),
    )


def _evaluate(run: Pretraining, watch: Stopwatch) -> None:
    """Loss of each held-out source in a row of its own, before that step's checkpoint, so that a resumed run has it already."""
    if not run.evaluation:
        return
    with watch.phase("evaluate"):
        losses: Metrics = {f"evaluation/{item.name}_loss_nats": mean_loss(run, item.documents) for item in run.evaluation}
    run.log.write("step", run.state.step, losses | watch.lap())
    run.log.row(
        {"step": str(run.state.step)} | {item.name: f"{loss:.4f}" for item, loss in zip(run.evaluation, losses.values(), strict=True)}
    )


def mean_loss(run: Pretraining, documents: Sequence[Document]) -> float:
    """Next-token loss under the present weights over all predicted tokens of `documents`, nats per token; the same on every rank.

    The sum is float64 and the division is by the number of predicted tokens, once: neither packing nor layout is in it.
    """
    total = torch.tensor(loss_sums(run, documents), dtype=torch.float64)
    dist.all_reduce(total)
    return float(total[0] / total[1].clamp(min=1))


def loss_sums(run: Pretraining, documents: Sequence[Document]) -> tuple[float, int]:
    """This rank's part of the summed loss of `documents`, and the number of predicted tokens in it; each is counted on one rank only."""
    loss, tokens, at_once = 0.0, 0, run.config.corpus.documents_per_step
    is_counted = run.policy.topology.coordinates(dist.get_rank()).tp_rank == 0  # the others hold the same
    for first in range(0, len(documents), at_once):
        batch = make_batch(run, make_samples(run, documents[first : first + at_once]))
        for logprobs_R in run.policy.response_logprobs(batch.micro_batches):
            if logprobs_R is not None and is_counted:
                loss -= logprobs_R.double().sum().item()
                tokens += logprobs_R.numel()
    return loss, tokens


def _record(run: Pretraining, stats: UpdateStats, watch: Stopwatch) -> None:
    metrics = update_metrics([stats])
    names = ("loss", "grad_norm", "learning_rate", "entropy_nats", "trained_tokens", "skipped_steps")
    metrics = {f"pretrain/{name}": metrics[f"update/{name}"] for name in names if f"update/{name}" in metrics} | watch.lap()
    run.log.write("step", run.state.step, metrics)
    if run.state.step % ROW_EVERY == 0 or run.state.step in (1, run.config.corpus.steps):
        run.log.row(
            {
                "step": str(run.state.step),
                "loss": f"{stats.loss:.4f}",
                "gradient": f"{stats.grad_norm:.3f}",
                "lr": f"{stats.learning_rate:.2e}",
                "tokens/s": f"{stats.num_tokens / metrics['time/update_s']:.0f}",
            }
        )


def _save(run: Pretraining) -> PretrainState:
    state = run.state
    run.checkpoints.save(state.step, run.policy, {"step": state.step, "documents": state.documents})
    return state
