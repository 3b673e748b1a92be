"""Values of a `config.json` by their kind; what is of another kind is refused by name, as transformers does. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def integer(config: Mapping[str, Any], name: str) -> int:
    """The value of a key; a TypeError says what stands there instead, a KeyError that nothing does."""
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {json.dumps(value)}, not an integer")
    return value


def number(config: Mapping[str, Any], name: str) -> float:
    """As `integer`."""
    value = config[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is {json.dumps(value)}, not a number")
    return float(value)


def truth(config: Mapping[str, Any], name: str) -> bool:
    """As `integer`."""
    value = config[name]
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {json.dumps(value)}, not true or false")
    return value
