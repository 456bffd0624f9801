//! The virtual checkpoint: a tree of files, and `read_at`.

mod tree;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use tree::{Node, NodeId, NodeKind, ROOT, Tree};

use crate::error::{self, Error, Result};
use crate::recipe::Request;
use crate::source::{SourceFile, SourceFiles};

/// Source files kept open and mapped at a time.
const OPEN_FILES: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not zero");

/// Memory knobs; they never change a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of encoded chunks that are kept.
    pub cache: u64,
    /// Source bytes that one chunk is encoded from, at least one unit of its scheme.
    pub chunk: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { cache: 256 << 20, chunk: 2 << 20 }
    }
}

/// A checkpoint, or a tree of them, shown as quantized.
#[derive(Debug)]
pub struct View {
    root: PathBuf,
    tree: Tree,
    contents: Vec<Content>,
    sources: SourceFiles,
}

#[derive(Debug)]
enum Content {
    Dir,
    /// A file shown as it is.
    Copy(Arc<SourceFile>),
}

impl View {
    /// Opens what `path` leads to and plans every file of it.
    ///
    /// # Errors
    /// Whatever is wrong with the model or the request; see [`crate::source::Checkpoint::open`].
    pub fn open(path: &Path, _request: &Request, _budget: Budget) -> Result<Self> {
        let root = path.canonicalize().map_err(|cause| Error::io(path.display(), cause))?;
        let modified = root.metadata().and_then(|m| m.modified());
        let mut view = Self {
            tree: Tree::new(modified.map_err(|cause| Error::io(path.display(), cause))?),
            contents: vec![Content::Dir],
            sources: SourceFiles::new(OPEN_FILES),
            root: root.clone(),
        };
        view.add_dir(&root, ROOT)?;
        Ok(view)
    }

    fn add_dir(&mut self, dir: &Path, node: NodeId) -> Result<()> {
        let at = |cause| Error::io(dir.display(), cause);
        let mut entries =
            std::fs::read_dir(dir).map_err(at)?.collect::<Result<Vec<_>, _>>().map_err(at)?;
        entries.sort_by_key(|entry| entry.file_name());
        for entry in entries {
            let metadata = entry.path().metadata().map_err(at)?;
            let modified = metadata.modified().map_err(at)?;
            if metadata.is_dir() {
                let kind = NodeKind::Dir { children: Vec::new() };
                let child = self.tree.add(node, entry.file_name(), modified, kind);
                self.contents.push(Content::Dir);
                self.add_dir(&entry.path(), child)?;
            } else {
                let (file, _) = SourceFile::open(dir, &entry.file_name().to_string_lossy())?;
                let kind = NodeKind::File { size: file.len() };
                self.tree.add(node, entry.file_name(), modified, kind);
                self.contents.push(Content::Copy(Arc::new(file)));
            }
        }
        Ok(())
    }

    /// The canonical path of the model's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Every file and directory.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Fills `buf` from `offset` of a file and returns how many bytes that were: all of `buf`, or
    /// what is left of the file. Never short elsewhere: the kernel takes a short read to mean that
    /// the file shrank.
    ///
    /// # Errors
    /// `Invalid` for a directory; `Stale` or `Io` where the source can't be read any more. `buf`
    /// then holds nothing of use.
    pub fn read_at(&self, file: NodeId, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let NodeKind::File { size } = self.tree.nodes()[file].kind else {
            return Err(error::invalid("a directory can't be read"));
        };
        let len = size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let buf = &mut buf[..len];
        match &self.contents[file] {
            Content::Dir => unreachable!("a file has content"),
            Content::Copy(source) => self.sources.read_exact_at(source, offset, buf)?,
        }
        Ok(len)
    }
}
