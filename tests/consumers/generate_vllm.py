"""Mounts a model with aq-fs, loads the mounts with vLLM on the CPU, generates, and compares.

    python generate_vllm.py AQ_FS MODEL

What vLLM makes of the odds of every token must be what it makes of them with the dequantized weights,
which `--format dense --simulate` shows, and at `search` no farther from the original's than at
`reference`, whose bytes are the format's own tool's (tests/golden.rs).
"""

import math
import os
import random
import sys

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# A process for each model would spend its time with imports.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy
from vllm import LLM, SamplingParams

from mounted import decibels, mounted

TOKENS = 8
WORDS = 256  # Of the fixture's vocabulary.

# The least distance in dB from the dequantized weights' odds, by flags. Where activations are rounded
# as well, it is their error.
FLOOR, ROUNDED = 50, 40
ROWS = {
    "compressed-tensors": FLOOR,
    "compressed-tensors --asymmetric": FLOOR,
    "compressed-tensors --group-size channel": FLOOR,
    "ct-int8": ROUNDED,
    "ct-fp8": ROUNDED,
    # What is asymmetric, this vLLM refuses in GPTQ.
    "gptq": FLOOR,
    "gptq --group-size channel": FLOOR,
    "gptq-v2": FLOOR,
    "awq": FLOOR,
    "awq --group-size channel": FLOOR,
}


def odds(directory):
    """The logarithm of every word's probability after every token of some prompts."""
    llm = LLM(
        directory,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_logprobs=-1,
        dtype="bfloat16",
        distributed_executor_backend="uni",
    )
    words = random.Random(0)
    prompts = [{"prompt_token_ids": words.choices(range(3, 250), k=40)} for _ in range(4)]
    sampling = SamplingParams(
        max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False, prompt_logprobs=-1
    )
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == TOKENS for output in outputs), "it does not generate"
    positions = [place for output in outputs for place in output.prompt_logprobs if place]
    return numpy.array([[place[word].logprob for word in range(WORDS)] for place in positions])


def main():
    binary, model = sys.argv[1:]
    original = odds(model)
    failed = 0
    for row, floor in ROWS.items():
        flags, same, found = row.split(), math.inf, {}
        try:
            for quality in ("reference", "search"):
                asked = (*flags, "--quality", quality)
                with mounted(binary, model, "--format", "dense", "--simulate", *asked) as view:
                    expected = odds(view)
                with mounted(binary, model, "--format", *asked) as view:
                    got = odds(view)
                same = min(same, decibels(expected, got))
                found[quality] = decibels(original, got)
        except Exception as error:  # Whatever vLLM says, the other rows are run.
            failed += 1
            print(f"FAIL {row}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        good = same >= floor and found["search"] >= found["reference"]
        failed += not good
        print(
            f"{'ok' if good else 'FAIL'} {row}: odds at {found['search']:.2f} dB, its own tool's at "
            f"{found['reference']:.2f} dB; at {same:.1f} dB from those of the dequantized weights",
            flush=True,
        )
    print(f"{failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
