//! Independent work spread over the machine's cores.

use std::ops::Range;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Threads that work at a time; to start more takes longer than they save.
static THREADS: LazyLock<usize> =
    LazyLock::new(|| thread::available_parallelism().map_or(1, usize::from).min(16));

/// What one thread is given of many small pieces of work, at least.
const RUN: usize = 1 << 12;

/// CPU time in nanoseconds, of this process or this thread.
pub(crate) fn cpu_ns(clock: ClockId) -> u64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(clock);
    tv_sec.unsigned_abs() * 1_000_000_000 + tv_nsec.unsigned_abs()
}

/// `f` of every position below `count`, in their order.
pub(crate) fn map<T: Send>(count: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    map_with(count, |(), position| f(position))
}

/// As [`map`], with something that each thread has to itself.
pub(crate) fn map_with<S: Default, T: Send>(
    count: usize,
    f: impl Fn(&mut S, usize) -> T + Sync,
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut own = S::default();
        let mut done = Vec::new();
        loop {
            let position = next.fetch_add(1, Ordering::Relaxed);
            if position >= count {
                return done;
            }
            done.push((position, f(&mut own, position)));
        }
    };
    let mut done = thread::scope(|scope| {
        // Without them it takes longer, and is no less right.
        let spawn = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..count.min(*THREADS)).filter_map(spawn).collect();
        let mut done = work();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(position, _)| *position);
    done.into_iter().map(|(_, made)| made).collect()
}

/// `f` of ranges that join up to `0..len`, in their order; one where there is little to do.
pub(crate) fn map_ranges<T: Send>(len: usize, f: impl Fn(Range<usize>) -> T + Sync) -> Vec<T> {
    let ranges = (len / RUN).clamp(1, 4 * *THREADS);
    map(ranges, |i| f(len * i / ranges..len * (i + 1) / ranges))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_and_ranges_join() {
        for count in [0, 1, 2, 1000] {
            assert_eq!(map(count, |i| i * i), (0..count).map(|i| i * i).collect::<Vec<_>>());
        }
        for len in [0, 1, RUN - 1, RUN * 2, RUN * 300 + 7] {
            let ranges = map_ranges(len, |range| range);
            assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (0, len));
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }

    #[test]
    fn what_a_thread_has_is_its_own() {
        let seen = map_with(1000, |own: &mut Vec<usize>, i| {
            own.push(i);
            (thread::current().id(), own.len())
        });
        // Each thread counts from one on.
        let mut counts = std::collections::HashMap::new();
        for (id, len) in seen {
            *counts.entry(id).or_insert(0) += 1;
            assert_eq!(counts[&id], len);
        }
    }

    #[test]
    #[should_panic(expected = "at 57")]
    fn a_panic_reaches_the_caller() {
        map(100, |i| assert!(i != 57, "at {i}"));
    }
}
