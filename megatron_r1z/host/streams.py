"""Standard output and error of a process whose reader may go away: a pager that is closed, `| head`, a terminal that hangs up."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any

READER_GONE = 141
"""Exit status of a filter whose reader has gone: 128 + SIGPIPE, as a shell reports it of other tools."""
_GONE = (errno.EPIPE, errno.EIO)
"""What a write says then: the pipe is broken, the terminal has hung up."""


class _LastingFile(io.FileIO):
    """A file descriptor that takes everything: once its reader has gone it leads nowhere, for this process and its libraries."""

    def write(self, data: Any, /) -> int:
        """As `io.FileIO`, and never an error about the reader."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            lead_nowhere(self.fileno())
            return super().write(data)


def outlive_readers() -> None:
    """Let this process go on when the reader of its standard output or error goes away, or where it has none from the start.

    Nothing is changed where a program has put a stream of its own in the place of the interpreter's.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            lead_nowhere(descriptor)
        elif stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue
        else:
            stream.flush()
        setattr(sys, name, _make_lasting(descriptor, stream))


def _make_lasting(descriptor: int, stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(descriptor, "w", closefd=False)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=stream is not None and stream.line_buffering,
    )


def reader_is_gone(descriptor: int = 1) -> bool:
    """Whether nobody can read what is written there any more."""
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are told unasked
    return bool(poll.poll(0))


def lead_nowhere(descriptor: int) -> None:
    """Have whatever is written to this descriptor vanish."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
