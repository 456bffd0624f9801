//! Source files: their identity, plain reads, and memory maps under an LRU.

use std::collections::VecDeque;
use std::fmt::Display;
use std::fs::File;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::SystemTime;

use lru::LruCache;
use memmap2::{Mmap, MmapOptions};
use parking_lot::Mutex;

use super::guard::Watch;
use crate::error::{self, Error, ErrorKind, Result};

/// One file as it was when it was first opened.
#[derive(Debug)]
pub struct SourceFile {
    id: u64,
    name: String,
    path: PathBuf,
    identity: Identity,
    modified: SystemTime,
}

/// What tells one file, in one state, from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// Opens a regular file, which errors call `name`.
///
/// # Errors
/// `NotFound` or `Io` where it can't be opened, `Corrupt` where it is something else.
pub(super) fn open_regular(path: &Path, name: impl Display) -> Result<File> {
    // Before opening it: to open a FIFO would wait for its writer, and a device may have no end.
    match path.metadata() {
        Ok(found) if !found.is_file() => Err(error::corrupt(format!("{name}: not a regular file"))),
        Ok(_) => File::open(path).map_err(|cause| Error::io(name, cause)),
        Err(cause) => Err(Error::io(name, cause)),
    }
}

impl SourceFile {
    /// Opens `dir/name`, symbolic links resolved, and notes what it is now.
    ///
    /// # Errors
    /// `NotFound` or `Io` where it can't be opened, `Corrupt` where it isn't a regular file.
    pub fn open(dir: &Path, name: impl AsRef<Path>) -> Result<(Self, File)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name_path = name.as_ref();
        let name = name_path.to_string_lossy().into_owned();
        let at = |cause| Error::io(&name, cause);
        let path = dir.join(name_path).canonicalize().map_err(at)?;
        let file = open_regular(&path, &name)?;
        let metadata = file.metadata().map_err(at)?;
        let source = Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            path,
            identity: Identity::of(&metadata),
            modified: metadata.modified().map_err(at)?,
            name,
        };
        Ok((source, file))
    }

    /// The file's name, relative to the directory it was opened in.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The canonical path of the file, symbolic links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length in bytes.
    pub fn len(&self) -> u64 {
        self.identity.len
    }

    /// Whether the file has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// When the file was last modified.
    pub fn modified(&self) -> SystemTime {
        self.modified
    }

    fn stale(&self, how: &str) -> Error {
        error::stale(format!("{}: the file was {how} after it was opened", self.name))
    }
}

/// Open source files, the least recently used closed beyond a capacity; shared by every reader.
///
/// No lock is held while a source file is touched.
#[derive(Debug)]
pub struct SourceFiles {
    open: Mutex<LruCache<u64, Arc<OpenFile>>>,
    /// Ranges that were read and whose pages are not given back yet, the first of them first.
    lingering: Mutex<VecDeque<(Weak<OpenFile>, Range<usize>)>>,
    scratch: Scratch,
}

/// Buffers to decode into.
#[derive(Debug, Default)]
struct Scratch {
    idle: Mutex<Vec<Vec<u8>>>,
    /// Bytes of all buffers, idle or lent.
    bytes: Arc<AtomicU64>,
}

/// A buffer that returns to where it came from.
#[derive(Debug)]
struct Lent<'a> {
    buffer: Vec<u8>,
    home: &'a Scratch,
}

/// A range of a file: where it starts, and its length in bytes.
pub(super) type Part<'a> = (&'a Arc<SourceFile>, u64, u64);

/// Buffers that are kept for the next window.
const SCRATCH: usize = 4;

/// Bytes of a range that is long: more than any band of a few rows.
const LONG: usize = 4 << 20;

/// Bytes whose pages linger. What is given back has left every page of its neighbours that the kernel
/// maps as one, and one call for many pages interrupts the other cores once.
const LINGERING: usize = 32 << 20;

/// Bytes that are given back together.
const TOGETHER: usize = 8 << 20;

/// Ranges that linger at most.
const RANGES: usize = 16;

#[derive(Debug)]
struct OpenFile {
    source: Arc<SourceFile>,
    file: File,
    map: OnceLock<Mapped>,
}

