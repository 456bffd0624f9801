//! Keeps a map over a truncated file from killing the process.
//!
//! To touch a page of a map beyond the end of its file, or one that the disk can't read, raises
//! SIGBUS in the thread that touches it. A handler, installed once and never removed, asks a
//! registry whether the address belongs to a watched map. If so it marks that map as faulted, for
//! good, and backs it with zeros from that page on; the reader goes on, and whoever asks
//! [`Watch::faulted`] afterwards throws away what it read. Any other SIGBUS goes to the handler
//! that was there before, so a bug elsewhere still ends the process.
//!
//! The handler takes no lock and allocates nothing. The registry is a list of blocks of slots that
//! only ever grows, and each slot is a seqlock. A slot that changes while the handler looks at it
//! can't be the one it looks for: whoever touches a map keeps its [`Watch`] alive.

use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

use parking_lot::Mutex;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// Slots in a block: as many as a view keeps files open.
const SLOTS: usize = 64;

/// Watches one map; remembers whether a page of it was ever replaced by zeros.
///
/// It must be dropped before the map is, and lives as long as anybody reads the map.
#[derive(Debug)]
pub(super) struct Watch {
    slot: &'static Slot,
}

/// One watched range of addresses.
///
/// `version` is odd while the rest changes.
#[derive(Debug)]
struct Slot {
    taken: AtomicBool,
    version: AtomicU64,
    start: AtomicUsize,
    end: AtomicUsize,
    faulted: AtomicBool,
}

/// A block of slots. Blocks are never freed.
#[derive(Debug)]
struct Block {
    slots: [Slot; SLOTS],
    next: AtomicPtr<Block>,
}

static FIRST: Block = Block::new();

/// Held while slots are taken and blocks appended; never by the handler.
static GROWING: Mutex<()> = Mutex::new(());

/// What the handler needs to know; set before it is installed.
static SETUP: OnceLock<Setup> = OnceLock::new();

struct Setup {
    previous: libc::sigaction,
    page_size: usize,
}

impl Watch {
    /// Watches `map`, the whole of a memory map of a file, until dropped.
    ///
    /// # Errors
    /// The operating system's, where it refuses the handler.
    pub(super) fn new(map: &[u8]) -> io::Result<Self> {
        let growing = GROWING.lock();
        install()?;
        let slot = free_slot();
        slot.taken.store(true, Ordering::Relaxed);
        drop(growing);
        let start = map.as_ptr().addr();
        slot.set(start, start + map.len());
        Ok(Self { slot })
    }

    /// Whether a page of the map could not be read, and zeros took its place.
    pub(super) fn faulted(&self) -> bool {
        self.slot.faulted.load(Ordering::SeqCst)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.slot.set(0, 0);
        self.slot.taken.store(false, Ordering::Release);
    }
}

impl Slot {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            version: AtomicU64::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            faulted: AtomicBool::new(false),
        }
    }

    /// Changes the range; only its owner does.
    fn set(&self, start: usize, end: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.faulted.store(false, Ordering::SeqCst);
        self.version.store(version + 2, Ordering::Release);
    }

    /// The end of the range, if `address` lies in it and it isn't just being changed.
    fn end_of_range_with(&self, address: usize) -> Option<usize> {
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let stable = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        (stable && start <= address && address < end).then_some(end)
    }
}

impl Block {
    const fn new() -> Self {
        Self { slots: [const { Slot::new() }; SLOTS], next: AtomicPtr::new(ptr::null_mut()) }
    }

    #[expect(unsafe_code, reason = "the handler can walk nothing but raw pointers")]
    fn next(&self) -> Option<&'static Block> {
        // SAFETY: it is null or came from `Box::leak`, so it points to a block that lives as long
        // as the process; it was published by a release store after the block was written.
        unsafe { self.next.load(Ordering::Acquire).as_ref() }
    }
}

fn blocks() -> impl Iterator<Item = &'static Block> {
    std::iter::successors(Some(&FIRST), |block| block.next())
}

