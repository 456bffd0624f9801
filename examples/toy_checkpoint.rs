//! Makes a Llama-shaped checkpoint of random weights: small to try things on, or large to measure.
//!
//! ```sh
//! cargo run --release --example toy_checkpoint -- /tmp/toy
//! cargo run --release --example toy_checkpoint -- /tmp/large --gib 10
//! ```
//!
//! The small one is 6 MB in three shards. `--gib` takes the widths of a 7B model and as many layers
//! as come closest to that size, in shards of a GiB. Weights repeat every 64 MiB.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Parser;
use serde_json::{Map, Value, json};

#[derive(Debug, Parser)]
struct Args {
    /// The directory to make
    out: PathBuf,

    /// About how large the checkpoint shall be
    #[arg(long)]
    gib: Option<f64>,
}

struct Shape {
    hidden: u64,
    intermediate: u64,
    heads: u64,
    kv_heads: u64,
    vocab: u64,
    layers: u64,
    shard_bytes: u64,
}

type Tensor = (String, Vec<u64>);

impl Shape {
    fn layer(&self, i: u64) -> Vec<Tensor> {
        let Self { hidden, intermediate, heads, kv_heads, .. } = *self;
        let kv = hidden / heads * kv_heads;
        let named =
            |rest: &str, shape: &[u64]| (format!("model.layers.{i}.{rest}.weight"), shape.to_vec());
        vec![
            named("input_layernorm", &[hidden]),
            named("self_attn.q_proj", &[hidden, hidden]),
            named("self_attn.k_proj", &[kv, hidden]),
            named("self_attn.v_proj", &[kv, hidden]),
            named("self_attn.o_proj", &[hidden, hidden]),
            named("post_attention_layernorm", &[hidden]),
            named("mlp.gate_proj", &[intermediate, hidden]),
            named("mlp.up_proj", &[intermediate, hidden]),
            named("mlp.down_proj", &[hidden, intermediate]),
        ]
    }

    fn tensors(&self) -> Vec<Tensor> {
        let mut tensors =
            vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, self.hidden])];
        tensors.extend((0..self.layers).flat_map(|i| self.layer(i)));
        tensors.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        tensors.push(("lm_head.weight".to_owned(), vec![self.vocab, self.hidden]));
        tensors
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "vocab_size": self.vocab,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": false,
        })
    }
}

fn bytes((_, shape): &Tensor) -> u64 {
    shape.iter().product::<u64>() * 2
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let mut shape = Shape {
        hidden: 256,
        intermediate: 768,
        heads: 4,
        kv_heads: 2,
        vocab: 256,
        layers: 4,
        shard_bytes: 3 << 20,
    };
    if let Some(gib) = args.gib {
        shape = Shape {
            hidden: 4096,
            intermediate: 11008,
            heads: 32,
            kv_heads: 8,
            vocab: 32000,
            layers: 0,
            shard_bytes: 1 << 30,
        };
        let ends: u64 = shape.tensors().iter().map(bytes).sum();
        let layer: u64 = shape.layer(0).iter().map(bytes).sum();
        let wanted = (gib * f64::from(1 << 30)) as u64;
        shape.layers = (wanted.saturating_sub(ends) / layer).max(1);
    }
    fs::create_dir_all(&args.out)?;
    let mut shards: Vec<Vec<Tensor>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in shape.tensors() {
        let size = bytes(&tensor);
        if filled > 0 && filled + size > shape.shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += size;
        shards.last_mut().expect("one at least").push(tensor);
    }
    let noise = noise(if args.gib.is_some() { 32 << 20 } else { 1 << 20 });
    let mut weight_map = Map::new();
    let mut total = 0;
    for (i, tensors) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write_shard(&args.out.join(&name), tensors, &noise)?;
        for tensor in tensors {
            weight_map.insert(tensor.0.clone(), name.clone().into());
            total += bytes(tensor);
        }
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let write = |name: &str, text: &str| fs::write(args.out.join(name), text);
    write("model.safetensors.index.json", &serde_json::to_string_pretty(&index)?)?;
    write("config.json", &serde_json::to_string_pretty(&shape.config())?)?;
    write("tokenizer.json", include_str!("../tests/fixtures/llama-bf16/tokenizer.json"))?;
    let tokenizer = include_str!("../tests/fixtures/llama-bf16/tokenizer_config.json");
    write("tokenizer_config.json", tokenizer)?;
    let generation = include_str!("../tests/fixtures/llama-bf16/generation_config.json");
    write("generation_config.json", generation)?;
    println!(
        "{}: {} tensors in {} shards, {:.2} GiB",
        args.out.display(),
        weight_map.len(),
        shards.len(),
        total as f64 / f64::from(1 << 30)
    );
    Ok(())
}

/// So many BF16 weights, about normal with a standard deviation of 0.02.
fn noise(elements: usize) -> Vec<u8> {
    let mut state = 7u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let mut bytes = Vec::with_capacity(elements * 2);
    for _ in 0..elements {
        let value = (uniform() + uniform() + uniform() + uniform()) * 0.035;
        bytes.extend(((value.to_bits() >> 16) as u16).to_le_bytes());
    }
    bytes
}

fn write_shard(path: &Path, tensors: &[Tensor], noise: &[u8]) -> Result<(), Box<dyn Error>> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + bytes(tensor);
        let info = json!({ "dtype": "BF16", "shape": tensor.1, "data_offsets": [offset, end] });
        header.insert(tensor.0.clone(), info);
        offset = end;
    }
    let mut json = serde_json::to_vec(&header)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(json.len() as u64).to_le_bytes())?;
    file.write_all(&json)?;
    let mut from = 0;
    for tensor in tensors {
        // Norms are ones.
        if tensor.1.len() == 1 {
            file.write_all(&[0x80, 0x3f].repeat(tensor.1[0] as usize))?;
            continue;
        }
        let mut left = bytes(tensor) as usize;
        while left > 0 {
            let run = left.min(noise.len() - from);
            file.write_all(&noise[from..from + run])?;
            from = (from + run) % noise.len();
            left -= run;
        }
    }
    file.flush()?;
    Ok(())
}
