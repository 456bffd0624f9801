//! How much of a file is written for good, in a hidden file beside it.
//!
//! ```text
//! {"identity":{"version":"0.1.0","recipe":"...","source":"5a..."},"chunk":2097152}
//! 31 16777216      the first 31 portions, 16,777,216 bytes, are on disk
//! 64 33554432
//! whole            so is every other, and the file has its name, or can be given it
//! ```
//!
//! A line is added only when what it says is on disk. A line that is torn, and what follows, counts
//! for nothing.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::view::Identity;

/// What a journal is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Subject {
    /// The view.
    pub(super) identity: Identity,
    /// Its chunks' size, which portions depend on.
    pub(super) chunk: u64,
}

/// How far a file has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Portions that are on disk, from the first on.
    pub(super) portions: u64,
    /// Their bytes.
    pub(super) bytes: u64,
    /// Whether these are all.
    pub(super) whole: bool,
}

/// A journal that this process alone writes.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
}

/// The hidden name that belongs to a file's, with this ending.
pub(super) fn hidden(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().expect("a file below the output directory"));
    name.push(ending);
    path.with_file_name(name)
}

/// Opens a hidden file to go on with it, or makes it. A link of that name leads to nothing of ours.
pub(super) fn open_own(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()).open(path)
}

/// What the journal at `path` says, if there is one that can be understood.
pub(super) fn read(path: &Path) -> Option<(Subject, Progress)> {
    let text = fs::read(path).ok()?;
    parse(&text).map(|(subject, progress, _)| (subject, progress))
}

impl Journal {
    /// Opens the journal at `path`, makes it one about `subject`, and tells how far that has come.
    ///
    /// # Errors
    /// `Io` where it can't be opened, or another process writes it.
    pub(super) fn open(path: PathBuf, subject: &Subject) -> Result<(Self, Progress)> {
        let at = |cause| Error::io(path.display(), cause);
        let mut file = open_own(&path).map_err(at)?;
        // Where a file system has no locks, nothing keeps two processes apart but their users.
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            let message = format!("{}: another process is writing this export", path.display());
            return Err(Error::new(ErrorKind::Io, message));
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(at)?;
        let found = parse(&text).filter(|(found, ..)| found == subject);
        let (progress, len) = found.map_or((Progress::default(), 0), |(_, p, len)| (p, len));
        file.set_len(len as u64).and_then(|()| file.seek(SeekFrom::End(0))).map_err(at)?;
        let mut journal = Self { path, file };
        if len == 0 {
            journal.begin(subject)?;
        }
        Ok((journal, progress))
    }

    /// Forgets all progress.
    pub(super) fn begin(&mut self, subject: &Subject) -> Result<()> {
        let at = |cause| Error::io(self.path.display(), cause);
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(at)?;
        self.add(&serde_json::to_string(subject).expect("strings and numbers serialize"))
    }

    /// Notes what is on disk.
    pub(super) fn note(&mut self, progress: Progress) -> Result<()> {
        match progress {
            Progress { whole: true, .. } => self.add("whole"),
            Progress { portions, bytes, .. } => self.add(&format!("{portions} {bytes}")),
        }
    }

    fn add(&mut self, line: &str) -> Result<()> {
        let written = self.file.write_all(format!("{line}\n").as_bytes());
        let synced = written.and_then(|()| self.file.sync_data());
        synced.map_err(|cause| Error::io(self.path.display(), cause))
    }
}

/// The subject, the last progress, and the length of what could be understood.
fn parse(text: &[u8]) -> Option<(Subject, Progress, usize)> {
    let mut lines = text.split_inclusive(|&byte| byte == b'\n');
    let first = lines.next()?.strip_suffix(b"\n")?;
    let subject = serde_json::from_slice(first).ok()?;
    let mut progress = Progress::default();
    let mut len = first.len() + 1;
    for line in lines {
        let Some(next) = line.strip_suffix(b"\n").and_then(|line| follow(progress, line)) else {
            break;
        };
        progress = next;
        len += line.len();
    }
    Some((subject, progress, len))
}

/// What a line says after what came before it.
fn follow(before: Progress, line: &[u8]) -> Option<Progress> {
    if line == b"whole" {
        return Some(Progress { whole: true, ..before });
    }
    let (portions, bytes) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    let next =
        Progress { portions: portions.parse().ok()?, bytes: bytes.parse().ok()?, whole: false };
    (next.portions > before.portions && next.bytes >= before.bytes && !before.whole).then_some(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(recipe: &str) -> Subject {
        let text = |text: &str| text.to_owned();
        let identity =
            Identity { version: text("1.2.3"), recipe: text(recipe), source: text("5a") };
        Subject { identity, chunk: 4096 }
    }

    fn progress(portions: u64, bytes: u64, whole: bool) -> Progress {
        Progress { portions, bytes, whole }
    }

    #[track_caller]
    fn check(lines: &str, expected: Progress) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".x.journal");
        let subject = subject("a\nb");
        drop(Journal::open(path.clone(), &subject).expect("made"));
        let begun = fs::read_to_string(&path).expect("read");
        fs::write(&path, format!("{begun}{lines}")).expect("written");
        let (mut journal, found) = Journal::open(path.clone(), &subject).expect("opened");
        assert_eq!(found, expected, "{lines:?}");
        // Whatever was torn, what is added counts.
        if !expected.whole {
            journal.note(progress(1000, 100_000, false)).expect("noted");
            assert_eq!(read(&path).expect("understood").1, progress(1000, 100_000, false));
        }
    }

    #[test]
    fn the_last_whole_line_counts_and_a_torn_one_does_not() {
        check("", Progress::default());
        check("3 300\n", progress(3, 300, false));
        check("3 300\n12 1200\n", progress(12, 1200, false));
        check("3 300\n12 12", progress(3, 300, false));
        check("3 300\n12", progress(3, 300, false));
        check("3 300\n\0\0\0\0\0\0\0\0\n12 1200\n", progress(3, 300, false));
        check("3 300\n2 400\n", progress(3, 300, false));
        check("3 300\nwhol", progress(3, 300, false));
        check("3 300\nwhole\n", progress(3, 300, true));
        check("whole\n", progress(0, 0, true));
    }

    #[test]
    fn another_subject_starts_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".x.journal");
        let (mut journal, _) = Journal::open(path.clone(), &subject("a")).expect("made");
        journal.note(progress(3, 300, false)).expect("noted");
        drop(journal);
        let (_, found) = Journal::open(path.clone(), &subject("b")).expect("opened");
        assert_eq!(found, Progress::default());
        assert_eq!(read(&path), Some((subject("b"), Progress::default())));
        fs::write(&path, "torn").expect("written");
        assert_eq!(Journal::open(path, &subject("b")).expect("opened").1, Progress::default());
    }

    #[test]
    fn one_process_at_a_time_writes_a_journal() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".x.journal");
        let first = Journal::open(path.clone(), &subject("a")).expect("made");
        let error = Journal::open(path.clone(), &subject("a")).expect_err("locked");
        assert!(error.to_string().contains("another process"), "{error}");
        drop(first);
        Journal::open(path, &subject("a")).expect("free again");
    }
}