/// A slot that nobody has taken; a new block where all are. Only one thread at a time asks.
fn free_slot() -> &'static Slot {
    let mut last = &FIRST;
    for block in blocks() {
        let free = block.slots.iter().find(|slot| !slot.taken.load(Ordering::Acquire));
        if let Some(slot) = free {
            return slot;
        }
        last = block;
    }
    let block: &'static mut Block = Box::leak(Box::new(Block::new()));
    let block = ptr::from_mut(block);
    last.next.store(block, Ordering::Release);
    &last.next().expect("it was just appended").slots[0]
}

/// Installs the handler, the first time. Only one thread at a time does.
#[expect(unsafe_code, reason = "std has no signal handlers")]
fn install() -> io::Result<()> {
    if SETUP.get().is_some() {
        return Ok(());
    }
    // SAFETY: all zeros is a value of `sigaction`: integers, a mask and an optional pointer.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null action only asks for the one in place, which is written to `previous`.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut previous) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let page_size = rustix::param::page_size();
    // From here on the handler knows whom to pass other faults to.
    let _ = SETUP.set(Setup { previous, page_size });
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = (on_sigbus as extern "C" fn(_, _, _)) as *const () as usize;
    // On the thread's alternate stack if it has one: the previous handler may be std's, which
    // catches stack overflows there. Deferred while it runs: a fault in the handler itself is a
    // bug, and ends the process at once.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: `action` is whole, with an empty mask, and its function has the signature that
    // SA_SIGINFO asks for and does only what a signal handler may do: see there.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Everything it does is async-signal-safe: atomic loads and stores, and raw system calls. Those of
/// `rustix` do not go through errno.
#[expect(unsafe_code, reason = "a signal handler is given raw pointers")]
extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid `siginfo_t`, which nobody else knows.
    let fault = unsafe { &*info };
    // A code above zero comes from the kernel, and a fault's carries its address. What another
    // process sends carries its process id in the same place.
    if fault.si_code > 0 {
        // SAFETY: for SIGBUS from the kernel `si_addr` is the member of the union that is set.
        let address = unsafe { fault.si_addr() }.addr();
        if absorb(address) {
            return;
        }
    }
    pass_on(signal, info, context);
}

/// Whether the address lies in a watched range, which is now marked and readable from there on.
fn absorb(address: usize) -> bool {
    let Some(Setup { page_size, .. }) = SETUP.get() else { return false };
    for block in blocks() {
        for slot in &block.slots {
            if let Some(end) = slot.end_of_range_with(address) {
                // Before there are zeros to be read by anybody.
                slot.faulted.store(true, Ordering::SeqCst);
                // To the end of the range, although one page would do: the mark is on all of it,
                // and one file that shrank by gigabytes costs one fault and one mapping.
                let page = address - address % page_size;
                return map_zeros(page, end.next_multiple_of(*page_size) - page);
            }
        }
    }
    false
}

/// Puts zeros in place of what was mapped at `page`.
#[expect(unsafe_code, reason = "replaces pages that can't be read")]
fn map_zeros(page: usize, len: usize) -> bool {
    let page = ptr::with_exposed_provenance_mut(page);
    let flags = MapFlags::FIXED | MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: the pages are those of a live read-only map, whose faulting reader keeps it from
    // being unmapped; unmapping it later takes the new pages with it. Bytes of the map may change
    // under its readers at any time anyway, since it is a file's, and those who read through it
    // check the mark before they make use of what they read.
    unsafe { mmap_anonymous(page, len, ProtFlags::READ, flags) }.is_ok()
}

