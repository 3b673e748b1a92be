"""How weights come into vLLM: a backend of its weight-transfer interface, registered under our name.

vLLM drives it (`LLM.start_weight_update`, `update_weights`, `finish_weight_update`), so an engine whose kernels keep weights in a layout of
their own makes that layout again after every refit. Where all kernels use the parameters as they are, a refit writes into them directly;
otherwise (packed weights, FP8) it writes into parameters in checkpoint format beside them, a second copy of the shard, which vLLM's
layer-wise reload then takes over. Not layer by layer: a layer may keep its parameter and a packed copy of it besides.

Written for vLLM 0.32 and 0.33: `vllm.distributed.weight_transfer.base`, `vllm.model_executor.model_loader.reload`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing

BACKEND = "megatron_r1z"
_AS_THEY_ARE = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
"""vLLM's methods whose GPU kernels use the parameters in the format of the checkpoint."""


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM's classes have no types
    """Nothing: writer and engine are in one process."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Where the weights come from: one of the two."""

    write: Callable[[Mapping[str, Tensor]], None] | None = None
    """Writes this rank's parameters; called once."""
    tensors: Iterable[tuple[str, Tensor]] = ()
    """Whole tensors by checkpoint name."""


class Receiver(WeightTransferEngine):  # type: ignore[misc]
    """Gives a refit the parameters to write into, and lets vLLM take them over."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._staged: dict[str, Tensor] = {}
        """Kept from one refit to the next, as the refit keeps views of what it writes."""
        self._is_reloading = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to prepare."""

    def start_weight_update(self) -> None:
        """Nothing to prepare: what to do depends on what comes."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Let the refit write, or vLLM load."""
        if update_info.write is None:
            self._is_reloading = True
            initialize_layerwise_reload(self.model)
            self.model.load_weights(update_info.tensors)
            return
        parameters = written_parameters(self.model)
        apart = {name: tensor for name, tensor in parameters.items() if tensor.is_meta}
        self._staged = self._staged or {name: torch.empty_like(tensor, device=self.device) for name, tensor in apart.items()}
        update_info.write(parameters | self._staged)
        self._is_reloading = bool(self._staged)
        if self._staged:
            _reload(self.model, self._staged)

    def finish_weight_update(self) -> None:
        """Let vLLM's layer-wise reload make the kernels' layouts again."""
        if self._is_reloading:
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to release."""


def register_receiver() -> str:
    """Make the backend known to vLLM, once in a process; returns its name."""
    with suppress(ValueError):  # it is known already
        WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
    return BACKEND


def written_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What a refit writes: live parameters, or meta tensors in the format of the checkpoint where the kernels have a layout of their own.

    Stacked experts [experts, rows, columns] are shown as one matrix [experts * rows, columns], because a block is a box of a matrix.
    """
    return {name: tensor.flatten(0, -2) if tensor.dim() > 2 else tensor for name, _, _, tensor in _parameters(model)}


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, layer, name in the layer, and tensor to write; a parameter of two layers is named once."""
    seen: set[int] = set()
    in_place = not any(map(_has_own_layout, model.modules()))
    for prefix, layer in model.named_modules():
        if is_deferred_attention_layer(layer):  # what it has are scales of a cache in FP8, no weights
            continue
        live: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
        for name, tensor in (live if in_place else live | _recorded(layer)).items():
            if id(live.get(name, tensor)) not in seen:
                seen.add(id(live.get(name, tensor)))
                yield f"{prefix}.{name}", layer, name, tensor.data


def _has_own_layout(layer: nn.Module) -> bool:
    """Whether the kernels of a layer use something else than its parameters as they were loaded."""
    method = getattr(layer, "quant_method", None)
    if method is not None and not isinstance(method, _AS_THEY_ARE):
        return True
    live = dict(layer.named_parameters(recurse=False))
    return any(name not in live or live[name].shape != tensor.shape for name, tensor in _recorded(layer).items())


def _recorded(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters of a layer in the format of the checkpoint, as meta tensors."""
    recorded: dict[str, Tensor] = get_layerwise_info(layer).restore_metadata[0]
    return recorded


def _reload(model: nn.Module, staged: Mapping[str, Tensor]) -> None:
    targets = [(name, layer, own) for name, layer, own, _ in _parameters(model) if name in staged]
    initialize_layerwise_reload(model)
    for layer in {id(layer): layer for _, layer, _ in targets}.values():
        for target in layer.parameters(recurse=False):
            setattr(target, "weight_loader", _load_whole)  # noqa: B010  # an attribute of vLLM's parameters alone
        initialize_online_processing(layer)
    for name, layer, own in targets:
        parameter = getattr(layer, own)
        parameter.weight_loader(parameter, staged[name].view(parameter.shape))


def _load_whole(param: Tensor, loaded_weight: Tensor) -> None:
    """A weight loader for what is already this rank's shard, fused as vLLM fuses it."""
    param.data.copy_(loaded_weight)


class CheckpointSource(WeightSource):  # type: ignore[misc]
    """Whole tensors for vLLM's own trainer-side backends (`nccl`, `ipc`), which feed an engine in other processes.

    Args:
        specs: name and shape of every tensor, in the order of iteration.
        dtype: number format of the tensors.
        tensors: gives a new pass over the tensors every time it is iterated; all ranks iterate together.
    """

    def __init__(self, specs: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._metadata = [ParamMeta(name, dtype, tuple(size)) for name, size in specs]
        self._tensors = tensors

    def _describe(self) -> list[ParamMeta]:
        """What iteration will yield."""
        return list(self._metadata)

    metadata = cached_property(_describe) if hasattr(WeightSource, "iter_full") else _describe
    """vLLM 0.33 reads it as an attribute, 0.32 calls it."""

    def iter_full(self) -> Iterator[tuple[str, Tensor]]:
        """One pass over the whole tensors."""
        return iter(self._tensors)

    __iter__ = iter_full
