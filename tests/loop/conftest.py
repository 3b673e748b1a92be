"""The real command, the quickstart's task and a base model that solves some of it, made once per session."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import psutil
import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
ITERATIONS = 8
BUDGET = 48
HANGS_S = 900
"""What takes so long waits for ever, however busy the machine; most commands take half a minute."""
TP2 = ("parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=1", "rollout.tensor_parallel_size=2")
TORCHRUN = ("torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node")
"""Its ranks meet at an address, as the machine's name need not resolve to one; what follows is their number."""
MARK = "R1Z_TEST_RUN"
"""In the environment of every process of a run, so that its processes can be told from all others."""
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "GLOO_SOCKET_IFNAME": "lo",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--invariance", metavar="FILE", help="write the table of test_layouts.py as a page (make invariance)")


T = TypeVar("T")


class Once(Protocol):
    """See the fixture `once`."""

    def __call__(self, name: str, make: Callable[[Path], T]) -> T: ...


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it left behind."""

    status: int
    stdout: str
    stderr: str
    processes: list[str]
    """Command lines of its processes that were still there at its end."""
    segments: list[str]
    """Shared memory that was made since its start and that no process uses."""


class Command:
    """A Python module at work with its arguments, started in the root of the repository; `unread`: nobody reads its standard output."""

    def __init__(self, folder: Path, arguments: list[str], environment: dict[str, str], *, unread: bool = False) -> None:
        self.mark = uuid.uuid4().hex
        self.outputs = [folder / f"{self.mark}.{name}" for name in ("stdout", "stderr")]
        self.segments = segments()
        with self.outputs[0].open("w") as kept, self.outputs[1].open("w") as stderr, broken_pipe() as broken:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env=ENVIRONMENT | {MARK: self.mark} | environment,
                stdin=subprocess.DEVNULL,
                stdout=broken if unread else kept,
                stderr=stderr,
            )

    def processes(self) -> list[psutil.Process]:
        """Those that carry the mark and are alive, the supervisor among them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def rank(self, number: int) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if child.environ().get("RANK") == str(number))

    def wait_until(self, condition: Callable[[], bool], timeout: float = HANGS_S) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.outputs[1].read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"not within {timeout} s; {self.outputs[0].read_text()[-4000:]}"
            time.sleep(0.02)

    def wait(self, timeout: float = HANGS_S) -> Outcome:
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise
        left = self.left_processes()
        stdout, stderr = (path.read_text() for path in self.outputs)
        return Outcome(status, stdout, stderr, left, self.left_segments())

    def left_processes(self, patience: float = 30) -> list[str]:
        """Those that stay: Python's tracker of resources ends when it sees that its process has ended."""
        deadline = time.monotonic() + patience
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        found = []
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(" ".join(process.cmdline()))
        return found

    def left_segments(self, patience: float = 60) -> list[str]:
        """Those of no process that stay so: for a moment there may be some of another run, which is being killed beside this one."""
        deadline = time.monotonic() + patience
        while (left := sorted(set(unused(segments())) - set(self.segments))) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def end(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def broken_pipe() -> Iterator[int]:
    """Where one writes and nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def rows_of(folder: Path, unit: str = "iteration") -> list[dict[str, float]]:
    """Rows of `metrics.jsonl`, those of evaluations among them."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if unit in row]


def iterations_of(folder: Path) -> list[dict[str, float]]:
    return [row for row in rows_of(folder) if "rollout/reward_mean" in row]


def has_iteration(folder: Path, number: int) -> bool:
    return any(row["iteration"] >= number for row in iterations_of(folder))


def figures_of(folder: Path) -> list[dict[str, float]]:
    """All figures of each iteration but seconds. A run that was stopped may have in rows of their own what came after the stop."""
    merged: dict[float, dict[str, float]] = {}
    for row in rows_of(folder):
        merged.setdefault(row["iteration"], {}).update(row)
    kept = [{name: value for name, value in row.items() if not name.startswith("time")} for row in merged.values()]
    return [{name: value for name, value in row.items() if name != "refit/seconds_s"} for row in kept]


def segments() -> list[str]:
    """Shared memory of the kinds that vLLM, torch and multiprocessing make."""
    return [path.name for kind in ("*-cpushm*", "torch_*", "psm_*") for path in Path("/dev/shm").glob(kind)]


def unused(names: list[str]) -> list[str]:
    """Those that no process has mapped."""
    maps = []
    for path in Path("/proc").glob("[0-9]*/maps") if names else ():
        with contextlib.suppress(OSError):
            maps.append(path.read_text(errors="replace"))
    return [name for name in names if not any(f"/dev/shm/{name}" in text for text in maps)]


class CommandLine:
    """`megatron-r1z`, as a user types it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Command] = []

    def start(self, *arguments: str, environment: dict[str, str] | None = None, torchrun: int = 0, unread: bool = False) -> Command:
        """Start the command, by itself or as so many ranks of torchrun."""
        launcher = [*TORCHRUN, str(torchrun), "-m"] if torchrun else []
        command = Command(self.folder, [*launcher, "megatron_r1z", *arguments], environment or {}, unread=unread)
        self.started.append(command)
        return command

    def run(self, *arguments: str, environment: dict[str, str] | None = None, torchrun: int = 0, timeout: float = HANGS_S) -> Outcome:
        return self.start(*arguments, environment=environment, torchrun=torchrun).wait(timeout)


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    line = CommandLine(tmp_path_factory.mktemp("output"))
    yield line
    for command in line.started:
        if command.process.poll() is None:
            command.end()


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., None]:
    """Run a script with its arguments on so many ranks."""

    def run(num_ranks: int, script: Path, *arguments: object) -> None:
        launcher = [sys.executable, "-m", *TORCHRUN, str(num_ranks)]
        command = [*launcher, "-m", "tests.loop.rank", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=HANGS_S, check=False)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}"

    return run


@dataclass(frozen=True)
class Task:
    """The easiest part of the quickstart's task: sums of three digits, which a model gets partly right after a few seconds."""

    model: Path
    """Four layers, so that it can be split by two and by two again; without weights."""
    corpus: Path
    questions: Path


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes what all test processes share: the first to ask for it makes it in a folder of its name, the others wait."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def once(name: str, make: Callable[[Path], T]) -> T:
        made = root / f"{name}.pickle"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                (root / name).mkdir(exist_ok=True)  # left by a process in which it failed
                made.write_bytes(pickle.dumps(make(root / name)))
            result: T = pickle.loads(made.read_bytes())
            return result

    return once


@pytest.fixture(scope="session")
def task(once: Once) -> Task:
    return once("task", make_task)


def make_task(folder: Path) -> Task:
    subprocess.run([sys.executable, "examples/quickstart/make_task.py", folder], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    documents = [row for row in map(json.loads, (folder / "corpus.jsonl").read_text().splitlines()) if row["level"] == "sum-3"]
    prompts = sorted({row["prompt"] for row in documents})
    questions = [{"problem": prompt, "answer": str(sum(map(int, re.findall(r"\d", prompt))))} for prompt in prompts]
    easy = Task(folder / "model", folder / "easy_corpus.jsonl", folder / "easy_questions.jsonl")
    easy.corpus.write_text("".join(json.dumps(row) + "\n" for row in documents))
    easy.questions.write_text("".join(json.dumps(row) + "\n" for row in questions))
    config = json.loads((easy.model / "config.json").read_text())
    (easy.model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    return easy


@pytest.fixture(scope="session")
def pretraining(task: Task) -> list[str]:
    """Arguments of `pretrain`, but for the run folder."""
    return [
        "configs/quickstart-pretrain.yaml",
        f"model.path={task.model}",
        f"corpus.sources.0.path={task.corpus}",
        "corpus.steps=100",
        "corpus.documents_per_step=64",
        "optimizer.warmup_steps=10",
        "optimizer.decay_steps=100",
    ]


@pytest.fixture(scope="session")
def base(pretraining: list[str], cli: CommandLine, once: Once) -> Path:
    """A model that solves about a sixth of the questions, so that groups are mixed and have a gradient."""

    def make(folder: Path) -> Path:
        outcome = cli.run("pretrain", *pretraining, f"logging.folder={folder}")
        assert (outcome.status, outcome.stderr) == (0, "")
        return folder / "hf" / "final"

    return once("base", make)


@pytest.fixture(scope="session")
def training(base: Path, task: Task) -> list[str]:
    """Arguments of `train`, but for the run folder and the layout: 8 prompts x 4 samples."""
    return [
        "configs/quickstart.yaml",
        f"model.path={base}",
        f"data.train=[{{path: {task.questions}}}]",
        f"evaluation.sets=[{{path: {task.questions}, limit: 8}}, {{path: {task.questions}, offset: 8, limit: 4, name: others}}]",
        "evaluation.every=4",
        "rollout.prompts_per_iteration=8",
        "rollout.samples_per_prompt=4",
        f"rollout.max_response_tokens={BUDGET}",
        "algorithm.train_batch_size=32",
        f"algorithm.iterations={ITERATIONS}",
        "optimizer.lr=3e-5",
        "checkpoint.every=4",
    ]


@pytest.fixture(scope="session")
def unbroken(training: list[str], cli: CommandLine, once: Once) -> tuple[Path, Outcome]:
    """Tensor parallel on both sides, run to the end: its folder and its outcome."""
    return once("unbroken", lambda folder: (folder, cli.run("train", *training, *TP2, f"logging.folder={folder}")))
