# The GPU environment. Not built or run here: there is no docker. The pins are those of setup.py, resolved from metadata only.
#
#   docker build -t megatron-r1z .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --entrypoint tools/smoke.sh megatron-r1z runs/smoke
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/workspace/runs" -v "$PWD/models:/workspace/models" \
#     megatron-r1z train configs/<run>.yaml
#   docker run --rm megatron-r1z plan configs/qwen2.5-7b-h100.yaml --cluster configs/clusters/h100-8.yaml     # needs no GPU
#
# The folder that is mounted as runs must be writable by user 10001.
#
# Base: NGC PyTorch with Python 3.12 and CUDA 13, for its compiler, CUDA headers and NCCL.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE_IMAGE}

# A tag of NVIDIA's apex, which is compiled here because the base image's is for the torch that goes; `--build-arg APEX=` leaves it out:
# nothing needs it beside Transformer Engine. The package index has another project under that name.
ARG APEX=25.09

# The image constrains pip to its own torch; vLLM pins another one.
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1

RUN python -c 'import sys; assert sys.version_info[:2] == (3, 12), sys.version'

# Compiled for the image's torch, so they cannot stay beside vLLM's. Transformer Engine, apex and the vision libraries come back below.
RUN pip uninstall -y transformer-engine torchvision torchaudio flash-attn apex

# torch first: the PyTorch part of Transformer Engine, and apex, are compiled against it and cannot be built in isolation.
RUN pip install "vllm==0.33.*" "setuptools>=77" wheel ninja pybind11
RUN if [ -n "${APEX}" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "git+https://github.com/NVIDIA/apex.git@${APEX}"; \
    fi

WORKDIR /opt/megatron-r1z
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY megatron_r1z ./megatron_r1z
RUN NVTE_FRAMEWORK=pytorch pip install --no-build-isolation ".[gpu]" \
    && python -c "import torch, transformer_engine.pytorch, megatron.core, vllm"

# nemo-run==0.11.1 cannot share an environment with vLLM (setup.py says why): it has its own, /opt/launch/bin/megatron-r1z.
RUN python -m venv /opt/launch && /opt/launch/bin/pip install ".[launch]" && /opt/launch/bin/python -c "import nemo_run"

RUN useradd --create-home --uid 10001 r1z && mkdir -p /workspace/runs /workspace/models && chown -R r1z /workspace
USER r1z
WORKDIR /workspace
COPY --chown=r1z configs ./configs
COPY --chown=r1z examples ./examples
COPY --chown=r1z tools ./tools
RUN megatron-r1z plan configs/qwen2.5-7b-h100.yaml --cluster configs/clusters/h100-8.yaml

ENTRYPOINT ["megatron-r1z"]
CMD ["--help"]
