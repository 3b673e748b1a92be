#!/usr/bin/env bash
# Megatron checkpoint -> model folder in Hugging Face format; all options of `megatron-r1z convert` can follow (docs/checkpoints.md).
# Example: tools/convert_megatron_to_hf.sh runs/x/checkpoints/step_000100 exported --dtype bf16
set -euo pipefail
exec megatron-r1z convert --to hf "$@"
