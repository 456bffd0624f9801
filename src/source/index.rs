//! The index of a sharded checkpoint: which shard holds which tensor.

use std::borrow::Cow;
use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use hashbrown::HashMap;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::catalog::Catalog;
use super::config::read_small;
use crate::error::{self, Error, ErrorKind, Result};
use crate::threads;

/// How the name of an index file ends.
pub const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// Base names of a main checkpoint, the one that a loader opens by default first.
const MAIN_STEMS: [&str; 2] = ["model", "diffusion_pytorch_model"];

/// A parsed index. Which tensor is in which shard, the catalog tells.
#[derive(Clone, Debug, PartialEq)]
pub struct Index {
    /// The index's own file name.
    pub file_name: String,
    /// Its `metadata` object, in file order; empty where it has none.
    pub metadata: Map<String, Value>,
    /// Shard file names, sorted, each once.
    pub shards: Vec<String>,
}

/// Tensors, in file order, each with the position of its shard in [`Index::shards`].
#[derive(Debug)]
pub(super) struct WeightMap<'a>(Vec<(Cow<'a, str>, usize)>);

#[derive(Deserialize)]
struct RawIndex<'a> {
    #[serde(default)]
    metadata: Option<Map<String, Value>>,
    #[serde(borrow)]
    weight_map: RawMap<'a>,
}

/// Tensors with the position of their shard among all shards named, which are in any order.
struct RawMap<'a> {
    tensors: Vec<(Cow<'a, str>, usize)>,
    shards: Vec<Cow<'a, str>>,
}

impl Index {
    /// Validates the JSON of the index of that name.
    ///
    /// # Errors
    /// `Corrupt` for malformed JSON, no tensors at all and shard names that leave the directory.
    pub(super) fn parse<'a>(file_name: &str, json: &'a [u8]) -> Result<(Self, WeightMap<'a>)> {
        let malformed = |cause: Box<dyn std::error::Error + Send + Sync>| {
            Error::caused(ErrorKind::Corrupt, "malformed index", cause)
        };
        let text = std::str::from_utf8(json).map_err(|cause| malformed(cause.into()))?;
        let raw: RawIndex<'_> =
            serde_json::from_str(text).map_err(|cause| malformed(cause.into()))?;
        let RawMap { mut tensors, shards } = raw.weight_map;
        if tensors.is_empty() {
            return Err(error::corrupt("`weight_map` names no tensor"));
        }
        let mut sorted: Vec<usize> = (0..shards.len()).collect();
        sorted.sort_unstable_by_key(|shard| &shards[*shard]);
        for &shard in &sorted {
            let name = &*shards[shard];
            let mut components = Path::new(name).components();
            let inside = matches!(components.next(), Some(Component::Normal(_)));
            if !inside || components.next().is_some() {
                let (tensor, _) = tensors
                    .iter()
                    .find(|(_, position)| *position == shard)
                    .expect("every shard comes from a tensor");
                return Err(error::corrupt(format!(
                    "`{tensor}`: shard name {name:?} leaves the directory"
                )));
            }
        }
        let mut positions = vec![0; shards.len()];
        for (position, &shard) in sorted.iter().enumerate() {
            positions[shard] = position;
        }
        for (_, shard) in &mut tensors {
            *shard = positions[*shard];
        }
        let index = Self {
            file_name: file_name.to_owned(),
            metadata: raw.metadata.unwrap_or_default(),
            shards: sorted.into_iter().map(|shard| shards[shard].to_string()).collect(),
        };
        Ok((index, WeightMap(tensors)))
    }

    /// Every tensor of the index must be in the shard that the index names, and stand there once.
    ///
    /// # Errors
    /// `Corrupt` with the first name, in sorted order, that isn't or doesn't.
    pub(super) fn check(&self, weight_map: &WeightMap<'_>, catalog: &Catalog) -> Result<()> {
        let WeightMap(tensors) = weight_map;
        let is_named: Vec<AtomicBool> = catalog.tensors().iter().map(|_| false.into()).collect();
        // The name, and the shard that it is not in; none for one that stands twice.
        let fault = |(name, shard): &'_ (Cow<'_, str>, usize)| match catalog.find(name) {
            Some(id) if catalog[id].shard() == *shard => {
                is_named[id].swap(true, Ordering::Relaxed).then_some(None)
            }
            _ => Some(Some(*shard)),
        };
        let faults = threads::map_ranges(tensors.len(), |range| {
            let named = tensors[range].iter();
            named.filter_map(|tensor| Some((&*tensor.0, fault(tensor)?))).min()
        });
        let what = match faults.into_iter().flatten().min() {
            None => return Ok(()),
            Some((name, None)) => format!("`{name}` stands twice"),
            Some((name, Some(shard))) => format!("`{name}` is not in shard {}", self.shards[shard]),
        };
        Err(error::corrupt(format!("{}: {what}", self.file_name)))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for RawMap<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// A string that is borrowed where it has no escapes.
        #[derive(Deserialize)]
        #[serde(transparent)]
        struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

        struct Tensors;

        impl<'de> Visitor<'de> for Tensors {
            type Value = RawMap<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawMap<'de>, A::Error> {
                let (mut tensors, mut shards) = (Vec::new(), Vec::new());
                let mut known = HashMap::new();
                let mut last = 0;
                while let Some((Text(name), Text(shard))) = map.next_entry()? {
                    // Most tensors are in the shard of the one before.
                    if shards.get(last) != Some(&shard) {
                        last = *known.entry(shard).or_insert_with_key(|shard| {
                            shards.push(shard.clone());
                            shards.len() - 1
                        });
                    }
                    tensors.push((name, last));
                }
                Ok(RawMap { tensors, shards })
            }
        }

        deserializer.deserialize_map(Tensors)
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

