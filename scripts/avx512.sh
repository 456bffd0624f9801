#!/usr/bin/env bash
# Runs on an emulated CPU that has AVX-512, where this one has none, what compares bytes: the unit tests of
# the arithmetic, the tools' checkpoints, reads of every kind, the recorded digests, and a real mount.
#
#     scripts/avx512.sh [PART...]     # mount golden read digests units every; all of them by default
#     BOCHS=PROGRAM scripts/avx512.sh
#
# Bochs emulates a Skylake-X that boots Debian's kernel, once for each part, as many at a time as there are
# CPUs, with up to 2 GiB of memory each. It takes some 200 times as long as this machine: by estimate an hour
# or two on two CPUs, of which mount and golden take ten minutes. A Bochs of one's own, configured --with-nogui
# and without its debugger, takes half of that.
#
# For Debian on x86-64: what is missing of its packages is installed (as root, or by sudo), but for the kernel,
# which is only unpacked, below target/avx512. Prints the CPU's AVX-512 flags as the guest sees them, what
# its tests say, and the SHA-256 of every file of the mount; exits with 0 only where all tests pass, the mount's
# threads used AVX-512, and the sums are those of this machine's own export. On a CPU that has AVX-512 it does
# nothing: every test runs on it there.
set -euo pipefail
cd "$(dirname "$0")/.."

model=tests/fixtures/llama-bf16
work=$(pwd -P)/target/avx512
flags="avx512f avx512bw avx512vl avx512dq"

die() { echo "avx512.sh: $*" >&2; exit 1; }

# Whether a CPU, by the flags of its /proc/cpuinfo, has what the kernels are compiled for.
has_avx512() {
    for flag in $flags; do
        grep -qw "$flag" <<< "$1" || return 1
    done
}

[ "$(uname -m)" = x86_64 ] || die "an x86-64 builds what is to be run"
if has_avx512 "$(grep -m1 '^flags' /proc/cpuinfo)"; then
    echo "this CPU has AVX-512: scripts/test.sh has run on it"
    exit 0
fi

parts=("$@")
[ $# -gt 0 ] || parts=(mount golden digests read units every)
for part in "${parts[@]}"; do
    case $part in
        mount | golden | read | digests | units | every) ;;
        *) die "no part is named $part" ;;
    esac
done

missing=()
for package in binutils bochs bochs-term bochsbios busybox-static cpio grub-common grub-pc-bin xorriso; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

# Of the kernel one image and one module are used.
mkdir -p "$work"
kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p')
[ -n "$kernel" ] || die "linux-image-cloud-amd64 depends on no kernel"
if [ ! -e "$work/$kernel" ]; then
    rm -rf "$work/unpacked"
    (cd "$work" && apt-get download -qq "$kernel")
    dpkg-deb --extract "$work/$kernel"_*.deb "$work/unpacked"
    rm "$work/$kernel"_*.deb
    mv "$work/unpacked" "$work/$kernel"
fi

# What goes on users' machines, but for the unit tests: they want overflow checked.
executables() {
    cargo test --locked --no-run "$@" 2>&1 | tee /dev/stderr | sed -n 's/^ *Executable .*(\(.*\))$/\1/p'
}
root=$work/root
rm -rf "$root"
mkdir -p "$root"/{bin,dev,proc,sys,tmp,point,tests}
while read -r path; do
    name=${path##*/}
    strip -o "$root/tests/${name%-*}" "$path"
    programs=$(dirname "$(dirname "$path")")
done < <(executables --release --test golden --test read --test digests)
strip -o "$root/bin/aq-fs" "$programs/aq-fs"
strip -o "$root/tests/units" "$(executables --lib)"

# They look for fixtures where they were compiled.
mkdir -p "$root$(pwd -P)/tests"
cp -r tests/fixtures "$root$(pwd -P)/tests/"
cp "$(command -v busybox)" "$root/bin/"
find "$work/$kernel" -name 'fuse.ko*' -exec cp {} "$root/" \;
[ ! -e "$root/fuse.ko.xz" ] || xz --decompress "$root/fuse.ko.xz"
ldd "$root"/bin/aq-fs "$root"/tests/* | grep -o '/[^ :]*\.so[^ :]*' | sort -u | while read -r library; do
    mkdir -p "$root$(dirname "$library")"
    cp -L "$library" "$root$library"
done

cat > "$root/init" <<INIT
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
exec < /dev/console > /dev/console 2>&1
model=$model
cd "$(pwd -P)"
INIT
cat >> "$root/init" <<'INIT'
# Milliseconds since a thread's last use of AVX-512, or -1, for each thread of the mount.
uses() { cat /proc/$mount/task/*/arch_status; }

mounted() {
    insmod /fuse.ko || return
    aq-fs mount --foreground "$model" /point &
    mount=$!
    until grep -q ' /point ' /proc/mounts; do
        kill -0 $mount || return
        sleep 0.2
    done
    uses | sed 's/^/mounted: /'
    (cd /point && sha256sum -- *) | sed 's/^/sum: /'
    uses | sed 's/^/read: /'
    umount /point
    wait $mount
}

