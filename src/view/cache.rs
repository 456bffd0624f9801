//! Encoded chunks within a budget, each encoded by one thread at a time.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::{Condvar, Mutex};

use super::buffers::Buffer;
use crate::error::Result;

/// A chunk of a weight: the weight's position among all of the view's, and the chunk's in it.
pub(super) type ChunkKey = (u32, u32);

/// The parts of an encoded chunk, in the scheme's order.
pub(super) type Parts = Arc<[Arc<Buffer>]>;

/// Bytes of codes that are kept though their readers are past them.
const SPENT: u64 = 4 << 20;

/// Chunks that are remembered once they are no longer kept for that.
const GONE: NonZeroUsize = NonZeroUsize::new(2048).expect("2048 is not zero");

/// Encoded chunks by weight and chunk, under a budget of bytes.
///
/// The first part of a chunk, its codes, and the rest are evicted apart, each by least recent use.
/// A sequential reader meets all codes of a weight before the first of its scales, and a chunk must
/// not be encoded twice for that: scales outlive the codes that they were made with. Parts of which as
/// many bytes were read as there are, are spent ([`spend`](Self::spend)): another cache has them now,
/// and their memory, which the processor's caches still hold, is used for the next chunks. So are codes
/// that whoever made them has delivered himself, which are never kept. Those that have gone so are not
/// prepared again: of several readers of one file, each with others' reads before it, the last would have
/// everything encoded anew.
#[derive(Debug)]
pub(super) struct Cache {
    state: Mutex<State>,
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Debug)]
struct State {
    /// Codes, and all other parts.
    kept: [Kept; 2],
    /// Codes that were read whole, the first of them first, and their bytes.
    spent: VecDeque<(ChunkKey, u64)>,
    spent_bytes: u64,
    /// Chunks whose codes were spent and are no longer kept.
    gone: LruCache<ChunkKey, ()>,
    making: HashMap<ChunkKey, Arc<Flight>>,
}

#[derive(Debug)]
struct Kept {
    parts: LruCache<(ChunkKey, usize), Arc<Buffer>>,
    bytes: u64,
    budget: u64,
    /// Bytes that others have taken of it.
    others: Arc<AtomicU64>,
}

/// A chunk that some thread is encoding.
#[derive(Debug, Default)]
struct Flight {
    outcome: Mutex<Option<Landing>>,
    landed: Condvar,
}

#[derive(Clone, Debug)]
enum Landing {
    Parts(Parts),
    /// Its maker failed; whoever waited tries for itself, and gets an error of its own.
    Failed,
}

