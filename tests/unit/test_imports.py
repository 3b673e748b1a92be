"""Who may import whom: the table of docs/architecture.md, read from the import statements and tried out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import megatron_r1z

PACKAGE = Path(megatron_r1z.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
HEAVY = ["torch", "vllm", "megatron", "transformers", "numpy", "sympy"]

# Libraries and the only places that may import them.
HOMES = {
    "megatron": ("policy/", "weights/checkpoint.py", "data/indexed.py", "rehearse/"),
    "transformer_engine": ("policy/", "rehearse/"),
    "vllm": ("rollout/", "rehearse/"),
    "nemo_run": ("launch/",),
    "openai": ("analysis/judge.py",),
    "matplotlib": ("analysis/plots.py",),
}


@dataclass(frozen=True)
class Room:
    """A row of the table: files of the root, or a folder (its name ends in a slash)."""

    floor: int
    libraries: frozenset[str]


def read_rooms() -> dict[str, Room]:
    """The table of docs/architecture.md."""
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \| .+? \| (.*?) ?\|$", text, re.MULTILINE)
    return {
        name.strip("` "): Room(int(floor), frozenset(filter(None, libraries.split(", "))))
        for floor, names, libraries in rows
        for name in names.split(",")
    }


ROOMS = read_rooms()
LIGHT = ("launch/job.py", "launch/sweep.py", "weights/hf_headers.py", "analysis/examine.py", "analysis/figures.py", "analysis/report.py")
"""Files outside of light rooms that a login node imports, or that a worker process does."""


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports when it runs, with dots; imports for the type checker only do not count."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")), package)


def _imports(node: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from _imports(child, package)
        return
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
        module = ".".join(part for part in (base, node.module) if part)
        yield module
        yield from (f"{module}.{name.name}" for name in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"import_module", "importlib.import_module", "__import__"}:
        yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, package)


def is_in(name: str, *places: str) -> bool:
    """Whether a file is one of `places` or below one that ends in a slash."""
    return any(name == place or (place.endswith("/") and name.startswith(place)) for place in places)


def foreign(path: Path) -> set[str]:
    """Top-level names of the libraries that a file imports."""
    return {module.split(".")[0] for module in imports(path)} - sys.stdlib_module_names - {"megatron_r1z"}


def room_of(name: str) -> str:
    """The room of a file, given with its path in the package."""
    folder, slash, _ = name.partition("/")
    return folder + slash


def floor_of(module: str) -> int | None:
    """The floor of one of our modules, given with dots; None for the package itself."""
    first = module.removeprefix("megatron_r1z").lstrip(".").partition(".")[0]
    return next((ROOMS[name].floor for name in (f"{first}/", f"{first}.py") if name in ROOMS), None)


def test_every_file_has_a_room_and_every_room_a_file() -> None:
    assert {room_of(name) for name in FILES} - {"__init__.py"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room: str) -> None:
    files = {name: path for name, path in FILES.items() if room_of(name) == room}
    own = f"megatron_r1z.{room.rstrip('/').removesuffix('.py')}"
    others = {
        f"{name} imports {module}": floor_of(module)
        for name, path in files.items()
        for module in imports(path)
        if module.startswith("megatron_r1z") and module != own and not module.startswith(f"{own}.")
    }
    assert [what for what, floor in others.items() if floor is not None and floor >= ROOMS[room].floor] == []


@pytest.mark.parametrize("room", ROOMS)
def test_the_libraries_of_a_room_are_those_of_the_table(room: str) -> None:
    found = {name: foreign(path) for name, path in FILES.items() if room_of(name) == room}
    assert set().union(*found.values()) == ROOMS[room].libraries, found


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_one_home(library: str) -> None:
    assert [name for name, path in FILES.items() if library in foreign(path) and not is_in(name, *HOMES[library])] == []


def light_modules() -> list[str]:
    """What a login node imports."""
    names = ["cli/__init__.py", "errors.py", "types.py", "protocols.py", "host/supervisor.py", "host/rank.py"]
    names += [name for name in FILES if is_in(name, "layout/", "config/", "cost/", *LIGHT)]
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]
    return ["megatron_r1z", *(f"megatron_r1z.{module}" for module in modules)]


def test_the_light_modules_load_nothing_heavy() -> None:
    program = f"import sys, {', '.join(light_modules())}; print(*(set({HEAVY}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "package")
    path = tmp_path / "package" / "part" / "file.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\nimport a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\n"
        "if TYPE_CHECKING:\n    import hidden\nelse:\n    import h\n"
        "def function():\n    import i\n    importlib.import_module('j.k')\n",
        encoding="utf-8",
    )
    found = set(imports(path)) - {"typing", "typing.TYPE_CHECKING"}
    assert found == {"a.b", "c", "c.d", "package.part", "package.part.e", "package.f", "package.f.g", "h", "i", "j.k"}
