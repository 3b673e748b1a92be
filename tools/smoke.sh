#!/usr/bin/env bash
# The whole loop in small: is this installation in order? On one rank, by whatever `megatron-r1z` is on the path, from the root of the repository:
# the quickstart's task, a base model that is hardly trained, three iterations of Dr. GRPO through Megatron and vLLM, and a plan.
#
#     tools/smoke.sh [FOLDER [section.field=value ...]]     the images call it with a folder that they may write to
#
# A minute on a CPU. On a GPU it is the first thing to run: docs/gpu.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly folder=${1:-runs/smoke}
shift || true
readonly python=${PYTHON:-python3}
readonly one_rank=(parallel.num_ranks=1 model.path="$folder/task/model")

step() { printf '\n== %s\n' "$*"; }
r1z() { "$python" -m megatron_r1z "$@"; }

step "task"
"$python" examples/quickstart/make_task.py "$folder/task"
step "pre-training, 60 steps"
r1z pretrain configs/quickstart-pretrain.yaml "${one_rank[@]}" corpus.sources.0.path="$folder/task/corpus.jsonl" corpus.steps=60 optimizer.decay_steps=60 \
    optimizer.warmup_steps=5 logging.folder="$folder/base" "$@"
step "Dr. GRPO, 3 iterations"
r1z train configs/quickstart.yaml "${one_rank[@]}" parallel.tensor_parallel_size=1 rollout.tensor_parallel_size=1 algorithm.iterations=3 \
    model.path="$folder/base/hf/final" data.train="[{path: $folder/task/questions.jsonl}]" evaluation.sets="[]" logging.folder="$folder/rl" "$@"
step "plan"
r1z plan configs/qwen2.5-7b-h100.yaml --cluster configs/clusters/h100-8.yaml
step "in order"
