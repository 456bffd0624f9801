//! Writes a view to disk: the same bytes that a mount shows.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::error::{self, Error, Result};
use crate::view::{NodeId, NodeKind, View};

/// Bytes that one thread reads and writes at a time.
const PIECE: u64 = 4 << 20;

/// How an export is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads that read and write.
    pub threads: usize,
    /// Whether files that are there already may be replaced.
    pub overwrite: bool,
}

/// What an export wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Number of files.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Writes every file of a view below `out`, which is made where it is missing.
///
/// A file stands under a hidden name ending in `.partial` until it is whole and on disk; configs
/// and indexes come last. So whatever ends an export early leaves no file that looks whole and
/// isn't, and no checkpoint that looks complete. `progress` hears how many bytes are written of how
/// many, from any thread.
///
/// # Errors
/// `Invalid` where `out` is inside of the model or holds something already; `Stale` or `Io` where
/// reading or writing fails. The partial files are then removed.
pub fn export(
    view: &View,
    out: &Path,
    options: Options,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Summary> {
    check_out(view, out, options.overwrite)?;
    let mut last = Vec::new();
    let mut first = Vec::new();
    let mut summary = Summary::default();
    for (id, node) in view.tree().nodes().iter().enumerate() {
        let path = out.join(view.tree().path(id));
        match node.kind {
            NodeKind::Dir { .. } => {
                fs::create_dir_all(&path).map_err(|cause| Error::io(path.display(), cause))?;
            }
            NodeKind::File { size } => {
                summary.files += 1;
                summary.bytes += size;
                let name = node.name.to_string_lossy();
                let declares = name == "config.json" || name.ends_with(".index.json");
                if declares { &mut last } else { &mut first }.push((id, path, size));
            }
        }
    }
    let done = AtomicU64::new(0);
    let wrote = |bytes: u64| {
        progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, summary.bytes);
    };
    progress(0, summary.bytes);
    for files in [first, last] {
        write_all(view, files, options.threads, &wrote)?;
    }
    Ok(summary)
}

fn check_out(view: &View, out: &Path, overwrite: bool) -> Result<()> {
    let mut ancestor = out;
    // What is missing of it will be made below its nearest ancestor.
    let found = loop {
        match ancestor.canonicalize() {
            Ok(found) => break found,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                ancestor = match ancestor.parent() {
                    Some(parent) if parent != Path::new("") => parent,
                    _ => Path::new("."),
                };
            }
            Err(error) => return Err(Error::io(out.display(), error)),
        }
    };
    if found.starts_with(view.root()) {
        return Err(error::invalid(format!(
            "{}: inside of the model, which is never written",
            out.display()
        )));
    }
    match fs::read_dir(out) {
        Ok(mut entries) => match entries.next() {
            Some(_) if !overwrite => Err(error::invalid(format!("{}: not empty", out.display()))),
            _ => Ok(()),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(out.display(), error)),
    }
}

/// A file on its way.
struct Target {
    node: NodeId,
    path: PathBuf,
    partial: PathBuf,
    size: u64,
    file: File,
    /// Pieces not yet written.
    left: AtomicUsize,
}

impl Target {
    fn create((node, path, size): (NodeId, PathBuf, u64)) -> Result<Self> {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().expect("a file below the output directory"));
        name.push(".partial");
        let partial = path.with_file_name(name);
        let at = |cause| Error::io(partial.display(), cause);
        let file = File::create(&partial).map_err(at)?;
        file.set_len(size).map_err(at)?;
        let left = AtomicUsize::new(size.div_ceil(PIECE).max(1) as usize);
        Ok(Self { node, path, partial, size, file, left })
    }

    /// Copies the piece at `offset`, and finishes the file if it was the last one.
    fn write(&self, view: &View, offset: u64, buf: &mut Vec<u8>) -> Result<u64> {
        let at = |cause| Error::io(self.partial.display(), cause);
        let len = PIECE.min(self.size - offset);
        buf.resize(len as usize, 0);
        view.read_at(self.node, offset, buf).map_err(|e| e.within(self.path.display()))?;
        self.file.write_all_at(buf, offset).map_err(at)?;
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.file.sync_all().map_err(at)?;
            fs::rename(&self.partial, &self.path).map_err(at)?;
        }
        Ok(len)
    }
}

fn write_all(
    view: &View,
    files: Vec<(NodeId, PathBuf, u64)>,
    threads: usize,
    wrote: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    // Few files are open at a time.
    let mut files = files.into_iter();
    loop {
        let batch: Vec<_> = files.by_ref().take(64).collect();
        if batch.is_empty() {
            return Ok(());
        }
        let mut targets = Vec::with_capacity(batch.len());
        let mut outcome = Ok(());
        for file in batch {
            match Target::create(file) {
                Ok(target) => targets.push(target),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        let outcome = outcome.and_then(|()| write_batch(view, &targets, threads, wrote));
        if let Err(error) = outcome {
            for target in &targets {
                // Those that are finished have another name by now.
                let _ = fs::remove_file(&target.partial);
            }
            return Err(error);
        }
    }
}

fn write_batch(
    view: &View,
    targets: &[Target],
    threads: usize,
    wrote: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let pieces = targets.iter().flat_map(|target| {
        (0..target.size.div_ceil(PIECE).max(1)).map(move |piece| (target, piece * PIECE))
    });
    let pieces = Mutex::new(pieces);
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                let mut buf = Vec::new();
                while failed.lock().is_none() {
                    let Some((target, offset)) = pieces.lock().next() else { break };
                    match target.write(view, offset, &mut buf) {
                        Ok(bytes) => wrote(bytes),
                        Err(error) => {
                            failed.lock().get_or_insert(error);
                        }
                    }
                }
            });
        }
    });
    failed.into_inner().map_or(Ok(()), Err)
}
