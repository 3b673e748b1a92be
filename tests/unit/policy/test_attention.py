"""An attention that keeps scores is refused; tests/gpu_stack asks Transformer Engine itself."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from megatron_r1z.config import ParallelConfig
from megatron_r1z.errors import ConfigError
from megatron_r1z.policy.attention import Attention, check_attention


@pytest.mark.parametrize("found", ["flash", "fused"])
def test_kernels_without_scores_pass(found: Attention) -> None:
    check_attention(found, ParallelConfig(), 4096)


@pytest.mark.parametrize(("found", "words"), [("unfused", "its unfused one, which keeps the scores"), ("none", "none at all")])
def test_what_keeps_scores_is_refused_with_what_to_install(found: Attention, words: str) -> None:
    with pytest.raises(ConfigError, match=f"of up to 4096 tokens in bf16 Transformer Engine has {words}") as caught:
        check_attention(found, ParallelConfig(num_ranks=2, tensor_parallel_size=2), 4096)
    assert "parallel.tensor_parallel_size 2" in str(caught.value)
    assert "install flash-attn" in str(caught.value)
