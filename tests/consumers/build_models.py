"""Builds small models of many architectures from transformers' own config classes.

Each one is saved in shards, with seeded random weights that keep signals at unit scale through the
layers and widths that 128 divides, so that quantization and loading meet what real checkpoints hold.

    python build_models.py OUTDIR [NAME ...]
"""

import json
import math
import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from transformers import AutoConfig

TEXT = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=512,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = TEXT | dict(num_key_value_heads=2, head_dim=32)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=128)
VISION = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
LATENT = dict(
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=4,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
ENCODER_DECODER = dict(
    d_model=128,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=256,
    decoder_ffn_dim=256,
    vocab_size=512,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    forced_eos_token_id=2,
)
GPT = dict(n_embd=128, n_layer=2, n_head=4, vocab_size=512, n_positions=128, bos_token_id=1, eos_token_id=2)
BERT = TEXT | dict(type_vocab_size=2)
QWEN_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]))
T5 = dict(
    d_model=128,
    d_kv=32,
    d_ff=256,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    vocab_size=512,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
)
LINEAR_ATTENTION = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
)
QWEN3_VISION = dict(
    depth=2,
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    out_hidden_size=128,
    patch_size=8,
    num_position_embeddings=16,
)
VISION_TOKENS = dict(image_token_id=510, video_token_id=509, vision_start_token_id=508, vision_end_token_id=507)
CLIP_TEXT = TEXT | dict(projection_dim=128)

