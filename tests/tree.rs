//! What a view shows of a directory: what it hides, follows, synthesizes and leaves alone.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use aq_fs::error::ErrorKind;
use aq_fs::format::FORMATS;
use aq_fs::quant::Real;
use aq_fs::recipe::Request;
use aq_fs::view::{Budget, NodeKind, View};
use safetensors::Dtype;
use serde_json::{Value, json};
use support::Tensor;

fn open(path: &Path) -> View {
    View::open(path, &Request::default(), Budget::default()).expect("a view")
}

/// The paths of all files, sorted.
fn files(view: &View) -> Vec<String> {
    let tree = view.tree();
    let mut paths: Vec<String> = (0..tree.nodes().len())
        .filter(|id| matches!(tree.nodes()[*id].kind, NodeKind::File { .. }))
        .map(|id| tree.path(id).to_str().expect("UTF-8").to_owned())
        .collect();
    paths.sort();
    paths
}

fn read(view: &View, path: &str) -> Vec<u8> {
    let tree = view.tree();
    let id = (0..tree.nodes().len())
        .find(|id| tree.path(*id) == Path::new(path))
        .unwrap_or_else(|| panic!("{path} is not shown"));
    let NodeKind::File { size } = tree.nodes()[id].kind else { panic!("{path} is a directory") };
    let mut bytes = vec![0; size as usize];
    view.read_at(id, 0, &mut bytes).expect("readable");
    bytes
}

fn parsed(view: &View, path: &str) -> Value {
    serde_json::from_slice(&read(view, path)).expect("JSON")
}

#[test]
fn weights_that_a_loader_might_pick_up_instead_are_hidden() {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(dir.path());
    let shard = |name: &str| {
        let tensor = Tensor::weights("model.x.weight", Dtype::BF16, &[2, 2]);
        support::write_shard(&dir.path().join(name), &[tensor]);
    };
    for name in ["consolidated.safetensors", "model.safetensors", "adapter_model.safetensors"] {
        shard(name);
    }
    for name in ["pytorch_model.bin", "model.gguf", "x.pth", "README.md", "merges.txt"] {
        fs::write(dir.path().join(name), name).expect("written");
    }
    fs::create_dir(dir.path().join("onnx")).expect("made");
    fs::write(dir.path().join("onnx/a.bin"), "kept").expect("written");
    let view = open(dir.path());
    assert_eq!(
        files(&view),
        [
            "README.md",
            "adapter_model.safetensors",
            "config.json",
            "merges.txt",
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
            "onnx/a.bin",
            "tokenizer.json",
        ]
    );
    let hidden: Vec<_> =
        view.hidden().iter().map(|h| (h.path.to_str().expect("UTF-8"), h.reason)).collect();
    assert_eq!(
        hidden,
        [
            ("consolidated.safetensors", "a shard that the index does not name"),
            ("model.gguf", "weights in another format"),
            ("model.safetensors", "a shard that the index does not name"),
            ("pytorch_model.bin", "weights in another format"),
            ("x.pth", "weights in another format"),
        ]
    );
    assert_eq!(read(&view, "README.md"), b"README.md");
}

#[test]
fn the_index_is_synthesized_and_its_other_metadata_carried_through() {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(dir.path());
    let view = open(dir.path());
    let index = parsed(&view, "model.safetensors.index.json");
    assert_eq!(index["metadata"]["modality"], "text");
    let mut total = 0;
    let mut names = Vec::new();
    for shard in 1..=3 {
        let file = format!("model-0000{shard}-of-00003.safetensors");
        let bytes = read(&view, &file);
        let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("a shard");
        for (name, tensor) in tensors.tensors() {
            assert_eq!(index["weight_map"][&name], file, "{name}");
            total += tensor.data().len();
            names.push(name);
        }
    }
    assert_eq!(index["metadata"]["total_size"], total);
    assert_eq!(index["weight_map"].as_object().expect("a map").len(), names.len());
    assert!(names.contains(&"model.layers.0.mlp.gate_proj.weight_packed".to_owned()));
    assert!(names.contains(&"model.layers.0.mlp.down_proj.weight".to_owned()), "383 wide");
}

