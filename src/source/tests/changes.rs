//! A source that is truncated, overwritten, replaced or deleted while it is read.

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::error::{ErrorKind, Result};
use crate::source::{SourceFile, SourceFiles};

const LEN: usize = 300_001;

/// A directory with two files of ones, modified some time ago so that any change shows, and the
/// first of them opened.
struct Fixture {
    dir: tempfile::TempDir,
    files: SourceFiles,
    changing: Arc<SourceFile>,
    other: Arc<SourceFile>,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let open = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, vec![1; LEN]).expect("written");
            let past = SystemTime::now() - Duration::from_secs(60);
            let file = File::options().write(true).open(path).expect("opened");
            file.set_modified(past).expect("set");
            Arc::new(SourceFile::open(dir.path(), name).expect("opened").0)
        };
        let (changing, other) = (open("changing"), open("other"));
        let files = SourceFiles::new(NonZeroUsize::new(8).expect("positive"));
        Self { dir, files, changing, other }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("changing")
    }

    /// The sum of a range, through the map.
    fn sum(&self, source: &Arc<SourceFile>, start: usize, len: usize) -> Result<u64> {
        self.files.with_bytes(source, start as u64, len as u64, sum)
    }

    fn read(&self, source: &Arc<SourceFile>, start: usize, len: usize) -> Result<u64> {
        let mut buf = vec![0; len];
        self.files.read_exact_at(source, start as u64, &mut buf)?;
        Ok(sum(&buf))
    }

    /// Every way of reading every part fails now, again and again, and the other file is fine.
    #[track_caller]
    fn is_stale(&self, complaint: &str) {
        for round in 0..3 {
            for (start, len) in [(0, LEN), (0, 1), (LEN - 1, 1), (LEN / 2, 5000), (0, 0)] {
                for outcome in
                    [self.sum(&self.changing, start, len), self.read(&self.changing, start, len)]
                {
                    let error = outcome.expect_err("read");
                    assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
                    let message = error.to_string();
                    let named = message.starts_with("changing: the file was ");
                    assert!(named && message.contains(complaint), "{message}");
                }
            }
            self.other_is_fine();
            if round == 1 {
                // As if it had fallen out of the files kept open.
                self.files.clear();
            }
        }
    }

    #[track_caller]
    fn other_is_fine(&self) {
        assert_eq!(self.sum(&self.other, 0, LEN).expect("read"), LEN as u64);
        assert_eq!(self.read(&self.other, 7, 1000).expect("read"), 1000);
    }
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().map(|byte| u64::from(std::hint::black_box(*byte))).sum()
}

fn truncate(path: &Path, len: u64) {
    File::options().write(true).open(path).expect("opened").set_len(len).expect("truncated");
}

