//! What `--quality reference` shows is what each format's own tool wrote, byte for byte.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use aq_fs::export::{Options, Step, export};
use aq_fs::quant::{Granularity, Quality, Real, Storage};
use aq_fs::recipe::{Request, ScaleFormat};
use aq_fs::view::{Budget, NodeKind, View};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Every tensor of a view: its element type, shape and the digest of its bytes.
fn shown(view: &View) -> BTreeMap<String, (String, Vec<usize>, String)> {
    let mut tensors = BTreeMap::new();
    for (id, node) in view.tree().nodes().iter().enumerate() {
        let NodeKind::File { size } = node.kind else { continue };
        if !node.name.to_string_lossy().ends_with(".safetensors") {
            continue;
        }
        let mut file = vec![0; size as usize];
        assert_eq!(view.read_at(id, 0, &mut file).expect("readable"), file.len());
        let parsed = SafeTensors::deserialize(&file).expect("a safetensors file");
        for (name, tensor) in parsed.tensors() {
            let digest: String =
                Sha256::digest(tensor.data()).iter().map(|byte| format!("{byte:02x}")).collect();
            let row = (tensor.dtype().to_string(), tensor.shape().to_vec(), digest);
            assert!(tensors.insert(name.clone(), row).is_none(), "{name} stands twice");
        }
    }
    tensors
}

/// The bytes of one tensor of a view.
fn bytes_of(view: &View, name: &str) -> Vec<u8> {
    let model = &view.models()[0];
    let catalog = model.checkpoint().catalog();
    let items = &model.plan().items;
    let item = items.iter().find(|item| model.plan().name(catalog, item) == name).expect(name);
    let shard = catalog[item.tensor].shard();
    let shard = model.checkpoint().shards()[shard].file.name().to_owned();
    let id = view.tree().lookup(0, shard.as_ref()).expect("shown");
    let NodeKind::File { size } = view.tree().nodes()[id].kind else { panic!("a directory") };
    let mut file = vec![0; size as usize];
    view.read_at(id, 0, &mut file).expect("readable");
    SafeTensors::deserialize(&file).expect("a shard").tensor(name).expect(name).data().to_vec()
}

/// Codes of quantized scales are off by one at most, what they are relative to by rounding, and JSON
/// says the same but for rounding.
#[track_caller]
fn check_loosely(name: &str, ours: &[u8], theirs: &[u8]) {
    if name.ends_with(".nested_absmax") {
        let values = |bytes: &[u8]| -> Vec<f32> {
            bytes.as_chunks().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
        };
        let (ours, theirs) = (values(ours), values(theirs));
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() * 1e-6;
        assert!(ours.iter().zip(&theirs).all(close), "{name}: {ours:?} are not {theirs:?}");
        return;
    }
    if !name.contains(".quant_state.") {
        assert_eq!(ours.len(), theirs.len(), "{name}");
        assert!(ours.iter().zip(theirs).all(|(a, b)| a.abs_diff(*b) <= 1), "{name}");
        return;
    }
    let [mut ours, mut theirs] =
        [ours, theirs].map(|text| serde_json::from_slice::<Value>(text).expect("JSON"));
    let [a, b] = [&mut ours, &mut theirs]
        .map(|state| state["nested_offset"].take().as_f64().expect("a number"));
    assert!((a - b).abs() <= b.abs() * 1e-6, "{name}: {a} is not {b}");
    assert_eq!(ours, theirs, "{name}");
}

fn file(view: &View, name: &str) -> Value {
    let id = view.tree().lookup(0, name.as_ref()).expect("shown");
    let NodeKind::File { size } = view.tree().nodes()[id].kind else { panic!("a directory") };
    let mut bytes = vec![0; size as usize];
    view.read_at(id, 0, &mut bytes).expect("readable");
    serde_json::from_slice(&bytes).expect("JSON")
}

