"""Settings and the rank starter of the unit tier."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import megatron_r1z

RunRanks = Callable[..., None]
HANGS_S = 600
"""Ranks that take so long wait for ever, however busy the machine."""


def pytest_configure(config: pytest.Config) -> None:
    # megatron-core 0.16 imports a module of its own that it has deprecated.
    config.addinivalue_line("filterwarnings", "ignore:The 'megatron.core.transformer.custom_layers:DeprecationWarning")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The default process group, of this process alone."""
    import torch.distributed as dist  # not for the tests of the base installation

    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def make_checkpoint() -> Callable[[Path], Path]:
    """`make_checkpoint(path)` writes the files of a checkpoint of a run, with torch's own writer for the tensors, and returns `path`."""

    def make(path: Path) -> Path:
        import torch  # not for the tests of the base installation
        import torch.distributed.checkpoint as dcp

        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process is what is meant
            dcp.save({"weight": torch.arange(1000.0), "bias": torch.ones(3)}, checkpoint_id=path, no_dist=True)
        torch.save({"step": 1}, path / "common.pt")
        (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        (path / "state.json").write_text('{"iteration": 1}')
        return path

    return make


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """`run_ranks(worker, num_ranks, *arguments)` runs `worker RANK NUM_RANKS *arguments` on all ranks; each must end with status 0."""
    return _run_ranks


def _run_ranks(worker: Path, num_ranks: int, *arguments: str) -> None:
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(megatron_r1z.__file__).parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(num_ranks), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=HANGS_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
