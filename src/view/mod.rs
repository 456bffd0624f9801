//! The virtual checkpoint: a tree of files, and `read_at`.
//!
//! Everything that follows from names, shapes and configs is fixed when a view is opened. After
//! that [`View::read_at`] fails only where the source changed or can't be read.

mod ahead;
mod buffers;
mod cache;
mod identity;
mod importance;
mod index;
mod model;
mod portions;
mod shard;
mod spoilt;
mod survey;
mod text;
mod tree;
mod walk;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

pub use identity::Identity;
pub use model::Model;
pub use portions::Portion;
pub use tree::{Node, NodeId, NodeKind, ROOT, Tree};
pub use walk::is_weights;

use crate::error::{self, Result};
use crate::format;
use crate::quant::Isa;
use crate::recipe::Request;
use crate::source::{SourceFile, SourceFiles};
use ahead::{Streams, Workers};
use buffers::Buffers;
use cache::Cache;
use model::{Batch, Engine};
use spoilt::Spoilt;

/// Source files kept open and mapped at a time.
const OPEN_FILES: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not zero");

/// Readahead of the kernel's, in bytes for each core, that makes encoding ahead needless: two requests.
const ENOUGH: u64 = 2 << 20;

/// Bytes that are worth a look at the map of their file.
const MAPPED: u64 = 64 << 10;

/// Threads that wait for the source's disk, whatever the cores: each has a few megabytes asked for, and
/// disks want more than that at a time.
const FETCHERS: usize = 4;

/// Memory knobs; they never change a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of encoded chunks that are kept, with those of the memory that a quantized source is
    /// decoded in.
    pub cache: u64,
    /// Source bytes that one chunk is encoded from, at least one unit of its scheme.
    pub chunk: u64,
    /// Bytes that are encoded ahead of a sequential reader, on threads of the view's own; none are
    /// where it is 0.
    pub ahead: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { cache: 256 << 20, chunk: 2 << 20, ahead: 0 }
    }
}

/// A checkpoint, or a tree of them, shown as quantized.
#[derive(Debug)]
pub struct View {
    root: PathBuf,
    tree: Tree,
    contents: Vec<Content>,
    hidden: Vec<Hidden>,
    warnings: Vec<String>,
    /// The request, in words.
    recipe: String,
    shared: Arc<Shared>,
    streams: Streams,
    /// Asked for once: the answer stands in several files.
    cores: usize,
    workers: OnceLock<[Workers<Job>; 2]>,
}

/// What readers and the threads ahead of them share.
#[derive(Debug)]
struct Shared {
    models: Vec<Model>,
    engine: Engine,
}

/// Chunks to be encoded ahead of their reader, and their model's position.
type Job = (usize, Batch);

/// A file of the source that the view does not show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hidden {
    /// Its path below the view's root.
    pub path: PathBuf,
    /// Its length in bytes.
    pub size: u64,
    /// Why it isn't shown.
    pub reason: &'static str,
}

/// Where a node's bytes come from.
#[derive(Debug)]
enum Content {
    Dir,
    /// A file shown as it is.
    Copy(Arc<SourceFile>),
    /// A synthesized config.
    Inline(Box<[u8]>),
    /// The synthesized index of the model at this position.
    Index(usize),
    /// A shard of the model at this position, by its position there.
    Shard {
        model: usize,
        shard: usize,
    },
}

/// Counts since the view was opened.
#[derive(Debug, Default)]
struct Counters {
    source: Counter,
    output: Counter,
    encode_ns: Counter,
}

#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a view has done and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stats {
    /// Bytes of encoded chunks that may be kept.
    pub cache_budget: u64,
    /// Bytes of encoded chunks kept.
    pub cache_used: u64,
    /// Parts of chunks found encoded.
    pub cache_hits: u64,
    /// Chunks encoded.
    pub cache_misses: u64,
    /// Bytes read from the source.
    pub source_bytes: u64,
    /// Bytes returned to readers.
    pub output_bytes: u64,
    /// CPU time, in nanoseconds, in which source was read, decoded, surveyed and encoded.
    #[serde(default)]
    pub encode_ns: u64,
    /// Source files open.
    pub open_files: usize,
    /// Address space that they are mapped to.
    pub mapped_bytes: u64,
}

impl View {
    /// Opens what `path` leads to and plans every file of it: a checkpoint's directory, its index,
    /// its only weight file, or a directory that holds several checkpoints.
    ///
    /// # Errors
    /// Whatever is wrong with the model or the request, with file and tensor named; see
    /// [`crate::source::Checkpoint::open`], [`format::find`] and
    /// [`crate::source::ImportanceFile::open`].
    pub fn open(path: &Path, request: &Request, budget: Budget) -> Result<Self> {
        Self::open_on(Isa::detect(), path, request, budget)
    }

