"""What of this machine decides about FP8, read from torch and Transformer Engine; the one place that knows whether the latter is there.

As a program it prints what it read, for a process that must not touch a GPU itself.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from megatron_r1z.errors import ConfigError
from megatron_r1z.fp8.recipes import Facts, Version


def read_facts() -> Facts:
    """Of the GPU of this rank and of the installed libraries; of the first GPU where this process is no rank.

    Transformer Engine asks the current GPU when it is imported, and a process that has asked one holds some of its memory until it ends:
    a rank must look at its own, and who only starts ranks lets a process look that ends.

    Raises:
        ConfigError: that process failed.
    """
    import torch

    if not torch.cuda.is_available():
        return Facts(cuda=parse_version(torch.version.cuda))
    if "LOCAL_RANK" not in os.environ:
        return _read_in_child()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return _read_here()


@functools.cache
def transformer_engine_version() -> Version | None:
    """None where its torch part cannot be imported: the package without it imports, with a warning, and has no layers.

    Tried, not looked up: in a complete installation that part is found by nothing but the package's own import.
    """
    module, _ = try_import("transformer_engine.pytorch")
    return None if module is None else parse_version(_version_of_transformer_engine()) or (0,)


def try_import(name: str) -> tuple[ModuleType | None, str | None]:
    """A module, or why there is none, in one line; no reason where it is not installed. Libraries that load others find torch's first."""
    try:
        importlib.import_module("torch")
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        is_absent = error.name is not None and name.startswith(error.name)
        return None, None if is_absent else str(error)
    except (ImportError, OSError, RuntimeError) as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0]


def parse_version(text: str | None) -> Version | None:
    """The numbers at the beginning.

    >>> parse_version("2.20.0.dev0+d0067d0"), parse_version(None)
    ((2, 20, 0), None)
    """
    found = re.match(r"\d+(\.\d+)*", text or "")
    return tuple(int(part) for part in found[0].split(".")) if found else None


def _version_of_transformer_engine() -> str | None:
    """Of whichever of its packages is installed: built from source it is one."""
    for name in ("transformer-engine", "transformer-engine-torch"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _read_here() -> Facts:
    import torch

    return Facts(
        capability=torch.cuda.get_device_capability(),
        cuda=parse_version(torch.version.cuda),
        transformer_engine=transformer_engine_version(),
    )


def _read_in_child() -> Facts:
    command = [sys.executable, "-m", "megatron_r1z.fp8.machine"]
    child = subprocess.run(command, env=os.environ | {"LOCAL_RANK": "0"}, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1]
        raise ConfigError(f"cannot ask the GPU what it can compute: {reason}; `megatron-r1z doctor` says what is installed.")
    found = json.loads(child.stdout.strip().splitlines()[-1])
    return Facts(**{name: None if numbers is None else tuple(numbers) for name, numbers in found.items()})


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(read_facts())) + "\n")