/// The request that makes a checkpoint of that name: `ct-w4a16-asym-g128`, `mlx-affine-4b-g64`.
fn request(name: &str) -> Request {
    let request = |format: &str| Request {
        format: format.to_owned(),
        quality: Quality::Reference,
        ..Request::default()
    };
    let number = |text: &str| text.parse::<u32>().expect("a number");
    if let Some(rest) = name.strip_prefix("ct-w") {
        let (bits, rest) = rest.split_once("a16-").expect("weight-only");
        let (symmetric, group) = match rest.strip_prefix("asym-") {
            Some(group) => (false, group),
            None => (true, rest),
        };
        let granularity =
            group.strip_prefix('g').map_or(Granularity::Channel, |g| Granularity::Group(number(g)));
        return Request {
            bits: Some(number(bits) as u8),
            symmetric: Some(symmetric),
            granularity: Some(granularity),
            ..request("compressed-tensors")
        };
    }
    if let Some(rest) = name.strip_prefix("mlx-affine-") {
        let (bits, group) = rest.split_once("b-g").expect("bits and group");
        return Request {
            bits: Some(number(bits) as u8),
            granularity: Some(Granularity::Group(number(group))),
            ..request("mlx")
        };
    }
    if let Some(rest) = name.strip_prefix("gptq-") {
        let second = rest.strip_prefix("v2-");
        let (bits, symmetry) =
            second.unwrap_or(rest).split_once("b-g128-").expect("bits and symmetry");
        // gptqmodel writes what is asymmetric in the second version alone.
        let format = if second.is_some() || symmetry == "asym" { "gptq-v2" } else { "gptq" };
        return Request {
            bits: Some(number(bits) as u8),
            symmetric: Some(symmetry == "sym"),
            ..request(format)
        };
    }
    match name {
        "awq-gemm-4b-g128" => request("awq"),
        "gptoss-mxfp4" => request("mxfp4"),
        "ct-int8-w8a8" => request("ct-int8"),
        "ct-fp8-dynamic" => request("ct-fp8"),
        "ct-nvfp4a16" => request("ct-nvfp4"),
        "ct-mxfp4a16" => request("ct-mxfp4"),
        "ct-mxfp8a16" => request("ct-mxfp8"),
        "hf-fp8-block" => request("fp8-block"),
        "hf-fp8-ue8m0" => {
            Request { scale_format: Some(ScaleFormat::Ue8m0), ..request("fp8-block") }
        }
        "bnb-nf4-dq" => Request { double_quant: true, ..request("bnb-nf4") },
        "bnb-nf4-bf16storage" => Request { storage: Some(Storage::Bf16), ..request("bnb-nf4") },
        // The others are named as the format.
        name => request(name),
    }
}

fn from_hex(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().expect("hex digits").as_bytes();
    let byte = |pair: &[u8]| {
        u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("a byte")
    };
    hex.chunks(2).map(byte).collect()
}

/// Members of a config that say nothing of how the bytes are to be read.
const SILENT: &[&str] = &[
    // Lists of what is kept, which are compared apart.
    "ignore",
    "llm_int8_skip_modules",
    "modules_to_not_convert",
    "dynamic",
    // What a loader computes in.
    "bnb_4bit_compute_dtype",
];

/// Whatever is declared, upstream declares as well, and alike.
#[track_caller]
fn check_declared(name: &str, ours: &Value, theirs: &Value) {
    match ours {
        Value::Object(members) => {
            for (key, value) in members.iter().filter(|(key, _)| !SILENT.contains(&key.as_str())) {
                check_declared(&format!("{name}.{key}"), value, &theirs[key]);
            }
        }
        _ => assert_eq!(ours, theirs, "{name}"),
    }
}

/// Every tensor of a view is what was recorded of a checkpoint.
#[track_caller]
fn check_tensors(name: &str, view: &View, checkpoint: &Value) {
    let shown = shown(view);
    let expected: BTreeMap<String, (String, Vec<usize>, String)> =
        serde_json::from_value(checkpoint["tensors"].clone()).expect("rows");
    let names = |map: &BTreeMap<String, _>| map.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&shown), names(&expected), "{name}");
    let loose = checkpoint["loose"].as_object().cloned().unwrap_or_default();
    let differing: Vec<&String> = expected
        .iter()
        .filter(|(tensor, row)| &shown[*tensor] != *row && !loose.contains_key(*tensor))
        .map(|(t, _)| t)
        .collect();
    assert!(differing.is_empty(), "{name}: {differing:?}");
    for (tensor, hex) in &loose {
        check_loosely(tensor, &bytes_of(view, tensor), &from_hex(hex));
    }
}

#[test]
fn reference_quality_reproduces_every_recorded_checkpoint() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let recorded = std::fs::read(fixtures.join("golden.json")).expect("the fixture");
    let recorded: Value = serde_json::from_slice(&recorded).expect("JSON");
    let recorded = recorded.as_object().expect("checkpoints by name");
    assert!(recorded.len() >= 30);
    for (name, checkpoint) in recorded {
        let source = fixtures.join(source_of(name));
        let view = View::open(&source, &request(name), Budget::default()).expect(name);
        check_tensors(name, &view, checkpoint);
        let config = file(&view, "config.json");
        let (declared, upstream) =
            (&config["quantization_config"], &checkpoint["quantization_config"]);
        if declared["quant_method"] == "awq" {
            // Its tool declares it in GPTQ's terms, which AWQ's loaders don't read.
            assert_eq!(declared["bits"], upstream["bits"], "{name}");
            assert_eq!(declared["group_size"], upstream["group_size"], "{name}");
            assert_eq!(declared["version"], upstream["format"], "{name}");
            assert_eq!(upstream["sym"], !declared["zero_point"].as_bool().expect("told"), "{name}");
        } else {
            check_declared(name, declared, upstream);
        }
        let list = |config: &Value| {
            let keys = ["ignore", "llm_int8_skip_modules", "modules_to_not_convert"];
            let list = keys.iter().find_map(|key| config.get(key)?.as_array().cloned());
            list.unwrap_or_default()
        };
        for module in list(upstream) {
            assert!(list(declared).contains(&module), "{name}: {module} is not ignored");
        }
        if name.starts_with("mlx") {
            assert_eq!(&config["quantization"], declared, "{name}");
        } else if name.starts_with("gptq") {
            assert!(declared["dynamic"].get("-:^lm_head$").is_some(), "{name}");
        } else {
            assert!(list(declared).contains(&"lm_head".into()), "{name}");
        }
    }
}

