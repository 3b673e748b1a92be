"""What a base installation, which has PyYAML and nothing else, does with commands that need more."""

from __future__ import annotations

import subprocess
import sys

import pytest

ABSENT = ("torch", "vllm", "megatron", "transformers", "numpy", "sympy", "safetensors", "psutil", "zstandard", "datasets", "math_verify")
PROGRAM = """
import sys
for name in {absent}:
    sys.modules[name] = None
from megatron_r1z.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(absent=ABSENT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, input="")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "configs/quickstart.yaml"],
        ["convert", "a", "b"],
        ["evaluate", "configs/quickstart.yaml"],
        ["analyse", "configs/analyse-paper.yaml"],
    ],
)
def test_a_command_that_needs_more_says_what_to_install(arguments: list[str]) -> None:
    found = run(*arguments)
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("megatron-r1z: torch is not installed; run `make env`, or install the package with its extra: ")
    assert found.stderr.count("\n") == 1


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("convert", "a", "b", "--debug")
    assert found.returncode == 1
    assert "Traceback" in found.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["plan", "configs/qwen2.5-7b-h100.yaml"]])
def test_planning_needs_nothing_more(arguments: list[str]) -> None:
    found = run(*arguments)
    assert (found.returncode, found.stderr) == (0, "")
