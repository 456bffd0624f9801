//! The command line: flags to requests, errors to exit codes.

mod bench;
mod export;
mod inspect;
mod mount;
mod status;
mod unmount;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand, ValueEnum};

use crate::error::{self, Error, ErrorKind, Result};
use crate::format::FORMATS;
use crate::loader::{self, LOADERS, Loader};
use crate::memory;
use crate::mount::raises_read_ahead;
use crate::quant::{Granularity, Quality, Real, Storage};
use crate::recipe::{Override, Request, ScaleFormat};
use crate::view::{Budget, View};

/// Show a safetensors checkpoint as a quantized one, without writing it.
///
/// aq-fs mounts a model directory as a read-only file system in which the weights are quantized.
/// Nothing is converted beforehand: headers, index and config.json are made up when the model is
/// mounted, and codes and scales when somebody reads them. Loaders see an ordinary checkpoint.
#[derive(Debug, Parser)]
#[command(name = "aq-fs", version, max_term_width = 100, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Mount(mount::MountArgs),
    Unmount(unmount::UnmountArgs),
    Status(status::StatusArgs),
    /// Say what a mount would show of a model, tensor by tensor, and why
    Inspect(inspect::InspectArgs),
    /// Write what a mount would show to a directory
    Export(export::ExportArgs),
    Bench(bench::BenchArgs),
}

const AFTER_HELP: &str = "\
Examples:
  aq-fs mount ~/models/Llama-3-8B /mnt/q --bits 4
  aq-fs status
  aq-fs unmount /mnt/q

Exit codes:
  0  done
  1  the system refused or failed: reading, writing, mounting
  2  the request is wrong: a flag, a pattern, a mountpoint, an output directory
  3  there is no such model, file or mount
  4  the model is damaged
  5  not supported: this model, in this format, or this machine, which lacks FUSE
  6  the model changed while it was being read";

/// Runs the program with the arguments of this process, and says how it went.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let outcome = match cli.command {
        Command::Mount(args) => mount::run(&args),
        Command::Unmount(args) => unmount::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(exit_code(error.kind()))
        }
    }
}

/// Answers a command line that can't be run: with the help or version asked for, or on one line.
fn refuse(error: &clap::Error) -> ExitCode {
    let help = clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if !error.use_stderr() || error.kind() == help {
        // Nobody is left to hear of it where the stream is gone.
        let _ = error.print();
        return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
    }
    let text = error.to_string();
    let text = text.split("\n\nFor more information").next().unwrap_or_default();
    eprintln!("aq-fs: {}", one_line(text.strip_prefix("error: ").unwrap_or(text)));
    ExitCode::from(exit_code(ErrorKind::Invalid))
}

/// The exit codes that `--help` lists.
fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Io => 1,
        ErrorKind::Invalid => 2,
        ErrorKind::NotFound => 3,
        ErrorKind::Corrupt => 4,
        ErrorKind::Unsupported => 5,
        ErrorKind::Stale => 6,
    }
}

fn complain(error: &Error) {
    eprintln!("aq-fs: {}", one_line(&error.to_string()));
}

/// Prints what the user should know to standard error, a line each.
fn warn_all(warnings: &[String]) {
    for warning in warnings {
        eprintln!("aq-fs: warning: {}", one_line(warning));
    }
}

fn one_line(text: &str) -> String {
    let lines = text.split('\n').map(str::trim).filter(|line| !line.is_empty());
    error::escaped(&lines.collect::<Vec<_>>().join("; "))
}

/// Prints `text` to standard output, to whoever still reads it.
fn print(text: &str) -> Result<()> {
    use std::io::Write as _;
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever pipes it into `head` has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|cause| Error::io("standard output", cause)),
    }
}

