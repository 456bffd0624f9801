#!/usr/bin/env python3
"""Measures a mount: time to mount, rate of cold sequential reads, peak private memory.

    scripts/bench.py [--gib 10] [--rounds 5] [--dir DIR] [MEASUREMENT ...]

Measurements: mount (a model of DeepSeek-V3's size, sparse), read (int4 at reference and search
quality against the same files shown as they are, in turn, each on a fresh mount, the source in the
page cache), memory (a model of --gib GiB read through once), cgroup (the same from cold disk, mount
and reader in a memory control group of 256 MiB, against no limit; needs root), export (to --dir,
best a tmpfs, with the model in the page cache), load (transformers' from_pretrained of a fresh mount
against an exported copy, both in the page cache, at reference quality; in the environment that
tests/consumers/run.sh makes). All of them if none is named. Prints a Markdown table. Needs a release
build, root or a usable /dev/fuse, and but for load nothing but Python.
"""

import argparse
import json
import math
import mmap
import os
import pathlib
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / "target/release/aq-fs"
TOY = ROOT / "target/release/examples/toy_checkpoint"
CHUNK = 1 << 20


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


def read_all(directory, how):
    """Every byte of every shard, in order; the number of bytes."""
    total = 0
    buffer = bytearray(CHUNK)
    for path in shards(directory):
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size
        if how == "read":
            while got := os.readv(fd, [buffer]):
                total += got
        else:
            with mmap.mmap(fd, size, prot=mmap.PROT_READ) as view:
                for at in range(0, size, CHUNK):
                    total += len(view[at : at + CHUNK])
        os.close(fd)
    return total


class Mount:
    def __init__(self, model, *flags, enter=None):
        self.point = pathlib.Path(tempfile.mkdtemp(prefix="aq-fs-bench-"))
        started = time.perf_counter()
        # What it prints would stand in the table.
        command = [BIN, "mount", model, self.point, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=enter)
        self.seconds = time.perf_counter() - started

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run([BIN, "unmount", self.point], check=True, stdout=subprocess.DEVNULL)
        self.point.rmdir()

    def status(self):
        command = [BIN, "status", "--json", self.point]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[0]


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class PeakRssAnon(threading.Thread):
    """Samples the private memory of a process, in bytes."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.path = pathlib.Path(f"/proc/{pid}/status")
        self.peak = 0
        self.stop = threading.Event()

    def run(self):
        while not self.stop.wait(0.005):
            try:
                text = self.path.read_text()
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak, int(line.split()[1]) << 10)


def deepseek_tensors(experts=512, width=1024):
    """Names and shapes of DeepSeek-V3 with its next-token layer. Twice its experts at half their
    width make as many tensors in BF16 as the original has in FP8 with scales, of the same size."""
    hidden, dense_width = 7168, 18432

    def feed_forward(module, width):
        yield f"{module}.gate_proj.weight", [width, hidden]
        yield f"{module}.up_proj.weight", [width, hidden]
        yield f"{module}.down_proj.weight", [hidden, width]

    yield "model.embed_tokens.weight", [129280, hidden]
    for i in range(62):
        layer = f"model.layers.{i}"
        if i == 61:
            yield f"{layer}.embed_tokens.weight", [129280, hidden]
            yield f"{layer}.enorm.weight", [hidden]
            yield f"{layer}.hnorm.weight", [hidden]
            yield f"{layer}.eh_proj.weight", [hidden, 2 * hidden]
        yield f"{layer}.input_layernorm.weight", [hidden]
        yield f"{layer}.self_attn.q_a_proj.weight", [1536, hidden]
        yield f"{layer}.self_attn.q_a_layernorm.weight", [1536]
        yield f"{layer}.self_attn.q_b_proj.weight", [24576, 1536]
        yield f"{layer}.self_attn.kv_a_proj_with_mqa.weight", [576, hidden]
        yield f"{layer}.self_attn.kv_a_layernorm.weight", [512]
        yield f"{layer}.self_attn.kv_b_proj.weight", [32768, 512]
        yield f"{layer}.self_attn.o_proj.weight", [hidden, 16384]
        if i < 3:
            yield from feed_forward(f"{layer}.mlp", dense_width)
        else:
            yield f"{layer}.mlp.gate.weight", [experts, hidden]
            yield f"{layer}.mlp.gate.e_score_correction_bias", [experts]
            yield from feed_forward(f"{layer}.mlp.shared_experts", 2048)
            for expert in range(experts):
                yield from feed_forward(f"{layer}.mlp.experts.{expert}", width)
        yield f"{layer}.post_attention_layernorm.weight", [hidden]
        if i == 61:
            yield f"{layer}.shared_head.norm.weight", [hidden]
            yield f"{layer}.shared_head.head.weight", [129280, hidden]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [129280, hidden]


def sparse_model(directory, shard_count=163):
    """Headers of such a model over holes, which take no room; the number of its tensors."""
    tensors = [(name, shape, 2 * math.prod(shape)) for name, shape in deepseek_tensors()]
    total = sum(size for *_, size in tensors)
    per_shard = [[] for _ in range(shard_count)]
    at = 0
    for tensor in tensors:
        per_shard[at * shard_count // total].append(tensor)
        at += tensor[2]
    weight_map = {}
    for s, tensors_here in enumerate(per_shard):
        shard = f"model-{s + 1:05}-of-{shard_count:06}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, size in tensors_here:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            weight_map[name] = shard
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / shard, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "tie_word_embeddings": False,
        "vocab_size": 129280,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return len(tensors), total


def memory_of(pid):
    """Peak and present memory of a process in MiB, and its private part."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return [int(fields[key].split()[0]) / 1024 for key in ("VmHWM", "RssAnon")]


