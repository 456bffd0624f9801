//! Every tensor in turn, decoded ahead of its reader by a few threads.

use std::collections::BTreeMap;
use std::iter::FusedIterator;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};

use super::Shared;
use crate::error::Result;
use crate::source::TensorId;

/// How far tensors are read ahead of whoever iterates over them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookAhead {
    /// Threads that read and decode; at least one.
    pub threads: usize,
    /// Bytes of decoded tensors that may wait or be in the making. A tensor that is larger is made
    /// when nothing else is.
    pub bytes: u64,
}

impl Default for LookAhead {
    /// A thread per processor, but no more than four, and 512 MiB.
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(4);
        Self { threads, bytes: 512 << 20 }
    }
}

/// Iterates over all tensors of a checkpoint, as f32, in the order of its catalog.
///
/// Dropping it stops the threads that read ahead, within the time that a few MiB take.
#[derive(Debug)]
pub struct AllTensors {
    queue: Arc<Queue>,
    workers: Vec<JoinHandle<()>>,
    next: TensorId,
}

#[derive(Debug)]
struct Queue {
    shared: Arc<Shared>,
    look_ahead: LookAhead,
    state: Mutex<State>,
    /// A tensor is ready.
    ready: Condvar,
    /// A tensor was taken, or nobody wants any more.
    taken: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The next tensor that a worker begins with.
    next: TensorId,
    /// Bytes decoded or being decoded, and not yet taken.
    bytes: u64,
    /// What is decoded, or what a worker panicked with.
    ready: BTreeMap<TensorId, thread::Result<Result<Vec<f32>>>>,
    stopped: bool,
}

impl AllTensors {
    pub(super) fn new(shared: Arc<Shared>, look_ahead: LookAhead) -> Self {
        let queue = Queue {
            shared,
            look_ahead,
            state: Mutex::default(),
            ready: Condvar::new(),
            taken: Condvar::new(),
        };
        Self { queue: Arc::new(queue), workers: Vec::new(), next: 0 }
    }
}

impl Iterator for AllTensors {
    type Item = (String, Result<Vec<f32>>);

