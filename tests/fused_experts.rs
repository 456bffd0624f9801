//! Experts that are stored in one tensor: in parts where a format has them so, and whole elsewhere.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use aq_fs::format::FORMATS;
use aq_fs::quant::Quality;
use aq_fs::recipe::{Decision, Request};
use aq_fs::view::{Budget, NodeKind, View};
use safetensors::SafeTensors;

/// The type, shape and bytes of every tensor, by name.
type Tensors = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

fn tensors_of(shards: impl Iterator<Item = Vec<u8>>) -> Tensors {
    let mut tensors = Tensors::new();
    for bytes in shards {
        for (name, tensor) in SafeTensors::deserialize(&bytes).expect("a shard").tensors() {
            let tensor = (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec());
            tensors.insert(name, tensor);
        }
    }
    tensors
}

fn shown(view: &View) -> Tensors {
    tensors_of(view.shards().map(|(file, ..)| {
        let NodeKind::File { size } = view.tree().nodes()[file].kind else {
            panic!("a shard is a file")
        };
        let mut bytes = vec![0; size as usize];
        view.read_at(file, 0, &mut bytes).expect("readable");
        bytes
    }))
}

fn stored(model: &Path) -> Tensors {
    let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    tensors_of(files.map(|file| std::fs::read(model.join(file)).expect("there")).into_iter())
}

fn open(model: &Path, request: &Request, chunk: u64) -> View {
    View::open(model, request, Budget { cache: 1 << 30, chunk, ahead: 0 }).expect("a view")
}

fn request(format: &str, sets: &[&str]) -> Request {
    let set = sets.iter().map(|set| set.parse().expect("valid")).collect();
    Request { format: format.to_owned(), set, ..Request::default() }
}

/// Models of the same weights with fused experts, in both orders.
fn fused() -> [tempfile::TempDir; 2] {
    [false, true].map(|transposed| {
        let dir = tempfile::tempdir().expect("a directory");
        support::fused_mixture(dir.path(), transposed);
        dir
    })
}

const GATE_UP: &str = "model.layers.0.mlp.experts.gate_up_proj";
const DOWN: &str = "model.layers.0.mlp.experts.down_proj";

/// Formats that show experts one by one, or stack them.
const SPLITTING: [&str; 10] = [
    "compressed-tensors",
    "ct-int8",
    "ct-fp8",
    "ct-fp8-tensor",
    "ct-fp8-block",
    "ct-mxfp4",
    "mlx",
    "mlx-mxfp4",
    "mlx-mxfp8",
    "mlx-nvfp4",
];

#[test]
fn fused_experts_are_shown_as_those_that_are_stored_one_by_one() {
    let apart = tempfile::tempdir().expect("a directory");
    support::mixture(apart.path());
    let is_expert = |name: &str| name.contains(".switch_mlp.") || name.contains(".experts.");
    let experts = |tensors: Tensors| -> Tensors {
        tensors.into_iter().filter(|(name, _)| is_expert(name)).collect()
    };
    let config = |view: &View| {
        let file = view.tree().lookup(0, "config.json".as_ref()).expect("shown");
        let mut bytes = vec![0; 1 << 16];
        let len = view.read_at(file, 0, &mut bytes).expect("readable");
        let config: serde_json::Value = serde_json::from_slice(&bytes[..len]).expect("JSON");
        let mut declared = config["quantization_config"].clone();
        // In the order of the tensors.
        declared.as_object_mut().expect("declared").remove("ignore");
        declared
    };
    let mixed = request("mlx", &["*.experts.*.up_proj=8/32", "*.experts.*.down_proj=3"]);
    let eight = request("compressed-tensors", &["*.experts.*=8/32"]);
    let reference = Request { quality: Quality::Reference, ..request("mlx", &[]) };
    let formats = SPLITTING.map(|name| request(name, &[]));
    for request in formats.into_iter().chain([mixed, eight, reference]) {
        let view = open(apart.path(), &request, 1 << 20);
        let (expected, declared) = (experts(shown(&view)), config(&view));
        assert!(expected.len() >= 6, "{:?}", expected.keys());
        for model in &fused() {
            for chunk in [1, 5_000, 1 << 20] {
                let view = open(model.path(), &request, chunk);
                assert!(experts(shown(&view)) == expected, "{request:?}, chunks of {chunk}");
                assert_eq!(config(&view), declared, "{request:?}");
                let surveyed = !view.models()[0].plan().surveys.is_empty();
                let most = if surveyed { 2.1 } else { 1.1 };
                let read = view.stats().source_bytes as f64;
                let ratio = read / view.models()[0].source_len() as f64;
                assert!((1.0..=most).contains(&ratio), "{request:?}: {ratio}");
            }
            let view = open(model.path(), &request, 1 << 20);
            assert_eq!(view.models()[0].source_len(), source_len(model.path()));
        }
    }
}

/// Bytes of all tensors.
fn source_len(model: &Path) -> u64 {
    stored(model).values().map(|(.., bytes)| bytes.len() as u64).sum()
}

