"""Layouts: for every rank of one side, its parameters and the boxes of checkpoint tensors that lie in them.

A recipe says which checkpoint tensors make up one parameter and how that parameter is cut over tensor-parallel ranks. Tables of recipes
describe the two sides: `_MEGATRON_LAYER` with `_megatron_norms` and `_megatron_experts` for Megatron-core, `_ENGINE_LAYER` with
`_engine_experts` for vLLM. A recipe whose tensors the model does not have (no bias, no q/k norm, tied output layer, no dense feed-forward
layer) leaves nothing behind, so the tables serve every family.

A block is a box of a matrix. Where a library stacks the experts of a layer into one parameter [experts, rows, columns], the layout
describes it as the matrix [experts * rows, columns], expert after expert: the same numbers in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.families import ModelShape, TensorSpec, end_tensors, hf_tensors, layer_tensors
from megatron_r1z.layout.topology import Chunk, Topology

Box = tuple[int, ...]
"""One number per dimension: a start or a size."""
Spec = Literal["local", "te"]
"""Megatron's layer spec: `local` modules, or Transformer Engine's, which fuse each norm into the linear layer after it and all experts of
a rank into one module (`moe_grouped_gemm`)."""

POLICY_VOCAB_MULTIPLE: Mapping[Spec, int] = {"local": 1, "te": 128}
"""Rows per tensor-parallel rank that the policy's padded vocabulary is a multiple of; Transformer Engine's FP8 needs aligned shapes."""
ENGINE_VOCAB_MULTIPLE = 64
"""vLLM pads the vocabulary to this (`vocab_parallel_embedding.DEFAULT_VOCAB_PADDING_SIZE`)."""


def box_slices(start: Box, size: Box) -> tuple[slice, ...]:
    """The index of a box in a tensor."""
    return tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))


class Block(NamedTuple):
    """A box of a checkpoint tensor and where it lies. A plain tuple, because a large model has hundreds of thousands."""

    tensor: str
    start: Box
    """First element in the checkpoint tensor."""
    size: Box
    rank: int
    parameter: str
    local_start: Box
    """First element in the rank's parameter."""


@dataclass(frozen=True)
class Layout:
    """One side: who holds what. Elements of a parameter that no block covers are padding."""

    name: str
    blocks: tuple[Block, ...]
    parameters: Mapping[int, Mapping[str, Box]]
    """Local shape, padding included, by rank and parameter name. Ranks that hold the same weights share one inner mapping."""

    def blocks_of(self, rank: int) -> tuple[Block, ...]:
        """The blocks that lie on one rank."""
        return tuple(block for block in self.blocks if block.rank == rank)


class Piece(NamedTuple):
    """A block before it has a rank and a layer number; `source` indexes the tensors of the recipe."""

    source: int
    start: Box
    size: Box
    local_start: Box


class Cut(NamedTuple):
    """One parameter of one tensor-parallel rank."""

    local_shape: Box
    pieces: tuple[Piece, ...]


class Share(NamedTuple):
    """What a cut may depend on."""

    shape: ModelShape
    rank: int
    """Tensor-parallel rank, of experts the expert-tensor-parallel one."""
    size: int
    """Tensor-parallel size, likewise."""
    vocab_size: int
    """Padded vocabulary."""


