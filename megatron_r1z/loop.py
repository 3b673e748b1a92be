"""The training loop.

    prompts -> rollout (vLLM) -> grade -> advantages -> pack -> Megatron update -> reshard -> vLLM

Every rank runs this same program. `Run` lists the parts: `data/` draws questions, `rollout/` samples, `grading/` judges, `samples.py`,
`objective.py` and `packing.py` prepare the update, `policy/` makes it, `reshard/` hands the weights over; `evaluation/`, `weights/` and
`record/` keep what comes of it. `assemble.py` builds them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from megatron_r1z import ranks
from megatron_r1z.config import TrainConfig
from megatron_r1z.data.prompts import PromptSet, PromptStream
from megatron_r1z.evaluation.evaluate import evaluate_prompts, evaluation_metrics, evaluation_sampling
from megatron_r1z.evaluation.scores import score
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.objective import AGGREGATIONS, Aggregation, kl_estimate
from megatron_r1z.packing import GlobalBatch, MicroBatch, pack
from megatron_r1z.policy.critic import MegatronCritic
from megatron_r1z.policy.policy import MegatronPolicy
from megatron_r1z.policy.token_figures import gather_figures
from megatron_r1z.protocols import Engine, Grader, Sampling, Stop
from megatron_r1z.record.advice import Advice
from megatron_r1z.record.certificate import make_certificate
from megatron_r1z.record.metrics import (
    Metrics,
    RunLog,
    Stopwatch,
    penalty_metrics,
    refit_metrics,
    rollout_metrics,
    step_metrics,
    table_cells,
)
from megatron_r1z.record.receipts import save_receipt
from megatron_r1z.record.rollouts import ROLLOUTS, save_rollouts
from megatron_r1z.record.skips import Skips
from megatron_r1z.samples import Estimates, choose_groups, make_rows, make_samples
from megatron_r1z.types import GradedGroup, RefitReceipt, Sample, TokenFigures, UpdateStats, ValueStats
from megatron_r1z.weights.checkpoint import Checkpoints

CERTIFICATE_GROUPS = 32
"""Groups whose log-probs are compared between engine and policy before the first update."""
PutOff = Literal["refit", "evaluation"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class RunState:
    """What a checkpoint keeps besides the policy: the last finished iteration."""

    iteration: int
    """Iterations finished; also the policy version."""
    steps: int
    """Optimizer steps taken."""
    prompts: dict[str, Any]
    """Cursor of the question order."""
    put_off: tuple[PutOff, ...] = ()
    """What belongs to the last finished iteration and was not done when the run was asked to stop; the next start begins with it."""

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> RunState:
        """As JSON has it."""
        return cls(**{**tree, "put_off": tuple(tree.get("put_off", ()))})

    def done(self, what: PutOff) -> RunState:
        """The same with that done."""
        return replace(self, put_off=tuple(item for item in self.put_off if item != what))


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
    saved: RunState | None = None
    """What the newest checkpoint holds; None where there is none."""
    watch: Stopwatch = field(init=False)
    advice: Advice = field(init=False)
    skips: Skips = field(init=False)
    critic_skips: Skips = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.log)
        self.advice = Advice(self.config)
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

    @property
    def is_stuck(self) -> bool:
        """Too many optimizer steps in a row were skipped."""
        return self.skips.too_many or self.critic_skips.too_many

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

    The last finished iteration is in a checkpoint either way, once an optimizer step was taken. A request to stop drops an iteration of
    which no weight has moved yet, which is drawn again alike; the steps of one that has begun to move them are taken, and what else belongs
    to it is put off.

    Raises:
        TrainingError: `optimizer.max_skipped_steps` steps in a row had a loss or gradient that is not finite, or weights are not finite; no
            checkpoint was written, moved or deleted for that.
    """
    certified = False
    _catch_up(run)
    for iteration in run.iterations():
        sampled = sample_groups(run, iteration)
        if sampled is None:
            break
        graded, num_rounds = sampled
        trained = choose_groups(graded, run.config.rollout.prompts_per_iteration)
        estimates = make_estimates(trained, run)  # empty without a critic and a KL term in the reward
        samples = make_samples(trained, run.objective, run.config.rollout.temperature, run.config.algorithm, estimates)
        batches, step_of = make_batches(samples, run, iteration)
        if not certified:
            _certify(run, samples)
            certified = True
        with run.watch.phase("update"):
            train_batches = run.policy.with_logprobs(batches)  # one old policy for all steps
            if run.stopped():  # the last look before weights move
                break
            stats = [run.policy.update(batch) for batch in train_batches]  # one optimizer step each
            critic_stats = [run.critic.update(batch) for batch in batches] if run.critic else []
        run.state = RunState(iteration + 1, run.state.steps + len(stats), run.prompts.to_state(), _what_follows(run, iteration + 1))
        _count_skips(run, run.skips, stats, samples, step_of)
        _count_skips(run, run.critic_skips, critic_stats, samples, step_of)
        receipt = None if run.is_stuck or run.stopped() else _hand_over(run, policy_version=iteration + 1)
        _keep_rollouts(run, iteration, trained, samples, step_of)
        _record(run, rollout_metrics(graded, num_rounds) | penalty_metrics(estimates.divergences), stats, critic_stats, receipt)
        _advise(run, graded, samples)
        if receipt is None:
            break
        run.state = run.state.done("refit")
        _evaluate_if_due(run)
        if _is_due(run, run.state.iteration, run.config.checkpoint.every):
            _save(run)
    for skips in (run.skips, run.critic_skips):
        skips.check(None if run.saved is None else str(run.checkpoints.path(run.saved.iteration)))
    _save(run)
    return run.state.iteration == run.config.algorithm.iterations and not run.state.put_off


