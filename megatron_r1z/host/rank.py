"""A process as one rank of a run: whether it is one, how it learns of a stop, how it ends and what it leaves for whoever started it.

Under `supervisor.run_ranks` and under torchrun alike. `rank_entry` goes around a rank's main function; the loop, the engine and the grader
poll `StopFlag`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

from megatron_r1z.errors import R1ZError, TrainingError
from megatron_r1z.host.segments import forget_segments, remove_abandoned_segments, remove_orphaned_segments, remove_segments_of

STOPPED = 130
"""Exit status after a stop that was asked for: 128 + SIGINT, as a shell reports it."""
SUPERVISOR_VARIABLE = "R1Z_SUPERVISOR"
"""In the environment of the ranks that a supervisor has started: its process id."""
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Names the file where a rank says why it failed; torchrun sets the same one."""

_FINAL_FILE_VARIABLE = "R1Z_FINAL_FILE"  # where a batch script looks for the sentence of a run that is not to be started again
_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
_TORCHRUN = re.compile(r"(.*/)?torchrun|torch\.distributed\.(run|launch)|.*torch/distributed/(run|launch)\.py")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopFlag:
    """Set by SIGINT or SIGTERM; loop, engine and grader poll it, and the rank saves a checkpoint and ends with status `STOPPED`.

    Ranks see the signal at different times, so a decision to stop must be reduced over all of them.
    """

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> StopFlag:
        """Handle the signals from now on (main thread only); repeated signals change nothing."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._set)
            signal.siginterrupt(number, False)  # a library's system call goes on as if nothing had happened
        return self

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True


def rank_entry(main: Callable[[], int], *, debug: bool = False) -> int:
    """Run the main function of one rank and return its status; where it fails, record why and end the process.

    An `R1ZError` gives its own status, anything else 1. Under `run_ranks` the supervisor prints the sentence, for the rank that failed
    first; elsewhere the rank prints it. The process ends without the interpreter's shutdown: that takes seconds with libraries of this
    size, and a communication library that waits there for a peer would keep a failed rank alive. `main` has closed what must be closed.
    """
    is_launched = is_rank()
    if is_launched:
        die_with_parent(int(os.environ.get(SUPERVISOR_VARIABLE, os.getppid())))
        _clean_up_before()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored so far, see `_StopRequests.ignored_by_children`
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # whole lines of several ranks, and none lost when a rank is killed
    try:
        _refuse_restart()
        status = main()
    except KeyboardInterrupt:
        status = STOPPED
    except Exception as error:  # noqa: BLE001 - the last place that can say what went wrong
        status = error.status if isinstance(error, R1ZError) else 1
        _record_error(error, status)
        if debug:
            traceback.print_exc()
        if not is_supervised():
            print(_with_rank(os.environ["RANK"] if is_launched else None, _sentence(error)), file=sys.stderr)
    finally:
        if is_launched:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a repeated one would kill the interpreter while it shuts down
    if is_launched:
        if not is_supervised():
            remove_segments_of(int(os.environ["MASTER_PORT"]))  # whoever else has it mapped keeps it
        forget_segments()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _clean_up_before() -> None:
    """What `run_ranks` does for its ranks: one of torchrun's on each machine removes what earlier runs have left."""
    if not is_supervised() and os.environ["LOCAL_RANK"] == "0":
        remove_abandoned_segments()
        remove_orphaned_segments()


def die_with_parent(process_id: int) -> None:
    """Have the kernel kill this process when its parent, given by its id, ends, however that ends (Linux only)."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != process_id:
        os._exit(1)  # it ended before the line above


def is_rank() -> bool:
    """Whether this process is one rank of a run, and not the command that starts them.

    It is one if `run_ranks` started it, or if the environment has all that torchrun gives its ranks and torchrun is at work above this
    process. Variables alone make no rank: a shell, a notebook or a batch script may have them left over or made them for others.
    """
    return is_supervised() or (_has_torchrun_variables() and _is_below_torchrun())


def is_supervised() -> bool:
    """True in a rank that `run_ranks` started."""
    return SUPERVISOR_VARIABLE in os.environ


def leftover_notice() -> str | None:
    """A sentence for the start of a command that is no rank although the environment looks like one's."""
    found = [name for name in _TORCHRUN_VARIABLES if name in os.environ]
    if "RANK" not in found or is_rank():
        return None
    return f"warning: the environment has {', '.join(found)}, which is ignored: there is no torchrun above this process."


def _has_torchrun_variables() -> bool:
    return all(name in os.environ for name in _TORCHRUN_VARIABLES)


def _is_below_torchrun() -> bool:
    import psutil

    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if any(_TORCHRUN.fullmatch(argument) for argument in process.cmdline()[:8]):  # before the arguments of what it starts
                return True
    return False


def _refuse_restart() -> None:
    """Under `torchrun --max-restarts`: end like the start before this one where that said that another one would end alike.

    Raises:
        TrainingError: with that sentence.
    """
    number, path = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0), os.environ.get(ERROR_FILE_VARIABLE)
    if number == 0 or not path or not is_rank():
        return
    for record in Path(path).parents[1].with_name(f"attempt_{number - 1}").glob("*/error.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            earlier = json.loads(record.read_text(encoding="utf-8"))
            if earlier["status"] == TrainingError.status:
                raise TrainingError(str(earlier["sentence"]))


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, R1ZError) else f"{type(error).__name__}: {text}"


def _with_rank(rank: int | str | None, sentence: str) -> str:
    return sentence if rank is None else f"rank {rank}: {sentence}"


def _record_error(error: BaseException, status: int) -> None:
    """Write torchrun's error file; the keys after `message` are for our own supervisor."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path:
        return
    now = time.time()
    message = {
        "message": f"{type(error).__name__}: {error}",
        "extraInfo": {"py_callstack": traceback.format_exc(), "timestamp": str(int(now))},
    }
    record = {
        "message": message,
        "time": now,
        "status": status,
        "sentence": _sentence(error),
        "deliberate": isinstance(error, R1ZError),
    }
    final = os.environ.get(_FINAL_FILE_VARIABLE)
    if final and status == TrainingError.status:
        Path(final).write_text(f"{_sentence(error)}\n", encoding="utf-8")
    Path(path).with_suffix(".txt").write_text(traceback.format_exc(), encoding="utf-8")
    Path(path).write_text(json.dumps(record), encoding="utf-8")


def prctl(option: int, value: int) -> None:
    """Tell the kernel something about this process (Linux only; nothing elsewhere)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
