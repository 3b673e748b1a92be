"""Questions: their sources, the templates that put them to the model, and the resumable order in which they are drawn.

Standard library only; transformers, pyarrow and datasets are imported where a tokenizer, a Parquet file or a dataset is opened.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_r1z.config import DataConfig, QuestionSource, RowSource
from megatron_r1z.data.fingerprint import RowsMark, digest_texts
from megatron_r1z.data.order import SeededStream
from megatron_r1z.data.rows import Row, is_one_of, matches, parse_answers, scan_rows, split_suffixes
from megatron_r1z.errors import ConfigError, DataError, MissingExtraError
from megatron_r1z.protocols import Stop
from megatron_r1z.types import Prompt

PLACEHOLDER = "{question}"
SYSTEM, USER = "system", "user"
"""Roles of messages."""

TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "r1": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
        "The Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
        "i.e., <think> reasoning process here </think> <answer> answer here </answer>.\nUser: {question}\nAssistant: <think>",
        ("</answer>",),
    ),
    "qwen_math": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        (),
    ),
    "no": (PLACEHOLDER, ()),
}
"""Text and stop strings of the templates of arXiv 2503.20783, byte for byte; the r1 response starts inside the thought."""

FEW_SHOT_STOP = ("\n",)
"""The shots answer in one line, so the response ends with it."""

DEFAULT_COLUMNS = (QuestionSource.problem_column, QuestionSource.answer_column)
MESSAGES_COLUMNS = ("prompt", "reward_model.ground_truth")
"""Question and answer in the layout of verl, which most data sets for reinforcement learning have: a file with these columns and without
the default ones needs no column names."""


class Tokenizer(Protocol):
    """What this package needs of a transformers tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """An object whose `input_ids` holds one list of token ids per text."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """The conversation as text, up to where the assistant's turn starts."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a question file or a dataset.

    >>> Question("asdiv/17", "What is 1 + 1?", ("2",), "asdiv").source
    'asdiv'
    """

    question_id: str
    """`<source>/<row>`, the row counted from 0 in the whole file or split."""
    problem: str
    answers: tuple[str, ...]
    """Any of them is right."""
    source: str
    messages: tuple[Message, ...] = ()
    """Where the row holds a conversation: all of it, its last turn being `problem`."""
    where: str = field(default="", compare=False)
    """File and line, for messages."""


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of one source."""

    name: str
    questions: list[Question]


@dataclass(frozen=True, slots=True)
class Reading:
    """What became of the rows of one source: those before `offset` and behind `limit` are in none of the three."""

    questions: list[Question]
    faults: list[str]
    """One sentence for each unfit row, with its place and what is wrong."""
    num_filtered: int
    """Rows that `where` leaves out."""


@dataclass(frozen=True, slots=True)
class Template:
    """How a question is put to the model and where its response ends."""

    name: str
    stop: tuple[str, ...]
    """Stop strings, kept in the response."""
    render: Callable[[str], str]
    """From the question to the text of the prompt."""
    add_special_tokens: bool = True
    """Begin with what the tokenizer puts before a text (BOS); False where the text holds its own."""
    render_messages: Callable[[Sequence[Message]], str] | None = None
    """The same from a conversation, all but its system turn as it is; None where its last turn is put like any other question."""
    keeps_system: bool = False
    """Whether the system turn of a conversation is kept."""

    def put(self, question: Question) -> str:
        """The text of the prompt.

        Raises:
            DataError: the chat template does not take the conversation; the message names file and line.
        """
        if not question.messages or self.render_messages is None:
            return self.render(question.problem)
        try:
            return self.render_messages(question.messages)
        except Exception as error:  # Jinja's own, such as for roles that do not alternate
            raise DataError(
                f"{question.where}: template {self.name}: the tokenizer's chat template does not take these messages "
                f"({' '.join(str(error).split())})."
            ) from error

    def num_dropped_turns(self, question: Question) -> int:
        """Turns of the question's conversation that the prompt does not show."""
        if self.render_messages is None:
            return max(0, len(question.messages) - 1)
        return 0 if self.keeps_system else sum(message.role == SYSTEM for message in question.messages)


