//! Buffers for encoded chunks, used again and again so that memory stays where it is.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// Idle buffers that are kept for the next chunk.
const IDLE: usize = 16;

/// Buffers below this many bytes are the allocator's business.
const SMALL: usize = 64 << 10;

/// Where buffers go when they are dropped, and come from.
///
/// A chunk's codes are too large for the allocator to recycle well: it would ask the kernel for
/// fresh pages, and have them zeroed, for every one.
#[derive(Clone, Debug)]
pub(super) struct Buffers(Arc<Store>);

#[derive(Debug)]
struct Store {
    idle: Mutex<Vec<Vec<u8>>>,
    /// Bytes of idle buffers that are kept.
    limit: usize,
}

/// Bytes that return to where they came from.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    /// How many bytes of it were read for good.
    spent: AtomicUsize,
    home: Weak<Store>,
}

impl Buffers {
    /// Keeps idle buffers in a sixteenth of `budget` bytes, but at least 1 MiB and at most 16.
    pub(super) fn new(budget: u64) -> Self {
        let limit = (budget / 16).clamp(1 << 20, 16 << 20) as usize;
        Self(Arc::new(Store { idle: Mutex::default(), limit }))
    }

    /// A buffer of `len` bytes, whatever they are, to be kept.
    pub(super) fn take(&self, len: usize) -> Buffer {
        if len < SMALL { Buffer::from(vec![0; len]) } else { self.lend(len) }
    }

    /// A buffer of `len` bytes, whatever they are, that is soon dropped.
    pub(super) fn lend(&self, len: usize) -> Buffer {
        let mut idle = self.0.idle.lock();
        // One that is much too large is worth more to somebody else.
        let fits = |bytes: &Vec<u8>| (len..=len.saturating_mul(2)).contains(&bytes.capacity());
        let found = idle.iter().position(fits).map(|i| idle.swap_remove(i));
        drop(idle);
        let mut bytes = found.unwrap_or_else(|| Vec::with_capacity(len));
        bytes.resize(len, 0);
        Buffer { bytes, spent: AtomicUsize::new(0), home: Arc::downgrade(&self.0) }
    }
}

impl Buffer {
    /// Notes that so many more bytes were read, and returns whether all were for the first time.
    pub(super) fn spend(&self, bytes: usize) -> bool {
        let before = self.spent.fetch_add(bytes, Ordering::Relaxed);
        before < self.len() && before + bytes >= self.len()
    }
}

impl From<Vec<u8>> for Buffer {
    /// Bytes that belong to no store.
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, spent: AtomicUsize::new(0), home: Weak::new() }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            let mut idle = home.idle.lock();
            idle.push(std::mem::take(&mut self.bytes));
            let mut bytes: usize = idle.iter().map(Vec::capacity).sum();
            let mut surplus = Vec::new();
            while idle.len() > IDLE || bytes > home.limit {
                let oldest = idle.remove(0);
                bytes -= oldest.capacity();
                surplus.push(oldest);
            }
            drop(idle);
            drop(surplus);
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}
