//! How fast weights of quantized checkpoints are decoded on one core, by what they were stored in.
//!
//! `cargo bench --bench decode`, or with `-- WORD` the formats that have it in their names. The source
//! is in the page cache; what is measured is the way from there to elements of BF16, a window of
//! 2 MiB at a time, in the thread's time on a core, so that other programs matter less.

#[path = "../tests/support/mod.rs"]
mod support;

use std::num::NonZeroUsize;
use std::path::Path;

use aq_fs::export::{Options, Step, export};
use aq_fs::format::FORMATS;
use aq_fs::quant::{Isa, Quality};
use aq_fs::recipe::Request;
use aq_fs::source::{Checkpoint, SourceFiles, Tensor, TensorId, Window};
use aq_fs::view::{Budget, View};
use safetensors::Dtype;
use serde_json::json;

/// Bytes of a window.
const WINDOW: u64 = 2 << 20;

const ROUNDS: usize = 20;

/// One matrix of a Llama, or the experts of a gpt-oss, 32 MiB of BF16.
fn write_model(dir: &Path, is_gpt_oss: bool) {
    let (name, shape, config) = if is_gpt_oss {
        ("mlp.experts.gate_up_proj", vec![1, 2880, 5760], json!({ "model_type": "gpt_oss" }))
    } else {
        ("mlp.up_proj.weight", vec![4096, 4096], json!({ "model_type": "llama" }))
    };
    // Random numbers take their time, and a few MiB of them are as good as many.
    let mut tensor = support::Tensor::weights("noise", Dtype::BF16, &[1, 1 << 16]);
    tensor.name = format!("model.layers.0.{name}");
    tensor.data = tensor.data.repeat(1 << 8);
    tensor.data.truncate(2 * shape.iter().product::<usize>());
    tensor.shape = shape;
    support::write_checkpoint(dir, &[("model.safetensors", vec![tensor])], &config);
}

/// Nanoseconds that this thread has been on a core, as Linux counts them.
fn on_core() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("a scheduler's count");
    text.split(' ').next().and_then(|first| first.parse().ok()).expect("a number")
}

/// Seconds in which a tensor is decoded: the best of many rounds.
fn seconds(checkpoint: &Checkpoint, isa: Isa, id: TensorId, tensor: &Tensor) -> f64 {
    let files = SourceFiles::new(NonZeroUsize::MIN);
    let width = *tensor.shape.last().expect("a matrix");
    let (all, step) = (tensor.elements() / width, WINDOW / 2 / width);
    let round = || {
        let start = on_core();
        for first_row in (0..all).step_by(step as usize) {
            let rows = step.min(all - first_row);
            let window = Window { width, first_row, rows, first_col: 0, cols: width };
            checkpoint.with_window(isa, &files, id, window, |_, _| ()).expect("readable");
        }
        (on_core() - start) as f64 * 1e-9
    };
    (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min)
}

fn main() {
    // `cargo bench` adds a flag of its own.
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let dirs = [false, true].map(|is_gpt_oss| {
        let dir = tempfile::tempdir().expect("a directory");
        write_model(dir.path(), is_gpt_oss);
        dir
    });
    let isas = Isa::available();
    let names: Vec<&str> = isas.iter().map(|isa| isa.name()).collect();
    println!("GB/s of BF16 on one core, best of {ROUNDS}: {}", names.join(", "));
    for name in FORMATS.iter().map(|format| format.name()).filter(|name| *name != "dense") {
        let dir = &dirs[usize::from(support::is_for_gpt_oss(name))];
        for bits in [None, Some(8), Some(3)] {
            let quality = Quality::Reference;
            let request = Request { format: name.to_owned(), bits, quality, ..Request::default() };
            let out = tempfile::tempdir().expect("a directory");
            // Not every format has these bits, nor can every one be decoded.
            let Ok(view) = View::open(dir.path(), &request, Budget::default()) else { continue };
            if !format!("{name} {bits:?}").contains(&wanted) {
                continue;
            }
            let options = Options { threads: 2, overwrite: true, step: Step::Whole };
            export(&view, out.path(), options, &|_, _| {}).expect("exported");
            let checkpoint = Checkpoint::open(out.path()).expect("a checkpoint");
            let tensors = checkpoint.catalog().tensors().iter().enumerate();
            for (id, tensor) in tensors.filter(|(_, tensor)| !tensor.is_plain()) {
                for isa in &isas {
                    let bytes = tensor.elements() as f64 * 2.0;
                    let seconds = seconds(&checkpoint, *isa, id, tensor);
                    print!("{:7.2}", bytes / seconds / 1e9);
                }
                println!("  {name}{}", bits.map_or(String::new(), |bits| format!(", {bits} bits")));
            }
        }
    }
}
