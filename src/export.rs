//! Writes a view to disk: the same bytes that a mount shows.
//!
//! Large files, the shards among them, stand under a hidden name until they are whole, each with a
//! journal beside it of what is on disk for good. A run that was ended, however, is thus gone on
//! with by the next, and several machines can write a part of the files each with nobody to
//! coordinate them: what a file is about and how far it has come is said next to that file, and no
//! two of them write the same one. Small files, configs and indexes come last, when all large ones
//! are whole; then the journals go.

mod journal;
mod place;
mod target;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::{self, Error, Result};
use crate::view::{NodeId, NodeKind, View};
use journal::{Subject, hidden};
pub use place::{Found, find};
use target::{Target, remove};

/// A file of this many bytes is written by all threads, and gone on with after a run that was
/// ended. So is every shard.
const LARGE: u64 = 1 << 20;

/// Threads that write one file before the next is begun: they wait for each other in the kernel.
const WRITERS: usize = 4;

/// The least and the most bytes between two lines of a journal; else a 64th of what is written.
const STEP: (u64, u64) = (1 << 20, 64 << 20);

/// How an export is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads that read and write.
    pub threads: usize,
    /// Whether files that are there already may be replaced.
    pub overwrite: bool,
    /// What is to be written.
    pub step: Step,
}

/// What of an export is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// All of it.
    Whole,
    /// One of `of` parts of the large files, counted from 1.
    Part {
        /// Which of them.
        index: u32,
        /// How many there are.
        of: u32,
    },
    /// What remains when all parts are written.
    Finish,
}

/// What an export wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Number of files.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of these that an earlier run had written.
    pub kept: u64,
}

/// A view's files by when they are written.
struct Files {
    /// By all threads, and with a journal each.
    large: Vec<Output>,
    /// After all large ones; those last that declare what the others are.
    small: Vec<Output>,
}

/// A file to be written.
#[derive(Clone, Debug)]
struct Output {
    node: NodeId,
    path: PathBuf,
    size: u64,
}

impl Files {
    /// The files of a view, below `out`.
    fn of(view: &View, out: &Path) -> Self {
        let mut shards = vec![false; view.tree().nodes().len()];
        view.shards().for_each(|(node, ..)| shards[node] = true);
        let (mut large, mut small, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for (node, found) in view.tree().nodes().iter().enumerate() {
            let NodeKind::File { size } = found.kind else { continue };
            let output = Output { node, path: out.join(view.tree().path(node)), size };
            if declares(&found.name.to_string_lossy()) {
                last.push(output);
            } else if shards[node] || size >= LARGE {
                large.push(output);
            } else {
                small.push(output);
            }
        }
        small.append(&mut last);
        Self { large, small }
    }

    /// Narrows it to what `step` writes.
    fn keep(&mut self, step: Step) {
        match step {
            Step::Whole => {}
            Step::Part { index, of } => {
                let sizes: Vec<u64> = self.large.iter().map(|file| file.size).collect();
                let parts = distribute(&sizes, of);
                let mut part = parts.iter();
                self.large.retain(|_| part.next() == Some(&(index - 1)));
                self.small.clear();
            }
            Step::Finish => self.large.clear(),
        }
    }
}

/// Whether a file says that a checkpoint is there.
fn declares(name: &str) -> bool {
    name == "config.json" || name.ends_with(".index.json")
}

/// Which of `parts` parts each file belongs to: the largest first, always to the part that has the
/// least, so that it depends on nothing but the sizes.
fn distribute(sizes: &[u64], parts: u32) -> Vec<u32> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&file| std::cmp::Reverse(sizes[file]));
    // No more of them get any.
    let parts = parts.min(u32::try_from(sizes.len().max(1)).unwrap_or(u32::MAX));
    let mut loads: std::collections::BTreeSet<(u64, u32)> =
        (0..parts).map(|part| (0, part)).collect();
    let mut part_of = vec![0; sizes.len()];
    for file in order {
        let (load, part) = loads.pop_first().expect("there is a part at least");
        part_of[file] = part;
        loads.insert((load + sizes[file], part));
    }
    part_of
}