class AddedTokens(NamedTuple):
    """What a tokenizer writes around a text."""

    before: list[int]
    """BOS, or nothing."""
    behind: list[int]
    """EOS in some tokenizers; a prompt goes without."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable prompts of one source."""

    name: str
    prompts: list[Prompt]
    weight: float
    num_dropped: int
    """Questions left out because their prompt is longer than the limit."""
    digest: str = ""
    """Of its questions and answers, those left out among them."""
    remarks: tuple[str, ...] = ()
    """See `find_remarks`."""


class PromptStream(SeededStream[Prompt]):
    """Prompts of several weighted sources in a seeded order that resumes exactly; `PromptStream([(prompts, weight), ...], seed)`."""


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder in Hugging Face format; never asks the network.

    Raises:
        DataError: the folder is missing or holds no usable tokenizer.
    """
    if not Path(folder).is_dir():
        raise DataError(f"there is no model folder {folder}; model.path names a folder in Hugging Face format.")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("reading a tokenizer needs transformers; run `pip install transformers`.") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises its own Exception types for a malformed tokenizer.json
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"no tokenizer can be read from {folder}: {first_line.rstrip('.')}.") from error
    if not tokenizer("A 1").input_ids:  # what transformers 5 makes of a folder without tokenizer.json
        raise DataError(f"no tokenizer can be read from {folder}: it turns every text into nothing; copy tokenizer.json there.")
    return tokenizer


def make_template(config: DataConfig, tokenizer: Tokenizer) -> Template:
    """The template that `config` asks for; only `chat` looks at the tokenizer.

    Raises:
        DataError: the shots file or the tokenizer's chat template cannot be used.
    """
    if config.template == "chat":
        return _make_chat_template(config.system_prompt, tokenizer)
    if config.template == "few_shot":
        return _make_text_template("few_shot", _load_shots(config.shots_path or ""), FEW_SHOT_STOP)
    return _make_text_template(config.template, *TEMPLATES[config.template])


def make_stops(stop: Sequence[str], tokenizer: Any) -> tuple[Stop, ...]:
    """The stop strings, and the ids of those that are a special token: in the text, where strings are sought, it never stands.

    Raises:
        ConfigError: a string contains a special token, so that it can never be found.
    """
    special = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special and str(token)}
    for text in stop:
        inside = next((token for token in special if token in text), None)
        if inside is not None and text not in special:
            raise ConfigError(
                f"rollout.stop has {text!r}, which can never be found: the special token {inside!r} is left out of the text of a response; "
                "name that token alone, or leave it out."
            )
    return (*stop, *(special[text] for text in stop if text in special))


def _make_text_template(name: str, text: str, stop: tuple[str, ...]) -> Template:
    # str.format would stumble over the braces of \boxed{}; str.replace does not look into what it has put in
    return Template(name, stop, lambda question: text.replace(PLACEHOLDER, question))


def _make_chat_template(system_prompt: str | None, tokenizer: Tokenizer) -> Template:
    system = () if system_prompt is None else (Message(SYSTEM, system_prompt),)

    def render_messages(messages: Sequence[Message]) -> str:
        turns = [*system, *(message for message in messages if message.role != SYSTEM or not system)]
        conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))

    def render(question: str) -> str:
        return render_messages([Message(USER, question)])

    try:
        render("1 + 1")
    except Exception as error:  # a missing template raises ValueError, one that refuses system turns raises Jinja's own errors
        raise DataError(f"template chat: the tokenizer cannot apply its chat template ({' '.join(str(error).split())}).") from error
    return Template("chat", (), render, add_special_tokens=False, render_messages=render_messages, keeps_system=not system)


def _load_shots(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the shots file {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}.") from error
    count = text.count(PLACEHOLDER)
    if count != 1:
        raise DataError(f"{path} contains {PLACEHOLDER} {count} times; write it exactly once, where the question goes.")
    return text.removesuffix("\n")  # the newline with which editors end a file is not part of the prompt


def load_questions(source: QuestionSource, name: str | None = None) -> list[Question]:
    """The questions of one source that `where`, `offset` and `limit` choose, under the source's own name or `name`.

    Raises:
        DataError: the source, or a row that is used, is unfit; the message names file, line and what is wrong.
    """
    reading = read_questions(source, name)
    if reading.faults:
        raise DataError(reading.faults[0])
    if not reading.questions:
        chosen = f" from row {source.offset}" if source.offset else ""
        raise DataError(f"{source.label} holds no questions{chosen}{explain_filter(source) if reading.num_filtered else ''}.")
    return reading.questions


def load_question_sets(sources: Sequence[QuestionSource]) -> list[QuestionSet]:
    """The questions of each of `sources` (training or evaluation), named as in the run.

    Raises:
        DataError: a source is unfit; the message names file, line and what is wrong.
    """
    return [QuestionSet(name, load_questions(source, name)) for source, name in zip(sources, name_sources(sources), strict=True)]


def read_questions(source: QuestionSource, name: str | None = None) -> Reading:
    """The chosen rows of one source, unfit ones judged and passed over.

    Raises:
        DataError: the file or the dataset as a whole cannot be read.
    """
    name = name or name_sources([source])[0]
    questions: list[Question] = []
    faults: list[str] = []
    position = num_filtered = 0  # of a row among those that `where` leaves
    for row in scan_rows(source):
        if source.limit is not None and position == source.offset + source.limit:
            break
        try:
            if not matches(row, source.where):
                num_filtered += 1
                continue
            if position >= source.offset:
                questions.append(_make_question(row, source, name))
        except DataError as error:
            if position >= source.offset:
                faults.append(str(error))
        position += 1
    return Reading(questions, faults, num_filtered)


def explain_filter(source: RowSource, at_most: int = 10) -> str:
    """For a source of which `where` leaves nothing: the column that never matches and values that it has."""
    rows = list(scan_rows(source))
    for column, allowed in source.where.items():
        if not any(is_one_of(row.get(column), allowed) for row in rows):
            found = sorted({reprlib.repr(row.get(column)) for row in rows})
            more = ", ..." if len(found) > at_most else ""
            return f": where allows {', '.join(map(repr, allowed))} and '{column}' is {', '.join(found[:at_most])}{more}"
    return f": no row has all that where asks for ({', '.join(source.where)})"


def _make_question(row: Row, source: QuestionSource, name: str) -> Question:
    problem_column, answer_column = _columns_of(row, source)
    messages: tuple[Message, ...] = ()
    if isinstance(row.get(problem_column), list):
        messages = _parse_messages(row.get(problem_column), row.where, problem_column)
    problem = messages[-1].content if messages else row.get_text(problem_column)
    return Question(f"{name}/{row.index}", problem, _find_answers(row, answer_column, source.answer_after), name, messages, row.where)


def _columns_of(row: Row, source: QuestionSource) -> tuple[str, str]:
    """Where the row has its question and its answer; names that were given are taken as they are."""
    columns = (source.problem_column, source.answer_column)
    if columns == DEFAULT_COLUMNS and not any(map(row.has, DEFAULT_COLUMNS)) and all(map(row.has, MESSAGES_COLUMNS)):
        return MESSAGES_COLUMNS
    return columns


def _parse_messages(value: Sequence[Any], where: str, column: str) -> tuple[Message, ...]:
    """The turns of a conversation that ends with the user's."""
    messages = []
    for number, item in enumerate(value):
        role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{where}: '{column}' must be text or messages with a 'role' and a 'content' of text each; entry {number} is "
                f"{reprlib.repr(item)}."
            )
        messages.append(Message(role, content))
    if not messages or messages[-1].role != USER:
        last = f"of role '{messages[-1].role}'" if messages else "missing"
        raise DataError(f"{where}: the last message of '{column}' is {last}; the question must be one of role '{USER}', and stand there.")
    if not messages[-1].content.strip():
        raise DataError(f"{where}: the last message of '{column}' is empty; remove the row or fill it in.")
    return tuple(messages)


