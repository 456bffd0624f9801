//! Ends mounts, live or dead, and waits until they are gone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::PidfdFlags;

use super::kernel::{self, Detached};
use super::{status, table};
use crate::error::{self, Error, ErrorKind, Result};

/// How long a daemon may take to end once nothing is mounted.
const PATIENCE: Duration = Duration::from_secs(10);

/// How a mount ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// It is gone, and its process too.
    Gone,
    /// It is gone from the directory tree; its process, of this id, serves those who have files of
    /// it open until they close them.
    InUse(Option<u32>),
    /// It is gone; its process, of this id, has not ended yet though nobody needs it.
    Lingering(u32),
}

/// Unmounts what aq-fs has mounted at `path`, and waits until its process has ended. Mounts whose
/// process is dead or stuck are removed too.
///
/// # Errors
/// `NotFound` where no mount of aq-fs is at `path`; `Io` where the kernel refuses, as for another
/// user's mount.
pub fn unmount(path: &Path) -> Result<Unmounted> {
    let path = table::resolve(path)?;
    let entry = table::mount_at(&path)?.filter(table::Entry::is_ours);
    let Some(entry) = entry else {
        return Err(error::not_found(format!("{}: not a mount of aq-fs", path.display())));
    };
    if let (false, Some(user)) = (may_end(&entry), entry.user) {
        return Err(Error::new(
            ErrorKind::Io,
            format!("{}: mounted by user {user}, for whom only root may end it", path.display()),
        ));
    }
    // A handle on the process, as its number might be given to another once it has ended.
    let process = status::process_of(entry.device)
        .and_then(|pid| Some((pid, rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?)));
    let detached = kernel::detach(&path)?;
    if table::mount_at(&path)?.is_some_and(|left| left.device == entry.device) {
        return Err(Error::new(ErrorKind::Io, format!("{}: still mounted", path.display())));
    }
    // It may be seen elsewhere, where it was bound to.
    let is_bound = table::mounts()?.iter().any(|other| other.device == entry.device);
    let detached = if is_bound { Detached::Busy } else { detached };
    let Some((pid, process)) = process else {
        return Ok(match detached {
            Detached::Idle => Unmounted::Gone,
            Detached::Busy => Unmounted::InUse(None),
        });
    };
    let pid = pid.as_raw_nonzero().get().cast_unsigned();
    let patience = match detached {
        Detached::Idle => PATIENCE,
        Detached::Busy => Duration::ZERO,
    };
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    let timeout = Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: 0 };
    match (rustix::event::poll(&mut ended, Some(&timeout)), detached) {
        (Ok(1..), _) => Ok(Unmounted::Gone),
        (_, Detached::Busy) => Ok(Unmounted::InUse(Some(pid))),
        (_, Detached::Idle) => Ok(Unmounted::Lingering(pid)),
    }
}

/// The mountpoints of every mount of aq-fs that this user may end.
///
/// # Errors
/// `Io` where the kernel's table of mounts can't be read.
pub fn mountpoints() -> Result<Vec<PathBuf>> {
    let mounts = table::mounts()?.into_iter().rev();
    let all = mounts.filter(|entry| entry.is_ours() && may_end(entry));
    Ok(all.map(|entry| entry.path).collect())
}

fn may_end(entry: &table::Entry) -> bool {
    rustix::process::geteuid().is_root() || entry.is_mine()
}