/// Writes what `options` say of a view's files below `out`, which is made where it is missing.
///
/// What an earlier run of the same view has written is kept; [`find`] tells. Nothing stands under
/// its own name until it is whole and on disk; configs and indexes come last. So whatever ends an
/// export early leaves no file that looks whole and isn't, and no checkpoint that looks complete.
/// `progress` hears how many bytes are written of how many, from any thread.
///
/// # Errors
/// `Invalid` where `out` is inside of the model, or holds something else, or weights that would stay beside
/// these, or lacks a part that is to be finished; `Stale` or `Io` where reading or writing fails.
pub fn export(
    view: &View,
    out: &Path,
    options: Options,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Summary> {
    let found = find(view, out)?;
    let mut files = Files::of(view, out);
    let summary = |files: &Files, kept| {
        let sizes = files.large.iter().chain(&files.small).map(|file| file.size);
        Summary { files: sizes.clone().count(), bytes: sizes.sum(), kept }
    };
    match found {
        Found::Finished if !options.overwrite => {
            // Its last run may have been ended while it did that.
            remove_journals(&files.large)?;
            files.keep(options.step);
            let all = summary(&files, 0);
            return Ok(Summary { kept: all.bytes, ..all });
        }
        Found::Foreign(why) if !options.overwrite => return Err(error::invalid(why)),
        _ => {}
    }
    let subject = Subject { identity: view.identity(), chunk: view.budget().chunk };
    // Before anything is taken away.
    if options.step == Step::Finish {
        place::check_parts(&files.large, &subject, out)?;
    }
    if !matches!(found, Found::Nothing | Found::Begun { .. }) {
        place::clear(view, out, &files)?;
        place::unseal(out)?;
        // Before any shard is replaced that they declare.
        for file in files.small.iter().filter(|file| declares(&file.name())) {
            remove(&file.path)?;
        }
    }
    make_dirs(view, out)?;
    let all = files.large.clone();
    files.keep(options.step);
    let mut summary = summary(&files, 0);
    let done = AtomicU64::new(0);
    let wrote = |bytes: u64| {
        progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, summary.bytes);
    };
    wrote(0);
    summary.kept = write_large(view, &files.large, &subject, options.threads.max(1), &wrote)?;
    if matches!(options.step, Step::Part { .. }) {
        return sync_dirs(view, out).map(|()| summary);
    }
    sync_dirs(view, out)?;
    for file in &files.small {
        write_small(view, file)?;
        wrote(file.size);
    }
    sync_dirs(view, out)?;
    place::seal(out, &subject.identity)?;
    remove_journals(&all)?;
    Ok(summary)
}

fn remove_journals(large: &[Output]) -> Result<()> {
    large.iter().try_for_each(|file| remove(&hidden(&file.path, ".journal")))
}

impl Output {
    fn name(&self) -> std::borrow::Cow<'_, str> {
        self.path.file_name().unwrap_or_default().to_string_lossy()
    }
}

/// The directories of a view below `out`, the outermost first.
fn dirs<'a>(view: &'a View, out: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
    let nodes = view.tree().nodes().iter().enumerate();
    nodes
        .filter(|(_, node)| matches!(node.kind, NodeKind::Dir { .. }))
        .map(|(id, _)| out.join(view.tree().path(id)))
}

fn make_dirs(view: &View, out: &Path) -> Result<()> {
    for dir in dirs(view, out) {
        fs::create_dir_all(&dir).map_err(|cause| Error::io(dir.display(), cause))?;
    }
    Ok(())
}

/// Has the names of what was written on disk too.
fn sync_dirs(view: &View, out: &Path) -> Result<()> {
    for dir in dirs(view, out) {
        let synced = File::open(&dir).and_then(|dir| dir.sync_all());
        synced.map_err(|cause| Error::io(dir.display(), cause))?;
    }
    Ok(())
}

