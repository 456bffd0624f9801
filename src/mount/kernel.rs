//! Attaches and detaches a file system: by system call, else by `fusermount3`.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

use super::table::FS_TYPE;
use crate::error::{self, Error, ErrorKind, Result};

/// The program, set to run as root, that mounts for ordinary users.
const FUSERMOUNT: &str = "fusermount3";

/// How often, and how far apart, a busy mount is tried before it is detached all the same.
const BUSY_TRIES: u32 = 10;
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// What an ordinary user is told who lacks it.
pub(super) const INSTALL: &str = "install it: apt-get install fuse3";

/// How a mount was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detached {
    /// Nobody was using it.
    Idle,
    /// It is gone from the directory tree, but whoever has files of it open goes on reading.
    Busy,
}

/// Whether `fusermount3` is there to be run.
pub(super) fn has_fusermount() -> bool {
    Command::new(FUSERMOUNT).arg("--version").output().is_ok()
}

/// Mounts a read-only file system, whose requests come from the device returned.
///
/// # Errors
/// `Unsupported` where this machine or container can't; `Io` where the kernel refuses.
pub(super) fn attach(source: &Path, mountpoint: &Path, allow_other: bool) -> Result<OwnedFd> {
    match by_call(source, mountpoint, allow_other)? {
        Some(device) => Ok(device),
        None => by_fusermount(source, mountpoint, allow_other),
    }
}

/// Detaches what is seen at `mountpoint`, a canonical path. Whoever uses it may go on.
///
/// # Errors
/// `Io` where the kernel refuses; `Unsupported` where it takes `fusermount3`, which is missing.
pub(super) fn detach(mountpoint: &Path) -> Result<Detached> {
    // Whoever has just closed a file may count as using it for a moment.
    for _ in 0..BUSY_TRIES {
        match detach_once(mountpoint, false) {
            Ok(None) => std::thread::sleep(BUSY_PAUSE),
            Ok(Some(detached)) => return Ok(detached),
            Err(error) => return Err(error),
        }
    }
    let detached = detach_once(mountpoint, true)?;
    Ok(detached.unwrap_or(Detached::Busy))
}

/// One attempt; `None` where the mount is in use, and that isn't to be overridden by `lazily`.
fn detach_once(mountpoint: &Path, lazily: bool) -> Result<Option<Detached>> {
    let plain = UnmountFlags::NOFOLLOW;
    let at =
        |errno: Errno| Error::io(format_args!("unmount {}", mountpoint.display()), errno.into());
    match rustix::mount::unmount(mountpoint, plain) {
        Ok(()) => Ok(Some(Detached::Idle)),
        Err(Errno::BUSY) if lazily => {
            let lazy = plain | UnmountFlags::DETACH;
            rustix::mount::unmount(mountpoint, lazy).map(|()| Some(Detached::Busy)).map_err(at)
        }
        Err(Errno::BUSY) => Ok(None),
        Err(Errno::PERM) => match fusermount(&["-u"], mountpoint) {
            Ok(()) => Ok(Some(Detached::Idle)),
            Err(_) if lazily => {
                fusermount(&["-u", "-z"], mountpoint).map(|()| Some(Detached::Busy))
            }
            Err(error) if error.to_string().contains("busy") => Ok(None),
            Err(error) => Err(error),
        },
        Err(errno) => Err(at(errno)),
    }
}

/// Mounts by system call; `None` where that takes more rights than we have.
fn by_call(source: &Path, mountpoint: &Path, allow_other: bool) -> Result<Option<OwnedFd>> {
    let device = match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(device) => device,
        // `fusermount3` would fail at the same, with a worse message.
        Err(cause) => return Err(Error::caused(ErrorKind::Unsupported, "/dev/fuse", cause)),
    };
    let mode = File::open(mountpoint)
        .and_then(|dir| dir.metadata())
        .map_err(|cause| Error::io(format_args!("mountpoint {}", mountpoint.display()), cause))?;
    let options = format!(
        "fd={},rootmode={:o},user_id={},group_id={},default_permissions{}",
        device.as_raw_fd(),
        mode.permissions().mode(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
        if allow_other { ",allow_other" } else { "" }
    );
    let flags = MountFlags::RDONLY
        | MountFlags::NOATIME
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    let options = CString::new(options).expect("no NUL is in it");
    match rustix::mount::mount(source, mountpoint, FS_TYPE, flags, Some(options.as_c_str())) {
        Ok(()) => Ok(Some(device.into())),
        Err(Errno::PERM) if has_fusermount() => Ok(None),
        Err(Errno::PERM) => Err(error::unsupported(format!(
            "not allowed to mount: run as root (in a container with --cap-add SYS_ADMIN), or with \
             {FUSERMOUNT} ({INSTALL})"
        ))),
        Err(Errno::NODEV) => {
            Err(error::unsupported("the kernel has no FUSE: load it with `modprobe fuse`"))
        }
        Err(errno) => {
            Err(Error::io(format_args!("mount on {}", mountpoint.display()), errno.into()))
        }
    }
}

/// Has `fusermount3` mount: it sends the device over a socket that it finds by its number in the
/// environment.
fn by_fusermount(source: &Path, mountpoint: &Path, allow_other: bool) -> Result<OwnedFd> {
    let failed = |errno: Errno| Error::io(FUSERMOUNT, errno.into());
    // Ours is closed in the program that is run, theirs is not.
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::empty(),
        None,
    )
    .map_err(failed)?;
    rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC).map_err(failed)?;
    let mut options =
        std::ffi::OsString::from("ro,noatime,nosuid,nodev,noexec,default_permissions");
    options.push(if allow_other { ",allow_other" } else { "" });
    options.push(",subtype=aq-fs,fsname=");
    // A comma would end the option.
    let name = source.as_os_str().as_bytes();
    let escaped: Vec<u8> = name
        .iter()
        .flat_map(|&byte| match byte {
            b',' | b'\\' => vec![b'\\', byte],
            _ => vec![byte],
        })
        .collect();
    options.push(std::ffi::OsStr::from_bytes(&escaped));
    let output = Command::new(FUSERMOUNT)
        .arg("-o")
        .arg(&options)
        .arg("--")
        .arg(mountpoint)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .output()
        .map_err(|cause| Error::caused(ErrorKind::Unsupported, FUSERMOUNT, cause))?;
    drop(theirs);
    if !output.status.success() {
        return Err(refusal(&output.stderr));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(&ours, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC)
        .map_err(failed)?;
    let device = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    device.ok_or_else(|| Error::new(ErrorKind::Io, format!("{FUSERMOUNT} sent no device")))
}

fn fusermount(options: &[&str], mountpoint: &Path) -> Result<()> {
    let output = Command::new(FUSERMOUNT).args(options).arg("--").arg(mountpoint).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(refusal(&output.stderr)),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
            Err(error::unsupported(format!("{FUSERMOUNT} is missing: {INSTALL}")))
        }
        Err(cause) => Err(Error::io(FUSERMOUNT, cause)),
    }
}

/// What `fusermount3` printed, as an error.
fn refusal(stderr: &[u8]) -> Error {
    let text = String::from_utf8_lossy(stderr);
    let line = text.trim().lines().collect::<Vec<_>>().join("; ");
    let kind =
        if line.contains("user_allow_other") { ErrorKind::Unsupported } else { ErrorKind::Io };
    Error::new(kind, line)
}
