//! Real mounts: what readers see through the kernel, and what becomes of a mount.

#[path = "support/daemon.rs"]
mod daemon;
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use aq_fs::format::FORMATS;
use aq_fs::quant::Quality;
use aq_fs::recipe::Request;
use aq_fs::view::{Budget, NodeKind, View};
use daemon::{Place, complaint, mounts_on, sockets, unmount_by_system, wait_for};
use memmap2::{Advice, Mmap, MmapOptions};
use rustix::process::Signal;
use support::Random;

const SHARDS: [&str; 3] = [
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
];

/// Every file of a view, by its path below the root.
fn expected(model: &Path, format: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let request =
        Request { format: format.to_owned(), quality: Quality::Reference, ..Request::default() };
    let view = View::open(model, &request, Budget::default()).expect("a view");
    let tree = view.tree();
    let files = tree.nodes().iter().enumerate().filter_map(|(id, node)| {
        let NodeKind::File { size } = node.kind else { return None };
        let mut bytes = vec![0; size as usize];
        assert_eq!(view.read_at(id, 0, &mut bytes).expect("readable"), bytes.len());
        Some((tree.path(id), bytes))
    });
    files.collect()
}

#[expect(unsafe_code, reason = "a map is only as constant as its file")]
fn map(file: &File, shared: bool) -> Mmap {
    let options = MmapOptions::new();
    if shared {
        // SAFETY: the file is on a read-only mount, whose files don't change while they are open.
        unsafe { options.map(file) }.expect("mapped")
    } else {
        // SAFETY: as above; the map is private, and made read-only before anybody sees it.
        unsafe { options.map_copy_read_only(file) }.expect("mapped")
    }
}

/// All files below `dir`, by their path there.
fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(at).expect("listed") {
            let entry = entry.expect("an entry");
            match entry.file_type().expect("known").is_dir() {
                true => dirs.push(entry.path()),
                false => {
                    found.push(entry.path().strip_prefix(dir).expect("below").to_owned());
                }
            }
        }
    }
    found.sort();
    found
}

#[test]
fn many_readers_at_once_see_the_bytes_of_the_view_however_they_read() {
    let place = Place::new();
    let (llamas, gpt_osses) = (place.dir("llamas"), place.dir("gpt-osses"));
    for name in ["a", "b"] {
        support::llama(&llamas.join(name));
        support::gpt_oss(&gpt_osses.join(name));
    }
    for format in FORMATS {
        let models = if support::is_for_gpt_oss(format.name()) { &gpt_osses } else { &llamas };
        let flags = ["--format", format.name(), "--quality", "reference", "--cache-size", "1M"];
        let mount = place.mount(models, format.name(), &flags);
        let expected = expected(models, format.name());
        assert_eq!(files_below(&mount.mountpoint), expected.keys().cloned().collect::<Vec<_>>());
        std::thread::scope(|scope| {
            for reader in 0..16u64 {
                let (mount, expected) = (&mount, &expected);
                scope.spawn(move || {
                    let mut random = Random(reader);
                    for (path, bytes) in expected.iter().cycle().skip(reader as usize % 7).take(24)
                    {
                        let file = mount.file(path.to_str().expect("UTF-8"));
                        assert_eq!(file.metadata().expect("known").len(), bytes.len() as u64);
                        match random.next() % 4 {
                            0 => assert!(map(&file, true)[..] == bytes[..], "{path:?} mapped"),
                            1 => assert!(map(&file, false)[..] == bytes[..], "{path:?} mapped"),
                            2 => {
                                let read = fs::read(mount.mountpoint.join(path)).expect("read");
                                assert!(read == *bytes, "{path:?} read");
                            }
                            _ => {
                                for _ in 0..20 {
                                    let from = random.next() as usize % (bytes.len() + 1);
                                    let len = random.next() as usize % 70_000;
                                    let to = (from + len).min(bytes.len());
                                    let mut read = vec![0; len];
                                    let got = file.read_at(&mut read, from as u64).expect("read");
                                    assert_eq!(got, to - from, "short at {from} of {path:?}");
                                    assert!(read[..got] == bytes[from..to], "{path:?} at {from}");
                                }
                            }
                        }
                    }
                });
            }
        });
    }
}

