//! Kernel requests to view calls; decides nothing.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyXattr,
};
use parking_lot::{Condvar, Mutex};

use crate::error::{Error, ErrorKind, Result};
use crate::view::{NodeId, NodeKind, ROOT, View};

/// How long the kernel may believe what it was told: for good, as a view never changes.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// The largest read that the kernel sends: its limit.
const MAX_REQUEST: u32 = 1 << 20;

/// Requests of readahead that the kernel keeps in flight; beyond its default of 12 it would skip
/// parts of the readahead.
const MAX_BACKGROUND: u16 = 256;

/// Threads of a session that are never reading, so that metadata calls find one.
const SPARE_THREADS: usize = 2;

/// How long a read may run before others no longer wait for it: it may be waiting for a disk.
const PATIENCE: Duration = Duration::from_millis(5);

/// The errors of one file are logged this far apart at least.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// A view connected to the kernel.
#[derive(Debug)]
pub struct Session {
    session: fuser::Session<Kernel>,
    counters: Arc<Counters>,
}

/// What a session has served.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    errors: AtomicU64,
}

impl Counters {
    /// Reads answered, failed ones included.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Reads that failed.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

impl Session {
    /// Answers the kernel's first request on `device`, an open `/dev/fuse` that is mounted already.
    /// Files belong to `owner`, a user and a group. If `null`, every read gets zeros.
    ///
    /// # Errors
    /// `Io` where the kernel hangs up or speaks a protocol from before 2006.
    pub fn open(view: Arc<View>, device: OwnedFd, owner: (u32, u32), null: bool) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let readers = (2 * cores).clamp(8, 32);
        let counters = Arc::new(Counters::default());
        let kernel = Kernel {
            view,
            owner,
            null,
            reads: Reads::new(cores, readers),
            buffers: Mutex::default(),
            counters: counters.clone(),
            logged: Mutex::new(HashMap::new()),
        };
        let mut config = fuser::Config::default();
        config.n_threads = Some(readers + SPARE_THREADS);
        // Who may come in is the kernel's decision: it knows whether `allow_other` was given.
        let acl = fuser::SessionACL::All;
        let session = fuser::Session::from_fd(kernel, device, acl, config)
            .map_err(|cause| Error::caused(ErrorKind::Io, "/dev/fuse", cause))?;
        Ok(Self { session, counters })
    }

    /// What is served, as it grows.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Serves until the last reference to the mount is gone.
    ///
    /// # Errors
    /// `Io` where the connection to the kernel fails for another reason.
    pub fn run(self) -> Result<()> {
        self.session.run().map_err(|cause| Error::caused(ErrorKind::Io, "/dev/fuse", cause))
    }
}

/// The file system that the kernel sees. Inode numbers are node ids, plus one.
#[derive(Debug)]
struct Kernel {
    view: Arc<View>,
    owner: (u32, u32),
    /// Whether reads get zeros.
    null: bool,
    reads: Reads,
    /// What reads are answered from, each of the size of the largest that it was used for; as many as
    /// there are cores.
    buffers: Mutex<Vec<Vec<u8>>>,
    counters: Arc<Counters>,
    /// When the errors of a file were last logged, and how many were not since.
    logged: Mutex<HashMap<NodeId, (Instant, u64)>>,
}

impl Kernel {
    fn node(&self, ino: INodeNo) -> Option<NodeId> {
        let id = usize::try_from(ino.0.checked_sub(1)?).ok()?;
        self.view.tree().get(id).map(|_| id)
    }

