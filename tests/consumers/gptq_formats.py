"""Loads mounts in GPTQ and AWQ with gptqmodel, through transformers and by itself, and generates.

    python gptq_formats.py AQ_FS MODEL

The logits must be those of the dequantized weights, which `--format dense --simulate` shows, and at
`search` no farther from the original's than at `reference`, whose bytes are gptqmodel's own
(tests/golden.rs).
"""

import contextlib
import io
import logging
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

from mounted import decibels, mounted

transformers.logging.disable_progress_bar()

# How it is read: by transformers, with the kernel that it picks or with the plainest, which alone
# takes groups beyond 256; and by gptqmodel itself, whose loader refuses what is asymmetric in version 1.
HF, HF_TORCH, OWN = "transformers", "transformers with backend=torch", "gptqmodel"
ROWS = {
    f"{version} --bits {bits} {symmetry}": [HF] if (version, symmetry) == ("gptq", "--asymmetric") else [HF, OWN]
    for version in ("gptq", "gptq-v2")
    for bits in (2, 3, 4, 8)
    for symmetry in ("--symmetric", "--asymmetric")
} | {
    "awq": [HF, OWN],
    "awq --group-size 32": [HF],
    "gptq --group-size channel": [HF_TORCH, OWN],
    "gptq-v2 --group-size channel --asymmetric": [HF_TORCH],
    "awq --group-size channel": [HF_TORCH],
}

# In dB. The dequantized weights are rounded to BF16, the loader's are not.
SAME = 42


def logits(model, tokens):
    with torch.no_grad():
        out = model(tokens).logits.double()
        length = tokens.shape[1] + 4
        made = model.generate(tokens[:1], max_length=length, min_length=length, do_sample=False)
    assert made.shape[1] == length, "it does not generate"
    return out


def by_transformers(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def loaded(way, directory, flags):
    if way == HF:
        return by_transformers(directory)
    is_awq = flags[0] == "awq"
    if way == HF_TORCH:
        config = AwqConfig(backend="torch_awq") if is_awq else GPTQConfig(bits=4, backend="gptq_torch")
        return by_transformers(directory, quantization_config=config)
    from gptqmodel import BACKEND, GPTQModel

    backend = BACKEND.AWQ_TORCH if is_awq else BACKEND.GPTQ_TORCH
    # It takes no F32.
    return GPTQModel.load(directory, backend=backend, device="cpu", dtype=torch.float16).model


def main():
    binary, model = sys.argv[1:]
    tokens = torch.randint(3, 250, (4, 64), generator=torch.Generator().manual_seed(0))
    original = logits(by_transformers(model), tokens)
    failed, loads = 0, 0
    for row, ways in ROWS.items():
        flags, found = row.split(), {}
        for quality in ("reference", "search"):
            asked = (*flags, "--quality", quality)
            with mounted(binary, model, "--format", "dense", "--simulate", *asked) as view:
                expected = logits(by_transformers(view), tokens)
            with mounted(binary, model, "--format", *asked) as view:
                for way in ways:
                    # gptqmodel says much.
                    with contextlib.redirect_stdout(io.StringIO()):
                        got = logits(loaded(way, view, flags), tokens)
                    found[way, quality] = (decibels(expected, got), decibels(original, got))
                    loads += 1
        for way in ways:
            (same, search), (also, reference) = found[way, "search"], found[way, "reference"]
            good = min(same, also) >= SAME and search >= reference
            failed += not good
            print(
                f"{'ok' if good else 'FAIL'} {row}, {way}: logits at {search:.2f} dB, gptqmodel's own at "
                f"{reference:.2f} dB; at {min(same, also):.1f} dB from those of the dequantized weights",
                flush=True,
            )
    print(f"{loads} loads, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main()
