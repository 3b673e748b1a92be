"""What Transformer Engine's kernels give, as far as shapes and formats go; for 2.20 (`csrc/extensions/*.cpp`, `pytorch/cpp_extensions`).

A kernel that is called and is not here ends the rehearsal with its name. `calls` counts which were called how often: the log of which way
Transformer Engine took.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

calls: Counter[str] = Counter()
QUERY, VALUE = 16, 18
"""Places of these among the arguments of `fused_attn_fwd`; those of `fused_attn_bwd` are 3 further."""


def shape_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """By name, each counted in `calls`."""
    plain = (generic_gemm, rmsnorm_fwd, rmsnorm_bwd, rmsnorm_bwd_add, fused_rope_forward, fused_rope_backward, fused_attn_fwd)
    more = (fused_attn_bwd, multi_tensor_l2norm, quantize, create_empty_quantized_tensor, dequantize, bgrad_quantize, swap_first_dims)
    found: dict[str, Callable[..., Any]] = {function.__name__: function for function in (*plain, *more, fp8_transpose)}
    for name in ("multi_tensor_adam", "multi_tensor_adam_param_remainder", "multi_tensor_scale", "multi_tensor_scale_tensor"):
        found[name] = _in_place
    for name in ("thd_out_correction", "thd_grad_correction", "thd_second_half_lse_correction"):
        found[name] = _in_place
    found["thd_read_half_tensor"], found["thd_read_second_half_lse"] = thd_read_half_tensor, thd_read_second_half_lse
    found["fused_amax_and_scale_update_after_reduction"] = _in_place
    found["get_fused_attn_backend"] = lambda *_arguments: (_fused_attention(module.NVTE_Fused_Attn_Backend), "")
    return {name: _counted(name, function) for name, function in found.items()}


def generic_gemm(
    left: Any,
    is_left_transposed: bool,
    right: Any,
    is_right_transposed: bool,
    out: Tensor | None,
    _quantizer: Any,
    dtype: Any,
    *rest: Any,
    **_: Any,
) -> list[Tensor | None]:
    """The product, in cuBLAS's order of matrices, and the gradient of a bias where there is one."""
    bias, is_backward = rest[0], rest[4]
    first, second = tuple(left.size()), tuple(right.size())
    inner_left = first[-1] if is_left_transposed else math.prod(first[:-1])
    inner_right = math.prod(second[:-1]) if is_right_transposed else second[-1]
    if inner_left != inner_right:
        raise ValueError(f"a product of {first} and {second} has inner dimensions of {inner_left} and {inner_right}")
    rows = second[-1:] if is_right_transposed else second[:-1]
    columns = math.prod(first[:-1]) if is_left_transposed else first[-1]
    product = out if out is not None else torch.empty(*rows, columns, dtype=_torch_type(dtype, left), device=left.device)
    has_bias_gradient = is_backward and bias is not None
    return [product, torch.empty(second[-1], dtype=torch.bfloat16, device=left.device) if has_bias_gradient else None, None, None]


def rmsnorm_fwd(x: Tensor, _weight: Tensor, _eps: float, out: Any, quantizer: Any, dtype: Any, *_rest: Any) -> list[Any]:
    """The normalised input, quantised where that is asked for, no mean, and one root for each row."""
    roots = torch.empty(math.prod(x.shape[:-1]), dtype=torch.float32, device=x.device)
    if quantizer is None:
        return [out if out is not None else torch.empty(x.shape, dtype=_torch_type(dtype, x), device=x.device), None, roots]
    return [out if out is not None else _quantised(tuple(x.shape), quantizer, x.dtype, x.device), None, roots]


def rmsnorm_bwd(_gradient: Tensor, x: Tensor, _roots: Tensor, weight: Tensor, *_rest: Any) -> list[Tensor]:
    """Gradients of input and weight."""
    return [torch.empty_like(x), torch.empty_like(weight)]