    fn attr(&self, id: NodeId) -> FileAttr {
        let node = &self.view.tree().nodes()[id];
        let (kind, size, perm, nlink) = match &node.kind {
            NodeKind::File { size } => (FileType::RegularFile, *size, 0o444, 1),
            NodeKind::Dir { children } => {
                let is_dir = |child: &&NodeId| self.kind(**child) == FileType::Directory;
                let dirs = children.iter().filter(is_dir).count();
                (FileType::Directory, 0, 0o555, 2 + dirs as u32)
            }
        };
        let (uid, gid) = self.owner;
        FileAttr {
            ino: ino(id),
            size,
            blocks: size.div_ceil(512),
            atime: node.modified,
            mtime: node.modified,
            ctime: node.modified,
            crtime: node.modified,
            kind,
            perm,
            nlink,
            uid,
            gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn kind(&self, id: NodeId) -> FileType {
        match self.view.tree().nodes()[id].kind {
            NodeKind::File { .. } => FileType::RegularFile,
            NodeKind::Dir { .. } => FileType::Directory,
        }
    }

    /// The entries of a directory from position `offset` on, each with its position, the first two
    /// being `.` and `..`; `None` where it isn't a directory.
    fn entries(
        &self,
        dir: INodeNo,
        offset: u64,
    ) -> Option<impl Iterator<Item = (u64, NodeId, &OsStr)>> {
        let id = self.node(dir)?;
        let nodes = self.view.tree().nodes();
        let NodeKind::Dir { children } = &nodes[id].kind else { return None };
        let dots = [(id, OsStr::new(".")), (nodes[id].parent, OsStr::new(".."))];
        let named = children.iter().map(move |&child| (child, nodes[child].name.as_os_str()));
        let all = dots.into_iter().chain(named).enumerate();
        Some(all.skip(offset as usize).map(|(position, (id, name))| (position as u64, id, name)))
    }

    /// Reads and replies, with every byte that was asked for and the file has, or with an error.
    fn serve(&self, read: Read) {
        let Read { file, offset, len, reply } = read;
        let mut buffer = self.buffers.lock().pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        let into = &mut buffer[..len];
        let mut reply = Some(reply);
        let mut answer = |bytes: &[u8]| {
            self.check_whole(file, offset, len, bytes.len())?;
            if let Some(reply) = reply.take() {
                reply.data(bytes);
            }
            Ok(())
        };
        // A panic here would end the thread, and soon the mount. The view's locks don't poison and
        // its caches publish nothing that isn't whole.
        let read = || match self.null {
            true => answer(&into[..self.view.due(file, offset, len)]),
            false => self.view.show_at(file, offset, into, answer).flatten(),
        };
        let outcome = catch_unwind(AssertUnwindSafe(read))
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "the read panicked")));
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = outcome {
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
            self.log(file, &error);
            // None is left where sending it panicked.
            if let Some(reply) = reply {
                reply.error(errno(error.kind()));
            }
        }
        let mut buffers = self.buffers.lock();
        if buffers.len() < self.reads.cores {
            buffers.push(buffer);
        }
        drop(buffers);
        for line in self.view.news() {
            tracing::warn!("{line}");
        }
    }

    /// To the kernel a short reply means that the file has shrunk, for good.
    fn check_whole(&self, file: NodeId, offset: u64, len: usize, read: usize) -> Result<()> {
        let due = self.view.due(file, offset, len);
        if read == due {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Io, format!("read {read} bytes of {due} at offset {offset}")))
    }

    /// Logs an error with all its causes, but not each of thousands that one broken file gives.
    fn log(&self, file: NodeId, error: &Error) {
        let mut logged = self.logged.lock();
        let (last, untold) = match logged.get(&file) {
            Some(&(last, untold)) => (Some(last), untold),
            None => (None, 0),
        };
        if last.is_some_and(|last| last.elapsed() < LOG_INTERVAL) {
            logged.entry(file).and_modify(|(_, untold)| *untold += 1);
            return;
        }
        logged.insert(file, (Instant::now(), 0));
        drop(logged);
        let path = self.view.tree().path(file);
        let path = path.display();
        match untold {
            0 => tracing::error!("{path}: {error}"),
            _ => tracing::error!("{path}: {error} ({untold} more errors since the last one told)"),
        }
    }
}

fn ino(id: NodeId) -> INodeNo {
    INodeNo(id as u64 + 1)
}

/// What a reader gets. Whatever ails the source, to the reader its medium is bad.
fn errno(kind: ErrorKind) -> Errno {
    match kind {
        ErrorKind::Invalid => Errno::EINVAL,
        ErrorKind::NotFound
        | ErrorKind::Corrupt
        | ErrorKind::Unsupported
        | ErrorKind::Stale
        | ErrorKind::Io => Errno::EIO,
    }
}

impl Filesystem for Kernel {
    fn init(&mut self, _: &fuser::Request, config: &mut KernelConfig) -> io::Result<()> {
        // Neither is out of range.
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let wanted = [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
        ];
        for flag in wanted {
            // What an older kernel lacks only made things faster.
            let _ = config.add_capabilities(flag);
        }
        Ok(())
    }

    fn lookup(&self, _: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.node(parent).map(|parent| self.view.tree().lookup(parent, name));
        match found {
            None => reply.error(Errno::ENOENT),
            Some(Some(id)) => reply.entry(&FOREVER, &self.attr(id), Generation(0)),
            Some(None) => {
                // Inode 0: the kernel may remember that there is no such name.
                let none = FileAttr { ino: INodeNo(0), ..self.attr(ROOT) };
                reply.entry(&FOREVER, &none, Generation(0));
            }
        }
    }

