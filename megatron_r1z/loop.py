"""The training loop.

    prompts -> rollout (vLLM) -> grade -> advantages -> pack -> Megatron update -> reshard -> vLLM

Every rank runs this same program. `Run` lists the parts: `prompts.py` draws questions, `rollout/` samples, `grading/` judges,
`objective.py` and `packing.py` prepare the update, `policy/` makes it, `reshard/` hands the weights over; `evaluate.py`, `checkpoint.py`,
`certificate.py`, `metrics.py` and `rollouts.py` keep the record. `assemble.py` builds them.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_r1z import ranks
from megatron_r1z.certificate import make_certificate
from megatron_r1z.checkpoint import Checkpoints
from megatron_r1z.config import AlgorithmConfig, TrainConfig
from megatron_r1z.evaluate import evaluate_prompts, evaluation_metrics, evaluation_sampling
from megatron_r1z.metrics import (
    Metrics,
    RunLog,
    Stopwatch,
    combine_steps,
    critic_metrics,
    grading_warning,
    penalty_metrics,
    refit_metrics,
    rollout_metrics,
    update_metrics,
)
from megatron_r1z.objective import AGGREGATIONS, Aggregation, Objective, estimated, kl_estimate, token_rewards
from megatron_r1z.packing import GlobalBatch, MicroBatch, pack
from megatron_r1z.policy.critic import MegatronCritic
from megatron_r1z.policy.policy import MegatronPolicy
from megatron_r1z.prompts import PromptSet, PromptStream
from megatron_r1z.protocols import Engine, Grader, Sampling, Stop
from megatron_r1z.receipts import save_receipt
from megatron_r1z.rollouts import save_rollouts
from megatron_r1z.scores import score
from megatron_r1z.skips import Skips
from megatron_r1z.supervisor import StopFlag
from megatron_r1z.token_figures import gather_figures
from megatron_r1z.types import FinishReason, GradedGroup, RefitReceipt, Sample, TokenFigures, UpdateStats, ValueStats

CERTIFICATE_GROUPS = 32
"""Groups whose log-probs are compared between engine and policy before the first update."""


@dataclass(frozen=True)
class RunState:
    """What a checkpoint keeps besides the policy: the last finished iteration."""

    iteration: int
    """Iterations finished; also the policy version."""
    steps: int
    """Optimizer steps taken."""
    prompts: dict[str, Any]
    """Cursor of the question order."""


@dataclass
class Run:
    """The collaborators of one run on this rank, and where it stands."""

    config: TrainConfig
    policy: MegatronPolicy
    critic: MegatronCritic | None
    """Under PPO."""
    engine: Engine
    grader: Grader
    refit: Callable[[int], RefitReceipt]
    """Hands the weights over as this policy version."""
    prompts: PromptStream
    stop: tuple[Stop, ...]
    evaluation: Sequence[PromptSet]
    checkpoints: Checkpoints
    log: RunLog
    stop_flag: StopFlag
    state: RunState
    watch: Stopwatch = field(init=False)
    skips: Skips = field(init=False)
    critic_skips: Skips = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.log)
        self.skips = Skips(self.config.optimizer.max_skipped_steps)
        self.critic_skips = Skips(self.config.optimizer.max_skipped_steps, name="the critic's ")

    @property
    def objective(self) -> Aggregation:
        """The row of the objective table."""
        return AGGREGATIONS[self.config.algorithm.name]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.logging.folder)

    def iterations(self) -> Iterator[int]:
        """The iterations that are left; ends early when any rank was asked to stop."""
        while self.state.iteration < self.config.algorithm.iterations and not self.stopped():
            yield self.state.iteration

    def stopped(self) -> bool:
        """True on every rank once one of them has seen SIGINT or SIGTERM."""
        return ranks.any_rank(self.stop_flag.requested)

    def sampling(self, iteration: int, number: int = 0) -> Sampling:
        """How the responses of an iteration are sampled; each round of dynamic sampling has a `number` and so a seed of its own."""
        rollout = self.config.rollout
        return Sampling(
            num_samples=rollout.samples_per_prompt,
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop=self.stop,
            seed=rollout.seed * 1_000_003 + iteration + number * 10**15,
        )


def train(run: Run) -> bool:
    """Run the iterations that are left; True when all are done, False when the run was asked to stop.

    The last finished iteration is in a checkpoint either way, once an optimizer step was taken.

    Raises:
        TrainingError: `optimizer.max_skipped_steps` steps in a row had a loss or gradient that is not finite.
    """
    saved = run.state if run.checkpoints.latest() else None
    certified = False
    _hand_over(run, run.state.iteration)
    if run.state.iteration == 0:
        _evaluate(run)
    for iteration in run.iterations():
        graded, num_rounds = sample_groups(run, iteration)
        if run.stopped():
            break
        trained = choose_groups(graded, run.config.rollout.prompts_per_iteration)
        estimates = make_estimates(trained, run)  # empty without a critic and a KL term in the reward
        samples = make_samples(trained, run.objective, run.config.rollout.temperature, run.config.algorithm, estimates)
        batches, step_of = make_batches(samples, run, iteration)
        if not certified:
            _certify(run, samples)
            certified = True
        with run.watch.phase("update"):
            train_batches = run.policy.with_logprobs(batches)  # one old policy for all steps
            stats = [run.policy.update(batch) for batch in train_batches]  # one optimizer step each
            critic_stats = [run.critic.update(batch) for batch in batches] if run.critic else []
        receipt = _hand_over(run, policy_version=iteration + 1)
        run.state = RunState(iteration + 1, run.state.steps + len(stats), run.prompts.to_state())
        _keep_rollouts(run, iteration, trained, samples, step_of)
        _record(run, rollout_metrics(graded, num_rounds) | penalty_metrics(estimates.divergences), stats, critic_stats, receipt)
        _count_skips(run, run.skips, stats, samples, step_of)
        _count_skips(run, run.critic_skips, critic_stats, samples, step_of)
        if run.skips.too_many or run.critic_skips.too_many:
            break
        if _is_due(run, run.config.evaluation.every):
            _evaluate(run)
        if _is_due(run, run.config.checkpoint.every):
            saved = _save(run)
    if saved != run.state:
        _save(run)
    for skips in (run.skips, run.critic_skips):
        skips.check(f"iteration {run.state.iteration}" if run.checkpoints.latest() else None)
    return run.state.iteration == run.config.algorithm.iterations


def _hand_over(run: Run, policy_version: int) -> RefitReceipt:
    """Refit the engine and keep the receipt."""
    with run.watch.phase("refit"):
        receipt = run.refit(policy_version)
    if dist.get_rank() == 0:
        save_receipt(run.folder, receipt)
    return receipt


def sample_groups(run: Run, iteration: int) -> tuple[list[GradedGroup], int]:
    """All groups of an iteration, the same on every rank, and in how many rounds they were sampled.

    One round, or with dynamic sampling as many as it takes until enough groups are mixed, at most `algorithm.sampling_rounds`.
    """
    wanted = run.config.rollout.prompts_per_iteration
    graded: list[GradedGroup] = []
    for number in range(run.config.algorithm.sampling_rounds):
        prompts = run.prompts.draw(wanted)
        with run.watch.phase("rollout"):
            groups = run.engine.generate(prompts, run.sampling(iteration, number), policy_version=iteration)
        groups = [replace(group, group_id=len(graded) + group.group_id) for group in groups]
        with run.watch.phase("grade"):
            graded += sorted(ranks.gather(run.grader.grade(groups)), key=lambda item: item.group.group_id)
        if sum(item.is_mixed for item in graded) >= wanted or run.stopped():
            break
    return graded, number + 1


def choose_groups(graded: Sequence[GradedGroup], count: int) -> list[GradedGroup]:
    """The `count` groups that are trained on: the first mixed ones, then, where these are too few, the first others; in their order."""
    chosen = sorted(graded, key=lambda item: not item.is_mixed)[:count]
    return sorted(chosen, key=lambda item: item.group.group_id)


@dataclass(frozen=True)
class Estimates:
    """What models say of the response tokens before advantages are taken; None where nothing asks for it."""

    divergences: TokenFigures | None = None
    """From the reference model, of the policy that sampled; where rewards have a KL term."""
    values: TokenFigures | None = None
    """The critic's before each token."""