def _find_answers(row: Row, column: str, answer_after: str | None) -> tuple[str, ...]:
    value = row.get(column)
    if answer_after is not None:
        value = [_cut_answer(entry, answer_after, row, column) for entry in (value if isinstance(value, list) else [value])]
    return parse_answers(value, row.where, column)


def _cut_answer(value: Any, marker: str, row: Row, column: str) -> str:
    if not isinstance(value, str) or marker not in value:
        raise DataError(f"{row.where}: '{column}' has no {marker!r} ({reprlib.repr(value)}); change answer_after, or remove the row.")
    return value.rpartition(marker)[2].strip()


def make_prompts(
    questions: Sequence[Question], template: Template, tokenizer: Tokenizer, max_prompt_tokens: int
) -> tuple[list[Prompt], int]:
    """Put the questions into the template and tokenise them as vLLM does; return the prompts and how many were too long.

    Special tokens written in the template are parsed; so are those in a question, of which `find_remarks` tells. Of those the tokenizer
    adds only the ones before a text are taken (BOS), and not twice: a prompt is to be gone on from, so no EOS ends it.

    Raises:
        DataError: the chat template does not take a conversation.
    """
    if not questions:
        return [], 0
    texts = [template.put(question) for question in questions]
    tokenised = tokenise(texts, tokenizer, has_start=template.add_special_tokens)
    prompts = [
        Prompt(question.question_id, text, tuple(token_ids), question.answers, question.source)
        for question, text, token_ids in zip(questions, texts, tokenised, strict=True)
        if len(token_ids) <= max_prompt_tokens
    ]
    return prompts, len(questions) - len(prompts)


