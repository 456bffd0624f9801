#!/usr/bin/env bash
# The main job, end to end: mounts a checkpoint as 4-bit, looks at it, loads a tensor, unmounts.
#
#     scripts/demo.sh [MODEL_DIR]
#
# Without a model it makes a small Llama-shaped one with a tokenizer.
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/.."
scripts/install.sh
cargo build --quiet --release --locked --bins --examples
bin=target/release

work=$(mktemp -d)
mount="$work/quantized"
cleanup() {
    mountpoint -q "$mount" && "$bin/aq-fs" unmount "$mount"
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ $# -gt 0 ]; then
    model=$(cd "$here" && realpath "$1")
else
    model="$work/model"
    "$bin/examples/toy_checkpoint" "$model"
fi
mkdir "$mount"

say() { printf '\n$ %s\n' "$*"; }
run() { say "$@"; "$@"; }
PATH="$PWD/$bin:$PATH"
run aq-fs inspect "$model" --bits 4 --summary
run aq-fs mount "$model" "$mount" --bits 4
run ls -lL "$model" "$mount"
say du -shL --apparent-size "$model" "$mount"
du -shL --apparent-size "$model" "$mount"
say "load_tensor $mount   # through the safetensors library"
"$bin/examples/load_tensor" "$mount"
run aq-fs status "$mount"
run aq-fs unmount "$mount"
