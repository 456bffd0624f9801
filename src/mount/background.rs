//! Mounts in a process of its own, which reports readiness or failure.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde::{Deserialize, Serialize};

use super::table::{self, Pulse};
use super::unmount::unmount;
use crate::error::{Error, ErrorKind, Result};

/// What is known of a mount once it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Where it is mounted.
    #[serde(with = "path")]
    pub mountpoint: PathBuf,
    /// The model's directory.
    #[serde(with = "path")]
    pub model: PathBuf,
    /// The format and the schemes that it is shown in.
    pub shown_as: String,
    /// Bytes of the model's weight files.
    pub source_bytes: u64,
    /// Bytes of the files that stand for them.
    pub shown_bytes: u64,
    /// What the user should know, a line each.
    pub warnings: Vec<String>,
}

/// Paths as they are: by itself `serde` fails for those that are not UTF-8.
mod path {
    use std::ffi::OsString;
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(source: D) -> Result<PathBuf, D::Error> {
        OsString::deserialize(source).map(PathBuf::from)
    }
}

/// What the process in the background tells the one that started it: one line of JSON on its
/// standard output.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    Ready(Ready),
    Failed {
        #[serde(with = "Kind")]
        kind: ErrorKind,
        message: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "ErrorKind")]
enum Kind {
    NotFound,
    Corrupt,
    Unsupported,
    Invalid,
    Stale,
    Io,
}

/// Runs this program again with `args`, in the background, and returns once its mount answers, with
/// the process that serves it. The program must then call [`daemonize`].
///
/// # Errors
/// Whatever kept it from mounting; `Io` where it ended without a word.
pub fn start(args: impl IntoIterator<Item = OsString>) -> Result<(Ready, Child)> {
    let failed = |cause| Error::io("start the mount in the background", cause);
    // The name that the program was found by, unless its file has been replaced since.
    let program = std::env::current_exe().ok().filter(|path| path.exists());
    let mut child = Command::new(program.unwrap_or_else(|| "/proc/self/exe".into()))
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let pipe = child.stdout.take().expect("it was asked for");
    let mut line = String::new();
    BufReader::new(pipe).read_line(&mut line).map_err(failed)?;
    match serde_json::from_str(&line) {
        Ok(Report::Ready(ready)) => {
            // It says so before it serves; that it does serve shows here.
            for _ in 0..15 {
                match table::pulse(&ready.mountpoint) {
                    Pulse::Silent => {}
                    Pulse::Dead => break,
                    Pulse::Alive => return Ok((ready, child)),
                }
            }
            let _ = unmount(&ready.mountpoint);
            Err(Error::new(ErrorKind::Io, "the mount doesn't answer"))
        }
        Ok(Report::Failed { kind, message }) => {
            let _ = child.wait();
            Err(Error::new(kind, message))
        }
        Err(_) => {
            let status = child.wait().map_err(failed)?;
            Err(Error::new(ErrorKind::Io, format!("the process to be mounting ended: {status}")))
        }
    }
}

/// Leaves the terminal and its session, calls `mount` and reports to the process that called
/// [`start`]. Must come before any thread is started.
///
/// `mount` is given the callback for when it is ready, and is done when the mount is. From then on
/// standard output leads nowhere and standard error to `log`.
///
/// # Errors
/// As `mount`, reported already if it failed before it was ready.
pub fn daemonize(
    log: Option<&File>,
    mount: impl FnOnce(&mut dyn FnMut(Ready) -> Result<()>) -> Result<()>,
) -> Result<()> {
    // It fails only for the leader of a session, who has no need of it.
    let _ = rustix::process::setsid();
    let mut reported = false;
    let outcome = mount(&mut |ready| {
        reported = true;
        let told = report(&Report::Ready(ready));
        // Whoever was to wait is gone, and so would nobody know of the mount.
        told.and_then(|()| let_go(log))
            .map_err(|cause| Error::io("nobody waits for the mount any more", cause))
    });
    if let (false, Err(error)) = (reported, &outcome) {
        let failure = Report::Failed { kind: error.kind(), message: error.to_string() };
        let _ = report(&failure);
    }
    outcome
}

fn report(report: &Report) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}

/// Gives up what the caller lent: its directory, which could not be unmounted, and its terminal.
fn let_go(log: Option<&File>) -> std::io::Result<()> {
    std::env::set_current_dir("/")?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(log.unwrap_or(&null))?;
    Ok(())
}
