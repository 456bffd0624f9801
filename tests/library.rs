//! The library as its users call it: tensors by name, all tensors, and the streaming quantizer.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use aq_fs::adapter::{LookAhead, Progress};
use aq_fs::error::{self, ErrorKind};
use aq_fs::export::{self, export};
use aq_fs::recipe::Request;
use aq_fs::view::{Budget, View};
use aq_fs::{
    Modality, ShardedSafeTensorsAdapter, StreamingQuantizer, find_index_file, is_sharded_model,
};
use safetensors::{Dtype, SafeTensors};
use support::Tensor;

const SHARDS: [&str; 3] = [
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
];

fn llama() -> (tempfile::TempDir, ShardedSafeTensorsAdapter) {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(dir.path());
    let checkpoint = ShardedSafeTensorsAdapter::load(dir.path()).expect("a checkpoint");
    (dir, checkpoint)
}

/// A tensor of each element type, the values that its bytes stand for among them.
fn every_type() -> Vec<(Tensor, Vec<f32>)> {
    let nan = f32::NAN;
    let case = |dtype: Dtype, shape: &[usize], data: &[u8], values: &[f32]| {
        let (name, shape) = (format!("t.{dtype}"), shape.to_vec());
        (Tensor { name, dtype, shape, data: data.to_vec() }, values.to_vec())
    };
    vec![
        case(Dtype::BOOL, &[2], &[0, 1], &[0.0, 1.0]),
        case(Dtype::F4, &[2, 2], &[0x21, 0xf7], &[0.5, 1.0, 6.0, -6.0]),
        // Codes 1, 31, 32 and 63.
        case(Dtype::F6_E2M3, &[4], &[0xc1, 0x07, 0xfe], &[0.125, 7.5, -0.0, -7.5]),
        case(Dtype::F6_E3M2, &[4], &[0xc1, 0x07, 0xfe], &[0.0625, 28.0, -0.0, -28.0]),
        case(Dtype::U8, &[2], &[3, 255], &[3.0, 255.0]),
        case(Dtype::I8, &[2], &[3, 255], &[3.0, -1.0]),
        case(Dtype::F8_E5M2, &[3], &[0x3c, 0xfc, 0x7f], &[1.0, f32::NEG_INFINITY, nan]),
        case(Dtype::F8_E4M3, &[3], &[0x38, 0x7e, 0xff], &[1.0, 448.0, nan]),
        case(Dtype::F8_E8M0, &[3], &[127, 0, 255], &[1.0, 1.0 / (1u128 << 127) as f32, nan]),
        case(Dtype::F8_E4M3FNUZ, &[3], &[0x40, 0x7f, 0x80], &[1.0, 240.0, nan]),
        case(Dtype::F8_E5M2FNUZ, &[3], &[0x40, 0x7f, 0x80], &[1.0, 57344.0, nan]),
        case(Dtype::I16, &[2], &[0, 0x80, 1, 0], &[-32768.0, 1.0]),
        case(Dtype::U16, &[1], &[0, 0x80], &[32768.0]),
        case(Dtype::F16, &[3], &[0, 0x3c, 1, 0, 0, 0x7e], &[1.0, 1.0 / (1 << 24) as f32, nan]),
        case(Dtype::BF16, &[2], &[0x80, 0x3f, 0x80, 0xff], &[1.0, f32::NEG_INFINITY]),
        case(Dtype::I32, &[1], &(-7i32).to_le_bytes(), &[-7.0]),
        case(Dtype::U32, &[1], &u32::MAX.to_le_bytes(), &[4294967296.0]),
        case(Dtype::F32, &[], &1.5f32.to_le_bytes(), &[1.5]),
        case(Dtype::F64, &[1, 1], &0.1f64.to_le_bytes(), &[0.1]),
        case(Dtype::I64, &[1], &i64::MIN.to_le_bytes(), &[-9223372036854775808.0]),
        case(Dtype::U64, &[1], &((1u64 << 24) + 1).to_le_bytes(), &[16777216.0]),
        case(Dtype::F32, &[0, 3], &[], &[]),
    ]
}