def tokenise(texts: Sequence[str], tokenizer: Tokenizer, *, has_start: bool) -> list[list[int]]:
    """Token ids of texts that are to be gone on from; with `has_start` behind what the tokenizer puts before a text, if it is not there."""
    start = added_tokens(tokenizer).before if has_start else []
    plain: list[list[int]] = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [token_ids if token_ids[: len(start)] == start else [*start, *token_ids] for token_ids in plain]


def added_tokens(tokenizer: Tokenizer) -> AddedTokens:
    """What a tokenizer adds to a text.

    Raises:
        DataError: it changes the text itself.
    """
    text = "A 1"
    (plain,) = tokenizer([text], add_special_tokens=False).input_ids
    (whole,) = tokenizer([text], add_special_tokens=True).input_ids
    for first in range(len(whole) - len(plain) + 1):
        if whole[first : first + len(plain)] == plain:
            return AddedTokens(list(whole[:first]), list(whole[first + len(plain) :]))
    raise DataError(f"the tokenizer makes {plain} of {text!r} and with its special tokens {whole}; those must stand around the rest.")


def load_prompts(config: DataConfig, sources: Sequence[QuestionSource], tokenizer: Tokenizer) -> list[PromptSet]:
    """The prompts of each of `sources` (training or evaluation) under the template and limit of `config`.

    Raises:
        DataError: a file is unfit, or all of its prompts are too long.
    """
    template = make_template(config, tokenizer)
    return [
        _load_prompt_set(source, name, template, tokenizer, config.max_prompt_tokens)
        for source, name in zip(sources, name_sources(sources), strict=True)
    ]


def _load_prompt_set(source: QuestionSource, name: str, template: Template, tokenizer: Tokenizer, max_prompt_tokens: int) -> PromptSet:
    questions = load_questions(source, name)
    prompts, num_dropped = make_prompts(questions, template, tokenizer, max_prompt_tokens)
    if not prompts:
        raise DataError(
            f"{source.label}: all {num_dropped} prompts are longer than data.max_prompt_tokens {max_prompt_tokens} "
            f"under template {template.name}; raise the limit."
        )
    remarks = find_remarks(questions, template, tokenizer)
    return PromptSet(name, prompts, source.weight, num_dropped, digest_questions(questions), remarks)


