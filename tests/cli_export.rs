//! What an export leaves on disk: whole files, or none that look whole, and a way to go on.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use aq_fs::recipe::Request;
use aq_fs::view::{Budget, NodeKind, View};
use safetensors::Dtype;
use serde_json::json;
use support::Tensor;

const SHARD: &str = "model-00001-of-00002.safetensors";

fn export(model: &Path, out: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aq-fs"));
    command.arg("export").arg(model).arg(out).args(flags);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs an export and returns all that it said.
#[track_caller]
fn check(model: &Path, out: &Path, flags: &[&str], code: i32, says: &str) -> String {
    let output = export(model, out, flags).output().expect("run");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8(said).expect("UTF-8");
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(says), "{said}");
    said
}

fn open(model: &Path) -> View {
    View::open(model, &Request::default(), Budget::default()).expect("a view")
}

/// How many files of `out` stand under their own name; each must be what the view shows.
#[track_caller]
fn whole_files(view: &View, out: &Path) -> usize {
    let mut found = 0;
    for (id, node) in view.tree().nodes().iter().enumerate() {
        let NodeKind::File { size } = node.kind else { continue };
        let Ok(written) = fs::read(out.join(view.tree().path(id))) else { continue };
        let mut expected = vec![0; size as usize];
        view.read_at(id, 0, &mut expected).expect("readable");
        assert!(written == expected, "{:?} looks whole and is not", node.name);
        found += 1;
    }
    found
}

/// The hidden files in a directory.
fn hidden(out: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(out).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with('.')).collect()
}

/// A checkpoint whose first shard takes several lines of a journal, with a component beside it that
/// is shown as it is.
fn large_model(dir: &Path) -> PathBuf {
    let weight = |i: usize| {
        let name = format!("model.layers.{i}.mlp.up_proj.weight");
        Tensor::weights(&name, Dtype::BF16, &[1024, 4096])
    };
    let norm = Tensor::weights("model.norm.weight", Dtype::BF16, &[4096]);
    let shards = [
        (SHARD, vec![weight(0), weight(1), weight(2), norm]),
        ("model-00002-of-00002.safetensors", vec![weight(3)]),
    ];
    let config = json!({ "model_type": "llama", "architectures": ["LlamaForCausalLM"] });
    support::write_checkpoint(dir, &shards, &config);
    fs::write(dir.join("tokenizer.model"), vec![7; (3 << 20) + 5]).expect("written");
    dir.to_owned()
}

#[test]
fn a_killed_export_leaves_no_file_that_looks_whole_and_is_not_and_is_gone_on_with() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = large_model(&dir.path().join("model"));
    let view = open(&model);
    for delay in [0, 5, 20, 50, 100] {
        let out = dir.path().join(format!("out{delay}"));
        let mut went_on = 0;
        // Killed again and again, each time a little later.
        for run in 0.. {
            let mut child = export(&model, &out, &["--threads", "1"]).spawn().expect("started");
            // From the moment that there is something to see.
            let begun = || fs::read_dir(&out).is_ok_and(|mut entries| entries.next().is_some());
            while !begun() && child.try_wait().expect("waited").is_none() {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(delay * (1 + run)));
            child.kill().expect("killed, or gone already");
            let output = child.wait_with_output().expect("reaped");
            let said = String::from_utf8(output.stderr).expect("UTF-8");
            went_on += usize::from(said.contains("going on"));
            let index = out.join("model.safetensors.index.json");
            let count = whole_files(&view, &out);
            assert!(!index.exists() || count >= 4, "the index stands before its shards");
            if output.status.success() || run > 20 {
                break;
            }
        }
        check(&model, &out, &[], 0, "");
        assert_eq!(whole_files(&view, &out), 6);
        assert_eq!(hidden(&out), [] as [PathBuf; 0], "{went_on} went on");
    }
}

#[test]
fn what_a_journal_says_is_on_disk_is_not_written_again_and_the_rest_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let (model, out) = (large_model(&dir.path().join("model")), dir.path().join("out"));
    let view = open(&model);
    // As after a power cut in the middle of a line.
    check(&model, &out, &["--shards", "1/1", "--threads", "1"], 0, "part 1 of 1: 3 files");
    let (path, partial) = (out.join(SHARD), out.join(format!(".{SHARD}.partial")));
    let journal = out.join(format!(".{SHARD}.journal"));
    let text = fs::read_to_string(&journal).expect("read");
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.len() >= 5 && lines.last() == Some(&"whole"), "{text}");
    let noted: u64 = lines[2].split_once(' ').expect("two numbers").1.parse().expect("a number");
    fs::write(&journal, format!("{}\n{}\n{}\n40", lines[0], lines[1], lines[2])).expect("written");
    let size = fs::metadata(&path).expect("there").len();
    fs::write(&partial, vec![0xee; size as usize]).expect("written");
    fs::remove_file(&path).expect("removed");
    check(&model, &out, &["--threads", "1"], 0, "going on");
    let written = fs::read(&path).expect("read");
    let node = view.tree().lookup(0, SHARD.as_ref()).expect("shown");
    let mut expected = vec![0; size as usize];
    view.read_at(node, 0, &mut expected).expect("readable");
    let kept = written.iter().zip(&expected).filter(|(a, b)| a != b).count() as u64;
    let same = expected.iter().filter(|&&byte| byte == 0xee).count() as u64;
    assert!(kept <= noted && noted <= kept + same, "{kept} kept of {noted} noted");
    let wrong = written.iter().zip(&expected).any(|(a, b)| a != b && *a != 0xee);
    assert!(!wrong, "what was written is what the view shows");
}