#[track_caller]
fn same(found: &[f32], expected: &[f32], name: &str) {
    let bits = |values: &[f32]| -> Vec<Option<u32>> {
        values.iter().map(|value| (!value.is_nan()).then_some(value.to_bits())).collect()
    };
    assert_eq!(bits(found), bits(expected), "{name}: {found:?}");
}

#[test]
fn a_tensor_of_every_element_type_reads_as_f32() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut cases = every_type();
    cases.last_mut().expect("the empty one").0.name = "empty".to_owned();
    let mut tensors: Vec<Tensor> = cases.iter().map(|(tensor, _)| tensor.clone()).collect();
    let complex = Tensor { name: "c".into(), dtype: Dtype::C64, shape: vec![1], data: vec![0; 8] };
    tensors.push(complex);
    support::write_shard(&dir.path().join("model.safetensors"), &tensors);
    let checkpoint = ShardedSafeTensorsAdapter::load(dir.path()).expect("a checkpoint");
    for (tensor, values) in &cases {
        same(&checkpoint.get_tensor_f32(&tensor.name).expect("read"), values, &tensor.name);
        let info = checkpoint.tensor_info(&tensor.name).expect("there");
        let shape: Vec<u64> = tensor.shape.iter().map(|dim| *dim as u64).collect();
        assert_eq!((info.dtype, info.shape), (tensor.dtype, &shape[..]));
        assert_eq!(info.elements(), values.len() as u64);
    }
    let error = checkpoint.get_tensor_f32("c").expect_err("complex");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(error.to_string(), "`c`: C64 values are not real numbers");
    // Among all tensors it is an error in its place.
    let all: Vec<_> = checkpoint.get_all_tensors_f32().collect();
    assert!(checkpoint.tensor_names().eq(all.iter().map(|(name, _)| name.as_str())));
    let failed: Vec<_> = all.iter().filter(|(_, values)| values.is_err()).collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].0, "c");
}

#[test]
fn a_checkpoint_tells_what_it_holds() {
    let (dir, checkpoint) = llama();
    assert!(checkpoint.shard_files().eq(SHARDS));
    assert_eq!(checkpoint.num_shards(), 3);
    assert_eq!(checkpoint.tensor_names().len(), 2 + 9 + 9 + 1);
    let shard = |name| checkpoint.get_shard_for_tensor(name);
    assert_eq!(shard("model.norm.weight"), Some(SHARDS[0]));
    assert_eq!(shard("model.layers.0.mlp.up_proj.weight"), Some(SHARDS[1]));
    assert_eq!(shard("lm_head.weight"), Some(SHARDS[2]));
    assert_eq!(shard("lm_head"), None);
    assert_eq!(checkpoint.tensor_info("lm_head"), None);
    let index = fs::read(dir.path().join("model.safetensors.index.json")).expect("read");
    let index: serde_json::Value = serde_json::from_slice(&index).expect("JSON");
    assert_eq!(checkpoint.get_total_size(), index["metadata"]["total_size"]);
    let detected = checkpoint.detect_modality();
    assert_eq!(detected.modality, Modality::Text);
    assert_eq!(detected.rule.to_string(), "the index's metadata say so");
    for (missing, error) in [
        ("no tensor `x`", checkpoint.get_tensor_f32("x").expect_err("missing")),
        ("no shard \"x\"", checkpoint.prefetch_shard("x").expect_err("missing")),
    ] {
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains(missing), "{error}");
    }
}