/// The fixture that a recorded checkpoint was made from.
fn source_of(checkpoint: &str) -> &'static str {
    if checkpoint.starts_with("gptoss") { "gptoss-bf16" } else { "llama-bf16" }
}

/// What a checkpoint's own loader makes of each weight that it holds quantized.
fn decoded() -> Value {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let recorded = std::fs::read(fixtures.join("decoded.json")).expect("the fixture");
    serde_json::from_slice(&recorded).expect("JSON")
}

#[test]
fn every_recorded_checkpoint_decodes_to_what_its_loader_makes_of_it() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let recorded = std::fs::read(fixtures.join("golden.json")).expect("the fixture");
    let recorded: Value = serde_json::from_slice(&recorded).expect("JSON");
    let decoded = decoded();
    let dense = Request { format: "dense".to_owned(), ..Request::default() };
    let plain = ["llama-bf16", "gptoss-bf16"].map(|source| {
        let view = View::open(&fixtures.join(source), &dense, Budget::default());
        (source, shown(&view.expect("a view")))
    });
    let plain = BTreeMap::from(plain);
    let mut checked = 0;
    for (name, checkpoint) in recorded.as_object().expect("checkpoints by name") {
        let dir = tempfile::tempdir().expect("a directory");
        let source = fixtures.join(source_of(name));
        let view = View::open(&source, &request(name), Budget::default()).expect(name);
        let options = Options { threads: 2, overwrite: true, step: Step::Whole };
        export(&view, dir.path(), options, &|_, _| {}).expect("exported");
        // The loader was asked about its own tool's codes, so where ours are others, as some of
        // double quantization are, it has not said what they stand for.
        let is_other = |(part, hex): (&String, &Value)| {
            let weight = part.strip_suffix(".absmax")?;
            (bytes_of(&view, part) != from_hex(hex)).then(|| weight.to_owned())
        };
        let loose = checkpoint["loose"].as_object();
        let others: Vec<String> = loose.into_iter().flatten().filter_map(is_other).collect();
        let view = View::open(dir.path(), &dense, Budget::default());
        if !decoded[name].is_object() {
            // Nobody's loader has been asked.
            let error = view.expect_err(name).to_string();
            assert!(error.contains("quantized already and can't be decoded"), "{name}: {error}");
            continue;
        }
        let view = view.expect(name);
        // Whatever is not quantized is as in the original.
        let mut expected = plain[source_of(name)].clone();
        for (tensor, row) in decoded[name].as_object().expect("rows") {
            if source_of(name) == "gptoss-bf16" && !expected.contains_key(tensor) {
                // Of a second layer, which the fixture lacks.
                continue;
            }
            let row = serde_json::from_value(row.clone()).expect("a row");
            assert!(
                expected.insert(tensor.clone(), row).is_some(),
                "{name}: {tensor} has no original"
            );
        }
        let shown = shown(&view);
        let names = |map: &BTreeMap<String, _>| map.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&shown), names(&expected), "{name}");
        let differing: Vec<&String> = expected
            .iter()
            .filter(|(tensor, row)| &shown[*tensor] != *row && !others.contains(tensor))
            .map(|(t, _)| t)
            .collect();
        assert!(differing.is_empty(), "{name}: {differing:?}");
        let rows = decoded[name].as_object().expect("rows").len();
        assert!(others.len() < rows, "{name}: nothing is left to compare");
        let config = file(&view, "config.json");
        let original = std::fs::read(source.join("config.json")).expect("there");
        assert_eq!(config, serde_json::from_slice::<Value>(&original).expect("JSON"), "{name}");
        checked += 1;
    }
    assert!(checked >= 30, "only {checked}");
}

