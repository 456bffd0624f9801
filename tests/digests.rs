//! Every file of every format has the recorded digest, on every instruction set and however it is read.
//!
//! `tests/fixtures/digests.json` has the SHA-256 of all files of each view, in the tree's order. It is
//! compared on every architecture that the tests run on (`scripts/aarch64.sh`, `scripts/avx512.sh`). Where a change of bytes
//! is meant, `UPDATE_DIGESTS=1 cargo test --test digests` records them anew; the changelog names the
//! formats.

mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use aq_fs::export::{Options, Step, export};
use aq_fs::format::FORMATS;
use aq_fs::quant::{Isa, Quality, Real};
use aq_fs::recipe::Request;
use aq_fs::view::{Budget, NodeKind, View};
use safetensors::Dtype;
use serde_json::json;
use sha2::{Digest, Sha256};
use support::{Random, Tensor};

/// All files of a view, in its order.
type Files = Vec<Vec<u8>>;

/// A view to be read: its name in the record, its source, and what is asked for.
type Case = (String, PathBuf, Request);

/// The most bytes that a reader asks for at a time.
const PIECE: usize = 50_000;

/// A Llama with a NaN of either sign, an infinity of either sign, or zeros, in each of its weights.
fn odd(dir: &Path) -> PathBuf {
    let names = ["q_proj", "k_proj", "v_proj", "o_proj"];
    let types = [Dtype::BF16, Dtype::F16, Dtype::F32];
    let mut shards = Vec::new();
    for (layer, dtype) in types.into_iter().enumerate() {
        let size = if dtype == Dtype::F32 { 4 } else { 2 };
        let tensors = names.map(|name| {
            let name = format!("model.layers.{layer}.self_attn.{name}.weight");
            let mut weight = Tensor::weights(&name, dtype, &[128, 128]);
            for (row, odd) in [f32::NAN, -f32::NAN, f32::INFINITY, -f32::INFINITY]
                .into_iter()
                .enumerate()
                .skip(usize::from(name.contains("v_proj")) * 2)
            {
                let high = (odd.to_bits() >> 16) as u16;
                let bytes = match dtype {
                    Dtype::BF16 => high.to_le_bytes().to_vec(),
                    // The exponent is shorter, the last bits of either fraction are zeros.
                    Dtype::F16 => {
                        (high & 0x8000 | 0x7c00 | (high & 0x7f) << 3).to_le_bytes().to_vec()
                    }
                    _ => odd.to_le_bytes().to_vec(),
                };
                let at = (row * 32 * 128 + 7 * row) * size;
                weight.data[at..at + size].copy_from_slice(&bytes);
            }
            // Rows of nothing, and of the smallest numbers that there are.
            weight.data[20 * 128 * size..22 * 128 * size].fill(0);
            for element in weight.data[22 * 128 * size..23 * 128 * size].chunks_mut(size) {
                element.fill(0);
                element[0] = 1;
            }
            weight
        });
        shards.push((["a.safetensors", "b.safetensors", "c.safetensors"][layer], tensors.to_vec()));
    }
    support::write_checkpoint(dir, &shards, &json!({ "model_type": "llama" }));
    dir.to_owned()
}

fn request(format: &str, quality: Quality) -> Request {
    Request { format: format.to_owned(), quality, ..Request::default() }
}

/// Every format at every quality, its variants, what it simulates, and what is decoded of it again.
fn cases(dir: &Path) -> Vec<Case> {
    let [llama, gpt_oss, odd] = [
        ("llama", support::llama as fn(&Path) -> PathBuf),
        ("gpt-oss", support::gpt_oss),
        ("odd", odd),
    ]
    .map(|(name, write)| write(&dir.join(name)));
    let mut cases = Vec::new();
    for format in FORMATS.iter().map(|format| format.name()) {
        let source = if support::is_for_gpt_oss(format) { &gpt_oss } else { &llama };
        for quality in [Quality::Reference, Quality::Search] {
            let named = format!("{format}, {quality:?}").to_lowercase();
            cases.push((named.clone(), source.clone(), request(format, quality)));
            if source == &llama {
                cases.push((format!("{named}, odd"), odd.clone(), request(format, quality)));
            }
        }
        if format == "dense" {
            for dtype in [Real::Bf16, Real::F16, Real::F32] {
                let request = Request { dtype: Some(dtype), ..request("dense", Quality::Search) };
                cases.push((format!("dense as {dtype:?}").to_lowercase(), llama.clone(), request));
            }
            continue;
        }
        let simulated =
            Request { simulate: Some(format.to_owned()), ..request("dense", Quality::Reference) };
        cases.push((format!("{format}, simulated"), source.clone(), simulated.clone()));
        if source == &llama {
            let simulated = Request { dtype: Some(Real::F32), ..simulated };
            cases.push((format!("{format}, simulated as f32, odd"), odd.clone(), simulated));
        }
        // Search would go the same way but take longer.
        let quantized = request(format, Quality::Reference);
        for (source, suffix) in [(source, ""), (&odd, ", odd")] {
            if source == &odd && support::is_for_gpt_oss(format) {
                continue;
            }
            let out = dir.join(format!("{format}{suffix}"));
            let view = View::open(source, &quantized, Budget::default()).expect("a view");
            let options = Options { threads: 2, overwrite: true, step: Step::Whole };
            export(&view, &out, options, &|_, _| {}).expect("exported");
            let dense = request("dense", Quality::Reference);
            if View::open(&out, &dense, Budget::default()).is_ok() {
                let as_f32 = Request { dtype: Some(Real::F32), ..dense.clone() };
                cases.push((format!("{format}, decoded{suffix}"), out.clone(), dense));
                cases.push((format!("{format}, decoded as f32{suffix}"), out, as_f32));
            }
        }
    }
    for quality in [Quality::Reference, Quality::Search] {
        let request = Request { double_quant: true, ..request("bnb-nf4", quality) };
        let name = format!("bnb-nf4, double, {quality:?}").to_lowercase();
        cases.push((name, llama.clone(), request));
    }
    cases
}

