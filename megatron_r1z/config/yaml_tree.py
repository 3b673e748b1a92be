"""YAML files that build on each other: `base: other.yaml` takes another file's values, and the file itself has the last word.

Only mappings are merged; a list or a value replaces what the base has. Which file said what is kept for messages.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_r1z.errors import ConfigError

BASE = "base"
"""The key that names another file, relative to the folder of the one that has it."""


@dataclass(frozen=True)
class ConfigTree:
    """What a file says once its bases are merged into it."""

    path: Path
    values: dict[str, Any]
    origins: dict[str, Path]
    """The file that each dotted key stands in; a list is one key."""

    def files(self, key: str) -> tuple[Path, ...]:
        """The files that say something about a dotted key or below it, the file that was read first; itself for ''."""
        if not key:
            return (self.path,)
        parts = key.split(".")
        for length in range(len(parts), 0, -1):  # the key itself, or the list that it is an entry of
            if ".".join(parts[:length]) in self.origins:
                return (self.origins[".".join(parts[:length])],)
        found = {path for name, path in self.origins.items() if name.startswith(f"{key}.")}
        return tuple(sorted(found, key=lambda path: (path != self.path, str(path))))


def read_tree(path: str | Path) -> ConfigTree:
    """Read a YAML file and the files that it builds on.

    Raises:
        ConfigError: a file cannot be read, is not YAML, holds no sections, or builds on itself; the sentence names it.
    """
    path = Path(path)
    values, origins = _merged(path, ())
    return ConfigTree(path, values, origins)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """What two trees say together; where both have a value, `above` has the last word."""
    values = copy.deepcopy(dict(below))
    _merge(values, above)
    return values


def _merged(path: Path, readers: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Values and origins of one file; `readers` build on it, the first of them was asked for."""
    if path.resolve() in [reader.resolve() for reader in readers]:
        raise ConfigError(f"{readers[-1]}: base leads back to {path}, which builds on it; remove one of the two.")
    tree = _read(path, readers)
    base = tree.pop(BASE, None)
    if base is None:
        return tree, dict.fromkeys(_keys(tree), path)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is {base!r}; it must be the name of another YAML file.")
    values, origins = _merged(path.parent / base, (*readers, path))
    _merge(values, tree)
    present = set(_keys(values))
    return values, {name: origin for name, origin in origins.items() if name in present} | dict.fromkeys(_keys(tree), path)


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        asked = f", the base of {readers[-1]}" if readers else ""
        raise ConfigError(f"cannot read the configuration {path}{asked}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as 'model:' and 'data:'.")
    return tree


def _merge(values: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Write `over` into `values`, mapping by mapping."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _keys(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of everything that is not a mapping with something in it."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{name}.")
        else:
            yield name
