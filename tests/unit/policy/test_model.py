"""What the model is told about a micro-batch."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from megatron_r1z.packing import PackingRules, pack
from megatron_r1z.policy.model import packed_parameters
from megatron_r1z.types import Sample


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_packed_sequences_are_described_whole_on_every_context_parallel_rank(cp: int) -> None:
    """Transformer Engine wants boundaries with padding, and takes the same tensor for no padding between sequences."""
    samples = [Sample(f"0/{index}", tuple(range(1, 8 + index)), 3, 1.0, 1.0, (), 0) for index in range(3)]
    rules = PackingRules(data_parallel_size=1, micro_batch_tokens=100, context_parallel_size=cp)
    for rank in range(cp):
        (batch,) = pack(samples, rules, 0, rank, token_weight=lambda _length: 1.0, denominator=1).micro_batches
        packed = packed_parameters(batch, cp)
        assert packed.cu_seqlens_q is packed.cu_seqlens_kv
        assert int(packed.cu_seqlens_q[-1]) == cp * batch.num_tokens
        assert packed.max_seqlen_q == packed.max_seqlen_kv == int(packed.cu_seqlens_q.diff().max())
        for padded in (packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded):
            assert padded is (packed.cu_seqlens_q if cp > 1 else None)
        assert not (packed.cu_seqlens_q % (2 * cp if cp > 1 else 1)).any()
