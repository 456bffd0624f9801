//! Weights found to hold a NaN or an infinity, each told once.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// What encoding has shown of the weights; see [`View::news`](super::View::news).
#[derive(Debug, Default)]
pub(super) struct Spoilt {
    found: Mutex<Found>,
    /// Whether there is something to tell, for readers to ask without a lock.
    untold: AtomicBool,
}

#[derive(Debug, Default)]
struct Found {
    weights: HashSet<u32>,
    lines: Vec<String>,
    /// How many of them were taken.
    told: usize,
}

impl Spoilt {
    /// Notes that a weight, by its position among all of the view's, was found so.
    pub(super) fn note(&self, weight: u32, line: impl FnOnce() -> String) {
        let mut found = self.found.lock();
        if found.weights.insert(weight) {
            found.lines.push(line());
            self.untold.store(true, Ordering::Release);
        }
    }

    /// The lines not taken yet.
    pub(super) fn take(&self) -> Vec<String> {
        if !self.untold.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut found = self.found.lock();
        self.untold.store(false, Ordering::Release);
        let all = found.lines.len();
        let from = std::mem::replace(&mut found.told, all);
        found.lines[from..].to_vec()
    }

    /// Every line so far.
    pub(super) fn all(&self) -> Vec<String> {
        self.found.lock().lines.clone()
    }
}
