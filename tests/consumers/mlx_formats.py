"""Loads a mount in every mode of MLX, and in AWQ, with mlx-lm on the CPU.

    python mlx_formats.py AQ_FS MODEL

The logits' distance from the original's must be at least what the number of bits promises on such a
small model, at both qualities.
"""

import subprocess
import sys
import tempfile

import mlx.core as mx
from mlx_lm import load

# The least distance in dB, by format and flags.
MODES = {
    ("mlx",): 9,
    ("mlx", "--group-size", "32"): 9,
    ("mlx", "--bits", "3"): 3,
    ("mlx", "--bits", "6"): 18,
    ("mlx", "--bits", "8"): 22,
    ("mlx-mxfp4",): 6,
    ("mlx-mxfp8",): 20,
    ("mlx-nvfp4",): 9,
    ("awq",): 8,
}
TOKENS = [[5, 9, 20, 33, 77, 101, 3, 44]]


def logits(directory):
    model, _ = load(directory)
    return model(mx.array(TOKENS)).astype(mx.float32)


def main():
    binary, model = sys.argv[1:]
    original = logits(model)
    failed = 0
    for (name, *flags), least in MODES.items():
        for quality in ("reference", "search"):
            with tempfile.TemporaryDirectory() as mount:
                command = [binary, "mount", model, mount, "--format", name, "--quality", quality, *flags]
                subprocess.run(command, check=True, capture_output=True)
                try:
                    found = logits(mount)
                    error = mx.sum((found - original) ** 2) / mx.sum(original**2)
                    distance = -10 * mx.log10(error).item()
                finally:
                    subprocess.run([binary, "unmount", mount], check=True, capture_output=True)
            good = distance >= least
            failed += not good
            words = " ".join([name, *flags, quality])
            print(f"{'ok' if good else 'FAIL'} {words}: logits at {distance:.2f} dB", flush=True)
    print(f"{len(MODES)} modes, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
