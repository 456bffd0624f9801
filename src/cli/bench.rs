//! `aq-fs bench`: how fast mounts of a model are read, beside what the kernel gives.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use clap::ValueEnum;
use memmap2::Mmap;
use rustix::time::ClockId;
use serde::Serialize;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::TempDir;

use super::{BudgetArgs, RecipeArgs, bytes, print, size, warn_all};
use crate::error::{Error, ErrorKind, Result};
use crate::mount::{self, Options, Status, Unmounted};
use crate::recipe::Request;
use crate::threads::cpu_ns;
use crate::view::{NodeKind, View};

/// Bytes that a reader asks for at a time.
const PIECE: u64 = 1 << 20;

/// Measure how fast mounts of a model are read on this machine
///
/// Reads the beginning of the model through mounts of its own, each in a temporary directory and
/// gone at the end: the quantized view, the model as it is (dense), and a null view, whose files are
/// as long as the quantized ones and hold zeros that lie ready, so that only the kernel and the
/// session are at work. Cold reads are the first of a fresh mount, with the source in the page
/// cache; warm ones come from the kernel's cache of the mount.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct BenchArgs {
    /// A model's directory, its index, or its only weight file; or a directory of models
    model: PathBuf,

    /// How often everything is measured, in turn; what is printed are medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Readers at once, each in its own stretch of every file, besides one alone [default: as many
    /// as there are cores, two at least]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1024))]
    readers: Option<u32>,

    /// Bytes that are read from each mount at most
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = some_size)]
    size: u64,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    recipe: RecipeArgs,

    #[command(flatten)]
    budget: BudgetArgs,

    /// Be the process that serves this view
    #[arg(long, hide = true, requires = "point")]
    serve: Option<Shown>,

    /// Where it is mounted
    #[arg(long, hide = true)]
    point: Option<PathBuf>,
}

/// A size of what there is to read.
fn some_size(text: &str) -> Result<u64, String> {
    match size(text)? {
        0 => Err("nothing would be read".to_owned()),
        size => Ok(size),
    }
}

const AFTER_HELP: &str = "\
Columns:
  cold      GB (10^9 bytes) of output a second, from a fresh mount
  of null   that rate, of the null view's in the same round
  CPU-s/GB  CPU seconds of the mount's process for each GB, and how many of them went into reading,
            decoding and encoding the source
  reader    CPU seconds of the readers for each GB
  warm      GB a second when it is read again

Examples:
  aq-fs bench ~/models/Llama-3-8B
  aq-fs bench ~/models/Llama-3-8B --format mlx --quality reference --json";

/// What a mount shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Shown {
    /// Zeros.
    Null,
    /// The model as it is.
    Dense,
    /// The model, quantized.
    Quantized,
}

impl Shown {
    const ALL: [Self; 3] = [Self::Null, Self::Dense, Self::Quantized];

    fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Dense => "dense",
            Self::Quantized => "quantized",
        }
    }
}

/// How files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Access {
    Read,
    Mmap,
}

impl Access {
    const ALL: [Self; 2] = [Self::Read, Self::Mmap];

    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Mmap => "mmap",
        }
    }
}

/// One line of the table: a view that is read in one way. Rates in GB/s, costs in CPU-s/GB.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Row {
    view: Shown,
    access: Access,
    readers: u32,
    cold_gb_per_s: f64,
    cold_of_null: f64,
    warm_gb_per_s: f64,
    daemon_cpu_s_per_gb: f64,
    encode_cpu_s_per_gb: f64,
    reader_cpu_s_per_gb: f64,
    bytes: u64,
}