    /// As [`open`](Self::open), with the instruction set that encoders and decoders use. It never
    /// changes a byte.
    ///
    /// # Errors
    /// As those of [`open`](Self::open).
    pub fn open_on(isa: Isa, path: &Path, request: &Request, budget: Budget) -> Result<Self> {
        let format = format::find(&request.format)?;
        let mut walk = walk::Walk::new(format, request)?;
        let root = walk.run(path)?;
        let importance = walk.importance_digest()?;
        // By its content: what a file is called, and where, changes no byte.
        let mut recipe = format!("{:?}", Request { importance: None, ..request.clone() });
        if let Some(digest) = importance {
            recipe.push_str(&format!(", importance {digest:016x}"));
        }
        let walk::Walk { tree, contents, models, hidden, warnings, .. } = walk;
        let files = SourceFiles::new(OPEN_FILES);
        let engine = Engine {
            cache: Cache::new(budget.cache, files.scratch_bytes()),
            files,
            buffers: Buffers::new(budget.cache),
            isa,
            budget,
            counters: Counters::default(),
            spoilt: Spoilt::default(),
        };
        Ok(Self {
            root,
            tree,
            contents,
            hidden,
            warnings,
            recipe,
            shared: Arc::new(Shared { models, engine }),
            streams: Streams::default(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            workers: OnceLock::new(),
        })
    }

    /// The canonical path of the directory that the view shows.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Every file and directory.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The checkpoints in it.
    pub fn models(&self) -> &[Model] {
        &self.shared.models
    }

    /// The files that it does not show.
    pub fn hidden(&self) -> &[Hidden] {
        &self.hidden
    }

    /// What the user should know, a line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What it was opened with.
    pub fn budget(&self) -> Budget {
        self.shared.engine.budget
    }

    /// The weights that encoding has found to hold a NaN or an infinity so far, a line each.
    pub fn spoilt(&self) -> Vec<String> {
        self.shared.engine.spoilt.all()
    }

    /// Those of [`spoilt`](Self::spoilt) that this was not told before. Cheap where there are none.
    pub fn news(&self) -> Vec<String> {
        self.shared.engine.spoilt.take()
    }

    /// What the view has done and holds.
    pub fn stats(&self) -> Stats {
        let (cache_used, cache_hits, cache_misses) = self.shared.engine.cache.usage();
        let (open_files, mapped_bytes) = self.shared.engine.files.mapped();
        Stats {
            cache_budget: self.shared.engine.budget.cache,
            cache_used,
            cache_hits,
            cache_misses,
            source_bytes: self.shared.engine.counters.source.get(),
            output_bytes: self.shared.engine.counters.output.get(),
            encode_ns: self.shared.engine.counters.encode_ns.get(),
            open_files,
            mapped_bytes,
        }
    }

    /// The model and the position in it of the shard that a file shows, if it shows one that is
    /// synthesized.
    pub fn shard_of(&self, file: NodeId) -> Option<(&Model, usize)> {
        match self.contents[file] {
            Content::Shard { model, shard } => Some((&self.shared.models[model], shard)),
            _ => None,
        }
    }

    /// Every shard of every model, synthesized or shown as it is, in the tree's order: its file, its
    /// model, and its position there.
    pub fn shards(&self) -> impl Iterator<Item = (NodeId, &Model, usize)> {
        let models = &self.shared.models;
        let find = move |file: &Arc<SourceFile>| {
            models.iter().find_map(|model| {
                let mut shards = model.checkpoint().shards().iter();
                Some((model, shards.position(|shard| Arc::ptr_eq(&shard.file, file))?))
            })
        };
        self.contents.iter().enumerate().filter_map(move |(node, content)| {
            let (model, shard) = match content {
                Content::Shard { model, shard } => (&models[*model], *shard),
                Content::Copy(file) => find(file)?,
                Content::Dir | Content::Inline(_) | Content::Index(_) => return None,
            };
            Some((node, model, shard))
        })
    }

    /// How many of `len` bytes from `offset` on a file has; a directory has none.
    pub fn due(&self, file: NodeId, offset: u64, len: usize) -> usize {
        match self.tree.nodes()[file].kind {
            NodeKind::File { size } => size.saturating_sub(offset).min(len as u64) as usize,
            NodeKind::Dir { .. } => 0,
        }
    }

    /// Fills `buf` from `offset` of a file and returns how many bytes that were: all of `buf`, or
    /// what is left of the file. Never short elsewhere: the kernel takes a short read to mean that
    /// the file shrank.
    ///
    /// # Errors
    /// `Invalid` for a directory; `Stale` or `Io` where the source can't be read any more. `buf`
    /// then holds nothing of use.
    pub fn read_at(&self, file: NodeId, offset: u64, buf: &mut [u8]) -> Result<usize> {
        if let NodeKind::Dir { .. } = self.tree.nodes()[file].kind {
            return Err(error::invalid("a directory can't be read"));
        }
        let len = self.due(file, offset, buf.len());
        if len == 0 {
            return Ok(0);
        }
        let buf = &mut buf[..len];
        match &self.contents[file] {
            Content::Dir => unreachable!("a file has content"),
            Content::Copy(source) => {
                self.shared.engine.counters.source.add(len as u64);
                self.shared.engine.files.read_exact_at(source, offset, buf)?;
            }
            Content::Inline(bytes) => {
                buf.copy_from_slice(&bytes[offset as usize..offset as usize + len]);
            }
            Content::Index(model) => self.shared.models[*model].read_index(offset, buf),
            Content::Shard { model, shard } => {
                self.go_ahead(file, *model, *shard, offset..offset + len as u64);
                let Shared { models, engine } = &*self.shared;
                models[*model].read_shard(engine, *shard, offset, buf)?;
            }
        }
        self.shared.engine.counters.output.add(len as u64);
        Ok(len)
    }

    /// As [`read_at`](Self::read_at), but shows the bytes to `f`: in a map of the source where that has them
    /// in one piece, as many as are worth it, and else in `buf`.
    ///
    /// # Errors
    /// As those of [`read_at`](Self::read_at), with `f` not called.
    pub fn show_at<T>(
        &self,
        file: NodeId,
        offset: u64,
        buf: &mut [u8],
        f: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        let Shared { models, engine } = &*self.shared;
        let len = self.due(file, offset, buf.len()) as u64;
        let range = offset..offset + len;
        let found = match &self.contents[file] {
            _ if len < MAPPED => None,
            Content::Copy(source) => Some((source, offset)),
            Content::Shard { model, shard } => models[*model].source_of(*shard, range.clone()),
            Content::Dir | Content::Inline(_) | Content::Index(_) => None,
        };
        let Some((source, start)) = found else {
            let read = self.read_at(file, offset, buf)?;
            return Ok(f(&buf[..read]));
        };
        if let Content::Shard { model, shard } = self.contents[file] {
            self.go_ahead(file, model, shard, range);
        }
        engine.counters.source.add(len);
        let shown = engine.files.with_read_bytes(source, start, len, f)?;
        engine.counters.output.add(len);
        Ok(shown)
    }

    /// Notes how many bytes the kernel reads around what its readers want: nothing is encoded ahead of a
    /// reader that has read no more than that in a row.
    pub fn expect_readahead(&self, bytes: u64) {
        self.streams.expect_readahead(bytes);
    }

    /// Has the chunks encoded that whoever reads `range` will want next.
    fn go_ahead(&self, file: NodeId, model: usize, shard: usize, range: Range<u64>) {
        let Budget { ahead, cache, .. } = self.shared.engine.budget;
        // What is made ahead must not push itself out of the cache.
        let window = ahead.min(cache / 4);
        if window == 0 {
            return;
        }
        if let Some(next) = self.streams.follow(file, range, window) {
            let Shared { models, engine } = &*self.shared;
            let batches = models[model].batches_across(engine, shard, next);
            let jobs: Vec<Job> = batches.map(|batch| (model, batch)).collect();
            let [fetching, encoding] = self.workers.get_or_init(|| self.start_workers());
            let is_due = |(_, batch): &&Job| !models[model].is_fetched(engine, batch);
            fetching.offer(jobs.iter().filter(is_due).cloned());
            // Of as much as that, the kernel asks for the rest while some is encoded: its requests keep every
            // core busy, and their codes are made where the reply is sent from.
            if self.streams.readahead() < ENOUGH * self.cores as u64 {
                encoding.offer(jobs);
            }
        }
    }

    /// Threads that have the source of chunks read, and as many as there are cores that encode them.
    fn start_workers(&self) -> [Workers<Job>; 2] {
        let [fetching, encoding] = [(); 2].map(|()| self.shared.clone());
        [
            Workers::start(FETCHERS, move |(model, batch): Job| {
                fetching.models[model].fetch(&fetching.engine, &batch);
            }),
            Workers::start(self.cores, move |(model, batch): Job| {
                // Whoever reads the chunks meets the error, if it is still there.
                let _ = encoding.models[model].prepare(&encoding.engine, &batch);
            }),
        ]
    }
}
