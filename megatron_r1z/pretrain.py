"""Next-token training on text with the same policy as the loop: `megatron-r1z pretrain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1z import ranks
from megatron_r1z.config import PretrainConfig
from megatron_r1z.data.corpus import Document, DocumentStream, TextSet
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.objective import Loss, PolicyTokens, TokenLosses, likelihood_losses
from megatron_r1z.packing import GlobalBatch, MicroBatch, pack
from megatron_r1z.policy.policy import MegatronPolicy, TrainBatch
from megatron_r1z.record.metrics import Metrics, RunLog, Stopwatch, update_metrics
from megatron_r1z.record.skips import Skips
from megatron_r1z.types import Sample, UpdateStats
from megatron_r1z.weights.checkpoint import Checkpoints

ROW_EVERY = 25
"""Steps between rows of the table; `metrics.jsonl` has every step."""


@dataclass(frozen=True)
class PretrainState:
    """What a checkpoint keeps besides the policy."""

    step: int
    documents: dict[str, Any]
    """Cursor of the document order."""
    is_evaluation_due: bool = False
    """The evaluation of this step was put off when the run was asked to stop; the next start begins with it."""


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
    saved: PretrainState | None = None
    """What the newest checkpoint holds; None where there is none."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.logging.folder)

    def stopped(self) -> bool:
        """True on every rank once one of them has seen SIGINT or SIGTERM."""
        return ranks.any_rank(self.stop_flag.requested)


def pretrain(run: Pretraining) -> bool:
    """Take the steps that are left; True when all are done, False when the run was asked to stop. The last step is in a checkpoint.

    Raises:
        TrainingError: `optimizer.max_skipped_steps` steps in a row had a loss or gradient that is not finite, or weights are not finite; no
            checkpoint was written, moved or deleted for that.
    """
    watch, skips = Stopwatch(run.log), Skips(run.config.optimizer.max_skipped_steps)
    steps = run.config.corpus.steps
    _evaluate_if_due(run, watch)
    if run.saved is not None:
        _save(run)
    while run.state.step < steps and not run.stopped():
        samples = make_samples(run, run.documents.draw(run.config.corpus.documents_per_step))
        with watch.phase("update"):
            stats = run.policy.update(TrainBatch(make_batch(run, samples)))
        run.state = PretrainState(run.state.step + 1, run.documents.to_state(), _is_due(run, run.state.step + 1))
        _record(run, stats, watch)
        warning = skips.count(run.state.step, stats, samples)
        if warning is not None:
            run.log.say(warning)
        skips.check(None if run.saved is None else str(run.checkpoints.path(run.saved.step)))
        if run.stopped():
            break
        _evaluate_if_due(run, watch)
        if run.state.step % run.config.checkpoint.every == 0:
            _save(run)
    _save(run)
    return run.state.step == steps and not run.state.is_evaluation_due


def _is_due(run: Pretraining, step: int) -> bool:
    """Every so many steps, and after the last one."""
    return step % run.config.corpus.evaluation_every == 0 or step == run.config.corpus.steps


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


def _evaluate_if_due(run: Pretraining, watch: Stopwatch) -> None:
    """Nothing is logged, and the evaluation is still due, where the run is asked to stop meanwhile."""
    if not run.state.is_evaluation_due or run.stopped():
        return
    if run.evaluation and not _evaluate(run, watch):
        return
    run.state = replace(run.state, is_evaluation_due=False)


def _evaluate(run: Pretraining, watch: Stopwatch) -> bool:
    """Log the loss of each held-out source in a row of its own; False where the run was asked to stop."""
    losses: Metrics = {}
    with watch.phase("evaluate"):
        for item in run.evaluation:
            loss = mean_loss(run, item.documents)
            if loss is None:
                return False
            losses[f"evaluation/{item.name}_loss_nats"] = loss
    run.log.write("step", run.state.step, losses | watch.lap())
    run.log.row(
        {"step": str(run.state.step)} | {item.name: f"{loss:.4f}" for item, loss in zip(run.evaluation, losses.values(), strict=True)}
    )
    return True


def mean_loss(run: Pretraining, documents: Sequence[Document]) -> float | None:
    """Next-token loss under the present weights over all predicted tokens of `documents`, nats per token; the same on every rank.

    None where the run was asked to stop.

    The sum is float64 and the division is by the number of predicted tokens, once: neither packing nor layout is in it.
    """
    sums = loss_sums(run, documents)
    if sums is None:
        return None
    total = torch.tensor(sums, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total[0] / total[1].clamp(min=1))


def loss_sums(run: Pretraining, documents: Sequence[Document]) -> tuple[float, int] | None:
    """This rank's part of the summed loss of `documents`, and the number of predicted tokens in it; each is counted on one rank only.

    None, on every rank, where the run was asked to stop.
    """
    loss, tokens, at_once = 0.0, 0, run.config.corpus.documents_per_step
    is_counted = run.policy.topology.coordinates(dist.get_rank()).tp_rank == 0  # the others hold the same
    for first in range(0, len(documents), at_once):
        if run.stopped():
            return None
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


def _save(run: Pretraining) -> None:
    """Put the last step into a checkpoint; where its weights are in one, only what is said beside them is written anew."""
    if run.saved == run.state:
        return
    if run.saved is not None and run.saved.step == run.state.step:
        run.checkpoints.note(run.state.step, asdict(run.state))
        run.saved = run.state
    elif run.checkpoints.save(run.state.step, run.policy, asdict(run.state)) is not None:
        run.saved = run.state
