"""The configuration of a run: one tree of frozen records, read from YAML and from `section.field=value`.

What can be refused without opening a file is refused in `__post_init__` of the record it belongs to; what needs the model folder or the
machine, by `preflight.py`. Everything is imported from here, but for `model_checks` (what needs a model's shape) and `yaml_tree`. Standard
library plus the YAML reader, so that a login node without torch can check a run.
"""

from megatron_r1z.config.commands import TRAINING_SECTIONS, AnalyseConfig, AnyConfig, EvaluateConfig, PretrainConfig, TrainConfig
from megatron_r1z.config.held_out import REFLECTION_KEYWORDS, AnalysisConfig, EvaluationConfig, JudgeConfig
from megatron_r1z.config.launch import LAUNCH, Executor, LaunchConfig, SshConfig
from megatron_r1z.config.model import (
    ITEMSIZE,
    Fp8Config,
    Fp8Recipe,
    ModelConfig,
    NumberFormat,
    ParallelConfig,
    PrecisionConfig,
    Recompute,
    SpeedConfig,
    Toggle,
)
from megatron_r1z.config.reading import load_config, load_launch, load_record, make_config
from megatron_r1z.config.rollout import ExtraReward, GradingConfig, GradingMode, RefitWay, RewardForm, RolloutConfig
from megatron_r1z.config.sources import CorpusConfig, DataConfig, QuestionSource, RowSource, Scalar, Template, TextSource
from megatron_r1z.config.training import Algorithm, AlgorithmConfig, CheckpointConfig, KlEstimator, KlPlace, LoggingConfig, OptimizerConfig
from megatron_r1z.config.writing import dump_config, leaves, to_tree

__all__ = [
    "ITEMSIZE",
    "LAUNCH",
    "REFLECTION_KEYWORDS",
    "TRAINING_SECTIONS",
    "Algorithm",
    "AlgorithmConfig",
    "AnalyseConfig",
    "AnalysisConfig",
    "AnyConfig",
    "CheckpointConfig",
    "CorpusConfig",
    "DataConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "Executor",
    "ExtraReward",
    "Fp8Config",
    "Fp8Recipe",
    "GradingConfig",
    "GradingMode",
    "JudgeConfig",
    "KlEstimator",
    "KlPlace",
    "LaunchConfig",
    "LoggingConfig",
    "ModelConfig",
    "NumberFormat",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "PretrainConfig",
    "QuestionSource",
    "Recompute",
    "RefitWay",
    "RewardForm",
    "RolloutConfig",
    "RowSource",
    "Scalar",
    "SpeedConfig",
    "SshConfig",
    "Template",
    "TextSource",
    "Toggle",
    "TrainConfig",
    "dump_config",
    "leaves",
    "load_config",
    "load_launch",
    "load_record",
    "make_config",
    "to_tree",
]
