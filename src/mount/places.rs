//! The directories where a daemon's socket and log live.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};

/// A log larger than this is put aside, replacing the one put aside before, when a mount starts.
const LOG_BYTES: u64 = 4 << 20;

/// Directories for sockets, the preferred one first; a mount may have used any of them, as the
/// environment differs between a login and a service.
pub(super) fn runtime_dirs() -> Vec<PathBuf> {
    let user = rustix::process::geteuid();
    let mut dirs = Vec::new();
    if user.is_root() {
        dirs.push(PathBuf::from("/run/aq-fs"));
    }
    let given = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let usual = PathBuf::from(format!("/run/user/{}", user.as_raw()));
    dirs.extend(given.into_iter().chain([usual]).filter(|dir| dir.is_absolute() && is_mine(dir)));
    for dir in dirs.iter_mut().filter(|dir| !dir.ends_with("aq-fs")) {
        dir.push("aq-fs");
    }
    dirs.push(temporary_dir());
    dirs.dedup();
    dirs
}

/// Opens the log of the mount on `mountpoint`: `given`, or else a file in the user's state
/// directory. `None` where there is no place for one.
///
/// # Errors
/// `Io` where `given` can't be written.
pub fn open_log(given: Option<&Path>, mountpoint: &Path) -> Result<Option<(Arc<File>, PathBuf)>> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => match log_file(mountpoint) {
            Some(path) => path,
            None => return Ok(None),
        },
    };
    if given.is_none() && path.metadata().is_ok_and(|found| found.len() > LOG_BYTES) {
        let _ = std::fs::rename(&path, path.with_extension("log.old"));
    }
    match OpenOptions::new().create(true).append(true).open(&path) {
        Ok(file) => {
            let path = path.canonicalize().unwrap_or(path);
            Ok(Some((Arc::new(file), path)))
        }
        Err(cause) if given.is_some() => {
            Err(Error::io(format_args!("log {}", path.display()), cause))
        }
        Err(_) => Ok(None),
    }
}

/// Makes `dir`, for this user alone, if it isn't there; says whether it is there and this user's.
pub(super) fn make_private(dir: &Path) -> bool {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.is_ok() && is_mine(dir)
}

/// The log of the mount on `mountpoint`, unless the user names another: in the state directory, or
/// in a directory of ours below `/tmp` where there is none. `None` where neither can be made.
fn log_file(mountpoint: &Path) -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
    let state = absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map(|dir| dir.join("aq-fs"));
    let mut dirs = state.into_iter().chain([temporary_dir()]);
    let dir = dirs.find(|dir| make_private(dir) && is_writable(dir))?;
    let path = mountpoint.to_string_lossy();
    let name = path.trim_matches('/').replace('/', "-");
    // File names end at 255 bytes.
    let tail = name.char_indices().rev().take_while(|(at, _)| name.len() - at <= 200).last();
    Some(dir.join(format!("{}.log", &name[tail.map_or(0, |(at, _)| at)..])))
}

fn temporary_dir() -> PathBuf {
    PathBuf::from(format!("/tmp/aq-fs-{}", rustix::process::geteuid().as_raw()))
}

/// Whether `dir` is a directory, no symbolic link, that belongs to this user.
fn is_mine(dir: &Path) -> bool {
    let user = rustix::process::geteuid().as_raw();
    dir.symlink_metadata().is_ok_and(|found| found.is_dir() && found.uid() == user)
}

fn is_writable(dir: &Path) -> bool {
    rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_ok()
}
