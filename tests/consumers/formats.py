"""Loads a mount in every format that transformers reads on the CPU, and generates.

    python formats.py AQ_FS MODEL [NAME...]

Names pick some of the rows below.
The logits' distance from the original's must be at least what the number of bits promises on such a
small model, at both qualities.
"""

import subprocess
import sys
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM

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
        for quality in ("reference", "search"):
            with tempfile.TemporaryDirectory() as mount:
                command = [binary, "mount", model, mount, "--quality", quality, "--format"]
                subprocess.run(command + name.split(), check=True, capture_output=True)
                try:
                    found = logits(mount, tokens)
                finally:
                    subprocess.run([binary, "unmount", mount], check=True, capture_output=True)
            error = (found - original).pow(2).sum() / original.pow(2).sum()
            distance = -10 * torch.log10(error).item()
            good = distance >= least
            failed += not good
            print(f"{'ok' if good else 'FAIL'} {name}, {quality}: logits at {distance:.2f} dB", flush=True)
    print(f"{len(rows)} formats, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