impl Cache {
    /// Keeps at most `budget` bytes: an eighth for scales and other small parts, the rest for codes,
    /// less what `others` say that they have taken, up to half of it.
    pub(super) fn new(budget: u64, others: Arc<AtomicU64>) -> Self {
        let kept = |budget, others| Kept { parts: LruCache::unbounded(), bytes: 0, budget, others };
        let small = budget / 8;
        Self {
            state: Mutex::new(State {
                kept: [kept(budget - small, others), kept(small, Arc::default())],
                spent: VecDeque::new(),
                spent_bytes: 0,
                gone: LruCache::new(GONE),
                making: HashMap::new(),
            }),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// One part of a chunk, made by `make` where it isn't kept. Of several callers one makes it,
    /// outside of any lock, and the others wait for that chunk alone.
    ///
    /// # Errors
    /// What `make` returns.
    pub(super) fn get(
        &self,
        key: ChunkKey,
        part: usize,
        make: impl Fn() -> Result<Vec<Buffer>>,
    ) -> Result<Arc<Buffer>> {
        loop {
            let flight = {
                let mut state = self.state.lock();
                if let Some(buffer) = state.kept[class(part)].parts.get(&(key, part)) {
                    self.hits.fetch_add(1, Ordering::Relaxed);
                    return Ok(buffer.clone());
                }
                match state.making.get(&key) {
                    Some(flight) => Some(flight.clone()),
                    None => {
                        state.take_on(key);
                        None
                    }
                }
            };
            match flight {
                None => {
                    let claim = Claim::new(self, vec![key]);
                    return Ok(claim.land(vec![make()?])[0][part].clone());
                }
                Some(flight) => {
                    let mut outcome = flight.outcome.lock();
                    flight.landed.wait_while(&mut outcome, |outcome| outcome.is_none());
                    if let Some(Landing::Parts(parts)) = &*outcome
                        && !parts[part].is_empty()
                    {
                        self.hits.fetch_add(1, Ordering::Relaxed);
                        return Ok(parts[part].clone());
                    }
                }
            }
        }
    }

    /// Takes on as many of the chunks `keys`, from the first on, as have codes that are neither kept nor
    /// being made.
    pub(super) fn claim(&self, keys: &[ChunkKey]) -> Option<Claim<'_>> {
        let mut state = self.state.lock();
        let count = keys.iter().take_while(|key| state.is_free(**key)).count();
        keys[..count].iter().for_each(|key| state.take_on(*key));
        drop(state);
        (count > 0).then(|| Claim::new(self, keys[..count].to_vec()))
    }

    /// Takes on the first of the chunks `keys` that are [due](Self::is_due), as many as there are in a
    /// row, and tells how many stand before them.
    pub(super) fn claim_due(&self, keys: &[ChunkKey]) -> Option<(usize, Claim<'_>)> {
        let mut state = self.state.lock();
        let first = keys.iter().position(|key| state.is_due(*key))?;
        let count = keys[first..].iter().take_while(|key| state.is_due(**key)).count();
        let keys = &keys[first..first + count];
        keys.iter().for_each(|key| state.take_on(*key));
        drop(state);
        Some((first, Claim::new(self, keys.to_vec())))
    }

    /// Whether the codes of a chunk are neither kept, being made nor gone.
    pub(super) fn is_due(&self, key: ChunkKey) -> bool {
        self.state.lock().is_due(key)
    }

    /// Notes that so many bytes of one part of a chunk were read, and won't be soon again.
    pub(super) fn spend(&self, key: ChunkKey, part: usize, bytes: usize) {
        let mut evicted = Vec::new();
        let mut state = self.state.lock();
        let State { kept, spent, spent_bytes, gone, .. } = &mut *state;
        let kept = &mut kept[class(part)];
        let Some(buffer) = kept.parts.peek(&(key, part)) else { return };
        if !buffer.spend(bytes) {
            return;
        }
        if part > 0 {
            evicted.extend(kept.pop(key, part));
            return;
        }
        spent.push_back((key, buffer.len() as u64));
        *spent_bytes += buffer.len() as u64;
        while *spent_bytes > SPENT {
            let (oldest, len) = spent.pop_front().expect("bytes are those of the codes spent");
            *spent_bytes -= len;
            gone.push(oldest, ());
            evicted.extend(kept.pop(oldest, 0));
        }
        drop(state);
        drop(evicted);
    }

    /// Bytes kept, and parts found and not found since the start.
    pub(super) fn usage(&self) -> (u64, u64, u64) {
        let bytes = self.state.lock().kept.iter().map(|kept| kept.bytes).sum();
        (bytes, self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed))
    }
}

/// Chunks that a thread has taken on to make, in the order of their keys. Whoever waits for one of them
/// goes on once this is dropped, by panic too.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    cache: &'a Cache,
    keys: Vec<ChunkKey>,
    made: Vec<Parts>,
}

impl<'a> Claim<'a> {
    /// Of chunks that stand in `making`.
    fn new(cache: &'a Cache, keys: Vec<ChunkKey>) -> Self {
        cache.misses.fetch_add(keys.len() as u64, Ordering::Relaxed);
        Self { cache, keys, made: Vec::new() }
    }

    /// How many chunks they are.
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Hands over the parts of each chunk. Codes that are empty were delivered.
    pub(super) fn land(mut self, made: Vec<Vec<Buffer>>) -> Vec<Parts> {
        let made = made.into_iter().map(|parts| parts.into_iter().map(Arc::new).collect());
        self.made = made.collect();
        self.made.clone()
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let Self { cache, keys, made } = self;
        let mut evicted = Vec::new();
        let mut flights = Vec::with_capacity(keys.len());
        let mut state = cache.state.lock();
        for (i, key) in keys.iter().enumerate() {
            for (part, buffer) in made.get(i).into_iter().flat_map(|parts| parts.iter().enumerate())
            {
                if !buffer.is_empty() {
                    state.kept[class(part)].push((*key, part), buffer.clone(), &mut evicted);
                } else if part == 0 {
                    state.gone.push(*key, ());
                }
            }
            flights.push(state.making.remove(key));
        }
        drop(state);
        drop(evicted);
        let mut made = std::mem::take(made).into_iter();
        for flight in flights {
            let landing = made.next().map_or(Landing::Failed, Landing::Parts);
            if let Some(flight) = flight {
                *flight.outcome.lock() = Some(landing);
                flight.landed.notify_all();
            }
        }
    }
}

