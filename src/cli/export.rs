//! `aq-fs export`: the bytes of a mount, on disk.

use std::path::PathBuf;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{RecipeArgs, bytes, print, warn_all};
use crate::error::Result;
use crate::export::{Found, Options, Step, export, find};
use crate::view::Budget;

/// Write what a mount would show to a directory
///
/// A run that was ended, be it by `kill -9` or a power cut, is gone on with by the same command. One
/// whose model, recipe or version of aq-fs is another by then starts over, and says so.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct ExportArgs {
    /// A model's directory, its index, or its only weight file
    model: PathBuf,

    /// The directory to write to: missing, empty, or with a part of this export in it
    out: PathBuf,

    #[command(flatten)]
    recipe: RecipeArgs,

    /// Threads that read, encode and write [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Replace files that the output directory holds already. Weights by other names that it holds must be
    /// removed first, as loaders might read those
    #[arg(long)]
    overwrite: bool,

    /// Write only the I-th of N parts of the shards: no two parts share a file, and together they
    /// are all shards. Parts may run anywhere, at the same time, in any order
    #[arg(long, value_name = "I/N", value_parser = part)]
    shards: Option<(u32, u32)>,

    /// Write what remains when every part is written: config, index and other small files. Fails
    /// where a shard is missing, not whole, or of another model or recipe
    #[arg(long, conflicts_with_all = ["shards", "overwrite"])]
    finish: bool,

    /// No progress bar
    #[arg(short, long)]
    quiet: bool,
}

const AFTER_HELP: &str = "\
Many machines, one export, over a file system that they share; here a Slurm array of 8:
  job=$(sbatch --parsable --array=1-8 \\
    --wrap 'aq-fs export MODEL OUT --bits 4 --shards $SLURM_ARRAY_TASK_ID/8')
  sbatch --dependency=afterok:$job --wrap 'aq-fs export MODEL OUT --bits 4 --finish'

A task that is run again writes what it lacks. The last step is one of its own because only whoever
started the tasks knows that all have ended: none of them can rely on what a shared file system
shows it of the others.";

pub(super) fn run(args: &ExportArgs) -> Result<()> {
    // Nothing is read twice: there is nothing to keep.
    let budget = Budget { cache: 0, ..Budget::default() };
    let view = args.recipe.open(&args.model, budget)?;
    warn_all(view.warnings());
    let step = match args.shards {
        Some((index, of)) => Step::Part { index, of },
        None if args.finish => Step::Finish,
        None => Step::Whole,
    };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.map_or_else(cores, usize::from);
    let options = Options { threads, overwrite: args.overwrite, step };
    let found = find(&view, &args.out)?;
    let out = args.out.display();
    match &found {
        Found::Outdated(why) if step != Step::Finish => {
            eprintln!("aq-fs: {out}: {why}: starting over")
        }
        Found::Begun { bytes: kept } if !args.quiet && *kept > 0 => {
            eprintln!("aq-fs: {out}: going on, {} are there", bytes(*kept));
        }
        _ => {}
    }
    let bar = ProgressBar::with_draw_target(
        None,
        if args.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() },
    );
    bar.set_style(
        ProgressStyle::with_template(
            "{bar:40} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        )
        .expect("the template is valid"),
    );
    let started = Instant::now();
    let summary = export(&view, &args.out, options, &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    warn_all(&view.news());
    if args.quiet {
        return Ok(());
    }
    if found == Found::Finished && !args.overwrite {
        return print(&format!("{out}: finished already: nothing to do\n"));
    }
    let part = match step {
        Step::Part { index, of } => format!("part {index} of {of}: "),
        Step::Whole | Step::Finish => String::new(),
    };
    let kept = match summary.kept {
        0 => String::new(),
        kept => format!(", {} of them there before", bytes(kept)),
    };
    print(&format!(
        "{part}{} files, {}{kept} in {:.1} s: {out}\n{}",
        summary.files,
        bytes(summary.bytes),
        started.elapsed().as_secs_f64(),
        args.recipe.lines(view.root(), &args.out),
    ))
}

/// Parses `3/8`.
fn part(text: &str) -> Result<(u32, u32), String> {
    let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match numbers {
        Some((index, of)) if (1..=of).contains(&index) => Ok((index, of)),
        _ => Err("neither 1/N nor up to N/N".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_count_from_one() {
        let cases = [
            ("1/1", Some((1, 1))),
            ("3/8", Some((3, 8))),
            ("8/8", Some((8, 8))),
            ("0/8", None),
            ("9/8", None),
            ("1/0", None),
            ("1", None),
            ("-1/8", None),
            ("a/b", None),
            ("1/2/3", None),
        ];
        for (text, expected) in cases {
            assert_eq!(part(text).ok(), expected, "{text:?}");
        }
    }
}
