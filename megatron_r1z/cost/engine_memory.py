"""Memory of the engine on one rank: weights, key-value cache and what a step of vLLM needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_r1z.config import RolloutConfig
from megatron_r1z.cost.formats import FP32_BYTES, NumberFormat, ParameterCounts, count_parameters
from megatron_r1z.layout.blocks import engine_layout
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.speed import BATCHED_TOKENS

CACHE_UNIT = 256 << 20
"""A key-value cache that is made to fit is so many of these."""
CACHE_BLOCK = 16
"""Tokens that vLLM gives a sequence at a time."""
SAMPLER_COPIES = 4
"""Float32 matrices [sequences, vocabulary] at once in vLLM's sampler: logits, log-probs, probabilities, random numbers."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one rank of an engine.

    Raises:
        ConfigError: the model cannot be split, when a figure is asked for.
    """

    shape: ModelShape
    rollout: RolloutConfig
    form: NumberFormat
    max_model_tokens: int
    """Of prompt and response."""
    cache_bytes: int
    """Of the key-value cache."""
    batch_tokens: int = BATCHED_TOKENS
    """Computed in one step at most."""

    @property
    def tp(self) -> int:
        """Ranks of an engine."""
        return self.rollout.tensor_parallel_size

    @cached_property
    def parameters(self) -> ParameterCounts:
        """Of one rank."""
        return _rank_parameters(self.shape, self.tp)

    @property
    def weights(self) -> int:
        """In the engine's format."""
        return self.parameters.nbytes(self.form)

    @property
    def staging(self) -> int:
        """The second copy that a refit writes into where the kernels' layout is not that of the checkpoint."""
        return self.weights if self.form.is_staged else 0

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token on one rank; each rank has at least one key-value head."""
        heads = max(1, self.shape.num_kv_heads // self.tp)
        return 2 * self.shape.num_layers * heads * self.shape.head_dim * self.form.itemsize

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache of an engine holds."""
        return self.cache_bytes // self.cache_bytes_per_token

    def cache_for(self, room: int) -> int:
        """The key-value cache for so many bytes: all sequences at their full length if they fit, and one whatever fits."""
        one = -(-self.max_model_tokens // CACHE_BLOCK) * CACHE_BLOCK * self.cache_bytes_per_token
        return max(one, min(one * self.rollout.max_concurrent_sequences, room // CACHE_UNIT * CACHE_UNIT))

    def concurrent(self, tokens: float) -> int:
        """Sequences of so many tokens, prompt included, that an engine can have at once."""
        return min(self.rollout.max_concurrent_sequences, int(self.cache_tokens / tokens))

    @property
    def work(self) -> int:
        """What a step needs: the widest layer of a full batch of tokens, and the sampler's matrices.

        A layer has its residual, input and output at once, the fused gate and up projection and its activated half.
        """
        per_token = self.form.itemsize * (4 * self.shape.hidden_size + 3 * self.shape.ffn_size // self.tp)
        sampler = SAMPLER_COPIES * FP32_BYTES * self.rollout.max_concurrent_sequences * self.shape.vocab_size
        return max(self.batch_tokens * per_token, sampler)


@lru_cache(maxsize=64)
def _rank_parameters(shape: ModelShape, tp: int) -> ParameterCounts:
    return count_parameters(engine_layout(shape, tp, tp).parameters[0])
