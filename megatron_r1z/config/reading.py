"""From YAML and `section.field=value` to records; what is wrong is told with the file and the key."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from megatron_r1z.config.commands import TRAINING_SECTIONS, Config, EvaluateConfig
from megatron_r1z.config.launch import LAUNCH, LaunchConfig
from megatron_r1z.config.writing import default_of
from megatron_r1z.config.yaml_tree import ConfigTree, merged, read_tree
from megatron_r1z.errors import ConfigError

Record = TypeVar("Record")

REMOVED: Mapping[str, tuple[object, str]] = {
    "precision.fp8.param": (False, "weights cannot be written into what Transformer Engine keeps then"),
}
"""Fields that earlier versions had, by dotted key: the value that says what every run does now, and why there is no other."""


def load_config(kind: type[Config], path: str | Path, overrides: Sequence[str] = (), *, is_record: bool = False) -> Config:
    """Read YAML at `path` and the files it builds on (`base`), apply `section.field=value` overrides and check everything.

    Args:
        kind: of configuration.
        path: of the file.
        overrides: `section.field=value`.
        is_record: what an earlier run wrote down, perhaps by a version with fields that are gone: those that say what is done now
            are left out.

    Raises:
        ConfigError: one sentence with the file, the key and, for an unknown key, the nearest known one.
    """
    source, overridden = _read(path, overrides)
    tree = source.values
    if is_record:
        _leave_out_removed(tree)
    _make_placed(LaunchConfig, tree.pop(LAUNCH, {}), source, overridden, LAUNCH)
    if kind is EvaluateConfig:
        tree = {name: section for name, section in tree.items() if name not in TRAINING_SECTIONS}
    return _make_placed(kind, tree, source, overridden)


def load_launch(path: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> LaunchConfig:
    """Read the `launch` section of the YAML at `path`; what it does not say is taken from `defaults` first.

    Raises:
        ConfigError: one sentence with the file and the key.
    """
    source, overridden = _read(path, overrides)
    section = source.values.get(LAUNCH, {})
    if defaults and isinstance(section, Mapping):
        section = merged(defaults, section)
    return _make_placed(LaunchConfig, section, source, overridden, LAUNCH)


def load_record(kind: type[Record], path: str | Path) -> Record:
    """Read any frozen record from YAML at `path` and the files it builds on.

    Raises:
        ConfigError: one sentence with the file, the key and, for an unknown key, the nearest known one.
    """
    source = read_tree(path)
    return _make_placed(kind, source.values, source, ())


def make_config(kind: type[Config], tree: Mapping[str, Any]) -> Config:
    """Build and check a configuration from nested mappings."""
    return typing.cast(Config, _build(kind, tree, ""))


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[ConfigTree, list[str]]:
    """A file with the overrides in its values, and the dotted keys of those."""
    source = read_tree(path)
    return source, [_apply_override(source.values, override) for override in overrides]


def _make_placed(kind: type[Record], tree: Any, source: ConfigTree, overridden: Sequence[str], where: str = "") -> Record:
    """Build a record, that of section `where`; what is wrong is said with the file that it stands in."""
    try:
        return typing.cast(Record, _build(kind, tree, where))
    except _ValueError as error:
        raise ConfigError(f"{_place(source, error.key, overridden)}{error}") from error


class _ValueError(ConfigError):
    """A value that cannot be, and the dotted key of the field or section that it is about."""

    def __init__(self, key: str, sentence: str) -> None:
        super().__init__(sentence)
        self.key = key


def _place(source: ConfigTree, key: str, overridden: Sequence[str]) -> str:
    """The files that a message is about, as its beginning; nothing where the command line has a say in it."""
    if any(not key or name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in overridden):
        return ""
    return " with ".join(map(str, source.files(key) or (source.path,))) + ": "


def _leave_out_removed(tree: dict[str, Any]) -> None:
    """Fields that are gone, where they have the value that every run has now."""
    for key, (value, _) in REMOVED.items():
        node: Any = tree
        *parents, last = key.split(".")
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict) and last in node and node[last] == value:
            del node[last]


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Change a value of the tree; returns its dotted key."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"'{override}' is not an override; write section.field=value.")
    node: Any = tree
    *parents, last = key.split(".")
    for name in parents:
        node = _child(node, name, key)
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: {value!r} is not valid YAML; lists are written [a, b].") from error
    if isinstance(node, list):
        node[_index(node, last, key)] = parsed
    else:
        node[last] = parsed
    return key


def _child(node: Any, name: str, key: str) -> Any:
    child = node[_index(node, name, key)] if isinstance(node, list) else node.setdefault(name, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {key}: '{name}' is a value, not a section.")
    return child


def _index(node: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"override {key}: '{name}' is not the number of one of {len(node)} entries (from 0).")
    return int(name)


def _build(kind: Any, value: Any, where: str) -> Any:
    """Convert a YAML value to the annotated type `kind`; `where` is the dotted key for messages."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # the latter with a Literal in it
        return _build_union(arguments, value, where)
    if origin is Mapping:
        return _build_mapping(arguments, value, where)
    if origin is Literal:
        return _build_choice(arguments, value, where)
    if origin is tuple:
        return _build_tuple(arguments, value, where)
    return _build_scalar(kind, value, where)


