//! The checkpoint being viewed: its headers, catalog and source bytes.
//!
//! Everything that can be wrong with a checkpoint is found by [`Checkpoint::open`], which reads
//! headers and configs only. After that a read fails only where the source changed or the disk did.
//! Nothing here knows about quantization formats, views or mounts, and nothing here ever writes.

mod catalog;
mod elements;
mod file;
mod guard;
mod header;
mod index;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

pub use catalog::{Catalog, Decoder, Extent, Tensor, TensorId};
pub use elements::{DecodeF32, ELEMENTS_ALIGN, f32_decoder};
pub use file::{SourceFile, SourceFiles};
pub use header::{Entry, Header, MAX_HEADER_BYTES};
pub(crate) use index::is_adapter;
pub use index::{INDEX_SUFFIX, Index, find_index_file};

use crate::error::{self, Error, ErrorKind, Result};
use crate::threads;
use index::WeightMap;

/// A checkpoint opened for reading: one model, in one directory.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    catalog: Catalog,
    shards: Vec<Shard>,
    index: Option<Index>,
    config: Option<Config>,
}

/// A rectangle of a tensor viewed as a row-major matrix of a given width, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Columns of the matrix.
    pub width: u64,
    /// The first row.
    pub first_row: u64,
    /// Number of rows.
    pub rows: u64,
    /// The first column.
    pub first_col: u64,
    /// Number of columns.
    pub cols: u64,
}

/// One safetensors file of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// The file.
    pub file: Arc<SourceFile>,
    /// Its header's `__metadata__`.
    pub metadata: Vec<(String, String)>,
}

/// A checkpoint's `config.json`.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file's text.
    pub text: String,
    /// The same, parsed. Bare `NaN` and `Infinity`, which Python writes, read as `null`.
    pub value: Value,
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
        let Some(index) = index else { return Self::assemble(dir, None, names) };
        let text = std::fs::read(&index).map_err(|cause| Error::io(index.display(), cause))?;
        let name = index.file_name().unwrap_or_default().to_string_lossy();
        let parsed = Index::parse(&name, &text).map_err(|error| error.within(&name))?;
        let names = parsed.0.shards.clone();
        Self::assemble(dir, Some(parsed), names)
    }

    fn assemble(
        dir: &Path,
        index: Option<(Index, WeightMap<'_>)>,
        names: Vec<String>,
    ) -> Result<Self> {
        let dir = dir.canonicalize().map_err(|cause| Error::io(dir.display(), cause))?;
        let opened = threads::map(names.len(), |position| Shard::open(&dir, &names[position]));
        let mut shards = Vec::with_capacity(names.len());
        let mut tensors = Vec::new();
        for (position, opened) in opened.into_iter().enumerate() {
            let (shard, entries) = opened.map_err(|error| match &index {
                Some((index, _)) if error.kind() == ErrorKind::NotFound => error::corrupt(format!(
                    "{}: names shard {}, which is missing",
                    index.file_name, names[position]
                )),
                _ => error,
            })?;
            shards.push(shard);
            tensors.extend(entries.into_iter().map(|entry| Tensor {
                name: entry.name,
                dtype: entry.dtype,
                shape: entry.shape,
                decoder: Decoder::Plain,
                operands: vec![Extent { shard: position, start: entry.start, len: entry.len }],
            }));
        }
        let catalog = Catalog::new(tensors).map_err(|twins| {
            let [first, second] = twins.each_ref().map(|twin| shards[twin.shard()].file.name());
            error::corrupt(format!("`{}` stands both in {first} and in {second}", twins[0].name))
        })?;
        if let Some((index, weight_map)) = &index {
            index.check(weight_map, &catalog)?;
        }
        let config = Config::read(&dir)?;
        Ok(Self { dir, catalog, shards, index: index.map(|(index, _)| index), config })
    }

    /// The canonical path of the directory that holds the checkpoint.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every logical tensor.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The shard files, in name order; a tensor's [`Extent::shard`] is a position in this slice.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The index, where the checkpoint has one.
    pub fn index(&self) -> Option<&Index> {
        self.index.as_ref()
    }

    /// `config.json`, where the checkpoint has one.
    pub fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    /// Fills `buf` with a tensor's stored bytes from `offset` on.
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
        let Extent { shard, start, .. } = self.catalog[id].operands[0];
        files.read_exact_at(&self.shards[shard].file, start + offset, buf)
    }

    /// Shows `f` the elements of a window of a tensor, in its own element type: the bytes from the
    /// window's first element to its last, with whatever lies between its rows.
    ///
    /// # Errors
    /// `Stale` or `Io`, as [`SourceFiles::with_bytes`].
    pub fn with_window<T>(
        &self,
        files: &SourceFiles,
        id: TensorId,
        window: Window,
        f: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        let tensor = &self.catalog[id];
        let Decoder::Plain = tensor.decoder;
        let Extent { shard, start, .. } = tensor.operands[0];
        let element = tensor.dtype.bitsize() as u64 / 8;
        let Window { width, first_row, rows, first_col, cols } = window;
        let first = first_row * width + first_col;
        let len = ((rows - 1) * width + cols) * element;
        files.with_bytes(&self.shards[shard].file, start + first * element, len, f)
    }

    /// The index's `metadata`, empty where there is no index.
    pub fn index_metadata(&self) -> Map<String, Value> {
        self.index.as_ref().map(|index| index.metadata.clone()).unwrap_or_default()
    }
}

impl Shard {
    fn open(dir: &Path, name: &str) -> Result<(Self, Vec<Entry>)> {
        let (source, file) = SourceFile::open(dir, name)?;
        let header = Header::read(&file, source.len()).map_err(|error| error.within(name))?;
        Ok((Self { file: Arc::new(source), metadata: header.metadata }, header.entries))
    }
}

impl Config {
    /// Reads `config.json` of a directory; `None` where it has none.
    ///
    /// # Errors
    /// `Corrupt` where it isn't a JSON object, `Io` where it can't be read.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("config.json");
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(text).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                Err(error::corrupt("config.json: not UTF-8"))
            }
            Err(error) => Err(Error::io(path.display(), error)),
        }
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// `Corrupt` where it isn't a JSON object.
    pub fn parse(text: String) -> Result<Self> {
        let value: Value = serde_json::from_str(&without_bare_floats(&text))
            .map_err(|cause| Error::caused(ErrorKind::Corrupt, "config.json", cause))?;
        if !value.is_object() {
            return Err(error::corrupt("config.json: not an object"));
        }
        Ok(Self { text, value })
    }
}

/// JSON as Python writes it, with `NaN`, `Infinity` and `-Infinity` outside of strings made `null`.
fn without_bare_floats(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(c) = rest.chars().next() {
        let bare = ["NaN", "Infinity", "-Infinity"].into_iter().find(|w| rest.starts_with(w));
        let taken = match (in_string, c, bare) {
            (true, '\\', _) => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (false, _, Some(word)) => {
                out.push_str("null");
                rest = &rest[word.len()..];
                continue;
            }
            (_, '"', _) => {
                in_string = !in_string;
                1
            }
            _ => c.len_utf8(),
        };
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    out
}

#[cfg(test)]
mod tests;
