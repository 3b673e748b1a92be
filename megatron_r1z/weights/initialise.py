"""Random weights for pre-training from scratch, the same for every layout.

Each checkpoint tensor has a generator of its own, seeded by the run's seed and the tensor's name: embeddings and head are N(0, 0.02),
other matrices N(0, 0.7 / sqrt(fan_in)), norms 1, biases 0. A rank makes a tensor whole and keeps the boxes that lie on it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_r1z.layout.blocks import Layout, box_slices
from megatron_r1z.layout.families import ModelShape, TensorSpec, hf_tensors

EMBEDDING_STD = 0.02
LINEAR_GAIN = 0.7


@torch.no_grad()
def random_weights(shape: ModelShape, layout: Layout, rank: int, parameters: Mapping[str, Tensor], seed: int) -> None:
    """Fill one rank's parameters, named as in `layout`; padding becomes zero."""
    for parameter in parameters.values():
        parameter.zero_()
    blocks_of: dict[str, list[int]] = {}
    blocks = layout.blocks_of(rank)
    for index, block in enumerate(blocks):
        blocks_of.setdefault(block.tensor, []).append(index)
    for spec in hf_tensors(shape):
        if spec.name in blocks_of:
            tensor = random_tensor(spec, seed)
            for block in (blocks[index] for index in blocks_of[spec.name]):
                parameters[block.parameter][box_slices(block.local_start, block.size)] = tensor[box_slices(block.start, block.size)].to(
                    parameters[block.parameter]
                )


def random_tensor(spec: TensorSpec, seed: int) -> Tensor:
    """The initial value of one checkpoint tensor, float32."""
    if len(spec.shape) == 1:
        return torch.zeros(spec.shape) if spec.name.endswith(".bias") else torch.ones(spec.shape)
    digest = hashlib.blake2b(f"{seed}/{spec.name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    is_vocabulary = "embed_tokens" in spec.name or "lm_head" in spec.name
    std = EMBEDDING_STD if is_vocabulary else LINEAR_GAIN / math.sqrt(spec.shape[1])
    return torch.randn(spec.shape, generator=generator) * std
