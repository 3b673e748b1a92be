"""The objective, the optimizer and what is kept of a run."""

# Without `from __future__ import annotations`: the command line of nemo-run reads the types of fields, not their names.
import dataclasses
from dataclasses import dataclass
from typing import Literal, Self

from megatron_r1z.config.checks import check_not_negative, check_positive
from megatron_r1z.errors import ConfigError

Algorithm = Literal["drgrpo", "grpo", "grpo_remove_std_bias", "grpo_remove_len_bias", "rloo", "token_mean", "reinforce", "ppo"]
KlEstimator = Literal["k1", "k2", "k3"]
KlPlace = Literal["loss", "reward"]


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """The objective and the length of the run."""

    name: Algorithm = "drgrpo"
    """Row of the objective table (docs/algorithms.md)."""
    iterations: int
    """Length of the run."""
    train_batch_size: int = 128
    """Samples of one optimizer step; an iteration makes prompts x samples / this many steps."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 minus this."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 plus this; DAPO's clip-higher: 0.28."""
    dual_clip: float | None = None
    """Where the advantage is negative the ratio counts as at most this (usually 3); off by default."""
    tis_cap: float | None = None
    """Truncated importance sampling: the loss of a token is multiplied by policy over engine probability, at most this (usually 2); off by
    default."""
    kl_coef: float = 0.0
    """Weight of the divergence from the reference model, which is the model that the run starts from (`model`); 0: no reference model."""
    kl_in: KlPlace = "loss"
    """Where that divergence goes: into the loss of each token, or off the reward of each response, before its advantage is taken."""
    kl_estimator: KlEstimator = "k3"
    """How it is estimated from the sampled tokens: k1, k2 or k3 of Schulman (docs/algorithms.md)."""
    entropy_coef: float = 0.0
    """Weight of the entropy of each token's distribution, which is taken off the loss; 0: off."""
    gae_lambda: float = 1.0
    """Decay of generalised advantage estimation under ppo; 1: the rewards to come less the value."""
    value_clip: float = 0.2
    """How far one iteration moves the critic's value of a token under ppo, before its loss stops to fall."""
    mask_truncated: bool = False
    """Responses that ended at the token limit have advantage 0. They stay in the baseline of their group and in the denominator."""
    filter_groups: bool = False
    """Groups whose rewards are all equal, which have no gradient, are not counted in the denominator either."""
    sampling_rounds: int = 1
    """Dynamic sampling: questions are drawn and answered up to so many times in an iteration, until `rollout.prompts_per_iteration` groups
    have rewards that are not all equal; 1: off."""

    def __post_init__(self) -> None:
        check_positive(self, "iterations", "train_batch_size", "sampling_rounds")
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ConfigError(f"algorithm: clip_low {self.clip_low} must be in (0, 1) and clip_high {self.clip_high} above 0.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ConfigError(f"algorithm.dual_clip is {self.dual_clip}; it bounds the ratio from above and must be greater than 1.")
        if self.dual_clip is not None and self.name == "reinforce":
            raise ConfigError("algorithm: reinforce has no ratio, so there is nothing for dual_clip to clip; leave it out.")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ConfigError(f"algorithm.tis_cap is {self.tis_cap}; it must be above 0.")
        check_not_negative(self, "kl_coef", "entropy_coef")
        if self.kl_is_in("reward") and self.filter_groups:
            raise ConfigError(
                f"algorithm: with kl_in reward and kl_coef {self.kl_coef} no group has equal rewards, so filter_groups has none to filter; "
                "leave it out, or set kl_in=loss."
            )
        if not 0 <= self.gae_lambda <= 1:
            raise ConfigError(f"algorithm.gae_lambda is {self.gae_lambda}; it must be between 0 and 1.")
        check_positive(self, "value_clip")
        if self.has_critic and (self.mask_truncated or self.filter_groups or self.sampling_rounds > 1):
            raise ConfigError(
                "algorithm: under ppo every response has advantages and the critic learns from each, so mask_truncated, filter_groups "
                "and sampling_rounds have no meaning; leave them out."
            )

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a critic, not from the rewards of a group."""
        return self.name == "ppo"

    def kl_is_in(self, place: KlPlace) -> bool:
        """Whether there is a reference model, and this is where the divergence from it goes."""
        return self.kl_coef > 0 and self.kl_in == place

    @property
    def has_further_terms(self) -> bool:
        """Whether there is a loss that does not depend on the advantage."""
        return self.kl_is_in("loss") or self.entropy_coef > 0 or self.has_critic


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6
    """Learning rate after warm-up."""
    critic_lr: float = 9e-6
    """That of the critic under ppo; schedule, floor (in proportion) and all else are those of the policy."""
    min_lr: float = 0.0
    """Floor of the decaying schedules."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up: of n the s-th has s / (n + 1) of the learning rate, and the step after them all of it."""
    decay_steps: int | None = None
    """Optimizer steps, those of the warm-up among them, after which a decaying schedule reaches `min_lr`; needed unless constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled; not applied to biases and norms."""
    clip_grad: float = 1.0
    """Bound of the global gradient norm."""
    distributed: bool = False
    """Split optimizer state over data-parallel and context-parallel ranks (Megatron's distributed optimizer)."""
    offload_to_host: bool = False
    """Keep optimizer state in the host's memory and take the step there, on `parallel.threads_per_rank` threads: raise that. Needs a GPU
    and `distributed`. Not run on a GPU yet."""
    max_skipped_steps: int = 3
    """Optimizer steps in a row that are skipped, because a loss or gradient is not finite, before the run stops."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "critic_lr", "eps", "clip_grad", "max_skipped_steps")
        check_not_negative(self, "min_lr", "warmup_steps", "decay_steps", "weight_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas are {list(self.betas)}; each must be at least 0 and below 1.")
        if self.min_lr > self.lr:
            raise ConfigError(f"optimizer.min_lr {self.min_lr} is above optimizer.lr {self.lr}.")
        if self.schedule != "constant":
            self._check_decay()
        if self.offload_to_host and not self.distributed:
            raise ConfigError(
                "optimizer.offload_to_host is a part of Megatron's distributed optimizer; set optimizer.distributed=true too."
            )

    def _check_decay(self) -> None:
        if self.decay_steps is None:
            raise ConfigError(f"optimizer: schedule {self.schedule} needs decay_steps.")
        if self.decay_steps <= self.warmup_steps:
            raise ConfigError(
                f"optimizer: schedule {self.schedule} decays from the end of the warm-up, after {self.warmup_steps} steps, to decay_steps, "
                f"which is {self.decay_steps}; set it to at least {self.warmup_steps + 1}."
            )

    @property
    def of_critic(self) -> Self:
        """The critic's optimizer."""
        return dataclasses.replace(self, lr=self.critic_lr, min_lr=self.min_lr * self.critic_lr / self.lr)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run and how often."""

    every: int = 50
    """Iterations (optimizer steps in `pretrain`) between checkpoints; the last one is always kept."""
    keep: int = 2
    """Older checkpoints are deleted."""
    resume: bool = True
    """Go on from the run folder's latest checkpoint if there is one; false refuses a folder that has one."""
    export: bool = True
    """Write the final policy in Hugging Face format."""
    accept_changes: tuple[str, ...] = ()
    """Fields such as `data.train` or `algorithm.kl_coef` in which a run that goes on may differ from what it was, though they decide what
    run it is (docs/checkpoints.md)."""

    def __post_init__(self) -> None:
        check_positive(self, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where a run leaves its traces."""

    folder: str
    """Run folder: configuration, metrics, tensorboard, checkpoints, export."""
    rollouts: bool = True
    """Keep every response as `rollouts/iter_*.jsonl.zst`."""
