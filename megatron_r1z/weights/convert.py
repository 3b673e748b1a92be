"""Weights from one kind of folder into another, or into the same kind in another number format, split or file size.

A policy is built from the source on as many ranks as asked for and written as the target, so a conversion reads and writes what training
reads and writes. Optimizer and schedule are left behind: they belong to the run.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
import yaml
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_r1z.config import ModelConfig, NumberFormat, ParallelConfig, PrecisionConfig
from megatron_r1z.errors import ConfigError, DataError
from megatron_r1z.layout.blocks import Layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, hf_tensors, load_shape
from megatron_r1z.layout.fp8 import BLOCK, fp8_matrices
from megatron_r1z.ranks import gather
from megatron_r1z.weights.export import SHARD_BYTES, save_hf
from megatron_r1z.weights.folders import WEIGHTS_FILE, Kind, kind_of
from megatron_r1z.weights.hf_files import TensorReader, locate_tensors
from megatron_r1z.weights.model_folder import check_tensors

if TYPE_CHECKING:
    from megatron_r1z.policy.policy import MegatronPolicy

Format = Literal["bf16", "fp32", "fp8"]
FORMATS: Mapping[NumberFormat, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
OTHER: Mapping[Kind, Kind] = {"hf": "megatron", "megatron": "hf"}

_QKV = "decoder.layers.self_attention.linear_qkv.weight"
"""The tensor of a Megatron checkpoint by which a model of another size is told: [layers, rows, hidden]."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is read, what is written, and the settings by which a policy is built in between (`policy.Settings`)."""

    source: Path
    target: Path
    kind: Kind
    """Of the target."""
    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    shard_bytes: int = SHARD_BYTES
    fp8: bool = False
    """Write matrices of the layers in blocks of FP8."""


@dataclass(frozen=True)
class Written:
    """What a conversion wrote and what it took."""

    num_tensors: int
    """Of the model, by the names of its Hugging Face checkpoint."""
    num_bytes: int
    num_files: int
    seconds: float
    peak_bytes: int
    """Resident memory of the rank that needed most."""


def plan_conversion(
    source: Path,
    target: Path,
    parallel: ParallelConfig,
    *,
    kind: Kind | None,
    model: Path | None,
    dtype: Format | None,
    shard_gb: float | None,
) -> Conversion:
    """The conversion that the arguments of the command ask for; what is None follows from the source.

    Raises:
        DataError: the source is neither kind of folder, or does not hold the model that config.json describes.
        ConfigError: an argument has no meaning here, or the format of the source needs a choice.
    """
    found = kind_of(source)
    if found is None:
        raise DataError(
            f"{source} is neither a model folder (config.json and safetensors) nor a complete checkpoint (one that holds "
            "state.json or weights.json); name a folder such as runs/x/hf/final or runs/x/checkpoints/step_000050."
        )
    kind = kind or OTHER[found]
    if found == "hf" and model is not None:
        raise ConfigError(f"{source} has its own config.json; --model is for checkpoints, leave it out.")
    if kind != "hf" and shard_gb is not None:
        raise ConfigError("--shard-gb bounds the files of a Hugging Face folder; leave it out when writing a Megatron checkpoint.")
    if kind != "hf" and dtype == "fp8":
        raise ConfigError(
            "--dtype fp8 is for Hugging Face folders: a Megatron checkpoint keeps what training goes on from, in bf16 or fp32."
        )
    if shard_gb is not None and shard_gb <= 0:
        raise ConfigError(f"--shard-gb is {shard_gb:g}; it must be more than 0.")
    folder = source if found == "hf" else model or _model_folder(source)
    shape = load_shape(folder)
    if found == "hf":
        check_tensors(source, shape)
    if dtype == "fp8":
        _check_fp8(shape, parallel)
    stored = _stored_formats(source) if found == "hf" else _measure_checkpoint(source, shape, folder)
    return Conversion(
        source=source,
        target=target,
        kind=kind,
        model=ModelConfig(path=str(folder), checkpoint=None if found == "hf" else str(source)),
        parallel=parallel,
        precision=PrecisionConfig(policy="bf16" if dtype == "fp8" else dtype or _only_format(source, stored)),
        shard_bytes=SHARD_BYTES if shard_gb is None else int(shard_gb * 1e9),
        fp8=dtype == "fp8",
    )


def _check_fp8(shape: ModelShape, parallel: ParallelConfig) -> None:
    if not fp8_matrices(shape, [megatron_layout(shape, parallel.topology, 1)]):
        raise ConfigError(
            f"--dtype fp8: with hidden size {shape.hidden_size}, head size {shape.head_dim} and feed-forward size {shape.ffn_size} no rank "
            f"of tensor-parallel size {parallel.tensor_parallel_size} has a matrix that can be cut into blocks of {BLOCK} x {BLOCK}."
        )


