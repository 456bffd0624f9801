//! `aq-fs export`: the bytes of a mount, on disk.

use std::path::PathBuf;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{BudgetArgs, RecipeArgs, bytes, print, warn_all};
use crate::error::Result;
use crate::export::{Options, export};

/// Arguments of `aq-fs export`.
#[derive(Debug, clap::Args)]
pub(super) struct ExportArgs {
    /// A model's directory, its index, or its only weight file
    model: PathBuf,

    /// The directory to write to: missing, or empty
    out: PathBuf,

    #[command(flatten)]
    recipe: RecipeArgs,

    #[command(flatten)]
    budget: BudgetArgs,

    /// Threads that read, encode and write [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Replace files that the output directory holds already
    #[arg(long)]
    overwrite: bool,

    /// No progress bar
    #[arg(short, long)]
    quiet: bool,
}

pub(super) fn run(args: &ExportArgs) -> Result<()> {
    let view = args.recipe.open(&args.model, args.budget.budget())?;
    warn_all(view.warnings());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let options = Options { threads: args.threads.unwrap_or(cores), overwrite: args.overwrite };
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
    if !args.quiet {
        println!(
            "{} files, {} in {:.1} s: {}",
            summary.files,
            bytes(summary.bytes),
            started.elapsed().as_secs_f64(),
            args.out.display()
        );
        print(&args.recipe.lines(view.root(), &args.out))?;
    }
    Ok(())
}
