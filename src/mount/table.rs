//! The kernel's table of mounts, and which of them are ours.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use crate::error::{Error, Result};

/// The type under which the kernel lists mounts of aq-fs.
pub(super) const FS_TYPE: &str = "fuse.aq-fs";

/// How long a mount may take to answer before it counts as silent.
const PATIENCE: Duration = Duration::from_secs(2);

/// A file system's device number, `MAJOR:MINOR`. No other has it while the file system is in use,
/// even after it has gone from the table; the next one may have it after that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(super) struct Device(pub(super) u32, pub(super) u32);

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.to_string()
    }
}

impl TryFrom<String> for Device {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl std::str::FromStr for Device {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (major, minor) = text.split_once(':').ok_or("not MAJOR:MINOR")?;
        let number = |digits: &str| digits.parse().map_err(|_| "not MAJOR:MINOR");
        Ok(Self(number(major)?, number(minor)?))
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.0, self.1)
    }
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) device: Device,
    pub(super) path: PathBuf,
    pub(super) fs_type: OsString,
    pub(super) source: OsString,
    /// The user whose daemon serves it, for a FUSE file system.
    pub(super) user: Option<u32>,
}

impl Entry {
    pub(super) fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }

    /// Whether this user's process serves it.
    pub(super) fn is_mine(&self) -> bool {
        self.user == Some(rustix::process::geteuid().as_raw())
    }
}

/// Whether somebody answers for a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pulse {
    Alive,
    /// Its daemon is gone: "transport endpoint is not connected".
    Dead,
    /// It has a daemon that doesn't answer.
    Silent,
}

/// Every mount of this mount namespace, in the order in which they were made.
///
/// # Errors
/// `Io` where `/proc` can't be read.
pub(super) fn mounts() -> Result<Vec<Entry>> {
    let path = "/proc/self/mountinfo";
    let text = std::fs::read(path).map_err(|cause| Error::io(path, cause))?;
    Ok(text.split(|&byte| byte == b'\n').filter_map(parse).collect())
}

/// The mount that is seen at `path`, which is canonical: the one made last.
///
/// # Errors
/// As [`mounts`].
pub(super) fn mount_at(path: &Path) -> Result<Option<Entry>> {
    Ok(mounts()?.into_iter().rfind(|entry| entry.path == path))
}

/// The canonical path of a mountpoint, without a question to whoever serves it, who may be dead or
/// stuck.
///
/// # Errors
/// `NotFound` or `Io` where the path leads nowhere.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let at = |cause| Error::io(path.display(), cause);
    if let Some(name) = path.file_name() {
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let resolved = parent.canonicalize().map_err(at)?.join(name);
        if mount_at(&resolved)?.is_some() {
            return Ok(resolved);
        }
    }
    path.canonicalize().map_err(at)
}

/// Whether somebody answers at `path`, a mountpoint.
pub(super) fn pulse(path: &Path) -> Pulse {
    let (sender, receiver) = mpsc::channel();
    let path = path.to_owned();
    // On a thread of its own, which is left behind where nobody answers.
    std::thread::spawn(move || sender.send(rustix::fs::statfs(&path).map(drop)));
    match receiver.recv_timeout(PATIENCE) {
        Ok(Ok(())) => Pulse::Alive,
        Ok(Err(rustix::io::Errno::NOTCONN)) => Pulse::Dead,
        Ok(Err(rustix::io::Errno::CONNABORTED)) => Pulse::Dead,
        // Whatever else it says, somebody said it.
        Ok(Err(_)) => Pulse::Alive,
        Err(_) => Pulse::Silent,
    }
}

/// Parses a line of mountinfo: `36 35 98:0 /root /path options [tags] - type source options`.
fn parse(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?.parse().ok()?;
    let path = unescape(fields.nth(1)?);
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = unescape(rest.next()?);
    let source = unescape(rest.next()?);
    let user = rest.next().and_then(|options| {
        let options = std::str::from_utf8(options).ok()?;
        options.split(',').find_map(|option| option.strip_prefix("user_id="))?.parse().ok()
    });
    Some(Entry { device, path: path.into(), fs_type, source, user })
}

/// Undoes `\040` and the like, which stand for blanks, line ends and backslashes.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = (byte == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                out.push(code);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

/// A path as one line of text.
pub(super) fn shown(path: &std::ffi::OsStr) -> String {
    String::from_utf8_lossy(path.as_bytes()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_understood_with_its_escapes_and_tags() {
        let line = br"36 35 0:52 / /mnt/a\040b\134c rw,noatime shared:9 master:1 - fuse.aq-fs /m\040x ro,user_id=1000,group_id=7";
        let entry = Entry {
            device: Device(0, 52),
            path: r"/mnt/a b\c".into(),
            fs_type: FS_TYPE.into(),
            source: "/m x".into(),
            user: Some(1000),
        };
        assert_eq!(parse(line), Some(entry));
        let line = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw";
        let entry = parse(line).expect("it is a mount");
        assert!(!entry.is_ours() && entry.user.is_none() && entry.path == Path::new("/"));
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"36 35 052 / /mnt"), None);
    }
}
