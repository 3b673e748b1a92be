"""The one place that decides whether a float32 product is one.

GPUs multiply float32 matrices faster with 10 bits of mantissa in place of 23 (TF32). torch leaves that off for its own products.
Transformer Engine asks cuBLAS for it without a switch (2.20, `common/gemm/cublaslt_gemm.cu`, `CUBLAS_COMPUTE_32F_FAST_TF32`), and the only
attention that vLLM 0.33 has for float32 takes it by Triton's default for `tl.dot`. cuBLAS and Triton have a variable of the environment
for it.
"""

from __future__ import annotations

import os

VARIABLES = {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee"}
"""Of cuBLAS, which reads its own when a product is first asked for; of Triton, which reads its own when a kernel is compiled."""


def keep_float32(policy: str, engine: str) -> None:
    """Have libraries multiply in float32 where policy or engine are in float32; before the first product. What the user has set stays."""
    if "fp32" in (policy, engine):
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)


def may_round_float32() -> bool:
    """Whether a GPU may take TF32 for float32 in this process, because a variable says something else than `keep_float32` would."""
    import torch

    return torch.cuda.is_available() and any(os.environ.get(name) != value for name, value in VARIABLES.items())
