"""How responses are sampled and graded."""

# Without `from __future__ import annotations`: the command line of nemo-run reads the types of fields, not their names.
from dataclasses import dataclass
from typing import Literal

from megatron_r1z.config.checks import check_positive, check_temperature, check_top_p
from megatron_r1z.config.model import Toggle
from megatron_r1z.errors import ConfigError

GradingMode = Literal["strict", "fast", "math_verify"]
RefitWay = Literal["planned", "gathered"]
RewardForm = Literal["auto", "boxed", "answer_tag", "answer_tag_lenient", "think_then_boxed"]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled."""

    prompts_per_iteration: int = 128
    """Questions drawn in an iteration."""
    samples_per_prompt: int = 8
    """Responses to each: the size of a group."""
    max_response_tokens: int = 3000
    """The generation budget, which is also Dr. GRPO's length constant."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at this temperature on both sides."""
    top_p: float = 1.0
    """Nucleus sampling; 1: off."""
    top_k: int = -1
    """-1: off."""
    stop: tuple[str, ...] | None = None
    """Stop strings, kept in the response; a special token ends it too, but is no text. None: those of the template."""
    seed: int = 0
    """Seed of sampling; tokens depend on it, the iteration and the prompt."""
    tensor_parallel_size: int = 1
    """Consecutive ranks that form one engine."""
    kv_cache_bytes: int | Literal["auto"] = "auto"
    """Memory of the key-value cache of one rank. `auto`: what the fullest moment of an iteration leaves of the device, and no more than
    `max_concurrent_sequences` of full length fill; `plan` shows it. Without a GPU 256 MiB."""
    max_concurrent_sequences: int = 256
    """Responses that one engine generates side by side: vLLM's `max_num_seqs`."""
    max_num_batched_tokens: int | Literal["auto"] = "auto"
    """Tokens that the engine computes in one step at most, prompts in pieces among them. `auto`: vLLM's own, 16384 on a GPU of 70 GiB or
    more and 8192 on a smaller one; without a GPU a whole prompt at least."""
    enforce_eager: Toggle = "auto"
    """Have the engine launch its kernels one by one instead of by CUDA graphs. `auto`: without a GPU."""
    enable_prefix_caching: Toggle = "auto"
    """Share keys and values of a prompt among the responses of its group. `auto`: yes. A refit drops them."""
    refit: RefitWay = "planned"
    """How weights reach the engine. `planned`: each rank is sent what it lacks, and digests of both sides are compared. `gathered`: every
    rank gathers whole tensors, which vLLM cuts itself; slow, and nothing is compared, for an engine that the planned way does not know."""

    def __post_init__(self) -> None:
        check_positive(self, "prompts_per_iteration", "samples_per_prompt", "max_response_tokens")
        check_positive(self, "tensor_parallel_size", "max_concurrent_sequences")
        check_positive(self, *(name for name in ("kv_cache_bytes", "max_num_batched_tokens") if getattr(self, name) != "auto"))
        if self.max_num_batched_tokens != "auto" and self.max_num_batched_tokens < self.max_concurrent_sequences:
            raise ConfigError(
                f"rollout.max_num_batched_tokens is {self.max_num_batched_tokens}, less than a token for each of "
                f"rollout.max_concurrent_sequences {self.max_concurrent_sequences}; raise the one or lower the other."
            )
        if not self.temperature > 0:
            raise ConfigError(
                f"rollout.temperature is {self.temperature}; training needs a distribution, so it must be above 0 "
                "(evaluation has its own temperature, which may be 0)."
            )
        check_temperature("rollout", self.temperature)
        if self.top_k != -1 and self.top_k < 1:
            raise ConfigError(f"rollout.top_k is {self.top_k}; it must be at least 1, or -1 for off.")
        check_top_p("rollout", self.top_p)

    @property
    def samples_per_iteration(self) -> int:
        """Responses sampled in one iteration."""
        return self.prompts_per_iteration * self.samples_per_prompt


@dataclass(frozen=True, kw_only=True)
class ExtraReward:
    """A reward function of your own that is added to the reward."""

    function: str
    """`path.py:name`."""
    weight: float = 1.0
    """What its value is multiplied by; below 0 it is a penalty."""

    @property
    def name(self) -> str:
        """What its figures are called: the name of the function."""
        return self.function.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True)
class GradingConfig:
    """How a response becomes a reward."""

    mode: GradingMode = "strict"
    """How an answer is compared with a reference; `fast` and `math_verify` are the paper's grader, mistakes included (docs/grading.md)."""
    reward: RewardForm = "auto"
    """Where the answer is looked for; `auto`: answer tags under the r1 template, boxed otherwise."""
    function: str | None = None
    """A reward function of your own instead, as `path.py:name`."""
    extra: tuple[ExtraReward, ...] = ()
    """Rewards that are added to that one."""
    workers: int = 1
    """Grading processes of each rank."""
    timeout_s: float = 5.0
    """Wall-clock limit of one comparison; the worker is killed and the verdict is `timeout`."""

    def __post_init__(self) -> None:
        check_positive(self, "workers", "timeout_s")
        names = [item.name for item in self.extra]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"grading.extra has two functions called '{twice}'; their figures would collide, rename one.")


def _largest_divisor(number: int, at_most: int) -> int:
    return next(candidate for candidate in range(min(at_most, number), 0, -1) if number % candidate == 0)