def digest_questions(questions: Sequence[Question]) -> str:
    """A digest of questions and answers in order, whatever their source is called."""
    return digest_texts((question.problem, *chain(*map(astuple, question.messages)), *question.answers) for question in questions)[1]


def mark_questions(sources: Sequence[QuestionSource], sets: Sequence[QuestionSet]) -> list[RowsMark]:
    """What the questions of `sources`, read as `sets`, are recognised by."""
    pairs = zip(sources, sets, strict=True)
    return [RowsMark.of(source, len(item.questions), digest_questions(item.questions)) for source, item in pairs]


def find_remarks(questions: Sequence[Question], template: Template, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What a reader of the questions would not expect of their prompts: a sentence, without its full stop, on each.

    Text that the tokenizer takes for a special token, such as the end of a turn, and turns of a conversation that are left out.
    """
    remarks = []
    special = _special_tokens(tokenizer)
    found = [(question, token) for question in questions if (token := _find_special(question, template, tokenizer, special)) is not None]
    if found:
        question, token = found[0]
        remarks.append(
            f"{len(found)} of {len(questions)} questions hold text that becomes a special token, the first {token!r} in {question.where}; "
            "the model sees a control token there, so take it out unless it is meant"
        )
    cut = [(question, count) for question in questions if (count := template.num_dropped_turns(question))]
    if cut:
        num_turns = sum(count for _, count in cut)
        kept = "data.system_prompt takes their place" if template.render_messages else "only the last user turn is the question"
        remarks.append(
            f"{num_turns} turns of {len(cut)} conversations are not shown under template {template.name}, the first in {cut[0][0].where}; "
            f"{kept}"
        )
    return tuple(remarks)


def _special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens that text can spell out, by id."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {number: token.content for number, token in added.items() if token.special and token.content}


def _find_special(question: Question, template: Template, tokenizer: Tokenizer, special: Mapping[int, str]) -> str | None:
    """The first special token that the tokenizer finds in the text of a question; None where there is none."""
    shown = [message.content for message in question.messages] if template.render_messages and question.messages else [question.problem]
    suspects = [text for text in shown if any(token in text for token in special.values())]
    if not suspects:
        return None
    ids = (number for of_text in tokenizer(suspects, add_special_tokens=False).input_ids for number in of_text)
    return next((special[number] for number in ids if number in special), None)


def name_sources(sources: Sequence[RowSource]) -> list[str]:
    """A name for each source: its own, else the stem of its file or the last part of its dataset's name, with what tells it from others.

    That is folders or the dataset's owner before it, then split and subset behind it.
    """
    given = {source.name for source in sources}
    tails = {source.label: _make_tails(source) for source in sources if source.name is None}

    def choose(label: str) -> str:
        taken = given | {tail for other, candidates in tails.items() if other != label for tail in candidates}
        numbered = (f"{label}-{number}" for number in count(2))
        return next(name for name in chain(tails[label], [label], numbered) if name not in taken)

    return [source.name or choose(source.label) for source in sources]


def _make_tails(source: RowSource) -> list[str]:
    """`c`, `b-c`, `a-b-c` for a/b/c.jsonl; `b`, `a-b`, `b-split`, `b-subset-split`, `a-b-subset-split` for the dataset a/b."""
    if source.path is not None:
        return _join_tails(Path(split_suffixes(source.path)[0]).parts)
    tails = _join_tails(Path(source.dataset or "").parts)
    rest = [source.split] if source.subset is None else [source.subset, source.split]
    return [*tails, *(f"{tail}-{'-'.join(rest[-depth:])}" for depth in range(1, len(rest) + 1) for tail in tails)]


def _join_tails(parts: Sequence[str]) -> list[str]:
    return ["-".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