/// A change that is made after a first read, and what it is called.
type Change = (fn(&Path), &'static str);

const CHANGES: &[Change] = &[
    (|path| truncate(path, 0), "truncated"),
    (|path| truncate(path, LEN as u64 - 1), "truncated"),
    (|path| truncate(path, 3 * 4096), "truncated"),
    (|path| truncate(path, 3 * 4096 + 100), "truncated"),
    (|path| truncate(path, LEN as u64 + 1), "changed"),
    (|path| fs::remove_file(path).expect("removed"), "deleted"),
    (|path| fs::write(path, vec![2; LEN]).expect("written"), "changed"),
    (
        |path| {
            let new = path.with_extension("new");
            fs::write(&new, vec![1; LEN]).expect("written");
            fs::rename(new, path).expect("renamed");
        },
        "replaced",
    ),
    (
        |path| {
            truncate(path, 0);
            truncate(path, LEN as u64);
        },
        "changed",
    ),
];

#[test]
fn a_file_that_changed_is_refused_for_good() {
    for (change, called) in CHANGES {
        // Mapped and read before, or just opened.
        for mapped in [true, false] {
            let fixture = Fixture::new();
            if mapped {
                assert_eq!(fixture.sum(&fixture.changing, 0, LEN).expect("read"), LEN as u64);
            } else {
                assert_eq!(fixture.read(&fixture.changing, 0, LEN).expect("read"), LEN as u64);
            }
            change(&fixture.path());
            // What it is called when it is opened anew, is less exact.
            let error = fixture.sum(&fixture.changing, 0, LEN).expect_err("read");
            assert!(error.to_string().contains(called), "{error} does not say {called:?}");
            fixture.is_stale("");
        }
    }
}

#[test]
fn a_file_that_changed_before_its_first_read_is_refused() {
    for (change, _) in CHANGES {
        let fixture = Fixture::new();
        change(&fixture.path());
        fixture.is_stale("");
    }
}

#[test]
fn a_file_that_changes_under_its_reader_gives_an_error_and_never_zeros() {
    for (change, called) in CHANGES {
        let fixture = Fixture::new();
        let path = fixture.path();
        let outcome = fixture.files.with_bytes(&fixture.changing, 0, LEN as u64, |bytes| {
            let before = sum(&bytes[..4096]);
            change(&path);
            // Whatever is there now, it is touched to its end.
            before + sum(bytes)
        });
        let error = outcome.expect_err("read");
        assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
        assert!(error.to_string().contains(called), "{error} does not say {called:?}");
        fixture.is_stale("");
    }
}

#[test]
fn readers_on_many_threads_survive_a_truncation() {
    for _ in 0..20 {
        let fixture = Fixture::new();
        let stale = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..4)
                .map(|i| {
                    let fixture = &fixture;
                    scope.spawn(move || {
                        // Until the truncation shows.
                        (0..1_000_000)
                            .find_map(|_| match fixture.sum(&fixture.changing, i, LEN - i) {
                                Ok(sum) => {
                                    assert_eq!(sum, (LEN - i) as u64, "zeros were read");
                                    None
                                }
                                Err(error) => Some(error.kind()),
                            })
                            .expect("it was truncated")
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(2));
            truncate(&fixture.path(), 8192);
            readers.into_iter().map(|r| r.join().expect("no panic")).collect::<Vec<_>>()
        });
        assert_eq!(stale, [ErrorKind::Stale; 4]);
        fixture.other_is_fine();
    }
}

#[test]
fn what_is_resident_is_what_was_read_last() {
    const STEP: u64 = 1 << 20;
    let fixture = Fixture::new();
    let path = fixture.dir.path().join("large");
    File::create(path).and_then(|file| file.set_len(100 * STEP)).expect("written");
    let large = Arc::new(SourceFile::open(fixture.dir.path(), "large").expect("opened").0);
    assert_eq!(fixture.files.resident(), 0);
    let read = |start, len| {
        let resident = |bytes: &[u8]| {
            sum(bytes);
            fixture.files.resident()
        };
        fixture.files.with_bytes(&large, start, len, resident).expect("read")
    };
    let sequence: Vec<u64> = (0..100).map(|step| read(step * STEP, STEP) / STEP).collect();
    assert!((0..20).all(|step| sequence[step] > step as u64), "{sequence:?}");
    assert!(sequence[40..].iter().all(|steps| (16..48).contains(steps)), "{sequence:?}");
    // A long range lingers whole, whatever is read of it, and gives way to the next.
    assert!(read(0, 60 * STEP) >= 60 * STEP);
    assert!((0..60).all(|step| read(step * STEP, STEP) >= 60 * STEP));
    assert!((60..64).map(|step| read(step * STEP, STEP)).all(|resident| resident < 80 * STEP));
    assert!(read(64 * STEP, STEP) < 10 * STEP);
    assert_eq!(fixture.files.mapped(), (1, 100 * STEP));
    fixture.files.clear();
    assert_eq!((fixture.files.resident(), fixture.files.mapped()), (0, (0, 0)));
}

#[test]
fn what_is_fetched_is_resident_and_a_file_that_shrank_kills_nobody() {
    let fixture = Fixture::new();
    fixture.files.fetch((&fixture.changing, 0, LEN as u64));
    assert!(fixture.files.resident() >= LEN as u64);
    truncate(&fixture.path(), 8192);
    fixture.files.fetch((&fixture.changing, 0, LEN as u64));
    fixture.is_stale("");
    fixture.files.fetch((&fixture.changing, 0, LEN as u64));
}
