#!/usr/bin/env python3
"""Quantizes tests/fixtures/llama-bf16 with each format's own tool.

    make_golden.py OUT NAME...

Each NAME (`ct-w4a16-g128`, `bnb-nf4`, `mlx-affine-4b-g64`, `hf-fp8-block`) becomes the directory
OUT/NAME, for record_golden.py. With `@f16` or `@f32` at its end the source is of that element type:
every value times 1.1 in float32, so that no bits are left zero, then rounded.

The `ct-` ones need llmcompressor 0.14.0.1, compressed-tensors 0.19.0 and transformers 5.17.0 (the
newest that llmcompressor takes), the `gptq-` and `awq-` ones what tests/consumers/requirements-gptqmodel.txt
lists, the others what requirements.txt there lists. All of it runs on the CPU.
"""

import json
import logging
import os
import pathlib
import re
import shutil
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import safetensors.torch
import torch
import transformers

SOURCE = pathlib.Path(__file__).resolve().parent.parent / "tests/fixtures/llama-bf16"
DTYPES = {"f16": torch.float16, "f32": torch.float32}


def cast(out, dtype):
    """The fixture in another element type."""
    if out.exists():
        return out
    shutil.copytree(SOURCE, out)
    for path in sorted(out.glob("*.safetensors")):
        tensors = safetensors.torch.load_file(path)
        tensors = {name: (tensor.float() * 1.1).to(dtype) for name, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def by_llmcompressor(source, out, name):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    presets = {
        "ct-int8-w8a8": "W8A8",
        "ct-fp8-dynamic": "FP8_DYNAMIC",
        "ct-fp8-block": "FP8_BLOCK",
        "ct-nvfp4a16": "NVFP4A16",
        "ct-mxfp4a16": "MXFP4A16",
        "ct-mxfp8a16": "MXFP8A16",
    }
    if name in presets:
        how = {"scheme": presets[name]}
    elif name == "ct-fp8-tensor":
        args = {"num_bits": 8, "type": "float", "strategy": "tensor"}
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**args),
            input_activations=QuantizationArgs(**args, dynamic=True),
        )
        how = {"config_groups": {"group_0": scheme}}
    else:
        bits, asym, group = re.fullmatch(r"ct-w(\d)a16(-asym)?-(channel|g\d+)", name).groups()
        args = {"num_bits": int(bits), "type": "int", "symmetric": not asym}
        if group == "channel":
            args |= {"strategy": "channel"}
        else:
            args |= {"strategy": "group", "group_size": int(group[1:])}
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        how = {"config_groups": {"group_0": scheme}}
    ignore = ["lm_head", "re:.*mlp.gate$"]
    recipe = QuantizationModifier(targets=["Linear"], ignore=ignore, **how)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    oneshot(model=model, recipe=recipe)
    model.save_pretrained(out, save_compressed=True)


def by_bitsandbytes(source, out, name):
    kind, *rest = name.removeprefix("bnb-").split("-")
    if kind == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant="dq" in rest,
            bnb_4bit_quant_storage=torch.bfloat16 if "bf16storage" in rest else torch.uint8,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", quantization_config=config
    )
    model.save_pretrained(out)


def by_mlx(source, out, name):
    import mlx.core as mx
    from mlx_lm import convert

    mx.set_default_device(mx.cpu)
    affine = re.fullmatch(r"mlx-affine-(\d)b-g(\d+)", name)
    if affine:
        bits, group = map(int, affine.groups())
        how = {"q_bits": bits, "q_group_size": group}
    else:
        how = {"q_mode": name.removeprefix("mlx-")}
    dtype = json.loads((source / "config.json").read_text())["dtype"]
    convert(str(source), str(out), quantize=True, dtype=dtype, **how)


def by_gptqmodel(source, out, name):
    """Rounding to nearest, with neither calibration nor smoothing."""
    # With two cores its pools of threads contradict each other.
    os.cpu_count = lambda: 8
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import FORMAT, RTNConfig

    if name == "awq-gemm-4b-g128":
        how = {"bits": 4, "group_size": 128, "sym": False, "format": FORMAT.GEMM}
    else:
        second, bits, symmetry = re.fullmatch(r"gptq-(v2-)?(\d)b-g128-(a?sym)", name).groups()
        # What is asymmetric is written in the second version alone.
        version = FORMAT.GPTQ_V2 if second or symmetry == "asym" else FORMAT.GPTQ
        how = {"bits": int(bits), "group_size": 128, "sym": symmetry == "sym", "format": version}
    dtype = json.loads((source / "config.json").read_text())["dtype"]
    config = RTNConfig(offload_to_disk=False, **how)
    model = GPTQModel.load(str(source), config, device="cpu", dtype=getattr(torch, dtype))
    model.quantize(calibration=None, backend=BACKEND.AUTO)
    model.save(str(out))


def by_finegrained_fp8(source, out, name):
    """Transformers' own operation; quantizing while loading would want a GPU."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    class Quantizer:
        quantization_config = FineGrainedFP8Config(
            scale_fmt="ue8m0" if name == "hf-fp8-ue8m0" else "float"
        )

    operation = Fp8Quantize(Quantizer)
    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        for key, tensor in safetensors.torch.load_file(path).items():
            is_linear = key.endswith("_proj.weight")
            tensors |= operation.convert({key: tensor}) if is_linear else {key: tensor}
    out.mkdir()
    safetensors.torch.save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = Quantizer.quantization_config.to_dict()
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str))


TOOLS = {
    "ct": by_llmcompressor,
    "bnb": by_bitsandbytes,
    "mlx": by_mlx,
    "hf": by_finegrained_fp8,
    "gptq": by_gptqmodel,
    "awq": by_gptqmodel,
}

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    into = pathlib.Path(sys.argv[1])
    for argument in sys.argv[2:]:
        name, _, dtype = argument.partition("@")
        source = cast(into / f"source-{dtype}", DTYPES[dtype]) if dtype else SOURCE
        TOOLS[name.split("-")[0]](source, into / argument, name)
