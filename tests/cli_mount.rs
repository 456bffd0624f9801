//! What the program says, and its exit codes, where it can't mount or unmount.

#[path = "support/daemon.rs"]
mod daemon;
mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use daemon::{Place, complaint, mounts_on};

/// Runs the program with a line whose `{name}`s stand for paths in the place, and expects one line
/// of complaint with this text.
#[track_caller]
fn check(place: &Place, line: &str, code: i32, complains: &str) {
    let expand = |text: &str| {
        let mut out = text.to_owned();
        while let Some(start) = out.find('{') {
            let end = out[start..].find('}').expect("closed") + start;
            let path = place.path(&out[start + 1..end]);
            out.replace_range(start..=end, path.to_str().expect("UTF-8"));
        }
        out
    };
    let words: Vec<String> = line.split(' ').map(expand).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let output = place.run(&words, &[]);
    let said = complaint(&output);
    assert_eq!(output.status.code(), Some(code), "{line}: {said}");
    let expected = expand(complains);
    assert!(said.contains(&expected), "{line}: {said:?} lacks {expected:?}");
    assert!(said.starts_with("aq-fs: ") && said.trim_end().lines().count() == 1, "{said}");
    let table = fs::read_to_string("/proc/self/mountinfo").expect("readable");
    let mounted = format!(" {}/bad", place.path("").to_str().expect("UTF-8").trim_end_matches('/'));
    assert!(!table.contains(&mounted), "{line} left something mounted");
}

#[test]
fn a_mountpoint_that_will_not_do_is_refused_in_one_line() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    place.dir("model/inside");
    place.dir("full/of");
    fs::write(place.path("file"), "").expect("written");
    symlink(place.path("nowhere"), place.path("dangling")).expect("linked");
    let cases = [
        ("mount {model} {missing}", "mountpoint {missing}: missing: mkdir -p {missing}"),
        ("mount {model} {no/such/dir}", "mountpoint {no/such/dir}: missing"),
        ("mount {model} {dangling}", "mountpoint {dangling}: missing"),
        ("mount {model} {file}", "mountpoint {file}: not a directory"),
        ("mount {model} {full}", "mountpoint {full}: not empty"),
        ("mount {model} {model/inside}", "mountpoint {model/inside}: inside of the model {model}"),
        ("mount {model} /proc/sys", "mountpoint /proc/sys: "),
    ];
    for (line, complains) in cases {
        check(&place, line, 2, complains);
    }
    let mount = place.mount(&model, "q", &[]);
    check(&place, "mount {model} {q}", 2, "mountpoint {q}: {model} is mounted there already");
    assert_eq!(mounts_on(&mount.mountpoint), 1);
}

#[test]
fn another_mount_is_not_ours_to_use_or_to_end() {
    let place = Place::new();
    support::llama(&place.path("model"));
    check(&place, "mount {model} /proc", 2, "mountpoint /proc: a mountpoint already, of type proc");
    check(&place, "unmount /proc", 3, "/proc: not a mount of aq-fs");
    assert_eq!(mounts_on(Path::new("/proc")), 1);
}

#[test]
fn a_model_that_will_not_do_is_refused_before_anything_is_mounted() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    place.dir("bad");
    place.dir("empty");
    fs::write(place.path("text"), "hello").expect("written");
    let broken = support::llama(&place.path("broken"));
    let shard = broken.join("model-00002-of-00003.safetensors");
    let file = fs::File::options().write(true).open(&shard).expect("opened");
    file.set_len(shard.metadata().expect("known").len() - 1).expect("truncated");
    let fifo = support::llama(&place.path("fifo")).join("config.json");
    fs::remove_file(&fifo).expect("removed");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().expect("run");
    assert!(made.success());
    let lacking = support::llama(&place.path("lacking"));
    fs::remove_file(lacking.join("model-00003-of-00003.safetensors")).expect("removed");
    let cases = [
        ("mount {nothing} {bad}", 3, "{nothing}"),
        ("mount {text} {bad}", 5, "{text}"),
        ("mount {empty} {bad}", 3, "{empty}"),
        ("mount {broken} {bad}", 4, "model-00002-of-00003.safetensors"),
        ("mount {lacking} {bad}", 4, "model-00003-of-00003.safetensors"),
        ("mount --only re:( {model} {bad}", 2, "re:("),
        ("mount -f {broken} {bad}", 4, "model-00002-of-00003.safetensors"),
        ("mount --log {no/log} {model} {bad}", 3, "log {no/log}"),
        ("mount --log {model/config.json} {model} {bad}", 2, "inside of the model"),
        ("mount -f --log {model/log} {model} {bad}", 2, "log {model/log}: inside of the model"),
        ("mount --log {bad/log} {model} {bad}", 2, "log {bad/log}: inside of the mountpoint"),
        ("mount {model/model-00002-of-00003.safetensors} {bad}", 5, "one shard of several"),
        ("inspect {fifo}", 4, "config.json: not a regular file"),
    ];
    assert!(!place.path("bad/log").exists() && !model.join("log").exists());
    for (line, code, complains) in cases {
        check(&place, line, code, complains);
    }
    drop(model);
}

