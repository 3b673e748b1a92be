"""What libraries say in a rehearsal that is no matter, and why. Anything else is: a slow way, above all."""

from __future__ import annotations

import re
from collections.abc import Iterable

EXPLAINED = {
    r"GPTModel IS DEPRECATED": "it works and gets critical fixes; docs/gpu.md has what a move to HybridModel would take",
    r"is deprecated|deprecated internal API|will be removed|_reduce_scatter_base|Please use `torch\.distributed": (
        "calls among the libraries, of names that a later release drops; docs/gpu.md has those that concern us"
    ),
    r"Apex is not installed": "nothing of ours needs apex beside Transformer Engine",
    r"CUDA_DEVICE_MAX_CONNECTIONS": "speed alone: whether tensor parallelism overlaps with the backward pass (docs/gpu.md)",
    r"full scope is deprecated": "of CUDA graphs, which the policy does not use",
    r"MLP requires ffn_hidden_size": "the configuration has it",
    r"full_param_layout not provided": "megatron-core computes the layout of its buffers itself",
    r"is experimental": "a class of megatron-core that is registered and not used",
    r"Accessing the data pointer of FakeTensor": "tensors of a rehearsal have no address",
    r"tp_group is None": "the default group is the one that is meant",
    r"Tried to offload non-contiguous tensor": "the gate of the feed-forward layer, which `plan` leaves on the device too",
    r"is not in a CUDA|No CUDA runtime|TORCH_CUDA_ARCH": "there is no device",
}
"""Words of it, by what makes it no matter."""


def unexplained(said: Iterable[str]) -> list[str]:
    """What is in none of the explanations."""
    return [text for text in said if not any(re.search(pattern, text) for pattern in EXPLAINED)]