#[test]
fn headers_and_indexes_are_the_same_at_every_offset_and_to_every_reader() {
    let dir = tempfile::tempdir().expect("a directory");
    let expert = |i: usize| {
        let name = |leaf: &str| format!("model.layers.{}.mlp.experts.{i}.{leaf}.weight", i % 7);
        [("up_proj", [32, 128]), ("down_proj", [128, 32])]
            .map(|(leaf, shape)| Tensor::weights(&name(leaf), Dtype::BF16, &shape))
    };
    let odd = Tensor::weights("a \"name\" with \\ and \u{e9}\n", Dtype::F32, &[3]);
    let experts = |range: std::ops::Range<usize>| range.flat_map(expert);
    let shards = [
        ("model-00001-of-00002.safetensors", experts(0..190).chain([odd]).collect()),
        ("model-00002-of-00002.safetensors", experts(190..199).collect::<Vec<_>>()),
    ];
    support::write_checkpoint(dir.path(), &shards, &json!({ "model_type": "deepseek_v3" }));
    for format in FORMATS.iter().filter(|format| !support::is_for_gpt_oss(format.name())) {
        let request = Request { format: format.name().to_owned(), ..Request::default() };
        let open = || View::open(dir.path(), &request, Budget::default()).expect("a view");
        let view = open();
        let mut names = Vec::new();
        for file in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
            let shown = read(&view, file);
            let tensors = safetensors::SafeTensors::deserialize(&shown).expect("a shard");
            names.extend(tensors.names().into_iter().map(|name| (name.to_owned(), file)));
        }
        names.sort();
        let index = read(&view, "model.safetensors.index.json");
        let parsed: Value = serde_json::from_slice(&index).expect("JSON");
        let listed = parsed["weight_map"].as_object().expect("a map").iter();
        let listed = listed.map(|(name, file)| (name.clone(), file.as_str().expect("a name")));
        let mut listed: Vec<_> = listed.collect();
        listed.sort();
        assert_eq!(listed, names, "{}", format.name());
        // Another view, so that the readers are the first.
        let view = open();
        std::thread::scope(|scope| {
            for step in [97, 1000, 4096, 70_001] {
                for (path, limit) in
                    [(shards[0].0, 60_000), ("model.safetensors.index.json", index.len())]
                {
                    let (view, whole) = (&view, read(&open(), path));
                    scope.spawn(move || {
                        let file = view.tree().lookup(aq_fs::view::ROOT, path.as_ref());
                        let file = file.expect("shown");
                        for start in (0..limit.min(whole.len())).step_by(step) {
                            let expected = &whole[start..whole.len().min(start + step)];
                            let mut found = vec![0; expected.len()];
                            view.read_at(file, start as u64, &mut found).expect("readable");
                            assert!(found == expected, "{path}: {step} bytes from {start}");
                        }
                    });
                }
            }
        });
    }
}

#[test]
fn a_config_changes_by_one_member_and_names_every_kept_linear() {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(dir.path());
    let view = open(dir.path());
    let text = String::from_utf8(read(&view, "config.json")).expect("UTF-8");
    let source = fs::read_to_string(dir.path().join("config.json")).expect("there");
    let kept = source.trim_end().trim_end_matches('}').trim_end();
    assert!(text.starts_with(&format!("{kept},\n  \"quantization_config\": {{")), "{text}");
    let ignore = &parsed(&view, "config.json")["quantization_config"]["ignore"];
    for module in ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"] {
        assert!(ignore.as_array().expect("a list").contains(&json!(module)), "{module}");
    }
}

#[test]
fn where_nothing_is_quantized_every_file_is_the_source_s_own() {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(dir.path());
    let request = Request { skip: vec!["*".to_owned()], ..Request::default() };
    let view = View::open(dir.path(), &request, Budget::default()).expect("a view");
    for file in files(&view) {
        assert!(read(&view, &file) == fs::read(dir.path().join(&file)).expect("there"), "{file}");
    }
    assert_eq!(view.warnings(), ["nothing is left to quantize: shown as it is"]);
}

#[test]
fn a_hub_cache_snapshot_is_shown_as_plain_files() {
    let dir = tempfile::tempdir().expect("a directory");
    let (blobs, snapshot) = (dir.path().join("blobs"), dir.path().join("snapshots/abc"));
    support::llama(&blobs);
    fs::create_dir_all(&snapshot).expect("made");
    for entry in fs::read_dir(&blobs).expect("listed") {
        let name = entry.expect("an entry").file_name();
        symlink(Path::new("../../blobs").join(&name), snapshot.join(&name)).expect("linked");
    }
    let (view, plain) = (open(&snapshot), open(&blobs));
    assert_eq!(view.root(), snapshot.canonicalize().expect("there"));
    assert_eq!(files(&view), files(&plain));
    for file in files(&view) {
        assert!(read(&view, &file) == read(&plain, &file), "{file}");
    }
}

