"""For which versions of the libraries the stand-ins were written: they follow private names, so another one must be looked at first."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from megatron_r1z.errors import MissingExtraError

WRITTEN_FOR: Mapping[str, str] = {"torch": "2.14", "megatron-core": "0.19", "transformer-engine": "2.20", "vllm": "0.33"}
"""Releases by distribution; any patch of them will do."""


def check_versions(*libraries: str) -> None:
    """Refuse another release of one of `libraries`.

    Raises:
        MissingExtraError: names the library, both versions and what to install.
    """
    for name in libraries:
        wanted = WRITTEN_FOR[name]
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found != wanted and not found.startswith(f"{wanted}."):
            raise MissingExtraError(
                f"a rehearsal was written for {name} {wanted}, and {found} is installed; run `make gpu-env` and use "
                ".venv-gpu/bin/megatron-r1z, or: pip install 'megatron-r1z[gpu-host]' on Python 3.12 in an environment of its own."
            )