def measure_mount(work, options):
    model = work / "sparse"
    model.mkdir()
    tensors, total = sparse_model(model)
    seconds, mounted, read, floor = [], [], [], []
    for _ in range(options.rounds):
        # What is read ahead beyond the headers is encoded too, and not what is measured here.
        with Mount(model, "--cache-size", "1M") as mount:
            started = time.perf_counter()
            subprocess.run(["ls", "-l", mount.point], check=True, stdout=subprocess.DEVNULL)
            (mount.point / "config.json").read_bytes()
            seconds.append(mount.seconds + time.perf_counter() - started)
            pid = mount.status()["pid"]
            mounted.append(memory_of(pid))
            (mount.point / "model.safetensors.index.json").read_bytes()
            for path in shards(mount.point):
                with open(path, "rb") as file:
                    (length,) = struct.unpack("<Q", file.read(8))
                    file.read(length)
            read.append(memory_of(pid))
        started = time.perf_counter()
        for path in shards(model):
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                json.loads(file.read(length))
        floor.append(time.perf_counter() - started)
    shutil.rmtree(model)
    what = f"163 shards, {tensors:,} tensors, {total / 1e12:.2f} TB"
    yield (
        f"mount, `ls -l` and `cat config.json`, {what}",
        f"{statistics.median(seconds):.3f} s (best {min(seconds):.3f})",
        f"{statistics.median(floor):.3f} s for Python's json on the same headers",
    )
    for when, figures in (("then", mounted), ("once the index and all headers are read", read)):
        peak, private = (max(column) for column in zip(*figures))
        yield (f"memory {when}", f"{peak:.0f} MiB at most", f"{private:.0f} MiB of it private now")


def measure_read(work, options):
    model = work / "model"
    subprocess.run([TOY, model, "--gib", str(min(options.gib, 4))], check=True)
    read_all(model, "read")
    views = {
        "as it is (dense)": ["--format", "dense"],
        "int4, reference": ["--bits", "4", "--quality", "reference"],
        "int4, search": ["--bits", "4"],
    }
    for how in ("read", "mmap"):
        rates = {name: [] for name in views}
        cpu = {name: [] for name in views}
        for _ in range(options.rounds):
            for name, flags in views.items():
                with Mount(model, *flags) as mount:
                    pid = mount.status()["pid"]
                    before, started = cpu_seconds(pid), time.perf_counter()
                    size = read_all(mount.point, how)
                    rates[name].append(size / (time.perf_counter() - started) / 1e9)
                    cpu[name].append((cpu_seconds(pid) - before) / size * 1e9)
        base = rates["as it is (dense)"]
        for name in views:
            ratios = [a / b for a, b in zip(rates[name], base)]
            yield (
                f"{how}, {name}",
                f"{statistics.median(rates[name]):.2f} GB/s of output, "
                f"{statistics.median(cpu[name]):.2f} CPU-s/GB in the daemon",
                f"{statistics.median(ratios):.2f} of dense in the same round",
            )
    shutil.rmtree(model)


def measure_memory(work, options):
    model = work / "large"
    subprocess.run([TOY, model, "--gib", str(options.gib)], check=True)
    for cache in (64, 256):
        with Mount(model, "--bits", "4", "--quality", "reference", "--cache-size", f"{cache}M") as mount:
            peak = PeakRssAnon(mount.status()["pid"])
            peak.start()
            size = read_all(mount.point, "mmap")
            peak.stop.set()
            peak.join()
        yield (
            f"peak RssAnon, {options.gib} GiB of source read through, --cache-size {cache}M",
            f"{peak.peak / (1 << 20):.0f} MiB",
            f"promised {cache + 64} MiB; {size / 1e9:.1f} GB of output",
        )
    shutil.rmtree(model)


