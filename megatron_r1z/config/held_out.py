"""How held-out questions are asked, and what `analyse` asks a base model."""

# Without `from __future__ import annotations`: the command line of nemo-run reads the types of fields, not their names.
from dataclasses import dataclass, field

from megatron_r1z.config.checks import check_not_negative, check_positive, check_sampling
from megatron_r1z.config.sources import DataConfig, QuestionSource, Template, check_names
from megatron_r1z.errors import ConfigError


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
        check_positive(self, "every", "samples")
        check_sampling("evaluation", self.top_p, self.samples, (self.temperature,))
        check_names("evaluation.sets", self.sets)


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
        check_positive(self, "concurrency", "timeout_s", "max_tokens")
        check_not_negative(self, "retries")
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
        check_positive(self, "max_prompt_tokens", "samples")
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
        check_sampling("analysis", self.top_p, self.samples, self.temperatures)

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
