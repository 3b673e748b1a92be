"""The model, how it is split over ranks, and number formats."""

# Without `from __future__ import annotations`: the command line of nemo-run reads the types of fields, not their names.
from dataclasses import dataclass, field
from typing import Literal

from megatron_r1z.config.checks import check_positive
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.topology import Topology

ITEMSIZE = {"bf16": 2, "fp32": 4}
"""Bytes of one element by number format."""
Recompute = Literal["none", "selective", "full"]
NumberFormat = Literal["fp32", "bf16"]
Fp8Recipe = Literal["blockwise", "mxfp8", "tensorwise", "delayed"]
Toggle = Literal["auto", True, False]
"""`auto`: on wherever machine and libraries allow it and there is something to gain (`speed.py`)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained."""

    path: str
    """Folder in Hugging Face format: config.json, tokenizer files and, unless `random_init`, safetensors."""
    random_init: bool = False
    """Start from random weights (pre-training from scratch) instead of the folder's."""
    seed: int = 0
    """Seed of the random weights."""
    checkpoint: str | None = None
    """Checkpoint of an earlier run (`.../checkpoints/step_000050`) whose weights are taken instead of the folder's."""

    def __post_init__(self) -> None:
        if self.random_init and self.checkpoint is not None:
            raise ConfigError("model: random_init and checkpoint are two places for the weights to come from; set one.")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What makes a step of the policy faster and changes no number beyond rounding ([gpu.md](gpu.md#settings-for-speed))."""

    overlap_grad_reduce: Toggle = "auto"
    """Sum gradients over data-parallel ranks while the last micro-batch's backward pass is still running."""
    overlap_param_gather: Toggle = "auto"
    """Fetch the weights that other ranks have stepped while the next forward pass is running. Needs `optimizer.distributed` and
    `overlap_grad_reduce`."""
    overlap_p2p_comm: Toggle = "auto"
    """Exchange activations with the next pipeline stage while computing. Needs `virtual_pipeline_size` above 1."""
    gradient_accumulation_fusion: Toggle = "auto"
    """Transformer Engine adds the gradient of a matrix to its float32 sum within the product, without a bf16 one in between."""
    swiglu_fusion: Toggle = "auto"
    """One compiled kernel for the gated activation, which keeps two widths of the feed-forward layer for the backward pass instead of
    four."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the policy is split over ranks; data parallel size is what the rank count leaves."""

    num_ranks: int = 1
    """Ranks that `train` starts on this machine when it is not run under torchrun."""
    threads_per_rank: int = 1
    """OpenMP threads of each rank."""
    grace_s: float = 300.0
    """Seconds that ranks have, once they are told to stop, to save a checkpoint and end; then they are killed. It must do for the optimizer
    steps of an iteration, which are not interrupted once the first is taken, and for a checkpoint."""
    tensor_parallel_size: int = 1
    """Ranks that share every matrix; must divide heads, key-value heads and feed-forward size."""
    pipeline_parallel_size: int = 1
    """Ranks that share the layers; must divide their number, or see `pipeline_layers`."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of every sequence, for sequences whose activations do not fit one rank."""
    virtual_pipeline_size: int = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    pipeline_layers: tuple[int, ...] = ()
    """Layers of each model chunk in model order, such as `[7, 9]`; empty: the same for all. Chunk i is on pipeline rank i modulo
    `pipeline_parallel_size`. Fewer at the ends make up for embedding and output layer."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel regions over the tensor-parallel ranks."""
    micro_batch_tokens: int = 4096
    """Upper bound of tokens in one forward pass of one data-parallel rank, which its context-parallel ranks share; a longer sample travels
    alone."""
    pad_sequences: bool = False
    """Pad every sequence of a step to the longest one. For comparisons only: packing is the same maths with less work."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again instead of keeping them. `selective`: those within feed-forward layers, where most
    are; `full`: all but the input of each layer. The same numbers in more time and less memory."""
    offload_layers: int = 0
    """So many layers from the first one on keep their activations in the host's memory until the backward pass needs them. Needs a GPU
    and Transformer Engine, all layers on one pipeline rank, and nothing recomputed."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """See [parallel.speed](#parallelspeed). `auto`: on where it can be and is of use, which `doctor` and `plan` tell; `false`: off, to look
    for a mistake; `true` is refused where it cannot be."""

    def __post_init__(self) -> None:
        check_positive(self, "num_ranks", "threads_per_rank", "grace_s", "tensor_parallel_size", "pipeline_parallel_size")
        check_positive(self, "context_parallel_size", "virtual_pipeline_size", "micro_batch_tokens")
        if self.num_ranks % self.model_parallel_size:
            raise ConfigError(
                f"parallel: {self.num_ranks} ranks cannot be split into tensor_parallel_size {self.tensor_parallel_size} x "
                f"pipeline_parallel_size {self.pipeline_parallel_size} x context_parallel_size {self.context_parallel_size}; "
                f"make num_ranks a multiple of {self.model_parallel_size}."
            )
        if self.virtual_pipeline_size > 1 and self.pipeline_parallel_size == 1:
            raise ConfigError("parallel: virtual_pipeline_size > 1 needs pipeline_parallel_size > 1.")
        if self.pipeline_layers and (len(self.pipeline_layers) != self.num_chunks or min(self.pipeline_layers) < 1):
            raise ConfigError(
                f"parallel.pipeline_layers is {list(self.pipeline_layers)}; it must give each of the {self.chunks_in_words} at least "
                "one layer."
            )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ConfigError("parallel: sequence_parallel needs tensor_parallel_size > 1.")
        if self.offload_layers < 0:
            raise ConfigError(f"parallel.offload_layers is {self.offload_layers}; it must be at least 0.")
        if self.offload_layers and (self.pipeline_parallel_size > 1 or self.recompute != "none"):
            raise ConfigError(
                f"parallel.offload_layers is {self.offload_layers}, which Megatron takes with pipeline_parallel_size 1 and recompute none; "
                f"they are {self.pipeline_parallel_size} and {self.recompute}."
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that take a micro-batch together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def topology(self) -> Topology:
        """The degrees as layouts know them."""
        return Topology(
            self.num_ranks,
            self.tensor_parallel_size,
            self.pipeline_parallel_size,
            self.virtual_pipeline_size,
            self.context_parallel_size,
            chunk_layers=self.pipeline_layers,
        )

    @property
    def num_chunks(self) -> int:
        """Model chunks of the whole model."""
        return self.pipeline_parallel_size * self.virtual_pipeline_size

    @property
    def chunks_in_words(self) -> str:
        """What messages call the model chunks."""
        sizes = f"pipeline_parallel_size {self.pipeline_parallel_size} x virtual_pipeline_size {self.virtual_pipeline_size}"
        return f"{self.num_chunks} model chunks ({sizes})"


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """How `precision.policy: fp8` computes the matrix products of the layers; it has no effect otherwise (docs/fp8.md)."""

    recipe: Fp8Recipe = "blockwise"
    """Where scales come from. `blockwise`: from blocks of 1 x 128 and 128 x 128 (Hopper and newer, and emulated without a GPU); `mxfp8`:
    from 32 elements (Blackwell); `tensorwise`: from the tensor; `delayed`: from the tensor's history."""
    first_layers_bf16: int = 0
    """So many layers at the beginning stay in bf16."""
    last_layers_bf16: int = 0
    """So many layers at the end stay in bf16."""

    def __post_init__(self) -> None:
        if self.first_layers_bf16 < 0 or self.last_layers_bf16 < 0:
            raise ConfigError(
                f"precision.fp8 leaves {self.first_layers_bf16} layers at the beginning and {self.last_layers_bf16} at the end in bf16; "
                "both must be at least 0."
            )
        if self.recipe == "delayed" and self.first_layers_bf16 + self.last_layers_bf16:
            raise ConfigError(
                "precision.fp8: with recipe delayed all layers share one FP8 context; set first_layers_bf16 and last_layers_bf16 to 0."
            )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    policy: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Weights and activations of the policy; bf16 keeps fp32 master weights and fp32 gradients. `fp8`: as bf16, but the matrix products of
    the layers take FP8 operands; embedding, output layer, norms, router and attention stay in bf16."""
    engine: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Weights and activations of the engine. `fp8`: the matrices of the layers in FP8 blocks, the rest in bf16."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """See [precision.fp8](#precisionfp8)."""

    @property
    def policy_format(self) -> NumberFormat:
        """Of the policy's parameters and of all that is not an operand in FP8."""
        return "bf16" if self.policy == "fp8" else self.policy

    def bf16_layers(self, num_layers: int) -> set[int]:
        """Layers that an FP8 policy computes in bf16."""
        last = num_layers - self.fp8.last_layers_bf16
        return {layer for layer in range(num_layers) if self.policy == "fp8" and not self.fp8.first_layers_bf16 <= layer < last}

    @property
    def engine_format(self) -> NumberFormat:
        """Of the engine's parameters that are not in FP8, and of its activations."""
        return "bf16" if self.engine == "fp8" else self.engine
