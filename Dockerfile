# The GPU environment. Not built or run here: the pins are those of setup.py, resolved from metadata only.
#
#   docker build -t megatron-r1z .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/workspace/runs" megatron-r1z train configs/<run>.yaml
#
# Base: NGC PyTorch with Python 3.12 and CUDA 13, for its compiler, CUDA headers and NCCL.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE_IMAGE}

# The image constrains pip to its own torch; vLLM pins another one.
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1

RUN python -c 'import sys; assert sys.version_info[:2] == (3, 12), sys.version'

# Compiled for the image's torch, so they cannot stay beside vLLM's. Transformer Engine and the vision libraries come back below;
# nothing needs apex beside Transformer Engine. (Whoever wants apex builds it from NVIDIA's source: the package index has another
# project under that name.)
RUN pip uninstall -y transformer-engine torchvision torchaudio flash-attn apex

# torch first: the PyTorch part of Transformer Engine is compiled against it and cannot be built in isolation.
RUN pip install "vllm==0.33.*"

WORKDIR /opt/megatron-r1z
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_r1z ./megatron_r1z
RUN pip install "setuptools>=77" wheel ninja pybind11 \
    && NVTE_FRAMEWORK=pytorch pip install --no-build-isolation ".[gpu]" \
    && python -c "import torch, transformer_engine.pytorch, megatron.core, vllm"

RUN useradd --create-home --uid 10001 r1z && mkdir -p /workspace/runs && chown -R r1z /workspace
USER r1z
WORKDIR /workspace
COPY --chown=r1z configs ./configs

ENTRYPOINT ["megatron-r1z"]
CMD ["--help"]
