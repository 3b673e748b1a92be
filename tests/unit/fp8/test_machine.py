"""Whether Transformer Engine is there is tried, and a GPU is asked by who uses it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1z.errors import ConfigError
from megatron_r1z.fp8 import machine
from megatron_r1z.fp8.machine import read_facts, transformer_engine_version, try_import
from megatron_r1z.fp8.recipes import Facts

COMPLETE = """import sys, types
sys.modules["transformer_engine_torch"] = types.ModuleType("transformer_engine_torch")
"""
"""How `transformer_engine.common` brings in the compiled part, which lies in a folder of its own that nothing finds by name."""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages, in which the test puts a Transformer Engine; the real one, where there is one, is not seen."""
    names = [name for name in sys.modules if name.split(".")[0] in ("transformer_engine", "transformer_engine_torch")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    transformer_engine_version.cache_clear()
    yield tmp_path
    transformer_engine_version.cache_clear()
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine_torch"):
        sys.modules.pop(name, None)


def put_package(folder: Path, torch_part: str) -> None:
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine" / "__init__.py").write_text("")
    (folder / "transformer_engine" / "pytorch.py").write_text(torch_part)
    (folder / "transformer_engine-2.20.2.dist-info").mkdir()
    (folder / "transformer_engine-2.20.2.dist-info" / "METADATA").write_text("Name: transformer-engine\nVersion: 2.20.2\n")
    importlib.invalidate_caches()


def test_a_complete_installation_is_seen_before_anything_has_imported_it(installed: Path) -> None:
    put_package(installed, COMPLETE)
    assert importlib.util.find_spec("transformer_engine_torch") is None
    assert transformer_engine_version() == (2, 20, 2)


@pytest.mark.parametrize("reason", ["FileNotFoundError('no shared object')", "ImportError('undefined symbol: x')", "RuntimeError('no')"])
def test_half_an_installation_is_none(installed: Path, reason: str) -> None:
    put_package(installed, f"raise {reason}")
    assert transformer_engine_version() is None
    _, error = try_import("transformer_engine.pytorch")
    assert error is not None
    assert error in reason


def test_what_is_not_installed_needs_no_reason() -> None:
    assert try_import("no_such_library.part") == (None, None)


def test_a_rank_asks_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Transformer Engine is imported, which asks the one that is current."""
    order: list[object] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", order.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(machine, "transformer_engine_version", lambda: order.append("imported"))
    assert read_facts() == Facts((9, 0), machine.parse_version(torch.version.cuda), None)
    assert order == [3, "imported"]


def test_who_only_starts_ranks_lets_another_process_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        asked.append({"command": command, "rank": options["env"]["LOCAL_RANK"]})
        return SimpleNamespace(returncode=0, stdout='a warning\n{"capability": [9, 0], "cuda": [13, 0], "transformer_engine": null}\n')

    def refuse() -> None:
        raise AssertionError("this process must not look at a GPU")

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    monkeypatch.setattr(subprocess, "run", run)
    assert read_facts() == Facts((9, 0), (13, 0), None)
    assert [item["rank"] for item in asked] == ["0"]


def test_a_gpu_that_cannot_be_asked_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: SimpleNamespace(returncode=1, stderr="Traceback\nCUDA error: busy\n"))
    with pytest.raises(ConfigError, match="cannot ask the GPU what it can compute: CUDA error: busy; `megatron-r1z doctor`"):
        read_facts()


def test_the_program_prints_what_it_reads() -> None:
    found = subprocess.run([sys.executable, "-m", "megatron_r1z.fp8.machine"], capture_output=True, text=True, check=True)
    assert '"capability"' in found.stdout.splitlines()[-1]
