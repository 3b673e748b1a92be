"""Python's garbage collector while libraries are loaded: what they make stays, and to look through it again and again takes seconds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Collect nothing inside, and never look through what is there at the start and at the end, not even where a library asks for it."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