    fn next(&mut self) -> Option<Self::Item> {
        let (left, _) = self.size_hint();
        if left == 0 {
            return None;
        }
        if self.workers.is_empty() {
            let threads = self.queue.look_ahead.threads.clamp(1, left);
            self.workers.extend((0..threads).map(|_| {
                let queue = self.queue.clone();
                thread::spawn(move || queue.work())
            }));
        }
        let id = self.next;
        self.next += 1;
        let name = self.queue.shared.checkpoint.catalog()[id].name.clone();
        match self.queue.take(id) {
            Ok(outcome) => Some((name, outcome)),
            Err(panic) => resume_unwind(panic),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.queue.shared.checkpoint.catalog().tensors().len() - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for AllTensors {}

impl FusedIterator for AllTensors {}

impl Drop for AllTensors {
    fn drop(&mut self) {
        self.queue.state.lock().stopped = true;
        self.queue.taken.notify_all();
        for worker in self.workers.drain(..) {
            // It catches its own panics.
            let _ = worker.join();
        }
    }
}

impl Queue {
    /// Waits for a tensor, the first that wasn't taken yet.
    fn take(&self, id: TensorId) -> thread::Result<Result<Vec<f32>>> {
        let mut state = self.state.lock();
        let outcome = loop {
            match state.ready.remove(&id) {
                Some(outcome) => break outcome,
                None => self.ready.wait(&mut state),
            }
        };
        state.bytes -= self.cost(id);
        self.taken.notify_all();
        outcome
    }

    /// Decodes one tensor after the other until there is none left or nobody wants them.
    fn work(&self) {
        while let Some(id) = self.begin() {
            let go_on = || !self.state.lock().stopped;
            let outcome = catch_unwind(AssertUnwindSafe(|| self.shared.read_f32(id, &go_on)));
            self.state.lock().ready.insert(id, outcome);
            self.ready.notify_one();
        }
    }

    /// The next tensor to be decoded, once there is room for it. Tensors are begun in the order in
    /// which they are taken, so while the one that the reader waits for isn't begun nothing else is
    /// there, and there is room.
    fn begin(&self) -> Option<TensorId> {
        let count = self.shared.checkpoint.catalog().tensors().len();
        let mut state = self.state.lock();
        loop {
            if state.stopped || state.next == count {
                return None;
            }
            let cost = self.cost(state.next);
            if state.bytes == 0 || state.bytes.saturating_add(cost) <= self.look_ahead.bytes {
                state.bytes += cost;
                state.next += 1;
                return Some(state.next - 1);
            }
            self.taken.wait(&mut state);
        }
    }

    /// Bytes that a tensor takes as f32.
    fn cost(&self, id: TensorId) -> u64 {
        self.shared.checkpoint.catalog()[id].elements().saturating_mul(4)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::{Duration, Instant};

    use super::super::ShardedSafeTensorsAdapter;
    use super::*;
    use crate::dtype::Dtype;

    const COUNT: usize = 40;

    /// Tensors of 4000 bytes, each filled with its number.
    fn checkpoint(dir: &Path) -> ShardedSafeTensorsAdapter {
        let data: Vec<[u8; 1000]> = (0..COUNT).map(|i| [i as u8; 1000]).collect();
        let tensors = data.iter().enumerate().map(|(i, data)| {
            let view = safetensors::tensor::TensorView::new(Dtype::U8, vec![1000], data);
            (format!("t{i:03}"), view.expect("it fits"))
        });
        let path = dir.join("model.safetensors");
        safetensors::serialize_to_file(tensors, None, &path).expect("written");
        ShardedSafeTensorsAdapter::load(path).expect("valid")
    }

    #[test]
    fn all_come_in_order_whatever_the_bounds() {
        let dir = tempfile::tempdir().expect("a directory");
        let checkpoint = checkpoint(dir.path());
        for threads in [0, 1, 3, 100] {
            for bytes in [0, 3999, 4000, 12_001, u64::MAX] {
                let all = checkpoint.get_all_tensors_f32_with(LookAhead { threads, bytes });
                assert_eq!(all.len(), COUNT);
                let mut count = 0;
                for (i, (name, values)) in all.enumerate() {
                    assert_eq!(name, format!("t{i:03}"));
                    assert_eq!(values.expect("read"), vec![i as f32; 1000]);
                    count += 1;
                }
                assert_eq!(count, COUNT);
            }
        }
    }

    #[test]
    fn no_more_is_read_ahead_than_the_bounds_allow() {
        let dir = tempfile::tempdir().expect("a directory");
        let checkpoint = checkpoint(dir.path());
        for (bytes, ahead) in [(0, 1), (4000, 1), (12_001, 3)] {
            let mut all = checkpoint.get_all_tensors_f32_with(LookAhead { threads: 4, bytes });
            assert_eq!(all.queue.state.lock().next, 0, "nothing is read before it is asked for");
            for taken in 1..=5 {
                all.next().expect("there are more").1.expect("read");
                let settled = Instant::now() + Duration::from_millis(20);
                while Instant::now() < settled {
                    let state = all.queue.state.lock();
                    assert!(state.next <= taken + ahead, "{} with {bytes}", state.next);
                    assert!(state.bytes <= bytes.max(4000));
                    drop(state);
                    thread::yield_now();
                }
                assert_eq!(all.queue.state.lock().ready.len(), ahead);
            }
        }
    }

    #[test]
    fn the_workers_end_with_the_iterator() {
        let dir = tempfile::tempdir().expect("a directory");
        let checkpoint = checkpoint(dir.path());
        let mut all = checkpoint.get_all_tensors_f32_with(LookAhead { threads: 4, bytes: 8000 });
        all.next().expect("there are some").1.expect("read");
        let queue = Arc::downgrade(&all.queue);
        drop(all);
        assert!(queue.upgrade().is_none(), "a worker still holds it");
    }

    #[test]
    fn a_panic_while_decoding_reaches_the_reader() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut all = checkpoint(dir.path()).get_all_tensors_f32();
        all.queue.state.lock().ready.insert(0, Err(Box::new("ouch")));
        all.queue.state.lock().next = 1;
        all.queue.state.lock().bytes = 4000;
        let panic = catch_unwind(AssertUnwindSafe(|| all.next())).expect_err("panicked");
        assert_eq!(panic.downcast_ref(), Some(&"ouch"));
        assert_eq!(all.next().expect("the next one").0, "t001");
    }
}