def _what_follows(run: Run, iteration: int) -> tuple[PutOff, ...]:
    """What is left to do after the update of the iteration before `iteration`."""
    return ("refit", "evaluation") if _is_due(run, iteration, run.config.evaluation.every) else ("refit",)


def _catch_up(run: Run) -> None:
    """Give the engine its weights, and do what was put off when the run was stopped, or what comes before its first iteration."""
    if run.stopped():
        return
    receipt = _hand_over(run, run.state.iteration)
    if "refit" in run.state.put_off:
        run.log.write("iteration", run.state.iteration, refit_metrics(receipt) | run.watch.lap())
    run.state = run.state.done("refit")
    _evaluate_if_due(run)
    if run.saved is not None:
        _save(run)


def _hand_over(run: Run, policy_version: int) -> RefitReceipt:
    """Refit the engine and keep the receipt."""
    with run.watch.phase("refit"):
        receipt = run.refit(policy_version)
    if dist.get_rank() == 0:
        save_receipt(run.folder, receipt)
    return receipt


def sample_groups(run: Run, iteration: int) -> tuple[list[GradedGroup], int] | None:
    """All groups of an iteration, the same on every rank, and in how many rounds they were sampled; None where the run was asked to stop.

    One round, or with dynamic sampling as many as it takes until enough groups are mixed, at most `algorithm.sampling_rounds`.
    """
    wanted = run.config.rollout.prompts_per_iteration
    graded: list[GradedGroup] = []
    for number in range(run.config.algorithm.sampling_rounds):
        prompts, sampling = run.prompts.draw(wanted), run.sampling(iteration, number)
        groups = _unless_stopped(run, "rollout", partial(run.engine.generate, prompts, sampling, policy_version=iteration))
        if groups is None:
            return None
        numbered = [replace(group, group_id=len(graded) + group.group_id) for group in groups]
        mine = _unless_stopped(run, "grade", partial(run.grader.grade, numbered))
        if mine is None:
            return None
        with run.watch.phase("gather"):
            graded += sorted(ranks.gather(mine), key=lambda item: item.group.group_id)
        if sum(item.is_mixed for item in graded) >= wanted:
            break
    return graded, number + 1


def _unless_stopped(run: Run, phase: str, work: Callable[[], Item]) -> Item | None:
    """What `work` returns; None on every rank where one was asked to stop meanwhile. Waiting for other ranks is not part of `phase`."""
    with run.watch.phase(phase):
        result = ranks.unless_interrupted(work)
    with run.watch.phase("gather"):
        return None if run.stopped() else result