/// A number of bytes as people read it: `512 B`, `1.5 GiB`.
fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // What would be rounded to 1024 belongs to the next unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// How a model is quantized.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Recipe")]
struct RecipeArgs {
    /// The program that will load it: picks a format that suits it, refuses what it can't load, and
    /// prints how it is told to
    #[arg(
        long = "for",
        value_name = "LOADER",
        value_parser = PossibleValuesParser::new(loader_names())
    )]
    loader: Option<String>,

    /// How the quantized checkpoint is written down [default: compressed-tensors, or dense where
    /// plain numbers are asked for]
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(format_names()))]
    format: Option<String>,

    /// Bits per weight, 2 to 8 where the format has them [default: the format's, mostly 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    bits: Option<u8>,

    /// Bits by purpose: 2 for edge devices, 4 for a local machine, 8 for the cloud
    #[arg(long, value_name = "NAME", conflicts_with = "bits")]
    profile: Option<Profile>,

    /// Weights of a row that share a scale: a number, or `channel` for the whole row
    /// [default: the format's, mostly 128]
    #[arg(long, value_name = "N|channel", value_parser = str::parse::<Granularity>)]
    group_size: Option<Granularity>,

    /// Codes are centred on zero [default: the format's, mostly this]
    #[arg(long, conflicts_with = "asymmetric")]
    symmetric: bool,

    /// Each group has a zero point
    #[arg(long)]
    asymmetric: bool,

    /// How scales are chosen: by error search, by one that takes up to about ten times as long, or as the
    /// format's own tool does, bit for bit
    #[arg(long, value_name = "NAME", value_enum, default_value_t = QualityArg::Search)]
    quality: QualityArg,

    /// What the errors of each input feature count for in that search: an imatrix of llama.cpp (.gguf
    /// or .dat), or a .safetensors file that has a number for each input feature of a weight by the
    /// weight's name
    #[arg(long, value_name = "FILE")]
    importance: Option<PathBuf>,

    /// How the scales of FP8 blocks are stored [default: f32]
    #[arg(long, value_name = "TYPE", value_enum)]
    scale_format: Option<ScaleFormatArg>,

    /// What codes of bitsandbytes are declared as, for sharded training [default: u8]
    #[arg(long, value_name = "TYPE", value_enum)]
    storage: Option<StorageArg>,

    /// Quantize the scales of bitsandbytes' 4 bits as well
    #[arg(long)]
    double_quant: bool,

    /// Show plain numbers that carry the error of this format. Beside another --format: those of a
    /// diffusers pipeline's own components, which are shown as they are otherwise
    #[arg(long, value_name = "NAME")]
    simulate: Option<String>,

    /// The element type of plain numbers [default: the source's]
    #[arg(long, value_name = "TYPE", value_enum)]
    dtype: Option<RealArg>,

    /// Keep modules whose name matches this glob, or regex after `re:`; repeatable
    #[arg(long, value_name = "PATTERN")]
    skip: Vec<String>,

    /// Quantize only modules whose name matches this glob, or regex after `re:`; repeatable
    ///
    /// It also opts in the vision and audio towers and projectors that it matches.
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,

    /// Quantize modules whose name matches otherwise: to BITS, in groups of GROUP or `channel`, or
    /// not at all where BITS is `keep`; repeatable
    ///
    /// Of several that match a module, the last one counts. Weights that loaders read as one (q, k and
    /// v; gate and up; all experts) share what any of them is set to. A vision or audio tower or a
    /// projector is opted in by a pattern that names it. compressed-tensors and mlx can mix schemes;
    /// in other formats modules can only be kept.
    #[arg(long, value_name = "PATTERN=BITS[/GROUP]", value_parser = str::parse::<Override>)]
    set: Vec<Override>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Profile {
    Edge,
    Local,
    Cloud,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum QualityArg {
    Best,
    Search,
    Reference,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ScaleFormatArg {
    F32,
    Ue8m0,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum StorageArg {
    U8,
    Bf16,
    F16,
    F32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RealArg {
    Bf16,
    F16,
    F32,
}

impl RecipeArgs {
    /// The loader that is named, if one is.
    fn loader(&self) -> Option<&'static Loader> {
        self.loader.as_deref().map(|name| loader::find(name).expect("a name that was offered"))
    }

    /// The view of a model, if the loader that is named can load it.
    fn open(&self, model: &Path, budget: Budget) -> Result<View> {
        let request = self.request();
        let loader = self.loader();
        if let Some(loader) = loader {
            loader.check_format(&request.format)?;
        }
        let view = View::open(model, &request, budget)?;
        if let Some(loader) = loader {
            loader.check(&view, &request)?;
        }
        Ok(view)
    }

    /// What to type to load `path`, which shows the model in `source`; nothing where no loader is
    /// named.
    fn lines(&self, source: &Path, path: &Path) -> String {
        let Some(loader) = self.loader() else { return String::new() };
        let text = std::fs::read_to_string(source.join("config.json")).unwrap_or_default();
        let config = serde_json::from_str(&text).ok();
        loader.lines(&self.request(), config.as_ref(), &path.display().to_string()) + "\n"
    }

    fn request(&self) -> Request {
        let bits = self.profile.map(|profile| match profile {
            Profile::Edge => 2,
            Profile::Local => 4,
            Profile::Cloud => 8,
        });
        let dense = self.simulate.is_some() || self.dtype.is_some();
        let preferred = self.loader().map_or("compressed-tensors", |loader| loader.prefers);
        let format = if dense { "dense" } else { preferred };
        Request {
            format: self.format.clone().unwrap_or_else(|| format.to_owned()),
            bits: self.bits.or(bits),
            granularity: self.group_size,
            symmetric: (self.symmetric || self.asymmetric).then_some(self.symmetric),
            quality: match self.quality {
                QualityArg::Best => Quality::Best,
                QualityArg::Search => Quality::Search,
                QualityArg::Reference => Quality::Reference,
            },
            importance: self.importance.clone(),
            scale_format: self.scale_format.map(|format| match format {
                ScaleFormatArg::F32 => ScaleFormat::F32,
                ScaleFormatArg::Ue8m0 => ScaleFormat::Ue8m0,
            }),
            storage: self.storage.map(|storage| match storage {
                StorageArg::U8 => Storage::U8,
                StorageArg::Bf16 => Storage::Bf16,
                StorageArg::F16 => Storage::F16,
                StorageArg::F32 => Storage::F32,
            }),
            double_quant: self.double_quant,
            simulate: self.simulate.clone(),
            dtype: self.dtype.map(|dtype| match dtype {
                RealArg::Bf16 => Real::Bf16,
                RealArg::F16 => Real::F16,
                RealArg::F32 => Real::F32,
            }),
            skip: self.skip.clone(),
            only: self.only.clone(),
            set: self.set.clone(),
        }
    }
}

fn loader_names() -> Vec<clap::builder::PossibleValue> {
    LOADERS.iter().map(|l| clap::builder::PossibleValue::new(l.name).help(l.about)).collect()
}

fn format_names() -> Vec<clap::builder::PossibleValue> {
    FORMATS.iter().map(|f| clap::builder::PossibleValue::new(f.name()).help(f.about())).collect()
}

/// Memory knobs.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Memory")]
struct BudgetArgs {
    /// Memory for quantized weights that were read once and may be read again: K, M and G are
    /// powers of 1024; the rest of the program takes at most 64M more [default: 256M, or an eighth
    /// of what the machine or its control group (cgroup) has, if that is less]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    cache_size: Option<u64>,
}

/// Encoded ahead of each sequential reader of a mount, in bytes.
const AHEAD: u64 = 16 << 20;

/// Bytes of source that a chunk of a mount is encoded from where the kernel reads far ahead: so few that
/// most of what it asks for at a time are whole ones, which are encoded where the reply is sent from.
const CHUNK: u64 = 256 << 10;

impl BudgetArgs {
    /// That of a mount.
    fn mounted(&self) -> Budget {
        let budget = self.budget();
        let chunk = if raises_read_ahead() { CHUNK } else { budget.chunk };
        Budget { ahead: AHEAD, chunk: budget.chunk.min(chunk), ..budget }
    }

    fn budget(&self) -> Budget {
        let budget = Budget::default();
        let cache = self.cache_size.unwrap_or_else(|| budget.cache.min(memory::limit() / 8));
        // A chunk that fills the cache would push out all others.
        let chunk = budget.chunk.min((cache / 16).max(64 << 10));
        Budget { cache, chunk, ..budget }
    }
}

/// Parses `4096`, `64K`, `256M`, `1.5GiB`, `2GB`.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_uppercase();
    let factor = match unit.as_str() {
        "" | "B" => 1u64,
        "K" | "KIB" => 1 << 10,
        "M" | "MIB" => 1 << 20,
        "G" | "GIB" => 1 << 30,
        "T" | "TIB" => 1 << 40,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(format!("{unit:?} is no unit: K, M or G")),
    };
    let number: f64 = number.parse().map_err(|_| "a size is a number and a unit, as 256M")?;
    Ok((number * factor as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_as_they_are_written_elsewhere() {
        let cases = [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("64k", Some(64 << 10)),
            ("256M", Some(256 << 20)),
            ("1.5GiB", Some(3 << 29)),
            ("2GB", Some(2_000_000_000)),
            ("1 M", Some(1 << 20)),
            ("", None),
            ("M", None),
            ("-1", None),
            ("1.2.3", None),
            ("12 parsecs", None),
        ];
        for (text, expected) in cases {
            assert_eq!(size(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn bytes_are_printed_with_one_decimal_in_the_largest_unit_that_fits() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "16384.0 PiB"),
        ];
        for (number, expected) in cases {
            assert_eq!(bytes(number), expected);
        }
    }

    #[test]
    fn flags_become_the_request_that_they_spell() {
        #[derive(Parser)]
        struct Only {
            #[command(flatten)]
            recipe: RecipeArgs,
        }
        let parse = |line: &str| {
            let words = std::iter::once("x").chain(line.split_whitespace());
            Only::try_parse_from(words).map(|only| only.recipe.request()).ok()
        };
        let base = Request::default;
        let cases = [
            ("", Some(base())),
            ("--bits 3", Some(Request { bits: Some(3), ..base() })),
            ("--profile edge", Some(Request { bits: Some(2), ..base() })),
            ("--profile cloud", Some(Request { bits: Some(8), ..base() })),
            ("--profile local --bits 4", None),
            (
                "--group-size channel",
                Some(Request { granularity: Some(Granularity::Channel), ..base() }),
            ),
            (
                "--group-size 32",
                Some(Request { granularity: Some(Granularity::Group(32)), ..base() }),
            ),
            ("--group-size 0", None),
            ("--group-size row", None),
            ("--symmetric", Some(Request { symmetric: Some(true), ..base() })),
            ("--asymmetric", Some(Request { symmetric: Some(false), ..base() })),
            ("--asymmetric --symmetric", None),
            (
                "--importance a/b.gguf",
                Some(Request { importance: Some("a/b.gguf".into()), ..base() }),
            ),
            ("--quality best", Some(Request { quality: Quality::Best, ..base() })),
            ("--quality reference", Some(Request { quality: Quality::Reference, ..base() })),
            (
                "--dtype f16",
                Some(Request { format: "dense".into(), dtype: Some(Real::F16), ..base() }),
            ),
            (
                "--simulate mlx --bits 3",
                Some(Request {
                    format: "dense".into(),
                    simulate: Some("mlx".into()),
                    bits: Some(3),
                    ..base()
                }),
            ),
            (
                "--format bnb-nf4 --simulate mlx",
                Some(Request { format: "bnb-nf4".into(), simulate: Some("mlx".into()), ..base() }),
            ),
            (
                "--skip a --skip re:b --only c",
                Some(Request {
                    skip: vec!["a".into(), "re:b".into()],
                    only: vec!["c".into()],
                    ..base()
                }),
            ),
            (
                "--set *.down_proj=8/channel --set a=keep",
                Some(Request {
                    set: ["*.down_proj=8/channel", "a=16"]
                        .map(|s| s.parse().expect("valid"))
                        .into(),
                    ..base()
                }),
            ),
            ("--for mlx-lm", Some(Request { format: "mlx".to_owned(), ..base() })),
            ("--for vllm --format ct-fp8", Some(Request { format: "ct-fp8".to_owned(), ..base() })),
            ("--for nobody", None),
            ("--set a", None),
            ("--set a=x", None),
            ("--format no-such", None),
        ];
        for (line, expected) in cases {
            assert_eq!(parse(line), expected, "{line}");
        }
    }
}