# Name: (model type, class, what it is fed, config).
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM", "text", GROUPED),
    "llama-tied": ("llama", "LlamaForCausalLM", "text", GROUPED | dict(tie_word_embeddings=True)),
    "llama-base": ("llama", "LlamaModel", "text", GROUPED),
    "llama-classifier": ("llama", "LlamaForSequenceClassification", "text", GROUPED),
    "mistral": ("mistral", "MistralForCausalLM", "text", GROUPED),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", "text", GROUPED),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", "text", GROUPED),
    "qwen3-moe": ("qwen3_moe", "Qwen3MoeForCausalLM", "text", GROUPED | EXPERTS | dict(num_experts=4)),
    "qwen2-moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "text",
        GROUPED | EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=256),
    ),
    "mixtral": ("mixtral", "MixtralForCausalLM", "text", GROUPED | dict(num_local_experts=4)),
    "olmoe": ("olmoe", "OlmoeForCausalLM", "text", GROUPED | dict(num_experts=4, num_experts_per_tok=2)),
    "qwen3-5-moe": (
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        "text",
        dict(
            text_config=GROUPED | EXPERTS | LINEAR_ATTENTION | dict(num_experts=4, shared_expert_intermediate_size=256),
            vision_config=QWEN3_VISION,
            **VISION_TOKENS,
        ),
    ),
    "qwen3-vl-moe": (
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        "text",
        dict(
            text_config=GROUPED | EXPERTS | QWEN_ROPE | dict(num_experts=4, tie_word_embeddings=False),
            vision_config=QWEN3_VISION | dict(deepstack_visual_indexes=[0]),
            **VISION_TOKENS,
        ),
    ),
    "llama4": (
        "llama4",
        "Llama4ForConditionalGeneration",
        "text",
        dict(
            text_config=GROUPED
            | dict(
                num_hidden_layers=4,
                num_local_experts=4,
                intermediate_size_mlp=256,
                interleave_moe_layer_step=1,
                attention_chunk_size=64,
            ),
            vision_config=VISION | dict(vision_output_dim=128, projector_input_dim=128, projector_output_dim=128),
        ),
    ),
    "gemma4": (
        "gemma4",
        "Gemma4ForConditionalGeneration",
        "text",
        dict(
            text_config=GROUPED
            | EXPERTS
            | dict(
                enable_moe_block=True,
                num_experts=4,
                top_k_experts=2,
                global_head_dim=32,
                hidden_size_per_layer_input=0,
                num_kv_shared_layers=0,
            ),
            vision_config=VISION,
            audio_config=None,
        ),
    ),
    "mistral4": (
        "mistral3",
        "Mistral3ForConditionalGeneration",
        "text",
        dict(
            text_config=TEXT | EXPERTS | LATENT | dict(model_type="mistral4", num_key_value_heads=4),
            vision_config=VISION | dict(model_type="pixtral", head_dim=32),
            image_token_index=510,
            tie_word_embeddings=False,
        ),
    ),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", "text", GROUPED),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", "text", GROUPED),
    "phi3": ("phi3", "Phi3ForCausalLM", "text", TEXT | dict(num_key_value_heads=2)),
    "phi": ("phi", "PhiForCausalLM", "text", TEXT),
    "gpt2": ("gpt2", "GPT2LMHeadModel", "text", GPT),
    "gpt-bigcode": ("gpt_bigcode", "GPTBigCodeForCausalLM", "text", GPT),
    "gptj": ("gptj", "GPTJForCausalLM", "text", GPT | dict(rotary_dim=16)),
    "gpt-neox": ("gpt_neox", "GPTNeoXForCausalLM", "text", TEXT),
    "gpt-oss": (
        "gpt_oss",
        "GptOssForCausalLM",
        "text",
        GROUPED | dict(num_local_experts=4, num_experts_per_tok=2),
    ),
    "opt": (
        "opt",
        "OPTForCausalLM",
        "text",
        TEXT | dict(ffn_dim=256, word_embed_proj_dim=128),
    ),
    "falcon": ("falcon", "FalconForCausalLM", "text", TEXT),
    "bloom": ("bloom", "BloomForCausalLM", "text", dict(hidden_size=128, n_layer=2, n_head=4, vocab_size=512)),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", "text", GROUPED),
    "stablelm": ("stablelm", "StableLmForCausalLM", "text", TEXT | dict(num_key_value_heads=2)),
    "cohere": ("cohere", "CohereForCausalLM", "text", GROUPED),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", "text", GROUPED),
    "granite": ("granite", "GraniteForCausalLM", "text", GROUPED),
    "glm4": ("glm4", "Glm4ForCausalLM", "text", GROUPED),
    "deepseek-v2": ("deepseek_v2", "DeepseekV2ForCausalLM", "text", TEXT | EXPERTS | LATENT),
    "deepseek-v3": (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "text",
        TEXT | EXPERTS | LATENT | dict(num_key_value_heads=4),
    ),
    "mamba": (
        "mamba",
        "MambaForCausalLM",
        "text",
        dict(hidden_size=128, num_hidden_layers=2, vocab_size=512, pad_token_id=0, time_step_rank=128),
    ),
    "bert": ("bert", "BertForMaskedLM", "text", BERT),
    "bert-base": ("bert", "BertModel", "text", BERT),
    "roberta": ("roberta", "RobertaForSequenceClassification", "text", BERT | dict(max_position_embeddings=160)),
    "distilbert": (
        "distilbert",
        "DistilBertForMaskedLM",
        "text",
        dict(dim=128, hidden_dim=256, n_layers=2, n_heads=4, vocab_size=512, max_position_embeddings=128),
    ),
    "electra": ("electra", "ElectraForMaskedLM", "text", BERT | dict(embedding_size=128)),
    "modernbert": (
        "modernbert",
        "ModernBertForMaskedLM",
        "text",
        TEXT | dict(cls_token_id=3, sep_token_id=4),
    ),
    "deberta-v2": ("deberta-v2", "DebertaV2ForMaskedLM", "text", BERT),
    "t5": ("t5", "T5ForConditionalGeneration", "seq2seq", T5),
    "flan-t5": ("t5", "T5ForConditionalGeneration", "seq2seq", T5 | dict(feed_forward_proj="gated-gelu")),
    "bart": ("bart", "BartForConditionalGeneration", "seq2seq", ENCODER_DECODER),
    "whisper": (
        "whisper",
        "WhisperForConditionalGeneration",
        "speech",
        ENCODER_DECODER
        | dict(num_mel_bins=16, max_source_positions=32, max_target_positions=64, begin_suppress_tokens=None),
    ),
    "vit": ("vit", "ViTForImageClassification", "image", VISION),
    "deit": ("deit", "DeiTForImageClassification", "image", VISION),
    "siglip-vision": ("siglip_vision_model", "SiglipVisionModel", "image", VISION),
    "clip": (
        "clip",
        "CLIPModel",
        "image+text",
        dict(text_config=CLIP_TEXT, vision_config=VISION | dict(projection_dim=128), projection_dim=128),
    ),
    "llava": (
        "llava",
        "LlavaForConditionalGeneration",
        "text",
        dict(
            text_config=GROUPED | dict(model_type="llama"),
            vision_config=VISION | dict(model_type="clip_vision_model", projection_dim=128),
            image_token_index=510,
            vision_feature_layer=-1,
        ),
    ),
    "qwen2-vl": (
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "text",
        dict(
            text_config=GROUPED | QWEN_ROPE | dict(model_type="qwen2_vl_text"),
            vision_config=dict(depth=2, embed_dim=128, hidden_size=128, num_heads=4, mlp_ratio=2, patch_size=8),
            image_token_id=510,
            video_token_id=509,
            vision_start_token_id=508,
            vision_end_token_id=507,
        ),
    ),
    "paligemma": (
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "text",
        dict(
            text_config=GROUPED | dict(model_type="gemma"),
            vision_config=VISION | dict(model_type="siglip_vision_model", projection_dim=128),
            projection_dim=128,
            hidden_size=128,
            image_token_index=510,
        ),
    ),
    "wav2vec2": (
        "wav2vec2",
        "Wav2Vec2ForCTC",
        "wave",
        TEXT
        | dict(
            conv_dim=[32, 32],
            conv_kernel=[10, 4],
            conv_stride=[5, 4],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            mask_time_prob=0.0,
        ),
    ),
}