#[test]
fn a_request_that_makes_no_sense_is_refused_in_one_line() {
    let place = Place::new();
    support::llama(&place.path("model"));
    place.dir("bad");
    let cases = [
        ("--format gguf", "invalid value 'gguf' for '--format <NAME>'"),
        ("--bits 9", "compressed-tensors has "),
        ("--bits 4 --profile edge", "cannot be used with"),
        ("--group-size 0", "neither a number of weights nor `channel`"),
        ("--format ct-int8 --bits 4", "ct-int8 has "),
        ("--skip re:(", "--skip \"re:(\" is not a valid pattern"),
    ];
    for (flags, complains) in cases {
        check(&place, &format!("mount {{model}} {{bad}} {flags}"), 2, complains);
    }
}

#[test]
fn what_is_not_mounted_cannot_be_unmounted_or_asked() {
    let place = Place::new();
    place.dir("plain");
    for command in ["unmount", "status"] {
        check(&place, &format!("{command} {{plain}}"), 3, "{plain}: not a mount of aq-fs");
        check(&place, &format!("{command} {{missing}}"), 3, "{missing}");
    }
}

#[test]
fn of_several_mountpoints_the_good_are_unmounted_and_the_bad_are_told() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let first = place.mount(&model, "first", &[]);
    let last = place.mount(&model, "last", &[]);
    let (plain, missing) = (place.dir("plain"), place.path("missing"));
    let output = place.run(&["unmount"], &[&first.mountpoint, &plain, &missing, &last.mountpoint]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(complaint(&output).lines().count(), 2, "{output:?}");
    assert_eq!((mounts_on(&first.mountpoint), mounts_on(&last.mountpoint)), (0, 0));
}

#[test]
fn a_mountpoint_is_found_by_any_path_that_leads_to_it() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let mount = place.mount(&model, "with blank \\ and ümlaut", &[]);
    symlink(&mount.mountpoint, place.path("link")).expect("linked");
    assert_eq!(place.status(&place.path("link"))["state"], "mounted");
    let name = mount.mountpoint.file_name().expect("a name");
    let mut command = daemon::aq_fs(&place.path("state"));
    let output = command.current_dir(place.path("")).args(["unmount"]).arg(name).output();
    assert!(output.expect("it runs").status.success());
    assert!(mount.has_ended());
}

#[test]
fn a_wrong_command_line_exits_with_2_and_help_with_0() {
    let place = Place::new();
    let cases: [(&[&str], i32); 8] = [
        (&[], 2),
        (&["mount"], 2),
        (&["unmount"], 2),
        (&["mount", "a", "b", "--bits", "x"], 2),
        (&["mount", "a", "b", "--format", "no-such"], 2),
        (&["mount", "a", "b", "--bits", "4", "--profile", "edge"], 2),
        (&["--help"], 0),
        (&["mount", "--help"], 0),
    ];
    for (args, code) in cases {
        assert_eq!(place.run(args, &[] as &[&Path]).status.code(), Some(code), "{args:?}");
    }
    let help = String::from_utf8(place.run(&["--help"], &[]).stdout).expect("UTF-8");
    assert!(help.contains("Exit codes:"));
}
