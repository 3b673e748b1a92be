"""Templates: how a question is put to the model and where its response ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1z.config import DataConfig
from megatron_r1z.data.questions import SYSTEM, USER, Message, Question
from megatron_r1z.data.tokenizer import Tokenizer
from megatron_r1z.errors import ConfigError, DataError
from megatron_r1z.protocols import Stop

PLACEHOLDER = "{question}"

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
