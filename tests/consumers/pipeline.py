"""Builds a small diffusers pipeline, mounts it, and runs two steps of it on the CPU.

    python pipeline.py AQ_FS

It is a Flux: a transformer and a VAE of diffusers' own, a CLIP and a T5 text encoder. At the mount the
text encoders are compressed-tensors, and the transformer carries the error of a format in plain
numbers. The latents that come out must differ from the original pipeline's, but not by much.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers
import torch
import transformers
from loguru import logger
from safetensors import safe_open
from transformers import CLIPTextModel, CompressedTensorsConfig, T5EncoderModel

from mounted import decibels, mounted

transformers.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()
logger.disable("compressed_tensors")

ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
# Flags, whether the transformer is then another one, and the least distance in dB.
RUNS = {
    "--bits 8": (False, 25),
    "--format compressed-tensors --simulate ct-fp8": (True, 8),
    "--format compressed-tensors --simulate bnb-nf4": (True, 8),
    "--format compressed-tensors --bits 8 --simulate mlx": (True, 25),
}


def build(directory):
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {f"{chr(97 + i)}</w>": i + 2 for i in range(26)}
    clip = transformers.CLIPTextConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=77, projection_dim=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )
    t5 = transformers.T5Config(
        d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=64, feed_forward_proj="gated-gelu"
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(f"▁{chr(97 + i)}", -3.0) for i in range(26)]
    torch.manual_seed(0)
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"],
            block_out_channels=[32], latent_channels=4, shift_factor=0.0, scaling_factor=1.0,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=77),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77),
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=128, pooled_projection_dim=128, axes_dims_rope=[8, 12, 12],
        ),
    )  # fmt: skip
    pipeline.to(torch.bfloat16).save_pretrained(directory, max_shard_size="1MB")


def latents(directory, **encoders):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(directory, torch_dtype=torch.bfloat16, **encoders)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        out = pipeline(
            "a b c d", num_inference_steps=2, height=32, width=32, max_sequence_length=16, output_type="latent",
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
    return out.images.double()


def tensors(directory):
    found = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).clone() for name in file.keys()}
    return found


def main():
    (binary,) = sys.argv[1:]
    failed = 0
    with tempfile.TemporaryDirectory() as source:
        build(source)
        original = latents(source)
        for flags, (simulated, least) in RUNS.items():
            with mounted(binary, source, *flags.split()) as view:
                config = CompressedTensorsConfig(dequantize=True)
                encoders = {
                    name: kind.from_pretrained(f"{view}/{name}", dtype=torch.bfloat16, quantization_config=config)
                    for name, kind in ENCODERS.items()
                }
                distance = decibels(original, latents(view, **encoders))
                complaints = []
                for name in ENCODERS:
                    if not any(key.endswith(".weight_packed") for key in tensors(f"{view}/{name}")):
                        complaints.append(f"{name} is not quantized")
                before, after = tensors(f"{source}/transformer"), tensors(f"{view}/transformer")
                if before.keys() != after.keys():
                    complaints.append("the transformer has other tensors")
                elif all(map(torch.equal, before.values(), after.values())) == simulated:
                    complaints.append(f"the transformer is {'the same' if simulated else 'another'}")
            if not least <= distance < 90:
                complaints.append(f"not within {least} to 90 dB")
            failed += bool(complaints)
            print(f"{'FAIL' if complaints else 'ok'} {flags}: latents at {distance:.2f} dB {complaints or ''}", flush=True)
    print(f"{len(RUNS)} pipelines, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