def make_estimates(graded: Sequence[GradedGroup], run: Run) -> Estimates:
    """Passes over all responses that were judged, of the models that advantages need, none where none is asked for; all ranks call it."""
    algorithm = run.config.algorithm
    has_kl = algorithm.kl_is_in("reward")
    if run.critic is None and not has_kl:
        return Estimates()
    rows = [row for item in graded for row in compress(make_rows([item], run.config.rollout.temperature), item.is_judged)]
    batches = _pack(run, rows, skip_zero_advantage=False).micro_batches
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


def _is_due(run: Run, iteration: int, every: int) -> bool:
    """What happens every so many iterations, and after the last one."""
    return iteration % every == 0 or iteration == run.config.algorithm.iterations


def _evaluate_if_due(run: Run) -> None:
    """Nothing is logged, and the evaluation is still due, where the run is asked to stop meanwhile."""
    if "evaluation" not in run.state.put_off or run.stopped():
        return
    if run.evaluation and not _evaluate(run):
        return
    run.state = run.state.done("evaluation")


def _evaluate(run: Run) -> bool:
    """Log the scores; False where the run was asked to stop."""
    sampling = evaluation_sampling(run.config.evaluation, run.config.rollout, run.stop)
    metrics: Metrics = {}
    scores = []
    with run.watch.phase("evaluate"):
        for item in run.evaluation:
            results = evaluate_prompts(item.prompts, run.engine, run.grader, sampling, run.state.iteration, run.stop_flag)
            if results is None:
                return False
            scores.append(score(item.name, results))
            metrics |= evaluation_metrics(scores[-1])
    run.log.write("iteration", run.state.iteration, metrics | run.watch.lap())
    accuracies = (f"{item.name} {item.accuracy:.1%} ({item.low:.1%} - {item.high:.1%})" for item in scores)
    run.log.say(f"iteration {run.state.iteration}, accuracy: " + ", ".join(accuracies))
    return True


def _save(run: Run) -> None:
    """Put the last finished iteration into a checkpoint; where its weights are in one, only what is said beside them is written anew."""
    if run.saved == run.state:
        return
    tree = dataclasses.asdict(run.state)
    if run.saved is not None and run.saved.iteration == run.state.iteration:
        run.checkpoints.note(run.state.iteration, tree)
        run.saved = run.state
        return
    with run.watch.phase("checkpoint"):
        written = run.checkpoints.save(run.state.iteration, run.policy, tree, run.critic)
    run.saved = run.saved if written is None else run.state
    run.log.write("iteration", run.state.iteration, run.watch.lap())


def _keep_rollouts(run: Run, iteration: int, graded: Sequence[GradedGroup], samples: Sequence[Sample], step_of: dict[str, int]) -> None:
    if run.config.logging.rollouts and dist.get_rank() == 0:
        save_rollouts(run.folder / ROLLOUTS, iteration, graded, samples, step_of)


def _record(
    run: Run, rollout: Metrics, stats: Sequence[UpdateStats], critic_stats: Sequence[ValueStats], receipt: RefitReceipt | None
) -> None:
    """Write the figures of the iteration that just ended; those of a refit that was put off follow when it is made."""
    first = run.state.steps - len(stats)
    if len(stats) > 1:
        for index in range(len(stats)):
            run.log.write("step", first + index + 1, step_metrics(stats[index : index + 1], critic_stats[index : index + 1]))
    refit = {} if receipt is None else refit_metrics(receipt)
    metrics = rollout | step_metrics(stats, critic_stats) | refit | run.watch.lap()
    run.log.write("iteration", run.state.iteration, metrics)
    run.log.row(table_cells(run.state.iteration, metrics))


def _advise(run: Run, graded: Sequence[GradedGroup], samples: Sequence[Sample]) -> None:
    """Say what keeps the iteration that just ended from teaching anything."""
    for sentence in run.advice.about(run.state.iteration, graded, samples):
        run.log.say(sentence)


def _count_skips(
    run: Run, skips: Skips, stats: Sequence[UpdateStats | ValueStats], samples: Sequence[Sample], step_of: dict[str, int]
) -> None:
    """Tell of skipped steps of the iteration that just ended."""
    for index, item in enumerate(stats):
        members = [sample for sample in samples if step_of[sample.sample_id] == index]
        warning = skips.count(run.state.steps - len(stats) + index + 1, item, members)
        if warning is not None:
            run.log.say(warning)
