"""Print docs/configuration.md: an introduction and a table of fields for every section of `megatron_r1z/config/`.

    python tools/config_docs.py > docs/configuration.md

Names and defaults come from the records, what a field means from the docstring under it. `tests/unit/test_docs.py` compares.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from megatron_r1z import config

INTRODUCTION = """\
# Configuration

<!-- Written by tools/config_docs.py from the records of megatron_r1z/config/; change them, then run
     `python tools/config_docs.py > docs/configuration.md`. -->

A run is one YAML file with the sections below. `train` reads all of them but `corpus` and `analysis`; `pretrain`, `evaluate` and
`analyse` read those that say so. The section `launch` is for the command of that name only.
Fields marked **required** have no default.

```
megatron-r1z train configs/quickstart.yaml optimizer.lr=1e-4 rollout.stop='["\\n"]' data.train.0.limit=500
```

- **Overrides** are `section.field=value`; the value is read as YAML, an entry of a list is addressed by its number from 0.
- **base**: a file may begin with `base: other.yaml` (relative to itself) and say only what differs. Sections are merged field by field,
  a list replaces the base's, a base may have a base, and messages name the file that has the key.
- **Checked before anything starts**: an unknown key (the nearest known one is named), a wrong type, a value out of range, degrees that
  do not divide the ranks, heads or layers, a prompt and response that exceed the model's positions. One sentence, exit status 2.
- **Kept**: `config.yaml` in the run folder is the resolved configuration; a value that differs from its default carries that default
  as a comment. It can be given to the command again.
- Paths are relative to where the command is started.
"""

COMMANDS = {
    "train": config.TrainConfig,
    "pretrain": config.PretrainConfig,
    "evaluate": config.EvaluateConfig,
    "analyse": config.AnalyseConfig,
}
SOURCES = "Entries of `data.train` and `evaluation.sets`, and `analysis.questions`"
TEXTS = "Entries of `corpus.sources` and `corpus.evaluation`"
EXTRA = "Entries of `grading.extra`"


def main() -> None:
    """Print the page."""
    print(page(), end="")


def page() -> str:
    """The whole page."""
    sections = []
    for name, record in all_sections().items():
        sections.append(section(name, record))
        sections += [f"\n### {name}.{part}\n\n{kind.__doc__}\n\n{table(kind)}" for part, kind in subsections(record).items()]
    sections.append(f"\n## {SOURCES}\n\n{table(config.QuestionSource)}")
    sections.append(f"\n## {TEXTS}\n\n{table(config.TextSource)}")
    sections.append(f"\n## {EXTRA}\n\n{table(config.ExtraReward)}")
    return INTRODUCTION + "".join(sections)


def all_sections() -> dict[str, type[Any]]:
    """Section name to record, over all commands."""
    sections = {name: record for kind in COMMANDS.values() for name, record in typing.get_type_hints(kind).items()}
    return sections | {config.LAUNCH: config.LaunchConfig}


def section(name: str, record: type[Any]) -> str:
    """Heading, purpose and table of one section."""
    readers = [f"`{command}`" for command, kind in COMMANDS.items() if name in kind.__annotations__] or [f"`{name}`"]
    return f"\n## {name}\n\n{record.__doc__} Read by {', '.join(readers)}.\n\n{table(record)}"


def subsections(record: type[Any]) -> dict[str, type[Any]]:
    """Fields of a section that are sections themselves, if they are there; question files have a table of their own."""
    hints = typing.get_type_hints(record).items()
    kinds = [(name, kind) for name, hint in hints for kind in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,))]
    return {name: kind for name, kind in kinds if dataclasses.is_dataclass(kind) and kind is not config.QuestionSource}


def table(record: type[Any]) -> str:
    """One row per field."""
    hints, meanings = typing.get_type_hints(record), field_docstrings(record)
    rows = [
        f"| `{item.name}` | {show_type(hints[item.name])} | {show_default(item)} | {meanings.get(item.name, '')} |"
        for item in dataclasses.fields(record)
    ]
    return "\n".join(["| Field | Type | Default | Meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


def field_docstrings(record: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass and of those that it extends, on one line."""
    found = {}
    for kind in reversed([kind for kind in record.__mro__ if dataclasses.is_dataclass(kind)]):
        definition = ast.parse(inspect.getsource(kind)).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[statement.target.id] = " ".join(str(following.value.value).split()).replace("|", "\\|")
    return found


def show_type(hint: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{str(choice).lower() if isinstance(choice, bool) else choice}`" for choice in arguments)
    if origin is tuple:
        return f"list of {show_type(arguments[0])}" if arguments[-1] is Ellipsis else f"{len(arguments)} x {show_type(arguments[0])}"
    if origin is Mapping:
        return "values or lists of values by column" if typing.get_origin(arguments[1]) is tuple else "values by name"
    if any(typing.get_origin(argument) is Literal for argument in arguments):
        return ", ".join(show_type(argument) for argument in reversed(arguments))
    if type(None) in arguments:
        return " or ".join("null" if argument is type(None) else show_type(argument) for argument in arguments)
    names = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true, false",
        config.QuestionSource: "question files, see below",
        config.TextSource: "texts, see below",
        config.ExtraReward: "rewards, see below",
    }
    return names.get(hint, "section")


def show_default(item: dataclasses.Field[Any]) -> str:
    """The default in YAML's notation."""
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    if default is dataclasses.MISSING:
        return "**required**"
    text = yaml.safe_dump(config.to_tree(default), default_flow_style=True, width=1_000_000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


if __name__ == "__main__":
    main()
