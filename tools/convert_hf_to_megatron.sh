#!/usr/bin/env bash
# Model folder in Hugging Face format -> Megatron checkpoint of its weights; all options of `megatron-r1z convert` can follow (docs/checkpoints.md).
# Example: tools/convert_hf_to_megatron.sh models/Qwen2.5-1.5B weights/qwen --tp 2
set -euo pipefail
exec megatron-r1z convert --to megatron "$@"
