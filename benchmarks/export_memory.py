"""Peak memory of export and import beside a rank's own parameters, for a model of Qwen2.5-1.5B's shape with random weights in bf16.

    python benchmarks/export_memory.py                      files go into a temporary folder, which is removed
    python benchmarks/export_memory.py --folder FOLDER      or into FOLDER, where they stay (9.3 GB)

Every measurement has fresh processes: one rank, then two ranks that share every matrix. A rank holds its parameters and nothing else of
the model. `peak` is the highest resident set since the parameters were made, `anonymous` the highest that is no page of a file (a
mapped file counts while it is mapped), both without what the imports took. `ratio` is the larger one over the parameters of the largest
rank plus one round: 1.00 would mean that nothing beside these two was ever held.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.host.rank import rank_entry
from megatron_r1z.host.supervisor import run_ranks
from megatron_r1z.layout.blocks import Layout, megatron_layout
from megatron_r1z.layout.families import load_shape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.record.tables import align
from megatron_r1z.weights.export import load_hf_weights, save_hf
from megatron_r1z.weights.hf_files import PIECE_BYTES

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
DTYPE = torch.bfloat16
GB = 1e9


class PeakMemory:
    """The highest memory of this process while the context is open, in bytes, as the kernel and a thread see it."""

    def __enter__(self) -> PeakMemory:
        self.anonymous, self._done = 0, threading.Event()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()
        self.resident = status("VmHWM")

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.anonymous = max(self.anonymous, status("RssAnon"))


def status(field: str) -> int:
    """A figure of this process, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main() -> int:
    """Measure and print, or be one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go")
    parser.add_argument("--rank", choices=WORK, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return rank_entry(lambda: be_rank(options.rank, options.folder))
    if options.folder is not None:
        return measure_all(options.folder)
    with tempfile.TemporaryDirectory() as folder:
        return measure_all(Path(folder))


def measure_all(folder: Path) -> int:
    """Export and import on one rank and on two."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    rows = [measure(work, num_ranks, folder) for num_ranks in (1, 2) for work in WORK]
    header = ("", "ranks", "parameters GB", "peak GB", "anonymous GB", "seconds", "ratio")
    print(f"one round is {PIECE_BYTES} bytes; figures are of the rank with the highest peak")
    print(*align([header, *rows]), sep="\n")
    return 0


def measure(work: str, num_ranks: int, folder: Path) -> tuple[str, ...]:
    """One row of the table."""
    arguments = [__file__, "--folder", str(folder), "--rank", work]
    if run_ranks(num_ranks, 1, arguments, command=(sys.executable,)) != 0:
        raise SystemExit(1)
    found = [json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]
    highest = max(found, key=lambda rank: rank["peak"])
    ratio = max(highest["peak"], highest["anonymous"]) / (max(rank["parameters"] for rank in found) + PIECE_BYTES)
    sizes = [f"{highest[name] / GB:.2f}" for name in ("parameters", "peak", "anonymous")]
    return (work, str(num_ranks), *sizes, f"{highest['seconds']:.1f}", f"{ratio:.2f}")


def be_rank(work: str, folder: Path) -> int:
    """Do the work of one rank and write down what it took."""
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    layout = megatron_layout(load_shape(folder / "model"), Topology(num_ranks, tp=num_ranks), 1)
    before = {"peak": status("VmRSS"), "anonymous": status("RssAnon")}
    parameters = {name: torch.empty(size, dtype=DTYPE).uniform_(-1, 1) for name, size in layout.parameters[rank].items()}
    start = time.perf_counter()
    with PeakMemory() as memory:
        WORK[work](folder, layout, rank, parameters)
    figures = {
        "parameters": sum(tensor.nbytes for tensor in parameters.values()),
        "peak": memory.resident - before["peak"],
        "anonymous": memory.anonymous - before["anonymous"],
        "seconds": time.perf_counter() - start,
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(figures), encoding="utf-8")
    dist.destroy_process_group()
    return 0


def export(folder: Path, layout: Layout, rank: int, parameters: dict[str, Tensor]) -> None:
    """Write the files, read them back."""
    num_ranks = dist.get_world_size()
    save_hf(folder / f"{num_ranks}", folder / "model", load_shape(folder / "model"), layout, parameters, rank, num_ranks, DTYPE)


def load(folder: Path, layout: Layout, rank: int, parameters: dict[str, Tensor]) -> None:
    """Read what the export of as many ranks has written."""
    load_hf_weights(folder / f"{dist.get_world_size()}", load_shape(folder / "model"), layout, rank, parameters)


WORK: dict[str, Callable[[Path, Layout, int, dict[str, Tensor]], None]] = {"export": export, "import": load}

if __name__ == "__main__":
    raise SystemExit(main())
