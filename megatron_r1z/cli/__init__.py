"""The command line.

Exit status: 0 success, 1 a run that failed, 2 a mistake that the user can put right, 3 training that came to nothing, which another start
alone would not change, 130 stopped by a signal.

A command that only prints ends with 141 when the reader of its output has gone, as other tools do; one that runs something goes on.

`train`, `pretrain`, `evaluate`, `analyse` and `convert` start their ranks themselves; under torchrun the same command is one rank.

The options are in `parser.py`, a function for each command in `commands.py`, and what ranks do in `runs.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from megatron_r1z.cli.commands import PRINTING
from megatron_r1z.cli.parser import parse
from megatron_r1z.errors import MissingExtraError, R1ZError
from megatron_r1z.host.rank import STOPPED
from megatron_r1z.host.streams import READER_GONE, lead_nowhere, outlive_readers, reader_is_gone


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        try:
            return _main(sys.argv[1:] if argv is None else list(argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        lead_nowhere(1)  # what is left in the buffer, which the interpreter flushes at its end
        return READER_GONE


def _main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.command not in PRINTING or None in (sys.stdout, sys.stderr):
        outlive_readers()  # a run is not lost because a pager was closed
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to fail
    if options.folder is not None:
        os.chdir(options.folder)
        arguments = arguments[2 if arguments[0] == "-C" else 1 :]  # for ranks, which are started in that folder
    command: Callable[[argparse.Namespace, list[str]], int] = options.command
    try:
        return command(options, arguments)
    except R1ZError as error:
        if options.debug:
            raise
        print(f"megatron-r1z: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        if options.debug:
            raise
        return STOPPED
    except ModuleNotFoundError as error:  # a base installation, asked for more than planning
        module = error.name or ""
        if options.debug or module.split(".")[0] == "megatron_r1z":
            raise
        print(f"megatron-r1z: {MissingExtraError.of(module)}", file=sys.stderr)
        return 2
