//! Directories, indexes and single files that are, or are not, a checkpoint.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;

use super::{header_of, safetensors, write_index, write_shard};
use crate::error::ErrorKind;
use crate::source::{Checkpoint, Config};

const INDEX: &str = "model.safetensors.index.json";
const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";

/// A checkpoint of two shards.
fn write_sharded(dir: &Path) {
    fs::create_dir_all(dir).expect("made");
    write_shard(&dir.join(ONE), &[("a", 3), ("b", 5)], 1);
    write_shard(&dir.join(TWO), &[("c", 7)], 2);
    write_index(&dir.join(INDEX), &json!({ "a": ONE, "b": ONE, "c": TWO }));
}

/// What a checkpoint holds: name, shard and length of every tensor.
fn tensors(path: &Path) -> Vec<(String, String, u64)> {
    let checkpoint = Checkpoint::open(path).expect("a checkpoint");
    let describe = |tensor: &crate::source::Tensor| {
        let shard = checkpoint.shards()[tensor.shard()].file.name().to_owned();
        (tensor.name.clone(), shard, tensor.stored_len())
    };
    checkpoint.catalog().tensors().iter().map(describe).collect()
}

#[track_caller]
fn refuses(path: &Path, kind: ErrorKind, complaint: &str) {
    let error = Checkpoint::open(path).expect_err("accepted");
    let message = error.to_string();
    assert_eq!(error.kind(), kind, "{message}");
    assert!(message.contains(complaint), "{message:?} does not say {complaint:?}");
    assert!(!message.contains('\n'), "{message:?}");
}

/// Refuses a sharded checkpoint after `spoil` had its way with the directory.
#[track_caller]
fn refuses_spoilt(spoil: impl FnOnce(&Path), complaint: &str) {
    let dir = tempfile::tempdir().expect("a directory");
    write_sharded(dir.path());
    spoil(dir.path());
    refuses(dir.path(), ErrorKind::Corrupt, complaint);
}

fn three() -> [(String, String, u64); 3] {
    [("a", ONE, 3), ("b", ONE, 5), ("c", TWO, 7)]
        .map(|(name, shard, len)| (name.to_owned(), shard.to_owned(), len))
}

#[test]
fn opens_a_directory_its_index_and_a_single_file() {
    let dir = tempfile::tempdir().expect("a directory");
    write_sharded(dir.path());
    assert_eq!(tensors(dir.path()), three());
    assert_eq!(tensors(&dir.path().join(INDEX)), three());
    assert_eq!(tensors(&dir.path().join(TWO)), three()[2..]);
    let single = tempfile::tempdir().expect("a directory");
    write_shard(&single.path().join("model.safetensors"), &[("a", 1)], 0);
    let expected = [("a".to_owned(), "model.safetensors".to_owned(), 1)];
    assert_eq!(tensors(single.path()), expected);
    assert_eq!(tensors(&single.path().join("model.safetensors")), expected);
}

#[test]
fn opens_any_index_and_prefers_the_default_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, main) = (dir.path(), dir.path().join(INDEX));
    write_sharded(path);
    fs::rename(&main, path.join("other.safetensors.index.json")).expect("renamed");
    assert_eq!(tensors(path), three());
    write_index(&main, &json!({ "c": TWO }));
    assert_eq!(tensors(path), three()[2..]);
    fs::rename(main, path.join("third.safetensors.index.json")).expect("renamed");
    refuses(path, ErrorKind::Unsupported, "several indexes");
}

#[test]
fn opens_the_shards_that_the_index_names_whatever_else_lies_beside_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    write_sharded(path);
    write_shard(&path.join("model-00002-of-00003.safetensors"), &[("a", 9)], 3);
    write_shard(&path.join("consolidated.safetensors"), &[("a", 9)], 3);
    assert_eq!(tensors(path), three());
    fs::write(path.join("model-00001-of-00003.safetensors"), "damaged").expect("written");
    assert_eq!(tensors(path), three());
    let odd = "weights.safetensors";
    fs::rename(path.join(TWO), path.join(odd)).expect("renamed");
    write_index(&path.join(INDEX), &json!({ "a": ONE, "b": ONE, "c": odd }));
    let mut expected = three();
    expected[2].1 = odd.to_owned();
    assert_eq!(tensors(path), expected);
}

#[test]
fn opens_a_hub_cache_snapshot() {
    let dir = tempfile::tempdir().expect("a directory");
    let snapshot = dir.path().join("snapshots/0123abcd");
    fs::create_dir_all(&snapshot).expect("made");
    write_sharded(&dir.path().join("plain"));
    fs::rename(dir.path().join("plain"), dir.path().join("blobs")).expect("renamed");
    for (blob, name) in [("e1", ONE), ("e2", TWO), ("e3", INDEX)] {
        let blobs = dir.path().join("blobs");
        fs::rename(blobs.join(name), blobs.join(blob)).expect("renamed");
        symlink(Path::new("../../blobs").join(blob), snapshot.join(name)).expect("linked");
    }
    assert_eq!(tensors(&snapshot), three());
    assert_eq!(tensors(&snapshot.join(INDEX)), three());
    assert_eq!(tensors(&snapshot.join(TWO)), three()[2..]);
    fs::remove_file(dir.path().join("blobs/e2")).expect("removed");
    refuses(
        &snapshot,
        ErrorKind::Corrupt,
        &format!("{INDEX}: names shard {TWO}, which is missing"),
    );
}

