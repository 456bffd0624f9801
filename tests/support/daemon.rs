//! The program, run as a user runs it, with mounts that end with the test.

#![allow(dead_code, reason = "every test binary uses some of this")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take on a machine with other things to do.
const PATIENCE: Duration = Duration::from_secs(20);

/// The program, with its logs in `home`.
pub(crate) fn aq_fs(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aq-fs"));
    command.env("XDG_STATE_HOME", home).env_remove("AQ_FS_LOG");
    command
}

/// What it printed to standard error.
pub(crate) fn complaint(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// Waits for what must become true.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut is_true: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_true() {
        assert!(started.elapsed() < PATIENCE, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How many mounts are on `path`.
pub(crate) fn mounts_on(path: &Path) -> usize {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("readable");
    let path = path.to_str().expect("UTF-8");
    table.lines().filter(|line| line.split(' ').nth(4) == Some(path)).count()
}

/// Unmounts as if aq-fs weren't there, as far as an ordinary user may.
pub(crate) fn unmount_by_system(path: &Path) {
    let (program, flags): (_, &[&str]) = match rustix::process::geteuid().is_root() {
        true => ("umount", &[]),
        false => ("fusermount3", &["-u"]),
    };
    // A child that another test is about to start may hold a copy of a file just closed.
    let mut said = String::new();
    wait_for("unmounted by the system", || {
        let output = Command::new(program).args(flags).arg(path).output().expect("installed");
        said = complaint(&output);
        output.status.success() || !said.contains("busy")
    });
    assert_eq!(said, "");
}

/// The sockets of all mounts of this user.
pub(crate) fn sockets() -> Vec<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("aq-fs"));
    let usual =
        ["/run/aq-fs".to_owned(), format!("/run/user/{user}/aq-fs"), format!("/tmp/aq-fs-{user}")];
    let dirs = usual.map(PathBuf::from).into_iter().chain(runtime);
    let entries = dirs.filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// A fresh directory that holds a model, a state directory and mountpoints. Whatever is mounted in
/// it is unmounted when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    dir: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().expect("it is there").join(name)
    }

    /// A new directory.
    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(&path).expect("a directory");
        path
    }

    /// Runs the program.
    pub(crate) fn run(&self, args: &[&str], paths: &[&Path]) -> Output {
        let mut command = aq_fs(&self.path("state"));
        command.args(args).args(paths).output().expect("the program runs")
    }

    /// Mounts `model` on a new directory `name`.
    #[track_caller]
    pub(crate) fn mount(&self, model: &Path, name: &str, flags: &[&str]) -> Daemon {
        let mountpoint = self.path(name);
        // A dead mount is there already, but can't be seen to be a directory.
        let _ = std::fs::create_dir(&mountpoint);
        let output = self.run(&[&["mount"], flags].concat(), &[model, &mountpoint]);
        assert!(output.status.success(), "{}", complaint(&output));
        self.daemon(&mountpoint)
    }

    /// The process that serves a mountpoint.
    #[track_caller]
    pub(crate) fn daemon(&self, mountpoint: &Path) -> Daemon {
        let status = self.status(mountpoint);
        let pid = status["pid"].as_i64().expect("its process answers");
        let pid = Pid::from_raw(pid.try_into().expect("a process id")).expect("not 0");
        let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty()).expect("it runs");
        Daemon { mountpoint: mountpoint.to_owned(), handle }
    }

    /// What `aq-fs status --json` says of a mountpoint.
    #[track_caller]
    pub(crate) fn status(&self, mountpoint: &Path) -> Value {
        let output = self.run(&["status", "--json"], &[mountpoint]);
        let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        all[0].clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let table = std::fs::read_to_string("/proc/self/mountinfo").expect("readable");
        for line in table.lines().rev() {
            let path = Path::new(line.split(' ').nth(4).expect("a path"));
            if path.starts_with(self.dir.path()) {
                let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
                let _ = Command::new("fusermount3").args(["-u", "-z", "-q"]).arg(path).status();
            }
        }
    }
}

/// The process that serves a mount; it is gone when this is dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) mountpoint: PathBuf,
    handle: OwnedFd,
}

impl Daemon {
    pub(crate) fn file(&self, name: &str) -> File {
        File::open(self.mountpoint.join(name)).expect("it can be opened")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::pidfd_send_signal(&self.handle, signal).expect("it runs");
    }

    pub(crate) fn has_ended(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(&self.handle, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).expect("polled") > 0
    }

    #[track_caller]
    pub(crate) fn wait_until_ended(&self) {
        wait_for("the process ends", || self.has_ended());
    }

    /// Ends it as if it had crashed.
    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
        self.wait_until_ended();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.mountpoint, UnmountFlags::DETACH);
        let _ = rustix::process::pidfd_send_signal(&self.handle, Signal::KILL);
    }
}
