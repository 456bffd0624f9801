//! The index of a sharded checkpoint: which shard holds which tensor.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::header::Pairs;
use crate::error::{self, Error, ErrorKind, Result};

/// How the name of an index file ends.
pub const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// Base names of a main checkpoint, the one that a loader opens by default first.
const MAIN_STEMS: [&str; 2] = ["model", "diffusion_pytorch_model"];

/// A parsed index.
#[derive(Clone, Debug, PartialEq)]
pub struct Index {
    /// The index's own file name.
    pub file_name: String,
    /// Its `metadata` object, in file order; empty where it has none.
    pub metadata: Map<String, Value>,
    /// Shard file names, sorted, each once.
    pub shards: Vec<String>,
    /// Tensor name to position in `shards`.
    pub weight_map: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct RawIndex {
    #[serde(default)]
    metadata: Option<Map<String, Value>>,
    weight_map: Pairs,
}

impl Index {
    /// Reads and validates an index file.
    ///
    /// # Errors
    /// `Corrupt` for malformed JSON, duplicate tensors, no tensors at all and shard names that
    /// leave the directory; `NotFound` or `Io` where the file can't be read.
    pub fn read(path: &Path) -> Result<Self> {
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = std::fs::read(path).map_err(|cause| Error::io(path.display(), cause))?;
        Self::parse(&file_name, &text).map_err(|error| error.within(&file_name))
    }