def check_target(conversion: Conversion, *, overwrite: bool) -> None:
    """Refuse to lose a folder.

    Raises:
        ConfigError: the target exists and may not be replaced.
    """
    target = conversion.target.resolve()
    read = [conversion.source.resolve(), Path(conversion.model.path).resolve()]
    if any(target in (path, *path.parents) for path in read):
        raise ConfigError(f"{conversion.target} holds what is converted; name another folder.")
    if not target.exists():
        return
    if kind_of(target) is None:
        raise ConfigError(f"{conversion.target} exists and holds no weights; name another folder, or delete that one yourself.")
    if not overwrite:
        raise ConfigError(f"{conversion.target} exists; name another folder, or replace it by adding --overwrite.")


def write(conversion: Conversion, shape: ModelShape, layout: Layout, policy: MegatronPolicy, start: float) -> Written:
    """Write a policy that holds the source's weights as the target; all ranks call this.

    Args:
        conversion: what to write.
        shape: shape of the model.
        layout: layout of the policy's parameters.
        policy: the weights, in the number format of the target.
        start: when this rank began, by `time.perf_counter`.
    """
    WRITERS[conversion.kind](conversion, shape, layout, policy)
    files = [path for path in conversion.target.rglob("*") if path.is_file()]
    peak_bytes = max(gather([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
    num_bytes = sum(path.stat().st_size for path in files)
    return Written(len(hf_tensors(shape)), num_bytes, len(files), time.perf_counter() - start, peak_bytes)


def _write_hf(conversion: Conversion, shape: ModelShape, layout: Layout, policy: MegatronPolicy) -> None:
    save_hf(
        conversion.target,
        conversion.model.path,
        shape,
        layout,
        policy.parameters(),
        dist.get_rank(),
        dist.get_world_size(),
        FORMATS[conversion.precision.policy_format],
        conversion.shard_bytes,
        fp8=conversion.fp8,
    )


def _write_megatron(conversion: Conversion, shape: ModelShape, layout: Layout, policy: MegatronPolicy) -> None:
    from megatron_r1z.weights.checkpoint import save_weights  # loads Megatron, which the supervisor does without

    origin = {"source": conversion.source.resolve(), "model": Path(conversion.model.path).resolve()}
    save_weights(conversion.target, policy, {name: str(path) for name, path in origin.items()})


WRITERS: Mapping[Kind, Callable[[Conversion, ModelShape, Layout, MegatronPolicy], None]] = {"hf": _write_hf, "megatron": _write_megatron}


# --- what the source holds ---


def _model_folder(checkpoint: Path) -> Path:
    """Where a checkpoint says its config.json and tokenizer are: in its own weights.json, or in config.yaml of its run."""
    origin, config = checkpoint / WEIGHTS_FILE, checkpoint.resolve().parents[1] / "config.yaml"
    try:
        if origin.exists():
            return Path(json.loads(origin.read_text(encoding="utf-8"))["model"])
        return Path(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{config} does not say which model {checkpoint} is of; name its folder with --model.") from error


def _stored_formats(folder: Path) -> set[torch.dtype]:
    """Number formats of the tensors in a Hugging Face folder."""
    files: dict[Path, list[str]] = {}
    for name, path in locate_tensors(folder).items():
        files.setdefault(path, []).append(name)
    found = set()
    for path, names in files.items():
        with TensorReader(path) as file:
            found |= {file.dtype(name) for name in names}
    return found


def _measure_checkpoint(checkpoint: Path, shape: ModelShape, folder: Path) -> set[torch.dtype]:
    """Number format of the weights in a Megatron checkpoint, once it is known to be of the model."""
    entry = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.get(_QKV)
    expected = (shape.num_layers, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, shape.hidden_size)
    size, dtype = (tuple(entry.size), entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else ((), None)
    if size != expected or dtype is None:
        raise DataError(
            f"{checkpoint} is not of the model in {folder}: {_QKV} is {list(size)} there and {list(expected)} by its config.json; "
            "name the right folder with --model."
        )
    return {dtype}


def _only_format(source: Path, found: set[torch.dtype]) -> NumberFormat:
    names = [name for name, dtype in FORMATS.items() if found == {dtype}]
    if not names:
        stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise ConfigError(f"{source} holds {stored}; say with --dtype what to write: {' or '.join(FORMATS)}.")
    return names[0]