#[derive(Debug)]
struct Mapped {
    // Before the map: the watch must end before its addresses are given back.
    watch: Watch,
    map: Mmap,
}

impl SourceFiles {
    /// At most `capacity` files are kept open and mapped.
    pub fn new(capacity: NonZeroUsize) -> Self {
        let open = Mutex::new(LruCache::new(capacity));
        Self { open, lingering: Mutex::default(), scratch: Scratch::default() }
    }

    /// Fills `buf` from `offset` of the file, without mapping it into memory.
    ///
    /// # Errors
    /// `Stale` where the file is no longer what it was when the checkpoint was opened, `Io` where
    /// the read fails.
    pub fn read_exact_at(
        &self,
        source: &Arc<SourceFile>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        let open = self.get(source)?;
        let outcome = open.file.read_exact_at(buf, offset);
        open.verify()?;
        outcome.map_err(|cause| Error::io(source.name(), cause))
    }

    /// Has the kernel copy a range of the file to the same place in `out`, where it shares blocks if
    /// the file system can, and returns how many bytes it copied from the range's start on. The rest
    /// is left to the caller: not every two files can be copied so.
    ///
    /// # Errors
    /// `Stale` where the file is no longer what it was when the checkpoint was opened.
    pub fn copy_range(
        &self,
        source: &Arc<SourceFile>,
        range: Range<u64>,
        out: &File,
    ) -> Result<u64> {
        let open = self.get(source)?;
        let (mut from, mut to) = (range.start, range.start);
        while from < range.end {
            let len = (range.end - from) as usize;
            let copied =
                rustix::fs::copy_file_range(&open.file, Some(&mut from), out, Some(&mut to), len);
            if matches!(copied, Ok(0) | Err(_)) {
                break;
            }
        }
        open.verify()?;
        Ok(from - range.start)
    }

    /// Shows `f` a range of the mapped file and returns what `f` made of it, provided that the
    /// file was still whole afterwards. The range's pages linger for a while, for it may be read
    /// again, a few columns of a matrix at a time, and are then given back.
    ///
    /// # Errors
    /// `Stale` where the file is no longer what it was when the checkpoint was opened; what `f`
    /// returned is dropped, as it may have seen zeros.
    pub fn with_bytes<T>(
        &self,
        source: &Arc<SourceFile>,
        start: u64,
        len: u64,
        f: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        self.with_map(source, start, len, |open, bytes| {
            let out = f(bytes);
            open.verify()?;
            Ok(out)
        })
    }

    /// As [`with_bytes`](Self::with_bytes), for an `f` whose doings can't be dropped: it is shown the range
    /// when all of it has been read and the file was whole after that.
    ///
    /// # Errors
    /// As those of [`with_bytes`](Self::with_bytes), with `f` not called.
    pub fn with_read_bytes<T>(
        &self,
        source: &Arc<SourceFile>,
        start: u64,
        len: u64,
        f: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        self.with_map(source, start, len, |open, bytes| {
            // A byte of every page; the least that a page can have.
            const PAGE: usize = 4096;
            let ends = bytes.last().into_iter();
            black_box(bytes.iter().step_by(PAGE).chain(ends).fold(0, |all, byte| all ^ byte));
            open.verify()?;
            Ok(f(bytes))
        })
    }

