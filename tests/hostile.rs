//! Hostile and changing sources, seen through a view: refused at once, or an error and never zeros.

mod support;

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use aq_fs::ShardedSafeTensorsAdapter;
use aq_fs::error::ErrorKind;
use aq_fs::recipe::Request;
use aq_fs::view::{Budget, NodeId, NodeKind, View};
use serde_json::json;
use support::Tensor;

const SHARDS: [&str; 3] = [
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
];

fn open(path: &Path) -> aq_fs::error::Result<View> {
    View::open(path, &Request::default(), Budget { cache: 1 << 16, chunk: 1 << 15, ahead: 0 })
}

fn node(view: &View, name: &str) -> NodeId {
    view.tree().lookup(aq_fs::view::ROOT, name.as_ref()).expect("shown")
}

fn size(view: &View, file: NodeId) -> u64 {
    match view.tree().nodes()[file].kind {
        NodeKind::File { size } => size,
        NodeKind::Dir { .. } => panic!("a directory"),
    }
}

fn whole(view: &View, file: NodeId) -> aq_fs::error::Result<Vec<u8>> {
    let mut bytes = vec![0; size(view, file) as usize];
    view.read_at(file, 0, &mut bytes)?;
    Ok(bytes)
}

/// Makes what is done to a file from now on show in its modification time.
fn age(path: &Path) {
    let file = File::options().write(true).open(path).expect("opened");
    file.set_modified(SystemTime::now() - Duration::from_secs(60)).expect("set");
}

fn truncate(path: &Path, len: u64) {
    File::options().write(true).open(path).expect("opened").set_len(len).expect("truncated");
}