#[test]
fn a_pipeline_is_one_view_of_several_checkpoints() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("model_index.json"), "{}").expect("written");
    support::llama(&dir.path().join("text_encoder"));
    let transformer = dir.path().join("transformer");
    fs::create_dir(&transformer).expect("made");
    let weights = [Tensor::weights("blocks.0.attn.to_q.weight", Dtype::BF16, &[128, 128])];
    support::write_shard(&transformer.join("diffusion_pytorch_model.safetensors"), &weights);
    let config = r#"{"_class_name": "X", "_diffusers_version": "0.36.0"}"#;
    fs::write(transformer.join("config.json"), config).expect("written");
    let view = open(dir.path());
    let formats: Vec<&str> = view.models().iter().map(|model| model.format().name()).collect();
    assert_eq!(formats, ["compressed-tensors", "dense"]);
    let config = parsed(&view, "text_encoder/config.json");
    assert_eq!(config["quantization_config"]["quant_method"], "compressed-tensors");
    let shown = read(&view, "transformer/diffusion_pytorch_model.safetensors");
    let source = fs::read(transformer.join("diffusion_pytorch_model.safetensors")).expect("there");
    assert!(shown == source);
    assert!(view.warnings().iter().any(|w| w.starts_with("transformer: shown as it is")));
}

#[test]
fn a_pipeline_s_own_components_can_carry_the_error_of_a_format() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("model_index.json"), "{}").expect("written");
    support::llama(&dir.path().join("text_encoder"));
    let transformer = dir.path().join("transformer");
    fs::create_dir(&transformer).expect("made");
    let weights = [Tensor::weights("blocks.0.attn.to_q.weight", Dtype::BF16, &[128, 128])];
    let file = "transformer/diffusion_pytorch_model.safetensors";
    support::write_shard(&dir.path().join(file), &weights);
    let config = r#"{"_class_name": "X", "_diffusers_version": "0.36.0"}"#;
    fs::write(transformer.join("config.json"), config).expect("written");
    let request = Request { simulate: Some("compressed-tensors".into()), ..Request::default() };
    let view = View::open(dir.path(), &request, Budget::default()).expect("a view");
    let encoder = parsed(&view, "text_encoder/config.json");
    assert_eq!(encoder["quantization_config"]["quant_method"], "compressed-tensors");
    assert_eq!(read(&view, "transformer/config.json"), config.as_bytes());
    let shown = read(&view, file);
    let shown = safetensors::SafeTensors::deserialize(&shown).expect("a shard");
    let shown = shown.tensor("blocks.0.attn.to_q.weight").expect("by its own name");
    assert_eq!((shown.dtype(), shown.shape()), (Dtype::BF16, &[128, 128][..]));
    assert!(shown.data() != weights[0].data, "it carries an error");
    // Outside of a pipeline there is nothing that this could mean.
    let error = View::open(&dir.path().join("text_encoder"), &request, Budget::default());
    let complaint = error.map(|_| ()).expect_err("opened").to_string();
    assert!(complaint.contains("--format dense"), "{complaint}");
}

#[test]
fn plain_numbers_have_the_type_asked_for_and_the_config_says_so() {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(dir.path());
    let text = r#"{"model_type": "llama", "torch_dtype": "bfloat16", "eps": Infinity,
        "text_config": {"dtype": "bfloat16", "layers": 2}, "other": {"layers": 3}}"#;
    fs::write(dir.path().join("config.json"), text).expect("written");
    for simulate in [None, Some("mlx".to_owned())] {
        let request = Request {
            format: "dense".to_owned(),
            dtype: Some(Real::F16),
            simulate,
            ..Request::default()
        };
        let view = View::open(dir.path(), &request, Budget::default()).expect("a view");
        let config = String::from_utf8(read(&view, "config.json")).expect("UTF-8");
        assert!(config.contains("\"eps\": Infinity"), "{config}");
        let config: Value = serde_json::from_str(&config.replace("Infinity", "0")).expect("JSON");
        assert_eq!(config["torch_dtype"], "float16");
        assert_eq!(config["text_config"], json!({"dtype": "float16", "layers": 2}));
        assert_eq!(config["other"], json!({"layers": 3}));
        for shard in 1..=3 {
            let file = format!("model-0000{shard}-of-00003.safetensors");
            let (shown, source) = (read(&view, &file), fs::read(dir.path().join(&file)));
            let source = source.expect("there");
            let shown = safetensors::SafeTensors::deserialize(&shown).expect("a shard");
            let source = safetensors::SafeTensors::deserialize(&source).expect("a shard");
            assert_eq!(shown.len(), source.len());
            for (name, tensor) in source.tensors() {
                let shown = shown.tensor(&name).expect("by its own name");
                assert_eq!((shown.dtype(), shown.shape()), (Dtype::F16, tensor.shape()), "{name}");
            }
        }
    }
}

