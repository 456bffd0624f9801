//! Small checkpoints, made where a test needs one.

#![allow(dead_code, reason = "every test binary uses some of this")]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// Pseudo-random numbers from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// About normal, of standard deviation 0.02, with an outlier now and then.
    pub(crate) fn weight(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| (self.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5).sum();
        let outlier = if self.next().is_multiple_of(200) { 8.0 } else { 1.0 };
        sum * 0.035 * outlier
    }
}

/// One tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Tensor {
    /// Random weights in BF16, F16 or F32; the same for the same name.
    pub(crate) fn weights(name: &str, dtype: Dtype, shape: &[usize]) -> Self {
        let mut random = Random(
            name.bytes().fold(7, |seed: u64, b| seed.wrapping_mul(31).wrapping_add(b.into())),
        );
        let mut data = Vec::new();
        for _ in 0..shape.iter().product() {
            let bits = random.weight().to_bits();
            match dtype {
                Dtype::BF16 => data.extend(((bits >> 16) as u16).to_le_bytes()),
                // Truncated; too small becomes zero.
                Dtype::F16 => {
                    let (sign, exponent) = (bits >> 16 & 0x8000, (bits >> 23 & 0xff) as i32 - 112);
                    let magnitude = if exponent <= 0 {
                        0
                    } else {
                        (exponent as u32) << 10 | bits >> 13 & 0x3ff
                    };
                    data.extend(((sign | magnitude) as u16).to_le_bytes());
                }
                Dtype::F32 => data.extend(bits.to_le_bytes()),
                other => panic!("no weights of {other}"),
            }
        }
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), data }
    }
}

/// Writes a safetensors file.
pub(crate) fn write_shard(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data);
        (tensor.name.clone(), view.expect("shape and data agree"))
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path).expect("written");
}

/// Writes a sharded checkpoint: shards, index, config and a tokenizer.
pub(crate) fn write_checkpoint(dir: &Path, shards: &[(&str, Vec<Tensor>)], config: &Value) {
    std::fs::create_dir_all(dir).expect("a directory");
    let mut weight_map = BTreeMap::new();
    let mut total = 0;
    for (name, tensors) in shards {
        write_shard(&dir.join(name), tensors);
        for tensor in tensors {
            weight_map.insert(tensor.name.clone(), *name);
            total += tensor.data.len();
        }
    }
    let index = json!({
        "metadata": { "total_size": total, "modality": "text" },
        "weight_map": weight_map,
    });
    let pretty = |value| serde_json::to_string_pretty(value).expect("JSON");
    std::fs::write(dir.join("model.safetensors.index.json"), pretty(&index)).expect("written");
    std::fs::write(dir.join("config.json"), pretty(config)).expect("written");
    std::fs::write(dir.join("tokenizer.json"), "{\"version\": \"1.0\"}\n").expect("written");
}

/// A Llama-shaped checkpoint of three shards: two layers of width 256, one of them in F16 and F32,
/// and sizes that are odd where they may be.
pub(crate) fn llama(dir: &Path) -> PathBuf {
    let layer = |i: usize, attention: Dtype, mlp: Dtype| {
        let name = |rest: &str| format!("model.layers.{i}.{rest}.weight");
        vec![
            Tensor::weights(&name("input_layernorm"), Dtype::BF16, &[256]),
            Tensor::weights(&name("self_attn.q_proj"), attention, &[256, 256]),
            Tensor::weights(&name("self_attn.k_proj"), attention, &[128, 256]),
            Tensor::weights(&name("self_attn.v_proj"), attention, &[128, 256]),
            Tensor::weights(&name("self_attn.o_proj"), attention, &[256, 256]),
            Tensor::weights(&name("post_attention_layernorm"), Dtype::BF16, &[256]),
            Tensor::weights(&name("mlp.gate_proj"), mlp, &[383, 256]),
            Tensor::weights(&name("mlp.up_proj"), mlp, &[383, 256]),
            // 383 is no multiple of a group.
            Tensor::weights(&name("mlp.down_proj"), mlp, &[256, 383]),
        ]
    };
    let first = vec![
        Tensor::weights("model.embed_tokens.weight", Dtype::BF16, &[97, 256]),
        Tensor::weights("model.norm.weight", Dtype::BF16, &[256]),
    ];
    let mut last = layer(1, Dtype::F16, Dtype::F32);
    last.push(Tensor::weights("lm_head.weight", Dtype::BF16, &[97, 256]));
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 383,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": false,
    });
    let shards = [
        ("model-00001-of-00003.safetensors", first),
        ("model-00002-of-00003.safetensors", layer(0, Dtype::BF16, Dtype::BF16)),
        ("model-00003-of-00003.safetensors", last),
    ];
    write_checkpoint(dir, &shards, &config);
    dir.to_owned()
}

