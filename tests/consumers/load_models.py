"""Mounts models with aq-fs, loads them with transformers, and compares them with the originals.

    python load_models.py AQ_FS MODELS [--bits 4 --bits 8] [--export] [flags of aq-fs ...]

Every directory of MODELS that build_models.py wrote is mounted (or, with --export, written) as a
quantized checkpoint and loaded. What must hold:

- no missing, unexpected or mismatched key;
- at least 90% of the weights of eligible Linears are quantized. Eligible is every Linear, and every
  expert, but output heads, routers, the towers and projectors of a multimodal language model, and
  what the group size does not divide;
- everything else is the original's, bit by bit;
- the output is within 35 dB of the original model carrying the same dequantized weights, which are
  decoded here and not by the loader's library.

It is loaded with `dequantize=True`, but for several schemes, and without where the loader can (see
COMPRESSED).
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from loguru import logger
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, CompressedTensorsConfig

from build_models import inputs
from mounted import decibels, mounted

transformers.logging.disable_progress_bar()
logger.disable("compressed_tensors")

FLOOR = 35.0
# Where the loader quantizes activations too, the output is not the reference's.
FLOOR_W8A8 = 25.0
COVERAGE = 0.9

# The loader builds these without `weight` and then initializes `weight`: it needs `dequantize=True`.
COMPRESSED = re.compile(r"^(?!.*(t5|clip|siglip|mamba|falcon|gpt-bigcode|modernbert|wav2vec2|paligemma))")

# To the loader its experts are Linears where the checkpoint is quantized, and fused where it is not: the
# reference, which is not, can't be loaded (see mixtures.py).
UNREAD = {"llama4"}

# Linears that stay as they are: output heads, routers, and beside a language model its encoders.
HEADS = re.compile(
    r"(^|\.)(lm_head|generator_lm_head|score|classifier|proj_out|embed_out|vocab_projector)(\.out_proj)?$"
    r"|(^|\.)decoder$"
)
ROUTERS = re.compile(r"\.(gate|router|shared_expert_gate)$")
TOWERS = re.compile(r"(^|\.)(vision_tower|visual|multi_modal_projector)\.")


@contextlib.contextmanager
def quantized(binary, model, flags, export):
    """The directory that shows `model` quantized."""
    if not export:
        with mounted(binary, model, *flags) as view:
            yield view
        return
    with tempfile.TemporaryDirectory() as scratch:
        out = os.path.join(scratch, "out")
        subprocess.run([binary, "export", model, out, *flags], check=True, capture_output=True)
        yield out


def tensors(directory):
    """Every tensor of a checkpoint, by name."""
    found = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                found[name] = file.get_tensor(name).clone()
    return found


def unpack(words, count, bits):
    """The first `count` unsigned codes of `bits` bits of each row, lowest bit first."""
    stream = (words.to(torch.int64).unsqueeze(-1) >> torch.arange(32)) & 1
    stream = stream.reshape(words.shape[0], -1)[:, : count * bits].reshape(words.shape[0], count, bits)
    return (stream << torch.arange(bits)).sum(-1)


def dequantized(stored, config):
    """The checkpoint with every quantized weight decoded, and the names of those."""
    groups = config["quantization_config"]["config_groups"].values()
    schemes = [(group["targets"], group["weights"]) for group in groups]
    plain, names = {}, []
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        scale = stored.get(f"{module}.weight_scale")
        if part == "weight" and scale is not None:
            plain[name] = (tensor.float() * scale.float()).to(scale.dtype)
            names.append(name)
        elif part == "weight_packed":
            # A pattern is more specific than a class.
            scheme = next(
                (s for targets, s in schemes if any(re.match(t[3:], module) for t in targets if t[:3] == "re:")),
                next((s for targets, s in schemes if "Linear" in targets), None),
            )
            bits = scheme["num_bits"]
            rows, columns = stored[f"{module}.weight_shape"].tolist()
            codes = unpack(tensor, columns, bits).float().reshape(rows, scale.shape[1], -1)
            zero = stored.get(f"{module}.weight_zero_point")
            if zero is None:
                zero = torch.full(scale.shape, 2 ** (bits - 1))
            else:
                zero = unpack(zero.T.contiguous(), rows, bits).T
            weight = (codes - zero.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)
            plain[f"{module}.weight"] = weight.reshape(rows, columns).to(scale.dtype)
            names.append(f"{module}.weight")
        elif not part.startswith("weight_"):
            plain[name] = tensor
    return plain, names


def load(kind, directory, **options):
    model, info = kind.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True, **options)
    wrong = {key: sorted(map(str, found)) for key, found in info.items() if found}
    return model.eval(), wrong


def outputs(model, fed):
    """Every floating-point output but caches, as one vector."""
    # In full precision, whatever the quantized model says to it.
    torch.nn.Module.float(model)
    with torch.no_grad():
        found = model(**fed, return_dict=True)
    flat = [
        value.float().flatten()
        for key, value in found.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "loss"
    ]
    return torch.cat(flat).double()


def eligible(model, group):
    """Names of the parameters that should be quantized."""
    is_multimodal = hasattr(model.config, "text_config") and not hasattr(model, "logit_scale")
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kept = HEADS.search(path) or ROUTERS.search(path) or is_multimodal and TOWERS.search(path)
            if not kept and module.in_features % group == 0:
                names.add(f"{path}.weight")
    return names


def check(binary, directory, flags, export):
    """The complaints about one model, and a line about it."""
    with open(directory / "consumer.json") as file:
        consumer = json.load(file)
    kind = getattr(transformers, consumer["class"])
    fed = inputs(consumer["inputs"], AutoConfig.from_pretrained(directory))
    original, wrong = load(kind, directory)
    if wrong:
        return [f"the original itself: {wrong}"], ""
    complaints, notes = [], []
    with quantized(binary, str(directory), flags, export) as view:
        with open(os.path.join(view, "config.json")) as file:
            config = json.load(file)
        if "quantization_config" not in config:
            same = tensors(view).keys() == tensors(directory).keys()
            return ([] if same else ["tensors differ, but nothing is quantized"]), "nothing to quantize"
        plain, names = dequantized(tensors(view), config)
        source = tensors(directory)
        if plain.keys() != source.keys():
            complaints.append(f"tensors differ: {sorted(plain.keys() ^ source.keys())[:4]}")
        for name in source.keys() - set(names):
            if name in plain and not torch.equal(source[name], plain[name]):
                complaints.append(f"{name} is kept, but differs")
        with tempfile.TemporaryDirectory() as scratch:
            save_file({n: t.contiguous() for n, t in plain.items()}, f"{scratch}/model.safetensors", {"format": "pt"})
            shutil.copy(directory / "config.json", scratch)
            reference, wrong = load(kind, scratch)
        before, after = original.state_dict(), reference.state_dict()
        wanted = eligible(original, 1 if {"channel", "ct-int8"} & set(flags) else 128)
        total = sum(before[name].numel() for name in wanted)
        taken = sum(before[name].numel() for name in wanted if not torch.equal(before[name], after[name]))
        if taken < COVERAGE * total:
            missed = [name for name in sorted(wanted) if torch.equal(before[name], after[name])]
            complaints.append(f"{taken} of {total} eligible weights are quantized; not {missed[:4]}")
        notes.append(f"{len(names)} quantized, {taken / max(total, 1):.0%}")
        expected = outputs(reference, fed)
        notes.append(f"{decibels(outputs(original, fed), expected):.1f} dB from the original")
        del original, reference
        groups = config["quantization_config"]["config_groups"].values()
        rounds_activations = any(group["input_activations"] for group in groups)
        # Decoding as it loads, the loader knows one scheme beside the experts'.
        dense = [group for group in groups if not any("experts" in target for target in group["targets"])]
        ways = [True] * (len(dense) == 1) + [False] * bool(COMPRESSED.match(directory.name) and "--asymmetric" not in flags)
        for dequantize in ways:
            way = f"dequantize={dequantize}"
            try:
                model, wrong = load(kind, view, quantization_config=CompressedTensorsConfig(dequantize=dequantize))
                if wrong:
                    complaints.append(f"{way}: {wrong}")
                if not dequantize:
                    model.hf_quantizer.compressor.decompress_model(model)
                distance = decibels(expected, outputs(model, fed))
            except Exception as error:  # Whatever the loader says is a complaint.
                complaints.append(f"{way}: {type(error).__name__}: {str(error)[:300]}")
                continue
            if distance < (FLOOR_W8A8 if rounds_activations and not dequantize else FLOOR):
                complaints.append(f"{way}: {distance:.1f} dB")
            notes.append(f"{way} {distance:.0f} dB")
    return complaints, ", ".join(notes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("models", type=Path)
    parser.add_argument("--bits", action="append")
    parser.add_argument("--name", action="append", help="only this model; may be repeated")
    parser.add_argument("--export", action="store_true", help="export instead of mounting")
    options, flags = parser.parse_known_args()
    failed, start = 0, time.monotonic()
    directories = [path.parent for path in sorted(options.models.glob("*/consumer.json"))]
    chosen = options.name or {path.name for path in directories} - UNREAD
    directories = [path for path in directories if path.name in chosen]
    for directory in directories:
        for bits in options.bits or ["4"]:
            try:
                complaints, note = check(
                    options.binary, directory, ["--bits", bits, *flags], options.export
                )
            except subprocess.CalledProcessError as error:
                complaints, note = [error.stderr.decode().strip()], ""
            except RuntimeError as error:
                complaints, note = [str(error)], ""
            failed += bool(complaints)
            print(f"{'FAIL' if complaints else 'ok'} {directory.name} {bits} bits: {note}", flush=True)
            for complaint in complaints:
                print(f"     {complaint}", flush=True)
    print(f"{len(directories)} models, {failed} failures, {time.monotonic() - start:.0f} s")
    sys.exit(bool(failed or not directories))


if __name__ == "__main__":
    main()