def inputs(kind, config):
    """What the model is fed, seeded."""
    random = torch.Generator().manual_seed(7)
    ids = torch.randint(5, 400, (2, 24), generator=random)
    image = torch.randn(2, 3, 32, 32, generator=random)
    if kind == "text":
        return dict(input_ids=ids)
    if kind == "seq2seq":
        return dict(input_ids=ids, decoder_input_ids=ids[:, :12])
    if kind == "speech":
        length = 2 * config.max_source_positions
        features = torch.randn(2, config.num_mel_bins, length, generator=random)
        return dict(input_features=features, decoder_input_ids=ids[:, :12])
    if kind == "image":
        return dict(pixel_values=image)
    if kind == "image+text":
        return dict(input_ids=ids, pixel_values=image)
    if kind == "wave":
        return dict(input_values=torch.randn(2, 1600, generator=random))
    raise ValueError(kind)


def build(name, directory):
    """Writes one model, and beside its shards how to call it."""
    model_type, class_name, kind, options = ARCHITECTURES[name]
    config = AutoConfig.for_model(model_type, **options)
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    random = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                # Of experts each is a matrix of its own; of a convolution all but the outputs come in.
                fan_in = parameter.shape[-1] if "experts" in path else math.prod(parameter.shape[1:])
                parameter.copy_(torch.randn(parameter.shape, generator=random) / math.sqrt(fan_in))
    model = model.to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="200KB")
    with open(os.path.join(directory, "consumer.json"), "w") as file:
        json.dump({"class": class_name, "inputs": kind}, file)


def main():
    out, names = sys.argv[1], sys.argv[2:] or list(ARCHITECTURES)
    failed = []
    for name in names:
        try:
            build(name, os.path.join(out, name))
        except Exception as error:  # Report every architecture, then fail.
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{len(names) - len(failed)} models in {out}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
