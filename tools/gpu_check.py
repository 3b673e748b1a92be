"""Run the checks of docs/gpu.md one after the other, each in a process of its own with its own time; `tools/gpu_check.sh` calls this.

Standard library only. What happens goes to OUT/results.jsonl line by line, so that it is there whatever stops the rest: what this run is,
figures as the checks find them, how each one ended. `tools/gpu_report.py` reads it. Everything that is said goes to OUT/log.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SKIPPED = 77
"""Status of a check that this machine cannot be asked; its last line says why."""
LOG_LINES = 15
HIDING = "tests/gpu_stack/hidden"
"""A folder for PYTHONPATH that hides Transformer Engine."""
QUICK_MINUTES = 10.0


@dataclass(frozen=True)
class Check:
    """A command and its time."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    is_quick: bool = True
    on_cpu: bool = False
    """GPU and Transformer Engine are hidden from it."""
    needs: str = "torch"
    """A module without which there is nothing to check."""


@dataclass(frozen=True)
class Ended:
    """How a check ended: passed, failed or skipped."""

    check: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    log: tuple[str, ...] = ()
    """The last lines of what it said, where it has not passed."""


def all_checks(out: Path) -> list[Check]:
    """In the order of their worth to somebody with little time."""
    reference, smoke = str(out / "reference.pt"), str(out / "smoke")

    def own(limit_s: float, *arguments: str, **options: Any) -> Check:
        name = " ".join(item for item in arguments if "/" not in item)
        return Check(name, (sys.executable, "-W", "ignore", "-m", "tests.gpu.checks", *arguments), limit_s, **options)

    def run(limit_s: float, *arguments: str) -> Check:
        return replace(own(limit_s, *arguments, is_quick=False, needs="vllm"), command=(sys.executable, "-m", "tests.gpu.runs", *arguments))

    def tests(name: str, limit_s: float, *arguments: str, **options: Any) -> Check:
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *arguments)
        return Check(name, command, limit_s, **{"needs": "pytest"} | options)

    recipes = ("blockwise", "tensorwise", "delayed", "mxfp8")
    return [
        own(60, "machine"),
        own(60, "float32"),
        own(60, "float32", "tf32"),
        own(90, "fp8", "blockwise"),
        own(150, "reference", reference, on_cpu=True),
        own(90, "steps", "bf16", reference),
        own(90, "steps", "fp32", reference),
        own(90, "steps", "fp8-blockwise", reference),
        own(90, "checkpoint"),
        own(90, "scales"),
        own(90, "refit"),
        own(120, "memory", "bf16"),
        own(120, "memory", "fp8-blockwise"),
        *(own(60, "fp8", recipe) for recipe in recipes[1:]),
        *(own(90, "steps", f"fp8-{recipe}", reference) for recipe in recipes[1:]),
        own(120, "memory", "bf16", "parallel.recompute=none"),
        tests("tests of FP8", 120, "tests/unit/fp8/test_blocks.py", "tests/unit/policy/test_fp8_state.py"),
        tests("layouts of one rank", 900, "tests/loop/test_layouts.py", "-k", "tp1", is_quick=False, needs="transformers"),
        tests("unit tests", 3600, "tests/unit", is_quick=False, on_cpu=True, needs="transformers"),
        Check("smoke", ("bash", "tools/smoke.sh", smoke), 900, is_quick=False, needs="vllm"),
        run(600, "train", "fp32", smoke),
        run(600, "train", "bf16", smoke),
        run(1200, "stopped", smoke),
        run(5400, "quickstart", str(out / "quickstart")),
    ]


NOT_BY_SCRIPT = {
    "4 tensor parallel engines": "needs two GPUs",
    "6 other layouts": "needs two GPUs or more: pytest tests/loop/test_layouts.py there",
    "7 refit of models through vLLM": "needs a model folder of 1.5B and 7B; `refits.jsonl` of a run has the figures",
    "9 greedy answers of transformers and vLLM": "by hand, from the folder of check `quickstart`",
    "10 a killed rank": "needs two GPUs; the interrupt is in check `stopped`",
    "11 Slurm": "needs a cluster",
    "12 the paper's table": "needs Qwen2.5-Math-1.5B and the benchmarks",
}