    /// Validates an index's JSON.
    ///
    /// # Errors
    /// As [`Index::read`], less the I/O.
    pub fn parse(file_name: &str, json: &[u8]) -> Result<Self> {
        let raw: RawIndex = serde_json::from_slice(json)
            .map_err(|cause| Error::caused(ErrorKind::Corrupt, "malformed index", cause))?;
        let Pairs(pairs) = raw.weight_map;
        if pairs.is_empty() {
            return Err(error::corrupt("`weight_map` names no tensor"));
        }
        let mut shards: Vec<String> = pairs.iter().map(|(_, shard)| shard.clone()).collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in &shards {
            let mut components = Path::new(shard).components();
            let inside = matches!(components.next(), Some(Component::Normal(_)));
            if !inside || components.next().is_some() {
                let (tensor, _) =
                    pairs.iter().find(|(_, s)| s == shard).expect("every shard comes from a pair");
                return Err(error::corrupt(format!(
                    "`{tensor}`: shard name {shard:?} leaves the directory"
                )));
            }
        }
        let position: HashMap<&str, usize> =
            shards.iter().enumerate().map(|(i, shard)| (shard.as_str(), i)).collect();
        let weight_map =
            pairs.iter().map(|(name, shard)| (name.clone(), position[shard.as_str()])).collect();
        Ok(Self {
            file_name: file_name.to_owned(),
            metadata: raw.metadata.unwrap_or_default(),
            shards,
            weight_map,
        })
    }
}

/// The index file of a checkpoint directory, if it has one. Where there are several, the one that
/// loaders open by default wins (`model`, then `diffusion_pytorch_model`).
///
/// # Errors
/// `Unsupported` where there are several and none of them is the default one; `Io` where the
/// directory can't be listed.
pub fn find_index_file(dir: &Path) -> Result<Option<PathBuf>> {
    let mut found: Vec<String> = file_names(dir)?;
    found.retain(|name| name.ends_with(INDEX_SUFFIX));
    for stem in MAIN_STEMS {
        let name = format!("{stem}{INDEX_SUFFIX}");
        if found.contains(&name) {
            return Ok(Some(dir.join(name)));
        }
    }
    match found.as_slice() {
        [] => Ok(None),
        [only] => Ok(Some(dir.join(only))),
        several => Err(error::unsupported(format!(
            "{}: several indexes ({}): name the one to use",
            dir.display(),
            several.join(", ")
        ))),
    }
}

/// The safetensors files that make up a checkpoint without an index: a single one by its default
/// name, the only one there is, or a complete set named `STEM-00001-of-00003.safetensors`.
///
/// # Errors
/// `NotFound` where there is no weight file, `Unsupported` where it isn't clear which files belong
/// together, `Corrupt` where one of a numbered set is missing.
pub(super) fn unindexed_shards(dir: &Path) -> Result<Vec<String>> {
    let mut found = file_names(dir)?;
    found.retain(|name| name.ends_with(".safetensors") && !is_adapter(name));
    for stem in MAIN_STEMS {
        let name = format!("{stem}.safetensors");
        if found.contains(&name) {
            return Ok(vec![name]);
        }
    }
    if found.is_empty() {
        return Err(error::not_found(format!(
            "{}: not a model directory: no safetensors file in it",
            dir.display()
        )));
    }
    if found.len() == 1 && numbered(&found[0]).is_none() {
        return Ok(found);
    }
    let Some((stem, _, count)) = numbered(&found[0]) else {
        return Err(unclear(dir, &found));
    };
    if found.iter().any(|name| numbered(name).is_none_or(|(s, _, c)| (s, c) != (stem, count))) {
        return Err(unclear(dir, &found));
    }
    if count.parse() != Ok(found.len()) {
        return Err(missing_of_set(dir, stem, count, &found));
    }
    Ok(found)
}

/// Whether a file holds an adapter (LoRA and the like), which lies beside a model and is not part
/// of it.
pub(crate) fn is_adapter(file_name: &str) -> bool {
    file_name.starts_with("adapter_")
}

fn unclear(dir: &Path, found: &[String]) -> Error {
    error::unsupported(format!(
        "{}: {} safetensors files ({}, {}, …) and no index that says which belong together",
        dir.display(),
        found.len(),
        found[0],
        found[1]
    ))
}

fn missing_of_set(dir: &Path, stem: &str, count: &str, found: &[String]) -> Error {
    let missing = (1..=count.parse::<usize>().unwrap_or(0))
        .map(|i| format!("{stem}-{i:05}-of-{count}.safetensors"))
        .find(|name| !found.contains(name));
    let missing = missing.unwrap_or_else(|| format!("one of {count}"));
    error::corrupt(format!("{}: shard {missing} is missing", dir.display()))
}

/// `STEM-00002-of-00003.safetensors` as (STEM, "00002", "00003").
fn numbered(file_name: &str) -> Option<(&str, &str, &str)> {
    let (rest, count) = file_name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    (digits(number) && digits(count)).then_some((stem, number, count))
}

/// The UTF-8 names of the files in a directory, sorted. Symbolic links count as what they lead to.
fn file_names(dir: &Path) -> Result<Vec<String>> {
    let at = |cause| Error::io(dir.display(), cause);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(at)? {
        let entry = entry.map_err(at)?;
        if let Ok(name) = entry.file_name().into_string()
            && !entry.path().is_dir()
        {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refuses(json: &str, complaint: &str) {
        let message = Index::parse("i", json.as_bytes()).expect_err("accepted").to_string();
        assert!(message.contains(complaint), "{message:?} does not say {complaint:?}");
    }

    #[test]
    fn refuses_what_is_not_an_index_of_this_directory() {
        refuses("{", "malformed index: EOF");
        refuses("[]", "malformed index");
        refuses("{}", "missing field `weight_map`");
        refuses(r#"{"weight_map":{}}"#, "names no tensor");
        refuses(r#"{"weight_map":{"a":1}}"#, "expected a string");
        refuses(r#"{"weight_map":{"a":"x","a":"y"}}"#, "`a` stands twice");
        for name in ["../x", "/x", "", "a/../../x", ".", "a/x"] {
            let json = format!(r#"{{"weight_map":{{"a":"x.safetensors","b":{name:?}}}}}"#);
            refuses(&json, &format!("`b`: shard name {name:?} leaves the directory"));
        }
    }

    #[test]
    fn keeps_metadata_and_sorts_shards() {
        let json = r#"{"metadata":{"total_size":7,"modality":"text"},
                       "weight_map":{"b":"2.safetensors","a":"1.safetensors","c":"1.safetensors"}}"#;
        let index = Index::parse("i", json.as_bytes()).expect("valid");
        assert_eq!(index.shards, ["1.safetensors", "2.safetensors"]);
        assert_eq!(index.weight_map["b"], 1);
        assert_eq!(index.metadata["modality"], "text");
    }

    #[test]
    fn a_set_without_index_must_be_complete_and_unambiguous() {
        let check = |files: &[&str], expected: std::result::Result<&[&str], &str>| {
            let dir = tempfile::tempdir().expect("a directory");
            for file in files {
                std::fs::write(dir.path().join(file), b"").expect("written");
            }
            match (unindexed_shards(dir.path()), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected),
                (Err(error), Err(complaint)) => {
                    assert!(error.to_string().contains(complaint), "{error}");
                }
                (found, expected) => panic!("{found:?} instead of {expected:?}"),
            }
        };
        check(&["model.safetensors", "other.safetensors"], Ok(&["model.safetensors"]));
        check(&["adapter_model.safetensors", "x.safetensors"], Ok(&["x.safetensors"]));
        check(&["a.bin"], Err("no safetensors file"));
        check(&["a.safetensors", "b.safetensors"], Err("no index that says"));
        let (one, two) = ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors");
        check(&[one, two], Ok(&[one, two]));
        check(&[two], Err("m-00001-of-00002.safetensors is missing"));
    }
}
