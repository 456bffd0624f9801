//! The header of one safetensors file, parsed strictly.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;

use hashbrown::HashSet;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;

use crate::dtype::{self, Dtype};
use crate::error::{self, Error, Result};

/// The largest header that is read, the same limit as the safetensors library's.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the little-endian length in front of the header.
pub(super) const LENGTH_BYTES: u64 = 8;

/// One tensor as a header declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The tensor's name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape, outermost dimension first; empty for a scalar.
    pub shape: Vec<u64>,
    /// Offset of its first byte, from the start of the file.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// A parsed and validated header: the tensors in file order tile the data exactly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// `__metadata__`, in file order.
    pub metadata: Vec<(String, String)>,
    /// The tensors, in order of offset.
    pub entries: Vec<Entry>,
}

impl Header {
    /// Reads and validates the header of a file of `file_len` bytes.
    ///
    /// # Errors
    /// `Corrupt` for whatever the safetensors library refuses (a header that is too short, too
    /// long, not JSON; ranges that overlap, leave holes or do not fit dtype, shape or file;
    /// shapes that overflow), and for duplicate keys, which it lets pass. `Io` where the file
    /// can't be read.
    pub fn read(file: &File, file_len: u64) -> Result<Self> {
        Self::read_with(&mut Vec::new(), file, file_len)
    }

    /// As [`read`](Self::read), with memory for the text that may serve again.
    pub(super) fn read_with(json: &mut Vec<u8>, file: &File, file_len: u64) -> Result<Self> {
        let read = |buf: &mut [u8], offset| {
            file.read_exact_at(buf, offset).map_err(|cause| Error::io("read the header", cause))
        };
        if file_len < LENGTH_BYTES {
            return Err(error::corrupt(format!(
                "{file_len} bytes are too few for a safetensors file"
            )));
        }
        let mut length = [0; LENGTH_BYTES as usize];
        read(&mut length, 0)?;
        let header_len = u64::from_le_bytes(length);
        if header_len > MAX_HEADER_BYTES {
            return Err(error::corrupt(format!(
                "the header claims {header_len} bytes, more than the {MAX_HEADER_BYTES} allowed"
            )));
        }
        if header_len > file_len - LENGTH_BYTES {
            return Err(error::corrupt(format!(
                "the header claims {header_len} bytes, but the file has {file_len} in all"
            )));
        }
        json.resize(header_len as usize, 0);
        read(json, LENGTH_BYTES)?;
        Self::parse(json, file_len)
    }

    /// Validates a header's JSON, given the length of the whole file.
    ///
    /// # Errors
    /// As [`Header::read`], less the I/O.
    pub fn parse(json: &[u8], file_len: u64) -> Result<Self> {
        let text = std::str::from_utf8(json)
            .map_err(|cause| Error::caused(error::ErrorKind::Corrupt, "header", cause))?;
        let raw: RawHeader = serde_json::from_str(text)
            .map_err(|cause| Error::caused(error::ErrorKind::Corrupt, "header", cause))?;
        let data_start = LENGTH_BYTES + json.len() as u64;
        let mut entries = Vec::with_capacity(raw.tensors.len());
        for (name, info) in raw.tensors {
            let (start, end) = info.data_offsets;
            let size = dtype::byte_len(info.dtype, &info.shape).ok_or_else(|| {
                error::corrupt(format!(
                    "`{name}`: {} elements of shape {:?} are not a whole number of bytes below 2^64",
                    info.dtype, info.shape
                ))
            })?;
            if end.checked_sub(start) != Some(size) {
                return Err(error::corrupt(format!(
                    "`{name}`: offsets {start}..{end} do not fit {} {:?} of {size} bytes",
                    info.dtype, info.shape
                )));
            }
            entries.push(Entry { name, dtype: info.dtype, shape: info.shape, start, len: size });
        }
        entries.sort_by_key(|entry| (entry.start, entry.len));
        let mut end = 0u64;
        for entry in &mut entries {
            if entry.start != end {
                let what = if entry.start < end { "overlap" } else { "leave a hole before" };
                return Err(error::corrupt(format!(
                    "`{}`: its bytes start at {} and {what} {end}, where the tensors before it end",
                    entry.name, entry.start
                )));
            }
            end = entry.start + entry.len;
            entry.start += data_start;
        }
        let expected = data_start.checked_add(end);
        if expected != Some(file_len) {
            let last = entries.last().map_or("no tensor", |entry| entry.name.as_str());
            let relation = if expected.is_none_or(|e| e > file_len) { "shorter" } else { "longer" };
            return Err(error::corrupt(format!(
                "the file has {file_len} bytes, {relation} than its header says: `{last}` ends at {}",
                data_start as u128 + end as u128
            )));
        }
        Ok(Self { metadata: raw.metadata, entries })
    }
}

