#!/usr/bin/env bash
# The first hour on a GPU: the checks of docs/gpu.md in order, each in a process of its own with its own time. No network is asked.
#
#     bash tools/gpu_check.sh [--quick] [--wheels FOLDER] [--out FOLDER] [--minutes N] [--patience TIMES] [--only NAME ...]
#
# --quick: one GPU, no vLLM, 10 minutes at most. --wheels: packages that tools/gpu_wheels.sh has put there, in pieces or whole; what the
# machine has stays, torch always, and nothing is installed into it. PYTHON names another Python than python3, COMMIT the version where
# there is no git. Results are in FOLDER (runs/gpu-check), also when it is stopped: results.jsonl and log.txt;
# `python tools/gpu_report.py FOLDER/results.jsonl` makes lines of the table in docs/gpu.md of them. Status 1: a check failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly python=${PYTHON:-python3}
wheels="" options=()
while (($#)); do
    if [[ $1 == --wheels ]]; then wheels=${2:?folder}; shift 2; else options+=("$1"); shift; fi
done

# Wheels of the folder whose package is not there in any version, and those whose version matters.
lacking() {
    "$python" - "$wheels" <<'PYTHON'
import sys
from importlib.metadata import distributions
from pathlib import Path

ours = ("megatron_core", "transformer_engine", "nvidia_cudnn_frontend", "pytest", "pluggy", "iniconfig")
there = {(item.metadata["Name"] or "").lower().replace("-", "_") for item in distributions()}
names = {path: path.name.split("-")[0].lower() for path in sorted(Path(sys.argv[1]).glob("*.whl"))}
print(*(path for path, name in names.items() if name not in there or name.startswith(ours)), sep="\n")
PYTHON
}

install() {
    local missing
    bash tools/gpu_wheels.sh join "$wheels" || return 1
    mapfile -t missing < <(lacking)
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --target "$site" "${missing[@]}"
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [[ -n $wheels ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    install || echo "gpu_check: not all packages could be installed; what needs them will say so." >&2
    export PYTHONPATH=$site:$PYTHONPATH
fi
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)} "$python" tools/gpu_check.py "${options[@]}"