/// Writes the fixture in F32 below `dir`, every value times 1.1 so that no bits are left zero.
fn in_f32(dir: &Path) -> PathBuf {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-bf16");
    let out = dir.join("f32");
    std::fs::create_dir(&out).expect("made");
    for entry in std::fs::read_dir(fixture).expect("the fixture") {
        let path = entry.expect("an entry").path();
        let mut bytes = std::fs::read(&path).expect("readable");
        let to = out.join(path.file_name().expect("a name"));
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let parsed = SafeTensors::deserialize(&bytes).expect("a safetensors file");
            let widened: Vec<(String, Vec<usize>, Vec<u8>)> = parsed
                .tensors()
                .into_iter()
                .map(|(name, tensor)| {
                    assert_eq!(tensor.dtype(), Dtype::BF16, "{name}");
                    let value = |b: &[u8]| f32::from_le_bytes([0, 0, b[0], b[1]]) * 1.1;
                    let data = tensor.data().chunks(2).flat_map(|b| value(b).to_le_bytes());
                    (name, tensor.shape().to_vec(), data.collect())
                })
                .collect();
            let views = widened.iter().map(|(name, shape, data)| {
                (name, TensorView::new(Dtype::F32, shape.clone(), data).expect("a tensor"))
            });
            bytes = safetensors::serialize(views, None).expect("serialized");
        } else if path.ends_with("config.json") {
            let config = String::from_utf8(bytes).expect("UTF-8");
            bytes = config.replace("\"bfloat16\"", "\"float32\"").into_bytes();
        }
        std::fs::write(to, bytes).expect("written");
    }
    out
}

/// Writes what `dense --dtype f16` shows of a model in one directory.
fn in_f16(model: &Path, dir: &Path) -> PathBuf {
    let out = dir.join("f16");
    std::fs::create_dir(&out).expect("made");
    let request =
        Request { format: "dense".to_owned(), dtype: Some(Real::F16), ..Request::default() };
    let view = View::open(model, &request, Budget::default()).expect("a view");
    for (id, node) in view.tree().nodes().iter().enumerate() {
        let NodeKind::File { size } = node.kind else { continue };
        let mut bytes = vec![0; size as usize];
        view.read_at(id, 0, &mut bytes).expect("readable");
        std::fs::write(out.join(&node.name), bytes).expect("written");
    }
    out
}

#[test]
fn reference_quality_is_the_tools_bytes_from_f16_and_f32_too() {
    let dir = tempfile::tempdir().expect("a directory");
    let f32 = in_f32(dir.path());
    let f16 = in_f16(&f32, dir.path());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden_casts.json");
    let recorded = std::fs::read(path).expect("the fixture");
    let recorded: BTreeMap<String, BTreeMap<String, String>> =
        serde_json::from_slice(&recorded).expect("parts by checkpoint");
    let mut seen = [0, 0];
    for (checkpoint, expected) in &recorded {
        let (name, dtype) = checkpoint.split_once('@').expect("an element type");
        let source = if dtype == "f16" { &f16 } else { &f32 };
        seen[usize::from(dtype == "f16")] += 1;
        let view = View::open(source, &request(name), Budget::default()).expect(checkpoint);
        // One digest over all rows of the same last component, as record_golden.py has it.
        let mut parts: BTreeMap<String, Sha256> = BTreeMap::new();
        for (tensor, (dtype, shape, digest)) in shown(&view) {
            let part = tensor.rsplit('.').next().expect("a component").to_owned();
            let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
            let row = format!("{tensor} {dtype} {} {digest}\n", shape.join(","));
            parts.entry(part).or_default().update(row);
        }
        let hex = |sha: Sha256| sha.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let found: BTreeMap<String, String> =
            parts.into_iter().map(|(part, sha)| (part, hex(sha))).collect();
        assert_eq!(&found, expected, "{checkpoint}");
    }
    assert!(seen[0] >= 35 && seen[0] == seen[1], "{seen:?}");
}

/// Scales are relative to their mean, which torch sums up in an order that depends on the number of
/// threads (of 2^20 scales 1 and 2 threads made means an ulp apart), so no bytes of it are the right ones.
#[test]
fn double_quantization_is_the_tools_from_f16_and_f32_but_for_a_mean() {
    let dir = tempfile::tempdir().expect("a directory");
    let f32 = in_f32(dir.path());
    let f16 = in_f16(&f32, dir.path());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden_double.json");
    let recorded = std::fs::read(path).expect("the fixture");
    let recorded: Value = serde_json::from_slice(&recorded).expect("JSON");
    for (dtype, source) in [("f16", f16), ("f32", f32)] {
        let name = format!("bnb-nf4-dq@{dtype}");
        let view = View::open(&source, &request("bnb-nf4-dq"), Budget::default()).expect(&name);
        check_tensors(&name, &view, &recorded[&name]);
    }
}
