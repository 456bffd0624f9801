//! `aq-fs status`: what is mounted, and how it fares.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::{bytes, print};
use crate::error::{self, Error, ErrorKind, Result};
use crate::mount::{self, Mount, State};

/// Say what is mounted, by which process, and what it has done
///
/// Fails where a mountpoint that is named isn't mounted, or doesn't answer.
#[derive(Debug, clap::Args)]
pub(super) struct StatusArgs {
    /// Only these [default: everything that aq-fs has mounted]
    #[arg(value_name = "MOUNTPOINT")]
    mountpoints: Vec<PathBuf>,

    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &StatusArgs) -> Result<()> {
    let mut mounts = mount::list()?;
    let mut failure = None;
    if !args.mountpoints.is_empty() {
        let mut named = Vec::new();
        for path in &args.mountpoints {
            match pick(&mut mounts, path) {
                Ok(mount) => {
                    failure = failure.or_else(|| ailment(&mount));
                    named.push(mount);
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        mounts = named;
    }
    let text = if args.json {
        let all: Vec<Value> = mounts.iter().map(as_json).collect();
        serde_json::to_string_pretty(&all).expect("JSON serializes") + "\n"
    } else {
        mounts.iter().map(as_text).collect::<Vec<_>>().join("\n")
    };
    print(&text)?;
    failure.map_or(Ok(()), Err)
}

fn pick(mounts: &mut Vec<Mount>, path: &Path) -> Result<Mount> {
    let resolved = mount::resolve(path)?;
    let found = mounts.iter().rposition(|mount| mount.mountpoint == resolved);
    found
        .map(|at| mounts.remove(at))
        .ok_or_else(|| error::not_found(format!("{}: not a mount of aq-fs", path.display())))
}

/// Why a mount can't be relied on.
fn ailment(mount: &Mount) -> Option<Error> {
    let why = match mount.state {
        State::Mounted | State::Foreign => return None,
        State::Detached => "unmounted, but still in use",
        State::Dead => "dead: its process is gone; `aq-fs unmount` removes it",
        State::Silent => "silent: its process doesn't answer",
    };
    Some(Error::new(ErrorKind::Io, format!("{}: {why}", mount.mountpoint.display())))
}

fn as_text(mount: &Mount) -> String {
    let state = match mount.state {
        State::Mounted => "mounted",
        State::Detached => "unmounted, but still in use",
        State::Dead => "dead: its process is gone",
        State::Silent => "silent: its process doesn't answer",
        State::Foreign => "mounted by another user",
    };
    let mut out = format!("{}\n", mount.mountpoint.display());
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "  {name:<9}{text}");
    };
    line("state", state.to_owned());
    line("model", mount.model.display().to_string());
    if let (None, Some(user)) = (&mount.status, mount.user) {
        line("user", user.to_string());
    }
    let Some(status) = &mount.status else { return out };
    line("format", status.shown_as.clone());
    let (shown, source) = (bytes(status.shown_bytes), bytes(status.source_bytes));
    line("size", format!("{shown} instead of {source}"));
    line("process", format!("{}, for {}", status.pid, duration(status.uptime())));
    let stats = &status.stats;
    line(
        "reads",
        format!(
            "{}, {} of them failed; {} from {} of source",
            status.reads,
            status.read_errors,
            bytes(stats.output_bytes),
            bytes(stats.source_bytes)
        ),
    );
    let rates = status.rates;
    let over = duration(Duration::from_millis(rates.over_ms));
    let (output, source) = (bytes(rates.output), bytes(rates.source));
    line("speed", format!("{output}/s from {source}/s of source, in the last {over}"));
    let asked = stats.cache_hits + stats.cache_misses;
    let percent = stats.cache_hits as f64 * 100.0 / asked.max(1) as f64;
    line(
        "cache",
        format!(
            "{} of {}; {} hits, {} misses ({percent:.1}% hits)",
            bytes(stats.cache_used),
            bytes(stats.cache_budget),
            stats.cache_hits,
            stats.cache_misses
        ),
    );
    if let Some(log) = &status.log {
        line("log", log.display().to_string());
    }
    for warning in &status.warnings {
        line("warning", warning.clone());
    }
    if let Some(advice) = &status.advice {
        line("advice", advice.clone());
    }
    out
}

/// One flat object: what is known of every mount, then what its process says.
fn as_json(mount: &Mount) -> Value {
    let mut object = json!({
        "mountpoint": mount.mountpoint.to_string_lossy(),
        "model": mount.model.to_string_lossy(),
        "state": mount.state,
        "user": mount.user,
    });
    if let Some(status) = &mount.status {
        object["uptime_seconds"] = json!(status.uptime().as_secs());
        let said = serde_json::to_value(status).unwrap_or_default();
        for (name, value) in said.as_object().into_iter().flatten() {
            if object.get(name).is_none() {
                object[name] = value.clone();
            }
        }
    }
    object
}

/// A time in its two largest units: `3d 4h`, `2m 5s`, `12s`.
fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h {}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86400, seconds / 3600 % 24),
    }
}
