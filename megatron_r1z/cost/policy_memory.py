"""Memory of the policy on one rank: weights, gradients, optimizer, and what a pass over a micro-batch needs.

Sizes of parameters are those of the layout, padding included. Gradients are float32 buffers (`policy/optimizer.py`); with bf16 weights the
optimizer has a float32 master weight and two moments for each parameter, with fp32 weights the two moments. The distributed optimizer
splits those over the data-parallel and context-parallel ranks, and offload keeps them in the host's memory with a copy of the gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_r1z.config import OptimizerConfig, ParallelConfig
from megatron_r1z.cost.activations import BatchSize, HeadBytes, TokenBytes, backward_bytes, chunks_in_flight, head_bytes, token_bytes
from megatron_r1z.cost.formats import FP32_BYTES, NumberFormat, ParameterCounts, count_parameters
from megatron_r1z.layout.blocks import POLICY_VOCAB_MULTIPLE, Spec, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.speed import GradientSpeed, Machine, ModelSpeed, gradient_speed, model_speed


@dataclass(frozen=True)
class PolicyMemory:
    """Bytes on a rank of each pipeline stage.

    Raises:
        ConfigError: the model cannot be split, when a figure is asked for.
    """

    shape: ModelShape
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    form: NumberFormat
    """Of weights and activations."""
    batch: BatchSize
    spec: Spec = "te"

    @property
    def topology(self) -> Topology:
        """Degrees of the policy."""
        return self.parallel.topology

    @cached_property
    def parameters(self) -> tuple[ParameterCounts, ...]:
        """Of a rank of each stage; those of a stage have as many."""
        topology = self.topology
        one_copy = Topology(topology.tp * topology.pp, topology.tp, topology.pp, topology.vpp, chunk_layers=topology.chunk_layers)
        return _stage_parameters(self.shape, one_copy, self.spec)

    def weights(self, stage: int) -> int:
        """In the policy's format."""
        return self.parameters[stage].nbytes(self.form)

    def gradients(self, stage: int) -> int:
        """Megatron's float32 buffers."""
        return self.parameters[stage].total * FP32_BYTES

    def optimizer_state(self, stage: int) -> int:
        """Master weights and moments on the device."""
        if self.optimizer.offload_to_host:
            return 0
        values = 3 if self.form.itemsize < FP32_BYTES else 2
        return self.stepped_parameters(stage) * values * FP32_BYTES

    def host_state(self, stage: int) -> int:
        """Gradients, master weights and moments in the host's memory (megatron-core `HybridDeviceOptimizer`)."""
        return self.stepped_parameters(stage) * 4 * FP32_BYTES if self.optimizer.offload_to_host else 0

    @property
    def speed(self) -> tuple[ModelSpeed, GradientSpeed]:
        """What is on where layers of this spec run."""
        machine = Machine(self.spec == "te", self.spec == "te")
        return model_speed(self.parallel, machine), gradient_speed(self.parallel, self.optimizer, machine)

    @property
    def placeholders(self) -> int:
        """What autograd is given in place of gradients that are added to their sums already, one for each matrix of a layer.

        Transformer Engine keeps them by their shapes, for all layers and models (`get_dummy_wgrad`).
        """
        shape, tp = self.shape, self.topology.tp
        if not self.speed[1].gradient_accumulation_fusion:
            return 0
        heads = shape.num_heads * shape.head_dim
        widths = {
            ((heads + 2 * shape.num_kv_heads * shape.head_dim) // tp, shape.hidden_size),
            (shape.hidden_size, heads // tp),
            (2 * shape.ffn_size // tp, shape.hidden_size),
            (shape.hidden_size, shape.ffn_size // tp),
        }
        return sum(rows * columns for rows, columns in widths) * self.form.itemsize

    def stepped_parameters(self, stage: int) -> int:
        """Parameters whose optimizer step this rank takes."""
        copies = self.topology.dp * self.topology.cp  # context-parallel ranks hold the same weights
        return math.ceil(self.parameters[stage].total / (copies if self.optimizer.distributed else 1))

    # --- passes ---

    @cached_property
    def token(self) -> TokenBytes:
        """What autograd keeps of one token in one layer."""
        return token_bytes(
            self.shape,
            self.topology.tp,
            sequence_parallel=self.parallel.sequence_parallel,
            form=self.form,
            spec=self.spec,
            is_fused=bool(self.speed[0].swiglu_fusion),
        )

    @property
    def hidden(self) -> float:
        """Hidden width of a token outside of tensor-parallel regions, on average over all tokens of the micro-batch."""
        return self.shape.hidden_size / (self.topology.tp if self.parallel.sequence_parallel else 1)

    @property
    def vocab_columns(self) -> int:
        """Of the output layer on a rank of the last stage, padding included."""
        return padded_vocab_size(self.shape.vocab_size, POLICY_VOCAB_MULTIPLE[self.spec] * self.topology.tp) // self.topology.tp

    @property
    def head(self) -> HeadBytes:
        """Log-probs, on the last stage."""
        return head_bytes(self.shape, self.vocab_columns, self.batch, hidden=self.hidden, itemsize=self.form.itemsize, spec=self.spec)

    def kept(self, stage: int) -> int:
        """What autograd keeps at the fullest moment: at the end of a forward pass, or while a layer that was recomputed is in memory."""
        layers, is_last = self._waiting_layers(stage), stage == self.topology.pp - 1
        between = (layers * self.token.kept(self.parallel.recompute) + self._left_on_device) * self.batch.tokens
        inside = self.token.recomputed(self.parallel.recompute) * self.batch.tokens
        return round(between + max(inside, self.head.kept if is_last else 0))

    def update(self, stage: int) -> int:
        """What a step's forward and backward passes need at the fullest moment, which is the backward pass of a layer or of the head."""
        tokens, recompute = self.batch.tokens, self.parallel.recompute
        between = (self._waiting_layers(stage) * self.token.kept(recompute) + self._left_on_device) * tokens
        gradients = backward_bytes(
            self.shape, self.topology.tp, sequence_parallel=self.parallel.sequence_parallel, itemsize=self.form.itemsize
        )
        inside = (self.token.recomputed(recompute) + gradients) * tokens
        if stage == self.topology.pp - 1:
            return round(between + max(inside, self.head.kept + self.head.backward))
        sent = sum(self._waiting(stage)) * self.hidden * self.form.itemsize * tokens  # a stage keeps what it has sent on
        return round(between + inside + sent)

    def logprobs(self, stage: int) -> int:
        """What the log-prob pass needs: it keeps nothing, so one layer, or the head."""
        in_layer = round(self.token.whole * self.batch.tokens)
        return max(in_layer, self.head.forward) if stage == self.topology.pp - 1 else in_layer

    @property
    def _left_on_device(self) -> float:
        """Of a token in all layers that are offloaded: what the feed-forward layer's gate and up projection gives.

        Its activation keeps the gate, a tensor with gaps, which Transformer Engine leaves where it is (`pytorch/cpu_offload.py`).
        """
        return self.parallel.offload_layers * 2 * self.shape.ffn_size / self.topology.tp * self.form.itemsize

    def _waiting(self, stage: int) -> list[int]:
        return chunks_in_flight(self.topology, stage, self.batch.micro_batches)

    def _waiting_layers(self, stage: int) -> int:
        """Layers times micro-batches that wait for their backward pass on the GPU."""
        chunks = self.topology.chunks(self.shape.num_layers, stage)
        waiting = sum(count * len(chunk.layers) for count, chunk in zip(self._waiting(stage), chunks, strict=True))
        return waiting - self.parallel.offload_layers


@lru_cache(maxsize=256)
def _stage_parameters(shape: ModelShape, topology: Topology, spec: Spec) -> tuple[ParameterCounts, ...]:
    layout = megatron_layout(shape, topology, POLICY_VOCAB_MULTIPLE[spec], spec)
    return tuple(count_parameters(layout.parameters[topology.rank_of(0, 0, 0, stage)]) for stage in range(topology.pp))
