"""From records back to plain values and YAML."""

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any

import yaml

from megatron_r1z.config.sources import RowSource

if TYPE_CHECKING:
    from megatron_r1z.config.commands import AnyConfig


def to_tree(config: Any) -> Any:
    """The inverse of `make_config`: plain mappings, lists and scalars, every field present."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {item.name: to_tree(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_tree(item) for key, item in config.items()}
    if isinstance(config, tuple):
        return [to_tree(item) for item in config]
    return config


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field that is no section, by its dotted name, as plain mappings, lists and scalars."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        is_section = dataclasses.is_dataclass(value) and not isinstance(value, RowSource)
        found |= leaves(value, f"{prefix}{item.name}.") if is_section else {f"{prefix}{item.name}": to_tree(value)}
    return found


def dump_config(config: "AnyConfig") -> str:
    """The resolved configuration as YAML; values that differ from their default carry `# default: ...`."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        record = getattr(config, section.name)
        lines.append(f"{section.name}:")
        for item in dataclasses.fields(record):
            value = getattr(record, item.name)
            default = default_of(item)
            differs = default is not MISSING and default != value
            lines.append(f"  {item.name}: {_flow(value)}" + (f"  # default: {_flow(default)}" if differs else ""))
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """One line of YAML."""
    text = yaml.safe_dump(to_tree(value), default_flow_style=True, width=1_000_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def default_of(item: dataclasses.Field[Any]) -> Any:
    """The default of a field, `MISSING` where it has none."""
    return item.default if item.default_factory is MISSING else item.default_factory()