#[test]
fn the_index_and_a_single_shard_load_too() {
    let (dir, whole) = llama();
    let index = find_index_file(dir.path()).expect("one").expect("there");
    assert_eq!(index, dir.path().join("model.safetensors.index.json"));
    let by_index = ShardedSafeTensorsAdapter::load(&index).expect("a checkpoint");
    assert!(by_index.tensor_names().eq(whole.tensor_names()));
    let shard = dir.path().join(SHARDS[0]);
    let one = ShardedSafeTensorsAdapter::load(&shard).expect("a checkpoint");
    assert_eq!((one.num_shards(), one.tensor_names().len()), (1, 2));
    for (path, sharded) in [
        (dir.path(), true),
        (&index, true),
        (&shard, false),
        (&dir.path().join("config.json"), false),
        (&dir.path().join("no.safetensors.index.json"), false),
        (Path::new("/nonexistent"), false),
    ] {
        assert_eq!(is_sharded_model(path), sharded, "{}", path.display());
    }
    fs::remove_file(&index).expect("removed");
    assert!(!is_sharded_model(dir.path()));
    assert_eq!(find_index_file(dir.path()).expect("listed"), None);
}

#[test]
fn a_shard_is_mapped_when_first_touched() {
    let (dir, checkpoint) = llama();
    let len = |shard: &str| fs::metadata(dir.path().join(shard)).expect("there").len();
    assert_eq!((checkpoint.mapped_bytes(), checkpoint.cache_memory_usage()), (0, 0));
    checkpoint.get_tensor_f32("lm_head.weight").expect("read");
    assert_eq!(checkpoint.mapped_bytes(), len(SHARDS[2]));
    assert!(checkpoint.cache_memory_usage() <= len(SHARDS[2]).next_multiple_of(1 << 16));
    checkpoint.prefetch_shard(SHARDS[0]).expect("there");
    assert_eq!(checkpoint.mapped_bytes(), len(SHARDS[0]) + len(SHARDS[2]));
    checkpoint.clear_cache();
    assert_eq!((checkpoint.mapped_bytes(), checkpoint.cache_memory_usage()), (0, 0));
    checkpoint.get_tensor_f32("lm_head.weight").expect("read again");
}

#[test]
fn all_tensors_are_each_tensor() {
    let (_dir, checkpoint) = llama();
    for look_ahead in [LookAhead::default(), LookAhead { threads: 3, bytes: 1 << 18 }] {
        let mut names = checkpoint.tensor_names();
        for (name, values) in checkpoint.get_all_tensors_f32_with(look_ahead) {
            assert_eq!(Some(name.as_str()), names.next());
            same(&values.expect("read"), &checkpoint.get_tensor_f32(&name).expect("read"), &name);
        }
        assert_eq!(names.next(), None);
    }
}

