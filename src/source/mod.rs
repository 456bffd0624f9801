//! The checkpoint being viewed: its headers, catalog and source bytes.
//!
//! Everything that can be wrong with a checkpoint is found by [`Checkpoint::open`], which reads
//! headers and configs only. After that a read fails only where the source changed or the disk did.
//! Nothing here knows about quantization formats, views or mounts, and nothing here ever writes.

mod catalog;
mod config;
mod decode;
mod elements;
mod file;
mod fused;
mod guard;
mod header;
mod importance;
mod index;
mod window;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value};

pub use catalog::{Catalog, Decoder, Extent, Tensor, TensorId};
pub use config::{Config, Edit};
pub(crate) use config::{edited, edited_within};
pub use decode::Coded;
pub use elements::{DecodeF32, ELEMENTS_ALIGN, f32_decoder};
pub use file::{SourceFile, SourceFiles};
pub use fused::{Matrices, Order};
pub use header::{Entry, Header, MAX_HEADER_BYTES};
pub use importance::{ImportanceEntry, ImportanceFile};
pub use index::{INDEX_SUFFIX, Index, find_index_file};
pub(crate) use index::{check_alone, is_adapter};
pub use window::Window;

use crate::error::{self, Error, ErrorKind, Result};
use crate::isa::Isa;
use crate::threads;
use decode::{OPERANDS, Outcome, Rect};
use file::Part;
use index::WeightMap;
use window::Placed;

/// A checkpoint opened for reading: one model, in one directory.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    catalog: Catalog,
    shards: Vec<Shard>,
    index: Option<Index>,
    config: Option<Config>,
    decoded: bool,
    /// What tells that it is quantized in a way that isn't known.
    unknown: Option<String>,
}

/// One safetensors file of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// The file.
    pub file: Arc<SourceFile>,
    /// Its header's `__metadata__`.
    pub metadata: Vec<(String, String)>,
}

