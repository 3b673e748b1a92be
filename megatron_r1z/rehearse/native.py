"""The two libraries in C: made by the machine's compiler once, and loaded before torch and vLLM look for NVIDIA's."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from megatron_r1z.errors import MissingExtraError

SOURCES = {"libcuda.so.1": "driver.c", "libr1z_cudart.so": "runtime.c"}
"""By the name under which others ask for what is loaded. Functions of CUDA's runtime are found by name, wherever they are first."""
COMPILERS = ("cc", "gcc", "clang")


def load_libraries() -> None:
    """For this process; before torch is imported.

    Raises:
        MissingExtraError: there is no C compiler.
    """
    for name, source in SOURCES.items():
        ctypes.CDLL(str(_made(name, Path(__file__).with_name(source))), mode=ctypes.RTLD_GLOBAL)


def _made(name: str, source: Path) -> Path:
    """The library, in the user's cache; made again when its source changes."""
    mark = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_r1z" / mark
    target = folder / name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another process may be at the same
            made = Path(scratch) / name
            subprocess.run([_compiler(), "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(made), str(source)], check=True)
            made.rename(target)
    return target


def _compiler() -> str:
    for name in COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise MissingExtraError("a rehearsal needs a C compiler, and there is none of cc, gcc, clang; install gcc.")
