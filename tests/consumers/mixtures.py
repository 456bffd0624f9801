"""Loads mounts of mixtures of experts in every format that transformers reads on the CPU.

    python mixtures.py AQ_FS MODELS

MODELS is what build_models.py wrote, some made as the published ones are. The logits' distance from the original's must be at least what
the number of bits promises on such small models, with the experts quantized as the format has them
and with the experts kept.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from loguru import logger
from transformers import CompressedTensorsConfig

from published import as_published

transformers.logging.disable_progress_bar()
logger.disable("compressed_tensors")

MIXTURES = ["qwen3-moe", "mixtral", "deepseek-v3"]
# Published with fused experts, which are shown one by one.
FUSED = ["qwen3-5-moe", "llama4"]
# The linear attention of one carries errors from token to token.
LESS = {"qwen3-5-moe": 3}
# The least distance in dB, by format.
FORMATS = {
    "compressed-tensors": 4,
    "ct-int8": 17,
    "ct-fp8": 10,
    "ct-fp8-tensor": 10,
    "ct-fp8-block": 10,
    "ct-nvfp4": 4,
    "ct-mxfp4": 3.5,
    "ct-mxfp8": 13,
    "bnb-nf4": 5,
    "bnb-int8": 18,
    "fp8-block": 14,
}
# transformers' own: it reads the weight of a module that it has replaced. And bitsandbytes': its
# kernel for the CPU takes no four outputs.
FAILS = {("deepseek-v3", "bnb-int8"), ("qwen3-5-moe", "bnb-nf4")}


def logits(directory, **options):
    kind = getattr(transformers, json.loads((Path(directory) / "consumer.json").read_text())["class"])
    model, info = kind.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True, **options
    )
    wrong = {key: sorted(map(str, found))[:3] for key, found in info.items() if found}
    assert not wrong, wrong
    tokens = torch.randint(5, 400, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model.eval()(tokens).logits.double()


def main():
    binary, models = sys.argv[1:]
    count = failed = 0
    scratch = tempfile.TemporaryDirectory()
    for name in MIXTURES + FUSED:
        model = Path(scratch.name) / name
        shutil.copytree(Path(models) / name, model)
        if name in FUSED:
            as_published(model)
        original = logits(model)
        for format, least in FORMATS.items():
            if (name, format) in FAILS:
                continue
            ways = [{}]
            if format.startswith("c"):
                ways = [dict(quantization_config=CompressedTensorsConfig(dequantize=d)) for d in (True, False)]
            for flags in [], ["--skip", "*.experts.*"]:
                with tempfile.TemporaryDirectory() as mount:
                    command = [binary, "mount", str(model), mount, "--format", format, *flags]
                    subprocess.run(command, check=True, capture_output=True)
                    try:
                        found = [logits(mount, **way) for way in ways]
                    finally:
                        subprocess.run([binary, "unmount", mount], check=True, capture_output=True)
                errors = [(out - original).pow(2).sum() / original.pow(2).sum() for out in found]
                distances = [-10 * error.log10().item() for error in errors]
                good = min(distances) >= least - LESS.get(name, 0)
                count, failed = count + 1, failed + (not good)
                said = ", ".join(f"{distance:.1f}" for distance in distances)
                print(f"{'ok' if good else 'FAIL'} {name} {format} {' '.join(flags)}: {said} dB", flush=True)
    print(f"{count} mounts, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
