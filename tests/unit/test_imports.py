"""Who may import whom: the table of docs/architecture.md, read from the import statements and tried out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_r1z

PACKAGE = Path(megatron_r1z.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
HEAVY = ["torch", "vllm", "megatron", "transformers", "numpy", "sympy"]

# Files (a trailing slash: a folder) and what they may import beside the standard library and this package.
ALLOWED = {
    "types.py": set(),
    "protocols.py": set(),
    "errors.py": set(),
    "config.py": {"yaml"},
    "yaml_tree.py": {"yaml"},
    "layout/": set(),
    "cost/": set(),
    "launch/": {"nemo_run", "yaml"},
    "model_checks.py": set(),
    "objective.py": {"torch"},
    "packing.py": {"torch"},
    "supervisor.py": {"psutil"},
    "analysis/examine.py": set(),
    "analysis/figures.py": set(),
    "analysis/report.py": set(),
}
# Libraries and the only places that may import them.
HOMES = {
    "megatron": ("policy/", "checkpoint.py", "indexed.py", "rehearse/"),
    "transformer_engine": ("policy/", "rehearse/"),
    "vllm": ("rollout/", "rehearse/"),
    "nemo_run": ("launch/",),
    "openai": ("analysis/judge.py",),
    "matplotlib": ("analysis/plots.py",),
}
PARTS = ("policy", "rollout", "reshard")


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


@pytest.mark.parametrize("place", ALLOWED)
def test_light_files_import_only_what_the_table_allows(place: str) -> None:
    files = {name: path for name, path in FILES.items() if is_in(name, place)}
    assert files, f"the table names {place}, which does not exist"
    assert {name: extra for name, path in files.items() if (extra := foreign(path) - ALLOWED[place])} == {}


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_one_home(library: str) -> None:
    assert [name for name, path in FILES.items() if library in foreign(path) and not is_in(name, *HOMES[library])] == []


@pytest.mark.parametrize("part", PARTS)
def test_policy_rollout_and_reshard_do_not_import_each_other(part: str) -> None:
    others = tuple(f"megatron_r1z.{other}" for other in PARTS if other != part)
    found = {
        name: module
        for name, path in FILES.items()
        if is_in(name, f"{part}/")
        for module in imports(path)
        if module.startswith(tuple(f"{other}." for other in others)) or module in others
    }
    assert found == {}


def test_nobody_but_the_command_line_and_its_assembly_imports_the_loop() -> None:
    """`assemble` builds the record of collaborators that `loop` defines; the command line is the only one to import both."""
    found = [name for name, path in FILES.items() if "megatron_r1z.loop" in set(imports(path))]
    assert [name for name in found if not is_in(name, "cli.py", "__main__.py", "assemble.py")] == []
    found = [name for name, path in FILES.items() if "megatron_r1z.assemble" in set(imports(path))]
    assert [name for name in found if not is_in(name, "cli.py", "__main__.py")] == []


def light_modules() -> list[str]:
    """What a login node imports."""
    names = ["config.py", "errors.py", "types.py", "protocols.py", "supervisor.py", *(name for name in FILES if is_in(name, "layout/"))]
    names += [name for name in ("launch.py", "cli.py") if name in FILES]
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