/// Does what would have happened without this handler.
#[expect(unsafe_code, reason = "calls the handler that was there before")]
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let previous = SETUP.get().map(|setup| &setup.previous);
    match previous {
        Some(previous) if ![libc::SIG_DFL, libc::SIG_IGN].contains(&previous.sa_sigaction) => {
            let handler = previous.sa_sigaction as *const ();
            if previous.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: whoever installed it with SA_SIGINFO gave a function of this signature.
                let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    unsafe { std::mem::transmute(handler) };
                handler(signal, info, context);
            } else {
                // SAFETY: whoever installed it without SA_SIGINFO gave a function of this one.
                let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
                handler(signal);
            }
        }
        // The kernel lets nobody ignore a fault, so that is the same as the default here.
        _ => {
            // SAFETY: the default action is a valid one for any signal.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
            // A fault comes again when this returns, but a signal that was sent does not. Until
            // then it is blocked.
            // SAFETY: `raise` is async-signal-safe.
            unsafe { libc::raise(signal) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use memmap2::Mmap;

    use super::super::file::map;
    use super::*;

    fn temporary_map(bytes: usize) -> (File, Mmap) {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(bytes as u64).expect("resized");
        let map = map(&file, bytes).expect("mapped");
        (file, map)
    }

    fn sum(bytes: &[u8]) -> u64 {
        bytes.iter().map(|byte| u64::from(std::hint::black_box(*byte))).sum()
    }

    #[test]
    fn a_fault_marks_its_own_map_for_good_and_no_other() {
        let page = rustix::param::page_size();
        let (shrunk, shrunk_map) = temporary_map(8 * page + 1);
        let (_whole, whole_map) = temporary_map(8 * page);
        let watch = Watch::new(&shrunk_map).expect("watched");
        let other = Watch::new(&whole_map).expect("watched");
        assert_eq!(sum(&shrunk_map), 0);
        assert!(!watch.faulted());
        shrunk.set_len(3 * page as u64).expect("truncated");
        assert_eq!(sum(&shrunk_map[..3 * page]), 0);
        assert!(!watch.faulted(), "nothing beyond the end was touched");
        assert_eq!(sum(&shrunk_map[5 * page + 7..][..1]), 0);
        assert!(watch.faulted());
        assert_eq!(sum(&shrunk_map), 0, "before the first faulting page too");
        shrunk.set_len(9 * page as u64).expect("grown");
        assert!(watch.faulted(), "for good");
        assert_eq!(sum(&whole_map), 0);
        assert!(!other.faulted());
    }

    #[test]
    fn a_slot_that_is_used_again_starts_unmarked() {
        let page = rustix::param::page_size();
        for _ in 0..3 * SLOTS {
            let (file, map) = temporary_map(2 * page);
            let watch = Watch::new(&map).expect("watched");
            assert!(!watch.faulted());
            file.set_len(0).expect("truncated");
            assert_eq!(sum(&map), 0);
            assert!(watch.faulted());
        }
    }

    #[test]
    fn there_is_a_slot_for_every_map() {
        let page = rustix::param::page_size();
        let (file, one) = temporary_map(page);
        let maps: Vec<(Watch, Mmap)> = (0..5 * SLOTS)
            .map(|_| {
                let map = map(&file, page).expect("mapped");
                (Watch::new(&map).expect("watched"), map)
            })
            .collect();
        drop(one);
        file.set_len(0).expect("truncated");
        for (i, (watch, map)) in maps.iter().enumerate() {
            assert!(!watch.faulted());
            if i % 3 == 0 {
                assert_eq!(sum(map), 0);
            }
        }
        for (i, (watch, _)) in maps.iter().enumerate() {
            assert_eq!(watch.faulted(), i % 3 == 0, "map {i}");
        }
    }

    #[test]
    fn threads_may_fault_while_others_come_and_go() {
        let page = rustix::param::page_size();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        let (file, map) = temporary_map(4 * page);
                        let watch = Watch::new(&map).expect("watched");
                        std::thread::scope(|readers| {
                            file.set_len(page as u64).expect("truncated");
                            for first in 1..4 {
                                let (map, watch) = (&map, &watch);
                                readers.spawn(move || {
                                    assert_eq!(sum(&map[first * page..]), 0);
                                    assert!(watch.faulted());
                                });
                            }
                        });
                    }
                });
            }
        });
    }

    /// Runs `test` of this binary in a process of its own, told by the variable that it is there,
    /// and returns the signal that ended it.
    #[track_caller]
    fn signal_that_ends(test: &str) -> Option<i32> {
        let output = Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", &format!("source::guard::tests::{test}"), "--nocapture"])
            .env(IN_CHILD, "1")
            .output()
            .expect("run");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("about to end"),
            "the child did not get to its end: {output:?}"
        );
        output.status.signal()
    }

    const IN_CHILD: &str = "AQ_FS_TEST_CHILD";

    #[test]
    fn a_fault_in_a_map_that_is_not_watched_still_kills() {
        if std::env::var_os(IN_CHILD).is_none() {
            let name = "a_fault_in_a_map_that_is_not_watched_still_kills";
            return assert_eq!(signal_that_ends(name), Some(libc::SIGBUS));
        }
        let page = rustix::param::page_size();
        let (_whole, watched) = temporary_map(page);
        let _watch = Watch::new(&watched).expect("watched");
        let (file, unwatched) = temporary_map(page);
        drop(Watch::new(&unwatched).expect("watched"));
        file.set_len(0).expect("truncated");
        eprintln!("about to end");
        sum(&unwatched);
        eprintln!("still here");
    }

    #[test]
    #[expect(unsafe_code, reason = "raises a signal, and asks for the default action")]
    fn a_sigbus_that_was_sent_is_no_fault() {
        if std::env::var_os(IN_CHILD).is_none() {
            let name = "a_sigbus_that_was_sent_is_no_fault";
            return assert_eq!(signal_that_ends(name), Some(libc::SIGBUS));
        }
        // SAFETY: the default action is valid. Otherwise std's handler would be the previous one,
        // which leaves it at that once.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        let (_file, map) = temporary_map(1);
        let _watch = Watch::new(&map).expect("watched");
        eprintln!("about to end");
        // SAFETY: raising a signal has no preconditions.
        unsafe { libc::raise(libc::SIGBUS) };
        eprintln!("still here");
    }

    #[test]
    #[expect(unsafe_code, reason = "installs handlers")]
    fn the_previous_handler_hears_of_other_faults() {
        extern "C" fn leave(_: c_int) {
            // SAFETY: `_exit` is async-signal-safe.
            unsafe { libc::_exit(42) };
        }
        extern "C" fn leave_with_address(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
            // SAFETY: the kernel passes a valid one.
            let fault = unsafe { &*info };
            // SAFETY: a fault has an address.
            let address = unsafe { fault.si_addr() };
            // SAFETY: `_exit` is async-signal-safe.
            unsafe { libc::_exit(if address.is_null() { 1 } else { 43 }) };
        }
        let name = "the_previous_handler_hears_of_other_faults";
        let Some(kind) = std::env::var_os(IN_CHILD) else {
            for (kind, status) in [("plain", 42), ("siginfo", 43)] {
                let output = Command::new(std::env::current_exe().expect("this binary"))
                    .args(["--exact", &format!("source::guard::tests::{name}")])
                    .env(IN_CHILD, kind)
                    .output()
                    .expect("run");
                assert_eq!(output.status.code(), Some(status), "{kind}");
            }
            return;
        };
        // SAFETY: all zeros is a value of it.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        if kind == "plain" {
            action.sa_sigaction = (leave as extern "C" fn(_)) as *const () as usize;
        } else {
            action.sa_sigaction =
                (leave_with_address as extern "C" fn(_, _, _)) as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
        }
        // SAFETY: the action is whole, and its function does what a handler may.
        unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
        let (_whole, watched) = temporary_map(1);
        let _watch = Watch::new(&watched).expect("watched");
        let (file, unwatched) = temporary_map(1);
        file.set_len(0).expect("truncated");
        sum(&unwatched);
    }
}
