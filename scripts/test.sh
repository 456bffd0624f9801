#!/usr/bin/env bash
# Everything that must pass: format, lints, docs, and every test, on real mounts and with real
# loaders. Installs what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s\n' "$*"; }

step install
scripts/install.sh python
step format
cargo fmt --all --check
step lints
cargo clippy --locked --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet
step "Rust tests"
cargo test --locked
step "release build"
cargo build --locked --release --bins --examples
step "real loaders"
tests/consumers/run.sh