class Group:
    """A memory control group below this process's own, of whichever version there is."""

    def __init__(self, limit):
        groups = [line.split(":", 2) for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines()]
        own = next((path for _, names, path in groups if "memory" in names.split(",")), None)
        self.v1 = own is not None
        if self.v1:
            self.path = pathlib.Path("/sys/fs/cgroup/memory" + own) / "aq-fs-bench"
        else:
            # Version 2 has no processes in a group that has children which are limited.
            self.path = pathlib.Path("/sys/fs/cgroup/aq-fs-bench")
        self.path.mkdir(exist_ok=True)
        name = "memory.limit_in_bytes" if self.v1 else "memory.max"
        if limit:
            (self.path / name).write_text(str(limit))

    def enter(self):
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def kills(self):
        name = "memory.oom_control" if self.v1 else "memory.events"
        lines = (self.path / name).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def remove(self):
        # Whoever has just ended may still be in it.
        for _ in range(100):
            try:
                return self.path.rmdir()
            except OSError:
                time.sleep(0.05)


def measure_cgroup(work, options):
    model = work / "large"
    subprocess.run([TOY, model, "--gib", str(options.gib)], check=True)
    limits = {"256 MiB": 256 << 20, "none": None}
    seconds = {name: [] for name in limits}
    kills = 0
    for _ in range(options.rounds):
        for name, limit in limits.items():
            for path in shards(model):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            group = Group(limit)
            flags = ["--bits", "4", "--quality", "reference"]
            with Mount(model, *flags, enter=group.enter) as mount:
                started = time.perf_counter()
                command = ["cat", *shards(mount.point)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=group.enter)
                seconds[name].append(time.perf_counter() - started)
                cache = mount.status()["stats"]["cache_budget"]
                kills += group.kills()
            group.remove()
            print(f"{name}: {seconds[name][-1]:.1f} s, cache {cache >> 20} MiB", file=sys.stderr)
    ratios = [a / b for a, b in zip(seconds["256 MiB"], seconds["none"])]
    yield (
        f"{options.gib:g} GiB of source read through from cold disk, in a cgroup of 256 MiB",
        f"{statistics.median(seconds['256 MiB']):.1f} s, {kills} OOM kills",
        f"{statistics.median(ratios):.2f} times as long as without a limit, in the same round",
    )
    shutil.rmtree(model)


def measure_export(work, options):
    model = work / "model"
    subprocess.run([TOY, model, "--gib", str(min(options.gib, 2))], check=True)
    source = read_all(model, "read") / (1 << 30)
    for quality in ("reference", "search"):
        seconds, peaks = [], []
        for _ in range(options.rounds):
            out = work / "out"
            started = time.perf_counter()
            command = [BIN, "export", model, out, "--bits", "4", "--quality", quality, "--quiet"]
            process = subprocess.Popen(command)
            peak = PeakRssAnon(process.pid)
            peak.start()
            process.wait()
            seconds.append((time.perf_counter() - started) / source)
            peak.stop.set()
            peak.join()
            peaks.append(peak.peak)
            assert process.returncode == 0
            shutil.rmtree(out)
        yield (
            f"export, int4, {quality}",
            f"{statistics.median(seconds):.2f} s per GiB of source",
            f"peak RssAnon {max(peaks) / (1 << 20):.0f} MiB",
        )
    shutil.rmtree(model)


LOAD = """
import sys, time, torch
from transformers import AutoModelForCausalLM
started = time.perf_counter()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(time.perf_counter() - started)
"""


def seconds_to_load(directory):
    python = ROOT / "target/consumers/bin/python"
    done = subprocess.run([python, "-c", LOAD, directory], check=True, capture_output=True, text=True)
    return float(done.stdout)


def measure_load(work, options):
    model, copy = work / "model", work / "copy"
    subprocess.run([TOY, model, "--gib", str(min(options.gib, 4))], check=True)
    recipe = ["--bits", "4", "--quality", "reference"]
    subprocess.run([BIN, "export", model, copy, *recipe, "--quiet"], check=True)
    seconds = {"mount": [], "copy": []}
    for _ in range(options.rounds):
        read_all(copy, "read")
        seconds["copy"].append(seconds_to_load(copy))
        read_all(model, "read")
        with Mount(model, *recipe) as mount:
            seconds["mount"].append(seconds_to_load(mount.point))
    ratios = [a / b for a, b in zip(seconds["mount"], seconds["copy"])]
    yield (
        f"`from_pretrained` of a mount, {read_all(model, 'read') / (1 << 30):.1f} GiB of source, int4, reference",
        f"{statistics.median(seconds['mount']):.2f} s",
        f"{statistics.median(ratios):.2f} times the exported copy's "
        f"{statistics.median(seconds['copy']):.2f} s, in the same round",
    )
    shutil.rmtree(model)
    shutil.rmtree(copy)


MEASUREMENTS = {
    "mount": measure_mount,
    "read": measure_read,
    "memory": measure_memory,
    "cgroup": measure_cgroup,
    "export": measure_export,
    "load": measure_load,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measurements", nargs="*", default=list(MEASUREMENTS))
    parser.add_argument("--gib", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where to put the models that are made")
    options = parser.parse_args()
    print("| what | median | against |\n|---|---|---|")
    for name in options.measurements:
        with tempfile.TemporaryDirectory(dir=options.dir) as work:
            for row in MEASUREMENTS[name](pathlib.Path(work), options):
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
