//! What is asked for is given, or refused in one line: several schemes, and loaders by name.

mod support;

use std::path::Path;

use aq_fs::loader;
use aq_fs::recipe::{Decision, Request};
use aq_fs::view::{Budget, View};

fn request(format: &str, sets: &[&str]) -> Request {
    let set = sets.iter().map(|set| set.parse().expect("valid")).collect();
    Request { format: format.to_owned(), set, ..Request::default() }
}

/// The scheme of each module named, or why it is kept; and the warnings.
fn decided(
    model: &Path,
    request: &Request,
    modules: &[&str],
) -> Result<(Vec<String>, Vec<String>), String> {
    let view = View::open(model, request, Budget::default()).map_err(|error| error.to_string())?;
    let model = &view.models()[0];
    let catalog = model.checkpoint().catalog();
    let what = |module: &&str| {
        let id = catalog.find(&format!("{module}.weight")).expect("there");
        match &model.plan().assignment[id] {
            Decision::Quantize(scheme) => scheme.to_string(),
            Decision::Keep { reason, .. } => format!("kept: {reason}"),
        }
    };
    Ok((modules.iter().map(what).collect(), view.warnings().to_vec()))
}

const Q: &str = "model.layers.0.self_attn.q_proj";
const K: &str = "model.layers.0.self_attn.k_proj";
const O: &str = "model.layers.0.self_attn.o_proj";
const HEAD: &str = "lm_head";

#[test]
fn modules_get_the_last_scheme_that_is_set_for_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(dir.path());
    let int = |bits: u8, group: &str| format!("int{bits}, {group}, symmetric, search");
    let affine = |bits: u8, group: u32| format!("affine {bits}-bit, groups of {group}, search");
    #[track_caller]
    fn check(model: &Path, request: Request, expected: [(&str, String); 3], warning: &str) {
        let modules = expected.each_ref().map(|(module, _)| *module);
        let (found, warnings) = decided(model, &request, &modules).expect("planned");
        assert_eq!(found, expected.map(|(_, what)| what), "{:?}", request.set);
        let warns = warnings.iter().any(|line| line.contains(warning));
        assert!(warns || warning.is_empty(), "{warnings:?}");
    }
    check(
        &model,
        request("compressed-tensors", &["*.o_proj=8", "*.0.*.o_proj=3/channel"]),
        [
            (Q, int(4, "groups of 128")),
            (O, int(3, "per channel")),
            ("model.layers.1.self_attn.o_proj", int(8, "groups of 128")),
        ],
        "without `dequantize=True`",
    );
    check(
        &model,
        request("compressed-tensors", &["*.q_proj=8"]),
        [(Q, int(8, "groups of 128")), (K, int(8, "groups of 128")), (O, int(4, "groups of 128"))],
        "\"*.q_proj\" takes in k_proj, v_proj too",
    );
    check(
        &model,
        request("mlx", &["*.q_proj=8", "lm_head=6/32"]),
        [(Q, affine(8, 64)), (K, affine(4, 64)), (HEAD, affine(6, 32))],
        "",
    );
    check(
        &model,
        request("mlx", &["*=8", "*.q_proj=keep", "nothing.*=3"]),
        [
            (Q, "kept: --set \"*.q_proj\"".to_owned()),
            (K, "kept: fused with q_proj, which is kept: --set \"*.q_proj\"".to_owned()),
            (O, affine(8, 64)),
        ],
        "--set \"nothing.*\" matches no module",
    );
    check(
        &model,
        request("bnb-nf4", &["*.o_proj=16"]),
        [
            (O, "kept: --set \"*.o_proj\"".to_owned()),
            (Q, "NF4, flat blocks of 64, search".to_owned()),
            (HEAD, "kept: output head".to_owned()),
        ],
        "",
    );
}

#[test]
fn experts_share_what_any_of_them_is_set_to() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::mixture(dir.path());
    let up = "model.layers.0.mlp.experts.0.up_proj";
    let down = "model.layers.0.mlp.experts.1.down_proj";
    let sets = request("compressed-tensors", &["*.experts.2.up_proj=8"]);
    let (found, warnings) = decided(&model, &sets, &[up, down, Q]).expect("planned");
    let int = |bits: u8| format!("int{bits}, groups of 128, symmetric, search");
    assert_eq!(found, [int(8), int(8), int(4)]);
    assert!(warnings.iter().any(|line| line.contains("takes in down_proj, gate_proj, up_proj")));
    let sets = request("mlx", &["*.experts.2.up_proj=8"]);
    let (found, _) = decided(&model, &sets, &[up, down]).expect("planned");
    assert_eq!(found, ["affine 8-bit, groups of 64, search", "affine 4-bit, groups of 64, search"]);
}