impl Checkpoint {
    /// Opens a checkpoint: a directory, or the path of its index or of its only weight file.
    /// Symbolic links, as a Hub cache has them, are followed.
    ///
    /// # Errors
    /// `NotFound` where there is no such model; `Corrupt` with file and tensor where headers, index
    /// and files contradict each other; `Unsupported` where it isn't clear what belongs to the
    /// checkpoint; `Io` where something can't be read.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = path.metadata().map_err(|cause| Error::io(path.display(), cause))?;
        let (dir, index, names) = if metadata.is_dir() {
            match find_index_file(path)? {
                Some(index) => (path, Some(index), Vec::new()),
                None => (path, None, index::unindexed_shards(path)?),
            }
        } else {
            let dir = match path.parent() {
                Some(parent) if parent != Path::new("") => parent,
                _ => Path::new("."),
            };
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(INDEX_SUFFIX) {
                (dir, Some(path.to_owned()), Vec::new())
            } else if name.ends_with(".safetensors") {
                (dir, None, vec![name])
            } else {
                return Err(error::unsupported(format!(
                    "{}: neither a model directory nor a safetensors file or index",
                    path.display()
                )));
            }
        };
        let dir = dir.canonicalize().map_err(|cause| Error::io(dir.display(), cause))?;
        let Some(index) = index else {
            let opened = Shard::open_all(&dir, &names);
            return Self::assemble(dir, None, &names, opened);
        };
        let file_name = index.file_name().unwrap_or_default().to_string_lossy();
        // What it will say, most likely.
        let expected = index::shards_named_like(&dir, &file_name)?;
        let (text, parsed) = (OnceLock::new(), OnceLock::new());
        let parse = || {
            let read = config::read_small(&index)?;
            Index::parse(&file_name, text.get_or_init(|| read))
                .map_err(|error| error.within(&file_name))
        };
        let steps = threads::map_with(1 + expected.len(), |header, step| {
            let Some(position) = step.checked_sub(1) else {
                let _ = parsed.set(parse());
                return None;
            };
            Some(Shard::open(&dir, &expected[position], position, header))
        });
        let mut opened: Vec<_> = steps.into_iter().flatten().collect();
        let parsed = parsed.into_inner().expect("the first step parses it")?;
        let names = parsed.0.shards.clone();
        if names != expected {
            opened = Shard::open_all(&dir, &names);
        }
        Self::assemble(dir, Some(parsed), &names, opened)
    }

    /// The checkpoint of shards that were opened, by these names.
    fn assemble(
        dir: PathBuf,
        index: Option<(Index, WeightMap<'_>)>,
        names: &[String],
        opened: Vec<Result<(Shard, Vec<Tensor>)>>,
    ) -> Result<Self> {
        let mut shards = Vec::with_capacity(names.len());
        let count = opened.iter().flatten().map(|(_, tensors)| tensors.len()).sum();
        let mut tensors = Vec::with_capacity(count);
        for (position, opened) in opened.into_iter().enumerate() {
            let (shard, stored) = opened.map_err(|error| match &index {
                Some((index, _)) if error.kind() == ErrorKind::NotFound => error::corrupt(format!(
                    "{}: names shard {}, which is missing",
                    index.file_name, names[position]
                )),
                _ => error,
            })?;
            shards.push(shard);
            tensors.extend(stored);
        }
        let stored = Catalog::new(tensors).map_err(|twins| {
            let [first, second] = twins.each_ref().map(|twin| shards[twin.shard()].file.name());
            error::corrupt(format!("`{}` stands both in {first} and in {second}", twins[0].name))
        })?;
        if let Some((index, weight_map)) = &index {
            index.check(weight_map, &stored)?;
        }
        let config = Config::read(&dir)?;
        let files = SourceFiles::new(NonZeroUsize::MIN);
        let read = |tensor: &Tensor| {
            let Extent { shard, start, len } = tensor.operands[0];
            let mut bytes = vec![0; len as usize];
            files.read_exact_at(&shards[shard].file, start, &mut bytes).map(|()| bytes)
        };
        let value = config.as_ref().map(|config| &config.value);
        let outcome = decode::logical(&stored, value, &read)?;
        let (catalog, decoded, unknown) = match outcome {
            Outcome::Plain => (stored, false, None),
            Outcome::Decoded(catalog) => (catalog, true, None),
            Outcome::Unknown(what) => (stored, false, Some(what)),
        };
        let config = match config {
            Some(config) if decoded => Some(config.without_quantization()?),
            config => config,
        };
        Ok(Self {
            dir,
            catalog,
            shards,
            index: index.map(|(index, _)| index),
            config,
            decoded,
            unknown,
        })
    }

    /// The canonical path of the directory that holds the checkpoint.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every logical tensor.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Shows what is stored as other logical tensors.
    pub(crate) fn set_catalog(&mut self, catalog: Catalog) {
        self.catalog = catalog;
    }

    /// The shard files, in name order; a tensor's [`Extent::shard`] is a position in this slice.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The index, where the checkpoint has one.
    pub fn index(&self) -> Option<&Index> {
        self.index.as_ref()
    }

    /// Whether the checkpoint is stored quantized, and what is shown of it decoded.
    pub fn is_decoded(&self) -> bool {
        self.decoded
    }

    /// Refuses a checkpoint whose weights are codes that can't be decoded. Its catalog has what is
    /// stored.
    ///
    /// # Errors
    /// `Unsupported`, with the method that its config declares and a tensor that shows it.
    pub fn refuse_unknown_codes(&self) -> Result<()> {
        match &self.unknown {
            None => Ok(()),
            Some(what) => Err(error::unsupported(format!(
                "the source is quantized already and can't be decoded: {what}; start from the \
                 original"
            ))),
        }
    }

    /// `config.json`, where the checkpoint has one; without its quantization, where that is decoded.
    pub fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    /// Fills `buf` with the bytes of a tensor, stored as it is, from `offset` on.
    ///
    /// # Errors
    /// `Stale` or `Io`, as [`SourceFiles::read_exact_at`].
    pub fn read_exact_at(
        &self,
        files: &SourceFiles,
        id: TensorId,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        let (file, start) = self.place(id, offset);
        files.read_exact_at(file, start, buf)
    }

    /// The file that a tensor is stored in, as it is, and where in it the tensor's byte `offset` is.
    pub fn place(&self, id: TensorId, offset: u64) -> (&Arc<SourceFile>, u64) {
        let Extent { shard, start, .. } = self.catalog[id].operands[0];
        (&self.shards[shard].file, start + offset)
    }

    /// Stored bytes that a window of a tensor is made of.
    pub fn window_len(&self, id: TensorId, window: &Window) -> u64 {
        let tensor = &self.catalog[id];
        match &tensor.decoder {
            Decoder::Plain => window.elements() * tensor.dtype.bitsize() as u64 / 8,
            Decoder::Coded(coded) => {
                window.places(coded).iter().map(|place| coded.stored_len(&place.rect)).sum()
            }
        }
    }

    /// Shows `f` the elements of a window of a tensor, decoded with `isa`'s instructions, in its own
    /// element type: the bytes from the
    /// window's first element to its last, and how many elements lie between the starts of two of its
    /// rows. What lies there is not the window's. Elements narrower than a byte come in whole bytes.
    ///
    /// # Errors
    /// `Stale` or `Io`, as [`SourceFiles::with_bytes`].
    pub fn with_window<T>(
        &self,
        isa: Isa,
        files: &SourceFiles,
        id: TensorId,
        window: Window,
        f: impl FnOnce(&[u8], usize) -> T,
    ) -> Result<T> {
        let tensor = &self.catalog[id];
        let Decoder::Coded(coded) = &tensor.decoder else {
            let (file, start, len) = self.run(tensor, &window);
            let stride = window.width as usize;
            return files.with_bytes(file, start, len, |bytes| f(bytes, stride));
        };
        let element = tensor.dtype.bitsize() as u64 / 8;
        files.with_scratch((window.elements() * element) as usize, |out| {
            for Placed { rect, at, stride } in window.places(coded) {
                let operands = self.operands(tensor, coded, &rect);
                let out = &mut out[(at * element) as usize..];
                files.with_parts(&operands, &mut |bytes| {
                    decode::decode(isa, coded, tensor.dtype, &rect, *bytes, out, stride as usize);
                })?;
            }
            Ok(f(out, window.cols as usize))
        })
    }

    /// Has the source of a window read into the kernel's page cache; waits for it, and fails
    /// silently.
    pub fn fetch_window(&self, files: &SourceFiles, id: TensorId, window: &Window) {
        self.stored(id, window).into_iter().for_each(|part| files.fetch(part));
    }

    /// Whether the source of a window seems to be in the kernel's page cache.
    pub fn is_fetched(&self, files: &SourceFiles, id: TensorId, window: &Window) -> bool {
        self.stored(id, window).into_iter().all(|part| files.is_fetched(part))
    }

    /// What is stored of a window of a tensor.
    fn stored(&self, id: TensorId, window: &Window) -> Vec<Part<'_>> {
        let tensor = &self.catalog[id];
        match &tensor.decoder {
            Decoder::Plain => vec![self.run(tensor, window)],
            Decoder::Coded(coded) => {
                let places = window.places(coded);
                let parts =
                    places.iter().flat_map(|place| self.operands(tensor, coded, &place.rect));
                parts.filter(|(.., len)| *len > 0).collect()
            }
        }
    }

    /// What is stored of a window of a plain tensor, from its first element to its last.
    fn run(&self, tensor: &Tensor, window: &Window) -> Part<'_> {
        let Window { width, first_row, rows, first_col, cols } = *window;
        let bits = tensor.dtype.bitsize() as u64;
        let first = (first_row * width + first_col) * bits / 8;
        let len = ((rows - 1) * width + cols) * bits / 8;
        let Extent { shard, start, .. } = tensor.operands[0];
        (&self.shards[shard].file, start + first, len)
    }

    /// What is stored of a rectangle of codes; nothing for operands that there are not.
    fn operands(&self, tensor: &Tensor, coded: &Coded, rect: &Rect) -> [Part<'_>; OPERANDS] {
        let ranges = coded.ranges(rect);
        let mut operands: [Part<'_>; OPERANDS] =
            std::array::from_fn(|_| (&self.shards[0].file, 0, 0));
        for ((part, extent), range) in operands.iter_mut().zip(&tensor.operands).zip(&ranges) {
            let len = range.end - range.start;
            *part = (&self.shards[extent.shard].file, extent.start + range.start, len);
        }
        operands
    }

    /// The index's `metadata`, empty where there is no index.
    pub fn index_metadata(&self) -> Map<String, Value> {
        self.index.as_ref().map(|index| index.metadata.clone()).unwrap_or_default()
    }
}

impl Shard {
    /// Opens the shards of these names, and says what is stored in them.
    fn open_all(dir: &Path, names: &[String]) -> Vec<Result<(Self, Vec<Tensor>)>> {
        threads::map_with(names.len(), |header, position| {
            Self::open(dir, &names[position], position, header)
        })
    }

    fn open(
        dir: &Path,
        name: &str,
        position: usize,
        header: &mut Vec<u8>,
    ) -> Result<(Self, Vec<Tensor>)> {
        let (source, file) = SourceFile::open(dir, name)?;
        let header = Header::read_with(header, &file, source.len());
        let header = header.map_err(|error| error.within(name))?;
        let stored = header.entries.into_iter().map(|entry| Tensor {
            name: entry.name,
            dtype: entry.dtype,
            shape: entry.shape,
            decoder: Decoder::Plain,
            operands: vec![Extent { shard: position, start: entry.start, len: entry.len }],
        });
        Ok((Self { file: Arc::new(source), metadata: header.metadata }, stored.collect()))
    }
}

#[cfg(test)]
mod tests;
