#!/usr/bin/env bash
# Builds for aarch64 and runs under qemu-user, on x86-64, what compares bytes: the unit tests of the
# arithmetic, the tools' checkpoints, reads of every kind, the recorded digests, and a real mount.
#
#     scripts/aarch64.sh
#
# The compiler is rustup's where it has the target (`rustup target add aarch64-unknown-linux-gnu`), or else
# Debian's, which has the target's standard library as a package: in a system of its own below
# target/aarch64 (1.6 GB; needs root, debootstrap and unshare). Prints the SHA-256 of every file of the mount; exits with 0 only where all
# tests pass and the sums are those of this machine's own export.
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu
work=$PWD/target/aarch64
root=$work/root
model=tests/fixtures/llama-bf16

# What runs inside, with the compiler at hand and the repository as the working directory.
inside=$(cat <<'EOF'
set -euo pipefail
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
export CARGO_PROFILE_TEST_DEBUG=0 CARGO_PROFILE_DEV_DEBUG=0
# Without what starts itself again, which needs the kernel to know of qemu, and what asks the kernel which
# pages are resident, which qemu doesn't answer.
cargo test --locked --target "$target" --lib -- quant:: source:: \
    --skip source::guard --skip what_is_resident --skip what_is_fetched
cargo test --locked --target "$target" --test golden --test read --test digests
point=$(mktemp -d)
$CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER "$CARGO_TARGET_DIR/$target/debug/aq-fs" \
    mount --foreground "$model" "$point" &
until mountpoint -q "$point"; do
    kill -0 $! || { wait $!; exit 1; }
    sleep 0.2
done
(cd "$point" && sha256sum -- *) > "$CARGO_TARGET_DIR/mounted.sha256"
umount "$point"
wait
rmdir "$point"
EOF
)

if rustup target list --installed 2>/dev/null | grep -qx "$target"; then
    for tool in aarch64-linux-gnu-gcc qemu-aarch64; do
        command -v "$tool" >/dev/null || { echo "aarch64.sh: install $tool first" >&2; exit 1; }
    done
    mkdir -p "$work"
    target=$target model=$model CARGO_TARGET_DIR=$work bash -c "$inside"
else
    if [ ! -e "$root/made" ]; then
        mkdir -p "$root"
        debootstrap --variant=minbase --include=ca-certificates trixie "$root"
        sed -n 's/ trixie / trixie-backports /p' "$root/etc/apt/sources.list" > "$root/backports"
        mv "$root/backports" "$root/etc/apt/sources.list.d/backports.list"
        cp /etc/resolv.conf "$root/etc/"
        chroot "$root" env DEBIAN_FRONTEND=noninteractive bash -euc '
            dpkg --add-architecture arm64
            apt-get update -qq
            apt-get install -y -qq --no-install-recommends -t trixie-backports \
                rustc cargo libstd-rust-dev:arm64
            apt-get install -y -qq --no-install-recommends \
                gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user'
        touch "$root/made"
    fi
    registry=${CARGO_HOME:-$HOME/.cargo}/registry
    mkdir -p "$root/repository" "$root/cargo/registry" "$root/output" "$work/debian" "$registry"
    # Bound in a namespace of its own, which nothing outlives.
    unshare --mount bash -euc '
        root=$1 output=$2 registry=$3
        mount --bind . "$root/repository"
        mount --bind "$output" "$root/output"
        mount --bind "$registry" "$root/cargo/registry"
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root CARGO_HOME=/cargo \
            CARGO_TARGET_DIR=/output target="$4" model="$5" bash -c "cd /repository; $6"
    ' aarch64 "$root" "$work/debian" "$registry" "$target" "$model" "$inside"
    work=$work/debian
fi

# The same by this machine.
own=$(mktemp -d)
trap 'rm -rf "$own"' EXIT
cargo run --quiet --locked -- export "$model" "$own" --overwrite --quiet
echo "aarch64, mounted under qemu-user:"
cat "$work/mounted.sha256"
(cd "$own" && sha256sum --check --strict "$work/mounted.sha256")
echo "every file has the same bytes on $(uname -m) and aarch64"
