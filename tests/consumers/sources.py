"""Loads mounts of checkpoints that arrive quantized, and compares them with those checkpoints themselves.

    python sources.py AQ_FS MODEL

Each source is an export of MODEL, which at `reference` is what the format's own tool writes
(tests/golden.rs). Mounted as `dense`, its weights must be, bit for bit, those that transformers makes of
the source when it dequantizes it, and so the logits; mounted in other formats, its logits must be as near
as their bits promise to what the source's loader makes of the source. All of them must generate.
"""

import subprocess
import sys
import tempfile

import mlx.core as mx
import mlx_lm
import torch
import transformers
from loguru import logger
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

from mounted import decibels, mounted

transformers.logging.disable_progress_bar()
logger.disable("compressed_tensors")

# How transformers is told to dequantize what it loads; bitsandbytes does it afterwards.
CONFIGS = {"ct": CompressedTensorsConfig, "compressed": CompressedTensorsConfig, "fp8": FineGrainedFP8Config}
SOURCES = [
    "fp8-block",
    "fp8-block --scale-format ue8m0",
    "compressed-tensors",
    "compressed-tensors --bits 3 --asymmetric",
    "ct-int8",
    "ct-fp8",
    "ct-fp8-block",
    "ct-nvfp4",
    "ct-mxfp4",
    "ct-mxfp8",
    "bnb-nf4",
    "bnb-fp4 --double-quant",
    "bnb-int8",
]
# In dB, of 8 bits.
LEAST = 20


def run(model, tokens):
    with torch.no_grad():
        out = model(tokens).logits.double()
        length = tokens.shape[1] + 4
        made = model.generate(tokens[:1], max_length=length, min_length=length, do_sample=False)
    assert made.shape[1] == length, "it does not generate"
    return out


def loaded(directory, dequantize=None):
    """A model in plain numbers."""
    family = (dequantize or "").split("-")[0]
    options = {"quantization_config": CONFIGS[family](dequantize=True)} if family in CONFIGS else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options).eval()
    return model.dequantize() if family == "bnb" else model


def logits_by_mlx(directory, tokens):
    model, tokenizer = mlx_lm.load(directory)
    out = model(mx.array(tokens.tolist())).astype(mx.float32)
    text = mlx_lm.generate(model, tokenizer, prompt=tokens[0].tolist(), max_tokens=4)
    assert isinstance(text, str), "it does not generate"
    return torch.tensor(out.tolist(), dtype=torch.float64)


def check(binary, source, name, tokens):
    """The complaints about the mounts of one source, and a line about them."""
    theirs = loaded(source, name)
    expected, complaints = run(theirs, tokens), []
    with mounted(binary, source, "--format", "dense") as view:
        ours = loaded(view)
        weights = [model.state_dict() for model in (theirs, ours)]
        if weights[0].keys() != weights[1].keys():
            complaints.append(f"names differ: {sorted(weights[0].keys() ^ weights[1].keys())[:4]}")
        differ = [key for key in weights[0] if key in weights[1] and not torch.equal(*(w[key] for w in weights))]
        if differ:
            complaints.append(f"{len(differ)} of {len(weights[0])} tensors differ: {differ[:4]}")
        if not torch.equal(expected, run(ours, tokens)):
            complaints.append("logits differ")
    with mounted(binary, source, "--bits", "8") as view:
        ct = decibels(expected, run(loaded(view, "compressed-tensors"), tokens))
    with mounted(binary, source, "--format", "mlx", "--bits", "8") as view:
        mlx = decibels(expected, logits_by_mlx(view, tokens))
    complaints += [f"as {what} at {found:.1f} dB" for what, found in (("int8", ct), ("mlx", mlx)) if found < LEAST]
    return complaints, f"dense as transformers reads it; int8 at {ct:.1f} dB, mlx at {mlx:.1f} dB"


def main():
    binary, model = sys.argv[1:]
    mx.set_default_device(mx.cpu)
    tokens = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    failed = 0
    for name in SOURCES:
        with tempfile.TemporaryDirectory() as source:
            command = [binary, "export", model, source, "--quality", "reference", "--format", *name.split()]
            subprocess.run(command, check=True, capture_output=True)
            complaints, line = check(binary, source, name, tokens)
        failed += bool(complaints)
        print(f"{'FAIL' if complaints else 'ok'} {name}: {'; '.join(complaints) or line}", flush=True)
    print(f"{len(SOURCES)} sources, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