#[test]
fn what_was_read_once_stays_in_the_page_cache_when_it_is_opened_again() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let mount = place.mount(&model, "q", &[]);
    let reads = || place.status(&mount.mountpoint)["reads"].as_u64().expect("a number");
    let mut first = Vec::new();
    mount.file(SHARDS[1]).read_to_end(&mut first).expect("read");
    let before = reads();
    assert!(before > 0);
    let file = mount.file(SHARDS[1]);
    assert!(map(&file, true)[..] == first[..]);
    drop(file);
    assert!(fs::read(mount.mountpoint.join(SHARDS[1])).expect("read") == first);
    assert_eq!(reads(), before);
}

#[test]
fn a_mount_looks_like_a_read_only_directory_of_the_model() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let mount = place.mount(&model, "q", &[]);
    let at = |name: &str| mount.mountpoint.join(name);
    let (ours, theirs) = (at("tokenizer.json"), model.join("tokenizer.json"));
    let (ours, theirs) = (ours.metadata().expect("known"), theirs.metadata().expect("known"));
    assert_eq!((ours.len(), ours.mtime_nsec()), (theirs.len(), theirs.mtime_nsec()));
    assert_eq!((ours.mode(), ours.uid()), (0o100444, rustix::process::geteuid().as_raw()));
    let code = |result: std::io::Result<File>| result.expect_err("refused").raw_os_error();
    assert_eq!(code(File::create(at("new"))), Some(libc::EROFS));
    assert_eq!(code(File::options().write(true).open(at(SHARDS[0]))), Some(libc::EROFS));
    assert_eq!(code(File::open(at("adapter_config.json"))), Some(libc::ENOENT));
    assert_eq!(code(File::open(at("config.json/x"))), Some(libc::ENOTDIR));
    let table = rustix::fs::statvfs(&mount.mountpoint).expect("known");
    assert!(table.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    assert!(table.f_flag.contains(rustix::fs::StatVfsMountFlags::NOSUID));
    assert!(table.f_blocks > 0 && table.f_bfree == 0);
}

#[test]
fn a_shard_truncated_while_it_is_mapped_gives_errors_and_spares_the_others() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let expected = expected(&model, "compressed-tensors");
    let mount = place.mount(&model, "q", &["--quality", "reference"]);
    let file = mount.file(SHARDS[1]);
    let mapped = map(&file, true);
    mapped.advise(Advice::Random).expect("advised");
    assert_eq!(mapped[..8], expected[Path::new(SHARDS[1])][..8]);

    File::options()
        .write(true)
        .open(model.join(SHARDS[1]))
        .and_then(|source| source.set_len(5000))
        .expect("truncated");
    // Faults that would raise SIGBUS come back as errors this way.
    for _ in 0..2 {
        assert!(mapped.advise(Advice::PopulateRead).is_err(), "a page came from nowhere");
    }
    let mut page = [0; 4096];
    let middle = file.metadata().expect("known").len() / 2;
    let error = file.read_at(&mut page, middle).expect_err("the source is gone");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));

    for shard in [SHARDS[0], SHARDS[2]] {
        let read = fs::read(mount.mountpoint.join(shard)).expect("read");
        assert!(read == expected[Path::new(shard)], "{shard}");
    }
    let status = place.status(&mount.mountpoint);
    assert_eq!(status["state"], "mounted");
    assert!(status["read_errors"].as_u64() > Some(0));
    let log = fs::read_to_string(status["log"].as_str().expect("a path")).expect("read");
    let told: Vec<&str> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert!(told.len() == 1 && told[0].contains(SHARDS[1]), "{told:?}");
}

