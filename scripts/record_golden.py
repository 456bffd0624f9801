#!/usr/bin/env python3
"""Records what other tools' quantized checkpoints hold, as one line of digest per tensor.

    record_golden.py CHECKPOINT... > tests/fixtures/golden.json
    record_golden.py bnb-nf4-dq@f16 bnb-nf4-dq@f32 > tests/fixtures/golden_double.json
    record_golden.py --casts CHECKPOINT... > tests/fixtures/golden_casts.json

Each CHECKPOINT is a directory that a format's own tool wrote from tests/fixtures/llama-bf16. One
that gpt-oss stores its experts in is from gptoss-bf16, the mixture of a small gpt-oss's first layer.
The digest is the SHA-256 of the tensor's bytes. Needs nothing but Python.

What double quantization doesn't make exactly so stands there whole: quantized scales and, from other
element types than BF16, the largest of what they are quantized from, which the mean goes into; and JSON.

With --casts, for the many that make_golden.py writes from other element types, there is one digest
for all tensors whose names end alike: of their lines "name dtype d0,d1 digest", sorted by name.
"""

import hashlib
import json
import pathlib
import struct
import sys


def tensors(directory):
    for path in sorted(directory.glob("*.safetensors")):
        raw = path.read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, info in header.items():
            start, end = (8 + length + offset for offset in info["data_offsets"])
            digest = hashlib.sha256(raw[start:end]).hexdigest()
            yield name, [info["dtype"], info["shape"], digest]


def loose(directory):
    """The bytes of what double quantization does not make exactly so."""
    for path in sorted(directory.glob("*.safetensors")):
        raw = path.read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        header = json.loads(raw[8 : 8 + length])
        for name, info in header.items():
            weight = name.partition(".weight.")[0] + ".weight"
            kinds = [".quant_state.", ".absmax"] + [".nested_absmax"] * ("@" in directory.name)
            if f"{weight}.nested_absmax" in header and any(kind in name for kind in kinds):
                start, end = (8 + length + offset for offset in info["data_offsets"])
                yield name, raw[start:end].hex()


def parts(directory):
    """One digest per last component of the tensors' names."""
    lines = {}
    for name, (dtype, shape, digest) in sorted(tensors(directory)):
        row = f"{name} {dtype} {','.join(map(str, shape))} {digest}\n"
        lines.setdefault(name.rpartition(".")[2], []).append(row)
    return {part: hashlib.sha256("".join(rows).encode()).hexdigest() for part, rows in sorted(lines.items())}


if sys.argv[1] == "--casts":
    recorded = {pathlib.Path(path).name: parts(pathlib.Path(path)) for path in sorted(sys.argv[2:])}
    print(json.dumps(recorded, indent=1))
    sys.exit()
recorded = {}
for argument in sys.argv[1:]:
    directory = pathlib.Path(argument)
    config = json.loads((directory / "config.json").read_text())
    recorded[directory.name] = {
        "quantization_config": config["quantization_config"],
        "tensors": dict(sorted(tensors(directory))),
        "loose": dict(sorted(loose(directory))),
    }
lines = []
for name, checkpoint in sorted(recorded.items()):
    rows = ",\n".join(
        f"      {json.dumps(tensor)}: {json.dumps(row)}"
        for tensor, row in checkpoint["tensors"].items()
    )
    config = json.dumps(checkpoint["quantization_config"], sort_keys=True)
    extra = f'    "loose": {json.dumps(checkpoint["loose"])},\n' if checkpoint["loose"] else ""
    lines.append(
        f'  {json.dumps(name)}: {{\n    "quantization_config": {config},\n{extra}'
        f'    "tensors": {{\n{rows}\n    }}\n  }}'
    )
print("{\n" + ",\n".join(lines) + "\n}")
