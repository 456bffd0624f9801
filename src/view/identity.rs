//! What tells the bytes of one view from those of another, without reading them.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde::{Deserialize, Serialize};

use super::{Content, View};

/// A view's bytes depend on nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The version of this crate.
    pub version: String,
    /// What was requested, in words of this version, and a digest of what input features count for.
    pub recipe: String,
    /// A digest of the names, lengths and times of the source's files.
    pub source: String,
}

impl Identity {
    /// In what `self` differs from `other`, which is this view's; `None` where it does not.
    pub fn change_to(&self, other: &Self) -> Option<String> {
        if self.version != other.version {
            Some(format!("aq-fs was {} then and is {} now", self.version, other.version))
        } else if self.recipe != other.recipe {
            Some("the recipe is another now".to_owned())
        } else {
            (self.source != other.source).then(|| "the source has changed".to_owned())
        }
    }
}

impl View {
    /// What tells this view's bytes from another's. It is the same on every machine that sees the
    /// source, or a copy of it that has its times.
    pub fn identity(&self) -> Identity {
        // Another compiler may hash otherwise: its views are then taken for others.
        let mut hash = DefaultHasher::new();
        for (id, content) in self.contents.iter().enumerate() {
            self.tree.path(id).hash(&mut hash);
            let file = match content {
                Content::Dir => continue,
                Content::Inline(bytes) => {
                    bytes.hash(&mut hash);
                    continue;
                }
                Content::Index(model) => {
                    self.shared.models[*model].hash_index(&mut hash);
                    continue;
                }
                Content::Copy(file) => file,
                Content::Shard { model, shard } => {
                    &self.shared.models[*model].checkpoint().shards()[*shard].file
                }
            };
            (file.len(), file.modified()).hash(&mut hash);
        }
        Identity {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            recipe: self.recipe.clone(),
            source: format!("{:016x}", hash.finish()),
        }
    }
}
