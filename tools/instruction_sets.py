"""Print what torch's own kernels, oneDNN and vLLM are held to in this environment; with MKL_VERBOSE=1 MKL says it of itself."""

from __future__ import annotations

import os

import torch

from megatron_r1z.rollout.cpu import prepare_import

prepare_import()
torch.ones(2, 2) @ torch.ones(2, 2)  # MKL speaks at its first product
print(f"torch's own kernels: {torch.backends.cpu.get_cpu_capability()}; oneDNN: {os.environ.get('ONEDNN_MAX_CPU_ISA', 'all there is')}")
names = ("avx2", "avx512_f", "avx512_bf16", "amx_tile")
print("vLLM:", ", ".join(name for name in names if torch.cpu.get_capabilities().get(name)) or "none of AVX2, AVX-512 and AMX")