/// A mixture of three experts in one layer, in two shards, and in neither in order.
pub(crate) fn mixture(dir: &Path) -> PathBuf {
    let name = |rest: &str| format!("model.layers.0.{rest}.weight");
    let expert = |number: usize, projection: &str, shape: [usize; 2]| {
        Tensor::weights(&name(&format!("mlp.experts.{number}.{projection}")), Dtype::BF16, &shape)
    };
    let experts = |number| {
        [
            expert(number, "down_proj", [256, 128]),
            expert(number, "gate_proj", [128, 256]),
            expert(number, "up_proj", [128, 256]),
        ]
    };
    let mut first = vec![
        Tensor::weights("model.embed_tokens.weight", Dtype::BF16, &[97, 256]),
        Tensor::weights(&name("self_attn.q_proj"), Dtype::BF16, &[256, 256]),
        Tensor::weights(&name("self_attn.k_proj"), Dtype::BF16, &[128, 256]),
        Tensor::weights(&name("self_attn.v_proj"), Dtype::BF16, &[128, 256]),
        Tensor::weights(&name("self_attn.o_proj"), Dtype::BF16, &[256, 256]),
        Tensor::weights(&name("mlp.gate"), Dtype::BF16, &[3, 256]),
    ];
    first.extend(experts(1));
    let mut last: Vec<Tensor> = experts(2).into_iter().chain(experts(0)).collect();
    last.push(Tensor::weights("lm_head.weight", Dtype::BF16, &[97, 256]));
    let config = json!({
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_experts": 3,
        "vocab_size": 97,
        "tie_word_embeddings": false,
    });
    let shards =
        [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", last)];
    write_checkpoint(dir, &shards, &config);
    dir.to_owned()
}

/// The weights of [`mixture`], with those of its experts in two tensors: `[experts, out, in]`, or
/// transposed `[experts, in, out]`.
pub(crate) fn fused_mixture(dir: &Path, transposed: bool) -> PathBuf {
    mixture(dir);
    let of = |number: usize, projection: &str, [rows, columns]: [usize; 2]| {
        let name = format!("model.layers.0.mlp.experts.{number}.{projection}.weight");
        (Tensor::weights(&name, Dtype::BF16, &[rows, columns]).data, rows, columns)
    };
    let fused = |name: &str, shape: [usize; 3], parts: &[&str], each: [usize; 2]| {
        let mut data = Vec::new();
        for number in 0..3 {
            let parts: Vec<_> = parts.iter().map(|part| of(number, part, each)).collect();
            if transposed {
                for column in 0..each[1] {
                    for (part, rows, columns) in &parts {
                        let at = |row| (row * columns + column) * 2;
                        (0..*rows).for_each(|row| data.extend(&part[at(row)..at(row) + 2]));
                    }
                }
            } else {
                parts.iter().for_each(|(part, ..)| data.extend(part));
            }
        }
        let [experts, rows, columns] = shape;
        let shape = if transposed { [experts, columns, rows] } else { shape };
        let name = format!("model.layers.0.mlp.experts.{name}");
        Tensor { name, dtype: Dtype::BF16, shape: shape.into(), data }
    };
    let name = |rest: &str| format!("model.layers.0.{rest}.weight");
    let first = vec![
        Tensor::weights("model.embed_tokens.weight", Dtype::BF16, &[97, 256]),
        fused("down_proj", [3, 256, 128], &["down_proj"], [256, 128]),
        Tensor::weights(&name("self_attn.o_proj"), Dtype::BF16, &[256, 256]),
    ];
    let last = vec![
        Tensor::weights(&name("mlp.gate"), Dtype::BF16, &[3, 256]),
        fused("gate_up_proj", [3, 256, 256], &["gate_proj", "up_proj"], [128, 256]),
        Tensor::weights("lm_head.weight", Dtype::BF16, &[97, 256]),
    ];
    let shards =
        [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", last)];
    let config = std::fs::read_to_string(dir.join("config.json")).expect("there");
    write_checkpoint(dir, &shards, &serde_json::from_str(&config).expect("JSON"));
    dir.to_owned()
}

/// A checkpoint shaped as gpt-oss, of shards named as those of [`llama`]: two layers of three experts,
/// one layer in F16 and F32.
pub(crate) fn gpt_oss(dir: &Path) -> PathBuf {
    let layer = |i: usize, attention: Dtype, experts: Dtype| {
        let name = |rest: &str| format!("model.layers.{i}.{rest}");
        vec![
            Tensor::weights(&name("input_layernorm.weight"), Dtype::BF16, &[64]),
            Tensor::weights(&name("self_attn.sinks"), Dtype::BF16, &[3]),
            Tensor::weights(&name("self_attn.q_proj.weight"), attention, &[96, 64]),
            Tensor::weights(&name("mlp.router.weight"), Dtype::BF16, &[3, 64]),
            Tensor::weights(&name("mlp.experts.gate_up_proj"), experts, &[3, 64, 190]),
            Tensor::weights(&name("mlp.experts.gate_up_proj_bias"), Dtype::BF16, &[3, 190]),
            Tensor::weights(&name("mlp.experts.down_proj"), experts, &[3, 96, 64]),
            Tensor::weights(&name("mlp.experts.down_proj_bias"), Dtype::BF16, &[3, 64]),
        ]
    };
    let first = vec![
        Tensor::weights("model.embed_tokens.weight", Dtype::BF16, &[97, 64]),
        Tensor::weights("model.norm.weight", Dtype::BF16, &[64]),
    ];
    let mut last = layer(1, Dtype::F16, Dtype::F32);
    last.push(Tensor::weights("lm_head.weight", Dtype::BF16, &[97, 64]));
    let config = json!({
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_local_experts": 3,
        "vocab_size": 97,
        "tie_word_embeddings": false,
    });
    let shards = [
        ("model-00001-of-00003.safetensors", first),
        ("model-00002-of-00003.safetensors", layer(0, Dtype::BF16, Dtype::BF16)),
        ("model-00003-of-00003.safetensors", last),
    ];
    write_checkpoint(dir, &shards, &config);
    dir.to_owned()
}

/// Whether a format takes [`gpt_oss`] alone, and not [`llama`].
pub(crate) fn is_for_gpt_oss(format: &str) -> bool {
    format == "mxfp4"
}
