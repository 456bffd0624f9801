//! How fast a view of each format is read in order, from new, by one thread and by all cores.
//!
//! `cargo bench --bench reads`, or with `-- WORD` the formats that have it in their names. The
//! source is in the page cache, no kernel stands between, and every round opens a view of its own,
//! so that all is encoded. `dense` says what the source's own bytes take.

#[path = "../tests/support/mod.rs"]
mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use aq_fs::format::FORMATS;
use aq_fs::quant::Quality;
use aq_fs::recipe::Request;
use aq_fs::view::{Budget, NodeKind, View};
use safetensors::Dtype;
use serde_json::json;
use support::Tensor;

/// Bytes that a reader asks for at a time.
const PIECE: u64 = 1 << 20;

const ROUNDS: usize = 5;

/// Two layers of a Llama in two shards of BF16, 172 MiB in all.
fn write_model(dir: &std::path::Path) {
    let layer = |i: usize| {
        let weight = |name: &str, shape: [usize; 2]| {
            // Random numbers take their time, and a few MiB of them are as good as many.
            let mut tensor = Tensor::weights("noise", Dtype::BF16, &[1, 1 << 16]);
            tensor.name = format!("model.layers.{i}.{name}.weight");
            tensor.data = tensor.data.repeat((shape[0] * shape[1]) >> 16);
            tensor.shape = shape.to_vec();
            tensor
        };
        vec![
            weight("self_attn.q_proj", [2048, 2048]),
            weight("self_attn.k_proj", [512, 2048]),
            weight("self_attn.v_proj", [512, 2048]),
            weight("self_attn.o_proj", [2048, 2048]),
            weight("mlp.gate_proj", [5632, 2048]),
            weight("mlp.up_proj", [5632, 2048]),
            weight("mlp.down_proj", [2048, 5632]),
        ]
    };
    let shards = [
        ("model-00001-of-00002.safetensors", layer(0)),
        ("model-00002-of-00002.safetensors", layer(1)),
    ];
    support::write_checkpoint(dir, &shards, &json!({ "model_type": "llama" }));
}

/// Reads every file of a view in pieces, `threads` of them at a time; the number of bytes.
fn read_all(view: &View, threads: usize) -> u64 {
    let nodes = view.tree().nodes().iter().enumerate();
    let files = nodes.filter_map(|(file, node)| match node.kind {
        NodeKind::File { size } => Some((file, size)),
        NodeKind::Dir { .. } => None,
    });
    let pieces: Vec<_> = files
        .flat_map(|(file, size)| {
            (0..size.div_ceil(PIECE)).map(move |i| (file, i * PIECE, PIECE.min(size - i * PIECE)))
        })
        .collect();
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut buffer = vec![0; PIECE as usize];
                while let Some(&(file, offset, len)) =
                    pieces.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    view.read_at(file, offset, &mut buffer[..len as usize]).expect("readable");
                }
            });
        }
    });
    pieces.iter().map(|(.., len)| len).sum()
}

fn main() {
    // `cargo bench` adds a flag of its own.
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let dir = tempfile::tempdir().expect("a directory");
    write_model(dir.path());
    let source: u64 = std::fs::read_dir(dir.path())
        .expect("listed")
        .map(|entry| entry.expect("an entry").metadata().expect("known").len())
        .sum();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    println!(
        "GB/s of source ({} MiB), best of {ROUNDS}: one thread, {cores} threads",
        source >> 20
    );
    // gpt-oss's own format takes no Llama.
    let takes = |name: &str| name.contains(&wanted) && !support::is_for_gpt_oss(name);
    for format in FORMATS.iter().filter(|format| takes(format.name())) {
        for quality in [Quality::Reference, Quality::Search] {
            let format = format.name().to_owned();
            let request = Request { format: format.clone(), quality, ..Request::default() };
            let rate = |threads: usize| {
                let mut best = f64::INFINITY;
                for _ in 0..ROUNDS {
                    let view = View::open(dir.path(), &request, Budget::default()).expect("a view");
                    let start = Instant::now();
                    read_all(&view, threads);
                    best = best.min(start.elapsed().as_secs_f64());
                }
                source as f64 / best / 1e9
            };
            println!("{:7.2} {:7.2}  {format}, {quality:?}", rate(1), rate(cores));
        }
    }
}
