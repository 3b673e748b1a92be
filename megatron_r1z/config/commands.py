"""What each command reads: one record of sections for each."""

# Without `from __future__ import annotations`: the command line of nemo-run reads the types of fields, not their names.
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from megatron_r1z.config.held_out import AnalysisConfig, EvaluationConfig
from megatron_r1z.config.model import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.config.rollout import GradingConfig, RolloutConfig, _largest_divisor
from megatron_r1z.config.sources import CorpusConfig, DataConfig, Template
from megatron_r1z.config.training import AlgorithmConfig, CheckpointConfig, LoggingConfig, OptimizerConfig
from megatron_r1z.config.writing import leaves
from megatron_r1z.errors import ConfigError


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
        _check_accepted(self)
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

    def __post_init__(self) -> None:
        _check_accepted(self)


AnyConfig = TrainConfig | PretrainConfig | EvaluateConfig | AnalyseConfig
Config = TypeVar("Config", TrainConfig, PretrainConfig, EvaluateConfig, AnalyseConfig)


def _check_engines(parallel: ParallelConfig, rollout: RolloutConfig) -> None:
    if parallel.num_ranks % rollout.tensor_parallel_size:
        raise ConfigError(
            f"rollout.tensor_parallel_size {rollout.tensor_parallel_size} does not divide the {parallel.num_ranks} ranks; "
            "engines are made of consecutive ranks."
        )


def _check_accepted(config: "TrainConfig | PretrainConfig") -> None:
    """Refuse a name of `checkpoint.accept_changes` that is none of a field."""
    known = leaves(config)
    for name in config.checkpoint.accept_changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"checkpoint.accept_changes: there is no field '{name}'; did you mean '{near}'?")