grep -m1 '^flags' /proc/cpuinfo
part=$(sed 's/.*part=\([a-z]*\).*/\1/' /proc/cmdline)
case $part in
    mount) mounted ;;
    units) /tests/units quant:: source:: isa:: --skip quant::tests::every:: ;;
    every) /tests/units quant::tests::every:: ;;
    # The record stands for the other instruction sets.
    digests) DIGESTS_ON=avx512 /tests/digests --nocapture ;;
    *) /tests/$part ;;
esac
echo "$part ended with $?"
sleep 1
poweroff -f
INIT
chmod +x "$root/init"
rm -rf "$work/boot"
mkdir -p "$work/boot"
cp "$work/$kernel"/boot/vmlinuz-* "$work/boot/vmlinuz"
(cd "$root" && find . | cpio --create --format=newc --owner=0:0 --quiet) > "$work/boot/initrd"

# Boots a guest for one part, what it says going to serial.txt; takes this shell's place.
guest() {
    local dir=$work/$1 display=term debugger=()
    rm -rf "$dir"
    mkdir -p "$dir/disc/boot/grub"
    touch "$dir/serial.txt"
    # glibc's own use of AVX-512 would count as the mount's, also that of processes before it: the kernel hands on
    # what it doesn't know to /init, as its environment.
    # Bochs says a size of XSAVES's area that the kernel can't believe, and has no APERF to be read at each tick.
    cat > "$dir/disc/boot/grub/grub.cfg" <<CFG
linux /vmlinuz console=ttyS0 quiet part=$1 clearcpuid=xsavec,xsaves,aperfmperf mitigations=off nokaslr \
    tsc=reliable no_timer_check panic=-1 reboot=triple \
    GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW
initrd /initrd
boot
CFG
    grub-mkrescue --directory=/usr/lib/grub/i386-pc --output="$dir/disc.iso" "$dir/disc" "$work/boot" \
        > "$dir/grub.txt" 2>&1
    [ -z "${BOCHS:-}" ] || display=nogui
    if [[ $("${BOCHS:-bochs}" --help 2>&1) == *"-rc "* ]]; then
        echo c > "$dir/continue"
        debugger=(-rc "$dir/continue")
    fi
    cat > "$dir/bochsrc" <<RC
display_library: $display
megs: 2048
cpu: model=corei7_skylake_x, count=1, ips=100000000, reset_on_triple_fault=0
clock: sync=none
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$dir/disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$dir/serial.txt
log: $dir/log.txt
panic: action=fatal
RC
    # A guest that hangs ends some time, by SIGKILL as its debugger takes SIGTERM. Powering off is a panic to Bochs.
    TERM=xterm exec timeout --kill-after=5 6h nice "${BOCHS:-bochs}" -q -f "$dir/bochsrc" "${debugger[@]}" \
        < /dev/null > "$dir/bochs.txt" 2>&1
}

failed=()
declare -A part_of=() began=()
trap 'kill "${!part_of[@]}" 2>/dev/null || true' EXIT

# Waits for a guest to end and says what it said.
finish() {
    # `wait -n` knows nothing of those that have ended before.
    local pid= one
    while [ -z "$pid" ]; do
        sleep 1
        for one in "${!part_of[@]}"; do
            kill -0 "$one" 2>/dev/null || pid=$one
        done
    done
    local part=${part_of[$pid]}
    local took=$((SECONDS - began[$pid])) dir=$work/$part
    unset "part_of[$pid]"
    tr -d '\r\0' < "$dir/serial.txt" > "$dir/said.txt"
    echo "== $part, $((took / 60)) min $((took % 60)) s"
    grep -E '^(test |read on |sum: |mounted: |read: )' "$dir/said.txt" || true
    if ! has_avx512 "$(grep -m1 '^flags' "$dir/said.txt")"; then
        echo "no AVX-512 in the guest's /proc/cpuinfo"
        failed+=("$part")
    elif ! grep -qx "$part ended with 0" "$dir/said.txt"; then
        tail -n 20 "$dir/said.txt"
        failed+=("$part")
    else
        echo "all of it on$(grep -m1 '^flags' "$dir/said.txt" | grep -o ' avx512[a-z]*' | tr -d '\n')"
        rm "$dir/disc.iso"
    fi
}

for part in "${parts[@]}"; do
    [ "${#part_of[@]}" -lt "$(nproc)" ] || finish
    guest "$part" &
    part_of[$!]=$part began[$!]=$SECONDS
    echo "$part: see $work/$part/serial.txt"
done
while [ "${#part_of[@]}" -gt 0 ]; do finish; done
[ "${#failed[@]}" -eq 0 ] || die "failed: ${failed[*]}"

if [[ " ${parts[*]} " == *" mount "* ]]; then
    said=$work/mount/said.txt
    ! grep -qE '^mounted:.*[^-0-9][0-9]+$' "$said" || die "AVX-512 was in use before the first read"
    grep -qE '^read:.*[^-0-9][0-9]+$' "$said" || die "no thread of the mount has used AVX-512"
    sed -n 's/^sum: //p' "$said" > "$work/mounted.sha256"
    own=$(mktemp -d)
    trap 'rm -rf "$own"' EXIT
    "$programs/aq-fs" export "$model" "$own" --overwrite --quiet
    (cd "$own" && sha256sum --check --strict "$work/mounted.sha256")
    [ "$(find "$own" -type f | wc -l)" -eq "$(wc -l < "$work/mounted.sha256")" ] || die "files are missing"
    echo "every file has the same bytes on this CPU and on one with AVX-512"
fi
