//! Any read of any virtual file is the slice of the whole, whatever the cache and chunk sizes.

mod support;

use std::path::Path;
use std::sync::LazyLock;

use aq_fs::export::{Options, Step, export};
use aq_fs::format::FORMATS;
use aq_fs::quant::{Granularity, Quality, Real};
use aq_fs::recipe::{Decision, Request};
use aq_fs::view::{Budget, NodeId, NodeKind, View};
use proptest::prelude::*;

static MODELS: LazyLock<[tempfile::TempDir; 2]> = LazyLock::new(|| {
    [support::llama, support::gpt_oss].map(|write| {
        let dir = tempfile::tempdir().expect("a directory");
        write(dir.path());
        dir
    })
});

static MIXTURE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a directory");
    support::mixture(dir.path());
    dir
});

/// The model that the format asked for takes.
fn model_for(request: &Request) -> &'static Path {
    let format = request.simulate.as_ref().unwrap_or(&request.format);
    MODELS[usize::from(support::is_for_gpt_oss(format))].path()
}

/// Checkpoints that arrive quantized: a plain model in every format that can be decoded again.
static QUANTIZED: LazyLock<Vec<(&'static str, tempfile::TempDir)>> = LazyLock::new(|| {
    let quantized = |name: &'static str| {
        let dir = tempfile::tempdir().expect("a directory");
        let request = Request { format: name.to_owned(), ..Request::default() };
        let view = View::open(model_for(&request), &request, Budget::default()).expect("a view");
        export(
            &view,
            dir.path(),
            Options { threads: 2, overwrite: true, step: Step::Whole },
            &|_, _| {},
        )
        .expect("exported");
        match View::open(dir.path(), &dense(), Budget::default()) {
            Ok(_) => Some((name, dir)),
            Err(error) => {
                assert!(error.to_string().contains("can't be decoded"), "{name}: {error}");
                None
            }
        }
    };
    let names = FORMATS.iter().map(|format| format.name()).filter(|name| *name != "dense");
    names.filter_map(quantized).collect()
});

/// A mixture of experts in every format, and in several schemes at once.
fn mixtures() -> Vec<Request> {
    let mixed = ["compressed-tensors", "mlx"].map(|format| Request {
        format: format.to_owned(),
        granularity: Some(Granularity::Group(32)),
        set: ["*.experts.*=8", "*.o_proj=2/64", "*.v_proj=6", "lm_head=keep"]
            .map(|set| set.parse().expect("valid"))
            .into(),
        ..Request::default()
    });
    let formats = requests().into_iter().take(FORMATS.len());
    formats.filter(|request| !support::is_for_gpt_oss(&request.format)).chain(mixed).collect()
}

/// What a source is shown as: every request of the plain one, and of a quantized one the plain
/// numbers and formats that cut them in different ways.
fn cases() -> Vec<(&'static Path, Request)> {
    let mut cases: Vec<_> =
        requests().into_iter().map(|request| (model_for(&request), request)).collect();
    cases.extend(mixtures().into_iter().map(|request| (MIXTURE.path(), request)));
    for (_, dir) in QUANTIZED.iter() {
        for format in ["dense", "compressed-tensors", "mlx", "bnb-nf4", "fp8-block"] {
            let request = Request { format: format.to_owned(), ..Request::default() };
            cases.push((dir.path(), request));
        }
        cases.push((dir.path(), Request { dtype: Some(Real::F32), ..dense() }));
    }
    cases
}

fn dense() -> Request {
    Request { format: "dense".to_owned(), ..Request::default() }
}

/// One request for every format as it is by default, and variants of those that take them.
fn requests() -> Vec<Request> {
    let mut requests: Vec<Request> = FORMATS
        .iter()
        .map(|format| Request { format: format.name().to_owned(), ..Request::default() })
        .collect();
    for dtype in [Real::Bf16, Real::F16, Real::F32] {
        requests.push(Request { dtype: Some(dtype), ..dense() });
    }
    for format in FORMATS.iter().filter(|format| format.name() != "dense") {
        let simulate = Some(format.name().to_owned());
        requests.push(Request { simulate: simulate.clone(), ..dense() });
        requests.push(Request { simulate, dtype: Some(Real::F32), ..dense() });
    }
    for quality in [Quality::Reference, Quality::Search] {
        let format = "bnb-nf4".to_owned();
        requests.push(Request { format, double_quant: true, quality, ..Request::default() });
    }
    for bits in 2..=8 {
        for symmetric in [true, false] {
            for granularity in [Granularity::Group(32), Granularity::Channel] {
                requests.push(Request {
                    bits: Some(bits),
                    symmetric: Some(symmetric),
                    granularity: Some(granularity),
                    quality: if bits % 2 == 0 { Quality::Search } else { Quality::Reference },
                    ..Request::default()
                });
            }
        }
    }
    requests
}

