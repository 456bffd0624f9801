"""Checks that a real loader reads every format that aq-fs lists.

    python covered.py AQ_FS
"""

import sys

import closeness
import formats
import mlx_formats
from mounted import listed

# What no loader in this environment runs, and where it is run.
ELSEWHERE = {
    "dense": "tests/loaders.rs, pipeline.py",
    "gptq": "scripts/gptqmodel.sh",
    "gptq-v2": "scripts/gptqmodel.sh",
}


def main():
    (binary,) = sys.argv[1:]
    read = {"compressed-tensors"} | {name.split()[0] for name in formats.FORMATS | getattr(formats, "FUSED", {})}
    read |= {mode[0] for mode in mlx_formats.MODES}
    read |= {flags[1] for flags, _ in closeness.SCHEMES.values() if flags[0] == "--format"}
    names = listed(binary)
    missed = [name for name in names if name not in read | ELSEWHERE.keys()]
    for name in missed:
        print(f"FAIL {name}: no loader is told to read it")
    print(f"{len(names)} formats, {len(missed)} that no loader reads")
    sys.exit(bool(missed or not names))


if __name__ == "__main__":
    main()
