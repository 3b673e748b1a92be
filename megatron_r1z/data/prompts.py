"""Prompts: questions as token ids, and the resumable order in which they are drawn.

Standard library only; transformers is imported where a tokenizer is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_r1z.config import DataConfig, QuestionSource
from megatron_r1z.data.naming import name_sources
from megatron_r1z.data.order import SeededStream
from megatron_r1z.data.questions import Question, digest_questions, load_questions
from megatron_r1z.data.templates import Template, make_template
from megatron_r1z.data.tokenizer import Tokenizer, special_tokens, tokenise
from megatron_r1z.errors import DataError
from megatron_r1z.types import Prompt


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


def find_remarks(questions: Sequence[Question], template: Template, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What a reader of the questions would not expect of their prompts: a sentence, without its full stop, on each.

    Text that the tokenizer takes for a special token, such as the end of a turn, and turns of a conversation that are left out.
    """
    remarks = []
    special = special_tokens(tokenizer)
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


def _find_special(question: Question, template: Template, tokenizer: Tokenizer, special: Mapping[int, str]) -> str | None:
    """The first special token that the tokenizer finds in the text of a question; None where there is none."""
    shown = [message.content for message in question.messages] if template.render_messages and question.messages else [question.problem]
    suspects = [text for text in shown if any(token in text for token in special.values())]
    if not suspects:
        return None
    ids = (number for of_text in tokenizer(suspects, add_special_tokens=False).input_ids for number in of_text)
    return next((special[number] for number in ids if number in special), None)