#[test]
fn a_quantized_model_is_mounted_as_plain_numbers_as_long_as_its_codes_are_there() {
    let place = Place::new();
    let quantized = place.dir("fp8");
    for (path, bytes) in expected(&support::llama(&place.path("model")), "fp8-block") {
        fs::write(quantized.join(path), bytes).expect("written");
    }
    let expected = expected(&quantized, "dense");
    let mount = place.mount(&quantized, "plain", &["--format", "dense"]);
    for (path, bytes) in &expected {
        assert!(fs::read(mount.mountpoint.join(path)).expect("read") == *bytes, "{path:?}");
    }
    let config = String::from_utf8(expected[Path::new("config.json")].clone()).expect("UTF-8");
    assert!(!config.contains("quantization_config"), "{config}");
    let (shown, stored) = (expected[Path::new(SHARDS[1])].len() as u64, quantized.join(SHARDS[1]));
    assert!(shown > stored.metadata().expect("known").len());

    File::options()
        .write(true)
        .open(stored)
        .and_then(|source| source.set_len(5000))
        .expect("truncated");
    let mut page = [0; 4096];
    let file = mount.file(SHARDS[1]);
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advised");
    let error = file.read_at(&mut page, shown / 2).expect_err("the source is gone");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(place.status(&mount.mountpoint)["state"], "mounted");
}

#[test]
fn metadata_is_answered_while_every_read_waits_for_a_source_that_has_stalled() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let source = place.mount(&model, "source", &["--format", "dense"]);
    let mount = place.mount(&source.mountpoint, "q", &["--quality", "reference"]);
    let expected = expected(&model, "compressed-tensors");
    source.signal(Signal::STOP);
    std::thread::scope(|scope| {
        let (mount, expected) = (&mount, &expected);
        for reader in 0..40u64 {
            scope.spawn(move || {
                let shard = SHARDS[reader as usize % 3];
                let bytes = &expected[Path::new(shard)];
                let from = Random(reader).next() as usize % (bytes.len() - 4096);
                let mut page = [0; 4096];
                mount.file(shard).read_exact_at(&mut page, from as u64).expect("read");
                assert!(page[..] == bytes[from..from + 4096]);
            });
        }
        // Should the probes below wait for the source too, they shall fail and not hang.
        let (probed, probes) = std::sync::mpsc::channel::<()>();
        let source = &source;
        scope.spawn(move || {
            let _ = probes.recv_timeout(Duration::from_secs(10));
            source.signal(Signal::CONT);
        });
        std::thread::sleep(Duration::from_millis(300));
        let started = Instant::now();
        for name in 0..50 {
            let path = mount.mountpoint.join(format!("no-such-file-{name}"));
            assert!(!path.try_exists().expect("an answer"));
        }
        let listed = fs::read_dir(&mount.mountpoint).expect("listed").count();
        rustix::fs::statvfs(&mount.mountpoint).expect("an answer");
        let took = started.elapsed();
        drop(probed);
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert_eq!(listed, expected.len());
    });
}

#[test]
fn a_mount_whose_process_was_killed_is_mounted_over_and_unmounted() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let first = place.mount(&model, "q", &[]);
    first.kill();
    let error = fs::read_dir(&first.mountpoint).expect_err("nobody answers");
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    assert_eq!(place.status(&first.mountpoint)["state"], "dead");
    let output = place.run(&["status"], &[&first.mountpoint]);
    assert_eq!(output.status.code(), Some(1));
    assert!(complaint(&output).contains("dead: its process is gone"), "{output:?}");

    let second = place.mount(&model, "q", &[]);
    assert_eq!(mounts_on(&second.mountpoint), 1);
    assert!(fs::read(second.mountpoint.join("config.json")).is_ok());
    second.kill();
    let output = place.run(&["unmount"], &[&second.mountpoint]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(mounts_on(&second.mountpoint), 0);
}

#[test]
fn a_signal_unmounts() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mount = place.mount(&model, "q", &[]);
        let device = place.status(&mount.mountpoint)["device"].clone();
        let socket = format!(
            "{}-{}.sock",
            device.as_str().expect("a device").replace(':', "-"),
            place.status(&mount.mountpoint)["pid"]
        );
        let is_there = || sockets().iter().any(|path| path.ends_with(&socket));
        assert!(is_there());
        mount.signal(signal);
        mount.wait_until_ended();
        assert_eq!(mounts_on(&mount.mountpoint), 0, "after {signal:?}");
        assert!(!is_there(), "the socket is left after {signal:?}");
    }
}