#[test]
fn an_export_that_would_be_another_starts_over_and_says_why() {
    let dir = tempfile::tempdir().expect("a directory");
    let (model, out) = (large_model(&dir.path().join("model")), dir.path().join("out"));
    let begin = |flags: &[&str]| {
        check(&model, &out, &[&["--shards", "1/1"], flags].concat(), 0, "part 1 of 1")
    };
    begin(&["--bits", "8"]);
    check(&model, &out, &[], 0, "the recipe is another now: starting over");
    assert_eq!(whole_files(&open(&model), &out), 6);
    fs::remove_dir_all(&out).expect("removed");
    begin(&[]);
    let mut bytes = fs::read(model.join(SHARD)).expect("read");
    let at = bytes.len() - 9000;
    bytes[at..at + 4000].reverse();
    fs::write(model.join(SHARD), bytes).expect("written");
    check(&model, &out, &["--quiet"], 0, "the source has changed: starting over");
    assert_eq!(whole_files(&open(&model), &out), 6);
    // One that is finished is not replaced unasked.
    check(
        &model,
        &out,
        &["--bits", "8"],
        2,
        "holds an export of another source, recipe or version",
    );
    check(&model, &out, &[], 0, "finished already");
    check(&model, &out, &["--bits", "8", "--overwrite"], 0, "6 files");
    check(&model, &out, &["--overwrite"], 0, "6 files");
    assert_eq!(whole_files(&open(&model), &out), 6);
}

#[test]
fn parts_written_at_once_and_in_any_order_make_one_export() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = large_model(&dir.path().join("model"));
    let view = open(&model);
    for parts in [1, 2, 3, 7] {
        let out = dir.path().join(format!("out{parts}"));
        let flag = |part: usize| format!("{part}/{parts}");
        check(&model, &out, &["--finish"], 2, "not begun");
        let spawn = |part| export(&model, &out, &["--shards", &flag(part)]).spawn();
        let children: Vec<_> = (2..=parts).rev().map(spawn).collect();
        for child in children {
            let output = child.expect("started").wait_with_output().expect("reaped");
            assert!(output.status.success(), "{output:?}");
        }
        // The first part has the largest file.
        check(&model, &out, &["--finish"], 2, &format!("{SHARD}: not begun"));
        assert!(!out.join("config.json").exists());
        check(&model, &out, &["--shards", &flag(1)], 0, &format!("part 1 of {parts}"));
        check(&model, &out, &["--finish", "--bits", "8"], 2, "the recipe is another now");
        check(&model, &out, &["--shards", &flag(1)], 0, "there before");
        let cut = fs::File::options().write(true).open(out.join(SHARD)).expect("there");
        let len = cut.metadata().expect("known").len();
        cut.set_len(len - 1).expect("cut");
        check(&model, &out, &["--finish"], 2, "bytes instead of");
        check(&model, &out, &["--shards", &flag(1)], 0, &format!("part 1 of {parts}"));
        check(&model, &out, &["--finish"], 0, "3 files");
        assert_eq!(whole_files(&view, &out), 6);
        assert_eq!(hidden(&out), [] as [PathBuf; 0]);
        check(&model, &out, &["--shards", &flag(1)], 0, "finished already");
        check(&model, &out, &["--finish"], 0, "finished already");
    }
}

#[test]
fn an_export_needs_an_empty_directory_outside_of_the_model_unless_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(&dir.path().join("model"));
    let view = open(&model);
    let out = dir.path().join("deep/er/out");
    check(&model, &out, &["--quiet"], 0, "");
    assert_eq!(whole_files(&view, &out), 6);
    check(&model, &out, &[], 0, "finished already: nothing to do");
    fs::write(out.join("config.json"), "another").expect("written");
    check(&model, &out, &[], 2, "--overwrite replaces files of the same names");
    check(&model, &out, &["--overwrite"], 0, "");
    assert_eq!(whole_files(&view, &out), 6);
    let foreign = dir.path().join("foreign");
    fs::create_dir(&foreign).expect("made");
    fs::write(foreign.join("README"), "mine").expect("written");
    check(&model, &foreign, &[], 2, "not empty");
    check(&model, &foreign, &["--shards", "1/2"], 2, "not empty");
    assert_eq!(fs::read_dir(&foreign).expect("listed").count(), 1);
    check(&model, &model.join("sub/out"), &[], 2, "inside of the model");
    assert!(!model.join("sub").exists());
    check(&model, &out, &["--shards", "3/2"], 2, "neither 1/N nor up to N/N");
}