/// Those to read on: all, or the one that `DIGESTS_ON` names, for where they take long.
fn instruction_sets() -> Vec<Isa> {
    let mut isas = Isa::available();
    if let Ok(name) = std::env::var("DIGESTS_ON") {
        isas.retain(|isa| isa.name() == name);
        assert!(!isas.is_empty(), "this CPU doesn't have {name}");
    }
    isas
}

/// All files, read whole, one after the other.
fn whole(view: &View) -> Files {
    let nodes = view.tree().nodes().iter().enumerate();
    nodes
        .map(|(id, node)| {
            let NodeKind::File { size } = node.kind else { return Vec::new() };
            let mut bytes = vec![0; size as usize];
            assert_eq!(view.read_at(id, 0, &mut bytes).expect("readable"), bytes.len());
            bytes
        })
        .collect()
}

/// Which byte of which file differs first, if one does, where `threads` readers share pieces in an
/// order that `seed` gives: forwards, backwards, or any.
fn difference(view: &View, expected: &Files, threads: usize, seed: u64) -> Option<String> {
    let mut pieces: Vec<(usize, usize)> = (0..)
        .zip(expected)
        .flat_map(|(id, bytes)| (0..bytes.len()).step_by(PIECE).map(move |at| (id, at)))
        .collect();
    let mut random = Random(seed);
    match seed % 3 {
        0 => {}
        1 => pieces.reverse(),
        _ => pieces.sort_by_cached_key(|_| random.next()),
    }
    let next = AtomicUsize::new(0);
    let read = || {
        let mut found = vec![0; PIECE];
        while let Some(&(id, at)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let expected = &expected[id][at..];
            let expected = &expected[..expected.len().min(PIECE)];
            let found = &mut found[..expected.len()];
            assert_eq!(view.read_at(id, at as u64, found).expect("readable"), found.len());
            if let Some(i) = found.iter().zip(expected).position(|(a, b)| a != b) {
                return Some(format!("byte {} of {:?}", at + i, view.tree().nodes()[id].name));
            }
        }
        None
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(read)).collect();
        readers.into_iter().filter_map(|reader| reader.join().expect("no panic")).next()
    })
}

fn digest(files: &Files) -> String {
    let mut all = Sha256::new();
    for bytes in files {
        all.update((bytes.len() as u64).to_le_bytes());
        all.update(bytes);
    }
    all.finalize().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("written");
        text
    })
}

#[test]
fn files_have_their_recorded_digests_on_every_cpu_and_however_they_are_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut digests = BTreeMap::new();
    let isas = instruction_sets();
    println!("read on {}", isas.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "));
    for ((name, source, request), number) in cases(dir.path()).into_iter().zip(0u64..) {
        let open = |isa, budget| View::open_on(isa, &source, &request, budget).expect("a view");
        let expected = whole(&open(isas[0], Budget { cache: 0, chunk: u64::MAX, ahead: 0 }));
        assert!(digests.insert(name.clone(), digest(&expected)).is_none(), "{name} stands twice");
        // Over all cases every instruction set meets every number of threads and every budget.
        for (isa, shift) in isas.iter().zip(0..) {
            for turn in 0..2 {
                let n = number * 2 + turn + shift;
                let threads = 1 + n as usize % 8;
                let budget = Budget {
                    cache: [0, 100_000, 1 << 30][n as usize % 3],
                    chunk: [10_000, 2 << 20, 1, 150_000][n as usize / 2 % 4],
                    ahead: [0, 200_000][n as usize / 3 % 2],
                };
                let view = open(*isa, budget);
                if let Some(place) = difference(&view, &expected, threads, n) {
                    panic!("{name}: {place} on {}, {threads} threads, {budget:?}", isa.name());
                }
            }
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/digests.json");
    if std::env::var_os("UPDATE_DIGESTS").is_some() {
        let text = serde_json::to_string_pretty(&digests).expect("JSON");
        std::fs::write(path, text + "\n").expect("written");
        return;
    }
    let recorded: BTreeMap<String, String> =
        serde_json::from_slice(&std::fs::read(path).expect("there")).expect("JSON");
    let differing: Vec<&String> = recorded
        .keys()
        .chain(digests.keys())
        .filter(|name| recorded.get(*name) != digests.get(*name))
        .collect();
    assert!(differing.is_empty(), "not as recorded, see the top of this test: {differing:#?}");
}
