#!/usr/bin/env bash
# The packages that tools/gpu_check.sh needs on a machine with a GPU and no network: into a folder here, in pieces that can travel.
#
#     tools/gpu_wheels.sh FOLDER [MB]         download, and split what is larger than so many megabytes (60)
#     tools/gpu_wheels.sh join FOLDER         put the pieces together again; the script of the checks does that by itself
#
# For Python 3.12 and CUDA 13, all but torch: that machine's own is used. What only tests need is there too, without transformers and vLLM.
#
# Transformer Engine's torch part must have been compiled for the very torch of that machine. Its wheel is taken from the folder WHEELS
# (build/wheels), where `make gpu-env-full` leaves one for the torch that vLLM pins. For another, where TORCH is what `torch.__version__` says
# on that machine, in a virtual environment of Python 3.12 with a C++ compiler and without a GPU:
#
#     pip install "torch==TORCH" "setuptools>=77" wheel ninja pybind11 nvidia-cuda-crt nvidia-cudnn-frontend transformer-engine-cu13==2.20.2
#     NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE \
#         pip wheel --no-deps --no-build-isolation --wheel-dir build/wheels transformer-engine-torch==2.20.2
#
# Without it the checks run on megatron-core's own layers, and say so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly python=${PYTHON:-python3}
readonly compiled=${WHEELS:-build/wheels}
readonly target=(--only-binary=:all: --python-version 3.12 --implementation cp)
readonly platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)

download() {
    "$python" -m pip download --quiet --disable-pip-version-check --dest "$folder" "${target[@]}" "${platforms[@]/#/--platform=}" "$@"
}

# What setup.py pins, without what would bring torch along.
pinned() {
    sed -n '/^GPU_HOST/,/^]/p' setup.py | grep -oE '"(megatron-core|transformer-engine|nvidia-cudnn-frontend|nvdlfw-inspect)[^"]*"' | tr -d '"'
}

make_folder() {
    local packages wheel
    mkdir -p "$folder"
    mapfile -t packages < <(pinned)
    packages+=("${packages[1]/transformer-engine/transformer-engine-cu13}")
    download --no-deps "${packages[@]}"
    download einops onnxscript pydantic importlib-metadata pyyaml psutil safetensors "pytest>=9.0,<10" hypothesis
    if compgen -G "$compiled/transformer_engine_torch-*.whl" >/dev/null; then
        cp "$compiled"/transformer_engine_torch-*.whl "$folder"
    else
        echo "gpu_wheels: no transformer_engine_torch-*.whl in $compiled; the head of this script says how to make it." >&2
    fi
    while read -r wheel; do
        split --bytes="${megabytes}MB" --numeric-suffixes "$wheel" "$wheel.part-"
        rm "$wheel"
    done < <(find "$folder" -name '*.whl' -size "+$((megabytes * 1000000))c")
    du -ah "$folder"
}

join() {
    local first whole
    for first in "$folder"/*.whl.part-00; do
        [[ -e $first ]] || continue
        whole=${first%.part-00}
        cat "$whole".part-* >"$whole"
        "$python" -m zipfile -t "$whole" >/dev/null || { echo "gpu_wheels: $whole is not whole: are all pieces there?" >&2; rm "$whole"; return 1; }
        rm "$whole".part-*
    done
}

if [[ ${1:-} == join ]]; then
    readonly folder=${2:?folder of the pieces}
    join
else
    readonly folder=${1:?folder for the wheels} megabytes=${2:-60}
    make_folder
fi