def _build_record(kind: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _ValueError(where, f"{where or 'the configuration'} must be a section of fields, not {value!r}.")
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for key in value:
        if f"{prefix}{key}" in REMOVED:
            only, reason = REMOVED[f"{prefix}{key}"]
            raise _ValueError(f"{prefix}{key}", f"'{prefix}{key}' is gone, every run has {only!r}: {reason}; leave it out.")
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)[0]
            raise _ValueError(f"{prefix}{key}", f"unknown key '{prefix}{key}'; did you mean '{prefix}{near}'?")
    missing = [name for name, item in fields.items() if name not in value and default_of(item) is MISSING]
    if missing:
        raise _ValueError(where, f"'{prefix}{missing[0]}' is missing; it has no default.")
    values = {key: _build(hints[key], item, f"{prefix}{key}") for key, item in value.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise _ValueError(where, str(error)) from error


def _build_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [argument for argument in arguments if argument is not type(None)]
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    kinds = [kind for kind in kinds if typing.get_origin(kind) is not Literal]
    if value in words:
        return value
    if words and not (isinstance(value, tuple(kinds)) and not isinstance(value, bool)):
        raise _ValueError(where, f"{where} must be {' or '.join(words)} or of type {kinds[0].__name__}, not {value!r}.")
    if len(kinds) == 1:
        return _build(kinds[0], value, where)
    if not isinstance(value, tuple(kinds)):
        raise _ValueError(where, f"{where} must be of type {' or '.join(kind.__name__ for kind in kinds)}, not {value!r}.")
    return value


def _build_mapping(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    """Values by name; where they are lists, a value alone stands for a list of one."""
    kind = arguments[1]
    lists = typing.get_origin(kind) is tuple
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        example = "{name: [a, b]}" if lists else "{name: value}"
        raise _ValueError(where, f"{where} must be a mapping from names to values, such as {example}, not {value!r}.")
    if kind is Any:
        return dict(value)
    listed = {key: [item] if lists and not isinstance(item, list | tuple) else item for key, item in value.items()}
    return {key: _build(kind, item, f"{where}.{key}") for key, item in listed.items()}


def _build_choice(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is False and "no" in choices:  # YAML 1.1 reads a bare `no` as false
        value = "no"
    if value not in choices:
        raise _ValueError(where, f"{where} is {value!r}; it must be one of {', '.join(map(str, choices))}.")
    return value


def _build_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _ValueError(where, f"{where} must be a list, not {value!r}.")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise _ValueError(where, f"{where} needs {len(arguments)} entries, not {len(value)}.")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    return tuple(_build(kind, item, f"{where}.{index}") for index, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _build_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-6 as text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise _ValueError(where, f"{where} must be of type {kind.__name__}, not {value!r}.")
    return value
