"""Compares a model's logits with those of its quantized mounts, at both qualities.

    python closeness.py AQ_FS MODEL

At `--quality reference` a mount holds the bytes that llm-compressor writes (tests/golden.rs), so its
distance from the original is llm-compressor's. At `search` the logits must be as close, or closer.
Every mount must also generate.
"""

import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from mounted import decibels, mounted

transformers.logging.disable_progress_bar()

# What asymmetric checkpoints need with these versions, and what the others also take.
SCHEMES = {
    "int4": (["--bits", "4"], [True, False]),
    "int4 per channel": (["--bits", "4", "--group-size", "channel"], [True, False]),
    "int4 asymmetric": (["--bits", "4", "--asymmetric"], [True]),
    "int8": (["--bits", "8"], [True, False]),
    "int8 per channel": (["--bits", "8", "--group-size", "channel"], [True, False]),
    "int3": (["--bits", "3"], [True]),
    "int2": (["--bits", "2"], [True]),
    "W8A8": (["--format", "ct-int8"], [True]),
}


def logits(directory, tokens, **options):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options).eval()
    with torch.no_grad():
        out = model(tokens).logits.double()
        length = tokens.shape[1] + 4
        made = model.generate(tokens[:1], max_length=length, min_length=length, do_sample=False)
    assert made.shape[1] == length, "it does not generate"
    return out


def main():
    binary, model = sys.argv[1:]
    torch.manual_seed(0)
    tokens = torch.randint(3, 250, (8, 64))
    original = logits(model, tokens)
    failed = 0
    for name, (flags, ways) in SCHEMES.items():
        for dequantize in ways:
            distance = {}
            for quality in ("reference", "search"):
                with mounted(binary, model, *flags, "--quality", quality) as view:
                    config = CompressedTensorsConfig(dequantize=dequantize)
                    distance[quality] = decibels(original, logits(view, tokens, quantization_config=config))
            better = distance["search"] >= distance["reference"]
            failed += not better
            print(
                f"{'ok' if better else 'FAIL'} {name}, dequantize={dequantize}: logits at "
                f"{distance['search']:.2f} dB, llm-compressor's at {distance['reference']:.2f} dB",
                flush=True,
            )
    print(f"{failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
