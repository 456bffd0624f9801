//! Files that say what input features count for: every kind is read, and weights follow it.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use aq_fs::error::ErrorKind;
use aq_fs::quant::Quality;
use aq_fs::recipe::Request;
use aq_fs::view::{Budget, NodeKind, View};
use safetensors::{Dtype, SafeTensors};
use support::{Random, Tensor};

/// Numbers by name, each with the number of matrices that they are for.
type Entries = BTreeMap<String, (Vec<f32>, usize)>;

fn bytes_of(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// The file that `llama-imatrix --output-format dat` writes.
fn legacy(entries: &Entries) -> Vec<u8> {
    let int = |number: usize| (number as i32).to_le_bytes();
    let mut out = int(entries.len()).to_vec();
    for (name, (numbers, _)) in entries {
        out.extend([&int(name.len())[..], name.as_bytes(), &int(7), &int(numbers.len())].concat());
        out.extend(bytes_of(numbers));
    }
    out.extend([&int(100)[..], &int(5), b"a.txt"].concat());
    out
}

/// The file that `llama-imatrix` writes.
fn gguf(entries: &Entries) -> Vec<u8> {
    let long = |number: usize| (number as u64).to_le_bytes();
    let string = |text: &str| [&long(text.len())[..], text.as_bytes()].concat();
    let int = |number: u32| number.to_le_bytes();
    let mut out = [b"GGUF", &int(3)[..], &long(entries.len() * 2), &long(4)].concat();
    out.extend([string("general.type"), int(8).to_vec(), string("imatrix")].concat());
    let datasets = [string("imatrix.datasets"), int(9).to_vec(), int(8).to_vec(), long(2).to_vec()];
    out.extend([datasets.concat(), string("a.txt"), string("b")].concat());
    for name in ["imatrix.chunk_count", "imatrix.chunk_size"] {
        out.extend([string(name), int(4).to_vec(), int(512).to_vec()].concat());
    }
    let mut data = Vec::new();
    for (name, (numbers, matrices)) in entries {
        let parts = [
            ("in_sum2", numbers.len() / matrices, numbers.clone()),
            ("counts", 1, vec![9.0; *matrices]),
        ];
        for (part, width, numbers) in parts {
            out.extend(string(&format!("{name}.{part}")));
            out.extend([&int(2)[..], &long(width), &long(*matrices), &int(0)].concat());
            out.extend(long(data.len()));
            data.extend(bytes_of(&numbers));
            data.resize(data.len().next_multiple_of(32), 0);
        }
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    out
}

fn safetensors(dir: &Path, entries: &Entries) -> PathBuf {
    let tensors: Vec<Tensor> = entries
        .iter()
        .map(|(name, (numbers, _))| Tensor {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: vec![numbers.len()],
            data: bytes_of(numbers),
        })
        .collect();
    let path = dir.join("importance.safetensors");
    support::write_shard(&path, &tensors);
    path
}

fn written(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).expect("written");
    path
}

fn features(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..len).map(|_| (random.weight() * 50.0).powi(4) + 0.01).collect()
}

/// What llama.cpp would have for [`support::llama`]: everything in its order of names.
fn llama_entries() -> Entries {
    let mut entries = Entries::new();
    for layer in 0..2 {
        let leaves = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"];
        for (i, leaf) in leaves.into_iter().enumerate() {
            let numbers = features(layer * 10 + i as u64, 256);
            entries.insert(format!("blk.{layer}.{leaf}.weight"), (numbers, 1));
        }
        let numbers = features(layer * 10 + 9, 383);
        entries.insert(format!("blk.{layer}.ffn_down.weight"), (numbers, 1));
    }
    entries
}