class Runner:
    """Runs checks until the time is up.

    Args:
        out: folder of results.jsonl and log.txt.
        minutes: for all of them.
        patience: how many times its limit a check may take.
    """

    def __init__(self, out: Path, minutes: float, patience: float = 1.0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.results, self._log = out / "results.jsonl", out / "log.txt"
        self.ended: list[Ended] = []
        self._hides_engine = False
        self._deadline, self._patience = time.monotonic() + 60 * minutes, patience

    def write(self, **line: Any) -> None:
        """Add a line to the results."""
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def look_for_transformer_engine(self) -> None:
        """Hide it where it would break megatron-core: without a GPU, and where its torch part does not fit the torch that is there."""
        code = "import torch; torch.cuda.init(); import transformer_engine.pytorch; print(transformer_engine.__file__)"
        self.run(Check("transformer engine", (sys.executable, "-W", "ignore", "-c", code), 90))
        self._hides_engine = self.ended[-1].status != "passed"

    def run(self, check: Check) -> None:
        """One check, from its start to the end of its process group."""
        left = self._deadline - time.monotonic()
        if importlib.util.find_spec(check.needs) is None:
            ended = Ended(check.name, "skipped", reason=f"no {check.needs} here")
        elif left < min(20.0, check.limit_s):
            ended = Ended(check.name, "skipped", reason="no time left")
        else:
            ended = self._run(replace(check, limit_s=min(check.limit_s * self._patience, left)))
        self.end(ended)

    def end(self, ended: Ended) -> None:
        """Write and say how a check ended."""
        self.ended.append(ended)
        self.write(**asdict(ended))
        print(f"{ended.status:8} {ended.check:28} {ended.seconds:6.1f} s  {ended.reason}".rstrip(), flush=True)

    def _run(self, check: Check) -> Ended:
        start = time.monotonic()
        with self._log.open("a+b") as log:
            log.write(f"\n== {check.name}\n".encode())
            log.flush()
            first = log.tell()
            process = subprocess.Popen(
                check.command,
                cwd=ROOT,
                env=self._environment(check),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                status = process.wait(check.limit_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # whatever it has started ends with it
            process.wait()
            log.seek(first)
            said = log.read().decode(errors="replace").strip().splitlines()
        seconds, tail = time.monotonic() - start, tuple(said[-LOG_LINES:])
        last = tail[-1][:300] if tail else ""
        if status == 0:
            return Ended(check.name, "passed", seconds)
        if status == SKIPPED:
            return Ended(check.name, "skipped", seconds, last)
        reason = f"not ended after {check.limit_s:.0f} s" if status is None else f"status {status}: {last}"
        return Ended(check.name, "failed", seconds, reason, tail)

    def _environment(self, check: Check) -> dict[str, str]:
        variables = os.environ | {"R1Z_CHECK": check.name, "R1Z_FIGURES": str(self.results.resolve()), "R1Z_LIMIT_S": str(check.limit_s)}
        if check.on_cpu:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        if check.on_cpu or self._hides_engine:
            variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / HIDING), os.environ.get("PYTHONPATH", str(ROOT))])
        return {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | variables


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"one GPU, no vLLM, {QUICK_MINUTES:.0f} minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument("--minutes", type=float, help="for all checks")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks by their whole names, of either mode")
    parser.add_argument("--patience", type=float, default=1.0, help="times the limit of each check, on a busy machine")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    runner = Runner(out, given.minutes or (QUICK_MINUTES if given.quick else 60 * 24), given.patience)
    runner.write(run=datetime.now(UTC).strftime("%Y-%m-%d"), commit=os.environ.get("COMMIT", "unknown"), is_quick=given.quick)
    runner.look_for_transformer_engine()
    for check in all_checks(out):
        if check.name in given.only if given.only else check.is_quick or not given.quick:
            runner.run(check)
    for name, reason in ({} if given.quick or given.only else NOT_BY_SCRIPT).items():
        runner.end(Ended(name, "skipped", reason=reason))
    failed = [item.check for item in runner.ended if item.status == "failed"]
    print(f"{len(failed)} of {len(runner.ended)} failed: {', '.join(failed) or 'none'}; figures are in {runner.results}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
