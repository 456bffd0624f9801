#!/usr/bin/env bash
# Installs what aq-fs needs of the system and what is missing of it: Debian's fuse3, and with the
# argument `python` what a virtual environment needs.
set -euo pipefail

packages=()
command -v fusermount3 >/dev/null || packages+=(fuse3)
if [ "${1:-}" = python ]; then
    python3 -c 'import venv, ensurepip' 2>/dev/null || packages+=(python3-venv)
fi
if [ "${#packages[@]}" -gt 0 ]; then
    command -v apt-get >/dev/null || {
        echo "install.sh: install ${packages[*]} first (no apt-get here to do it)" >&2
        exit 1
    }
    sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}"
fi