class Recipe(NamedTuple):
    """A parameter, how it is cut, and the checkpoint tensors in it."""

    parameter: str
    cut: Callable[[Sequence[TensorSpec], Share], Cut]
    tensors: tuple[str, ...]


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `vocab_size`.

    >>> padded_vocab_size(311, 64)
    320
    """
    return -(-vocab_size // multiple) * multiple


# --- cuts: tensors and share -> parameter of one rank ---


def _whole(tensors: Sequence[TensorSpec], share: Share) -> Cut:
    """Replicated."""
    zero = (0,) * len(tensors[0].shape)
    return Cut(tensors[0].shape, (Piece(0, zero, tensors[0].shape, zero),))


def _rows(tensors: Sequence[TensorSpec], share: Share) -> Cut:
    """Each tensor's rows split evenly; the tensors' shares lie one after the other."""
    rows = [tensor.shape[0] // share.size for tensor in tensors]
    return _stack(tensors, [(source, share.rank * count, count) for source, count in enumerate(rows)])


def _columns(tensors: Sequence[TensorSpec], share: Share) -> Cut:
    """The columns of each of several equal matrices split evenly; the matrices' shares lie one below the other."""
    rows, columns = tensors[0].shape
    size = (rows, columns // share.size)
    pieces = tuple(Piece(source, (0, share.rank * size[1]), size, (source * rows, 0)) for source in range(len(tensors)))
    return Cut((rows * len(tensors), size[1]), pieces)


def _vocabulary(tensors: Sequence[TensorSpec], share: Share) -> Cut:
    """Rows of the padded vocabulary split evenly; the padding ends the last ranks."""
    rows = share.vocab_size // share.size
    first = share.rank * rows
    present = max(0, min(rows, share.shape.vocab_size - first))
    cut = _stack(tensors, [(0, first, present)] if present else [])
    return Cut((rows, *tensors[0].shape[1:]), cut.pieces)


def _grouped_heads(tensors: Sequence[TensorSpec], share: Share) -> Cut:
    """Megatron `linear_qkv`: per key-value group its queries, its key, its value (mcore `SelfAttention.get_query_key_value_tensors`)."""
    dim, queries = share.shape.head_dim, share.shape.queries_per_group
    groups = share.shape.num_kv_heads // share.size
    rows = [
        part
        for group in range(share.rank * groups, (share.rank + 1) * groups)
        for part in ((0, group * queries * dim, queries * dim), (1, group * dim, dim), (2, group * dim, dim))
    ]
    return _stack(tensors, rows)


def _stacked_heads(tensors: Sequence[TensorSpec], share: Share) -> Cut:
    """For vLLM `qkv_proj`: all queries, keys, values; where there are more ranks than key-value heads, several hold the same one."""
    shape, dim = share.shape, share.shape.head_dim
    queries = shape.num_heads // share.size * dim
    copies = max(1, share.size // shape.num_kv_heads)
    keys = max(1, shape.num_kv_heads // share.size) * dim
    first_key = share.rank // copies * keys
    return _stack(tensors, [(0, share.rank * queries, queries), (1, first_key, keys), (2, first_key, keys)])


def _stack(tensors: Sequence[TensorSpec], parts: Sequence[tuple[int, int, int]]) -> Cut:
    """A parameter made of row ranges `(source, first row, rows)`, in order."""
    rest = tensors[0].shape[1:]
    zeros = (0,) * len(rest)
    pieces, position = [], 0
    for source, first, rows in parts:
        pieces.append(Piece(source, (first, *zeros), (rows, *rest), (position, *zeros)))
        position += rows
    return Cut((position, *rest), tuple(pieces))


# --- the two sides ---

_QKV_WEIGHTS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
_QKV_BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")

_ATTENTION_NORM: Mapping[Spec, str] = {"local": "input_layernorm.weight", "te": "self_attention.linear_qkv.layer_norm_weight"}
_DENSE_NORM: Mapping[Spec, str] = {"local": "pre_mlp_layernorm.weight", "te": "mlp.linear_fc1.layer_norm_weight"}
_EXPERT_NORM = "pre_mlp_layernorm.weight"
"""The norms before attention, before a dense feed-forward layer and before a mixture of experts (mcore `gpt_layer_specs`)."""
_EXPERT_WEIGHT: Mapping[Spec, str] = {"local": "mlp.experts.local_experts.{}.{}.weight", "te": "mlp.experts.{1}.weight{0}"}
"""A linear layer of a rank's n-th expert (mcore `moe.experts`: `SequentialMLP`, `TEGroupedMLP`)."""

_MEGATRON_LAYER = (
    Recipe("self_attention.linear_qkv.weight", _grouped_heads, _QKV_WEIGHTS),
    Recipe("self_attention.linear_qkv.bias", _grouped_heads, _QKV_BIASES),
    Recipe("self_attention.q_layernorm.weight", _whole, ("self_attn.q_norm.weight",)),
    Recipe("self_attention.k_layernorm.weight", _whole, ("self_attn.k_norm.weight",)),
    Recipe("self_attention.linear_proj.weight", _columns, ("self_attn.o_proj.weight",)),
    Recipe("mlp.linear_fc1.weight", _rows, _GATE_UP),
    Recipe("mlp.linear_fc2.weight", _columns, ("mlp.down_proj.weight",)),
)

_ENGINE_LAYER = (
    Recipe("input_layernorm.weight", _whole, ("input_layernorm.weight",)),
    Recipe("self_attn.qkv_proj.weight", _stacked_heads, _QKV_WEIGHTS),
    Recipe("self_attn.qkv_proj.bias", _stacked_heads, _QKV_BIASES),
    Recipe("self_attn.q_norm.weight", _whole, ("self_attn.q_norm.weight",)),
    Recipe("self_attn.k_norm.weight", _whole, ("self_attn.k_norm.weight",)),
    Recipe("self_attn.o_proj.weight", _columns, ("self_attn.o_proj.weight",)),
    Recipe("post_attention_layernorm.weight", _whole, ("post_attention_layernorm.weight",)),
    Recipe("mlp.gate_up_proj.weight", _rows, _GATE_UP),
    Recipe("mlp.down_proj.weight", _columns, ("mlp.down_proj.weight",)),
)

_ENGINE_ENDS = (
    Recipe("model.embed_tokens.weight", _vocabulary, ("model.embed_tokens.weight",)),
    Recipe("model.norm.weight", _whole, ("model.norm.weight",)),
    Recipe("lm_head.weight", _vocabulary, ("lm_head.weight",)),
)


def _megatron_norms(shape: ModelShape, spec: Spec) -> tuple[Recipe, Recipe]:
    second = _EXPERT_NORM if shape.num_experts else _DENSE_NORM[spec]
    return Recipe(_ATTENTION_NORM[spec], _whole, ("input_layernorm.weight",)), Recipe(second, _whole, ("post_attention_layernorm.weight",))


def _megatron_experts(shape: ModelShape, ep: int, ep_rank: int, spec: Spec) -> Iterator[Recipe]:
    """The router, which every rank has, and the two linear layers of each of a rank's experts; nothing in a dense model."""
    names, count = shape.expert_names, shape.num_experts // ep
    if names is None:
        return
    yield Recipe("mlp.router.weight", _whole, (names.router,))
    for local, expert in enumerate(range(ep_rank * count, (ep_rank + 1) * count)):
        yield Recipe(_EXPERT_WEIGHT[spec].format(local, "linear_fc1"), _rows, names.gate_up(expert))
        yield Recipe(_EXPERT_WEIGHT[spec].format(local, "linear_fc2"), _columns, (names.down_of(expert),))


def _engine_experts(shape: ModelShape) -> Iterator[Recipe]:
    """The router, and all experts stacked (vLLM `RoutedExperts`): w13 gate above up, w2 down; nothing in a dense model."""
    names, experts = shape.expert_names, range(shape.num_experts)
    if names is None:
        return
    yield Recipe(names.router, _whole, (names.router,))
    stacks = f"{names.layer}.experts.routed_experts"
    yield Recipe(f"{stacks}.w13_weight", _rows, tuple(name for expert in experts for name in names.gate_up(expert)))
    yield Recipe(f"{stacks}.w2_weight", _columns, tuple(names.down_of(expert) for expert in experts))


def megatron_layout(shape: ModelShape, topology: Topology, vocab_multiple: int = 128, spec: Spec = "local") -> Layout:
    """The policy's layout: parameters of mcore `GPTModel` under `chunks.<vp_stage>.`, on every rank of `topology`.

    The vocabulary is padded to a multiple of `vocab_multiple * tp`. With tied embeddings and pp > 1 the last chunk holds a second copy
    of the embedding as `output_layer.weight` (mcore `LanguageModule.shared_embedding_or_output_weight`). Expert n of a rank is expert
    `ep_rank * num_experts / ep + n` of the model (mcore `BaseMoELayer`).

    Raises:
        ConfigError: heads, key-value heads, feed-forward size, experts or layers cannot be split, with the numbers.
    """
    _check_policy(shape, topology)
    vocab_size = padded_vocab_size(shape.vocab_size, vocab_multiple * topology.tp)
    ranks_of: dict[_Place, list[int]] = {}
    for rank in range(topology.num_ranks):
        ranks_of.setdefault(_place(shape, topology, rank), []).append(rank)
    return _make_layout(
        _policy_name(shape, topology),
        [(ranks, _policy_parameters(shape, topology, spec, vocab_size, place)) for place, ranks in ranks_of.items()],
    )


def engine_layout(shape: ModelShape, num_ranks: int, tp: int, first_rank: int = 0) -> Layout:
    """The engines' layout: vLLM's fused parameters, one engine per `tp` consecutive ranks from `first_rank` on.

    Key-value heads are copied where tp exceeds them; the vocabulary is padded to a multiple of 64; a tied output layer is the embedding
    and has no name of its own. Every rank has a share of all experts: the stacked w13 is described as a matrix
    [experts * 2 * ffn / tp, hidden], w2 as [experts * hidden, ffn / tp].

    Raises:
        ConfigError: ranks, heads, feed-forward size or padded vocabulary cannot be split, with the numbers.
    """
    vocab_size = padded_vocab_size(shape.vocab_size, ENGINE_VOCAB_MULTIPLE)
    _check_engine(shape, num_ranks, tp, vocab_size)
    ranks = range(first_rank, first_rank + num_ranks)
    shares = [Share(shape, tp_rank, tp, vocab_size) for tp_rank in range(tp)]
    return _make_layout(f"engine tp{tp}", [(ranks[share.rank :: tp], list(_engine_parameters(shape, share))) for share in shares])


def hf_layout(shape: ModelShape, num_writers: int) -> Layout:
    """Checkpoint tensors whole, each on one of ranks 0 to `num_writers - 1`, balanced by size (largest first, to the least loaded)."""
    owners: dict[int, list[_Parameter]] = {writer: [] for writer in range(num_writers)}
    load = [0] * num_writers
    for spec in sorted(hf_tensors(shape), key=lambda spec: -spec.numel):
        writer = load.index(min(load))
        load[writer] += spec.numel
        owners[writer].append(_Parameter(spec.name, (spec.name,), _whole([spec], Share(shape, 0, 1, shape.vocab_size))))
    return _make_layout(f"hf {num_writers} writers", [([writer], parameters) for writer, parameters in owners.items()])


class _Parameter(NamedTuple):
    """A cut with the names filled in."""

    name: str
    tensors: tuple[str, ...]
    cut: Cut


def _cut_all(recipes: Sequence[Recipe], tensors: Sequence[TensorSpec], share: Share) -> list[_Parameter]:
    """The recipes whose tensors exist, cut for one share."""
    known = {spec.name: spec for spec in tensors}
    return [
        _Parameter(recipe.parameter, recipe.tensors, recipe.cut([known[name] for name in recipe.tensors], share))
        for recipe in recipes
        if all(name in known for name in recipe.tensors)
    ]


def _in_layer(parameters: Sequence[_Parameter], prefix: str, layer: int) -> Iterator[_Parameter]:
    """The parameters of one layer under their full names."""
    for name, tensors, cut in parameters:
        yield _Parameter(f"{prefix}{name}", tuple(f"model.layers.{layer}.{tensor}" for tensor in tensors), cut)


class _Place(NamedTuple):
    """What the parameters of a Megatron rank depend on; ranks of one place are data-parallel or context-parallel copies."""

    tp_rank: int
    pp_rank: int
    etp_rank: int
    ep_rank: int


def _place(shape: ModelShape, topology: Topology, rank: int) -> _Place:
    where, expert = topology.coordinates(rank), topology.expert_coordinates(rank)
    return _Place(where.tp_rank, where.pp_rank, *(expert[:2] if shape.num_experts else (0, 0)))


def _policy_name(shape: ModelShape, topology: Topology) -> str:
    experts = f" ep{topology.ep} etp{topology.expert_tp}" if shape.num_experts else ""
    return f"megatron tp{topology.tp} pp{topology.pp} vpp{topology.vpp}{experts}"


def _policy_parameters(shape: ModelShape, topology: Topology, spec: Spec, vocab_size: int, place: _Place) -> list[_Parameter]:
    """Every parameter of the model chunks of one rank."""
    share = Share(shape, place.tp_rank, topology.tp, vocab_size)
    expert_share = share._replace(rank=place.etp_rank, size=topology.expert_tp)
    layer_cuts = _cut_all((*_megatron_norms(shape, spec), *_MEGATRON_LAYER), layer_tensors(shape), share)
    layer_cuts += _cut_all(list(_megatron_experts(shape, topology.ep, place.ep_rank, spec)), layer_tensors(shape), expert_share)
    parameters: list[_Parameter] = []
    for chunk in topology.chunks(shape.num_layers, place.pp_rank):
        prefix = f"chunks.{chunk.vp_stage}."
        for local, layer in enumerate(chunk.layers):
            parameters += _in_layer(layer_cuts, f"{prefix}decoder.layers.{local}.", layer)
        parameters += _cut_all(_chunk_ends(shape, chunk, prefix), end_tensors(shape), share)
    return parameters


def _chunk_ends(shape: ModelShape, chunk: Chunk, prefix: str) -> list[Recipe]:
    """What a chunk holds besides layers."""
    head = "model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight"
    table = (
        (chunk.is_first, Recipe(f"{prefix}embedding.word_embeddings.weight", _vocabulary, ("model.embed_tokens.weight",))),
        (chunk.is_last, Recipe(f"{prefix}decoder.final_layernorm.weight", _whole, ("model.norm.weight",))),
        (
            chunk.is_last and not (chunk.is_first and shape.tied_embeddings),
            Recipe(f"{prefix}output_layer.weight", _vocabulary, (head,)),
        ),
    )
    return [recipe for present, recipe in table if present]


def _engine_parameters(shape: ModelShape, share: Share) -> Iterator[_Parameter]:
    layer_cuts = _cut_all([*_ENGINE_LAYER, *_engine_experts(shape)], layer_tensors(shape), share)
    for layer in range(shape.num_layers):
        yield from _in_layer(layer_cuts, f"model.layers.{layer}.", layer)
    yield from _cut_all(_ENGINE_ENDS, end_tensors(shape), share)


def _make_layout(name: str, holders: Sequence[tuple[Sequence[int], Sequence[_Parameter]]]) -> Layout:
    """Give every set of parameters its ranks."""
    blocks: list[Block] = []
    shapes: dict[int, Mapping[str, Box]] = {}
    for ranks, parameters in holders:
        local = {parameter.name: parameter.cut.local_shape for parameter in parameters}
        shapes.update(dict.fromkeys(ranks, local))
        blocks += [
            Block(parameter.tensors[source], start, size, rank, parameter.name, local_start)
            for rank in ranks
            for parameter in parameters
            for source, start, size, local_start in parameter.cut.pieces
        ]
    return Layout(name, tuple(blocks), shapes)


# --- what cannot be split ---


def _check_policy(shape: ModelShape, topology: Topology) -> None:
    if topology.ep > 1 and not shape.num_experts:
        raise ConfigError(f"policy: ep is {topology.ep}, but the model has no experts; set ep to 1.")
    feed_forward = "etp" if shape.num_experts else "tp"
    for name, degree in (("num_heads", "tp"), ("num_kv_heads", "tp"), ("ffn_size", feed_forward), ("num_experts", "ep")):
        size = topology.expert_tp if degree == "etp" else getattr(topology, degree)
        _check_divides("policy", name, getattr(shape, name), degree, size)


def _check_engine(shape: ModelShape, num_ranks: int, tp: int, vocab_size: int) -> None:
    _check_divides("engine", "num_ranks", num_ranks, "tp", tp)
    for name in ("num_heads", "ffn_size"):
        _check_divides("engine", name, getattr(shape, name), "tp", tp)
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        raise ConfigError(f"engine: {shape.num_kv_heads} key-value heads can neither be split over nor copied to tp {tp} ranks evenly.")
    _check_divides("engine", "padded vocabulary", vocab_size, "tp", tp)


def _check_divides(side: str, name: str, number: int, degree: str, size: int) -> None:
    if number % size:
        largest = max(smaller for smaller in range(1, size) if number % smaller == 0)
        raise ConfigError(f"{side}: {name} is {number}, which {degree} {size} does not divide; {degree} {largest} does.")


def covered(blocks: Sequence[Block]) -> dict[str, int]:
    """Elements of each parameter that blocks of one rank cover; fewer than the parameter has means padding."""
    totals: dict[str, int] = {}
    for block in blocks:
        totals[block.parameter] = totals.get(block.parameter, 0) + math.prod(block.size)
    return totals
