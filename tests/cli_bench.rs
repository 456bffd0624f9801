//! What `aq-fs bench` prints, and that nothing of it stays.

#[path = "support/daemon.rs"]
mod daemon;
mod support;

use std::path::Path;
use std::process::Stdio;

use daemon::{Place, aq_fs, complaint, wait_for};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// How many mounts lie below a directory.
fn mounts_below(dir: &Path) -> usize {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("readable");
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points.filter(|point| Path::new(point).starts_with(dir)).count()
}

#[test]
fn every_view_is_read_in_every_way() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let temporary = place.dir("tmp");
    let mut command = aq_fs(&place.path("state"));
    command.env("TMPDIR", &temporary).arg("bench").arg(&model);
    command.args(["--json", "--rounds", "2", "--readers", "3", "--format", "mlx"]);
    let output = command.output().expect("run");
    assert!(output.status.success(), "{}", complaint(&output));
    let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let rows = all["rows"].as_array().expect("rows");
    let ways: Vec<_> = rows
        .iter()
        .map(|row| {
            let text = |name: &str| row[name].as_str().expect("a word").to_owned();
            (text("access"), row["readers"].as_u64().expect("a number"), text("view"))
        })
        .collect();
    let mut expected = Vec::new();
    for access in ["read", "mmap"] {
        for readers in [1, 3] {
            for view in ["null", "dense", "quantized"] {
                expected.push((access.to_owned(), readers, view.to_owned()));
            }
        }
    }
    assert_eq!(ways, expected);
    let shown = |view: &str| {
        let row = rows.iter().find(|row| row["view"] == view).expect("measured");
        row["bytes"].as_u64().expect("a number")
    };
    assert_eq!(shown("null"), shown("quantized"));
    assert!(shown("dense") > 2 * shown("quantized"), "the model is BF16");
    for row in rows {
        let figure = |name: &str| row[name].as_f64().expect("a number");
        assert!(figure("cold_gb_per_s") > 0.0 && figure("warm_gb_per_s") > 0.0, "{row}");
        assert_eq!(figure("encode_cpu_s_per_gb") > 0.0, row["view"] == "quantized", "{row}");
    }
    assert!(all["shown_as"].as_str().is_some_and(|text| text.starts_with("mlx")), "{all}");
    assert_eq!(std::fs::read_dir(&temporary).expect("listed").count(), 0);
}

#[test]
fn a_signal_ends_it_without_a_mount_left() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let temporary = place.dir("tmp");
    let mut command = aq_fs(&place.path("state"));
    command.env("TMPDIR", &temporary).arg("bench").arg(&model).args(["--rounds", "100000"]);
    let mut bench = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("run");
    wait_for("something is mounted", || mounts_below(&temporary) > 0);
    rustix::process::kill_process(Pid::from_child(&bench), Signal::INT).expect("it runs");
    let status = bench.wait().expect("it ends");
    assert_eq!(status.code(), Some(1));
    wait_for("nothing is mounted", || mounts_below(&temporary) == 0);
    assert_eq!(std::fs::read_dir(&temporary).expect("listed").count(), 0);
}

#[test]
fn a_recipe_that_will_not_do_is_refused_before_anything_is_mounted() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let output = place.run(&["bench", "--format", "mxfp4"], &[&model]);
    assert_eq!(output.status.code(), Some(5), "{}", complaint(&output));
    let output = place.run(&["bench", "--readers", "1"], &[&model]);
    assert_eq!(output.status.code(), Some(2), "{}", complaint(&output));
}