#[test]
fn a_tensor_longer_than_a_piece_is_whole() {
    let dir = tempfile::tempdir().expect("a directory");
    let count = 3_500_000;
    let data: Vec<u8> = (0..count as u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let tensor = Tensor { name: "w".into(), dtype: Dtype::F32, shape: vec![count], data };
    support::write_shard(&dir.path().join("model.safetensors"), &[tensor]);
    let checkpoint = ShardedSafeTensorsAdapter::load(dir.path()).expect("a checkpoint");
    let values = checkpoint.get_tensor_f32("w").expect("read");
    assert!(values.into_iter().eq((0..count).map(|i| i as f32)));
}

#[test]
fn threads_share_one_checkpoint() {
    let (_dir, checkpoint) = llama();
    std::thread::scope(|scope| {
        for i in 0..4 {
            let checkpoint = checkpoint.clone();
            scope.spawn(move || {
                for name in checkpoint.tensor_names().skip(i) {
                    checkpoint.get_tensor_f32(name).expect("read");
                    checkpoint.clear_cache();
                }
            });
        }
    });
}

/// What a stream hands over: dtype, shape and bytes by shard and name.
type Streamed = BTreeMap<(String, String), (Dtype, Vec<u64>, Vec<u8>)>;

fn stream(path: &Path, request: &Request, budget: Budget) -> (Streamed, Progress) {
    let quantizer = StreamingQuantizer::with_budget(path, request, budget).expect("opened");
    let mut tensors = Streamed::new();
    let mut last = Progress { tensors_done: 0, bytes_done: 0, ..quantizer.total() };
    let done = quantizer
        .run(
            |piece| {
                let key = (piece.shard.to_owned(), piece.name.to_owned());
                let new = (piece.dtype, piece.shape.to_vec(), Vec::new());
                let (_, _, bytes) = tensors.entry(key).or_insert(new);
                assert_eq!(piece.offset, bytes.len() as u64);
                bytes.extend(piece.bytes);
                assert!(bytes.len() as u64 <= piece.len);
                Ok(())
            },
            |progress| {
                assert!(progress.tensors_done >= last.tensors_done);
                assert!(progress.bytes_done >= last.bytes_done);
                last = progress;
                ControlFlow::Continue(())
            },
        )
        .expect("streamed");
    assert_eq!(done, last);
    (tensors, done)
}

/// The tensors of an exported view, as the safetensors library reads them.
fn exported(path: &Path, request: &Request) -> Streamed {
    let out = tempfile::tempdir().expect("a directory");
    let view = View::open(path, request, Budget::default()).expect("opened");
    let options = export::Options { threads: 2, overwrite: false, step: export::Step::Whole };
    export(&view, out.path(), options, &|_, _| {}).expect("exported");
    let mut tensors = Streamed::new();
    for node in 0..view.tree().nodes().len() {
        let name = view.tree().path(node).to_string_lossy().into_owned();
        if !name.ends_with(".safetensors") {
            continue;
        }
        let bytes = fs::read(out.path().join(&name)).expect("read");
        for (tensor, info) in SafeTensors::deserialize(&bytes).expect("valid").tensors() {
            let shape = info.shape().iter().map(|dim| *dim as u64).collect();
            tensors.insert((name.clone(), tensor), (info.dtype(), shape, info.data().to_vec()));
        }
    }
    tensors
}

#[test]
fn a_stream_is_what_an_export_holds() {
    let (dir, _) = llama();
    let tight = Budget { cache: 1 << 16, chunk: 1 << 15, ahead: 0 };
    for format in ["compressed-tensors", "ct-int8", "dense"] {
        let request = Request { format: format.to_owned(), ..Request::default() };
        let expected = exported(dir.path(), &request);
        for budget in [Budget::default(), tight] {
            let (tensors, done) = stream(dir.path(), &request, budget);
            assert!(tensors == expected, "{format} with {budget:?}");
            assert!(done.is_complete());
            assert_eq!(done.tensors, expected.len());
            let bytes: usize = expected.values().map(|(_, _, bytes)| bytes.len()).sum();
            assert_eq!((done.bytes_done, done.bytes), (bytes as u64, bytes as u64));
        }
    }
}

#[test]
fn a_folder_of_models_streams_all_of_them() {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(&dir.path().join("first"));
    support::llama(&dir.path().join("elsewhere/second"));
    // What a link leads to lies outside of the folder.
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).expect("made");
    fs::rename(dir.path().join("first"), folder.join("first")).expect("renamed");
    std::os::unix::fs::symlink("../elsewhere/second", folder.join("second")).expect("linked");
    let request = Request::default();
    let (tensors, _) = stream(&folder, &request, Budget::default());
    assert!(tensors == exported(&folder, &request));
    assert!(tensors.keys().any(|(shard, _)| shard.starts_with("second/model-00003")));
}

#[test]
fn a_stream_stops_when_told_and_fails_with_its_sink() {
    let (dir, _) = llama();
    let quantizer = StreamingQuantizer::new(dir.path(), &Request::default()).expect("opened");
    let mut pieces = 0;
    let progress = quantizer
        .run(
            |_| {
                pieces += 1;
                Ok(())
            },
            |progress| match progress.tensors_done {
                3 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            },
        )
        .expect("no error");
    assert_eq!((progress.tensors_done, pieces), (3, 3));
    assert!(!progress.is_complete());
    let full = quantizer.run(
        |piece| match piece.name {
            "model.norm.weight" => Err(error::invalid("disk full")),
            _ => Ok(()),
        },
        |_| ControlFlow::Continue(()),
    );
    assert_eq!(full.expect_err("the sink's").to_string(), "disk full");
}
