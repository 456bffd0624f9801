#!/usr/bin/env bash
# Real loaders on real mounts: makes a Python environment with pinned versions below target/, builds
# small models of many architectures, and loads each from a mount.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=target/consumers
bin=${AQ_FS:-target/release/aq-fs}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if ! cmp -s tests/consumers/requirements.txt "$venv/installed.txt"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet uv
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" -r tests/consumers/requirements.txt
    cp tests/consumers/requirements.txt "$venv/installed.txt"
fi
python="$venv/bin/python"

models=$(mktemp -d)
trap 'rm -rf "$models"' EXIT
"$python" tests/consumers/build_models.py "$models"
load() { "$python" tests/consumers/load_models.py "$bin" "$models" "$@"; }
load
some=(--name llama --name qwen3-moe --name gpt2)
load "${some[@]}" --bits 8
load "${some[@]}" --bits 3
load "${some[@]}" --group-size channel
load "${some[@]}" --asymmetric
load "${some[@]}" --asymmetric --group-size channel --quality reference
load "${some[@]}" --bits 8 --format ct-int8
load "${some[@]}" --set '*.experts.*=8'
load "${some[@]}" --set '*.down_proj=8' --set '*.v_proj=6/channel' --set '*.experts.*=4/32'
"$python" tests/consumers/covered.py "$bin"
"$python" tests/consumers/pipeline.py "$bin"
"$python" tests/consumers/closeness.py "$bin" tests/fixtures/llama-bf16
"$python" tests/consumers/formats.py "$bin" tests/fixtures/llama-bf16
"$python" tests/consumers/formats.py "$bin" "$models/gpt-oss" mxfp4
"$python" tests/consumers/sources.py "$bin" tests/fixtures/llama-bf16
"$python" tests/consumers/mlx_formats.py "$bin" tests/fixtures/llama-bf16
"$python" tests/consumers/mixtures.py "$bin" "$models"
"$python" tests/consumers/mlx_mixtures.py "$bin" "$models"
"$python" tests/consumers/mistral.py "$bin" tests/fixtures/llama-bf16
