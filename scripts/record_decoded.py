#!/usr/bin/env python3
"""Records what loaders make of quantized checkpoints, as one line of digest per weight.

    record_decoded.py CHECKPOINT... > tests/fixtures/decoded.json

Each CHECKPOINT is a directory that a format's own tool wrote. Every weight that it holds quantized
is decoded by the code of the loader that reads it, to the model's element type, and recorded under
the name that it has in the unquantized model: [element type, shape, SHA-256 of the bytes]. What is
kept has no row. Needs what tests/consumers/requirements.txt lists.

Which code decodes what, and what it rounds, all on the CPU. T is the model's element type:

- compressed-tensors: transformers with `CompressedTensorsConfig(dequantize=True)`. Code minus zero
  point is exact, and its product with the scale is rounded to T once. NVFP4's scale is first divided
  by the global one in float32.
- fp8: transformers with `FineGrainedFP8Config(dequantize=True)`: one product in float32, rounded to T.
  DeepSeek's own script for its checkpoints, which needs a GPU, does the same to bfloat16.
- bitsandbytes: `functional.dequantize_4bit` with the stored state: one product in float32, rounded to
  T. A nested absmax is a product and a sum, each rounded to float32 (not fused). LLM.int8 by
  `functional.int8_vectorwise_dequant`: in float32, times a constant near 1/127, rounded to T.
- mlx: `mlx.core.dequantize`. Affine is a product and a sum, each rounded to T (neither in float32 nor
  fused, as its kernels for GPUs may do); the other modes are one product, rounded to T.
- mxfp4: transformers with `Mxfp4Config(dequantize=True)`, exact; `[expert, in, out]`, as the
  unquantized gpt-oss has its experts.
"""

import hashlib
import json
import logging
import os
import pathlib
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import bitsandbytes.functional
import mlx.core as mx
import numpy
import safetensors.torch
import torch
import transformers
from loguru import logger

logger.disable("compressed_tensors")
logging.disable(logging.WARNING)
transformers.logging.disable_progress_bar()

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def by_transformers(directory, config):
    """The weights of the model that transformers dequantizes while it loads."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", quantization_config=config(dequantize=True)
    )
    return model.state_dict()


def by_bitsandbytes(directory):
    stored = stored_tensors(directory)
    found = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part == "SCB":
            weight = bitsandbytes.functional.int8_vectorwise_dequant(stored[f"{module}.weight"], tensor)
            found[f"{module}.weight"] = weight.to(torch.bfloat16)
        elif part == "absmax":
            parts = {key: value for key, value in stored.items() if key.startswith(f"{module}.")}
            state = bitsandbytes.functional.QuantState.from_dict(parts, device="cpu")
            # Other storage types hold the same bytes.
            codes = stored[module].view(torch.uint8).reshape(-1, 1)
            found[module] = bitsandbytes.functional.dequantize_4bit(codes, state)
    return found


def by_mlx(directory, config):
    mx.set_default_device(mx.cpu)
    stored = {}
    for path in sorted(directory.glob("*.safetensors")):
        stored |= mx.load(str(path))
    found = {}
    for name, scales in stored.items():
        module, _, part = name.rpartition(".")
        if part != "scales":
            continue
        weight, biases = stored[f"{module}.weight"], stored.get(f"{module}.biases")
        # Modes without biases have scales of eight bits, which don't say what to decode to.
        weight = mx.dequantize(
            weight, scales, biases, config["group_size"], config["bits"], config["mode"], dtype=mx.bfloat16
        )
        bits = numpy.array(weight.view(mx.uint16))
        found[f"{module}.weight"] = torch.from_numpy(bits.view(numpy.int16)).view(torch.bfloat16)
    return found


def stored_tensors(directory):
    stored = {}
    for path in sorted(directory.glob("*.safetensors")):
        stored |= safetensors.torch.load_file(path)
    return stored


def decoded(directory):
    """Every weight that a checkpoint holds quantized, decoded by its loader."""
    config = json.loads((directory / "config.json").read_text())
    if "quantization" in config:
        return by_mlx(directory, config["quantization"])
    method = config["quantization_config"]["quant_method"]
    if method == "bitsandbytes":
        return by_bitsandbytes(directory)
    configs = {
        "compressed-tensors": transformers.CompressedTensorsConfig,
        "fp8": transformers.FineGrainedFP8Config,
        "mxfp4": transformers.Mxfp4Config,
    }
    stored = stored_tensors(directory)
    found = by_transformers(directory, configs[method])
    kept = [name for name in found if name in stored and stored[name].dtype in NAMES]
    for name in kept:
        if not torch.equal(found[name], stored[name]):
            raise ValueError(f"{directory.name}: {name} is kept, but the loader changes it")
    return {name: tensor for name, tensor in found.items() if name not in kept}


recorded = {}
for argument in sys.argv[1:]:
    directory = pathlib.Path(argument)
    rows = {}
    for name, tensor in sorted(decoded(directory).items()):
        raw = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        rows[name] = [NAMES[tensor.dtype], list(tensor.shape), hashlib.sha256(raw).hexdigest()]
    if not rows:
        raise ValueError(f"{directory.name}: no quantized weight")
    recorded[directory.name] = rows
lines = []
for name, rows in sorted(recorded.items()):
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    lines.append(f"  {json.dumps(name)}: {{\n{rows}\n  }}")
print("{\n" + ",\n".join(lines) + "\n}")
