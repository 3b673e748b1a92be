"""Policies by Transformer Engine's spec, ranks of many layouts in turn: `layouts_worker.py` reads cases and prints differences.

A case on standard input is a line of JSON: a name, model, degrees and rank. Of each a line comes back: parameters that differ from the
layout's, number formats, and the names under which a checkpoint would have them, with their whole sizes.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

from megatron_r1z.config import ParallelConfig, PrecisionConfig
from megatron_r1z.layout.blocks import POLICY_VOCAB_MULTIPLE, megatron_layout, padded_vocab_size
from megatron_r1z.layout.known import find_shape
from megatron_r1z.rehearse.native import load_libraries


def main() -> None:
    warnings.filterwarnings("ignore")
    load_libraries()
    from megatron_r1z.rehearse.device import Device, pretend_device
    from megatron_r1z.rehearse.engine_module import import_transformer_engine
    from megatron_r1z.rehearse.world import pretend_groups

    pretend_device(Device("NVIDIA H100 80GB HBM3", 79 << 30, (9, 0)))
    pretend_groups()
    import_transformer_engine()
    for line in sys.stdin:
        print("case: " + json.dumps(look_at(json.loads(line))), flush=True)


def look_at(case: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_r1z.policy import model
    from megatron_r1z.policy.parallel import start_megatron
    from megatron_r1z.rehearse.world import start_world

    shape, parallel = find_shape(case["model"]).shape, ParallelConfig(**case["parallel"])
    spec = case.get("spec", "te")
    model.has_transformer_engine = lambda: spec == "te"
    layout = megatron_layout(shape, parallel.topology, POLICY_VOCAB_MULTIPLE[spec], spec).parameters[case["rank"]]
    padded = padded_vocab_size(shape.vocab_size, POLICY_VOCAB_MULTIPLE[spec] * parallel.tensor_parallel_size)
    start_world(case["rank"], parallel.num_ranks)
    start_megatron(parallel.topology, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        chunks = model.build_chunks(getattr(model, case.get("kind", "PolicyModel")), shape, parallel, PrecisionConfig(), padded)
        live = {
            f"chunks.{index}.{name}": tuple(item.shape) for index, chunk in enumerate(chunks) for name, item in chunk.named_parameters()
        }
        formats = sorted({str(item.dtype) for chunk in chunks for item in chunk.parameters()})
        keys = {}
        if case.get("keys"):
            for chunk in chunks:
                for entry in chunk.sharded_state_dict(prefix="").values():
                    if hasattr(entry, "global_shape") and not entry.key.endswith("_extra_state"):
                        keys[entry.key] = list(entry.global_shape)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    wanted = {name: tuple(size) for name, size in layout.items()}
    wrong = sorted(name for name in wanted.keys() | live.keys() if wanted.get(name) != live.get(name))
    return {"name": case["name"], "count": len(live), "wrong": wrong, "formats": formats, "keys": keys, "padded": padded}


if __name__ == "__main__":
    main()
