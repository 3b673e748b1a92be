"""Starts a script as a rank: loaded without the garbage collector, ended without the interpreter's shutdown, like a rank of ours."""

from __future__ import annotations

import gc
import os
import runpy
import sys

from megatron_r1z.host.segments import remove_segments_of

if __name__ == "__main__":
    del sys.argv[0]
    gc.set_threshold(100_000)
    runpy.run_path(sys.argv[0], run_name="__main__")
    remove_segments_of(int(os.environ["MASTER_PORT"]))
    sys.stdout.flush()
    os._exit(0)