def make_estimates(graded: Sequence[GradedGroup], run: Run) -> Estimates:
    """Passes over all responses, of the models that advantages need; all ranks call this, and none makes a pass where none is needed."""
    algorithm = run.config.algorithm
    has_kl = algorithm.kl_is_in("reward")
    if run.critic is None and not has_kl:
        return Estimates()
    batches = _pack(run, make_rows(graded, run.config.rollout.temperature), skip_zero_advantage=False).micro_batches
    with run.watch.phase("estimate"):
        divergences = _divergences(run, batches) if has_kl else None
        values = None if run.critic is None else gather_figures(batches, run.critic.values(batches), run.policy.topology)
    return Estimates(divergences, values)


def _divergences(run: Run, batches: Sequence[MicroBatch]) -> TokenFigures:
    own = run.policy.response_logprobs(batches)
    with run.policy.as_reference():
        reference = run.policy.response_logprobs(batches)
    pairs = zip(own, reference, strict=True)
    estimator = run.config.algorithm.kl_estimator
    figures = [None if mine is None or other is None else kl_estimate(estimator, mine, other) for mine, other in pairs]
    return gather_figures(batches, figures, run.policy.topology)


def make_rows(graded: Sequence[GradedGroup], temperature: float) -> list[Sample]:
    """One row per response, in group order, without an advantage yet; `temperature` is what they were sampled at."""
    return [
        Sample(
            sample_id=f"{item.group.group_id}/{index}",
            token_ids=item.group.prompt.token_ids + response.token_ids,
            prompt_length=len(item.group.prompt.token_ids),
            advantage=0.0,
            temperature=temperature,
            engine_logprobs=response.logprobs,
            policy_version=response.policy_version,
        )
        for item in graded
        for index, response in enumerate(item.group.responses)
    ]


