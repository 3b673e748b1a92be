"""Figures of response tokens: however they were packed and split, each response gets its own back, in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.packing import PackingRules, pack
from megatron_r1z.policy.token_figures import join_figures, split_figures
from megatron_r1z.types import Sample


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    rules=st.builds(
        PackingRules,
        data_parallel_size=st.integers(1, 3),
        micro_batch_tokens=st.sampled_from([20, 60]),
        context_parallel_size=st.integers(1, 3),
        pad_sequences=st.booleans(),
    ),
)
def test_every_response_gets_its_figures_back(lengths: list[tuple[int, int]], rules: PackingRules) -> None:
    """The figure of a token is its id, which no other token has."""
    samples = [
        Sample(f"{index}/0", tuple(range(20 * index, 20 * index + prompt + response)), prompt, 0.0, 1.0, (), 0)
        for index, (prompt, response) in enumerate(lengths)
    ]
    parts = []
    for data_rank in range(rules.data_parallel_size):
        for context_rank in range(rules.context_parallel_size):
            given_ = {"token_weight": lambda _length: 1.0, "denominator": 1, "skip_zero_advantage": False}
            batches = pack(samples, rules, data_rank, context_rank, **given_).micro_batches  # type: ignore[arg-type]
            parts += split_figures(batches, [item.targets_R.double() for item in batches])
            assert split_figures(batches, [None] * len(batches)) == []  # as on all but the last pipeline stage
    assert join_figures(parts) == {sample.sample_id: list(sample.token_ids[sample.prompt_length :]) for sample in samples}
