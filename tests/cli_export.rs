//! What an export leaves on disk: whole files, or none that look whole.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use aq_fs::recipe::Request;
use aq_fs::view::{Budget, NodeKind, View};

fn export(model: &Path, out: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aq-fs"));
    command.arg("export").arg(model).arg(out).args(flags);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// How many files of `out` stand under their own name; each must be what the view shows.
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

#[test]
fn a_killed_export_leaves_no_file_that_looks_whole_and_is_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(&dir.path().join("model"));
    let view = View::open(&model, &Request::default(), Budget::default()).expect("a view");
    for delay in [0, 2, 5, 10, 20, 50] {
        let out = dir.path().join(format!("out{delay}"));
        let mut child = export(&model, &out, &["--threads", "1"]).spawn().expect("started");
        // From the moment that there is something to see.
        let begun = || fs::read_dir(&out).is_ok_and(|mut entries| entries.next().is_some());
        while !begun() && child.try_wait().expect("waited").is_none() {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(delay));
        child.kill().expect("killed, or gone already");
        child.wait().expect("reaped");
        let index = out.join("model.safetensors.index.json");
        let count = whole_files(&view, &out);
        assert!(!index.exists() || count >= 4, "the index stands before its shards");
    }
}

#[test]
fn an_export_needs_an_empty_directory_outside_of_the_model_unless_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = support::llama(&dir.path().join("model"));
    let view = View::open(&model, &Request::default(), Budget::default()).expect("a view");
    let check = |out: &Path, flags: &[&str], code: i32, complaint: &str| {
        let output = export(&model, out, flags).output().expect("run");
        let said = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(complaint), "{said}");
    };
    let out = dir.path().join("deep/er/out");
    check(&out, &["--quiet"], 0, "");
    assert_eq!(whole_files(&view, &out), 6);
    check(&out, &[], 2, "not empty");
    fs::write(out.join("config.json"), "another").expect("written");
    check(&out, &["--overwrite"], 0, "");
    assert_eq!(whole_files(&view, &out), 6);
    check(&model.join("sub/out"), &[], 2, "inside of the model");
    assert!(!model.join("sub").exists());
}
