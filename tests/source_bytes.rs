//! How much of the source is read for one sequential pass over what is shown.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use aq_fs::format::FORMATS;
use aq_fs::quant::Granularity;
use aq_fs::recipe::Request;
use aq_fs::view::{Budget, NodeKind, View};
use safetensors::Dtype;
use serde_json::json;
use support::{Tensor, write_checkpoint};

/// A Llama of two layers, whose fused weights lie in different shards.
fn llama(dir: &Path) {
    let layer = |i: usize| {
        let weight = |(name, shape): (&str, [usize; 2])| {
            Tensor::weights(&format!("model.layers.{i}.{name}.weight"), Dtype::BF16, &shape)
        };
        let early = [
            ("self_attn.q_proj", [512, 512]),
            ("self_attn.k_proj", [256, 512]),
            ("mlp.gate_proj", [1024, 512]),
        ];
        let late = [
            ("self_attn.v_proj", [256, 512]),
            ("self_attn.o_proj", [512, 512]),
            ("mlp.up_proj", [1024, 512]),
            ("mlp.down_proj", [512, 1024]),
        ];
        (early.map(weight), late.map(weight))
    };
    let (early, late): (Vec<_>, Vec<_>) = (0..2).map(layer).unzip();
    let mut first = vec![Tensor::weights("model.embed_tokens.weight", Dtype::BF16, &[96, 512])];
    first.extend(early.into_iter().flatten());
    let shards = [
        ("model-00001-of-00002.safetensors", first),
        ("model-00002-of-00002.safetensors", late.into_iter().flatten().collect()),
    ];
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "tie_word_embeddings": true,
    });
    write_checkpoint(dir, &shards, &config);
}

#[test]
fn a_sequential_pass_reads_the_source_once_and_a_surveyed_weight_twice() {
    let dir = tempfile::tempdir().expect("a directory");
    llama(dir.path());
    let names = FORMATS.iter().map(|format| format.name());
    let of = |name: &str| Request { format: name.to_owned(), ..Request::default() };
    let plain = names.filter(|name| !support::is_for_gpt_oss(name)).map(of);
    let double = ["bnb-nf4", "bnb-fp4"].map(|name| Request { double_quant: true, ..of(name) });
    let channel = ["gptq", "gptq-v2", "awq"]
        .map(|name| Request { granularity: Some(Granularity::Channel), ..of(name) });
    for request in plain.chain(double).chain(channel) {
        // Far less than the 3 MB of 4-bit codes; a weight has 8 chunks or more.
        let budget = Budget { cache: 1 << 20, chunk: 64 << 10, ahead: 0 };
        let view = View::open(dir.path(), &request, budget).expect("a view");
        let mut buf = vec![0; 128 << 10];
        for (file, ..) in view.shards() {
            let NodeKind::File { size } = view.tree().nodes()[file].kind else {
                panic!("a shard is a file")
            };
            for offset in (0..size).step_by(buf.len()) {
                view.read_at(file, offset, &mut buf).expect("readable");
            }
        }
        let model = &view.models()[0];
        let most = if model.plan().surveys.is_empty() { 1.1 } else { 2.1 };
        let ratio = view.stats().source_bytes as f64 / model.source_len() as f64;
        assert!((1.0..=most).contains(&ratio), "{request:?}: {ratio} of at most {most}");
    }
}

#[test]
fn whoever_comes_to_the_end_of_a_shard_finds_the_next_one_begun() {
    let dir = tempfile::tempdir().expect("a directory");
    llama(dir.path());
    let read_first_shard = |ahead| {
        let budget = Budget { cache: 8 << 20, chunk: 64 << 10, ahead };
        let view = View::open(dir.path(), &Request::default(), budget).expect("a view");
        let (file, ..) = view.shards().find(|(.., shard)| *shard == 0).expect("the first");
        let NodeKind::File { size } = view.tree().nodes()[file].kind else {
            panic!("a shard is a file")
        };
        let mut buf = vec![0; 16 << 10];
        for offset in (0..size).step_by(buf.len()) {
            view.read_at(file, offset, &mut buf).expect("readable");
        }
        view
    };
    let of_the_first = read_first_shard(0).stats().cache_misses;
    let view = read_first_shard(128 << 10);
    let started = Instant::now();
    while view.stats().cache_misses == of_the_first {
        assert!(started.elapsed() < Duration::from_secs(20), "nothing of the next was encoded");
        std::thread::sleep(Duration::from_millis(2));
    }
}