pub(super) fn run(args: &BenchArgs) -> Result<()> {
    if let (Some(shown), Some(point)) = (args.serve, &args.point) {
        return serve(args, shown, point);
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // The second ends the program as it would have ended without the first.
        signal_hook::flag::register_conditional_default(signal, stop.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .map_err(|cause| Error::io("signal handlers", cause))?;
    }
    let view = args.recipe.open(&args.model, args.budget.budget())?;
    warn_all(view.warnings());
    let files = warm_up(&view, args.size, &stop)?;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let readers = args.readers.unwrap_or(cores.max(2) as u32);
    let ways = Access::ALL.into_iter().flat_map(|access| [(access, 1), (access, readers)]);

    let mut rounds: Vec<Vec<Row>> = Vec::new();
    let mut described = None;
    for _ in 0..args.rounds {
        let mut rows = Vec::new();
        for (access, readers) in ways.clone() {
            let mut null = None;
            for shown in Shown::ALL {
                let mount = Mounted::new(shown)?;
                let mut row = measure(&mount, &files, args.size, (access, readers), &stop)?;
                let ceiling = *null.get_or_insert(row.cold_gb_per_s);
                row.cold_of_null = row.cold_gb_per_s / ceiling;
                rows.push(row);
                if shown == Shown::Quantized {
                    described = Some(mount.status()?);
                }
            }
        }
        rounds.push(rows);
    }
    let status = described.expect("at least one round");
    let rows: Vec<Row> = (0..rounds[0].len()).map(|row| median(&rounds, row)).collect();
    match args.json {
        true => print(&as_json(&status, args.rounds, cores, &rows)),
        false => print(&as_text(&status, args.rounds, cores, &rows)),
    }
}

/// Serves a view on `point`, in the background, until it is unmounted.
fn serve(args: &BenchArgs, shown: Shown, point: &Path) -> Result<()> {
    let budget = args.budget.mounted();
    let open = || match shown {
        Shown::Dense => {
            let request = Request { format: "dense".to_owned(), ..Request::default() };
            View::open(&args.model, &request, budget)
        }
        Shown::Null | Shown::Quantized => args.recipe.open(&args.model, budget),
    };
    let options = Options {
        mountpoint: point.to_owned(),
        allow_other: false,
        log: None,
        null: shown == Shown::Null,
    };
    mount::daemonize(None, |ready| mount::run(open, &options, ready))
}

/// The shards that `size` bytes are read from in every view, below the root. Reads what they are
/// made from, so that it lies in the page cache.
fn warm_up(view: &View, size: u64, stop: &AtomicBool) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut shown = 0;
    for (node, model, shard) in view.shards() {
        if shown >= size {
            break;
        }
        let source = &model.checkpoint().shards()[shard].file;
        let whole = 0..source.len();
        read(source.path(), whole, stop).map_err(|cause| Error::io(source.name(), cause))?;
        if let NodeKind::File { size } = view.tree().nodes()[node].kind {
            shown += size;
        }
        files.push(view.tree().path(node));
    }
    Ok(files)
}

/// A mount of this program's own, in a directory of its own, until it is dropped.
struct Mounted {
    shown: Shown,
    dir: TempDir,
    process: Child,
}

impl Mounted {
    /// Runs this program again, with the arguments that it was given.
    fn new(shown: Shown) -> Result<Self> {
        let dir = TempDir::with_prefix("aq-fs-bench-")
            .map_err(|cause| Error::io("temporary directory", cause))?;
        let given = std::env::args_os().skip(1);
        let point = dir.path().as_os_str().to_owned();
        let more = ["--serve".into(), shown.name().into(), "--point".into(), point];
        let args: Vec<OsString> = given.chain(more).collect();
        let (_, process) = mount::start(args)?;
        Ok(Self { shown, dir, process })
    }

    fn status(&self) -> Result<Status> {
        let found = mount::resolve(self.dir.path())?;
        let mounts = mount::list()?.into_iter();
        let mut of_it = mounts.filter(|mount| mount.mountpoint == found);
        let status = of_it.next().and_then(|mount| mount.status);
        status.ok_or_else(|| Error::new(ErrorKind::Io, "the mount's process doesn't answer"))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        match mount::unmount(self.dir.path()) {
            Ok(Unmounted::Gone) => {
                // It has ended.
                let _ = self.process.wait();
            }
            Ok(Unmounted::InUse(_) | Unmounted::Lingering(_)) => {}
            Err(error) => super::complain(&error),
        }
    }
}

/// Reads what a fresh mount shows, and reads it again.
fn measure(
    mount: &Mounted,
    files: &[PathBuf],
    size: u64,
    (access, readers): (Access, u32),
    stop: &AtomicBool,
) -> Result<Row> {
    let root = mount.dir.path();
    let mut stretches = Vec::new();
    let mut left = size;
    for file in files {
        let path = root.join(file);
        let found = path.metadata().map_err(|cause| Error::io(path.display(), cause))?;
        let len = found.len().min(left);
        left -= len;
        stretches.push((path, len));
    }
    let before = mount.status()?;
    let reader_before = cpu_ns(ClockId::ProcessCPUTime);
    let cold = read_all(&stretches, access, readers, stop)?;
    let reader_ns = cpu_ns(ClockId::ProcessCPUTime) - reader_before;
    let after = mount.status()?;
    let warm = read_all(&stretches, access, readers, stop)?;

    let bytes: u64 = stretches.iter().map(|(_, len)| len).sum();
    // Nanoseconds of a byte are seconds of a GB.
    let per_gb = |ns: u64| ns as f64 / bytes as f64;
    Ok(Row {
        view: mount.shown,
        access,
        readers,
        cold_gb_per_s: 1.0 / per_gb(cold),
        cold_of_null: 1.0,
        warm_gb_per_s: 1.0 / per_gb(warm),
        daemon_cpu_s_per_gb: per_gb(after.cpu_ns - before.cpu_ns),
        encode_cpu_s_per_gb: per_gb(after.stats.encode_ns - before.stats.encode_ns),
        reader_cpu_s_per_gb: per_gb(reader_ns),
        bytes,
    })
}

