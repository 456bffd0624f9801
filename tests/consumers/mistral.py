"""Generates with mistral.rs on the CPU from mounts in the formats that it reads.

    python mistral.py AQ_FS MODEL

Every mount must give as many tokens as it is asked for; those of eight bits must give the original's.
"""

import json
import os
import shutil
import sys
import tempfile

from mistralrs import Architecture, CompletionRequest, Runner, Which

from mounted import mounted

TOKENS = 4
# Flags, and whether the tokens must be the original's.
FORMATS = {
    "ct-fp8": True,
    "ct-fp8-block": True,
    "fp8-block": True,
    "ct-nvfp4": False,
    "mlx --bits 8": True,
    "mlx --bits 6": False,
    "mlx": False,
    "mlx --bits 3": False,
    "mlx --bits 2": False,
}


def generated(directory):
    runner = Runner(which=Which.Plain(model_id=directory, arch=Architecture.Llama))
    request = CompletionRequest(model="default", prompt="a b", max_tokens=TOKENS, temperature=0.0)
    answer = runner.send_completion_request(request)
    return answer.choices[0].text, answer.usage.completion_tokens


def main():
    binary, fixture = sys.argv[1:]
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        model = shutil.copytree(fixture, f"{scratch}/model")
        # It knows the rope's base by the older name alone.
        with open(f"{model}/config.json") as file:
            config = json.load(file)
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        with open(f"{model}/config.json", "w") as file:
            json.dump(config, file)
        original, _ = generated(model)
        for flags, same in FORMATS.items():
            with mounted(binary, model, "--format", *flags.split()) as view:
                text, count = generated(view)
            good = count == TOKENS and (text == original or not same)
            failed += not good
            print(f"{'ok' if good else 'FAIL'} {flags}: {count} tokens, {text!r}, originally {original!r}", flush=True)
    print(f"{len(FORMATS)} formats, {failed} failures")
    sys.stdout.flush()
    # Its threads outlive the runners.
    os._exit(bool(failed))


if __name__ == "__main__":
    main()
