//! Files that say what input features count for: llama.cpp's imatrix, or safetensors.
//!
//! An imatrix has, by a weight's name in llama.cpp, the sums of the squares of what came in at each
//! input feature: of a matrix one row, of stacked experts a row for each. As GGUF, which
//! `llama-imatrix` writes now, tensors `NAME.in_sum2` in F32 beside `NAME.counts`; before that, in a
//! file of its own (all integers are 32 bits, little-endian):
//!
//! ```text
//! entries; for each: length of the name, name, calls, length, that many f32; then what isn't needed
//! ```
//!
//! A safetensors file has a tensor by the name of the weight or of its module, in any real type.
//! Sources: ggml-org/llama.cpp, tools/imatrix/imatrix.cpp; ggml, docs/gguf.md.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use super::elements::f32_decoder;
use super::file::{SourceFile, SourceFiles};
use super::header::Header;
use crate::dtype::{self, Dtype};
use crate::error::{self, Error, Result};

/// A file that says what input features count for.
#[derive(Debug)]
pub struct ImportanceFile {
    file: Arc<SourceFile>,
    entries: HashMap<String, ImportanceEntry>,
}

/// What a file says of one weight, or of stacked ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImportanceEntry {
    start: u64,
    dtype: Dtype,
    /// Number of features, of all stacked weights together.
    pub len: u64,
}

impl ImportanceFile {
    /// Opens a file and reads what it has entries for.
    ///
    /// # Errors
    /// `NotFound` or `Io` where it can't be read; `Invalid` where it is none of the three kinds, or
    /// damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let name = path.file_name().unwrap_or(path.as_os_str());
        let (source, file) = SourceFile::open(dir.unwrap_or(Path::new(".")), name)?;
        let entries = entries(&file, source.len(), path)
            .map_err(|error| error::invalid(format!("{}: {error}", path.display())))?;
        Ok(Self { file: Arc::new(source), entries })
    }

    /// Its name, relative to the directory that it is in.
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// What it says of a name.
    pub fn find(&self, name: &str) -> Option<ImportanceEntry> {
        self.entries.get(name).copied()
    }

    /// The first, in order, of the names that it has entries for.
    pub fn first_name(&self) -> Option<&str> {
        self.entries.keys().map(String::as_str).min()
    }

    /// Appends `len` features from the one at `first` on to `out`.
    ///
    /// # Errors
    /// `Stale` where the file is no longer what it was when it was opened, `Io` where it can't be read.
    pub fn read(
        &self,
        files: &SourceFiles,
        entry: ImportanceEntry,
        first: u64,
        len: u64,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let size = entry.dtype.bitsize() as u64 / 8;
        let mut bytes = vec![0; (len * size) as usize];
        files.read_exact_at(&self.file, entry.start + first * size, &mut bytes)?;
        f32_decoder(entry.dtype).expect("entries are real numbers")(&bytes, out);
        Ok(())
    }
}

type Entries = HashMap<String, ImportanceEntry>;

fn entries(file: &File, len: u64, path: &Path) -> Result<Entries> {
    let mut reader = Reader { file: BufReader::new(file), at: 0, len };
    let is_safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
    if is_safetensors {
        return from_safetensors(Header::read(file, len)?);
    }
    match &reader.bytes()? {
        b"GGUF" => from_gguf(&mut reader),
        first => from_legacy(&mut reader, i32::from_le_bytes(*first)),
    }
}

fn from_safetensors(header: Header) -> Result<Entries> {
    let entry = |entry: super::header::Entry| {
        let is_real = matches!(entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64);
        if !is_real || !matches!(entry.shape[..], [_] | [_, _]) {
            return Err(error::invalid(format!(
                "`{}` is {:?} in {}: not one number for each input feature",
                entry.name, entry.shape, entry.dtype
            )));
        }
        let len = entry.shape.iter().product();
        Ok((entry.name, ImportanceEntry { start: entry.start, dtype: entry.dtype, len }))
    };
    header.entries.into_iter().map(entry).collect()
}

fn from_legacy(reader: &mut Reader<'_>, count: i32) -> Result<Entries> {
    let count = u32::try_from(count).ok().filter(|count| *count > 0);
    let count = count.ok_or_else(|| {
        error::invalid("neither an imatrix of llama.cpp nor a .safetensors file of importance")
    })?;
    let mut entries = Entries::new();
    for _ in 0..count {
        let name = reader.u32()?;
        let name = reader.string(name.into())?;
        reader.skip(4)?;
        let len = u64::from(reader.u32()?);
        let start = reader.at;
        reader.skip(len * 4)?;
        insert(&mut entries, name, ImportanceEntry { start, dtype: Dtype::F32, len })?;
    }
    Ok(entries)
}