def rmsnorm_bwd_add(_gradient: Tensor, x: Tensor, _other: Tensor, _roots: Tensor, weight: Tensor, *_rest: Any) -> list[Tensor]:
    """The same with another gradient of the input added."""
    return [torch.empty_like(x), torch.empty_like(weight)]


def fused_rope_forward(x: Tensor, *_rest: Any, **_options: Any) -> Tensor:
    """Rotated heads."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def fused_rope_backward(gradient: Tensor, *_rest: Any, **_options: Any) -> Tensor:
    """The gradient, rotated back."""
    return torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)


def fused_attn_fwd(*arguments: Any, **_options: Any) -> list[Tensor]:
    """Output of attention over packed sequences; with a gradient also the logarithm of each row's sum, and cuDNN's random state."""
    query, value, has_gradient = arguments[QUERY], arguments[VALUE], arguments[2]
    output = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
    if not has_gradient:
        return [output]
    sums = torch.empty(query.shape[0], query.shape[-2], 1, dtype=torch.float32, device=query.device)
    return [output, sums, torch.empty(2, dtype=torch.int64, device=query.device)]


def fused_attn_bwd(*arguments: Any, **_options: Any) -> list[Tensor | None]:
    """Gradients of queries, keys and values."""
    return [*(torch.empty_like(tensor) for tensor in arguments[QUERY + 3 : VALUE + 4]), None, None]


def thd_read_half_tensor(tensor: Tensor, _boundaries: Tensor, _half: int) -> Tensor:
    """Half of each sequence, of queries [T, heads, size] or of keys and values together [2, T, heads, size]."""
    axis = tensor.dim() - 3
    shape = [size // 2 if place == axis else size for place, size in enumerate(tensor.shape)]
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def thd_read_second_half_lse(sums: Tensor, _boundaries: Tensor, is_packed: bool, length: int) -> Tensor:
    """Logarithms of sums of the second halves, `length` of them."""
    kept = sums.shape[:1] if is_packed else sums.shape[:2]
    return torch.empty(*kept, length, dtype=sums.dtype, device=sums.device)


def multi_tensor_l2norm(_chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    """A norm of 1."""
    return torch.ones(1, device=flag.device), torch.empty(len(lists[0]) if per_tensor else 0, device=flag.device)


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, _noop: Any = None) -> Any:
    """A tensor in the quantiser's form."""
    return out if out is not None else _quantised(tuple(tensor.shape), quantizer, tensor.dtype, tensor.device)


def create_empty_quantized_tensor(quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, *_rest: Any) -> Any:
    """The same without a source."""
    return _quantised(tuple(shape), quantizer, dtype, device)


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """A tensor in its nominal format."""
    return torch.empty(tuple(tensor.size()), dtype=tensor._dtype, device=tensor.device)


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of a bias, and the quantised gradient."""
    return torch.empty(gradient.shape[-1], dtype=gradient.dtype, device=gradient.device), quantize(gradient, quantizer)


def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    """The first two dimensions change places."""
    first, second, *others = tensor.shape
    return out if out is not None else torch.empty(second, first, *others, dtype=tensor.dtype, device=tensor.device)


def fp8_transpose(tensor: Tensor, _dtype: Any, out: Tensor | None = None) -> Tensor:
    """The last dimension comes first."""
    return out if out is not None else torch.empty(tensor.shape[-1], *tensor.shape[:-1], dtype=tensor.dtype, device=tensor.device)


def pretend_compiled() -> None:
    """The functions that megatron-core has compiled into one kernel each: none of what they compute on the way is ever in memory."""
    from megatron.core.fusions import fused_bias_swiglu

    found: dict[str, Callable[..., Any]] = {"swiglu": _gated, "swiglu_back": lambda _gradient, both: torch.empty_like(both)}
    for name, function in found.items():
        setattr(fused_bias_swiglu, name, _counted(name, function))


def _gated(both: Tensor) -> Tensor:
    return torch.empty(*both.shape[:-1], both.shape[-1] // 2, dtype=both.dtype, device=both.device)


def _fused_attention(backends: Any) -> Any:
    """cuDNN's for packed sequences, which Transformer Engine 2.20 had on Hopper and newer alone (`common/fused_attn/fused_attn.cpp`)."""
    is_new = torch.cuda.get_device_capability() >= (9, 0)
    return backends.NVTE_F16_arbitrary_seqlen if is_new else backends.NVTE_No_Backend