def make_samples(
    graded: Sequence[GradedGroup],
    objective: Aggregation,
    temperature: float,
    algorithm: AlgorithmConfig,
    estimates: Estimates | None = None,
) -> list[Sample]:
    """The rows with their advantages: of the group's rewards or, under PPO, of the critic's values.

    Each token pays for its divergence from the reference model where rewards have a KL term. With `mask_truncated` a response that ended at
    the token limit gets advantage 0, after its reward went into those of its group.
    """
    known = estimates or Estimates()
    samples = []
    for item in graded:
        rows = make_rows([item], temperature)
        rewards = [
            token_rewards(verdict.reward, row.response_length, algorithm.kl_coef, (known.divergences or {}).get(row.sample_id))
            for row, verdict in zip(rows, item.verdicts, strict=True)
        ]
        if isinstance(objective, Objective):
            samples += _with_group_advantages(item, rows, objective.advantages([math.fsum(of_tokens) for of_tokens in rewards]), algorithm)
        else:
            samples += [_with_token_advantages(*pair, known.values or {}, algorithm.gae_lambda) for pair in zip(rows, rewards, strict=True)]
    return samples


def _with_token_advantages(row: Sample, rewards: Sequence[float], values: TokenFigures, decay: float) -> Sample:
    before = values[row.sample_id]
    return replace(row, advantage=tuple(estimated(rewards, before, decay)), values=tuple(before), has_further_terms=True)


def _with_group_advantages(
    item: GradedGroup, rows: Sequence[Sample], advantages: Sequence[float], algorithm: AlgorithmConfig
) -> list[Sample]:
    is_counted = item.is_mixed or not algorithm.filter_groups
    return [
        replace(
            row,
            advantage=0.0 if algorithm.mask_truncated and response.finish_reason is FinishReason.LENGTH else advantage,
            is_counted=is_counted,
            has_further_terms=algorithm.has_further_terms and is_counted,
        )
        for row, response, advantage in zip(rows, item.group.responses, advantages, strict=True)
    ]


def make_batches(samples: Sequence[Sample], run: Run, iteration: int) -> tuple[list[GlobalBatch], dict[str, int]]:
    """The optimizer steps of an iteration, each over a random `train_batch_size` of its samples, and the step of each sample.

    As in OAT the samples of a group are scattered over the steps (recipe: `oat/algorithms/ppo.py` permutes the buffer).
    """
    order = list(samples)
    random.Random(f"steps/{run.config.rollout.seed}/{iteration}").shuffle(order)
    size = run.config.algorithm.train_batch_size
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    return [_pack(run, step) for step in steps], {sample.sample_id: index for index, step in enumerate(steps) for sample in step}


def _pack(run: Run, samples: Sequence[Sample], *, skip_zero_advantage: bool = True) -> GlobalBatch:
    lengths = [sample.response_length for sample in samples if sample.is_counted]
    where = run.policy.topology.coordinates(dist.get_rank())
    return pack(
        samples,
        run.policy.packing_rules(),
        where.dp_rank,
        where.cp_rank,
        token_weight=run.objective.token_weight,
        denominator=run.objective.denominator(lengths, run.config.rollout.max_response_tokens),
        skip_zero_advantage=skip_zero_advantage,
    )