fn whole(view: &View, file: NodeId) -> Vec<u8> {
    let NodeKind::File { size } = view.tree().nodes()[file].kind else { return Vec::new() };
    let mut bytes = vec![0; size as usize];
    assert_eq!(view.read_at(file, 0, &mut bytes).expect("readable"), bytes.len());
    bytes
}

/// Every file of the oracle, which encodes each weight as one chunk and keeps none of it.
static ORACLES: LazyLock<Vec<Vec<Vec<u8>>>> = LazyLock::new(|| {
    let oracle = |(source, request): &(&Path, Request)| {
        let budget = Budget { cache: 0, chunk: u64::MAX, ahead: 0 };
        let view = View::open(source, request, budget).expect("a view");
        (0..view.tree().nodes().len()).map(|file| whole(&view, file)).collect()
    };
    cases().iter().map(oracle).collect()
});

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_read_is_a_slice_of_the_whole(
        which in 0..cases().len(),
        cache in prop_oneof![Just(0u64), 1u64..200_000, Just(1 << 30)],
        chunk in prop_oneof![Just(1u64), 1u64..100_000, Just(1 << 20)],
        ahead in prop_oneof![Just(0u64), 1u64..1_000_000],
        reads in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0usize..150_000), 1..40),
    ) {
        let (source, request) = &cases()[which];
        let view = View::open(source, request, Budget { cache, chunk, ahead }).expect("a view");
        let oracle = &ORACLES[which];
        for (file, offset, len) in reads {
            let file = file.index(oracle.len());
            let expected = &oracle[file];
            if matches!(view.tree().nodes()[file].kind, NodeKind::Dir { .. }) {
                continue;
            }
            // Past the end too.
            let offset = offset.index(expected.len() + 2);
            let end = (offset + len).min(expected.len());
            let expected = &expected[offset.min(end)..end];
            let mut buf = vec![0xaa; len];
            let got = view.read_at(file, offset as u64, &mut buf).expect("readable");
            prop_assert_eq!(&buf[..got], expected, "{:?}: {} at {}", request, len, offset);
            let shown = view.show_at(file, offset as u64, &mut buf, <[u8]>::to_vec);
            prop_assert_eq!(&shown.expect("readable"), expected, "shown: {:?}", request);
        }
    }
}

#[test]
fn an_export_is_what_a_view_shows() {
    for ((model, request), oracle) in cases().iter().zip(ORACLES.iter()).step_by(3) {
        let budget = Budget { cache: 1 << 20, chunk: 30_000, ahead: 0 };
        let view = View::open(model, request, budget).expect("a view");
        let out = tempfile::tempdir().expect("a directory");
        let options = Options { threads: 3, overwrite: false, step: Step::Whole };
        let summary = export(&view, out.path(), options, &|_, _| {}).expect("exported");
        let mut files = 0;
        for (id, node) in view.tree().nodes().iter().enumerate() {
            if let NodeKind::File { .. } = node.kind {
                let written = std::fs::read(out.path().join(view.tree().path(id))).expect("there");
                assert!(written == oracle[id], "{request:?}: {:?}", node.name);
                files += 1;
            }
        }
        assert_eq!(summary.files, files);
        assert_eq!(std::fs::read_dir(out.path()).expect("listed").count(), files);
    }
}

#[test]
fn a_quantized_source_is_read_once_and_is_the_same_in_small_chunks() {
    assert!(QUANTIZED.len() >= 10);
    for ((source, request), oracle) in cases().iter().zip(ORACLES.iter()) {
        if *source == model_for(request) || *source == MIXTURE.path() {
            continue;
        }
        for chunk in [5_000, 1 << 20] {
            let budget = Budget { cache: 1 << 30, chunk, ahead: 0 };
            let view = View::open(source, request, budget).expect("a view");
            for (file, expected) in oracle.iter().enumerate() {
                assert!(&whole(&view, file) == expected, "{request:?} of {source:?}: {file}");
            }
            let all: u64 = std::fs::read_dir(source)
                .expect("listed")
                .map(|entry| entry.expect("an entry").metadata().expect("known").len())
                .sum();
            let read = view.stats().source_bytes;
            assert!(chunk < 1 << 20 || read * 10 <= all * 11, "{request:?}: {read} of {all}");
        }
    }
}

