#!/usr/bin/env bash
# From nothing to a trained model: make the task, pre-train a base model on noisy sums, train it by Dr. GRPO, report.
# `make quickstart` calls this after making the environment. A second call goes on from where the first one was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly python=.venv/bin/python
readonly start=$SECONDS

step() { printf '\n== %s\n' "$*"; }

step "1/4 task: sums of 3 to 6 digits, a corpus in which most workings contain slips"
$python examples/quickstart/make_task.py
step "2/4 pre-training: a base model of 0.6 million parameters from random weights, 2 ranks, data parallel"
$python -m megatron_r1z pretrain configs/quickstart-pretrain.yaml
step "3/4 Dr. GRPO: 2 ranks, tensor parallel in Megatron and in vLLM"
$python -m megatron_r1z train configs/quickstart.yaml
step "4/4 held-out accuracy at temperature 1, 300 questions a row ($((SECONDS - start)) s so far)"
$python examples/quickstart/report.py runs/quickstart/rl