#[test]
fn the_process_ends_with_its_mount_whoever_unmounts_it() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let mount = place.mount(&model, "q", &[]);
    unmount_by_system(&mount.mountpoint);
    mount.wait_until_ended();

    let mount = place.mount(&model, "q", &[]);
    let output = place.run(&["unmount"], &[&mount.mountpoint]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert!(mount.has_ended(), "unmount waits for the process");
    assert_eq!(mounts_on(&mount.mountpoint), 0);
}

#[test]
fn a_busy_mount_is_detached_and_serves_its_readers_to_their_end() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let expected = expected(&model, "compressed-tensors");
    let old = place.mount(&model, "q", &["--quality", "reference"]);
    let file = old.file(SHARDS[1]);
    let output = place.run(&["unmount"], &[&old.mountpoint]);
    assert!(output.status.success());
    assert!(complaint(&output).contains("in use: unmounted"), "{output:?}");
    assert_eq!(fs::read_dir(&old.mountpoint).expect("listed").count(), 0);
    assert!(!old.has_ended());
    let all: serde_json::Value =
        serde_json::from_slice(&place.run(&["status", "--json"], &[]).stdout).expect("JSON");
    let path = old.mountpoint.to_str().expect("UTF-8");
    let listed = |mount: &&serde_json::Value| mount["mountpoint"] == path;
    let found = all.as_array().and_then(|all| all.iter().find(listed)).expect("listed");
    assert_eq!(found["state"], "detached");

    // The same place can be used at once, and the old mount's end leaves the new one alone.
    let new = place.mount(&model, "q", &["--bits", "8"]);
    let bytes = &expected[Path::new(SHARDS[1])];
    assert!(map(&file, false)[..] == bytes[..]);
    drop(file);
    old.wait_until_ended();
    assert_eq!(mounts_on(&new.mountpoint), 1);
    assert!(fs::read(new.mountpoint.join(SHARDS[1])).expect("read").len() > bytes.len());
    drop(old);
}

#[test]
fn a_second_signal_ends_a_process_whose_files_are_in_use() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let mount = place.mount(&model, "q", &[]);
    let file = mount.file(SHARDS[0]);
    mount.signal(Signal::TERM);
    wait_for("unmounted", || mounts_on(&mount.mountpoint) == 0);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!mount.has_ended());
    mount.signal(Signal::TERM);
    mount.wait_until_ended();
    assert!(file.read_at(&mut [0; 8], 0).is_err());
}

#[test]
fn two_mounts_of_one_model_are_told_apart_and_unmounted_together() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let four = place.mount(&model, "four", &["--bits", "4"]);
    let eight = place.mount(&model, "eight", &["--bits", "8"]);
    let len = |mount: &daemon::Daemon| mount.file(SHARDS[1]).metadata().expect("known").len();
    assert!(len(&four) < len(&eight));
    assert!(place.status(&four.mountpoint)["shown_as"].as_str().expect("text").contains("int4"));
    assert!(place.status(&eight.mountpoint)["shown_as"].as_str().expect("text").contains("int8"));
    let output = place.run(&["unmount"], &[&four.mountpoint, &eight.mountpoint]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert!(four.has_ended() && eight.has_ended());
}

#[test]
fn mounts_that_come_and_go_at_once_leave_each_other_alone() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (place, model) = (&place, &model);
            scope.spawn(move || {
                for _ in 0..8 {
                    // The kernel gives the number of the last to go to the next to come.
                    let mount = place.mount(model, &format!("q{thread}"), &[]);
                    assert!(fs::read(mount.mountpoint.join("config.json")).is_ok());
                    unmount_by_system(&mount.mountpoint);
                }
            });
        }
    });
}

#[test]
fn in_the_foreground_it_says_when_it_is_ready_and_ends_on_ctrl_c() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let mountpoint = place.dir("q");
    let mut child = daemon::aq_fs(&place.path("state"))
        .args(["mount", "-f"])
        .args([&model, &mountpoint])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let mut said = [0; 64];
    let got = child.stdout.as_mut().expect("asked for").read(&mut said).expect("read");
    assert!(said[..got].starts_with(mountpoint.to_str().expect("UTF-8").as_bytes()));
    assert!(fs::read(mountpoint.join("config.json")).is_ok());
    let daemon = place.daemon(&mountpoint);
    daemon.signal(Signal::INT);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{output:?}");
    assert!(complaint(&output).contains("is unmounted"), "{output:?}");
    assert_eq!(mounts_on(&mountpoint), 0);
}

