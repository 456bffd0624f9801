//! A mount's life: preflight, session, readiness, signals, unmount, stale mounts.
//!
//! The process that serves a mount never touches its own mountpoint: it would wait for itself. That
//! a mount answers is for others to see.

mod background;
mod kernel;
mod places;
mod preflight;
mod status;
mod table;
mod unmount;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub use background::{Ready, daemonize, start};
pub use places::open_log;
pub use status::{Mount, State, Status, list};
pub use table::resolve;
pub use unmount::{Unmounted, mountpoints, unmount};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::{Counters, Session};
use crate::view::View;
use kernel::Detached;
use table::Device;

/// What the kernel reads ahead of a reader at most, in KiB; its default of 128 keeps too few
/// requests in flight. Only root may raise it.
const READ_AHEAD_KIB: u32 = 4096;

/// How a view is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// An empty directory.
    pub mountpoint: PathBuf,
    /// Whether other users may read it.
    pub allow_other: bool,
    /// Where this process logs to, for [`Status`].
    pub log: Option<PathBuf>,
}

/// Mounts the view that `open` returns, calls `ready` when it is mounted, and serves it until it is
/// unmounted: by anybody, or by SIGINT, SIGTERM or SIGHUP to this process.
///
/// # Errors
/// `Invalid` for a mountpoint that won't do, `Unsupported` for a machine that can't, whatever `open`
/// or `ready` fail with, `Io` where the kernel refuses. Nothing is mounted any more then.
pub fn run(
    open: impl FnOnce() -> Result<View>,
    options: &Options,
    ready: &mut dyn FnMut(Ready) -> Result<()>,
) -> Result<()> {
    let mountpoint = preflight::check(&options.mountpoint, options.allow_other)?;
    let view = Arc::new(open()?);
    preflight::check_outside(&mountpoint, view.root())?;

    // From here on, so that none ends the process between mounting and unmounting.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])
        .map_err(|cause| Error::io("signal handlers", cause))?;
    let device = kernel::attach(view.root(), &mountpoint, options.allow_other)?;
    let attached = Attached::new(&mountpoint).inspect_err(|_| {
        let _ = kernel::detach(&mountpoint);
    })?;
    let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let session = Session::open(view.clone(), device, owner)?;
    raise_read_ahead(attached.device);

    let status = describe(&view, attached.device, &mountpoint, options.log.clone());
    let answer = figures(status.clone(), view, session.counters());
    let server = status::Server::start(attached.device, answer);
    if let Err(error) = &server {
        tracing::warn!("{error}: `aq-fs status` will know little of this mount");
    }
    let handle = signals.handle();
    let number = attached.device;
    let listener = std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || end_on_signal(&mut signals, number))
        .map_err(|cause| Error::io("signal thread", cause))?;
    tracing::info!("{} is mounted on {}", status.model.display(), mountpoint.display());
    let outcome = ready(Ready {
        mountpoint: mountpoint.clone(),
        model: status.model,
        shown_as: status.shown_as,
        source_bytes: status.source_bytes,
        shown_bytes: status.shown_bytes,
        warnings: status.warnings,
    })
    .and_then(|()| session.run());

    handle.close();
    let _ = listener.join();
    drop(server);
    drop(attached);
    tracing::info!("{} is unmounted", mountpoint.display());
    outcome
}

/// A mount made by this process; it is detached when this is dropped, if it still is there.
#[derive(Debug)]
struct Attached {
    device: Device,
}

impl Attached {
    /// What was just mounted on `mountpoint`.
    fn new(mountpoint: &Path) -> Result<Self> {
        let entry = table::mount_at(mountpoint)?.filter(table::Entry::is_ours);
        entry.map(|entry| Self { device: entry.device }).ok_or_else(|| {
            Error::new(ErrorKind::Io, format!("{}: vanished at once", mountpoint.display()))
        })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Err(error) = detach_all(self.device) {
            tracing::error!("{error}");
        }
    }
}

/// Detaches a file system wherever it is seen; says whether it was in use anywhere. By its number,
/// as another may have been mounted at the same path since.
fn detach_all(device: Device) -> Result<Detached> {
    let mut detached = Detached::Idle;
    for entry in table::mounts()?.into_iter().rev().filter(|entry| entry.device == device) {
        let on_top = table::mount_at(&entry.path)?.is_some_and(|top| top.device == device);
        if !on_top {
            let path = entry.path.display();
            let why = format!("{path}: can't be unmounted, as another mount covers it");
            return Err(Error::new(ErrorKind::Io, why));
        }
        if kernel::detach(&entry.path)? == Detached::Busy {
            detached = Detached::Busy;
        }
    }
    Ok(detached)
}

/// The first signal unmounts; the session then ends with its last reader. The second ends it now.
fn end_on_signal(signals: &mut Signals, device: Device) {
    let mut unmounted = false;
    for signal in signals.forever() {
        if unmounted {
            tracing::warn!("ended with files still in use");
            std::process::exit(128 + signal);
        }
        match detach_all(device) {
            Ok(Detached::Idle) => {}
            Ok(Detached::Busy) => tracing::warn!(
                "in use: unmounted, and served until the last reader closes its files; \
                 a second signal ends it now"
            ),
            Err(error) => {
                tracing::error!("{error}");
                std::process::exit(1);
            }
        }
        unmounted = true;
    }
}

/// Raises the kernel's readahead, which takes root, and is only about speed.
fn raise_read_ahead(device: Device) {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, READ_AHEAD_KIB.to_string()) {
        tracing::debug!("{path}: {error}");
    }
}

fn describe(view: &View, device: Device, mountpoint: &Path, log: Option<PathBuf>) -> Status {
    let mut shown_as: Vec<String> = Vec::new();
    for model in view.models() {
        let scheme = model.plan().weights.first().map(|weight| weight.scheme.to_string());
        let name = model.format().name();
        let text = scheme.map_or_else(|| name.to_owned(), |scheme| format!("{name} {scheme}"));
        if !shown_as.contains(&text) {
            shown_as.push(text);
        }
    }
    Status {
        shown_as: shown_as.join(", "),
        source_bytes: view.models().iter().map(|model| model.source_len()).sum(),
        shown_bytes: view.models().iter().map(|model| model.shown_len()).sum(),
        log,
        warnings: view.warnings().to_vec(),
        ..Status::new(device, mountpoint.to_owned(), view.root().to_owned())
    }
}

/// `status` with the figures of the moment it is called in.
fn figures(status: Status, view: Arc<View>, counters: Arc<Counters>) -> impl Fn() -> Status {
    move || Status {
        reads: counters.reads(),
        read_errors: counters.errors(),
        stats: view.stats(),
        ..status.clone()
    }
}
