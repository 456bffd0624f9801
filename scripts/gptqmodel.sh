#!/usr/bin/env bash
# gptqmodel on the CPU, by itself and under transformers, on mounts in GPTQ and AWQ: loads each, generates, and
# compares logits with those of the dequantized weights. Makes a Python environment below target/.
#
#     scripts/gptqmodel.sh
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh python
cargo build --quiet --release --locked
venv=${GPTQMODEL_VENV:-target/gptqmodel}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if ! cmp -s tests/consumers/requirements-gptqmodel.txt "$venv/installed.txt"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet uv
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" -r tests/consumers/requirements-gptqmodel.txt
    cp tests/consumers/requirements-gptqmodel.txt "$venv/installed.txt"
fi
"$venv/bin/python" tests/consumers/gptq_formats.py target/release/aq-fs tests/fixtures/llama-bf16