impl State {
    fn is_free(&self, key: ChunkKey) -> bool {
        !self.kept[0].parts.contains(&(key, 0)) && !self.making.contains_key(&key)
    }

    fn is_due(&self, key: ChunkKey) -> bool {
        self.is_free(key) && !self.gone.contains(&key)
    }

    /// Has others wait for a chunk.
    fn take_on(&mut self, key: ChunkKey) {
        if self.gone.contains(&key) {
            // The cache that had them has not.
            self.gone.clear();
        }
        self.making.insert(key, Arc::default());
    }
}

impl Kept {
    fn pop(&mut self, key: ChunkKey, part: usize) -> Option<Arc<Buffer>> {
        let buffer = self.parts.pop(&(key, part))?;
        self.bytes -= buffer.len() as u64;
        Some(buffer)
    }

    fn push(
        &mut self,
        key: (ChunkKey, usize),
        buffer: Arc<Buffer>,
        evicted: &mut Vec<Arc<Buffer>>,
    ) {
        self.bytes += buffer.len() as u64;
        if let Some((_, old)) = self.parts.push(key, buffer) {
            self.bytes -= old.len() as u64;
            evicted.push(old);
        }
        let taken = self.others.load(Ordering::Relaxed);
        let budget = self.budget - taken.min(self.budget / 2);
        while self.bytes > budget {
            let (_, old) = self.parts.pop_lru().expect("bytes are those of the parts kept");
            self.bytes -= old.len() as u64;
            evicted.push(old);
        }
    }
}

