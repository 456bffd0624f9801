"""Loads mounts of mixtures of experts, and of several schemes at once, with mlx-lm on the CPU.

    python mlx_mixtures.py AQ_FS MODELS [NAME ...]

MODELS is what build_models.py wrote. The logits' distance from the original's must be at least what
the number of bits promises on such a small model, and at --quality reference every parameter must be
what mlx makes of the original's.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mounted import mounted
from published import as_published

MIXTURES = ["qwen2-moe", "qwen3-moe", "mixtral", "olmoe", "deepseek-v3"]
# Published with fused experts.
FUSED = ["qwen3-5-moe", "qwen3-vl-moe", "llama4", "gemma4", "mistral4"]
# Flags, and the least distance in dB.
FLAGS = {
    "--format mlx --group-size 32": 8,
    "--format mlx-mxfp4": 5,
    "--format mlx-mxfp8": 14,
    "--format mlx --bits 8 --group-size 32": 20,
    "--format mlx --group-size 32 --set *.experts.*=8 --set *.o_proj=6/32": 8,
    "--format mlx --group-size 32 --skip *.experts.*": 8,
}
JOINED = re.compile(r"\.(switch_mlp|switch_glu|experts)\.up_proj\.scales$")
# Quantized by mlx itself as well.
REFERENCE = {
    "--format mlx --group-size 32 --quality reference": dict(group_size=32, bits=4),
    "--format mlx-mxfp4 --quality reference": dict(group_size=32, bits=4, mode="mxfp4"),
}
TOKENS = [[5, 9, 20, 33, 77, 101, 3, 44]]


def logits(directory):
    model, _ = load_model(Path(directory))
    # The CPU multiplies experts in single precision alone.
    model.set_dtype(mx.float32)
    names = {name for name, _ in tree_flatten(model.parameters())}
    return model(mx.array(TOKENS)), any(JOINED.search(name) for name in names)


def differences(original, mounted, how):
    """Names of the parameters of a mount that are not what mlx quantizes the original to."""
    theirs, _ = load_model(Path(original))
    ours, _ = load_model(Path(mounted))
    ours = dict(tree_flatten(ours.parameters()))
    nn.quantize(theirs, **how, class_predicate=lambda path, module: f"{path}.scales" in ours)
    theirs = dict(tree_flatten(theirs.parameters()))
    same = [name for name in theirs if name in ours and mx.array_equal(theirs[name], ours[name], equal_nan=True)]
    return sorted((theirs.keys() | ours.keys()) - set(same))


def older_words(directory):
    """The config with what mlx-lm knows by older names."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    text.setdefault("num_experts", text.get("num_local_experts"))
    text.setdefault("rope_theta", text.get("rope_parameters", {}).get("rope_theta", 10000.0))
    if text is not config:
        config["vocab_size"] = text["vocab_size"]
        defaults = dict(rope_scaling=None, norm_topk_prob=True, full_attention_interval=2)
        defaults |= dict(global_head_dim=text["head_dim"]) if "head_dim" in text else {}
        config["text_config"] = defaults | {key: value for key, value in text.items() if value is not None}
    path.write_text(json.dumps(config, indent=2))


def main():
    binary, models, *names = sys.argv[1:]
    names = names or MIXTURES + FUSED
    failed = 0
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            shutil.copytree(Path(models) / name, model)
            older_words(model)
            if name in FUSED:
                as_published(model)
            original, _ = logits(model)
            for flags, least in FLAGS.items():
                with mounted(binary, model, *flags.split()) as mount:
                    found, is_stacked = logits(mount)
                    errors = mx.sum((found - original) ** 2, axis=-1) / mx.sum(original**2, axis=-1)
                    # Of half of the tokens: one that is sent to other experts is far off.
                    distance = -10 * mx.log10(mx.median(errors)).item()
                good = distance >= least and is_stacked != ("--skip" in flags)
                failed += not good
                print(f"{'ok' if good else 'FAIL'} {name} {flags}: logits at {distance:.2f} dB", flush=True)
            for flags, how in REFERENCE.items():
                with mounted(binary, model, *flags.split()) as mount:
                    differing = differences(model, mount, how)
                failed += bool(differing)
                said = f"differ: {differing}" if differing else "as mlx quantizes it"
                print(f"{'FAIL' if differing else 'ok'} {name} {flags}: {said}", flush=True)
    print(f"{len(names) * len(FLAGS | REFERENCE)} mounts, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
