//! `aq-fs unmount`: ends mounts, live or dead.

use std::path::PathBuf;

use super::complain;
use crate::error::{Error, Result};
use crate::mount::{self, Unmounted};

/// Unmount what aq-fs has mounted, live or dead
///
/// Waits until it is gone and its process has ended. A mount that is in use is taken out of the
/// directory tree at once; whoever has files of it open may go on reading them.
#[derive(Debug, clap::Args)]
pub(super) struct UnmountArgs {
    /// Where models are mounted
    #[arg(value_name = "MOUNTPOINT", required_unless_present = "all")]
    mountpoints: Vec<PathBuf>,

    /// Unmount everything that aq-fs has mounted for this user; for root, everything
    #[arg(long, conflicts_with = "mountpoints")]
    all: bool,
}

pub(super) fn run(args: &UnmountArgs) -> Result<()> {
    let mountpoints = if args.all { mount::mountpoints()? } else { args.mountpoints.clone() };
    let mut failed: Option<Error> = None;
    for mountpoint in &mountpoints {
        match mount::unmount(mountpoint) {
            Ok(Unmounted::Gone) => {}
            Ok(Unmounted::InUse(pid)) => {
                let server = pid.map_or_else(String::new, |pid| format!(" by process {pid}"));
                eprintln!(
                    "aq-fs: {}: in use: unmounted, and served{server} until its last reader is done",
                    mountpoint.display()
                );
            }
            Ok(Unmounted::Lingering(pid)) => eprintln!(
                "aq-fs: {}: unmounted, but its process {pid} has not ended yet",
                mountpoint.display()
            ),
            // The last one is told by the caller.
            Err(error) => {
                if let Some(earlier) = failed.replace(error) {
                    complain(&earlier);
                }
            }
        }
    }
    failed.map_or(Ok(()), Err)
}