fn from_gguf(reader: &mut Reader<'_>) -> Result<Entries> {
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(error::invalid(format!("version {version} of GGUF is not 2 or 3")));
    }
    let (tensors, pairs) = (reader.u64()?, reader.u64()?);
    let mut alignment = 32;
    for _ in 0..pairs {
        let key = reader.u64()?;
        let key = reader.string(key)?;
        let kind = reader.u32()?;
        if key == "general.alignment" && kind == 4 {
            alignment = u64::from(reader.u32()?);
        } else {
            reader.skip_value(kind)?;
        }
    }
    let mut found = Vec::new();
    for _ in 0..tensors {
        let name = reader.u64()?;
        let name = reader.string(name)?;
        let mut shape = Vec::new();
        for _ in 0..reader.u32()? {
            shape.push(reader.u64()?);
        }
        let (kind, offset) = (reader.u32()?, reader.u64()?);
        let Some(weight) = name.strip_suffix(".in_sum2") else { continue };
        let len = dtype::byte_len(Dtype::F32, &shape).filter(|_| kind == 0);
        let len = len.ok_or_else(|| error::invalid(format!("`{name}` is not in F32")))?;
        found.push((weight.to_owned(), offset, len));
    }
    let damaged = || error::invalid("its tensors don't lie in the file");
    if alignment == 0 {
        return Err(damaged());
    }
    let data = reader.at.next_multiple_of(alignment);
    let mut entries = Entries::new();
    for (name, offset, len) in found {
        let start = data.checked_add(offset).ok_or_else(damaged)?;
        if start.checked_add(len).is_none_or(|end| end > reader.len) {
            return Err(damaged());
        }
        insert(&mut entries, name, ImportanceEntry { start, dtype: Dtype::F32, len: len / 4 })?;
    }
    if entries.is_empty() {
        return Err(error::invalid("a GGUF file without importance: no tensor ends in `.in_sum2`"));
    }
    Ok(entries)
}

fn insert(entries: &mut Entries, name: String, entry: ImportanceEntry) -> Result<()> {
    match entries.insert(name.clone(), entry) {
        None => Ok(()),
        Some(_) => Err(error::invalid(format!("`{name}` stands twice"))),
    }
}

/// Reads a file from its start on, and no further than its end.
struct Reader<'a> {
    file: BufReader<&'a File>,
    at: u64,
    len: u64,
}

impl Reader<'_> {
    /// Steps over so many bytes, which lie in the file.
    fn advance(&mut self, bytes: u64) -> Result<()> {
        let end = self.at.checked_add(bytes).filter(|end| *end <= self.len);
        self.at = end.ok_or_else(|| error::invalid("it ends too soon"))?;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.advance(N as u64)?;
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes).map_err(|cause| Error::io("read it", cause))?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn string(&mut self, len: u64) -> Result<String> {
        self.advance(len)?;
        let mut bytes = vec![0; len as usize];
        self.file.read_exact(&mut bytes).map_err(|cause| Error::io("read it", cause))?;
        String::from_utf8(bytes).map_err(|_| error::invalid("a name in it is not UTF-8"))
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        self.advance(bytes)?;
        // Within the buffer where that will do.
        let done = match i64::try_from(bytes) {
            Ok(bytes) => self.file.seek_relative(bytes),
            Err(_) => self.file.seek(SeekFrom::Start(self.at)).map(drop),
        };
        done.map_err(|cause| Error::io("read it", cause))
    }

    /// Skips metadata of a type that GGUF numbers so.
    fn skip_value(&mut self, kind: u32) -> Result<()> {
        match (kind, size_of_value(kind)) {
            (_, Some(size)) => self.skip(size),
            (8, _) => {
                let len = self.u64()?;
                self.skip(len)
            }
            (9, _) => {
                let (kind, count) = (self.u32()?, self.u64()?);
                match size_of_value(kind) {
                    Some(size) => self.skip(size.saturating_mul(count)),
                    None if kind == 8 => (0..count).try_for_each(|_| self.skip_value(kind)),
                    None => Err(error::invalid("metadata of an unknown type")),
                }
            }
            _ => Err(error::invalid("metadata of an unknown type")),
        }
    }
}

/// Bytes of GGUF's metadata of fixed size.
fn size_of_value(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