def _in_place(*_arguments: Any, **_options: Any) -> None:
    """Changes numbers that there are none of."""


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **options)

    return call


def _torch_type(dtype: Any, like: Any) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return like.dtype if isinstance(like, Tensor) else torch.bfloat16
    found: torch.dtype = TE_DType_To_Torch[dtype]
    return found


def _quantised(shape: tuple[int, ...], quantizer: Any, dtype: torch.dtype, device: Any) -> Any:
    """What a quantiser of recipes `blockwise`, `mxfp8`, `tensorwise` or `delayed` makes of such a tensor (`csrc/quantizer.cpp`)."""
    forms = {
        "Float8BlockQuantizer": _blocks,
        "MXFP8Quantizer": _blocks_of_32,
        "Float8Quantizer": _whole,
        "Float8CurrentScalingQuantizer": _whole,
    }
    form = forms.get(type(quantizer).__name__)
    if form is None:
        raise NotImplementedError(f"a rehearsal does not know the form of Transformer Engine's {type(quantizer).__name__}.")
    tensor, storage, parts = form(shape, quantizer, device)
    parts |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    return storage(**parts, fake_dtype=dtype) if quantizer.internal else tensor(shape=shape, dtype=dtype, device=device, **parts)


def _blocks(shape: tuple[int, ...], quantizer: Any, device: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Blocks of 1 x 128 and 128 x 128, whose sizes the quantiser itself knows."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    parts = _both_ways(shape, quantizer.get_columnwise_shape(shape), torch.float32, quantizer, device)
    parts["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    return Float8BlockwiseQTensor, Float8BlockwiseQTensorStorage, parts


def _blocks_of_32(shape: tuple[int, ...], quantizer: Any, device: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Blocks of 32 elements, both ways in the tensor's own shape."""
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor
    from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage

    parts = _both_ways(shape, shape, torch.uint8, quantizer, device)
    return MXFP8Tensor, MXFP8TensorStorage, parts | {"with_gemm_swizzled_scales": False}


def _both_ways(shape: Any, columnwise: Any, scale_type: torch.dtype, quantizer: Any, device: Any) -> dict[str, Tensor | None]:
    parts: dict[str, Tensor | None] = {}
    ways = (("rowwise", quantizer.rowwise_usage, shape, False), ("columnwise", quantizer.columnwise_usage, columnwise, True))
    for way, is_used, size, is_columnwise in ways:
        scales = tuple(quantizer.get_scale_shape(shape, is_columnwise))
        parts[f"{way}_data"] = torch.empty(tuple(size), dtype=torch.uint8, device=device) if is_used else None
        parts[f"{way}_scale_inv"] = torch.empty(scales, dtype=scale_type, device=device) if is_used else None
    return parts


def _whole(shape: tuple[int, ...], quantizer: Any, device: Any) -> tuple[Any, Any, dict[str, Any]]:
    """One scale for the tensor; on a Hopper a transposed copy for the gradient of the weight, which newer GPUs do without."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    is_hopper = torch.cuda.get_device_capability()[0] < 10
    has_data, has_transpose = quantizer.rowwise_usage or not is_hopper, quantizer.columnwise_usage and is_hopper
    transposed = (*shape[-1:], *shape[:-1])
    parts = {
        "data": torch.empty(shape, dtype=torch.uint8, device=device) if has_data else None,
        "data_transpose": torch.empty(transposed, dtype=torch.uint8, device=device) if has_transpose else None,
        "fp8_scale_inv": torch.empty(1, dtype=torch.float32, device=device),
    }
    return Float8Tensor, Float8TensorStorage, parts
