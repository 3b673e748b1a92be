"""What of this machine decides about FP8, read from torch and Transformer Engine."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version

from megatron_r1z.fp8.recipes import Facts, Version


def read_facts() -> Facts:
    """Of the GPU that is current, and of the installed libraries."""
    import torch

    has_gpu = torch.cuda.is_available()
    return Facts(
        capability=torch.cuda.get_device_capability() if has_gpu else None,
        cuda=parse_version(torch.version.cuda),
        transformer_engine=transformer_engine_version(),
    )


def transformer_engine_version() -> Version | None:
    """None where its torch part is missing: the package without it imports, with a warning, and has no layers."""
    if importlib.util.find_spec("transformer_engine_torch") is None:
        return None
    try:
        return parse_version(version("transformer-engine"))
    except PackageNotFoundError:  # built from source under another name
        return parse_version(version("transformer_engine_torch"))


def parse_version(text: str | None) -> Version | None:
    """The numbers at the beginning.

    >>> parse_version("2.20.0.dev0+d0067d0"), parse_version(None)
    ((2, 20, 0), None)
    """
    found = re.match(r"\d+(\.\d+)*", text or "")
    return tuple(int(part) for part in found[0].split(".")) if found else None
