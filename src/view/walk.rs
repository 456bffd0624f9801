//! Walks the source's directory once and plans what the view shows of it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::importance::Importances;
use super::model::Model;
use super::tree::{NodeId, NodeKind, ROOT, Tree};
use super::{Content, Hidden};
use crate::error::{self, Error, Result};
use crate::format::{self, Format};
use crate::quant::Quality;
use crate::recipe::Request;
use crate::source::{
    Checkpoint, INDEX_SUFFIX, ImportanceFile, SourceFile, check_alone, find_index_file, is_adapter,
};

/// Whether a file of that name is one that loaders take for weights of a model, or an index of them.
pub fn is_weights(name: &str) -> bool {
    (name.ends_with(".safetensors") || name.ends_with(INDEX_SUFFIX)) && !is_adapter(name)
}

/// What is found on the way.
pub(super) struct Walk<'a> {
    format: &'static dyn Format,
    request: &'a Request,
    importance: Option<Arc<ImportanceFile>>,
    pub(super) tree: Tree,
    pub(super) contents: Vec<Content>,
    pub(super) models: Vec<Model>,
    pub(super) hidden: Vec<Hidden>,
    pub(super) warnings: Vec<String>,
    weights: u32,
}

impl<'a> Walk<'a> {
    pub(super) fn new(format: &'static dyn Format, request: &'a Request) -> Result<Self> {
        if request.importance.is_some() && request.quality == Quality::Reference {
            return Err(error::invalid(
                "--importance has no effect at --quality reference, which searches nothing",
            ));
        }
        let importance = request.importance.as_deref().map(ImportanceFile::open).transpose()?;
        Ok(Self {
            format,
            request,
            importance: importance.map(Arc::new),
            tree: Tree::new(SystemTime::UNIX_EPOCH),
            contents: vec![Content::Dir],
            models: Vec::new(),
            hidden: Vec::new(),
            warnings: Vec::new(),
            weights: 0,
        })
    }

    /// What tells the importance that was found for one of the models from another; `None` where none
    /// was asked for.
    ///
    /// # Errors
    /// `Invalid` where it has no effect on any model, or on more than one.
    pub(super) fn importance_digest(&self) -> Result<Option<u64>> {
        let Some(file) = &self.importance else { return Ok(None) };
        let refuse = |what: String| Err(error::invalid(format!("--importance: {what}")));
        let all = || self.models.iter().filter_map(Model::importance);
        if all().all(|importances| importances.searched == 0) {
            return refuse(format!("{} searches nothing here", self.request.format));
        }
        let mut covered = all().filter(|importances| importances.covered > 0);
        match (covered.next(), covered.next()) {
            (Some(importances), None) => Ok(Some(importances.digest)),
            (Some(_), Some(_)) => refuse(format!(
                "{} has names of weights of several models: mount them one by one",
                file.name()
            )),
            _ => refuse(format!(
                "{} has the importance of no weight that is quantized: it has that of `{}`",
                file.name(),
                file.first_name().unwrap_or_default()
            )),
        }
    }

    /// Walks from `path` down and returns the canonical path of the directory that it starts in.
    pub(super) fn run(&mut self, path: &Path) -> Result<PathBuf> {
        let metadata = path.metadata().map_err(|cause| Error::io(path.display(), cause))?;
        let checkpoint = if metadata.is_dir() {
            self.checkpoint_in(path, true)?
        } else {
            let checkpoint = Checkpoint::open(path)?;
            if let (None, [shard]) = (checkpoint.index(), checkpoint.shards()) {
                check_alone(checkpoint.dir(), shard.file.name())?;
            }
            Some(checkpoint)
        };
        let root = match &checkpoint {
            Some(checkpoint) => checkpoint.dir().to_owned(),
            None => path.canonicalize().map_err(|cause| Error::io(path.display(), cause))?,
        };
        let modified = root.metadata().and_then(|metadata| metadata.modified());
        self.tree = Tree::new(modified.map_err(|cause| Error::io(root.display(), cause))?);
        let mut above = vec![root.clone()];
        self.add_dir(&root, Path::new(""), ROOT, checkpoint, &mut above)?;
        if self.models.is_empty() {
            return Err(error::not_found(format!(
                "{}: not a model directory: no safetensors checkpoint in it or below",
                path.display()
            )));
        }
        Ok(root)
    }

