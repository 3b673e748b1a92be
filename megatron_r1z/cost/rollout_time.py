"""Seconds of a rollout: prefill, then decode steps with the sequences that are still running.

A decode step of b sequences reads the weights of the rank's shard and the keys and values of b sequences, or multiplies, whichever takes
longer; tensor parallelism adds two all-reduces a layer, and the engine's own Python runs before and after. All engines are equally loaded:
that the slowest one is waited for is not in it, nor are preemptions.

Responses come in two parts, since an exponential has no memory. While some wait, the places are full of sequences of mixed age; from the
last start on, the places empty as fast as fresh sequences would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_r1z.config import TrainConfig
from megatron_r1z.cost.assumptions import Assumptions
from megatron_r1z.cost.cluster import Cluster
from megatron_r1z.cost.compute import decode_flops, sample_flops
from megatron_r1z.cost.engine_memory import EngineMemory
from megatron_r1z.cost.formats import NumberFormat, engine_format
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.speed import GPU_MACHINE, EngineSpeed, engine_speed

SLICES = 200
"""Parts of the generation budget over which a drain is added up."""


class Decode(NamedTuple):
    """Seconds of decode steps, by what they wait for; memory and arithmetic overlap, so that only the longer one counts."""

    weights: float
    """Reading weights."""
    cache: float
    """Reading keys and values."""
    compute: float
    tensor_parallel: float
    host: float
    """The engine's own work."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)

    def times(self, count: float) -> Decode:
        """So many of these."""
        return Decode(*(seconds * count for seconds in self))


class Rollout(NamedTuple):
    """Seconds of a rollout."""

    prefill: float
    decode: Decode
    concurrent: int
    """Sequences that an engine runs at once."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.prefill + self.decode.total


@dataclass(frozen=True)
class RolloutTime:
    """Seconds of one iteration's rollout."""

    config: TrainConfig
    shape: ModelShape
    lengths: Lengths
    memory: EngineMemory
    cluster: Cluster
    assumptions: Assumptions

    @property
    def num_engines(self) -> int:
        """Engines side by side."""
        return self.config.parallel.num_ranks // self.memory.tp

    @property
    def responses(self) -> float:
        """Of one engine."""
        return self.config.rollout.samples_per_iteration / self.num_engines

    @property
    def concurrent(self) -> int:
        """Sequences at once: what the cache holds of mean length, the engine's limit, or all."""
        limit = self.memory.concurrent(self.lengths.total)
        return max(1, min(limit, int(self.responses + 0.5)))

    def rollout(self) -> Rollout:
        """The whole phase."""
        places, waiting = self.concurrent, max(0.0, self.responses - self.concurrent)
        full = self.decode_step(places, self.lengths.prompt + self._mean_age).times(waiting * self.lengths.response / places)
        return Rollout(self._prefill(), _sum(full, self._drain(places)), places)

    @property
    def _mean_age(self) -> float:
        """Tokens that a sequence has so far, on average over time: half the mean square over the mean of a response."""
        square = self.lengths.mean_square - self.lengths.prompt**2 - 2 * self.lengths.prompt * self.lengths.response
        return square / 2 / self.lengths.response

    def _drain(self, places: int) -> Decode:
        """From a fresh start of every place to the end of the longest response."""
        width = self.lengths.budget / SLICES
        total = Decode(0.0, 0.0, 0.0, 0.0, 0.0)
        for index in range(SLICES):
            middle = (index + 0.5) * width
            running = places * self.lengths.survival(middle)
            if running >= 0.5:  # below that the last response has most likely ended
                total = _sum(total, self.decode_step(max(1.0, running), self.lengths.prompt + middle).times(width))
        return total

    def decode_step(self, sequences: float, context: float) -> Decode:
        """One step of so many sequences, each with `context` tokens."""
        gpu, assumed, tp = self.cluster.gpu, self.assumptions, self.memory.tp
        bandwidth = gpu.hbm_gbs * 1e9 * assumed.memory_share
        weights = self._read_weights / bandwidth
        cache = sequences * context * self.memory.cache_bytes_per_token / bandwidth
        compute = decode_flops(self.shape, context).times(sequences / tp).seconds(self._form, gpu, assumed.decode_compute_share)
        hidden = sequences * self.shape.hidden_size * self._form.itemsize
        link = self.cluster.group_gbs(tp) * 1e9 * assumed.link_share
        reduce = assumed.small_collective_us * 1e-6 + 2 * hidden * (tp - 1) / tp / link
        tensor_parallel = 2 * self.shape.num_layers * reduce if tp > 1 else 0.0
        launches = 0.0 if self._speed.cuda_graphs else assumed.eager_layer_us * self.shape.num_layers
        host = (assumed.engine_step_us + assumed.engine_sequence_us * sequences + launches) * 1e-6
        if compute > weights + cache:
            return Decode(0.0, 0.0, compute, tensor_parallel, host)
        return Decode(weights, cache, 0.0, tensor_parallel, host)

    @property
    def _read_weights(self) -> int:
        """Bytes of weights that a step reads: all but the embedding, of which it takes a few rows, unless that is the output layer too."""
        vocabulary = self.shape.vocab_size * self.shape.hidden_size // self.memory.tp
        embedding = 0 if self.shape.tied_embeddings else vocabulary * self._form.itemsize
        return self.memory.weights - embedding

    def _prefill(self) -> float:
        """Every prompt, once if the samples of a group share its keys and values (vLLM's prefix cache)."""
        rollout = self.config.rollout
        prompt = sample_flops(self.shape, Lengths(self.lengths.prompt, 1, rollout.max_response_tokens))
        asked = rollout.prompts_per_iteration if self._speed.prefix_caching else rollout.samples_per_iteration
        prompts = asked / self.num_engines
        work = prompt.layer.times(prompts * self.shape.num_layers / self.memory.tp)
        return work.seconds(self._form, self.cluster.gpu, self.assumptions.compute_share)

    @property
    def _speed(self) -> EngineSpeed:
        return engine_speed(self.config.rollout, self.config.max_model_tokens, GPU_MACHINE)

    @property
    def _form(self) -> NumberFormat:
        return engine_format(self.config.precision)


def _sum(one: Decode, other: Decode) -> Decode:
    return Decode(*(a + b for a, b in zip(one, other, strict=True)))