#[test]
fn directories_that_lead_into_the_model_are_not_written() {
    let dir = tempfile::tempdir().expect("a directory");
    let pipeline = dir.path().join("pipeline");
    support::llama(&pipeline.join("text_encoder"));
    let out = dir.path().join("out");
    fs::create_dir(&out).expect("made");
    let inside = out.join("text_encoder");
    std::os::unix::fs::symlink(pipeline.join("text_encoder"), &inside).expect("linked");
    check(&pipeline, &out, &["--overwrite"], 2, "inside of the model");
    assert!(hidden(&inside).is_empty());
}

#[test]
fn weights_of_something_else_do_not_stay_beside_an_export() {
    let dir = tempfile::tempdir().expect("a directory");
    let sharded = support::llama(&dir.path().join("sharded"));
    let single = dir.path().join("single");
    let weight = Tensor::weights("model.layers.0.mlp.up_proj.weight", Dtype::BF16, &[256, 512]);
    let config = json!({ "model_type": "llama", "architectures": ["LlamaForCausalLM"] });
    support::write_checkpoint(&single, &[("model.safetensors", vec![weight])], &config);
    fs::remove_file(single.join("model.safetensors.index.json")).expect("removed");
    let out = dir.path().join("out");
    check(&single, &out, &["--quiet"], 0, "");
    fs::write(out.join("adapter_model.safetensors"), "mine").expect("written");
    let before = fs::read(out.join("config.json")).expect("read");
    check(&sharded, &out, &["--overwrite"], 2, "model.safetensors would stay beside this export");
    assert_eq!(fs::read(out.join("config.json")).expect("read"), before);
    check(&single, &out, &[], 0, "finished already");
    fs::remove_file(out.join("model.safetensors")).expect("removed");
    check(&single, &out, &[], 2, "holds this export, but model.safetensors is missing");
    check(&sharded, &out, &["--overwrite", "--quiet"], 0, "");
    assert_eq!(whole_files(&open(&sharded), &out), 6);
    check(&single, &out, &["--overwrite"], 2, "and 3 more would stay beside this export");

    // What has only been begun is known by its journal, and taken away.
    let out = dir.path().join("begun");
    check(&sharded, &out, &["--shards", "1/1", "--quiet"], 0, "");
    check(&single, &out, &["--overwrite", "--quiet"], 0, "");
    let mut names: Vec<_> =
        fs::read_dir(&out).expect("listed").flatten().map(|f| f.file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
}

#[test]
fn a_finish_with_another_recipe_takes_nothing_away() {
    let dir = tempfile::tempdir().expect("a directory");
    let (model, out) = (support::llama(&dir.path().join("model")), dir.path().join("out"));
    check(&model, &out, &["--quiet"], 0, "");
    check(&model, &out, &["--bits", "8", "--finish", "--overwrite"], 2, "cannot be used with");
    check(&model, &out, &["--bits", "8", "--finish"], 2, "another source, recipe or version");
    check(&model, &out, &[], 0, "finished already");
    let out = dir.path().join("parts");
    check(&model, &out, &["--shards", "1/1", "--quiet"], 0, "");
    let said = check(&model, &out, &["--bits", "8", "--finish"], 2, "the recipe is another now");
    assert!(!said.contains("starting over"), "{said}");
    check(&model, &out, &["--finish", "--quiet"], 0, "");
    assert_eq!(whole_files(&open(&model), &out), 6);
}

#[test]
fn links_are_not_written_through_and_directories_are_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let (model, out) = (support::llama(&dir.path().join("model")), dir.path().join("out"));
    fs::create_dir(&out).expect("made");
    let mine = dir.path().join("mine");
    fs::write(&mine, "mine").expect("written");
    for name in ["config.json", "model-00001-of-00003.safetensors"] {
        let partial = out.join(format!(".{name}.partial"));
        std::os::unix::fs::symlink(&mine, partial).expect("linked");
    }
    check(&model, &out, &["--overwrite", "--quiet"], 0, "");
    assert_eq!(whole_files(&open(&model), &out), 6);
    assert_eq!(fs::read(&mine).expect("read"), b"mine");

    let out = dir.path().join("other");
    fs::create_dir_all(out.join("config.json")).expect("made");
    check(&model, &out, &[], 2, "config.json: a directory, where a file is to be");
}