def _certify(run: Run, samples: Sequence[Sample]) -> None:
    """Compare engine and policy log-probs of the first responses, print and keep the difference, refuse one that cannot be."""
    some = samples[: CERTIFICATE_GROUPS * run.config.rollout.samples_per_prompt]
    with run.watch.phase("certify"):
        certificate = make_certificate(run.policy, _pack(run, some, skip_zero_advantage=False).micro_batches, run.config)
    run.log.say(certificate.sentence())
    if dist.get_rank() == 0:
        certificate.save(run.folder / "certificate.json")
    certificate.check()


def _is_due(run: Run, every: int) -> bool:
    return run.state.iteration % every == 0 or run.state.iteration == run.config.algorithm.iterations


def _evaluate(run: Run) -> None:
    if not run.evaluation:
        return
    sampling = evaluation_sampling(run.config.evaluation, run.config.rollout, run.stop)
    metrics: Metrics = {}
    scores = []
    with run.watch.phase("evaluate"):
        for item in run.evaluation:
            scores.append(score(item.name, evaluate_prompts(item.prompts, run.engine, run.grader, sampling, run.state.iteration)))
            metrics |= evaluation_metrics(scores[-1])
    run.log.write("iteration", run.state.iteration, metrics | run.watch.lap())
    accuracies = (f"{item.name} {item.accuracy:.1%} ({item.low:.1%} - {item.high:.1%})" for item in scores)
    run.log.say(f"iteration {run.state.iteration}, accuracy: " + ", ".join(accuracies))


def _save(run: Run) -> RunState:
    state = run.state
    with run.watch.phase("checkpoint"):
        run.checkpoints.save(state.iteration, run.policy, dataclasses.asdict(state), run.critic)
    run.log.write("iteration", state.iteration, run.watch.lap())
    return state


def _keep_rollouts(run: Run, iteration: int, graded: Sequence[GradedGroup], samples: Sequence[Sample], step_of: dict[str, int]) -> None:
    if run.config.logging.rollouts and dist.get_rank() == 0:
        save_rollouts(run.folder / "rollouts", iteration, graded, samples, step_of)


def _record(run: Run, rollout: Metrics, stats: Sequence[UpdateStats], critic_stats: Sequence[ValueStats], receipt: RefitReceipt) -> None:
    """Write the figures of the iteration that just ended."""
    steps = [update_metrics(item) for item in stats]
    if critic_stats:
        steps = [row | critic_metrics(item) for row, item in zip(steps, critic_stats, strict=True)]
    first = run.state.steps - len(steps)
    if len(steps) > 1:
        for index, row in enumerate(steps):
            run.log.write("step", first + index + 1, row)
    metrics = rollout | combine_steps(steps) | refit_metrics(receipt) | run.watch.lap()
    run.log.write("iteration", run.state.iteration, metrics)
    run.log.row(_cells(run.state.iteration, metrics))
    warning = grading_warning(metrics)
    if warning is not None:
        run.log.say(warning)


def _count_skips(
    run: Run, skips: Skips, stats: Sequence[UpdateStats | ValueStats], samples: Sequence[Sample], step_of: dict[str, int]
) -> None:
    """Tell of skipped steps of the iteration that just ended."""
    for index, item in enumerate(stats):
        members = [sample for sample in samples if step_of[sample.sample_id] == index]
        warning = skips.count(run.state.steps - len(stats) + index + 1, item, members)
        if warning is not None:
            run.log.say(warning)


def _cells(iteration: int, metrics: Metrics) -> dict[str, str]:
    def show(name: str, form: str) -> str:
        return format(metrics[name], form) if name in metrics else "-"

    return {
        "iteration": str(iteration),
        "reward": show("rollout/reward_mean", ".3f"),
        "length": show("rollout/length_mean_tokens", ".1f"),
        "right": show("rollout/length_right_tokens", ".1f"),
        "wrong": show("rollout/length_wrong_tokens", ".1f"),
        "cut": show("rollout/truncated_share", ".1%"),
        "loss": show("update/loss", ".5f"),
        "gradient": show("update/grad_norm", ".4f"),
        "mismatch": show("update/mismatch_max_nats", ".1e"),
        "rollout": show("time/rollout_s", ".2f") + "s",
        "update": show("time/update_s", ".2f") + "s",
        "refit": show("refit/seconds_s", ".3f") + "s",
    }
