"""The critic of PPO on a rank: layers like the policy's, and one number per token in place of the output layer (`model.ValueModel`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_r1z.cost.activations import HeadBytes, final_norm_bytes
from megatron_r1z.cost.formats import FP32_BYTES, ParameterCounts
from megatron_r1z.cost.policy_memory import PolicyMemory
from megatron_r1z.layout.families import ModelShape


@dataclass(frozen=True)
class CriticMemory(PolicyMemory):
    """Bytes on a rank of each pipeline stage."""

    @cached_property
    def parameters(self) -> tuple[ParameterCounts, ...]:
        """As the policy's, but for the output layer, which is whole on every rank of the last stage. No tied embeddings."""
        untied = replace(self.shape, tied_embeddings=False)
        *stages, last = PolicyMemory(untied, self.parallel, self.optimizer, self.form, self.batch, self.spec).parameters
        output_layer = self.vocab_columns * self.shape.hidden_size
        return (*stages, last._replace(others=last.others - output_layer + self.shape.hidden_size))

    @property
    def head(self) -> HeadBytes:
        """Values of the response tokens in float32, with the gradients of their hidden states."""
        norm = final_norm_bytes(self.batch, self.hidden, self.form.itemsize, self.spec)
        rows = self.batch.responses * self.shape.hidden_size
        forward = rows * (FP32_BYTES + (self.form.itemsize if self.form.itemsize < FP32_BYTES else 0))
        whole = self.batch.tokens * self.shape.hidden_size * self.form.itemsize
        return HeadBytes(norm + rows * FP32_BYTES, forward, forward + whole)


def flops_shape(shape: ModelShape) -> ModelShape:
    """The critic's for an account of its arithmetic: a vocabulary of one."""
    return replace(shape, vocab_size=1)
