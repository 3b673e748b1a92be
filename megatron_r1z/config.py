"""The configuration of a run: one tree of frozen records, read from YAML and from `section.field=value`.

Standard library plus the YAML reader, so that a login node without torch can check a run. What can be refused without opening a file
is refused in `__post_init__` of the record it belongs to; what needs the model folder or the machine is refused by `preflight.py`.
"""

# Without `from __future__ import annotations`: the command line of nemo-run reads the types of fields, not their names.
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml

from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.topology import Topology
from megatron_r1z.yaml_tree import ConfigTree, merged, read_tree

Template = Literal["r1", "qwen_math", "no", "few_shot", "chat"]
GradingMode = Literal["strict", "fast", "math_verify"]
RefitWay = Literal["planned", "gathered"]
ITEMSIZE = {"bf16": 2, "fp32": 4}
"""Bytes of one element by number format."""
RewardForm = Literal["auto", "boxed", "answer_tag", "answer_tag_lenient", "think_then_boxed"]
Algorithm = Literal["drgrpo", "grpo", "grpo_remove_std_bias", "grpo_remove_len_bias", "rloo", "token_mean", "reinforce", "ppo"]
KlEstimator = Literal["k1", "k2", "k3"]
KlPlace = Literal["loss", "reward"]
Recompute = Literal["none", "selective", "full"]
NumberFormat = Literal["fp32", "bf16"]
Fp8Recipe = Literal["blockwise", "mxfp8", "tensorwise", "delayed"]
Executor = Literal["local", "slurm", "docker", "skypilot", "skypilot_jobs", "dgxcloud", "kubeflow", "lepton"]
Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained."""

    path: str
    """Folder in Hugging Face format: config.json, tokenizer files and, unless `random_init`, safetensors."""
    random_init: bool = False
    """Start from random weights (pre-training from scratch) instead of the folder's."""
    seed: int = 0
    """Seed of the random weights."""
    checkpoint: str | None = None
    """Checkpoint of an earlier run (`.../checkpoints/step_000050`) whose weights are taken instead of the folder's."""

    def __post_init__(self) -> None:
        if self.random_init and self.checkpoint is not None:
            raise ConfigError("model: random_init and checkpoint are two places for the weights to come from; set one.")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the policy is split over ranks; data parallel size is what the rank count leaves."""

    num_ranks: int = 1
    """Ranks that `train` starts on this machine when it is not run under torchrun."""
    threads_per_rank: int = 1
    """OpenMP threads of each rank."""
    tensor_parallel_size: int = 1
    """Ranks that share every matrix; must divide heads, key-value heads and feed-forward size."""
    pipeline_parallel_size: int = 1
    """Ranks that share the layers; must divide their number, or see `pipeline_layers`."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of every sequence, for sequences whose activations do not fit one rank."""
    virtual_pipeline_size: int = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    pipeline_layers: tuple[int, ...] = ()
    """Layers of each model chunk in model order, such as `[7, 9]`; empty: the same for all. Chunk i is on pipeline rank i modulo
    `pipeline_parallel_size`. Fewer at the ends make up for embedding and output layer."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel regions over the tensor-parallel ranks."""
    micro_batch_tokens: int = 4096
    """Upper bound of tokens in one forward pass of one data-parallel rank, which its context-parallel ranks share; a longer sample travels
    alone."""
    pad_sequences: bool = False
    """Pad every sequence of a step to the longest one. For comparisons only: packing is the same maths with less work."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again instead of keeping them. `selective`: those within feed-forward layers, where most
    are; `full`: all but the input of each layer. The same numbers in more time and less memory."""
    offload_layers: int = 0
    """So many layers from the first one on keep their activations in the host's memory until the backward pass needs them. Needs a GPU
    and Transformer Engine, all layers on one pipeline rank, and nothing recomputed."""

    def __post_init__(self) -> None:
        _positive(self, "num_ranks", "threads_per_rank", "tensor_parallel_size", "pipeline_parallel_size")
        _positive(self, "context_parallel_size", "virtual_pipeline_size", "micro_batch_tokens")
        if self.num_ranks % self.model_parallel_size:
            raise ConfigError(
                f"parallel: {self.num_ranks} ranks cannot be split into tensor_parallel_size {self.tensor_parallel_size} x "
                f"pipeline_parallel_size {self.pipeline_parallel_size} x context_parallel_size {self.context_parallel_size}; "
                f"make num_ranks a multiple of {self.model_parallel_size}."
            )
        if self.virtual_pipeline_size > 1 and self.pipeline_parallel_size == 1:
            raise ConfigError("parallel: virtual_pipeline_size > 1 needs pipeline_parallel_size > 1.")
        if self.pipeline_layers and (len(self.pipeline_layers) != self.num_chunks or min(self.pipeline_layers) < 1):
            raise ConfigError(
                f"parallel.pipeline_layers is {list(self.pipeline_layers)}; it must give each of the {self.chunks_in_words} at least "
                "one layer."
            )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ConfigError("parallel: sequence_parallel needs tensor_parallel_size > 1.")
        if self.offload_layers < 0:
            raise ConfigError(f"parallel.offload_layers is {self.offload_layers}; it must be at least 0.")
        if self.offload_layers and (self.pipeline_parallel_size > 1 or self.recompute != "none"):
            raise ConfigError(
                f"parallel.offload_layers is {self.offload_layers}, which Megatron takes with pipeline_parallel_size 1 and recompute none; "
                f"they are {self.pipeline_parallel_size} and {self.recompute}."
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that take a micro-batch together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def topology(self) -> Topology:
        """The degrees as layouts know them."""
        return Topology(
            self.num_ranks,
            self.tensor_parallel_size,
            self.pipeline_parallel_size,
            self.virtual_pipeline_size,
            self.context_parallel_size,
            chunk_layers=self.pipeline_layers,
        )

    @property
    def num_chunks(self) -> int:
        """Model chunks of the whole model."""
        return self.pipeline_parallel_size * self.virtual_pipeline_size

    @property
    def chunks_in_words(self) -> str:
        """What messages call the model chunks."""
        sizes = f"pipeline_parallel_size {self.pipeline_parallel_size} x virtual_pipeline_size {self.virtual_pipeline_size}"
        return f"{self.num_chunks} model chunks ({sizes})"


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """How `precision.policy: fp8` computes the matrix products of the layers; it has no effect otherwise (docs/fp8.md)."""

    recipe: Fp8Recipe = "blockwise"
    """Where scales come from. `blockwise`: from blocks of 1 x 128 and 128 x 128 (Hopper and newer, and emulated without a GPU); `mxfp8`:
    from 32 elements (Blackwell); `tensorwise`: from the tensor; `delayed`: from the tensor's history."""
    first_layers_bf16: int = 0
    """So many layers at the beginning stay in bf16."""
    last_layers_bf16: int = 0
    """So many layers at the end stay in bf16."""

    def __post_init__(self) -> None:
        if self.first_layers_bf16 < 0 or self.last_layers_bf16 < 0:
            raise ConfigError(
                f"precision.fp8 leaves {self.first_layers_bf16} layers at the beginning and {self.last_layers_bf16} at the end in bf16; "
                "both must be at least 0."
            )
        if self.recipe == "delayed" and self.first_layers_bf16 + self.last_layers_bf16:
            raise ConfigError(
                "precision.fp8: with recipe delayed all layers share one FP8 context; set first_layers_bf16 and last_layers_bf16 to 0."
            )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    policy: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Weights and activations of the policy; bf16 keeps fp32 master weights and fp32 gradients. `fp8`: as bf16, but the matrix products of
    the layers take FP8 operands; embedding, output layer, norms, router and attention stay in bf16."""
    engine: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Weights and activations of the engine. `fp8`: the matrices of the layers in FP8 blocks, the rest in bf16."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """See [precision.fp8](#precisionfp8)."""

    @property
    def policy_format(self) -> NumberFormat:
        """Of the policy's parameters and of all that is not an operand in FP8."""
        return "bf16" if self.policy == "fp8" else self.policy

    def bf16_layers(self, num_layers: int) -> set[int]:
        """Layers that an FP8 policy computes in bf16."""
        last = num_layers - self.fp8.last_layers_bf16
        return {layer for layer in range(num_layers) if self.policy == "fp8" and not self.fp8.first_layers_bf16 <= layer < last}

    @property
    def engine_format(self) -> NumberFormat:
        """Of the engine's parameters that are not in FP8, and of its activations."""
        return "bf16" if self.engine == "fp8" else self.engine


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """One file, or one dataset of the Hugging Face Hub, and which of its rows to use."""

    path: str | None = None
    """File name; `.jsonl` or `.parquet`. Either this or `dataset`."""
    dataset: str | None = None
    """Instead of `path`: a name on the Hugging Face Hub such as `openai/gsm8k`, or a folder that holds a dataset."""
    subset: str | None = None
    """Configuration of `dataset`, such as `main`, where it has several."""
    split: str = "train"
    """Split of `dataset`."""
    weight: float = 1.0
    """Relative share of the draws."""
    where: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)
    """Use only rows whose columns have one of these values: `{level: [3, 4, 5], subject: Algebra}`."""
    limit: int | None = None
    """Use only this many rows (from `offset`, of those that `where` leaves)."""
    offset: int = 0
    """Skip this many rows first (of those that `where` leaves)."""

    section: ClassVar[str]
    """Of the configuration, for messages."""

    def __post_init__(self) -> None:
        self._check_place()
        if not self.weight > 0:
            raise ConfigError(f"{self.section}: weight of {self.label} is {self.weight}; it must be above 0.")
        if self.offset < 0 or (self.limit is not None and self.limit < 1):
            raise ConfigError(
                f"{self.section}: {self.label} has offset {self.offset} and limit {self.limit}; use at least 0 and at least 1."
            )
        for column, values in self.where.items():
            if not values:
                raise ConfigError(f"{self.section}: where of {self.label} allows no value of '{column}'; list at least one.")

    def _check_place(self) -> None:
        if self.path is None and self.dataset is None:
            raise ConfigError(
                f"{self.section}: a source has neither path nor dataset; give it a file, or a dataset of the Hugging Face Hub."
            )
        if self.path is not None and self.dataset is not None:
            raise ConfigError(f"{self.section}: a source has path {self.path} and dataset {self.dataset}; set one of them to null.")
        if self.path is not None and (self.subset is not None or self.split != "train"):
            raise ConfigError(
                f"{self.section}: {self.path} is a file, and subset and split are parts of a dataset; choose rows of a file by where."
            )

    @property
    def label(self) -> str:
        """What messages call it: the file, or `openai/gsm8k (main, test)`."""
        if self.path is not None:
            return self.path
        return f"{self.dataset} ({self.split})" if self.subset is None else f"{self.dataset} ({self.subset}, {self.split})"


@dataclass(frozen=True, kw_only=True)
class QuestionSource(RowSource):
    """One question file (JSONL or Parquet) or one dataset of the Hugging Face Hub."""

    problem_column: str = "problem"
    """Column of the question."""
    answer_column: str = "answer"
    """Column of the answer: text, a number, or a list of which any is right."""
    answer_after: str | None = None
    """The answer is what follows the last occurrence of this text, such as `"####"` (quoted, as YAML takes # for a comment)."""

    section: ClassVar[str] = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_after == "":
            raise ConfigError(f"data: answer_after of {self.label} is empty; write the text behind which the answer stands, or null.")


@dataclass(frozen=True, kw_only=True)
class TextSource(RowSource):
    """One file of text (JSONL, Parquet or megatron-core's token ids) or one dataset of the Hugging Face Hub."""

    path: str | None = None
    """File name; `.jsonl`, `.parquet`, or the `.idx` of an indexed dataset of megatron-core (with its `.bin` beside it), of which
    `offset` and `limit` choose documents. Either this or `dataset`."""
    text_column: str = "text"
    """Column of a plain text; read where a row has neither of the other two."""
    prompt_column: str = "prompt"
    """Column of a prompt, with `response_column`."""
    response_column: str = "response"
    """Column of the response to it."""

    section: ClassVar[str] = "corpus"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_indexed and self.where:
            raise ConfigError(f"corpus: {self.path} holds token ids without columns; remove where, or choose by offset and limit.")

    @property
    def is_indexed(self) -> bool:
        """Whether `path` is the `.idx` of an indexed dataset of megatron-core."""
        return self.path is not None and self.path.endswith(".idx")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Questions and how they are put to the model."""

    train: tuple[QuestionSource, ...] = ()
    """Question files to train on, mixed by weight; `evaluate` needs none."""
    template: Template = "r1"
    """`r1`, `qwen_math` and `no` are the paper's; `few_shot` puts the shots of `shots_path` first; `chat` is the model's own."""
    shots_path: str | None = None
    """Text file that precedes the question under `few_shot`; it contains `{question}` once."""
    system_prompt: str | None = None
    """System turn under `chat`."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""
    seed: int = 0
    """Seed of the order of the questions."""

    def __post_init__(self) -> None:
        _positive(self, "max_prompt_tokens")
        if (self.template == "few_shot") != (self.shots_path is not None):
            raise ConfigError("data: template few_shot and shots_path go together; set both or neither.")


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
    """Stop strings, kept in the response. None: those of the template."""
    seed: int = 0
    """Seed of sampling; tokens depend on it, the iteration and the prompt."""
    tensor_parallel_size: int = 1
    """Consecutive ranks that form one engine."""
    kv_cache_bytes: int = 256 << 20
    """Memory of the key-value cache of one rank."""
    max_concurrent_sequences: int = 256
    """Responses that one engine generates side by side."""
    refit: RefitWay = "planned"
    """How weights reach the engine. `planned`: each rank is sent what it lacks, and digests of both sides are compared. `gathered`: every
    rank gathers whole tensors, which vLLM cuts itself; slow, and nothing is compared, for an engine that the planned way does not know."""

    def __post_init__(self) -> None:
        _positive(self, "prompts_per_iteration", "samples_per_prompt", "max_response_tokens")
        _positive(self, "tensor_parallel_size", "kv_cache_bytes", "max_concurrent_sequences")
        if not self.temperature > 0:
            raise ConfigError(
                f"rollout.temperature is {self.temperature}; training needs a distribution, so it must be above 0 "
                "(evaluation has its own temperature, which may be 0)."
            )
        if self.top_k != -1 and self.top_k < 1:
            raise ConfigError(f"rollout.top_k is {self.top_k}; it must be at least 1, or -1 for off.")
        _check_top_p("rollout", self.top_p)

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
        _positive(self, "workers", "timeout_s")
        names = [item.name for item in self.extra]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"grading.extra has two functions called '{twice}'; their figures would collide, rename one.")


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
        _positive(self, "iterations", "train_batch_size", "sampling_rounds")
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ConfigError(f"algorithm: clip_low {self.clip_low} must be in (0, 1) and clip_high {self.clip_high} above 0.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ConfigError(f"algorithm.dual_clip is {self.dual_clip}; it bounds the ratio from above and must be greater than 1.")
        if self.dual_clip is not None and self.name == "reinforce":
            raise ConfigError("algorithm: reinforce has no ratio, so there is nothing for dual_clip to clip; leave it out.")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ConfigError(f"algorithm.tis_cap is {self.tis_cap}; it must be above 0.")
        _not_negative(self, "kl_coef", "entropy_coef")
        if self.kl_is_in("reward") and self.filter_groups:
            raise ConfigError(
                f"algorithm: with kl_in reward and kl_coef {self.kl_coef} no group has equal rewards, so filter_groups has none to filter; "
                "leave it out, or set kl_in=loss."
            )
        if not 0 <= self.gae_lambda <= 1:
            raise ConfigError(f"algorithm.gae_lambda is {self.gae_lambda}; it must be between 0 and 1.")
        _positive(self, "value_clip")
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
    """Optimizer steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """Optimizer steps after which a decaying schedule reaches `min_lr`; needed unless constant."""
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
        _positive(self, "lr", "critic_lr", "eps", "clip_grad", "max_skipped_steps")
        _not_negative(self, "min_lr", "warmup_steps", "decay_steps", "weight_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas are {list(self.betas)}; each must be at least 0 and below 1.")
        if self.min_lr > self.lr:
            raise ConfigError(f"optimizer.min_lr {self.min_lr} is above optimizer.lr {self.lr}.")
        if self.schedule != "constant" and self.decay_steps is None:
            raise ConfigError(f"optimizer: schedule {self.schedule} needs decay_steps.")
        if self.offload_to_host and not self.distributed:
            raise ConfigError(
                "optimizer.offload_to_host is a part of Megatron's distributed optimizer; set optimizer.distributed=true too."
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

    def __post_init__(self) -> None:
        _positive(self, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out accuracy during training."""

    sets: tuple[QuestionSource, ...] = ()
    """Held-out question files; each gets figures of its own."""
    every: int = 16
    """Iterations between evaluations; also before the first and after the last iteration."""
    samples: int = 1
    """Responses to each question."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Nucleus sampling; 1: off."""

    def __post_init__(self) -> None:
        _positive(self, "every", "samples")
        _check_sampling("evaluation", self.top_p, self.samples, (self.temperature,))
        paths = [source.label for source in self.sets]
        if len(set(paths)) < len(paths):
            raise ConfigError(
                f"evaluation.sets names {next(path for path in paths if paths.count(path) > 1)} twice; its figures would collide."
            )


REFLECTION_KEYWORDS = (
    *("recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "reevaluation", "re-examine", "reexamine", "reconsider", "reanalyze"),
    *("double-check", "check again", "think again", "verify again", "go over the steps"),
)
"""Signs of self-reflection in the base-model analysis of arXiv 2503.20783; its authors left "wait" and "try again" out as too noisy."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A language model that reads the responses, behind any server of OpenAI's chat completions."""

    url: str | None = None
    """Address of the server, such as `http://localhost:8000/v1` of `vllm serve`; null: no judge."""
    model: str = "gpt-4o-mini-2024-07-18"
    """Name of the model at that server; the default is the paper's judge."""
    api_key_env: str | None = None
    """Environment variable that holds the key; null: the server asks for none."""
    concurrency: int = 16
    """Requests side by side."""
    timeout_s: float = 120.0
    """Limit of one request."""
    retries: int = 4
    """Repetitions of a request that failed, with growing waits, before the command ends."""
    max_tokens: int = 300
    """Longest reply."""

    def __post_init__(self) -> None:
        _positive(self, "concurrency", "timeout_s", "max_tokens")
        _not_negative(self, "retries")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"analysis.judge.url is {self.url}; it must start with http:// or https://, as http://localhost:8000/v1 does."
            )


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """What `analyse` asks the model: every question under every template at every temperature."""

    questions: QuestionSource
    """The questions."""
    level_column: str | None = None
    """Column of a question's level; null: nothing is told by level."""
    templates: tuple[Template, ...] = ("no", "r1", "qwen_math")
    """As `data.template`; the paper's three by default."""
    shots_path: str | None = None
    """As `data.shots_path`, for `few_shot`."""
    system_prompt: str | None = None
    """As `data.system_prompt`, for `chat`."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""
    temperatures: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """The paper's by default; 0: greedy."""
    top_p: float = 1.0
    """Nucleus sampling; 1: off."""
    samples: int = 8
    """Responses to each question under each template at each temperature."""
    k: tuple[int, ...] = ()
    """Which pass@k are told; empty: 1, 2, 4 and so on up to `samples`."""
    keywords: tuple[str, ...] = REFLECTION_KEYWORDS
    """A response that contains one of them, in whatever case, shows self-reflection; the paper's by default."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Reads the responses too, where it has a `url`."""

    def __post_init__(self) -> None:
        _positive(self, "max_prompt_tokens", "samples")
        for name in ("templates", "temperatures", "keywords", "k"):
            self._check_list(name)
        if any(not 1 <= k <= self.samples for k in self.k):
            raise ConfigError(
                f"analysis.k is {list(self.k)}; each must be at least 1 and at most analysis.samples, which is {self.samples}."
            )
        if "" in self.keywords:
            raise ConfigError("analysis.keywords has an empty one, which every response contains; remove it.")
        if ("few_shot" in self.templates) != (self.shots_path is not None):
            raise ConfigError("analysis: template few_shot and shots_path go together; give both or neither.")
        _check_sampling("analysis", self.top_p, self.samples, self.temperatures)

    def _check_list(self, name: str) -> None:
        values = getattr(self, name)
        if not values and name != "k":
            raise ConfigError(f"analysis.{name} is empty; give at least one.")
        if len(set(values)) < len(values):
            raise ConfigError(f"analysis.{name} names {next(value for value in values if values.count(value) > 1)} twice; remove one.")

    def evaluation(self, temperature: float) -> EvaluationConfig:
        """How the questions are asked at one temperature."""
        return EvaluationConfig(sets=(self.questions,), samples=self.samples, temperature=temperature, top_p=self.top_p)

    def data(self, template: Template) -> DataConfig:
        """How the questions are put under one template."""
        shots_path = self.shots_path if template == "few_shot" else None
        return DataConfig(
            template=template, shots_path=shots_path, system_prompt=self.system_prompt, max_prompt_tokens=self.max_prompt_tokens
        )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where a run leaves its traces."""

    folder: str
    """Run folder: configuration, metrics, tensorboard, checkpoints, export."""
    rollouts: bool = True
    """Keep every response as `rollouts/iter_*.jsonl.zst`."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Text for `pretrain`."""

    sources: tuple[TextSource, ...] = ()
    """Text to train on, mixed by weight: a draw is a document."""
    max_document_tokens: int = 2048
    """A longer document is treated as `long_documents` says."""
    long_documents: Literal["drop", "split"] = "drop"
    """`drop` and count them, or `split` them into documents of at most `max_document_tokens` that do not see one another."""
    steps: int
    """Optimizer steps."""
    documents_per_step: int = 64
    """Documents of one optimizer step."""
    loss_on: Literal["all", "response"] = "all"
    """`response` needs prompt/response rows."""
    seed: int = 0
    """Seed of the order of the documents."""
    evaluation: tuple[TextSource, ...] = ()
    """Held-out text; each source is used whole and has a loss of its own."""
    evaluation_every: int = 100
    """Steps between evaluations; there is one before the first step and one after the last as well."""

    def __post_init__(self) -> None:
        _positive(self, "steps", "documents_per_step", "evaluation_every")
        if not self.sources:
            raise ConfigError("corpus.sources is empty; give at least one file or dataset.")
        if self.max_document_tokens < 2:
            raise ConfigError(f"corpus.max_document_tokens is {self.max_document_tokens}; one token predicts nothing, use at least 2.")
        if self.loss_on == "response":
            self._check_responses()

    def _check_responses(self) -> None:
        indexed = [source.label for source in (*self.sources, *self.evaluation) if source.is_indexed]
        if indexed:
            raise ConfigError(f"corpus.loss_on response needs prompts and responses, and {indexed[0]} has token ids only; use all.")
        if self.long_documents == "split":
            raise ConfigError("corpus.long_documents split would part responses from their prompts; use drop with corpus.loss_on response.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A reinforcement learning run: `megatron-r1z train`."""

    model: ModelConfig
    data: DataConfig
    algorithm: AlgorithmConfig
    logging: LoggingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if not self.data.train:
            raise ConfigError("data.train is empty; give at least one question file.")
        _check_engines(self.parallel, self.rollout)
        samples, step = self.rollout.samples_per_iteration, self.algorithm.train_batch_size
        if samples % step:
            raise ConfigError(
                f"algorithm.train_batch_size {step} does not divide the {samples} samples of an iteration "
                f"({self.rollout.prompts_per_iteration} prompts x {self.rollout.samples_per_prompt}); "
                f"the largest that does below it is {_largest_divisor(samples, step)}."
            )
        if self.rollout.samples_per_prompt == 1 and not self.algorithm.has_critic:
            raise ConfigError("an advantage compares the samples of a prompt; rollout.samples_per_prompt is 1 and must be at least 2.")

    @property
    def max_model_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens


TRAINING_SECTIONS = ("algorithm", "optimizer", "checkpoint")
"""Sections of a training run's file that an evaluation has no use for."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation of a model folder or checkpoint: `megatron-r1z evaluate`. A training run's file will do."""

    model: ModelConfig
    evaluation: EvaluationConfig
    logging: LoggingConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)

    def __post_init__(self) -> None:
        if not self.evaluation.sets:
            raise ConfigError("evaluation.sets is empty; give at least one question file.")
        if self.model.random_init:
            raise ConfigError("model.random_init is true; an evaluation needs the weights of model.path or of model.checkpoint.")
        _check_engines(self.parallel, self.rollout)

    @property
    def folder(self) -> Path:
        """Where the results go: `evaluation` in the run folder."""
        return Path(self.logging.folder) / "evaluation"

    @property
    def max_model_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens


@dataclass(frozen=True, kw_only=True)
class AnalyseConfig:
    """An analysis of a base model: `megatron-r1z analyse`."""

    model: ModelConfig
    analysis: AnalysisConfig
    logging: LoggingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)

    def __post_init__(self) -> None:
        for template in self.analysis.templates:
            self.evaluation(template, self.analysis.temperatures[0])

    @property
    def folder(self) -> Path:
        """Where the results go: `analysis` in the run folder."""
        return Path(self.logging.folder) / "analysis"

    def evaluation(self, template: Template, temperature: float) -> EvaluateConfig:
        """The same questions under one template at one temperature, as an evaluation."""
        return EvaluateConfig(
            model=self.model,
            evaluation=self.analysis.evaluation(temperature),
            logging=self.logging,
            data=self.analysis.data(template),
            parallel=self.parallel,
            precision=self.precision,
            rollout=self.rollout,
            grading=self.grading,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Next-token training on text: `megatron-r1z pretrain`."""

    model: ModelConfig
    corpus: CorpusConfig
    logging: LoggingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True, kw_only=True)
class SshConfig:
    """A login node that `launch` submits from; its folder must be seen by the nodes of the job."""

    host: str
    """Name of the login node."""
    user: str
    """User there."""
    folder: str
    """Folder there for the files of jobs."""
    identity: str | None = None
    """Private key; without it nemo-run asks for a password."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where `launch` starts a run, and how. A cluster file may have this section too; what the run's file says goes before it."""

    executor: Executor = "local"
    """`local`: torchrun on this machine; the others are nemo-run's executors of that name."""
    ranks_per_node: int | None = None
    """Default: the devices of a node of the cluster file; without one, all ranks are on one node."""
    hours: float = 4.0
    """Time limit of a Slurm job. Five minutes before it, the ranks are told to save a checkpoint and end."""
    restarts: int = 0
    """How often the job is started again after it failed or came to its time limit; it goes on from its last checkpoint."""
    folder: str | None = None
    """Folder of the job that the run's relative paths start from; default: the current one."""
    environment: str | None = None
    """Virtual environment of the job; default: `.venv` of the current folder, where there is one and no container."""
    container: str | None = None
    """Image of the job, which then brings the libraries along. Slurm needs pyxis for it."""
    mounts: tuple[str, ...] = ()
    """What the container sees of the machine, as `/outside:/inside`."""
    variables: Mapping[str, Scalar] = field(default_factory=dict)
    """Environment variables of the job."""
    setup: tuple[str, ...] = ()
    """Shell lines that come before the ranks, such as `module load cuda`. Slurm and SkyPilot have a place for them."""
    ssh: SshConfig | None = None
    """Submit to Slurm on another machine."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of nemo-run's executor by its own names, such as `{account: me, partition: h100}` for Slurm."""

    def __post_init__(self) -> None:
        _positive(self, "hours")
        _not_negative(self, "restarts")
        if self.ranks_per_node is not None:
            _positive(self, "ranks_per_node")
        if self.executor == "local":
            self._refuse("container", "mounts", "setup", why="a local run has the environment that it is started in")
        if self.container is None:
            self._refuse("mounts", why="there is no container")
        elif self.environment is not None:
            raise ConfigError("launch: environment and container are two places for the libraries to come from; set one.")
        if self.executor != "slurm":
            self._refuse("ssh", why=f"executor {self.executor} has no login node")

    def _refuse(self, *names: str, why: str) -> None:
        for name in names:
            if getattr(self, name):
                raise ConfigError(f"launch.{name} is set, but {why}; remove it, or choose another launch.executor.")


LAUNCH = "launch"
"""The section of a file that only `launch` reads."""

AnyConfig = TrainConfig | PretrainConfig | EvaluateConfig | AnalyseConfig
Config = TypeVar("Config", TrainConfig, PretrainConfig, EvaluateConfig, AnalyseConfig)
Record = TypeVar("Record")


def load_config(kind: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read YAML at `path` and the files it builds on (`base`), apply `section.field=value` overrides and check everything.

    Raises:
        ConfigError: one sentence with the file, the key and, for an unknown key, the nearest known one.
    """
    source, overridden = _read(path, overrides)
    tree = source.values
    _make_placed(LaunchConfig, tree.pop(LAUNCH, {}), source, overridden, LAUNCH)
    if kind is EvaluateConfig:
        tree = {name: section for name, section in tree.items() if name not in TRAINING_SECTIONS}
    return _make_placed(kind, tree, source, overridden)


def load_launch(path: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> LaunchConfig:
    """Read the `launch` section of the YAML at `path`; what it does not say is taken from `defaults` first.

    Raises:
        ConfigError: one sentence with the file and the key.
    """
    source, overridden = _read(path, overrides)
    section = source.values.get(LAUNCH, {})
    if defaults and isinstance(section, Mapping):
        section = merged(defaults, section)
    return _make_placed(LaunchConfig, section, source, overridden, LAUNCH)


def load_record(kind: type[Record], path: str | Path) -> Record:
    """Read any frozen record from YAML at `path` and the files it builds on.

    Raises:
        ConfigError: one sentence with the file, the key and, for an unknown key, the nearest known one.
    """
    source = read_tree(path)
    return _make_placed(kind, source.values, source, ())


def make_config(kind: type[Config], tree: Mapping[str, Any]) -> Config:
    """Build and check a configuration from nested mappings."""
    return typing.cast(Config, _build(kind, tree, ""))


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[ConfigTree, list[str]]:
    """A file with the overrides in its values, and the dotted keys of those."""
    source = read_tree(path)
    return source, [_apply_override(source.values, override) for override in overrides]


def _make_placed(kind: type[Record], tree: Any, source: ConfigTree, overridden: Sequence[str], where: str = "") -> Record:
    """Build a record, that of section `where`; what is wrong is said with the file that it stands in."""
    try:
        return typing.cast(Record, _build(kind, tree, where))
    except _ValueError as error:
        raise ConfigError(f"{_place(source, error.key, overridden)}{error}") from error


def to_tree(config: Any) -> Any:
    """The inverse of `make_config`: plain mappings, lists and scalars, every field present."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {item.name: to_tree(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_tree(item) for key, item in config.items()}
    if isinstance(config, tuple):
        return [to_tree(item) for item in config]
    return config


def dump_config(config: AnyConfig) -> str:
    """The resolved configuration as YAML; values that differ from their default carry `# default: ...`."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        record = getattr(config, section.name)
        lines.append(f"{section.name}:")
        for item in dataclasses.fields(record):
            value = getattr(record, item.name)
            default = _default(item)
            differs = default is not MISSING and default != value
            lines.append(f"  {item.name}: {_flow(value)}" + (f"  # default: {_flow(default)}" if differs else ""))
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """One line of YAML."""
    text = yaml.safe_dump(to_tree(value), default_flow_style=True, width=1_000_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


class _ValueError(ConfigError):
    """A value that cannot be, and the dotted key of the field or section that it is about."""

    def __init__(self, key: str, sentence: str) -> None:
        super().__init__(sentence)
        self.key = key


def _place(source: ConfigTree, key: str, overridden: Sequence[str]) -> str:
    """The files that a message is about, as its beginning; nothing where the command line has a say in it."""
    if any(not key or name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in overridden):
        return ""
    return " with ".join(map(str, source.files(key) or (source.path,))) + ": "


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Change a value of the tree; returns its dotted key."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"'{override}' is not an override; write section.field=value.")
    node: Any = tree
    *parents, last = key.split(".")
    for name in parents:
        node = _child(node, name, key)
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: {value!r} is not valid YAML; lists are written [a, b].") from error
    if isinstance(node, list):
        node[_index(node, last, key)] = parsed
    else:
        node[last] = parsed
    return key


def _child(node: Any, name: str, key: str) -> Any:
    child = node[_index(node, name, key)] if isinstance(node, list) else node.setdefault(name, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {key}: '{name}' is a value, not a section.")
    return child


def _index(node: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"override {key}: '{name}' is not the number of one of {len(node)} entries (from 0).")
    return int(name)


def _build(kind: Any, value: Any, where: str) -> Any:
    """Convert a YAML value to the annotated type `kind`; `where` is the dotted key for messages."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return _build_union(arguments, value, where)
    if origin is Mapping:
        return _build_mapping(arguments, value, where)
    if origin is Literal:
        return _build_choice(arguments, value, where)
    if origin is tuple:
        return _build_tuple(arguments, value, where)
    return _build_scalar(kind, value, where)


def _build_record(kind: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _ValueError(where, f"{where or 'the configuration'} must be a section of fields, not {value!r}.")
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)[0]
            raise _ValueError(f"{prefix}{key}", f"unknown key '{prefix}{key}'; did you mean '{prefix}{near}'?")
    missing = [name for name, item in fields.items() if name not in value and _default(item) is MISSING]
    if missing:
        raise _ValueError(where, f"'{prefix}{missing[0]}' is missing; it has no default.")
    values = {key: _build(hints[key], item, f"{prefix}{key}") for key, item in value.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise _ValueError(where, str(error)) from error


def _build_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [argument for argument in arguments if argument is not type(None)]
    if len(kinds) == 1:
        return _build(kinds[0], value, where)
    if not isinstance(value, tuple(kinds)):
        raise _ValueError(where, f"{where} must be of type {' or '.join(kind.__name__ for kind in kinds)}, not {value!r}.")
    return value


def _build_mapping(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    """Values by name; where they are lists, a value alone stands for a list of one."""
    kind = arguments[1]
    lists = typing.get_origin(kind) is tuple
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        example = "{name: [a, b]}" if lists else "{name: value}"
        raise _ValueError(where, f"{where} must be a mapping from names to values, such as {example}, not {value!r}.")
    if kind is Any:
        return dict(value)
    listed = {key: [item] if lists and not isinstance(item, list | tuple) else item for key, item in value.items()}
    return {key: _build(kind, item, f"{where}.{key}") for key, item in listed.items()}


def _build_choice(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is False and "no" in choices:  # YAML 1.1 reads a bare `no` as false
        value = "no"
    if value not in choices:
        raise _ValueError(where, f"{where} is {value!r}; it must be one of {', '.join(map(str, choices))}.")
    return value


def _build_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _ValueError(where, f"{where} must be a list, not {value!r}.")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise _ValueError(where, f"{where} needs {len(arguments)} entries, not {len(value)}.")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    return tuple(_build(kind, item, f"{where}.{index}") for index, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _build_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-6 as text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise _ValueError(where, f"{where} must be of type {kind.__name__}, not {value!r}.")
    return value


def _check_engines(parallel: ParallelConfig, rollout: RolloutConfig) -> None:
    if parallel.num_ranks % rollout.tensor_parallel_size:
        raise ConfigError(
            f"rollout.tensor_parallel_size {rollout.tensor_parallel_size} does not divide the {parallel.num_ranks} ranks; "
            "engines are made of consecutive ranks."
        )


def _positive(record: Any, *names: str) -> None:
    _check_range(record, names, "above 0", lambda value: value > 0)


def _not_negative(record: Any, *names: str) -> None:
    _check_range(record, names, "at least 0", lambda value: value is None or value >= 0)


def _check_top_p(section: str, top_p: float) -> None:
    if not 0 < top_p <= 1:
        raise ConfigError(f"{section}.top_p is {top_p}; it must be above 0 and at most 1.")


def _check_sampling(section: str, top_p: float, samples: int, temperatures: Sequence[float]) -> None:
    """How held-out questions are asked: greedily, or with a temperature."""
    _check_top_p(section, top_p)
    for temperature in temperatures:
        if not temperature >= 0:  # so that nan does not pass
            raise ConfigError(f"{section} has temperature {temperature}; it must be at least 0.")
    if samples > 1 and 0 in temperatures:
        raise ConfigError(
            f"{section}.samples is {samples} at temperature 0, where all responses to a question are the same; set a temperature."
        )


def _check_range(record: Any, names: Sequence[str], wanted: str, holds: Callable[[Any], bool]) -> None:
    for name in names:
        if not holds(getattr(record, name)):  # so that nan does not pass
            section = type(record).__name__.removesuffix("Config").lower()
            raise ConfigError(f"{section}.{name} is {getattr(record, name)}; it must be {wanted}.")


def _largest_divisor(number: int, at_most: int) -> int:
    return next(candidate for candidate in range(min(at_most, number), 0, -1) if number % candidate == 0)
