"""Ranks that are not alike, for `test_agreement.py`: RANK NUM_RANKS FOLDER."""

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_r1z.agreement import check_alike, check_shared
from megatron_r1z.errors import ConfigError, DataError

rank, num_ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group(
    "gloo", store=dist.FileStore(str(folder / "store"), num_ranks), rank=rank, world_size=num_ranks, timeout=timedelta(seconds=300)
)

check_alike({"torch": "2.9", f"only {rank}": "said by one"} if rank == 0 else {"torch": "2.9"})
check_alike({f"only {rank}": "said by one"} if rank else {})
with pytest.raises(ConfigError, match=r"vllm is not the same on all ranks: none on \S+ \(ranks 0-1\), 0\.32\.0 on \S+ \(rank 2\);"):
    check_alike({"vllm": "0.32.0" if rank == 2 else ""})
with pytest.raises(ConfigError, match=r"torch is not the same on all ranks: 2\.9 on \S+ \(rank 0\), 2\.8 on \S+ \(ranks 1-2\);"):
    check_alike({"torch": "2.8" if rank else "2.9"})

check_shared(folder / "shared" / "new")
dist.barrier()
assert list((folder / "shared" / "new").iterdir()) == [], "it leaves nothing behind"

with pytest.raises(ConfigError, match=r"own of \S+ \(rank 0\) is not that of \S+ \(rank 2\): a checkpoint needs"):
    check_shared(folder / "own" if rank < 2 else folder / "other" / "own", patience_s=0.1)

if rank == 0:
    (folder / "file").write_text("")
dist.barrier()
with pytest.raises(DataError, match=r"cannot be written \(.+\); give the run another logging\.folder"):
    check_shared(folder / "file" / "run")
dist.destroy_process_group()