    fn with_map<T>(
        &self,
        source: &Arc<SourceFile>,
        start: u64,
        len: u64,
        f: impl FnOnce(&OpenFile, &[u8]) -> Result<T>,
    ) -> Result<T> {
        let open = self.get(source)?;
        // A file that is known to have shrunk isn't touched at all.
        open.verify()?;
        let range = start as usize..(start + len) as usize;
        let map = open.map()?;
        if range.len() > LONG && self.linger(&open, &range) {
            // By columns, pages that are not in memory would be asked for in no order that the kernel
            // sees. Advice, which fails without consequence.
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
        let out = f(&open, &map[range.clone()])?;
        if !range.is_empty() {
            self.linger(&open, &range);
        }
        Ok(out)
    }

    /// Lets the pages of a range linger, in place of those that have for longest, and returns whether
    /// they did not already.
    fn linger(&self, open: &Arc<OpenFile>, range: &Range<usize>) -> bool {
        let mut surplus = Vec::new();
        let mut lingering = self.lingering.lock();
        for (file, last) in lingering.iter_mut().rev() {
            let union = last.start.min(range.start)..last.end.max(range.end);
            let is_near = last.len() + range.len() >= union.len();
            // The stripes of a matrix start and end a few columns apart.
            let is_stripe = is_near && range.len() > LONG && last.len() > LONG;
            let is_joined = union == *last || is_near && union.len() <= TOGETHER || is_stripe;
            if file.as_ptr() == Arc::as_ptr(open) && is_joined {
                *last = union;
                return false;
            }
        }
        lingering.push_back((Arc::downgrade(open), range.clone()));
        let mut bytes: usize = lingering.iter().map(|(_, range)| range.len()).sum();
        while lingering.len() > 1 && (bytes > LINGERING || lingering.len() > RANGES) {
            let (file, range) = lingering.pop_front().expect("there are two");
            bytes -= range.len();
            surplus.push((file, range));
        }
        drop(lingering);
        for (file, range) in surplus {
            // One that was closed has no pages.
            if let Some(mapped) = file.upgrade().as_ref().and_then(|file| file.map.get()) {
                drop_pages(&mapped.map, range);
            }
        }
        true
    }

    /// As [`with_bytes`](Self::with_bytes), of several ranges at the same time. Empty ones touch no
    /// file.
    pub(super) fn with_parts<const N: usize>(
        &self,
        parts: &[Part<'_>; N],
        f: &mut dyn FnMut(&[&[u8]; N]),
    ) -> Result<()> {
        self.nest(parts, 0, &[&[]; N], f)
    }

    fn nest<const N: usize>(
        &self,
        parts: &[Part<'_>; N],
        at: usize,
        shown: &[&[u8]; N],
        f: &mut dyn FnMut(&[&[u8]; N]),
    ) -> Result<()> {
        match parts.get(at) {
            None => {
                f(shown);
                Ok(())
            }
            Some((.., 0)) => self.nest(parts, at + 1, shown, f),
            Some(&(source, start, len)) => self.with_bytes(source, start, len, |bytes| {
                let mut shown = *shown;
                shown[at] = bytes;
                self.nest(parts, at + 1, &shown, f)
            })?,
        }
    }

    /// Lends `f` a buffer of `len` bytes, whatever they are.
    pub(super) fn with_scratch<T>(
        &self,
        len: usize,
        f: impl FnOnce(&mut [u8]) -> Result<T>,
    ) -> Result<T> {
        let mut lent = self.scratch.lend(len);
        f(&mut lent.buffer[..len])
    }

    /// Bytes of memory that is decoded into, as they change.
    pub fn scratch_bytes(&self) -> Arc<AtomicU64> {
        self.scratch.bytes.clone()
    }

    /// Whether [`fetch`](Self::fetch) would have nothing to wait for, as far as the ends of the range tell.
    pub(super) fn is_fetched(&self, (source, start, len): Part<'_>) -> bool {
        let is_there =
            |map: &Mmap| [start, start + len - 1].iter().all(|at| is_in_memory(map, *at as usize));
        len as usize > LONG || self.get(source).is_ok_and(|open| open.map().is_ok_and(is_there))
    }

    /// Has a range read into the kernel's page cache and mapped, where it isn't. Only ever about
    /// speed: whoever reads the range meets the error, if there is one. Of a long range, of which a
    /// stripe is wanted, whoever is first has the whole read ([`with_bytes`](Self::with_bytes)).
    pub(super) fn fetch(&self, (source, start, len): Part<'_>) {
        if len as usize <= LONG
            && let Ok(open) = self.get(source)
            && let Ok(map) = open.map()
        {
            let _ = map.advise_range(memmap2::Advice::PopulateRead, start as usize, len as usize);
        }
    }

    /// Asks the kernel to read a file into its page cache, and returns at once.
    ///
    /// # Errors
    /// `Stale` or `Io` where the file can't be opened.
    pub fn prefetch(&self, source: &Arc<SourceFile>) -> Result<()> {
        let open = self.get(source)?;
        open.map()?
            .advise(memmap2::Advice::WillNeed)
            .map_err(|cause| Error::io(format_args!("prefetch {}", source.name()), cause))
    }

    /// Closes every file that nobody is reading.
    pub fn clear(&self) {
        self.open.lock().clear();
    }

    /// The number of files open, and the bytes of address space that they map.
    pub fn mapped(&self) -> (usize, u64) {
        let open = self.open.lock();
        let mapped = open.iter().filter_map(|(_, file)| file.map.get());
        (open.len(), mapped.map(|mapped| mapped.map.len() as u64).sum())
    }

    /// Bytes of memory that the maps take in this process: the pages of them that are in its page
    /// table, by the kernel's own count (`Rss` in `/proc/self/smaps`). They belong to the kernel's
    /// page cache, which shares them with other processes and takes them back as it needs.
    ///
    /// Where there is no `/proc`, the bytes mapped, which is an upper bound.
    pub fn resident(&self) -> u64 {
        // Held, so that the addresses go on being theirs.
        let open: Vec<Arc<OpenFile>> =
            self.open.lock().iter().map(|(_, open)| open.clone()).collect();
        let maps: Vec<Range<usize>> = open
            .iter()
            .filter_map(|open| open.map.get())
            .map(|mapped| mapped.map.as_ptr_range())
            .map(|range| range.start.addr()..range.end.addr())
            .collect();
        if maps.is_empty() {
            return 0;
        }
        match std::fs::read("/proc/self/smaps") {
            Ok(smaps) => rss_within(&String::from_utf8_lossy(&smaps), &maps),
            Err(_) => maps.iter().map(|range| range.len() as u64).sum(),
        }
    }

    fn get(&self, source: &Arc<SourceFile>) -> Result<Arc<OpenFile>> {
        if let Some(open) = self.open.lock().get(&source.id) {
            return Ok(open.clone());
        }
        let open = Arc::new(OpenFile::new(source.clone())?);
        // What falls out is dropped after the lock is: unmapping takes a while.
        let evicted = self.open.lock().push(source.id, open.clone());
        drop(evicted);
        Ok(open)
    }
}

impl Scratch {
    fn lend(&self, len: usize) -> Lent<'_> {
        let mut buffer = self.idle.lock().pop().unwrap_or_default();
        let had = buffer.capacity();
        if buffer.len() < len || buffer.len() / 2 > len {
            // One that was stretched for something huge is not worth its memory.
            buffer.resize(len, 0);
            buffer.shrink_to(len);
        }
        self.bytes.fetch_add(buffer.capacity() as u64, Ordering::Relaxed);
        self.bytes.fetch_sub(had as u64, Ordering::Relaxed);
        Lent { buffer, home: self }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut idle = self.home.idle.lock();
        if idle.len() < SCRATCH {
            idle.push(std::mem::take(&mut self.buffer));
        } else {
            self.home.bytes.fetch_sub(self.buffer.capacity() as u64, Ordering::Relaxed);
        }
    }
}

impl OpenFile {
    fn new(source: Arc<SourceFile>) -> Result<Self> {
        let file = File::open(&source.path).map_err(|cause| match cause.kind() {
            std::io::ErrorKind::NotFound => source.stale("deleted"),
            _ => Error::io(source.name(), cause),
        })?;
        let metadata = file.metadata().map_err(|cause| Error::io(source.name(), cause))?;
        if Identity::of(&metadata) != source.identity {
            return Err(source.stale("changed or replaced"));
        }
        Ok(Self { source, file, map: OnceLock::new() })
    }

    /// The whole file, mapped when first asked for.
    fn map(&self) -> Result<&Mmap> {
        if let Some(mapped) = self.map.get() {
            return Ok(&mapped.map);
        }
        let at = |cause| Error::io(format_args!("map {}", self.source.name()), cause);
        let map = map(&self.file, self.source.len() as usize).map_err(at)?;
        // Has the kernel read and map 2 MiB at a time, where it can, whatever the disk's readahead. Advice,
        // which fails without consequence.
        let _ = map.advise(memmap2::Advice::HugePage);
        let mapped = Mapped { watch: Watch::new(&map).map_err(at)?, map };
        Ok(&self.map.get_or_init(|| mapped).map)
    }

    /// Fails where the file has been truncated, written, replaced or deleted since it was opened.
    fn verify(&self) -> Result<()> {
        // Before the file is asked: of a fault the file then tells the cause.
        let faulted = self.map.get().is_some_and(|mapped| mapped.watch.faulted());
        let metadata =
            self.file.metadata().map_err(|cause| Error::io(self.source.name(), cause))?;
        if metadata.nlink() == 0 {
            return Err(self.source.stale("deleted or replaced"));
        }
        if metadata.len() < self.source.len() {
            return Err(self.source.stale("truncated"));
        }
        if Identity::of(&metadata) != self.source.identity {
            return Err(self.source.stale("changed"));
        }
        if faulted {
            let message = format!("{}: a page of it could not be read", self.source.name);
            return Err(Error::new(ErrorKind::Io, message));
        }
        Ok(())
    }
}

/// The sum of `Rss` of the mappings in the text of an `smaps` file that start in one of `ranges`.
fn rss_within(smaps: &str, ranges: &[Range<usize>]) -> u64 {
    let mut counts = false;
    let mut kib = 0;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if first == "Rss:" {
            let size = words.next().and_then(|size| size.parse::<u64>().ok());
            kib += size.filter(|_| counts).unwrap_or(0);
        } else if let Some((start, _)) = first.split_once('-') {
            // Of a line that isn't the first of a mapping, the first word ends in a colon.
            let start = usize::from_str_radix(start, 16);
            counts = start.is_ok_and(|start| ranges.iter().any(|range| range.contains(&start)));
        }
    }
    kib << 10
}

#[expect(unsafe_code, reason = "a map is only as constant as its file")]
pub(super) fn map(file: &File, len: usize) -> std::io::Result<Mmap> {
    // Of the length that was noted: the file may have shrunk since, and a slice of a shorter map
    // would panic where a fault is caught.
    // SAFETY: the map is read through `with_bytes` alone, as bytes, which have no invalid values;
    // a file that shrinks is caught by `Watch`, one that changes by `verify`, and either way what
    // was read is thrown away.
    unsafe { MmapOptions::new().len(len).map(file) }
}

/// Whether the page of a byte is in the kernel's page cache, which may be wrong at once.
#[expect(unsafe_code, reason = "a system call by its name")]
fn is_in_memory(map: &Mmap, at: usize) -> bool {
    let page = map[at..].as_ptr().map_addr(|addr| addr & !(rustix::param::page_size() - 1));
    let mut found = 0;
    // SAFETY: it writes one byte for the one page that it is asked about, and reads nothing of it.
    let outcome = unsafe { libc::mincore(page.cast_mut().cast(), 1, &raw mut found) };
    outcome == 0 && found & 1 == 1
}

/// What the kernel maps as one page, where it can.
const HUGE_PAGE: usize = 2 << 20;

/// Gives back the pages of a range but those of its last huge page, which is its neighbour's too, and is
/// given back with that: half a huge page would have to be split.
#[expect(unsafe_code, reason = "MADV_DONTNEED discards what a private map has written")]
fn drop_pages(map: &Mmap, range: Range<usize>) {
    let base = map.as_ptr().addr();
    let floor = |at: usize| ((base + at) / HUGE_PAGE * HUGE_PAGE).max(base) - base;
    let range = floor(range.start)..floor(range.end);
    // SAFETY: the map is read-only and backed by a file, or by zeros where it was truncated, so a
    // page that is dropped comes back with the same bytes. Advice that fails changes nothing.
    let _ = unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_that_of_our_mappings_alone() {
        let smaps = "\
7000-8000 r--p 00000000 00:01 5    /a name-with: dash\nSize: 4 kB\nRss:      4 kB\nPss: 2 kB\n\
8000-9000 r--p 00000000 00:01 5    /b\nRss:      16 kB\nSwap: 1 kB\n\
a000-f000 r--p 00000000 00:01 5    /b\nRss:      64 kB\nVmFlags: rd-wr\n";
        let check = |first: Range<usize>, second: Range<usize>, kib: u64| {
            assert_eq!(rss_within(smaps, &[first, second]), kib << 10);
        };
        check(0x7000..0x8000, 0..0, 4);
        check(0x8000..0x9000, 0xa000..0xf000, 80);
        check(0x9000..0xa000, 0xf000..0x10000, 0);
    }
}