#[test]
fn a_weight_with_a_nan_or_an_infinity_is_named_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let name = |layer: usize| format!("model.layers.{layer}.mlp.down_proj.weight");
    let tensors: Vec<Tensor> = [f32::NAN, 1.0, f32::NEG_INFINITY]
        .iter()
        .enumerate()
        .map(|(layer, odd)| {
            let mut tensor = Tensor::weights(&name(layer), Dtype::BF16, &[128, 256]);
            let bytes = ((odd.to_bits() >> 16) as u16).to_le_bytes();
            tensor.data[20_000..20_002].copy_from_slice(&bytes);
            tensor
        })
        .collect();
    let shards = [("model-00001-of-00001.safetensors", tensors)];
    support::write_checkpoint(dir.path(), &shards, &json!({"model_type": "llama"}));
    let plain = Request { format: "dense".into(), dtype: Some(Real::F32), ..Request::default() };
    let quantizes = |name: &&str| *name != "dense" && !support::is_for_gpt_oss(name);
    let quantized = FORMATS.iter().map(|format| format.name()).filter(quantizes);
    let requests = quantized
        .map(|name| Request { format: name.to_owned(), ..Request::default() })
        .chain([plain]);
    for request in requests {
        let budget = Budget { cache: 0, chunk: 10_000, ahead: 0 };
        let view = View::open(dir.path(), &request, budget).expect("a view");
        assert_eq!(view.spoilt(), [""; 0], "nothing was read yet");
        for _ in 0..2 {
            read(&view, shards[0].0);
        }
        let line = |layer| format!("{}: `{}` holds a NaN or an infinity", shards[0].0, name(layer));
        assert_eq!(view.news(), [line(0), line(2)], "{request:?}");
        assert_eq!(view.news(), [""; 0], "once each");
        assert_eq!(view.spoilt(), [line(0), line(2)]);
    }
}

#[test]
fn links_that_lead_nowhere_or_back_are_left_out_with_a_warning() {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(dir.path());
    symlink("nowhere", dir.path().join("broken")).expect("linked");
    fs::create_dir(dir.path().join("sub")).expect("made");
    symlink("..", dir.path().join("sub/up")).expect("linked");
    let view = open(dir.path());
    assert!(files(&view).iter().all(|file| !file.contains("broken") && !file.contains("up")));
    assert_eq!(
        view.warnings(),
        ["broken: not shown: it leads nowhere", "sub/up: not shown: it contains itself"]
    );
}

#[test]
fn what_is_no_model_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let refuse = |path: &Path, kind, complaint: &str| {
        let error = View::open(path, &Request::default(), Budget::default()).expect_err("opened");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(complaint), "{error}");
    };
    refuse(&dir.path().join("missing"), ErrorKind::NotFound, "missing");
    refuse(dir.path(), ErrorKind::NotFound, "not a model directory");
    fs::write(dir.path().join("config.json"), "{}").expect("written");
    refuse(&dir.path().join("config.json"), ErrorKind::Unsupported, "neither a model directory");
    fs::write(dir.path().join("model.safetensors"), [9, 0, 0, 0, 0, 0, 0, 0]).expect("written");
    refuse(dir.path(), ErrorKind::Corrupt, "model.safetensors: the header claims 9 bytes");
}

#[test]
fn gpt_oss_s_own_format_is_refused_for_other_models() {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(dir.path());
    let request = Request { format: "mxfp4".into(), ..Request::default() };
    let error = View::open(dir.path(), &request, Budget::default()).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("of a llama: --format ct-mxfp4"), "{error}");
}

#[test]
fn fused_experts_that_are_kept_are_told_with_their_share() {
    let dir = tempfile::tempdir().expect("a directory");
    support::gpt_oss(dir.path());
    let warned = |request: &Request| {
        let view = View::open(dir.path(), request, Budget::default()).expect("a view");
        let mut warnings = view.warnings().iter();
        warnings.find(|warning| warning.contains("experts fused")).cloned()
    };
    let request = Request { format: "gptq".into(), ..Request::default() };
    let warning = warned(&request).expect("a warning");
    assert!(warning.contains("are kept, 80.4%"), "{warning}");
    assert!(warning.contains(" of all weights: --format mxfp4"), "{warning}");
    assert_eq!(warned(&Request { format: "mxfp4".into(), ..request }), None);
}