#[test]
fn the_process_in_the_background_holds_on_to_nothing_of_its_caller() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let mount = place.mount(&model, "q", &[]);
    let status = place.status(&mount.mountpoint);
    let pid = status["pid"].as_i64().expect("a number");
    let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).expect("read");
    assert_eq!(link("cwd"), Path::new("/"));
    assert_eq!(link("fd/0"), Path::new("/dev/null"));
    assert_eq!(link("fd/1"), Path::new("/dev/null"));
    assert_eq!(link("fd/2"), Path::new(status["log"].as_str().expect("a path")));
    let pid = rustix::process::Pid::from_raw(pid as i32);
    assert_eq!(rustix::process::getsid(pid).ok(), pid, "it leads a session of its own");
}

#[test]
fn paths_that_are_not_utf_8_are_mounted_and_told_of() {
    use std::os::unix::ffi::OsStrExt;

    let place = Place::new();
    let model = place.path("").join(std::ffi::OsStr::from_bytes(b"model\xff"));
    support::llama(&model);
    let inspected = place.run(&["inspect", "--json"], &[&model]);
    let inspected: serde_json::Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    assert!(inspected["root"].as_str().expect("a path").ends_with("model\u{fffd}"));
    let point = place.path("").join(std::ffi::OsStr::from_bytes(b"q\xff"));
    std::fs::create_dir(&point).expect("a directory");
    let output = place.run(&["mount"], &[&model, &point]);
    assert!(output.status.success(), "{output:?}");
    let status = place.status(&point);
    assert!(status["mountpoint"].as_str().expect("a path").ends_with("q\u{fffd}"), "{status}");
    assert!(status["pid"].is_number(), "{status}");
    let output = place.run(&["unmount"], &[&point]);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn who_is_told_of_a_failure_finds_nothing_mounted() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let point = place.dir("q");
    let full = std::fs::File::options().write(true).open("/dev/full").expect("opened");
    let mut command = daemon::aq_fs(&place.path("state"));
    let status = command.arg("mount").args([&model, &point]).stdout(full).status().expect("run");
    assert_eq!(status.code(), Some(1));
    assert_eq!(mounts_on(&point), 0);
}

#[test]
fn nothing_stays_mounted_where_nobody_waits_for_it_any_more() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let mountpoint = place.dir("q");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut child = daemon::aq_fs(&place.path("state"))
        .args(["mount", "--daemon"])
        .args([&model, &mountpoint])
        .stdout(writer)
        .stderr(Stdio::null())
        .spawn()
        .expect("the program runs");
    wait_for("it ends", || child.try_wait().expect("known").is_some());
    assert_eq!(child.wait().expect("known").code(), Some(1));
    assert_eq!(mounts_on(&mountpoint), 0);
}

#[test]
fn status_tells_rates_and_what_would_raise_them() {
    let place = Place::new();
    let model = support::llama(&place.path("model"));
    let mount = place.mount(&model, "q", &[]);
    let shard = mount.mountpoint.join("model-00002-of-00003.safetensors");
    let read = fs::read(&shard).expect("read").len() as u64;
    let status = place.status(&mount.mountpoint);
    let device = status["device"].as_str().expect("a device");
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    // Only root may, and only root's is not that low already.
    let _ = fs::write(&path, "128");
    let status = place.status(&mount.mountpoint);
    let advice = status["advice"].as_str().expect("advice");
    assert!(advice.ends_with(&format!("echo 4096 | sudo tee {path}")), "{advice}");
    let rates = &status["rates"];
    let (over, rate) = (rates["over_ms"].as_u64(), rates["output"].as_u64());
    let (over, rate) = (over.expect("a number"), rate.expect("a number"));
    assert!(rate * over / 1000 + rate >= read, "{rate} in {over} ms, {read} read");
}
