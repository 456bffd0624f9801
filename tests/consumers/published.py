"""Small models in the tensors of the published ones, where transformers saves others."""

import json
import re

import torch
from safetensors.torch import load_file, save_file

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def as_published(directory):
    """Joins the experts of a Qwen3.5-MoE, and transposes those of a Qwen3-VL-MoE."""
    shards = sorted(directory.glob("*.safetensors"))
    weights = {}
    for shard in shards:
        weights.update(load_file(shard))
        shard.unlink()
    (directory / "model.safetensors.index.json").unlink()
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    if kind == "qwen3_5_moe":
        mixtures = {}
        for match in filter(None, map(EXPERT.fullmatch, list(weights))):
            mixture, expert, part = match.groups()
            mixtures.setdefault(mixture, {})[part, int(expert)] = weights.pop(match[0])
        for mixture, parts in mixtures.items():
            gate, up, down = (
                torch.stack([parts[part, expert] for expert in range(len(parts) // 3)]) for part in ("gate", "up", "down")
            )
            weights[f"{mixture}.gate_up_proj"] = torch.cat([gate, up], dim=1)
            weights[f"{mixture}.down_proj"] = down
    if kind == "qwen3_vl_moe":
        for name in weights:
            if ".experts." in name:
                weights[name] = weights[name].transpose(1, 2).contiguous()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
