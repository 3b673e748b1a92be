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
# The environment is the one of `make gpu-env-full`, made by the same script: it has its own torch, the one that vLLM pins, and takes nothing
# of the base image's but Python, the compilers (vLLM's kernels are compiled when they are first used) and the driver's libraries. NVIDIA
# apex is not in it: nothing needs it beside Transformer Engine.
#
# Base: NGC PyTorch with Python 3.12 and CUDA 13.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE_IMAGE}

# The image constrains pip to its own torch.
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1

RUN python -c 'import sys; assert sys.version_info[:2] == (3, 12), sys.version'

WORKDIR /opt/megatron-r1z
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY megatron_r1z ./megatron_r1z
COPY tools ./tools
RUN WHEELS=/tmp/wheels bash tools/make_env.sh .venv-gpu gpu python && rm -rf /tmp/wheels
ENV PATH=/opt/megatron-r1z/.venv-gpu/bin:${PATH}
RUN python -c "import torch, transformer_engine.pytorch, megatron.core, vllm"

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
