"""The rotary embedding that a `config.json` asks for, in the spellings of transformers 4 and 5. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1z.errors import DataError
from megatron_r1z.layout.config_fields import integer, number


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (transformers `modeling_rope_utils._compute_llama3_parameters`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


class Rope(NamedTuple):
    """Base and scaling of the rotary embedding."""

    theta: float
    scaling: RopeScaling | None


_ROPE_KEYS = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor"))
_LLAMA3_KEYS = frozenset(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))


def read_rope(given: Mapping[str, Any], config: Mapping[str, Any], path: str | Path) -> Rope:
    """From `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`; what is said twice must agree.

    Readers differ in which of two they take: transformers 4 and 5 do, over `rope_theta` and over which of the tables wins.

    Args:
        given: the file.
        config: the file with the defaults of the family filled in.
        path: what messages call it.

    Raises:
        DataError: another type of embedding, or two values that disagree.
        KeyError, TypeError: a key that is missing or malformed.
    """
    tables = {name: given[name] for name in ("rope_scaling", "rope_parameters") if given.get(name)}
    found = {name: _read_table(name, table, config, path) for name, table in tables.items()}
    for name, rope in found.items():
        if given.get("rope_theta") not in (None, rope.theta):
            raise DataError(f"{path} has rope_theta {given['rope_theta']} and {rope.theta:g} in {name}; correct the one that is wrong.")
    if len(set(found.values())) > 1:
        raise DataError(f"{path} has rope_scaling and rope_parameters, which disagree; take out the one that is wrong.")
    rope = next(iter(found.values())) if found else Rope(number(config, "rope_theta"), None)
    outside = given.get("original_max_position_embeddings")
    if rope.scaling is not None and outside not in (None, rope.scaling.original_max_positions):
        raise DataError(
            f"{path} has original_max_position_embeddings {outside} and {rope.scaling.original_max_positions} in {next(iter(found))}; "
            "correct the one that is wrong."
        )
    return rope


def _read_table(name: str, table: Any, config: Mapping[str, Any], path: str | Path) -> Rope:
    if not isinstance(table, Mapping):
        raise TypeError(f"{name} is {json.dumps(table)}, not an object")
    kinds = {str(table[key]) for key in ("rope_type", "type") if table.get(key) is not None} or {"default"}
    kind = min(kinds)
    if len(kinds) > 1 or kind not in ("default", "llama3"):
        raise DataError(
            f"{path} asks for rope type '{' and '.join(sorted(kinds))}' ({name}), which is not supported; default and llama3 are."
        )
    known = _ROPE_KEYS | (_LLAMA3_KEYS if kind == "llama3" else frozenset())
    for key, value in table.items():
        if (value is not None and key not in known) or (key == "partial_rotary_factor" and value not in (None, 1)):
            raise DataError(f"{path} has {key} {json.dumps(value)} in {name}, which is not supported for rope type '{kind}'.")
    theta = number({"rope_theta": config["rope_theta"], **table}, "rope_theta")
    if kind == "default":
        return Rope(theta, None)
    return Rope(
        theta,
        RopeScaling(
            factor=number(table, "factor"),
            low_freq_factor=number(table, "low_freq_factor"),
            high_freq_factor=number(table, "high_freq_factor"),
            original_max_positions=integer(table, "original_max_position_embeddings"),
        ),
    )
