//! `aq-fs mount`: shows a model, quantized, on a mountpoint.

use std::ffi::OsString;
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing_subscriber::EnvFilter;

use super::{BudgetArgs, RecipeArgs, bytes, print, warn_all};
use crate::error::{self, Error, Result};
use crate::mount::{self, Options, Ready};
use crate::view::View;

/// Mount a model as a quantized one
///
/// Returns once the mount answers, and leaves a process behind that serves it. That process ends
/// when the mount is unmounted, by `aq-fs unmount`, `umount` or `fusermount3 -u`, and unmounts it
/// when it is told to end by SIGINT, SIGTERM or SIGHUP. The model is never written, and must not
/// change while it is mounted: reads of a file that did fail.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct MountArgs {
    /// A model's directory, its index, or its only weight file; or a directory of models
    model: PathBuf,

    /// An empty directory
    mountpoint: PathBuf,

    /// Stay in the foreground, and log to standard error; Ctrl-C unmounts
    #[arg(short, long)]
    foreground: bool,

    /// Let other users read the mount
    ///
    /// For anybody but root this takes a line `user_allow_other` in /etc/fuse.conf.
    #[arg(long)]
    allow_other: bool,

    /// Log to this file [default: below $XDG_STATE_HOME/aq-fs or ~/.local/state/aq-fs]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,

    #[command(flatten)]
    recipe: RecipeArgs,

    #[command(flatten)]
    budget: BudgetArgs,

    /// Be the process in the background
    #[arg(long, hide = true, conflicts_with = "foreground")]
    daemon: bool,
}

const AFTER_HELP: &str = "\
Examples:
  aq-fs mount ~/models/Llama-3-8B /mnt/q
  aq-fs mount ~/models/Llama-3-8B /mnt/q --bits 8 --group-size channel
  aq-fs mount ~/models/Mixtral /mnt/q --skip '*.gate' --skip 're:layers\\.[01]\\.' --cache-size 1G
  aq-fs mount ~/models/Llama-3-8B /mnt/q -f

Set AQ_FS_LOG=debug, or any other filter of the `tracing` crate, to log more.";

pub(super) fn run(args: &MountArgs) -> Result<()> {
    if args.daemon {
        return in_background(args);
    }
    if args.foreground {
        let log = if args.log.is_some() { open_log(args)? } else { None };
        let (file, path) = log.unzip();
        start_logging(file);
        return mount::run(|| open(args), &options(args, path)?, &mut |ready| {
            announce(args, &ready)
        });
    }
    // The subcommand is the first argument: nothing may stand before it.
    let given = std::env::args_os().skip(2);
    let subcommand = ["mount", "--daemon"].map(OsString::from);
    let (ready, _) = mount::start(subcommand.into_iter().chain(given))?;
    announce(args, &ready).inspect_err(|_| {
        // Who is told of a failure takes it that nothing is mounted.
        let _ = mount::unmount(&ready.mountpoint);
    })
}

/// Opens the log that was asked for, or else the usual one.
fn open_log(args: &MountArgs) -> Result<Option<(Arc<File>, PathBuf)>> {
    let mountpoint = mountpoint(args)?;
    let Some(log) = &args.log else { return mount::open_log(None, &mountpoint) };
    let dir_of = |path: &Path| path.parent().map(|dir| Path::new(".").join(dir));
    // The file, or where it will be.
    let place = log.canonicalize().ok().or_else(|| dir_of(log)?.canonicalize().ok());
    let model = if args.model.is_dir() { Some(args.model.clone()) } else { dir_of(&args.model) };
    let dirs = [(model, "model, which is never written"), (Some(mountpoint.clone()), "mountpoint")];
    for (dir, what) in dirs {
        let dir = dir.and_then(|dir| dir.canonicalize().ok());
        if let (Some(place), Some(dir)) = (&place, dir)
            && place.starts_with(dir)
        {
            return Err(error::invalid(format!("log {}: inside of the {what}", log.display())));
        }
    }
    mount::open_log(Some(log), &mountpoint)
}

fn mountpoint(args: &MountArgs) -> Result<PathBuf> {
    std::path::absolute(&args.mountpoint)
        .map_err(|cause| Error::io(args.mountpoint.display(), cause))
}

fn in_background(args: &MountArgs) -> Result<()> {
    let log = open_log(args);
    let (file, path) = log.as_ref().ok().cloned().flatten().unzip();
    if let Some(file) = &file {
        start_logging(Some(file.clone()));
    }
    let outcome = mount::daemonize(file.as_deref(), |ready| {
        log?;
        mount::run(|| open(args), &options(args, path)?, ready)
    });
    if let Err(error) = outcome {
        tracing::error!("{error}");
        // Told already, to the process that waits or, after that, to the log.
        std::process::exit(super::exit_code(error.kind()).into());
    }
    Ok(())
}

fn open(args: &MountArgs) -> Result<View> {
    args.recipe.open(&args.model, args.budget.mounted())
}

fn options(args: &MountArgs, log: Option<PathBuf>) -> Result<Options> {
    Ok(Options { mountpoint: mountpoint(args)?, allow_other: args.allow_other, log, null: false })
}

fn announce(args: &MountArgs, ready: &Ready) -> Result<()> {
    warn_all(&ready.warnings);
    print(&format!(
        "{}: {} as {}, {} instead of {}\n{}",
        ready.mountpoint.display(),
        ready.model.display(),
        ready.shown_as,
        bytes(ready.shown_bytes),
        bytes(ready.source_bytes),
        args.recipe.lines(&ready.model, &ready.mountpoint),
    ))
}

/// Logs to `file`, or to standard error.
fn start_logging(file: Option<Arc<File>>) {
    // Replies to readers that were killed fail, of which `fuser` makes too much.
    let filter =
        EnvFilter::try_from_env("AQ_FS_LOG").unwrap_or_else(|_| EnvFilter::new("info,fuser=off"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match file {
        Some(file) => builder.with_ansi(false).with_writer(file).init(),
        None => {
            let ansi = std::io::stderr().is_terminal();
            builder.with_ansi(ansi).with_writer(std::io::stderr).init();
        }
    }
}