/// The same by the names of the checkpoint's modules.
fn by_module(entries: &Entries) -> Entries {
    let leaves = [
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    let renamed = |(name, numbers): (&String, &(Vec<f32>, usize))| {
        let [_, layer, leaf, weight] = name.split('.').collect::<Vec<_>>()[..] else {
            panic!("{name}");
        };
        let (_, module) = leaves.iter().find(|(theirs, _)| *theirs == leaf).expect("known");
        // By the weight's own name in one layer, by the module's in the other.
        let suffix = if layer == "0" { format!(".{weight}") } else { String::new() };
        (format!("model.layers.{layer}.{module}{suffix}"), numbers.clone())
    };
    entries.iter().map(renamed).collect()
}

fn request(format: &str, importance: Option<&Path>) -> Request {
    Request {
        format: format.to_owned(),
        importance: importance.map(Path::to_owned),
        ..Request::default()
    }
}

fn open(model: &Path, request: &Request) -> aq_fs::error::Result<View> {
    View::open(model, request, Budget { chunk: 20_000, ..Budget::default() })
}

/// Every tensor that a view shows.
fn tensors(view: &View) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for (id, node) in view.tree().nodes().iter().enumerate() {
        let NodeKind::File { size } = node.kind else { continue };
        if !node.name.to_string_lossy().ends_with(".safetensors") {
            continue;
        }
        let mut bytes = vec![0; size as usize];
        view.read_at(id, 0, &mut bytes).expect("readable");
        let file = SafeTensors::deserialize(&bytes).expect("a shard");
        for (name, tensor) in file.tensors() {
            out.insert(name, tensor.data().to_vec());
        }
    }
    out
}

#[test]
fn every_kind_of_file_says_the_same() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(&dir.path().join("model"));
    let entries = llama_entries();
    let files = [
        written(dir.path(), "imatrix.dat", &legacy(&entries)),
        written(dir.path(), "imatrix.gguf", &gguf(&entries)),
        safetensors(dir.path(), &by_module(&entries)),
    ];
    for format in ["compressed-tensors", "mlx", "bnb-nf4", "gptq", "ct-nvfp4"] {
        let plain = tensors(&open(&model, &request(format, None)).expect("a view"));
        let mut seen = None;
        for file in &files {
            let view = open(&model, &request(format, Some(file))).expect("a view");
            let found = tensors(&view);
            assert_ne!(found, plain, "{format}: {file:?} changes nothing");
            assert!(*seen.get_or_insert_with(|| found.clone()) == found, "{format}: {file:?}");
            let has_more = ["mlx", "bnb-nf4"].contains(&format);
            let warns = view.warnings().iter().any(|line| line.contains("has the importance of"));
            // MLX has the embeddings and the head as well, which no imatrix is for.
            assert_eq!(warns, has_more && format == "mlx", "{:?}", view.warnings());
        }
    }
}

#[test]
fn equal_numbers_are_as_good_as_none() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(&dir.path().join("model"));
    let mut entries = llama_entries();
    for (i, (numbers, _)) in entries.values_mut().enumerate() {
        numbers.fill([0.0, 0.37, 1e9][i % 3]);
    }
    let file = written(dir.path(), "imatrix.dat", &legacy(&entries));
    for format in ["compressed-tensors", "mlx", "bnb-nf4"] {
        let plain = tensors(&open(&model, &request(format, None)).expect("a view"));
        let found = tensors(&open(&model, &request(format, Some(&file))).expect("a view"));
        assert!(found == plain, "{format}");
    }
}

/// The error of each weight of a model that is shown with a format's error, counted by numbers.
fn counted(model: &Path, request: &Request, numbers: &dyn Fn(&str) -> Vec<f32>) -> f64 {
    let plain = Request { format: "dense".to_owned(), ..Request::default() };
    let plain = tensors(&open(model, &plain).expect("a view"));
    let shown = tensors(&open(model, request).expect("a view"));
    let value =
        |bytes: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16);
    let mut sum = 0.0;
    for (name, bytes) in plain.iter().filter(|(name, bytes)| *bytes != &shown[*name]) {
        let numbers = numbers(name);
        let pairs = bytes.chunks(2).zip(shown[name].chunks(2)).enumerate();
        for (i, (x, y)) in pairs {
            sum += f64::from(numbers[i % numbers.len()]) * f64::from(value(x) - value(y)).powi(2);
        }
    }
    sum
}