    fn getattr(&self, _: &fuser::Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.node(ino) {
            Some(id) => reply.attr(&FOREVER, &self.attr(id)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &fuser::Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.node(ino).map(|id| self.kind(id)) {
            None => reply.error(Errno::ENOENT),
            Some(FileType::RegularFile) => {
                // Without KEEP_CACHE every open drops the pages that others have mapped.
                let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH;
                reply.opened(FileHandle(0), flags);
            }
            Some(_) => reply.error(Errno::EISDIR),
        }
    }

    fn read(
        &self,
        _: &fuser::Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.node(ino) {
            None => reply.error(Errno::ENOENT),
            Some(id) if self.kind(id) == FileType::Directory => reply.error(Errno::EISDIR),
            Some(file) => {
                let mut next = self.reads.start(Read { file, offset, len: size as usize, reply });
                while let Some((number, read)) = next {
                    self.serve(read);
                    next = self.reads.finish(number);
                }
            }
        }
    }

    fn flush(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn opendir(&self, _: &fuser::Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.node(ino).map(|id| self.kind(id)) {
            None => reply.error(Errno::ENOENT),
            Some(FileType::Directory) => {
                let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
                reply.opened(FileHandle(0), flags);
            }
            Some(_) => reply.error(Errno::ENOTDIR),
        }
    }

    fn readdir(
        &self,
        _: &fuser::Request,
        dir: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some(entries) = self.entries(dir, offset) else { return reply.error(Errno::ENOTDIR) };
        for (position, id, name) in entries {
            if reply.add(ino(id), position + 1, self.kind(id), name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _: &fuser::Request,
        dir: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let Some(entries) = self.entries(dir, offset) else { return reply.error(Errno::ENOTDIR) };
        for (position, id, name) in entries {
            let attr = self.attr(id);
            if reply.add(ino(id), position + 1, name, &FOREVER, &attr, Generation(0)) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &fuser::Request, _: INodeNo, reply: ReplyStatfs) {
        let nodes = self.view.tree().nodes();
        let blocks = nodes.iter().map(|node| match node.kind {
            NodeKind::File { size } => size.div_ceil(4096),
            NodeKind::Dir { .. } => 0,
        });
        reply.statfs(blocks.sum(), 0, 0, nodes.len() as u64, 0, 4096, 255, 4096);
    }

    // There are no extended attributes, and after this answer the kernel doesn't ask again.

    fn getxattr(&self, _: &fuser::Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &fuser::Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }
}

/// A read that the kernel waits for.
#[derive(Debug)]
struct Read {
    file: NodeId,
    offset: u64,
    len: usize,
    reply: ReplyData,
}

/// Which reads are running, and which wait.
///
/// As many run at a time as there are cores, and each thread does one after the other: what a read has encoded is
/// still in its core's own cache when it is sent. One that takes longer is counted no more, for it may wait
/// for its source. Only some of a session's threads may read nevertheless, and not all of those one file:
/// metadata calls, and files whose source answers, always find a thread. The reads beyond that wait here,
/// and whoever finishes one takes the next. The kernel bounds how many there are.
#[derive(Debug)]
struct Reads<T = Read> {
    cores: usize,
    limit: usize,
    limit_per_file: usize,
    state: Mutex<ReadsState<T>>,
    /// Who waits here is told of nothing, and looks again from time to time.
    later: Condvar,
}

#[derive(Debug)]
struct ReadsState<T> {
    /// Reads so far, which are numbered.
    count: u64,
    running: Vec<Running>,
    /// By rising numbers.
    waiting: VecDeque<(u64, T)>,
    /// Threads that wait with their reads.
    patient: usize,
}

#[derive(Debug)]
struct Running {
    number: u64,
    file: NodeId,
    since: Instant,
}

/// Why a read may run, or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Admission {
    Granted,
    /// Once another one has finished, or takes long.
    Soon,
    /// Once another one has finished.
    Later,
}

/// What has a file.
trait OfFile {
    fn file(&self) -> NodeId;
}

impl OfFile for Read {
    fn file(&self) -> NodeId {
        self.file
    }
}

impl<T: OfFile> Reads<T> {
    fn new(cores: usize, limit: usize) -> Self {
        let state =
            ReadsState { count: 0, running: Vec::new(), waiting: VecDeque::new(), patient: 0 };
        let limit_per_file = limit - limit / 4;
        Self { cores, limit, limit_per_file, state: Mutex::new(state), later: Condvar::new() }
    }

    /// Gives `read` back, with its number, if the caller is to do it, at once or after a while; keeps it
    /// for whoever finishes another otherwise.
    fn start(&self, read: T) -> Option<(u64, T)> {
        let mut state = self.state.lock();
        let number = state.count;
        state.count += 1;
        if self.admission(&state, &read) == Admission::Granted {
            return Some(state.enter(number, read));
        }
        state.waiting.push_back((number, read));
        if state.patient + state.running.len() >= self.limit {
            return None;
        }
        state.patient += 1;
        let admitted = loop {
            let place = state.waiting.binary_search_by_key(&number, |(number, _)| *number);
            // Another thread may have taken it.
            let Ok(place) = place else { break None };
            match self.admission(&state, &state.waiting[place].1) {
                Admission::Granted => break state.waiting.remove(place),
                Admission::Soon => self.later.wait_for(&mut state, PATIENCE),
                Admission::Later => break None,
            };
        };
        state.patient -= 1;
        admitted.map(|(number, read)| state.enter(number, read))
    }

    /// Notes that a read is done, and returns the one that the caller is to do next.
    fn finish(&self, number: u64) -> Option<(u64, T)> {
        let mut state = self.state.lock();
        state.running.retain(|running| running.number != number);
        let is_admitted = |(_, read): &(u64, T)| self.admission(&state, read) == Admission::Granted;
        let next = state.waiting.iter().position(is_admitted)?;
        let (number, read) = state.waiting.remove(next)?;
        Some(state.enter(number, read))
    }

    fn admission(&self, state: &ReadsState<T>, read: &T) -> Admission {
        let running = &state.running;
        let of_file = running.iter().filter(|running| running.file == read.file()).count();
        if running.len() >= self.limit || of_file >= self.limit_per_file {
            return Admission::Later;
        }
        let is_swift = |running: &&Running| running.since.elapsed() < PATIENCE;
        match running.iter().filter(is_swift).count() < self.cores {
            true => Admission::Granted,
            false => Admission::Soon,
        }
    }
}

impl<T: OfFile> ReadsState<T> {
    fn enter(&mut self, number: u64, read: T) -> (u64, T) {
        self.running.push(Running { number, file: read.file(), since: Instant::now() });
        (number, read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Job(NodeId, u32);

    impl OfFile for Job {
        fn file(&self) -> NodeId {
            self.0
        }
    }

    #[test]
    fn a_file_whose_reads_hang_leaves_threads_to_the_others() {
        let reads = Reads::new(8, 8);
        let running = (0..20).filter_map(|n| reads.start(Job(1, n))).count();
        assert_eq!(running, 6);
        assert_eq!(reads.start(Job(2, 0)), Some((20, Job(2, 0))));
        assert_eq!(reads.start(Job(3, 0)), Some((21, Job(3, 0))));
        assert_eq!(reads.start(Job(4, 0)), None, "two files and the one that hangs fill the limit");
        let fourth = Some((22, Job(4, 0)));
        assert_eq!(reads.finish(20), fourth, "passing those of the file that hangs");
        assert_eq!(reads.finish(22), None);
        assert_eq!(reads.finish(3), Some((6, Job(1, 6))), "the oldest first");
    }

    #[test]
    fn every_read_is_done_once_whoever_finishes_when() {
        let reads = Reads::new(4, 4);
        let mut done = Vec::new();
        let mut running: VecDeque<(u64, Job)> =
            (0..200).filter_map(|n| reads.start(Job(n as usize * 7 % 5, n))).collect();
        while let Some((number, job)) = running.pop_front() {
            running.extend(reads.finish(number));
            done.push(job.1);
        }
        done.sort_unstable();
        assert_eq!(done, (0..200).collect::<Vec<_>>());
    }

    #[test]
    fn reads_wait_for_a_core_but_not_for_those_that_take_long() {
        let reads = Reads::new(1, 8);
        let begun = Instant::now();
        for n in 0..3 {
            // With nobody to finish any, each waits until the one before takes long.
            assert_eq!(reads.start(Job(1, n)), Some((n.into(), Job(1, n))));
            assert!(begun.elapsed() >= PATIENCE * n);
        }
    }

    #[test]
    fn a_read_that_waits_is_done_by_whoever_finishes_first() {
        let reads = Reads::new(1, 8);
        let first = reads.start(Job(1, 0)).expect("there is a core");
        let next = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| reads.start(Job(1, 1)));
            while reads.state.lock().patient == 0 {
                std::thread::yield_now();
            }
            let next = reads.finish(first.0);
            assert!(waiting.join().expect("it ends") != next, "one of them got it");
            next
        });
        assert!(next.is_none_or(|next| next == (1, Job(1, 1))));
    }

    #[test]
    fn a_reader_of_a_bad_source_gets_eio() {
        for kind in [ErrorKind::Stale, ErrorKind::Io, ErrorKind::Corrupt, ErrorKind::NotFound] {
            assert_eq!(errno(kind).code(), libc::EIO, "{kind:?}");
        }
    }
}