#[test]
fn other_formats_show_them_as_they_are() {
    for format in FORMATS.iter().map(|format| format.name()) {
        if support::is_for_gpt_oss(format) || SPLITTING.contains(&format) {
            continue;
        }
        for model in &fused() {
            let (shown, stored) =
                (shown(&open(model.path(), &request(format, &[]), 1 << 20)), stored(model.path()));
            for name in [GATE_UP, DOWN] {
                assert!(shown.get(name) == stored.get(name), "{format}: {name}");
            }
        }
    }
}

#[test]
fn a_mixture_of_which_something_is_kept_is_kept_whole() {
    for model in &fused() {
        let stored = stored(model.path());
        let check = |request: &Request, reasons: [&str; 2]| {
            let view = open(model.path(), request, 1 << 20);
            let shown = shown(&view);
            let (catalog, plan) =
                (view.models()[0].checkpoint().catalog(), view.models()[0].plan());
            for (name, expected) in [GATE_UP, DOWN].into_iter().zip(reasons) {
                assert!(shown.get(name) == stored.get(name), "{request:?}: {name}");
                let id = catalog.find(name).expect("there");
                let Decision::Keep { reason, .. } = &plan.assignment[id] else {
                    panic!("{name} is quantized")
                };
                assert_eq!(reason, expected, "{request:?}: {name}");
            }
            let is_single =
                |name: &String| name.contains("switch_mlp") || name.contains(".experts.0");
            assert!(!shown.keys().any(is_single), "{request:?}");
            assert!(!plan.assignment.ignore().iter().any(|name| name.contains("experts")));
            let scales = ["scales", "weight_scale"];
            let scales = scales.map(|scales| format!("model.layers.0.self_attn.o_proj.{scales}"));
            assert!(scales.iter().any(|scales| shown.contains_key(scales)), "{request:?}");
            let warnings = view.warnings().join("\n");
            assert!(!warnings.contains("matches no module"), "{warnings}");
        };
        for format in SPLITTING {
            let skip = Request { skip: vec!["*.experts.*".to_owned()], ..request(format, &[]) };
            check(&skip, ["--skip \"*.experts.*\""; 2]);
        }
        let kept = "--set \"*.experts.*.down_proj\"";
        check(
            &request("mlx", &["*.experts.*.down_proj=keep"]),
            [&format!("split with down_proj, which is kept: {kept}"), kept],
        );
    }
}

#[test]
fn experts_of_a_llama4_are_linears_and_kept_ones_too() {
    let apart = tempfile::tempdir().expect("a directory");
    support::mixture(apart.path());
    let apart = stored(apart.path());
    for model in &fused() {
        let path = model.path().join("config.json");
        let config = std::fs::read_to_string(&path).expect("there");
        std::fs::write(&path, config.replace("qwen3_moe", "llama4")).expect("written");
        for format in ["compressed-tensors", "ct-fp8", "ct-nvfp4", "bnb-nf4", "bnb-int8"] {
            let skip = Request { skip: vec!["*.experts.*".to_owned()], ..request(format, &[]) };
            let view = open(model.path(), &skip, 1 << 20);
            let shown = shown(&view);
            for (name, tensor) in apart.iter().filter(|(name, _)| name.contains(".experts.")) {
                assert!(shown.get(name) == Some(tensor), "{format}: {name}");
            }
            let ignore = view.models()[0].plan().assignment.ignore();
            assert!(ignore.iter().any(|name| name.contains("experts")), "{format}: {ignore:?}");
            assert!(!shown.contains_key(GATE_UP) && !shown.contains_key(DOWN));
            let module = "model.layers.0.mlp.experts.1.up_proj";
            let shown = self::shown(&open(model.path(), &request(format, &[]), 1 << 20));
            let scales = ["weight_scale", "weight.absmax", "SCB"];
            let scales = scales.map(|scales| format!("{module}.{scales}"));
            assert!(scales.iter().any(|scales| shown.contains_key(scales)), "{format}");
            // Where nothing is quantized, the loader makes no such modules.
            let none = Request { skip: vec!["*".to_owned()], ..request(format, &[]) };
            assert!(self::shown(&open(model.path(), &none, 1 << 20)) == stored(model.path()));
        }
    }
}

#[test]
fn experts_of_an_unknown_model_are_kept() {
    for model in &fused() {
        let path = model.path().join("config.json");
        let config = std::fs::read_to_string(&path).expect("there");
        std::fs::write(&path, config.replace("qwen3_moe", "somebody_s_own")).expect("written");
        for format in SPLITTING {
            let view = open(model.path(), &request(format, &[]), 1 << 20);
            let (shown, stored) = (shown(&view), stored(model.path()));
            assert!(shown.get(GATE_UP) == stored.get(GATE_UP), "{format}");
            assert!(shown.get(DOWN) == stored.get(DOWN), "{format}");
            let warnings = view.warnings().join("\n");
            assert!(warnings.contains("experts fused in one tensor are kept"), "{warnings}");
        }
    }
}