#[test]
fn each_expert_has_its_own_numbers() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::mixture(&dir.path().join("model"));
    let mut entries = Entries::new();
    for (leaf, len) in [("ffn_gate_exps", 256), ("ffn_up_exps", 256), ("ffn_down_exps", 128)] {
        entries.insert(format!("blk.0.{leaf}.weight"), (features(len as u64, 3 * len), 3));
    }
    let numbers = |name: &str| {
        let Some((_, rest)) = name.split_once(".experts.") else { return vec![0.0] };
        let parts: Vec<&str> = rest.split('.').collect();
        let (expert, leaf) = (parts[0].parse::<usize>().expect("a number"), parts[1]);
        let leaf = leaf.strip_suffix("_proj").expect("a projection");
        let (numbers, _) = &entries[&format!("blk.0.ffn_{leaf}_exps.weight")];
        numbers[expert * numbers.len() / 3..][..numbers.len() / 3].to_vec()
    };
    for (name, bytes) in [("a.dat", legacy(&entries)), ("a.gguf", gguf(&entries))] {
        let file = written(dir.path(), name, &bytes);
        for format in ["compressed-tensors", "mlx"] {
            let simulate = |importance| Request {
                simulate: Some(format.to_owned()),
                ..request("dense", importance)
            };
            let [with, without] = [simulate(Some(file.as_path())), simulate(None)]
                .map(|request| counted(&model, &request, &numbers));
            assert!(with < without * 0.95, "{name}, {format}: {with} of {without}");
        }
    }
}

#[test]
fn stacked_experts_share_numbers_or_have_their_own() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::gpt_oss(&dir.path().join("model"));
    let plain = tensors(&open(&model, &request("mxfp4", None)).expect("a view"));
    let find = |tensors: &BTreeMap<String, Vec<u8>>, expert: usize| {
        let all = &tensors["model.layers.0.mlp.experts.gate_up_proj_scales"];
        all[expert * all.len() / 3..][..all.len() / 3].to_vec()
    };
    // Shared by all, and of the second expert alone: the others' are equal.
    let mut own = vec![1.0; 3 * 64];
    own[64..128].copy_from_slice(&features(3, 64));
    for (numbers, matrices, changed) in
        [(features(3, 64), 1, [true, true, true]), (own, 3, [false, true, false])]
    {
        let name = "blk.0.ffn_up_exps.weight".to_owned();
        let entries = Entries::from([(name, (numbers, matrices))]);
        let file = written(dir.path(), "a.gguf", &gguf(&entries));
        let found = tensors(&open(&model, &request("mxfp4", Some(&file))).expect("a view"));
        for (expert, changed) in changed.into_iter().enumerate() {
            let differs = find(&found, expert) != find(&plain, expert);
            assert_eq!(differs, changed, "expert {expert} of {matrices}");
        }
    }
}

#[test]
fn experts_that_are_split_have_the_numbers_of_the_tensor_that_holds_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::fused_mixture(&dir.path().join("model"), true);
    let plain = tensors(&open(&model, &request("mlx", None)).expect("a view"));
    let up = "model.layers.0.mlp.switch_mlp.up_proj.scales";
    let third = |tensors: &BTreeMap<String, Vec<u8>>, expert: usize| {
        let all = &tensors[up];
        all[expert * all.len() / 3..][..all.len() / 3].to_vec()
    };
    let mut own = vec![1.0; 3 * 256];
    own[256..512].copy_from_slice(&features(3, 256));
    for (numbers, matrices, changed) in
        [(features(3, 256), 1, [true, true, true]), (own, 3, [false, true, false])]
    {
        let name = "model.layers.0.mlp.experts.gate_up_proj".to_owned();
        let file = safetensors(dir.path(), &Entries::from([(name, (numbers, matrices))]));
        let found = tensors(&open(&model, &request("mlx", Some(&file))).expect("a view"));
        for (expert, changed) in changed.into_iter().enumerate() {
            let differs = third(&found, expert) != third(&plain, expert);
            assert_eq!(differs, changed, "expert {expert} of {matrices}");
        }
        let down = "model.layers.0.mlp.switch_mlp.down_proj.scales";
        assert_eq!(found[down], plain[down]);
    }
}