#[test]
fn refuses_an_index_that_its_shards_contradict() {
    let missing = format!("{INDEX}: names shard {ONE}, which is missing");
    refuses_spoilt(|dir| fs::remove_file(dir.join(ONE)).expect("removed"), &missing);
    let index = |map| move |dir: &Path| write_index(&dir.join(INDEX), &map);
    refuses_spoilt(index(json!({ "a": ONE, "x": TWO })), &format!("`x` is not in shard {TWO}"));
    refuses_spoilt(index(json!({ "a": TWO, "b": ONE })), &format!("`a` is not in shard {TWO}"));
    let outside = "`a`: shard name \"../x.safetensors\" leaves the directory";
    refuses_spoilt(index(json!({ "a": "../x.safetensors" })), outside);
    refuses_spoilt(index(json!({ "a": "/etc/x" })), "`a`: shard name \"/etc/x\" leaves");
    refuses_spoilt(index(json!({})), &format!("{INDEX}: `weight_map` names no tensor"));
    refuses_spoilt(
        |dir| write_shard(&dir.join(TWO), &[("c", 7), ("a", 3)], 0),
        &format!("`a` stands both in {ONE} and in {TWO}"),
    );
    let text = |text: String| move |dir: &Path| fs::write(dir.join(INDEX), text).expect("written");
    let begun = r#"{"weight_map":{"a":"x"#.to_owned();
    refuses_spoilt(text(begun), &format!("{INDEX}: malformed index: EOF"));
    let twice = format!(r#"{{"weight_map":{{"a":"{ONE}","b":"{ONE}","\u0061":"{ONE}"}}}}"#);
    refuses_spoilt(text(twice), &format!("{INDEX}: `a` stands twice"));
    let elsewhere = format!(r#"{{"weight_map":{{"a":"{TWO}","a":"{ONE}"}}}}"#);
    refuses_spoilt(text(elsewhere), &format!("{INDEX}: `a` is not in shard {TWO}"));
}

#[test]
fn refuses_a_shard_that_is_not_whole() {
    let resize = |by: i64| {
        move |dir: &Path| {
            let file = fs::File::options().write(true).open(dir.join(TWO)).expect("opened");
            let len = file.metadata().expect("there").len();
            file.set_len(len.checked_add_signed(by).expect("positive")).expect("resized");
        }
    };
    refuses_spoilt(resize(-1), "shorter than its header says: `c` ends at");
    refuses_spoilt(resize(1), "longer than its header says: `c` ends at");
    refuses_spoilt(resize(-40), &format!("{TWO}: the header claims"));
    let header = header_of(&[("c", 7)]).replace("[7]", "[8]");
    refuses_spoilt(
        |dir| fs::write(dir.join(TWO), safetensors(&header, &[0; 7])).expect("written"),
        &format!("{TWO}: `c`: offsets 0..7 do not fit"),
    );
}

#[test]
fn refuses_a_shard_that_is_no_regular_file() {
    let replace_by = |make: fn(&Path)| {
        move |dir: &Path| {
            fs::remove_file(dir.join(TWO)).expect("removed");
            make(&dir.join(TWO));
        }
    };
    let complaint = format!("{TWO}: not a regular file");
    refuses_spoilt(replace_by(|path| fs::create_dir(path).expect("made")), &complaint);
    refuses_spoilt(
        replace_by(|path| mknodat(CWD, path, FileType::Fifo, Mode::RWXU, 0).expect("made")),
        &complaint,
    );
    refuses_spoilt(replace_by(|path| symlink("/dev/null", path).expect("linked")), &complaint);
    refuses_spoilt(
        replace_by(|path| symlink("nowhere", path).expect("linked")),
        &format!("names shard {TWO}, which is missing"),
    );
}

#[test]
fn refuses_what_is_no_checkpoint() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    refuses(&path.join("missing"), ErrorKind::NotFound, "missing");
    refuses(path, ErrorKind::NotFound, "not a model directory");
    fs::write(path.join("weights.bin"), b"x").expect("written");
    refuses(path, ErrorKind::NotFound, "no safetensors file in it");
    refuses(&path.join("weights.bin"), ErrorKind::Unsupported, "neither a model directory");
    write_shard(&path.join(TWO), &[("c", 1)], 0);
    refuses(path, ErrorKind::Corrupt, &format!("shard {ONE} is missing"));
    write_shard(&path.join("extra.safetensors"), &[("d", 1)], 0);
    refuses(path, ErrorKind::Unsupported, "no index");
}

#[test]
fn reads_configs_as_python_writes_them() {
    let text = r#"{"a": NaN, "b": [Infinity, -Infinity, -1], "c": "NaN \" Infinity \\", "d": 1e9}"#;
    let config = Config::parse(text.to_owned()).expect("valid");
    assert_eq!(config.text, text);
    let expected = json!({ "a": null, "b": [null, null, -1], "c": "NaN \" Infinity \\", "d": 1e9 });
    assert_eq!(config.value, expected);
    for (text, complaint) in [
        ("", "config.json: EOF"),
        ("{\"a\": }", "config.json: expected value"),
        ("{\"a\": NaNo}", "config.json: "),
        ("[]", "config.json: not an object"),
        ("{\"é", "config.json: EOF"),
        ("{\"\\", "config.json: EOF"),
    ] {
        let error = Config::parse(text.to_owned()).expect_err("accepted");
        assert!(error.to_string().contains(complaint), "{text:?}: {error}");
        assert!(!error.to_string().contains('\n'));
    }
    let complaint = "config.json: not UTF-8";
    refuses_spoilt(
        |dir| fs::write(dir.join("config.json"), b"{\xff}").expect("written"),
        complaint,
    );
    let complaint = "config.json: EOF";
    refuses_spoilt(|dir| fs::write(dir.join("config.json"), b"{").expect("written"), complaint);
}
