"""Loads mounts of mixtures of experts, and of several schemes at once, with mlx-lm on the CPU.

    python mlx_mixtures.py AQ_FS MODELS

MODELS is what build_models.py wrote. The logits' distance from the original's must be at least what
the number of bits promises on such a small model.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

MIXTURES = ["qwen2-moe", "qwen3-moe", "mixtral", "olmoe", "deepseek-v3"]
# Flags, and the least distance in dB.
FLAGS = {
    "--format mlx --group-size 32": 8,
    "--format mlx-mxfp4": 5,
    "--format mlx-mxfp8": 17,
    "--format mlx --bits 8 --group-size 32": 20,
    "--format mlx --group-size 32 --set *.experts.*=8 --set *.o_proj=6/32": 8,
    "--format mlx --group-size 32 --skip *.experts.*": 8,
}
TOKENS = [[5, 9, 20, 33, 77, 101, 3, 44]]


def logits(directory):
    model, _ = load_model(Path(directory))
    # The CPU multiplies experts in single precision alone.
    model.set_dtype(mx.float32)
    names = {name for name, _ in tree_flatten(model.parameters())}
    return model(mx.array(TOKENS)), any(name.endswith("switch_mlp.up_proj.scales") for name in names)


def older_words(directory):
    """The config with what mlx-lm knows by older names."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.setdefault("num_experts", config.get("num_local_experts"))
    config.setdefault("rope_theta", config.get("rope_parameters", {}).get("rope_theta", 10000.0))
    path.write_text(json.dumps(config, indent=2))


def main():
    binary, models = sys.argv[1:]
    failed = 0
    for name in MIXTURES:
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            shutil.copytree(Path(models) / name, model)
            older_words(model)
            original, _ = logits(model)
            for flags, least in FLAGS.items():
                mount = Path(scratch) / "mount"
                mount.mkdir(exist_ok=True)
                command = [binary, "mount", str(model), str(mount), *flags.split()]
                subprocess.run(command, check=True, capture_output=True)
                try:
                    found, is_stacked = logits(mount)
                    error = mx.sum((found - original) ** 2) / mx.sum(original**2)
                    distance = -10 * mx.log10(error).item()
                finally:
                    subprocess.run([binary, "unmount", str(mount)], check=True, capture_output=True)
                good = distance >= least and is_stacked != ("--skip" in flags)
                failed += not good
                print(f"{'ok' if good else 'FAIL'} {name} {flags}: logits at {distance:.2f} dB", flush=True)
    print(f"{len(MIXTURES) * len(FLAGS)} mounts, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
