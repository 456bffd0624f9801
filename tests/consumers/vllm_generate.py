"""Generates with vLLM from the checkpoint given; called by scripts/vllm.sh."""

import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, flags = sys.argv[1:]
    llm = LLM(model, dtype="bfloat16", max_model_len=128, enforce_eager=True)
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    tokens = llm.generate(["Hello there"], sampling)[0].outputs[0].token_ids
    assert len(tokens) == 8, tokens
    print(f"ok vLLM, {flags}: generated {list(tokens)}")