#[test]
fn refuses_what_has_no_effect_or_is_for_another_model() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(&dir.path().join("model"));
    let entries = llama_entries();
    let good = written(dir.path(), "good.dat", &legacy(&entries));
    let changed = |change: &dyn Fn(&mut Vec<f32>)| {
        let mut entries = entries.clone();
        change(&mut entries.get_mut("blk.1.attn_v.weight").expect("there").0);
        legacy(&entries)
    };
    let other = Entries::from([("blk.7.attn_q.weight".to_owned(), (vec![1.0; 256], 1))]);
    let gguf = gguf(&entries);
    let cases = [
        (
            changed(&|numbers| numbers[5] = f32::NAN),
            "`model.layers.1.self_attn.v_proj.weight` has the importance NaN",
        ),
        (changed(&|numbers| numbers[5] = -1.0), "has the importance -1"),
        (changed(&|numbers| numbers[255] = f32::INFINITY), "has the importance inf"),
        (
            changed(&|numbers| numbers.truncate(255)),
            "255 numbers of `blk.1.attn_v.weight` are not for `model.layers.1.self_attn.v_proj.weight`, which has 256 input features",
        ),
        (
            legacy(&other),
            "has the importance of no weight that is quantized: it has that of `blk.7.attn_q.weight`",
        ),
        (legacy(&entries)[..1000].to_vec(), "it ends too soon"),
        (gguf[..gguf.len() - 40].to_vec(), "its tensors don't lie in the file"),
        (gguf[..300].to_vec(), "it ends too soon"),
        (b"GGUF\x09\0\0\0".to_vec(), "version 9 of GGUF"),
        (b"\0\0\0\0".to_vec(), "neither an imatrix of llama.cpp"),
        (vec![], "it ends too soon"),
        (vec![0x7f; 64], "it ends too soon"),
    ];
    let refused = |request: &Request| open(&model, request).expect_err("refused");
    for (bytes, complaint) in cases {
        let file = written(dir.path(), "a", &bytes);
        let error = refused(&request("compressed-tensors", Some(&file)));
        assert!(error.to_string().contains(complaint), "{error}, not {complaint}");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    let error = refused(&request("ct-fp8", Some(&good)));
    assert!(error.to_string().contains("ct-fp8 searches nothing"), "{error}");
    let reference =
        Request { quality: Quality::Reference, ..request("compressed-tensors", Some(&good)) };
    assert!(refused(&reference).to_string().contains("no effect at --quality reference"));
    let missing = request("compressed-tensors", Some(Path::new("/no/such/file")));
    assert_eq!(refused(&missing).kind(), ErrorKind::NotFound);
}

#[test]
fn what_is_said_is_part_of_a_views_identity_wherever_it_stands() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(&dir.path().join("model"));
    let mut entries = llama_entries();
    let of = |file: Option<&Path>| {
        let view = open(&model, &request("compressed-tensors", file)).expect("a view");
        view.identity()
    };
    let first = written(dir.path(), "a.dat", &legacy(&entries));
    let second = written(dir.path(), "b.gguf", &gguf(&entries));
    entries.get_mut("blk.0.ffn_up.weight").expect("there").0[17] += 1.0;
    let third = written(dir.path(), "c.dat", &legacy(&entries));
    assert_eq!(of(Some(&first)), of(Some(&second)));
    assert_ne!(of(Some(&first)), of(Some(&third)));
    assert_ne!(of(Some(&first)), of(None));
}

#[test]
fn a_file_that_changes_is_not_read_on() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(&dir.path().join("model"));
    let mut entries = llama_entries();
    let file = written(dir.path(), "a.dat", &legacy(&entries));
    let view = open(&model, &request("compressed-tensors", Some(&file))).expect("a view");
    entries.get_mut("blk.0.ffn_up.weight").expect("there").0.push(1.0);
    written(dir.path(), "a.dat", &legacy(&entries));
    let (id, _) = view
        .tree()
        .nodes()
        .iter()
        .enumerate()
        .find(|(_, node)| node.name == "model-00002-of-00003.safetensors")
        .expect("a shard");
    let mut bytes = vec![0; 300_000];
    let error = view.read_at(id, 0, &mut bytes).expect_err("stale");
    assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
    assert!(error.to_string().contains("a.dat"), "{error}");
}

#[test]
fn says_which_weights_have_no_numbers() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(&dir.path().join("model"));
    let mut entries = llama_entries();
    entries.remove("blk.1.attn_output.weight");
    let file = written(dir.path(), "a.dat", &legacy(&entries));
    let view = open(&model, &request("compressed-tensors", Some(&file))).expect("a view");
    let expected = "a.dat has the importance of 11 of 12 weights; one that it has not is \
                    `model.layers.1.self_attn.o_proj.weight`";
    assert!(view.warnings().iter().any(|line| line == expected), "{:?}", view.warnings());
}