#[test]
fn a_truncated_shard_is_an_error_and_the_others_are_served() {
    // A kept tensor, codes and scales all come from the second shard. Where it ends, a page may.
    for left in [0, 8, 5000, 8192, 200_000] {
        let dir = tempfile::tempdir().expect("a directory");
        support::llama(dir.path());
        let path = dir.path().join(SHARDS[1]);
        age(&path);
        let view = open(dir.path()).expect("a model");
        let files = SHARDS.map(|name| node(&view, name));
        let before = files.map(|file| whole(&view, file).expect("read"));
        truncate(&path, left);
        for _ in 0..2 {
            let error = whole(&view, files[1]).expect_err("read");
            assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
            assert!(error.to_string().contains(SHARDS[1]), "{error}");
            for (i, file) in files.into_iter().enumerate() {
                // In small steps, as the kernel tries again. What still comes was encoded before.
                for (step, expected) in before[i].chunks(4096).enumerate() {
                    let mut found = vec![0; expected.len()];
                    match view.read_at(file, step as u64 * 4096, &mut found) {
                        Ok(_) => assert!(found == expected, "other bytes at {}", step * 4096),
                        Err(error) => {
                            assert_eq!(i, 1, "{error}");
                            assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_shard_truncated_under_its_readers_gives_them_no_wrong_byte() {
    for round in 0..8u64 {
        let dir = tempfile::tempdir().expect("a directory");
        support::llama(dir.path());
        let path = dir.path().join(SHARDS[1]);
        age(&path);
        let view = open(dir.path()).expect("a model");
        let files = SHARDS.map(|name| node(&view, name));
        let before = files.map(|file| whole(&view, file).expect("read"));
        let truncated = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for reader in 0..4 {
                let (view, before, truncated) = (&view, &before, &truncated);
                scope.spawn(move || {
                    let mut failures = 0;
                    while failures < 3 {
                        let late = truncated.load(Ordering::SeqCst);
                        match whole(view, files[1]) {
                            Ok(bytes) => {
                                assert!(bytes == before[1], "other bytes were read");
                                assert!(!late, "a truncated shard was read in full");
                            }
                            Err(error) => {
                                assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
                                failures += 1;
                            }
                        }
                        let other = if reader % 2 == 0 { 0 } else { 2 };
                        assert!(whole(view, files[other]).expect("served") == before[other]);
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(3 * round));
            truncate(&path, 4096 * (round + 1) + round % 2);
            truncated.store(true, Ordering::SeqCst);
        });
    }
}

#[test]
fn a_truncated_shard_is_not_shown() {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(dir.path());
    let path = dir.path().join(SHARDS[1]);
    let stored = fs::read(&path).expect("read");
    age(&path);
    let dense = Request { format: "dense".to_owned(), ..Request::default() };
    let view = View::open(dir.path(), &dense, Budget::default()).expect("a model");
    let file = node(&view, SHARDS[1]);
    let mut buf = vec![0; stored.len()];
    let shown = view.show_at(file, 5, &mut buf, |bytes| bytes == &stored[5..]);
    assert!(shown.expect("shown"), "other bytes");
    assert!(buf.iter().all(|byte| *byte == 0), "a map was shown");
    truncate(&path, 200_000);
    for _ in 0..2 {
        let shown = view.show_at(file, 5, &mut buf, |_| panic!("shown"));
        assert_eq!(shown.expect_err("checked").kind(), ErrorKind::Stale);
    }
}

#[test]
fn a_deleted_replaced_or_overwritten_shard_is_an_error() {
    let changes: [fn(&Path); 3] = [
        |path| fs::remove_file(path).expect("removed"),
        |path| {
            fs::copy(path, path.with_extension("new")).expect("copied");
            fs::rename(path.with_extension("new"), path).expect("renamed");
        },
        |path| fs::write(path, fs::read(path).expect("read")).expect("written"),
    ];
    for change in changes {
        let dir = tempfile::tempdir().expect("a directory");
        support::llama(dir.path());
        let path = dir.path().join(SHARDS[2]);
        age(&path);
        let view = open(dir.path()).expect("a model");
        let checkpoint = ShardedSafeTensorsAdapter::load(dir.path()).expect("a checkpoint");
        checkpoint.get_tensor_f32("lm_head.weight").expect("read");
        let files = SHARDS.map(|name| node(&view, name));
        for file in files {
            whole(&view, file).expect("read");
        }
        change(&path);
        assert_eq!(whole(&view, files[2]).expect_err("read").kind(), ErrorKind::Stale);
        whole(&view, files[0]).expect("served");
        whole(&view, files[1]).expect("served");
        let error = checkpoint.get_tensor_f32("lm_head.weight").expect_err("read");
        assert_eq!(error.kind(), ErrorKind::Stale);
        assert!(error.to_string().starts_with("`lm_head.weight`: model-00003"), "{error}");
        let all = checkpoint.get_all_tensors_f32();
        assert_eq!(all.filter(|(_, values)| values.is_err()).count(), 10);
    }
}

/// Refuses a Llama that `spoil` had its way with, in one line.
#[track_caller]
fn refuses(spoil: impl FnOnce(&Path), complaints: &[&str]) {
    let dir = tempfile::tempdir().expect("a directory");
    support::llama(dir.path());
    spoil(dir.path());
    let error = open(dir.path()).expect_err("opened");
    let message = error.to_string();
    for complaint in complaints {
        assert!(message.contains(complaint), "{message:?} does not say {complaint:?}");
    }
    assert_eq!(message.lines().count(), 1, "{message:?}");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{message:?}");
}

/// Replaces the header of the second shard, the data left as they are.
fn with_header(edit: impl FnOnce(String) -> String) -> impl FnOnce(&Path) {
    move |dir| {
        let path = dir.join(SHARDS[1]);
        let bytes = fs::read(&path).expect("read");
        let len = u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
        let header = String::from_utf8(bytes[8..8 + len].to_vec()).expect("UTF-8");
        let header = edit(header);
        let length = (header.len() as u64).to_le_bytes();
        let bytes = [&length, header.as_bytes(), &bytes[8 + len..]].concat();
        fs::write(path, bytes).expect("written");
    }
}

#[test]
fn a_malformed_header_is_refused_with_file_and_tensor() {
    let file = SHARDS[1];
    let tensor = "model.layers.0.self_attn.q_proj.weight";
    let named = format!("`{tensor}`");
    refuses(with_header(|header| header[..header.len() / 2].to_owned()), &[file, "header"]);
    refuses(|dir| truncate(&dir.join(file), 6), &[file, "6 bytes are too few"]);
    refuses(|dir| truncate(&dir.join(file), 600), &[file, "the header claims"]);
    refuses(|dir| truncate(&dir.join(file), 9000), &[file, "shorter than its header says"]);
    let oversized = |dir: &Path| {
        let length = 100_000_001u64.to_le_bytes();
        fs::write(dir.join(file), length).expect("written");
        truncate(&dir.join(file), 300_000_000);
    };
    refuses(oversized, &[file, "claims 100000001 bytes, more than the 100000000 allowed"]);
    let twice = |header: String| {
        let info = json!({ "dtype": "U8", "shape": [0], "data_offsets": [0, 0] });
        header.replacen('{', &format!("{{\"{tensor}\":{info},"), 1)
    };
    refuses(with_header(twice), &[file, &named, "stands twice"]);
    let reshaped =
        |header: String| header.replacen("\"shape\":[256,256]", "\"shape\":[256,255]", 1);
    refuses(with_header(reshaped), &[file, "_proj.weight`", "do not fit BF16 [256, 255]"]);
    let control = |header: String| header.replace(tensor, "a\\nb\\u001b[2J");
    refuses(with_header(control), &["model.safetensors.index.json", &named, "is not in shard"]);
}

#[test]
fn a_hostile_index_or_config_is_refused() {
    let index = |map: serde_json::Value| {
        move |dir: &Path| {
            let text = json!({ "weight_map": map }).to_string();
            fs::write(dir.join("model.safetensors.index.json"), text).expect("written");
        }
    };
    let file = "model.safetensors.index.json";
    refuses(index(json!({ "a": "../../etc/passwd" })), &[file, "`a`", "leaves the directory"]);
    refuses(index(json!({ "a": "x.safetensors" })), &[file, "x.safetensors, which is missing"]);
    refuses(index(json!({ "a\nb": SHARDS[0] })), &[file, "`a\\nb` is not in shard"]);
    refuses(index(json!({})), &[file, "names no tensor"]);
    refuses(|dir| fs::write(dir.join("config.json"), "[1]").expect("written"), &["config.json"]);
    refuses(
        |dir| {
            let tensors = [Tensor::weights("lm_head.weight", safetensors::Dtype::F32, &[2, 2])];
            fs::remove_file(dir.join(SHARDS[0])).expect("removed");
            support::write_shard(&dir.join(SHARDS[0]), &tensors);
        },
        &["`lm_head.weight` stands both in", SHARDS[0], SHARDS[2]],
    );
}

#[test]
fn deep_json_is_refused_and_does_not_exhaust_the_stack() {
    let deep = || "[".repeat(200_000);
    let file = SHARDS[1];
    refuses(
        with_header(|_| format!("{{\"a\":{{\"dtype\":\"U8\",\"x\":{}", deep())),
        &[file, "recursion limit"],
    );
    refuses(
        |dir| fs::write(dir.join("config.json"), format!("{{\"a\":{}", deep())).expect("written"),
        &["config.json", "recursion limit"],
    );
    let index = "model.safetensors.index.json";
    refuses(
        |dir| {
            fs::write(dir.join(index), format!("{{\"metadata\":{{\"x\":{}", deep()))
                .expect("written")
        },
        &[index, "recursion limit"],
    );
}
