//! The directory that a view shows, fixed when the view is opened.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::time::SystemTime;

/// Position of a node in its [`Tree`]; the root is [`ROOT`].
pub type NodeId = usize;

/// The root directory.
pub const ROOT: NodeId = 0;

/// One file or directory.
#[derive(Clone, Debug)]
pub struct Node {
    /// The name in its directory; empty for the root.
    pub name: OsString,
    /// The directory that holds it; the root's is itself.
    pub parent: NodeId,
    /// When it was last modified, as the source says.
    pub modified: SystemTime,
    /// What it is.
    pub kind: NodeKind,
}

/// A file with its size in bytes, or a directory with its entries in name order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A regular file.
    File {
        /// Length in bytes.
        size: u64,
    },
    /// A directory.
    Dir {
        /// The nodes in it, in name order.
        children: Vec<NodeId>,
    },
}

/// Every file and directory of a view.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    by_name: HashMap<(NodeId, OsString), NodeId>,
}

impl Tree {
    /// A tree of nothing but a root directory.
    pub(super) fn new(modified: SystemTime) -> Self {
        let kind = NodeKind::Dir { children: Vec::new() };
        let root = Node { name: OsString::new(), parent: ROOT, modified, kind };
        Self { nodes: vec![root], by_name: HashMap::new() }
    }

    /// Adds an entry to the directory `parent`; entries come in name order.
    pub(super) fn add(
        &mut self,
        parent: NodeId,
        name: OsString,
        modified: SystemTime,
        kind: NodeKind,
    ) -> NodeId {
        let id = self.nodes.len();
        self.by_name.insert((parent, name.clone()), id);
        self.nodes.push(Node { name, parent, modified, kind });
        match &mut self.nodes[parent].kind {
            NodeKind::Dir { children } => children.push(id),
            NodeKind::File { .. } => unreachable!("entries are added to directories"),
        }
        id
    }

    /// Every node; a [`NodeId`] is a position in this slice.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of that id.
    pub fn get(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id)
    }

    /// The entry `name` of the directory `parent`.
    pub fn lookup(&self, parent: NodeId, name: &OsStr) -> Option<NodeId> {
        self.by_name.get(&(parent, name.to_owned())).copied()
    }

    /// The path of a node below the root, without a leading slash.
    pub fn path(&self, id: NodeId) -> std::path::PathBuf {
        let mut names = Vec::new();
        let mut at = id;
        while at != ROOT {
            names.push(&self.nodes[at].name);
            at = self.nodes[at].parent;
        }
        names.into_iter().rev().collect()
    }
}
