"""Where questions and texts come from, and how questions are put."""

# Without `from __future__ import annotations`: the command line of nemo-run reads the types of fields, not their names.
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megatron_r1z.config.checks import check_positive
from megatron_r1z.errors import ConfigError

Template = Literal["r1", "qwen_math", "no", "few_shot", "chat"]
Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """One file, or one dataset of the Hugging Face Hub, and which of its rows to use."""

    path: str | None = None
    """File name; `.jsonl`, `.json`, `.csv` (these also `.gz`) or `.parquet`. Either this or `dataset`."""
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
    name: str | None = None
    """What figures and files call it, in letters, digits, `.`, `-` and `_`; null: its file or dataset, with as much of the path as tells
    it from the others. Two sources with figures of their own need one where they are parts of the same file."""

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
        if self.name is not None and not re.fullmatch(r"[\w-][\w.-]*", self.name, re.ASCII):
            raise ConfigError(
                f"{self.section}: {self.label} has the name '{self.name}', after which files and figures are called; use letters, digits, "
                "'.', '-' and '_', the first of them no dot."
            )

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


def check_names(field_name: str, sources: Sequence[RowSource]) -> None:
    """Refuse two sources whose figures would have the same name."""
    given = [source.name for source in sources if source.name is not None]
    places = [os.path.normpath(source.label) if source.path is not None else source.label for source in sources if source.name is None]
    twice = next((text for texts in (given, places) for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{field_name} names {twice} twice; its figures would collide, so give each part a name of its own, such as name: level-1."
        )


@dataclass(frozen=True, kw_only=True)
class QuestionSource(RowSource):
    """One question file or one dataset of the Hugging Face Hub."""

    problem_column: str = "problem"
    """Column of the question: text, or messages of which the user's last one is the question. `a.b` is `b` inside the column `a`."""
    answer_column: str = "answer"
    """Column of the answer: text, a number, or a list of which any is right. Where a row has neither default column, `prompt` and
    `reward_model.ground_truth` take their place."""
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
    """File name; as of questions, or the `.idx` of an indexed dataset of megatron-core (with its `.bin` beside it), of which
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
        check_positive(self, "max_prompt_tokens")
        if (self.template == "few_shot") != (self.shots_path is not None):
            raise ConfigError("data: template few_shot and shots_path go together; set both or neither.")


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
        check_positive(self, "steps", "documents_per_step", "evaluation_every")
        if not self.sources:
            raise ConfigError("corpus.sources is empty; give at least one file or dataset.")
        if self.max_document_tokens < 2:
            raise ConfigError(f"corpus.max_document_tokens is {self.max_document_tokens}; one token predicts nothing, use at least 2.")
        check_names("corpus.evaluation", self.evaluation)
        if self.loss_on == "response":
            self._check_responses()

    def _check_responses(self) -> None:
        indexed = [source.label for source in (*self.sources, *self.evaluation) if source.is_indexed]
        if indexed:
            raise ConfigError(f"corpus.loss_on response needs prompts and responses, and {indexed[0]} has token ids only; use all.")
        if self.long_documents == "split":
            raise ConfigError("corpus.long_documents split would part responses from their prompts; use drop with corpus.loss_on response.")
