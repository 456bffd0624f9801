//! What must hold before anything is mounted.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::kernel;
use super::table::{self, Pulse};
use crate::error::{self, Error, ErrorKind, Result};

/// Checks that this process can mount on `mountpoint`, and returns its canonical path. A dead mount
/// of ours that is in the way is removed.
///
/// # Errors
/// `Invalid` for a mountpoint that won't do, `Unsupported` for a machine without FUSE.
pub(super) fn check(mountpoint: &Path, allow_other: bool) -> Result<PathBuf> {
    check_machine(allow_other)?;
    check_mountpoint(mountpoint)
}

/// Checks that a mountpoint, canonical, lies outside of the directory that will be read.
///
/// # Errors
/// `Invalid` where it doesn't: the file system would wait for itself.
pub(super) fn check_outside(mountpoint: &Path, model: &Path) -> Result<()> {
    if mountpoint.starts_with(model) {
        return Err(refuse(
            mountpoint,
            format_args!("inside of the model {}, which is never changed", model.display()),
        ));
    }
    if model.starts_with(mountpoint) {
        return Err(refuse(mountpoint, "the model lies beneath it, and would be hidden"));
    }
    Ok(())
}

fn refuse(mountpoint: &Path, why: impl std::fmt::Display) -> Error {
    error::invalid(format!("mountpoint {}: {why}", mountpoint.display()))
}

fn check_machine(allow_other: bool) -> Result<()> {
    let root = rustix::process::geteuid().is_root();
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    if let Err(cause) = device {
        let advice = match cause.kind() {
            std::io::ErrorKind::NotFound => {
                return Err(error::unsupported(
                    "there is no /dev/fuse: apt-get install fuse3 and `modprobe fuse`, or start \
                     the container with --device /dev/fuse --cap-add SYS_ADMIN",
                ));
            }
            std::io::ErrorKind::PermissionDenied if !root => {
                "/dev/fuse is closed to ordinary users: chmod 666 /dev/fuse as root, or run as root"
            }
            _ => "/dev/fuse can't be opened: is this a container without --device /dev/fuse?",
        };
        return Err(Error::caused(ErrorKind::Unsupported, advice, cause));
    }
    if !root && !kernel::has_fusermount() {
        return Err(error::unsupported(format!(
            "fusermount3, which mounts for ordinary users, is missing: {}",
            kernel::INSTALL
        )));
    }
    if allow_other && !root {
        let allowed = std::fs::read_to_string("/etc/fuse.conf")
            .is_ok_and(|text| text.lines().any(|line| line.trim() == "user_allow_other"));
        if !allowed {
            return Err(error::unsupported(
                "--allow-other takes a line `user_allow_other` in /etc/fuse.conf",
            ));
        }
    }
    Ok(())
}

fn check_mountpoint(given: &Path) -> Result<PathBuf> {
    let path = match table::resolve(given) {
        Ok(path) => path,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(refuse(given, format_args!("missing: mkdir -p {}", given.display())));
        }
        Err(error) => return Err(Error::caused(ErrorKind::Invalid, "mountpoint", error)),
    };
    while let Some(entry) = table::mount_at(&path)? {
        if table::pulse(&path) != Pulse::Dead {
            let what = if entry.is_ours() {
                let source = table::shown(&entry.source);
                format!("{source} is mounted there already: aq-fs unmount {}", path.display())
            } else {
                format!("a mountpoint already, of type {}", table::shown(&entry.fs_type))
            };
            return Err(refuse(&path, what));
        }
        if !entry.is_ours() {
            return Err(refuse(
                &path,
                format_args!("a dead mount of type {} is there", table::shown(&entry.fs_type)),
            ));
        }
        tracing::info!("removing a dead mount at {}", path.display());
        kernel::detach(&path)?;
    }
    let metadata =
        path.metadata().map_err(|cause| refuse(&path, format_args!("not accessible: {cause}")))?;
    if !metadata.is_dir() {
        return Err(refuse(&path, "not a directory"));
    }
    let user = rustix::process::geteuid();
    let owner = metadata.uid();
    if !user.is_root() && owner != user.as_raw() {
        // As `fusermount3` will see it.
        let sticky = metadata.mode() & libc::S_ISVTX != 0;
        if sticky || rustix::fs::access(&path, rustix::fs::Access::WRITE_OK).is_err() {
            return Err(refuse(
                &path,
                format_args!(
                    "not yours: it belongs to user {owner}, you are user {}",
                    user.as_raw()
                ),
            ));
        }
    }
    let mut entries = std::fs::read_dir(&path)
        .map_err(|cause| refuse(&path, format_args!("not readable: {cause}")))?;
    if entries.next().is_some() {
        return Err(refuse(&path, "not empty"));
    }
    Ok(path)
}
