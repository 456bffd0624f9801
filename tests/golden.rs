//! What `--quality reference` shows is what each format's own tool wrote, byte for byte.

use std::collections::BTreeMap;
use std::path::Path;

use aq_fs::quant::{Granularity, Quality};
use aq_fs::recipe::Request;
use aq_fs::view::{Budget, NodeKind, View};
use safetensors::SafeTensors;
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

fn file(view: &View, name: &str) -> Value {
    let id = view.tree().lookup(0, name.as_ref()).expect("shown");
    let NodeKind::File { size } = view.tree().nodes()[id].kind else { panic!("a directory") };
    let mut bytes = vec![0; size as usize];
    view.read_at(id, 0, &mut bytes).expect("readable");
    serde_json::from_slice(&bytes).expect("JSON")
}

/// The request that makes a checkpoint of that name: `ct-w4a16-asym-g128`, `ct-int8-w8a8`.
fn request(name: &str) -> Request {
    let mut request = Request { quality: Quality::Reference, ..Request::default() };
    if name == "ct-int8-w8a8" {
        request.format = "ct-int8".to_owned();
        return request;
    }
    let rest = name.strip_prefix("ct-w").expect("named by its scheme");
    let (bits, rest) = rest.split_once("a16-").expect("weight-only");
    request.bits = Some(bits.parse().expect("a number of bits"));
    let (symmetric, group) = match rest.strip_prefix("asym-") {
        Some(group) => (false, group),
        None => (true, rest),
    };
    request.symmetric = Some(symmetric);
    request.granularity = Some(match group.strip_prefix('g') {
        Some(size) => Granularity::Group(size.parse().expect("a group size")),
        None => Granularity::Channel,
    });
    request
}

#[test]
fn reference_quality_reproduces_every_recorded_checkpoint() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let recorded = std::fs::read(fixtures.join("golden.json")).expect("the fixture");
    let recorded: Value = serde_json::from_slice(&recorded).expect("JSON");
    let recorded = recorded.as_object().expect("checkpoints by name");
    assert!(recorded.len() >= 11);
    for (name, checkpoint) in recorded {
        let view = View::open(&fixtures.join("llama-bf16"), &request(name), Budget::default())
            .expect(name);
        let shown = shown(&view);
        let expected: BTreeMap<String, (String, Vec<usize>, String)> =
            serde_json::from_value(checkpoint["tensors"].clone()).expect("rows");
        let names = |map: &BTreeMap<String, _>| map.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&shown), names(&expected), "{name}");
        for (tensor, row) in &expected {
            assert_eq!(&shown[tensor], row, "{name}: {tensor}");
        }

        let declared = &file(&view, "config.json")["quantization_config"];
        let upstream = &checkpoint["quantization_config"];
        for key in ["quant_method", "format", "quantization_status"] {
            assert_eq!(declared[key], upstream[key], "{name}: {key}");
        }
        let ignore = declared["ignore"].as_array().expect("a list");
        for module in upstream["ignore"].as_array().expect("a list") {
            assert!(ignore.contains(module), "{name}: {module} is not ignored");
        }
        let group = |config: &Value| config["config_groups"]["group_0"].clone();
        for operand in ["weights", "input_activations"] {
            let (ours, theirs) = (&group(declared)[operand], &group(upstream)[operand]);
            assert_eq!(ours.is_null(), theirs.is_null(), "{name}: {operand}");
            for (key, value) in ours.as_object().into_iter().flatten() {
                assert_eq!(value, &theirs[key], "{name}: {operand}.{key}");
            }
        }
    }
}
