"""Text between brackets: what belongs together, where a list can be cut. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate


def nesting(text: str) -> int:
    """How deep brackets stand in brackets."""
    return max(accumulate((character in "([{") - (character in ")]}") for character in text), default=0)


def is_enclosed(text: str, opening: str, closing: str) -> bool:
    """Whether the first bracket is `opening`, the last character `closing`, and the two belong together."""
    if not (len(text) > len(opening) and text.startswith(opening) and text.endswith(closing)):
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and position >= len(opening) - 1:
            return position == len(text) - 1
    return False


def split_outside(text: str, separator: str) -> list[str]:
    """The pieces between separators that stand in no bracket, stripped; one piece where there is none."""
    if separator not in text:
        return [text.strip()]
    pieces, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and position >= start and text.startswith(separator, position):
            pieces.append(text[start:position].strip())
            start = position + len(separator)
    return [*pieces, text[start:].strip()]


def replace_calls(text: str, heads: Mapping[str, str]) -> str:
    r"""Calls as commands with braces, innermost ones too.

    >>> replace_calls("2sqrt(2+sqrt(3))", {"sqrt": r"\sqrt{"})
    '2\\sqrt{2+\\sqrt{3}}'
    """
    pattern = re.compile(rf"\\?(?<![A-Za-z])({'|'.join(heads)}) ?\(")
    position = 0
    while match := pattern.search(text, position):
        closing = _closing(text, match.end() - 1)
        position = match.start() + 1
        if closing is not None:
            text = text[: match.start()] + heads[match[1]] + text[match.end() : closing] + "}" + text[closing + 1 :]
    return text


def _closing(text: str, opening: int) -> int | None:
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    return None
