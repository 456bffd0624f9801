"""Mounts a model with aq-fs, loads the mount with vLLM on the CPU, and generates.

    python generate_vllm.py AQ_FS MODEL [flags of aq-fs ...]

Fails unless vLLM gives as many tokens as it is asked for.
"""

import os
import subprocess
import sys
import tempfile

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

TOKENS = 8


def main():
    binary, model, flags = sys.argv[1], sys.argv[2], sys.argv[3:] or ["--bits", "4"]
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as mountpoint:
        subprocess.run([binary, "mount", model, mountpoint, *flags], check=True)
        try:
            llm = LLM(mountpoint, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, dtype="bfloat16")
            sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
            output = llm.generate({"prompt_token_ids": [1, 5, 9, 20]}, sampling)[0].outputs[0]
            del llm
        finally:
            subprocess.run([binary, "unmount", mountpoint], check=True)
    print(f"generated {list(output.token_ids)}")
    sys.exit(len(output.token_ids) != TOKENS)


if __name__ == "__main__":
    main()