/// Writes a file, replacing what has its name.
fn write_small(view: &View, file: &Output) -> Result<()> {
    let partial = hidden(&file.path, ".partial");
    let mut bytes = vec![0; file.size as usize];
    view.read_at(file.node, 0, &mut bytes).map_err(|e| e.within(file.path.display()))?;
    // What has its name may be a link.
    remove(&partial)?;
    let write = || {
        let mut written = File::create_new(&partial)?;
        written.write_all(&bytes)?;
        written.sync_all()?;
        fs::rename(&partial, &file.path)
    };
    write().map_err(|cause| Error::io(partial.display(), cause))
}

/// Large files that are open, and that wait.
struct Pool<'a> {
    waiting: VecDeque<&'a Output>,
    open: Vec<Arc<Target<'a>>>,
    /// Bytes that were there already.
    kept: u64,
}

/// Writes files by several threads, and returns how many bytes of them were there already.
fn write_large(
    view: &View,
    files: &[Output],
    subject: &Subject,
    threads: usize,
    wrote: &(dyn Fn(u64) + Sync),
) -> Result<u64> {
    let total: u64 = files.iter().map(|file| file.size).sum();
    let step = (total / 64).clamp(STEP.0, STEP.1);
    let pool = Pool { waiting: files.iter().collect(), open: Vec::new(), kept: 0 };
    let pool = Mutex::new(pool);
    let failed = Mutex::new(None);
    let work = || -> Result<()> {
        while failed.lock().is_none() {
            let Some(target) = pool.lock().target(view, subject, step, wrote)? else { break };
            // Another thread may have taken the last portion.
            let Some((place, portion)) = target.take() else { continue };
            wrote(target.write(place, &portion)?);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                if let Err(error) = work() {
                    failed.lock().get_or_insert(error);
                }
            });
        }
    });
    let kept = pool.into_inner().kept;
    failed.into_inner().map_or(Ok(kept), Err)
}

impl<'a> Pool<'a> {
    /// The file that a thread writes to next, if any is left: of those that are open the one with
    /// the fewest writers, unless that has enough.
    fn target(
        &mut self,
        view: &'a View,
        subject: &Subject,
        step: u64,
        wrote: &dyn Fn(u64),
    ) -> Result<Option<Arc<Target<'a>>>> {
        loop {
            // The last portion of one that is dropped here may still be written.
            self.open.retain(|target| target.writers().is_some());
            let free = self.open.iter().min_by_key(|target| target.writers());
            let enough = free.is_none_or(|target| target.writers() >= Some(WRITERS));
            if enough && let Some(file) = self.waiting.pop_front() {
                let place = (file.path.clone(), file.size);
                let (target, kept) = Target::open(view, file.node, place, subject, step)?;
                self.open.extend(target.map(Arc::new));
                self.kept += kept;
                wrote(kept);
            } else {
                return Ok(free.cloned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_about_equal_and_each_file_belongs_to_one() {
        let check = |sizes: &[u64], parts: u32, largest: u64| {
            let part_of = distribute(sizes, parts);
            let mut loads = vec![0; parts as usize];
            for (size, part) in sizes.iter().zip(&part_of) {
                loads[*part as usize] += size;
            }
            assert_eq!(loads.iter().max(), Some(&largest), "{part_of:?}");
            assert_eq!(loads.iter().sum::<u64>(), sizes.iter().sum::<u64>());
        };
        check(&[5, 5, 5, 5], 4, 5);
        check(&[5, 5, 5, 5, 1], 4, 6);
        check(&[1, 9, 2, 8, 3, 7], 3, 10);
        check(&[7], 3, 7);
        check(&[], 3, 0);
        check(&[3, 4], 1, 7);
        assert_eq!(distribute(&[5; 6], 3), [0, 1, 2, 0, 1, 2]);
        assert_eq!(distribute(&[5, 0, 7], u32::MAX), [1, 2, 0]);
    }
}