fn class(part: usize) -> usize {
    part.min(1)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::error;

    fn parts(value: u8) -> Vec<Buffer> {
        vec![Buffer::from(vec![value; 70]), Buffer::from(vec![value; 10])]
    }

    #[test]
    fn many_threads_make_a_chunk_once_and_all_get_it() {
        let cache = Cache::new(0, Arc::default());
        let made = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let got = cache.get((1, 2), 1, || {
                        made.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(200));
                        Ok(parts(3))
                    });
                    assert_eq!(&got.expect("made")[..], &[3; 10]);
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
        assert_eq!(cache.usage(), (0, 7, 1));
    }

    #[test]
    fn a_failure_or_panic_reaches_its_maker_and_frees_the_others() {
        let cache = Cache::new(1000, Arc::default());
        let turn = AtomicUsize::new(0);
        thread::scope(|scope| {
            let callers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        cache.get((0, 0), 0, || {
                            let turn = turn.fetch_add(1, Ordering::Relaxed);
                            thread::sleep(Duration::from_millis(100));
                            match turn {
                                0 => panic!("first"),
                                1 => Err(error::stale("second")),
                                _ => Ok(parts(9)),
                            }
                        })
                    })
                })
                .collect();
            let outcomes: Vec<_> = callers.into_iter().map(|caller| caller.join()).collect();
            let ok = outcomes.iter().filter(|o| matches!(o, Ok(Ok(_)))).count();
            let failed = outcomes.iter().filter(|o| matches!(o, Ok(Err(_)))).count();
            assert_eq!((ok, failed), (1, 1), "and one panicked");
        });
    }

    #[test]
    fn codes_are_evicted_before_scales_and_the_budget_holds() {
        let cache = Cache::new(240, Arc::default());
        for chunk in 0..3 {
            cache.get((0, chunk), 0, || Ok(parts(chunk as u8))).expect("made");
        }
        let (bytes, ..) = cache.usage();
        // Two of 70 bytes of codes in 210, three of 10 bytes of scales in 30.
        assert!(bytes <= 240);
        for chunk in 0..3 {
            let make = || Err(error::stale("encoded again"));
            assert_eq!(cache.get((0, chunk), 1, make).expect("kept")[0], chunk as u8);
        }
        cache.get((0, 3), 0, || Ok(parts(3))).expect("made");
        assert!(cache.get((0, 0), 0, || Err(error::stale("gone"))).is_err());
    }

    #[test]
    fn what_others_take_is_not_kept_but_half_is() {
        let others = Arc::new(AtomicU64::new(0));
        let cache = Cache::new(800, others.clone());
        let fill = || {
            for chunk in 0..10 {
                cache.get((0, chunk), 0, || Ok(parts(0))).expect("made");
            }
            cache.usage().0
        };
        // Ten of 70 bytes of codes in 700, ten of 10 bytes of scales in 100.
        assert_eq!(fill(), 800);
        for (taken, left) in [(200, 490), (1000, 350)] {
            others.store(taken, Ordering::Relaxed);
            cache.get((1, taken as u32), 0, || Ok(parts(0))).expect("made");
            assert_eq!(cache.usage().0 - 100, left);
        }
    }

    #[test]
    fn of_codes_that_were_spent_the_first_go_first() {
        let cache = Cache::new(1 << 30, Arc::default());
        let codes = |chunk| vec![Buffer::from(vec![chunk as u8; 7 << 18]), Buffer::from(vec![1])];
        for chunk in 0..4 {
            cache.get((0, chunk), 0, || Ok(codes(chunk))).expect("made");
        }
        for chunk in [2, 0, 1] {
            cache.spend((0, chunk), 0, 3 << 18);
        }
        assert_eq!(cache.usage().0, 4 + 4 * (7 << 18), "none was read whole");
        for chunk in [2, 0, 1] {
            cache.spend((0, chunk), 0, 4 << 18);
        }
        cache.spend((9, 9), 0, 1);
        assert_eq!(cache.usage().0, 4 + 3 * (7 << 18), "4 MiB hold two that are spent");
        for (chunk, kept) in [(0, true), (1, true), (2, false), (3, true)] {
            let gone = || Err(error::stale("gone"));
            assert_eq!(cache.get((0, chunk), 0, gone).is_ok(), kept, "{chunk}");
            assert!(cache.get((0, chunk), 1, gone).is_ok(), "scales are not spent with codes");
        }
        // The failed `get` has shown that the second was needed after all.
        cache.get((0, 2), 0, || Ok(codes(2))).expect("made");
        cache.spend((0, 2), 0, 7 << 18);
        cache.spend((0, 3), 0, 7 << 18);
        assert!(!cache.is_due((0, 0)), "it is gone");
        assert!(!cache.is_due((0, 2)), "it is kept");
        cache.spend((0, 2), 1, 1);
        assert!(cache.get((0, 2), 1, || Err(error::stale("gone"))).is_err(), "scales go at once");
    }

    #[test]
    fn chunks_are_taken_on_in_a_row_and_codes_that_were_delivered_are_not_kept() {
        let cache = Cache::new(1000, Arc::default());
        let keys: Vec<ChunkKey> = (0..6).map(|chunk| (0, chunk)).collect();
        cache.get(keys[0], 0, || Ok(parts(0))).expect("made");
        cache.get(keys[4], 0, || Ok(parts(4))).expect("made");
        assert!(cache.claim(&keys).is_none(), "the first is kept");

        let (before, claim) = cache.claim_due(&keys).expect("some are due");
        assert_eq!((before, claim.len()), (1, 3));
        assert!(cache.claim(&keys[3..]).is_none(), "it is being made");
        claim.land((1..4).map(parts).collect());
        assert_eq!(cache.get(keys[3], 0, || panic!("made twice")).expect("kept")[0], 3);

        let claim = cache.claim(&keys[5..]).expect("it is free");
        claim.land(vec![vec![Buffer::from(Vec::new()), Buffer::from(vec![5; 10])]]);
        assert_eq!(cache.get(keys[5], 1, || panic!("made twice")).expect("kept")[0], 5);
        assert!(cache.claim_due(&keys).is_none(), "all others are kept, this one was delivered");
        assert_eq!(cache.get(keys[5], 0, || Ok(parts(7))).expect("made")[0], 7);
    }

    #[test]
    fn whoever_waits_for_codes_that_go_to_another_makes_its_own() {
        let cache = Cache::new(1000, Arc::default());
        let claim = cache.claim(&[(0, 0)]).expect("it is free");
        thread::scope(|scope| {
            let codes = scope.spawn(|| cache.get((0, 0), 0, || Ok(parts(1))).expect("made")[0]);
            thread::sleep(Duration::from_millis(100));
            claim.land(vec![vec![Buffer::from(Vec::new()), Buffer::from(vec![2; 10])]]);
            assert_eq!(codes.join().expect("it got them"), 1);
        });
    }
}
