//! A large file on its way to disk, by any number of threads.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::iter::Peekable;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::journal::{Journal, Progress, Subject, hidden, open_own};
use crate::error::{Error, Result};
use crate::view::{NodeId, Portion, View};

/// A file that stands under a hidden name until it is whole, and its journal.
pub(super) struct Target<'a> {
    view: &'a View,
    node: NodeId,
    path: PathBuf,
    partial: PathBuf,
    file: File,
    /// Bytes between two lines of the journal.
    step: u64,
    state: Mutex<State<'a>>,
    journal: Mutex<Journal>,
}

struct State<'a> {
    rest: Peekable<Box<dyn Iterator<Item = Portion> + Send + 'a>>,
    /// Portions that were handed out, those of earlier runs included.
    handed: u64,
    /// Portions that are written, from the first on.
    written: Progress,
    /// Portions that were written before one in front of them was: their bytes.
    early: BTreeMap<u64, u64>,
    /// Threads at work.
    writers: usize,
    /// Bytes that the journal knows of.
    noted: u64,
}

impl<'a> Target<'a> {
    /// Opens the file that stands for `node` at `path`, to go on where its journal ends, and returns
    /// the bytes that are there; no target where they are all.
    ///
    /// # Errors
    /// `Io` where something can't be made or opened, or another process writes it.
    pub(super) fn open(
        view: &'a View,
        node: NodeId,
        (path, size): (PathBuf, u64),
        subject: &Subject,
        step: u64,
    ) -> Result<(Option<Self>, u64)> {
        let partial = hidden(&path, ".partial");
        let at = |cause| Error::io(partial.display(), cause);
        // First of all: what has a journal beside it is known to be ours.
        let (mut journal, mut begun) = Journal::open(hidden(&path, ".journal"), subject)?;
        let has_size = |path: &Path| path.metadata().is_ok_and(|found| found.len() == size);
        if begun.whole {
            if has_size(&partial) {
                fs::rename(&partial, &path).map_err(at)?;
            }
            if has_size(&path) {
                return Ok((None, size));
            }
        }
        let resumes = begun.portions > 0 && !begun.whole && has_size(&partial);
        if !resumes {
            if begun != Progress::default() {
                journal.begin(subject)?;
                begun = Progress::default();
            }
            remove(&path)?;
            remove(&partial)?;
        }
        let file = open_own(&partial).map_err(at)?;
        file.set_len(size).map_err(at)?;
        let mut rest = view.portions(node);
        if begun.portions > 0 {
            rest.nth(begun.portions as usize - 1);
        }
        let mut rest = rest.peekable();
        let is_empty = rest.peek().is_none();
        let state = State {
            rest,
            handed: begun.portions,
            written: begun,
            early: BTreeMap::new(),
            writers: 0,
            noted: begun.bytes,
        };
        let (state, journal) = (Mutex::new(state), Mutex::new(journal));
        let target = Self { view, node, path, partial, file, step, state, journal };
        if is_empty {
            target.finish()?;
            return Ok((None, size));
        }
        Ok((Some(target), begun.bytes))
    }

    /// Threads at work on it; `None` where no portion is left.
    pub(super) fn writers(&self) -> Option<usize> {
        let mut state = self.state.lock();
        state.rest.peek().is_some().then_some(state.writers)
    }

    /// The next portion, and its place among them. Whoever takes it writes it.
    pub(super) fn take(&self) -> Option<(u64, Portion)> {
        let mut state = self.state.lock();
        let portion = state.rest.next()?;
        state.handed += 1;
        state.writers += 1;
        Some((state.handed - 1, portion))
    }

    /// Makes and writes a portion, and returns its bytes. Whoever writes the last one finishes the
    /// file.
    ///
    /// # Errors
    /// What the view fails with; `Io` where writing does.
    pub(super) fn write(&self, place: u64, portion: &Portion) -> Result<u64> {
        let bytes = self
            .view
            .make(self.node, portion, &self.file, &|offset, run| {
                let outcome = self.file.write_all_at(run, offset);
                outcome.map_err(|cause| Error::io(self.partial.display(), cause))
            })
            .map_err(|error| error.within(self.path.display()))?;
        let (last, unnoted) = {
            let mut guard = self.state.lock();
            let state = &mut *guard;
            state.writers -= 1;
            state.early.insert(place, bytes);
            while let Some(bytes) = state.early.remove(&state.written.portions) {
                state.written.portions += 1;
                state.written.bytes += bytes;
            }
            let last = state.rest.peek().is_none() && state.written.portions == state.handed;
            (last, state.written.bytes - state.noted)
        };
        if last {
            self.finish()?;
        } else if unnoted >= 4 * self.step {
            // Whoever writes faster than the disk waits for it here.
            self.note(&mut self.journal.lock())?;
        } else if unnoted >= self.step
            && let Some(mut journal) = self.journal.try_lock()
        {
            self.note(&mut journal)?;
        }
        Ok(bytes)
    }

    /// Notes what is written, once it is on disk.
    fn note(&self, journal: &mut Journal) -> Result<()> {
        let (written, noted) = {
            let state = self.state.lock();
            (state.written, state.noted)
        };
        // Somebody else may have, in the meantime.
        if written.bytes >= noted + self.step {
            self.file.sync_data().map_err(|cause| Error::io(self.partial.display(), cause))?;
            journal.note(written)?;
            self.state.lock().noted = written.bytes;
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let at = |cause| Error::io(self.partial.display(), cause);
        let mut journal = self.journal.lock();
        self.file.sync_all().map_err(at)?;
        journal.note(Progress { whole: true, ..Progress::default() })?;
        let mut state = self.state.lock();
        state.noted = state.written.bytes;
        fs::rename(&self.partial, &self.path).map_err(at)
    }
}

/// Removes a file that may be there.
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(path.display(), error))
        }
        _ => Ok(()),
    }
}
