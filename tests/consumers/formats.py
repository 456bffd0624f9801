"""Loads a mount in every format that transformers reads on the CPU, and generates.

    python formats.py AQ_FS MODEL [NAME...]

Names pick some of the rows below.
The logits' distance from the original's must be at least what the number of bits promises on such a
small model, at both qualities. At `reference` the bytes are those of the format's own tool
(tests/golden.rs), and at `search` the logits are as close, but for what chance does to so small a model.
"""

import sys

import torch
import transformers
from transformers import AutoModelForCausalLM

from mounted import decibels, mounted

transformers.logging.disable_progress_bar()

# The least distance in dB, by format and what else is asked of it.
FORMATS = {
    "ct-fp8": 19,
    "ct-fp8-tensor": 19,
    "ct-fp8-block": 19,
    "fp8-block": 20,
    "ct-mxfp4": 7,
    "ct-mxfp8": 20,
    "bnb-nf4": 9,
    "bnb-fp4": 6,
    "bnb-int8": 25,
}
# Of models that store their experts as one tensor.
FUSED = {"mxfp4": 9}

# In dB.
CHANCE = 0.5


def logits(directory, tokens):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        out = model(tokens).logits.double()
        length = tokens.shape[1] + 4
        made = model.generate(tokens[:1], max_length=length, min_length=length, do_sample=False)
    assert made.shape[1] == length, "it does not generate"
    return out


def main():
    binary, model, *names = sys.argv[1:]
    rows = {name: (FORMATS | FUSED)[name] for name in names} or FORMATS
    tokens = torch.randint(3, 250, (4, 64), generator=torch.Generator().manual_seed(0))
    original = logits(model, tokens)
    failed = 0
    for name, least in rows.items():
        found = {}
        for quality in ("reference", "search"):
            with mounted(binary, model, "--quality", quality, "--format", *name.split()) as view:
                found[quality] = decibels(original, logits(view, tokens))
        good = found["reference"] >= least and found["search"] >= max(least, found["reference"] - CHANCE)
        failed += not good
        print(
            f"{'ok' if good else 'FAIL'} {name}: logits at {found['search']:.2f} dB, "
            f"its own tool's at {found['reference']:.2f} dB",
            flush=True,
        )
    print(f"{len(rows)} formats, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
