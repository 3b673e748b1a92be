"""One rank of `test_export.py`: `export_ranks.py RANK NUM_RANKS CASE FOLDER`; ends with status 0 if what it asserts holds.

FOLDER holds `model`, a folder in Hugging Face format.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.errors import ExportError
from megatron_r1z.layout.blocks import Layout, megatron_layout
from megatron_r1z.layout.families import load_shape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.weights import hf_files
from megatron_r1z.weights.export import load_hf_weights, save_hf

DTYPE = torch.bfloat16
TOPOLOGIES = {1: [Topology(1)], 2: [Topology(2, tp=2), Topology(2, pp=2), Topology(2)], 4: [Topology(4, tp=2, pp=2, vpp=2)]}
WAVE_BYTES = {1: [1], 2: [1000], 4: [800, 1 << 20]}


def loaded(folder: Path, layout: Layout, rank: int) -> dict[str, Tensor]:
    parameters = {name: torch.empty(size) for name, size in layout.parameters[rank].items()}
    load_hf_weights(folder, load_shape(folder), layout, rank, parameters)
    return parameters


def export(folder: Path, topology: Topology, rank: int, target: Path, wave_bytes: int, shard_bytes: int) -> None:
    shape = load_shape(folder / "model")
    layout = megatron_layout(shape, topology, 8)
    weights = loaded(folder / "model", layout, rank)
    save_hf(target, folder / "model", shape, layout, weights, rank, topology.num_ranks, DTYPE, shard_bytes, wave_bytes)


def case_waves(rank: int, num_ranks: int, folder: Path) -> None:
    """A folder per layout and wave; `test_export.py` compares them."""
    for number, topology in enumerate(TOPOLOGIES[num_ranks]):
        for wave_bytes in WAVE_BYTES[num_ranks]:
            export(folder, topology, rank, folder / f"out_{num_ranks}_{number}_{wave_bytes}", wave_bytes, 9000)


def case_full_disk(rank: int, num_ranks: int, folder: Path) -> None:
    """The last rank may not write more than 4000 bytes into a file, which the system tells it as it would a full disk."""
    if rank == num_ranks - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    with pytest.raises(ExportError, match=r"cannot write .*out.partial: File too large; name a folder that .* has \d+ bytes free"):
        export(folder, TOPOLOGIES[num_ranks][0], rank, folder / "out", 1000, 9000)


def case_bad_disk(rank: int, num_ranks: int, folder: Path) -> None:
    """What the last rank wrote does not come back from its disk."""
    if rank == num_ranks - 1:
        sync = hf_files.sync

        def flip_last_bit(path: Path) -> None:
            path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
            sync(path)

        hf_files.sync = flip_last_bit
    with pytest.raises(ExportError, match=r"out.partial/model-\d+-of-\d+.safetensors: model\.\S+ reads back as"):
        export(folder, TOPOLOGIES[num_ranks][0], rank, folder / "out", 1000, 9000)


CASES: Mapping[str, Callable[[int, int, Path], None]] = {
    "waves": case_waves,
    "full_disk": case_full_disk,
    "bad_disk": case_bad_disk,
}


def main(rank: int, num_ranks: int, case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if num_ranks > 1:
        store = dist.FileStore(str(folder / f"store_{case}_{num_ranks}"), num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=600))
    CASES[case](rank, num_ranks, folder)
    if num_ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