    /// The checkpoint in a directory, if there is one.
    ///
    /// Below the root a directory of loose weight files, without index or config, is none.
    fn checkpoint_in(&mut self, dir: &Path, is_root: bool) -> Result<Option<Checkpoint>> {
        let indexed = match find_index_file(dir) {
            Ok(found) => found.is_some(),
            Err(error) if is_root => return Err(error),
            Err(_) => true,
        };
        if !indexed && !(has_weights(dir)? && (is_root || dir.join("config.json").exists())) {
            return Ok(None);
        }
        Checkpoint::open(dir).map(Some)
    }

    fn add_dir(
        &mut self,
        dir: &Path,
        below: &Path,
        node: NodeId,
        checkpoint: Option<Checkpoint>,
        above: &mut Vec<PathBuf>,
    ) -> Result<()> {
        let model = checkpoint.map(|checkpoint| self.add_model(checkpoint, below)).transpose()?;
        for (name, path) in sorted_entries(dir)? {
            let here = below.join(&name);
            let Ok(metadata) = path.metadata() else {
                self.warnings.push(format!("{}: not shown: it leads nowhere", here.display()));
                continue;
            };
            let modified = metadata.modified().map_err(|c| Error::io(path.display(), c))?;
            if metadata.is_dir() {
                let target = path.canonicalize().map_err(|c| Error::io(path.display(), c))?;
                if above.contains(&target) {
                    self.warnings
                        .push(format!("{}: not shown: it contains itself", here.display()));
                    continue;
                }
                let kind = NodeKind::Dir { children: Vec::new() };
                let child = self.add(node, name, modified, kind, Content::Dir);
                let checkpoint =
                    self.checkpoint_in(&path, false).map_err(|e| e.within(here.display()))?;
                above.push(target);
                self.add_dir(&path, &here, child, checkpoint, above)?;
                above.pop();
            } else if !metadata.is_file() {
                self.warnings.push(format!("{}: not shown: not a regular file", here.display()));
            } else if let Some(reason) = model.and_then(|model| self.hides(model, &name)) {
                self.hidden.push(Hidden { path: here, size: metadata.len(), reason });
            } else {
                let content = self.content_of(model, dir, &name, below)?;
                let size = match &content {
                    Content::Dir => unreachable!("files are no directories"),
                    Content::Copy(file) => file.len(),
                    Content::Inline(bytes) => bytes.len() as u64,
                    Content::Index(model) => self.models[*model].index_len().expect("it has one"),
                    Content::Shard { model, shard } => self.models[*model].shards()[*shard].len(),
                };
                self.add(node, name, modified, NodeKind::File { size }, content);
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        parent: NodeId,
        name: OsString,
        modified: SystemTime,
        kind: NodeKind,
        content: Content,
    ) -> NodeId {
        self.contents.push(content);
        self.tree.add(parent, name, modified, kind)
    }

    fn add_model(&mut self, checkpoint: Checkpoint, below: &Path) -> Result<usize> {
        let place = |error: Error| match below.as_os_str().is_empty() {
            true => error,
            false => error.within(below.display()),
        };
        let diffusers = checkpoint
            .config()
            .is_some_and(|config| config.value.get("_diffusers_version").is_some());
        let plain = self.request.simulate.is_some() || self.request.dtype.is_some();
        let format = if diffusers { format::find("dense")? } else { self.format };
        let mut request = self.request.clone();
        if diffusers && (self.request.simulate.is_none() || is_autoencoder(&checkpoint)) {
            request = Request { dtype: request.dtype, ..Request::default() };
        } else if !diffusers
            && self.format.name() != "dense"
            && below != Path::new("")
            && in_pipeline(&checkpoint)
        {
            // What asks for plain numbers is meant for the pipeline's other components.
            (request.simulate, request.dtype) = (None, None);
        }
        // A pipeline's own components are only passed on, in whatever types they are.
        if !diffusers {
            checkpoint.refuse_unknown_codes().map_err(place)?;
        }
        let importance = self.importance.as_ref();
        let model = Model::new(checkpoint, format, &request, importance, self.weights);
        let model = model.map_err(place)?;
        let prefix = match below.as_os_str().is_empty() {
            true => String::new(),
            false => format!("{}: ", below.display()),
        };
        let assignment = &model.plan().assignment;
        self.warnings.extend(assignment.warnings().iter().map(|line| format!("{prefix}{line}")));
        let importances = model.importance();
        self.warnings.extend(
            importances.and_then(Importances::warning).map(|line| format!("{prefix}{line}")),
        );
        if diffusers && !plain && self.format.name() != "dense" {
            self.warnings.push(format!(
                "{prefix}shown as it is: diffusers components do not read {}",
                self.format.name()
            ));
        }
        self.weights += u32::try_from(model.plan().weights.len()).expect("far fewer than 2^32");
        self.models.push(model);
        Ok(self.models.len() - 1)
    }

    /// Why a file beside a checkpoint isn't shown: a loader might take it for the weights.
    fn hides(&self, model: usize, name: &OsString) -> Option<&'static str> {
        let name = name.to_str()?;
        let checkpoint = self.models[model].checkpoint();
        if checkpoint.shards().iter().any(|shard| shard.file.name() == name) {
            return None;
        }
        // What the config no longer declares, a loader might find beside it.
        const DECLARATIONS: [&str; 4] = [
            "quantize_config.json",
            "quant_config.json",
            "quantization_config.json",
            "hf_quant_config.json",
        ];
        if checkpoint.is_decoded() && DECLARATIONS.contains(&name) {
            return Some("it declares the quantization that is decoded");
        }
        let own_index = checkpoint.index().is_some_and(|index| index.file_name == name);
        let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix));
        if is_adapter(name) || own_index {
            None
        } else if name.ends_with(".safetensors") {
            Some("a shard that the index does not name")
        } else if ends(&[INDEX_SUFFIX]) {
            Some("another checkpoint's index")
        } else if name.starts_with("consolidated")
            || ends(&[".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".bin.index.json"])
        {
            Some("weights in another format")
        } else {
            None
        }
    }

    fn content_of(
        &self,
        model: Option<usize>,
        dir: &Path,
        name: &OsString,
        below: &Path,
    ) -> Result<Content> {
        if let Some(position) = model
            && let Some(utf8) = name.to_str()
        {
            let model = &self.models[position];
            let shards = model.checkpoint().shards();
            if let Some(shard) = shards.iter().position(|shard| shard.file.name() == utf8) {
                return Ok(match model.shards().is_empty() {
                    true => Content::Copy(shards[shard].file.clone()),
                    false => Content::Shard { model: position, shard },
                });
            }
            if utf8 == "config.json"
                && let Some(text) = model.config_text()
            {
                return Ok(Content::Inline(text.into()));
            }
            let index = model.checkpoint().index();
            if index.is_some_and(|index| index.file_name == utf8) && model.index_len().is_some() {
                return Ok(Content::Index(position));
            }
        }
        let (file, _) =
            SourceFile::open(dir, name).map_err(|e| e.within(below.join(name).display()))?;
        Ok(Content::Copy(Arc::new(file)))
    }
}

/// Whether one of diffusers' components leads between images and latents, which nobody quantizes.
fn is_autoencoder(checkpoint: &Checkpoint) -> bool {
    let class = checkpoint.config().and_then(|config| config.value.get("_class_name")?.as_str());
    class.is_some_and(|class| ["Autoencoder", "VAE", "VQ"].iter().any(|word| class.contains(word)))
}

/// Whether a checkpoint is a component of a diffusers pipeline.
fn in_pipeline(checkpoint: &Checkpoint) -> bool {
    let above = checkpoint.dir().parent();
    above.is_some_and(|dir| dir.join("model_index.json").exists())
}

/// Whether a directory holds weight files of a model.
fn has_weights(dir: &Path) -> Result<bool> {
    Ok(sorted_entries(dir)?.iter().any(|(name, path)| {
        name.to_str().is_some_and(|name| name.ends_with(".safetensors") && !is_adapter(name))
            && !path.is_dir()
    }))
}

fn sorted_entries(dir: &Path) -> Result<Vec<(OsString, PathBuf)>> {
    let at = |cause| Error::io(dir.display(), cause);
    let entries = std::fs::read_dir(dir).map_err(at)?;
    let mut entries = entries
        .map(|entry| entry.map(|entry| (entry.file_name(), entry.path())))
        .collect::<Result<Vec<_>, _>>()
        .map_err(at)?;
    entries.sort_unstable();
    Ok(entries)
}