struct RawHeader {
    metadata: Vec<(String, String)>,
    tensors: Vec<(String, RawEntry)>,
}

struct RawEntry {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Dtype,
    Shape,
    DataOffsets,
    #[serde(other)]
    Other,
}

impl<'de> Deserialize<'de> for RawEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = RawEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawEntry, A::Error> {
                /// Reads a member, once.
                fn read<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
                    member: &mut Option<T>,
                    name: &'static str,
                    map: &mut A,
                ) -> Result<(), A::Error> {
                    if member.is_some() {
                        return Err(A::Error::duplicate_field(name));
                    }
                    *member = Some(map.next_value()?);
                    Ok(())
                }
                let (mut dtype, mut shape, mut data_offsets) = (None, None, None);
                while let Some(field) = map.next_key()? {
                    match field {
                        Field::Dtype => read(&mut dtype, "dtype", &mut map)?,
                        Field::Shape => read(&mut shape, "shape", &mut map)?,
                        Field::DataOffsets => read(&mut data_offsets, "data_offsets", &mut map)?,
                        // It means nothing, but must be JSON that the library can read too, which
                        // is more than serde asks of what it skips.
                        Field::Other => drop(map.next_value::<Value>()?),
                    }
                }
                let missing = A::Error::missing_field;
                Ok(RawEntry {
                    dtype: dtype.ok_or_else(|| missing("dtype"))?,
                    shape: shape.ok_or_else(|| missing("shape"))?,
                    data_offsets: data_offsets.ok_or_else(|| missing("data_offsets"))?,
                })
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;

        impl<'de> Visitor<'de> for Tensors {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut metadata = None;
                let mut tensors: Vec<(String, RawEntry)> = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        if metadata.is_some() {
                            return Err(A::Error::custom("`__metadata__` stands twice"));
                        }
                        metadata = Some(map.next_value::<Option<Pairs>>()?.unwrap_or_default());
                    } else {
                        let info = map
                            .next_value()
                            .map_err(|cause| A::Error::custom(format_args!("`{key}`: {cause}")))?;
                        tensors.push((key, info));
                    }
                }
                let names = tensors.iter().map(|(name, _)| name.as_str());
                if let Some(name) = first_duplicate(names) {
                    return Err(A::Error::custom(format_args!("`{name}` stands twice")));
                }
                Ok(RawHeader { metadata: metadata.unwrap_or_default().0, tensors })
            }
        }

        deserializer.deserialize_map(Tensors)
    }
}

/// An object of strings in file order, refused where a key stands twice.
#[derive(Default)]
struct Pairs(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;

        impl<'de> Visitor<'de> for Strings {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry::<String, String>()? {
                    pairs.push(pair);
                }
                let keys = pairs.iter().map(|(key, _)| key.as_str());
                if let Some(key) = first_duplicate(keys) {
                    return Err(A::Error::custom(format_args!("`{key}` stands twice")));
                }
                Ok(Pairs(pairs))
            }
        }

        deserializer.deserialize_map(Strings)
    }
}

/// The first name that stands there again.
pub(super) fn first_duplicate<'a>(
    mut names: impl ExactSizeIterator<Item = &'a str> + Clone,
) -> Option<&'a str> {
    // Most lists are sorted, which takes less to see.
    if names.clone().is_sorted_by(|a, b| a < b) {
        return None;
    }
    let mut seen = HashSet::with_capacity(names.len());
    names.find(|name| !seen.insert(*name))
}