/// Reads every stretch, from a file's start to a length, and returns how many nanoseconds it took.
fn read_all(
    stretches: &[(PathBuf, u64)],
    access: Access,
    readers: u32,
    stop: &AtomicBool,
) -> Result<u64> {
    let started = Instant::now();
    for (path, len) in stretches {
        let part = |reader: u32| {
            let at = |i: u32| len * u64::from(i) / u64::from(readers);
            let part = at(reader)..at(reader + 1);
            match access {
                Access::Read => read(path, part, stop),
                Access::Mmap => walk(path, part, stop),
            }
        };
        let outcome: io::Result<()> = thread::scope(|scope| {
            let others: Vec<_> =
                (1..readers).map(|reader| scope.spawn(move || part(reader))).collect();
            let mine = part(0);
            let others = others.into_iter().map(|other| other.join().expect("it can't panic"));
            std::iter::once(mine).chain(others).collect()
        });
        outcome.map_err(|cause| Error::io(path.display(), cause))?;
    }
    Ok(u64::try_from(started.elapsed().as_nanos()).expect("it took less than 500 years"))
}

fn read(path: &Path, range: Range<u64>, stop: &AtomicBool) -> io::Result<()> {
    let file = File::open(path)?;
    let mut buffer = vec![0; PIECE as usize];
    for piece in pieces(range) {
        if stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        file.read_exact_at(&mut buffer[..(piece.end - piece.start) as usize], piece.start)?;
    }
    Ok(())
}

/// Reads every byte of a memory map.
fn walk(path: &Path, range: Range<u64>, stop: &AtomicBool) -> io::Result<()> {
    let file = File::open(path)?;
    #[expect(unsafe_code, reason = "what it maps is a read-only mount, or a file only read here")]
    // SAFETY: nobody writes to the files of a mount.
    let map = unsafe { Mmap::map(&file)? };
    let mut sum = 0u64;
    for piece in pieces(range) {
        if stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let bytes = &map[piece.start as usize..piece.end as usize];
        let (words, rest) = bytes.as_chunks::<8>();
        sum = words.iter().fold(sum, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)));
        sum = rest.iter().fold(sum, |sum, byte| sum.wrapping_add(u64::from(*byte)));
    }
    std::hint::black_box(sum);
    Ok(())
}

fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let starts = range.clone().step_by(PIECE as usize);
    starts.map(move |start| start..range.end.min(start + PIECE))
}

/// A line of the table with the median of each figure over all rounds.
fn median(rounds: &[Vec<Row>], row: usize) -> Row {
    let middle = |figure: fn(&Row) -> f64| {
        let mut figures: Vec<f64> = rounds.iter().map(|rows| figure(&rows[row])).collect();
        figures.sort_by(f64::total_cmp);
        let middle = figures.len() / 2;
        match figures.len() % 2 {
            1 => figures[middle],
            _ => (figures[middle - 1] + figures[middle]) / 2.0,
        }
    };
    Row {
        cold_gb_per_s: middle(|row| row.cold_gb_per_s),
        cold_of_null: middle(|row| row.cold_of_null),
        warm_gb_per_s: middle(|row| row.warm_gb_per_s),
        daemon_cpu_s_per_gb: middle(|row| row.daemon_cpu_s_per_gb),
        encode_cpu_s_per_gb: middle(|row| row.encode_cpu_s_per_gb),
        reader_cpu_s_per_gb: middle(|row| row.reader_cpu_s_per_gb),
        ..rounds[0][row]
    }
}

fn as_json(status: &Status, rounds: u32, cores: usize, rows: &[Row]) -> String {
    let all = json!({
        "version": status.version,
        "model": status.model,
        "shown_as": status.shown_as,
        "cores": cores,
        "rounds": rounds,
        "advice": status.advice,
        "rows": rows,
    });
    serde_json::to_string_pretty(&all).expect("JSON serializes") + "\n"
}

fn as_text(status: &Status, rounds: u32, cores: usize, rows: &[Row]) -> String {
    let mut out = format!(
        "{}\nquantized: {}\n{cores} cores; medians of {rounds} rounds\n\n{:<10} {:<6} {:>7} {:>8} {:>6} {:>8} \
         {:>9} {:>10} {:>7} {:>6}\n",
        status.model.display(),
        status.shown_as,
        "view",
        "access",
        "readers",
        "size",
        "cold",
        "of null",
        "CPU-s/GB",
        "in encode",
        "reader",
        "warm"
    );
    for row in rows {
        let _ = writeln!(
            out,
            "{:<10} {:<6} {:>7} {:>8} {:>6.2} {:>8.2} {:>9.2} {:>10.2} {:>7.2} {:>6.2}",
            row.view.name(),
            row.access.name(),
            row.readers,
            bytes(row.bytes),
            row.cold_gb_per_s,
            row.cold_of_null,
            row.daemon_cpu_s_per_gb,
            row.encode_cpu_s_per_gb,
            row.reader_cpu_s_per_gb,
            row.warm_gb_per_s,
        );
    }
    if let Some(advice) = &status.advice {
        let _ = writeln!(out, "\n{advice}");
    }
    out
}
