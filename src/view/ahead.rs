//! Encodes ahead of sequential readers, on threads of its own.
//!
//! The kernel keeps one or two requests in flight for a reader at its default readahead, too few to
//! keep every core encoding. Whoever reads a shard in order therefore finds the next chunks made.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::tree::NodeId;

/// How far a read may lie from where its stream was expected: several readahead requests arrive
/// out of order.
const SLACK: u64 = 2 << 20;

/// Streams followed at a time; more readers than that are served without.
const STREAMS: usize = 64;

/// Reads in a row before a stream is believed to be one.
const CONVINCING: u32 = 2;

/// Readers that were seen to go forward, by least recent use.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Mutex<VecDeque<Stream>>,
    readahead: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    file: NodeId,
    /// Where its first read began.
    start: u64,
    /// The furthest end of its reads.
    next: u64,
    /// The end of what has been asked for ahead of it.
    ahead: u64,
    reads: u32,
}

impl Streams {
    /// Notes how many bytes whoever asks reads at once when it wants but a few: so many in a row are
    /// no stream.
    pub(super) fn expect_readahead(&self, bytes: u64) {
        self.readahead.store(bytes, Ordering::Relaxed);
    }

    /// What was noted so; 0 before.
    pub(super) fn readahead(&self) -> u64 {
        self.readahead.load(Ordering::Relaxed)
    }

    /// Notes a read of `range` and returns the range beyond it to prepare now, if any: up to
    /// `window` bytes ahead of the reader, in steps of half of that.
    pub(super) fn follow(
        &self,
        file: NodeId,
        range: std::ops::Range<u64>,
        window: u64,
    ) -> Option<std::ops::Range<u64>> {
        let mut streams = self.streams.lock();
        let near =
            |stream: &Stream| stream.file == file && range.start.abs_diff(stream.next) <= SLACK;
        let found = streams.iter().position(near).and_then(|i| streams.remove(i));
        let new = Stream { file, start: range.start, next: 0, ahead: 0, reads: 0 };
        let mut stream = found.unwrap_or(new);
        stream.next = stream.next.max(range.end);
        stream.reads = stream.reads.saturating_add(1);
        let from = stream.ahead.max(stream.next);
        let to = stream.next + window;
        let is_convincing = stream.reads > CONVINCING
            && stream.next - stream.start.min(stream.next) > self.readahead.load(Ordering::Relaxed);
        let due = is_convincing && to >= from + window / 2;
        if due {
            stream.ahead = to;
        }
        streams.push_back(stream);
        if streams.len() > STREAMS {
            streams.pop_front();
        }
        due.then_some(from..to)
    }
}

/// Threads that work through a short queue, newest work dropped when it is full.
#[derive(Debug)]
pub(super) struct Workers<J: Send + 'static> {
    queue: Arc<Queue<J>>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Queue<J> {
    jobs: Mutex<Jobs<J>>,
    more: Condvar,
}

#[derive(Debug)]
struct Jobs<J> {
    waiting: VecDeque<J>,
    closed: bool,
}

/// Jobs that wait at most.
const WAITING: usize = 256;

impl<J: Send + 'static> Workers<J> {
    /// Starts `threads` threads that call `work` for each job.
    pub(super) fn start(threads: usize, work: impl Fn(J) + Clone + Send + 'static) -> Self {
        let jobs = Mutex::new(Jobs { waiting: VecDeque::new(), closed: false });
        let queue = Arc::new(Queue { jobs, more: Condvar::new() });
        let threads = (0..threads)
            .filter_map(|_| {
                let (queue, work) = (queue.clone(), work.clone());
                // Without its threads a view is slower, and no less right.
                std::thread::Builder::new()
                    .name("aq-fs ahead".to_owned())
                    .spawn(move || {
                        while let Some(job) = queue.take() {
                            work(job);
                        }
                    })
                    .ok()
            })
            .collect();
        Self { queue, threads }
    }

    /// Hands over jobs, as many as there is room for.
    pub(super) fn offer(&self, jobs: impl IntoIterator<Item = J>) {
        let mut jobs = jobs.into_iter().peekable();
        if jobs.peek().is_none() {
            return;
        }
        let mut queue = self.queue.jobs.lock();
        let room = WAITING.saturating_sub(queue.waiting.len());
        queue.waiting.extend(jobs.take(room));
        drop(queue);
        self.queue.more.notify_all();
    }
}

impl<J: Send + 'static> Drop for Workers<J> {
    fn drop(&mut self) {
        let mut jobs = self.queue.jobs.lock();
        jobs.closed = true;
        jobs.waiting.clear();
        drop(jobs);
        self.queue.more.notify_all();
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl<J> Queue<J> {
    fn take(&self) -> Option<J> {
        let mut jobs = self.jobs.lock();
        loop {
            if jobs.closed {
                return None;
            }
            if let Some(job) = jobs.waiting.pop_front() {
                return Some(job);
            }
            self.more.wait(&mut jobs);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    const WINDOW: u64 = 4 << 20;
    const STEP: u64 = 128 << 10;

    #[test]
    fn a_stream_is_kept_ahead_of_without_gaps_or_repeats() {
        let streams = Streams::default();
        let mut ahead = 0;
        for read in 0..200 {
            // Neighbours arrive in the wrong order.
            let at = (read ^ 1) * STEP;
            if let Some(range) = streams.follow(1, at..at + STEP, WINDOW) {
                assert!(ahead == 0 || range.start == ahead, "{range:?} after {ahead}");
                assert!(range.end <= at + STEP * 2 + WINDOW);
                ahead = range.end;
            }
        }
        assert!(ahead >= 199 * STEP + WINDOW / 2);
    }

    #[test]
    fn several_readers_of_one_file_are_streams_of_their_own() {
        let streams = Streams::default();
        let mut prepared = [0; 4];
        for read in 0..20 {
            for (reader, prepared) in prepared.iter_mut().enumerate() {
                let at = reader as u64 * (1 << 30) + read * STEP;
                *prepared += u32::from(streams.follow(1, at..at + STEP, WINDOW).is_some());
            }
        }
        assert!(prepared.iter().all(|&n| n >= 1), "{prepared:?}");
    }

    #[test]
    fn scattered_reads_prepare_nothing() {
        let streams = Streams::default();
        for read in 0..1000u64 {
            let at = read.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (1 << 40);
            assert_eq!(streams.follow(1, at..at + 4096, WINDOW), None);
        }
    }

    #[test]
    fn what_the_kernel_reads_around_a_page_is_no_stream() {
        let streams = Streams::default();
        streams.expect_readahead(16 * STEP);
        let follow = |read| streams.follow(1, read * STEP..(read + 1) * STEP, WINDOW);
        for fault in 0..100 {
            assert!((0..16).all(|read| follow(fault * 1000 + read).is_none()));
        }
        assert_eq!(
            follow(99 * 1000 + 16),
            Some((99 * 1000 + 17) * STEP..(99 * 1000 + 17) * STEP + WINDOW)
        );
    }

    #[test]
    fn workers_end_with_their_owner_and_surplus_jobs_are_dropped() {
        let done = Arc::new(AtomicU32::new(0));
        let counter = done.clone();
        let workers = Workers::start(2, move |job: u32| {
            counter.fetch_add(job, Ordering::SeqCst);
        });
        workers.offer(std::iter::repeat_n(1, 10));
        while done.load(Ordering::SeqCst) < 10 {
            std::thread::yield_now();
        }
        workers.offer(std::iter::repeat_n(1, 10_000));
        drop(workers);
        assert!(done.load(Ordering::SeqCst) <= 10 + WAITING as u32);
    }
}
