//! A mount's life: preflight, session, readiness, signals, unmount, stale mounts.
//!
//! The process that serves a mount never touches its own mountpoint: it would wait for itself. That
//! a mount answers is for others to see.

mod background;
mod kernel;
mod places;
mod preflight;
mod speed;
mod status;
mod table;
mod unmount;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::time::ClockId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

pub use background::{Ready, daemonize, start};
pub use places::open_log;
pub use speed::Rates;
pub use status::{Mount, State, Status, list};
pub use table::resolve;
pub use unmount::{Unmounted, mountpoints, unmount};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::{Counters, Session};
use crate::memory;
use crate::threads::cpu_ns;
use crate::view::View;
use kernel::Detached;
use speed::Speed;
use table::{Device, Pulse};

/// What the kernel reads ahead of a reader at most, in KiB; its default of 128 keeps too few
/// requests in flight. Only root may raise it.
const READ_AHEAD_KIB: u64 = 4096;

/// How a view is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// An empty directory.
    pub mountpoint: PathBuf,
    /// Whether other users may read it.
    pub allow_other: bool,
    /// Where this process logs to, for [`Status`].
    pub log: Option<PathBuf>,
    /// Whether reads get zeros that lie ready in memory: what is then measured is the kernel and the
    /// session, without the view.
    pub null: bool,
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
    memory::give_back_large();
    let view = Arc::new(open()?);
    memory::give_back();
    preflight::check_outside(&mountpoint, view.root())?;

    // From here on, so that none ends the process between mounting and unmounting.
    let signals = Signals::new([SIGINT, SIGTERM, SIGHUP])
        .map_err(|cause| Error::io("signal handlers", cause))?;
    let device = kernel::attach(view.root(), &mountpoint, options.allow_other)?;
    let attached = Attached::new(&mountpoint, &device).inspect_err(|_| {
        let _ = kernel::detach(&mountpoint);
    })?;
    let attached = Arc::new(attached);
    let outcome = serve(view, device, &attached, signals, &mountpoint, options, ready);
    let attached = Arc::into_inner(attached).expect("its other holder has ended");
    if let Err(error) = attached.clear() {
        tracing::error!("{error}");
    }
    tracing::info!("{} is unmounted", mountpoint.display());
    outcome
}

/// Serves what is attached until it is detached.
fn serve(
    view: Arc<View>,
    device: OwnedFd,
    attached: &Arc<Attached>,
    signals: Signals,
    mountpoint: &Path,
    options: &Options,
    ready: &mut dyn FnMut(Ready) -> Result<()>,
) -> Result<()> {
    let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let session = Session::open(view.clone(), device, owner, options.null)?;
    raise_read_ahead(attached.number);
    if let Some(kib) = read_ahead_kib(attached.number) {
        view.expect_readahead(kib << 10);
    }

    let status = describe(&view, attached.number, mountpoint, options.log.clone());
    let answer = figures(status.clone(), view, session.counters());
    let server = status::Server::start(attached.number, answer);
    if let Err(error) = &server {
        tracing::warn!("{error}: `aq-fs status` will know little of this mount");
    }
    let _listener = SignalListener::start(signals, attached.clone())?;
    tracing::info!("{} is mounted on {}", status.model.display(), mountpoint.display());
    ready(Ready {
        mountpoint: mountpoint.to_owned(),
        model: status.model,
        shown_as: status.shown_as,
        source_bytes: status.source_bytes,
        shown_bytes: status.shown_bytes,
        warnings: status.warnings,
    })?;
    session.run()
}

/// A mount made by this process.
#[derive(Debug)]
struct Attached {
    number: Device,
    /// Tells whether the kernel still has the file system.
    device: OwnedFd,
}

impl Attached {
    /// What was just mounted on `mountpoint` for `device`.
    fn new(mountpoint: &Path, device: &OwnedFd) -> Result<Self> {
        let entry = table::mount_at(mountpoint)?.filter(table::Entry::is_ours);
        let Some(entry) = entry else {
            let why = format!("{}: vanished at once", mountpoint.display());
            return Err(Error::new(ErrorKind::Io, why));
        };
        let device = device.try_clone().map_err(|cause| Error::io("/dev/fuse", cause))?;
        Ok(Self { number: entry.device, device })
    }

    /// Detaches it wherever it is seen, unless it is gone already; says whether it was in use.
    fn detach(&self) -> Result<Detached> {
        // Once it is gone, its number may be that of another.
        match is_connected(&self.device) {
            true => detach_where(self.number, |_| true),
            false => Ok(Detached::Idle),
        }
    }

    /// Detaches what is left of it after its session.
    fn clear(self) -> Result<Detached> {
        drop(self.device);
        detach_where(self.number, |path| table::pulse(path) == Pulse::Dead)
    }
}

/// Whether the file system that `device` serves is still there.
fn is_connected(device: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(device, PollFlags::empty())];
    match rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(_) => !fds[0].revents().contains(PollFlags::ERR),
        Err(_) => false,
    }
}

/// Detaches a file system from the paths, of those where it is seen, that `may` admits.
fn detach_where(number: Device, may: impl Fn(&Path) -> bool) -> Result<Detached> {
    let mut detached = Detached::Idle;
    for entry in table::mounts()?.into_iter().rev() {
        if entry.device != number || !may(&entry.path) {
            continue;
        }
        let on_top = table::mount_at(&entry.path)?.is_some_and(|top| top.device == number);
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

/// A thread that waits for signals, until this is dropped.
#[derive(Debug)]
struct SignalListener {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalListener {
    fn start(mut signals: Signals, attached: Arc<Attached>) -> Result<Self> {
        let handle = signals.handle();
        let thread = std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || end_on_signal(&mut signals, &attached))
            .map_err(|cause| Error::io("signal thread", cause))?;
        Ok(Self { handle, thread: Some(thread) })
    }
}

impl Drop for SignalListener {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The first signal unmounts; the session then ends with its last reader. The second ends it now.
fn end_on_signal(signals: &mut Signals, attached: &Attached) {
    let mut unmounted = false;
    for signal in signals.forever() {
        if unmounted {
            tracing::warn!("ended with files still in use");
            std::process::exit(128 + signal);
        }
        match attached.detach() {
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

/// Whether mounts of this process have their readahead raised, which takes root and a `/sys` that can be
/// written.
pub fn raises_read_ahead() -> bool {
    rustix::fs::access(BDI, rustix::fs::Access::WRITE_OK).is_ok()
}

/// Where the kernel has a directory for each mount's device.
const BDI: &str = "/sys/class/bdi";

/// Raises the kernel's readahead, which is only about speed.
fn raise_read_ahead(device: Device) {
    let path = read_ahead_path(device);
    if let Err(error) = std::fs::write(&path, READ_AHEAD_KIB.to_string()) {
        tracing::debug!("{path}: {error}");
    }
}

fn read_ahead_path(device: Device) -> String {
    format!("{BDI}/{device}/read_ahead_kb")
}

fn read_ahead_kib(device: Device) -> Option<u64> {
    std::fs::read_to_string(read_ahead_path(device)).ok()?.trim().parse().ok()
}

/// What would make reads faster that this process may not do.
fn advice(device: Device) -> Option<String> {
    let kib = read_ahead_kib(device)?;
    (kib < READ_AHEAD_KIB).then(|| {
        let path = read_ahead_path(device);
        format!(
            "the kernel reads {kib} KiB ahead; reads get faster by: \
             echo {READ_AHEAD_KIB} | sudo tee {path}"
        )
    })
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
    let speed = Speed::new();
    move || {
        let stats = view.stats();
        Status {
            reads: counters.reads(),
            read_errors: counters.errors(),
            cpu_ns: cpu_ns(ClockId::ProcessCPUTime),
            stats,
            rates: speed.since_asked(Instant::now(), stats.output_bytes, stats.source_bytes),
            warnings: status.warnings.iter().cloned().chain(view.spoilt()).collect(),
            advice: advice(status.device),
            ..status.clone()
        }
    }
}