#[test]
fn what_is_not_quantized_is_what_the_source_has() {
    for request in &requests()[..FORMATS.len()] {
        let view = View::open(model_for(request), request, Budget::default()).expect("a view");
        let mut kept = 0;
        let tokenizer = view.tree().lookup(0, "tokenizer.json".as_ref()).expect("shown");
        let source = std::fs::read(model_for(request).join("tokenizer.json")).expect("there");
        assert_eq!(whole(&view, tokenizer), source);
        for shard in ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"] {
            let id = view.tree().lookup(0, shard.as_ref()).expect("shown");
            let shown = whole(&view, id);
            let shown = safetensors::SafeTensors::deserialize(&shown).expect("a shard");
            let source = std::fs::read(model_for(request).join(shard)).expect("there");
            let source = safetensors::SafeTensors::deserialize(&source).expect("a shard");
            let model = &view.models()[0];
            for (id, tensor) in model.checkpoint().catalog().tensors().iter().enumerate() {
                let name = tensor.name.as_str();
                let Decision::Keep { .. } = model.plan().assignment[id] else { continue };
                assert_eq!(shown.tensor(name).ok(), source.tensor(name).ok(), "{name}");
                kept += usize::from(source.tensor(name).is_ok());
            }
        }
        // Norms at the least.
        assert!(kept >= 3, "{request:?}");
    }
}

#[test]
fn a_stack_holds_what_each_expert_would_be_alone_in_order() {
    let open = |model_type: &str| {
        let dir = tempfile::tempdir().expect("a directory");
        support::mixture(dir.path());
        let path = dir.path().join("config.json");
        let config = std::fs::read_to_string(&path).expect("there");
        std::fs::write(&path, config.replace("qwen3_moe", model_type)).expect("written");
        let request = Request { format: "mlx".to_owned(), ..Request::default() };
        let view = View::open(dir.path(), &request, Budget::default()).expect("a view");
        (dir, view)
    };
    let shard =
        |view: &View, name: &str| whole(view, view.tree().lookup(0, name.as_ref()).expect("shown"));
    let (_mixture, view) = open("qwen3_moe");
    // The first expert is in the second shard.
    let stacked = shard(&view, "model-00002-of-00002.safetensors");
    let stacked = safetensors::SafeTensors::deserialize(&stacked).expect("a shard");
    for (projection, rows, columns) in [("gate_proj", 128, 256), ("down_proj", 256, 128)] {
        for (part, words) in [("weight", columns / 8), ("scales", columns / 64)] {
            let name = format!("model.layers.0.mlp.switch_mlp.{projection}.{part}");
            let found = stacked.tensor(&name).expect("shown");
            assert_eq!(found.shape(), [3, rows, words], "{name}");
            for (number, bytes) in found.data().chunks(found.data().len() / 3).enumerate() {
                let alone = tempfile::tempdir().expect("a directory");
                let source = format!("model.layers.0.mlp.experts.{number}.{projection}.weight");
                let weight =
                    support::Tensor::weights(&source, safetensors::Dtype::BF16, &[rows, columns]);
                // Under a name that is no expert's.
                let weight = support::Tensor { name: "layers.0.up_proj.weight".into(), ..weight };
                let shards = [("model.safetensors", vec![weight])];
                support::write_checkpoint(alone.path(), &shards, &serde_json::json!({}));
                let request = Request { format: "mlx".to_owned(), ..Request::default() };
                let view = View::open(alone.path(), &request, Budget::default()).expect("a view");
                let single = shard(&view, "model.safetensors");
                let single = safetensors::SafeTensors::deserialize(&single).expect("a shard");
                let expected = single.tensor(&format!("layers.0.up_proj.{part}")).expect("shown");
                assert!(bytes == expected.data(), "{name} {number}");
            }
        }
    }
    let index = view.tree().lookup(0, "model.safetensors.index.json".as_ref()).expect("shown");
    let index: serde_json::Value = serde_json::from_slice(&whole(&view, index)).expect("JSON");
    assert_eq!(
        index["weight_map"]["model.layers.0.mlp.switch_mlp.up_proj.biases"],
        "model-00002-of-00002.safetensors"
    );
    let (_unknown, view) = open("somebody_s_own");
    assert!(view.warnings().iter().any(|warning| warning.starts_with("experts are kept")));
    let kept = shard(&view, "model-00001-of-00002.safetensors");
    let kept = safetensors::SafeTensors::deserialize(&kept).expect("a shard");
    assert!(kept.tensor("model.layers.0.mlp.experts.1.up_proj.weight").is_ok());
}
