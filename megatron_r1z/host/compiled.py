"""Loops over a CPU's memory that numba compiles when they first run, which takes about a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's `njit`, kept on disk where there is a folder to keep it in."""

    def compile_later(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            return njit(**options)(function)

    return compile_later


@intrinsic
def pointer(_context: Any, address: Any) -> Any:
    """An address as a pointer, for numba's `carray`: a view that counts no references."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate
