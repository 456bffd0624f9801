//! What each mount is doing, as its daemon says over a Unix socket.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::Pid;
use serde::{Deserialize, Serialize, Serializer};

use super::places;
use super::speed::Rates;
use super::table::{self, Device, Entry, Pulse};
use crate::error::{Error, Result};
use crate::view::Stats;

/// How long a daemon may take to say something.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a daemon says about its mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The version of aq-fs that serves it.
    pub version: String,
    /// The process that serves it.
    pub pid: u32,
    /// The model's directory.
    #[serde(serialize_with = "as_text")]
    pub model: PathBuf,
    /// Where it is mounted.
    #[serde(serialize_with = "as_text")]
    pub mountpoint: PathBuf,
    /// The format and the schemes that it is shown in.
    pub shown_as: String,
    /// Bytes of the model's weight files.
    pub source_bytes: u64,
    /// Bytes of the files that stand for them.
    pub shown_bytes: u64,
    /// When it was mounted, in seconds since 1970.
    pub mounted_at: u64,
    /// Where it logs to, if not to its standard error.
    #[serde(serialize_with = "as_any_text")]
    pub log: Option<PathBuf>,
    /// What its user should know.
    pub warnings: Vec<String>,
    /// Reads answered, failed ones included.
    pub reads: u64,
    /// Reads that failed.
    pub read_errors: u64,
    /// CPU time that its process has taken, in nanoseconds.
    #[serde(default)]
    pub cpu_ns: u64,
    /// What the view has done and holds.
    #[serde(default)]
    pub stats: Stats,
    /// How fast it was read of late.
    #[serde(default)]
    pub rates: Rates,
    /// What its user can do to make it faster.
    #[serde(default)]
    pub advice: Option<String>,
    pub(super) device: Device,
}

/// A path for those who read JSON: what is not UTF-8 of it is replaced.
fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    path.to_string_lossy().serialize(serializer)
}

fn as_any_text<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_deref().map(Path::to_string_lossy).serialize(serializer)
}

/// How a mount fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is mounted and answers.
    Mounted,
    /// It is unmounted, but somebody still has files of it open.
    Detached,
    /// Its process is gone; every access fails.
    Dead,
    /// Its process doesn't answer.
    Silent,
    /// Another user's.
    Foreign,
}

/// One mount, and what could be learned about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// Where it is mounted, or was.
    #[serde(serialize_with = "as_text")]
    pub mountpoint: PathBuf,
    /// The model's directory.
    #[serde(serialize_with = "as_text")]
    pub model: PathBuf,
    /// How it fares.
    pub state: State,
    /// The user whose process serves it.
    pub user: Option<u32>,
    /// What its process says.
    pub status: Option<Status>,
}

/// Every mount of aq-fs, in the order in which they were made, detached ones last.
///
/// # Errors
/// `Io` where the kernel's table of mounts can't be read.
pub fn list() -> Result<Vec<Mount>> {
    let mut answers = ask_all();
    let mut mounts: Vec<Mount> = table::mounts()?
        .into_iter()
        .filter(Entry::is_ours)
        .map(|entry| {
            let of_it = |status: &Status| status.device == entry.device;
            // An earlier one of that number may not quite have ended.
            let latest = answers.iter().enumerate().filter(|(_, status)| of_it(status));
            let latest = latest
                .max_by_key(|(_, status)| (status.mountpoint == entry.path, status.mounted_at));
            let latest = latest.map(|(at, _)| at);
            let status = latest.map(|at| answers.swap_remove(at));
            let state = match status {
                Some(_) => State::Mounted,
                None => match table::pulse(&entry.path) {
                    Pulse::Dead => State::Dead,
                    Pulse::Silent => State::Silent,
                    // The kernel answers strangers itself, and says nothing.
                    Pulse::Alive if !entry.is_mine() => State::Foreign,
                    Pulse::Alive => State::Mounted,
                },
            };
            let (mountpoint, model, user) = (entry.path, entry.source.into(), entry.user);
            Mount { mountpoint, model, state, user, status }
        })
        .collect();
    mounts.extend(answers.into_iter().map(|status| Mount {
        mountpoint: status.mountpoint.clone(),
        model: status.model.clone(),
        state: State::Detached,
        user: Some(rustix::process::geteuid().as_raw()),
        status: Some(status),
    }));
    Ok(mounts)
}

/// The process that serves `device`, if it is this user's, whether it answers or not.
pub(super) fn process_of(device: Device) -> Option<Pid> {
    let made = |path: &PathBuf| path.symlink_metadata().and_then(|found| found.modified()).ok();
    let mut sockets: Vec<PathBuf> = sockets();
    sockets.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(&socket_prefix(device))
    });
    // The latest first: an earlier one of that number may not quite have ended.
    sockets.sort_by_key(|path| std::cmp::Reverse(made(path)));
    sockets.into_iter().find_map(|path| {
        let stream = UnixStream::connect(path).ok()?;
        Some(rustix::net::sockopt::socket_peercred(&stream).ok()?.pid)
    })
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Status {
    /// A status of the mount of `device` that has everything but figures.
    pub(super) fn new(device: Device, mountpoint: PathBuf, model: PathBuf) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            model,
            mountpoint,
            shown_as: String::new(),
            source_bytes: 0,
            shown_bytes: 0,
            mounted_at: now(),
            log: None,
            warnings: Vec::new(),
            reads: 0,
            read_errors: 0,
            cpu_ns: 0,
            stats: Stats::default(),
            rates: Rates::default(),
            advice: None,
            device,
        }
    }

    /// How long it has been mounted.
    pub fn uptime(&self) -> Duration {
        Duration::from_secs(now().saturating_sub(self.mounted_at))
    }
}

/// Answers everybody who connects, until dropped.
#[derive(Debug)]
pub(super) struct Server {
    listener: Arc<UnixListener>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers with what `status` returns, on the socket that belongs to `device`.
    ///
    /// # Errors
    /// `Io` where no directory for the socket can be used.
    pub(super) fn start(
        device: Device,
        status: impl Fn() -> Status + Send + 'static,
    ) -> Result<Self> {
        let mut failure = std::io::Error::from(std::io::ErrorKind::NotFound);
        for dir in places::runtime_dirs() {
            if !places::make_private(&dir) {
                continue;
            }
            match listen(&dir, device) {
                Ok((listener, path)) => return Self::serve(listener, path, status),
                Err(cause) => failure = cause,
            }
        }
        Err(Error::io("no directory for the status socket", failure))
    }

    fn serve(
        listener: UnixListener,
        path: PathBuf,
        status: impl Fn() -> Status + Send + 'static,
    ) -> Result<Self> {
        let listener = Arc::new(listener);
        let accepting = listener.clone();
        let answer = move || {
            // Ends when the listener is shut down.
            while let Ok((mut stream, _)) = accepting.accept() {
                let text = serde_json::to_vec(&status()).unwrap_or_default();
                let _ = stream.set_write_timeout(Some(PATIENCE));
                // Who hangs up has changed his mind.
                let _ = stream.write_all(&text);
            }
        };
        let thread = std::thread::Builder::new().name("status".to_owned()).spawn(answer);
        let thread = thread.map_err(|cause| Error::io("status thread", cause))?;
        Ok(Self { listener, path, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How the names of the sockets begin that speak for `device`.
fn socket_prefix(device: Device) -> String {
    format!("{}-{}-", device.0, device.1)
}

fn listen(dir: &Path, device: Device) -> std::io::Result<(UnixListener, PathBuf)> {
    let path = dir.join(format!("{}{}.sock", socket_prefix(device), std::process::id()));
    // Under its name only once it answers: whoever finds one that doesn't removes it.
    let early = dir.join(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&early);
    let listener = UnixListener::bind(&early)?;
    std::fs::rename(&early, &path)?;
    Ok((listener, path))
}

/// The sockets of this user's daemons.
fn sockets() -> Vec<PathBuf> {
    let dirs = places::runtime_dirs().into_iter();
    let entries = dirs.filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "sock")).collect()
}

/// What every daemon of this user says.
fn ask_all() -> Vec<Status> {
    let mut answers = Vec::new();
    for path in sockets() {
        match ask_at(&path) {
            Ok(Some(status)) => answers.push(status),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                // Nobody listens any more.
                let _ = std::fs::remove_file(&path);
            }
            // Silent, ending, or of another version.
            Ok(None) | Err(_) => {}
        }
    }
    answers
}

fn ask_at(path: &Path) -> std::io::Result<Option<Status>> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text).ok())
}