/// Fails for a file that is one of several, by its own name or an index beside it.
///
/// # Errors
/// `Unsupported` where it is.
pub(crate) fn check_alone(dir: &Path, name: &str) -> Result<()> {
    let is_of_index = || {
        let index = find_index_file(dir).ok()??;
        let json = read_small(&index).ok()?;
        let (index, _) = Index::parse("", &json).ok()?;
        Some(index.shards.len() > 1 && index.shards.iter().any(|shard| shard == name))
    };
    let is_of_set = numbered(name).is_some_and(|(_, _, count)| count.parse() != Ok(1));
    if is_of_set || is_of_index() == Some(true) {
        return Err(error::unsupported(format!(
            "{name}: one shard of several: name their directory, or the index"
        )));
    }
    Ok(())
}

/// The safetensors files of a directory that are numbered, and named as the index of that name is.
///
/// # Errors
/// `Io` where the directory can't be listed.
pub(super) fn shards_named_like(dir: &Path, index: &str) -> Result<Vec<String>> {
    let mut found = file_names(dir)?;
    let stem = index.strip_suffix(INDEX_SUFFIX);
    found.retain(|name| numbered(name).is_some_and(|(of, ..)| Some(of) == stem));
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
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    // DeepSeek-V3 counts in six digits, and numbers in five.
    let are_numbers = number.len() == 5 && count.len() >= 5 && digits(number) && digits(count);
    are_numbers.then_some((stem, number, count))
}

/// The UTF-8 names of the files in a directory, sorted. Symbolic links count as what they lead to.
fn file_names(dir: &Path) -> Result<Vec<String>> {
    let at = |cause| Error::io(dir.display(), cause);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(at)? {
        let entry = entry.map_err(at)?;
        let is_dir = match entry.file_type() {
            Ok(kind) if !kind.is_symlink() => kind.is_dir(),
            _ => entry.path().is_dir(),
        };
        if let Ok(name) = entry.file_name().into_string()
            && !is_dir
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
        for name in ["../x", "/x", "", "a/../../x", ".", "a/x"] {
            let json = format!(r#"{{"weight_map":{{"a":"x.safetensors","b":{name:?}}}}}"#);
            refuses(&json, &format!("`b`: shard name {name:?} leaves the directory"));
        }
    }

    #[test]
    fn keeps_metadata_and_sorts_shards() {
        let json = r#"{"metadata":{"total_size":7,"modality":"text"},
                       "weight_map":{"b":"2.safetensors","a":"1.safetensors","c":"1.safetensors"}}"#;
        let (index, WeightMap(tensors)) = Index::parse("i", json.as_bytes()).expect("valid");
        assert_eq!(index.shards, ["1.safetensors", "2.safetensors"]);
        assert_eq!(tensors, [("b".into(), 1), ("a".into(), 0), ("c".into(), 0)]);
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
        let six = ["m-00001-of-000002.safetensors", "m-00002-of-000002.safetensors"];
        check(&six, Ok(&six));
        check(&six[1..], Err("m-00001-of-000002.safetensors is missing"));
    }

    #[test]
    fn a_shard_of_several_is_not_a_checkpoint() {
        let dir = tempfile::tempdir().expect("a directory");
        let check = |name: &str, is_alone: bool| {
            assert_eq!(check_alone(dir.path(), name).is_ok(), is_alone, "{name}");
        };
        check("m-00001-of-00002.safetensors", false);
        check("m-00001-of-00001.safetensors", true);
        check("a.safetensors", true);
        let index = dir.path().join(format!("model{INDEX_SUFFIX}"));
        std::fs::write(&index, r#"{"weight_map":{"x":"a.safetensors"}}"#).expect("written");
        check("a.safetensors", true);
        let two = r#"{"weight_map":{"x":"a.safetensors","y":"b.safetensors"}}"#;
        std::fs::write(&index, two).expect("written");
        check("a.safetensors", false);
        check("c.safetensors", true);
    }
}