#[test]
fn what_a_format_can_t_mix_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(dir.path());
    let cases = [
        ("bnb-nf4", "*.o_proj=8", "--set \"*.o_proj\": bnb-nf4 has 4 bits, not 8"),
        ("bnb-nf4", "*.o_proj=4/128", "bnb-nf4 has one scheme for a whole checkpoint"),
        ("fp8-block", "*.o_proj=8", "fp8-block has one scheme for a whole checkpoint"),
        ("mlx", "*.o_proj=7", "--set \"*.o_proj\": mlx has 2, 3, 4, 5, 6 or 8 bits, not 7"),
        (
            "mlx",
            "*.o_proj=4/256",
            "mlx has a scale for groups of 32, 64 or 128, not for 256 weights",
        ),
        ("compressed-tensors", "re:(=4", "--set \"re:(\" is not a valid pattern"),
    ];
    for (format, set, complaint) in cases {
        let error = decided(&model, &request(format, &[set]), &[]).expect_err("refused");
        assert!(error.contains(complaint), "{format} {set}: {error}");
    }
}

#[test]
fn what_a_loader_can_t_load_is_refused_with_the_module_and_a_way_out() {
    let dir = tempfile::tempdir().expect("a directory");
    let llama = support::llama(&dir.path().join("llama"));
    let oddly = dir.path().join("oddly");
    let weight =
        support::Tensor::weights("layers.0.up_proj.weight", safetensors::Dtype::BF16, &[128, 128]);
    let shards = [("weights.safetensors", vec![weight])];
    support::write_checkpoint(&oddly, &shards, &serde_json::json!({}));
    let ct = || request("compressed-tensors", &[]);
    let asymmetric =
        |sets| Request { symmetric: Some(false), ..request("compressed-tensors", sets) };
    let bits = |bits| Request { bits: Some(bits), ..ct() };
    let gptq = |symmetric| Request { symmetric: Some(symmetric), ..request("gptq", &[]) };
    let cases = [
        ("transformers", &llama, ct(), None),
        ("transformers", &llama, asymmetric(&[]), None),
        ("transformers", &llama, request("compressed-tensors", &["*.o_proj=8"]), None),
        (
            "transformers",
            &llama,
            asymmetric(&["*.o_proj=8"]),
            Some(
                "`model.layers.0.self_attn.o_proj` has int8, groups of 128, asymmetric, search: --symmetric, or no --set",
            ),
        ),
        ("vllm", &llama, bits(8), None),
        (
            "vllm",
            &llama,
            bits(3),
            Some("no kernel for int3, groups of 128, symmetric, search (`model.layers.0."),
        ),
        (
            "vllm",
            &llama,
            request("compressed-tensors", &["*.o_proj=6"]),
            Some("o_proj`): it has 4 and 8"),
        ),
        (
            "vllm",
            &llama,
            request("compressed-tensors", &["*.o_proj=4/16"]),
            Some("groups of 32, 64"),
        ),
        ("vllm", &llama, gptq(true), None),
        (
            "vllm",
            &llama,
            gptq(false),
            Some("no GPTQ of int4, groups of 128, asymmetric, search (`"),
        ),
        ("vllm", &llama, request("awq", &[]), None),
        ("vllm", &llama, request("mlx", &[]), Some("vllm reads no mlx: dense, compressed-tensors")),
        ("mlx-lm", &llama, request("mlx", &[]), None),
        ("mlx-lm", &oddly, request("mlx", &[]), Some("and no weights.safetensors")),
        (
            "diffusers",
            &llama,
            request("bnb-nf4", &[]),
            Some("model_index.json: --for transformers"),
        ),
        ("mistralrs", &llama, request("fp8-block", &[]), Some("for a rope_theta")),
        (
            "mistralrs",
            &oddly,
            request("mlx", &["*=5"]),
            Some("fails on 5 bits (`layers.0.up_proj`)"),
        ),
    ];
    for (name, model, request, complaint) in cases {
        let view = View::open(model, &request, Budget::default()).expect("a view");
        let loader = loader::find(name).expect("there");
        let error = loader.check(&view, &request).err().map(|error| error.to_string());
        match (&error, complaint) {
            (None, None) => {}
            (Some(error), Some(complaint)) if error.contains(complaint) => {}
            _ => panic!("{name}, {request:?}: {error:?}"),
        }
    }
}
