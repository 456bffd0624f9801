//! What an output directory holds before an export.

use std::collections::HashSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind as IoKind;
use std::path::{Path, PathBuf};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::journal::{self, Subject, hidden};
use super::target::remove;
use super::{Files, Output, dirs};
use crate::error::{self, Error, Result};
use crate::view::{Identity, View, is_weights};

/// The attribute of a finished export's directory that tells of which view it is.
const SEAL: &str = "user.aq-fs.export";

/// What an output directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No file, if it is there at all.
    Nothing,
    /// The beginning of an export of this view.
    Begun {
        /// Bytes that need not be written again.
        bytes: u64,
    },
    /// The beginning of an export that would be another now, and why. It starts over.
    Outdated(String),
    /// This export, all of it.
    Finished,
    /// Something else, in words for the user.
    Foreign(String),
}

/// What `out` holds of an export of `view`.
///
/// # Errors
/// `Invalid` where `out` is inside of the model, or has a directory where a file is to be; `Io` where it
/// can't be read.
pub fn find(view: &View, out: &Path) -> Result<Found> {
    // A link in it may lead there, too.
    dirs(view, out).try_for_each(|dir| check_outside(view, &dir))?;
    let subject = Subject { identity: view.identity(), chunk: view.budget().chunk };
    let Files { large, small } = Files::of(view, out);
    let mut wanting = None;
    for file in large.iter().chain(&small) {
        match file.path.metadata() {
            Ok(found) if found.is_dir() => {
                let place = file.path.display();
                return Err(error::invalid(format!("{place}: a directory, where a file is to be")));
            }
            Ok(found) if found.len() == file.size => {}
            _ => wanting = wanting.or(Some(file)),
        }
    }
    if !holds_file(out)? {
        return Ok(Found::Nothing);
    }
    let sealed = sealed_by(out);
    let own_seal = seal_of(&subject.identity);
    if wanting.is_none() && sealed.as_ref() == Some(&own_seal) {
        return Ok(Found::Finished);
    }
    let (mut begun, mut bytes, mut change) = (false, 0, None);
    for file in &large {
        let path = hidden(&file.path, ".journal");
        begun |= path.exists();
        let Some((found, progress)) = journal::read(&path) else { continue };
        if found == subject {
            bytes += if progress.whole { file.size } else { progress.bytes };
        } else if change.is_none() {
            change = found.identity.change_to(&subject.identity);
            change = change.or_else(|| Some("chunks have another size now".to_owned()));
        }
    }
    Ok(match change {
        Some(change) => Found::Outdated(change),
        None if begun => Found::Begun { bytes },
        None => {
            let what = match (&sealed, wanting) {
                (Some(seal), Some(file)) if *seal == own_seal => {
                    format!("holds this export, but {} is missing or has another size", file.name())
                }
                (Some(_), _) => "holds an export of another source, recipe or version".to_owned(),
                (None, _) => "not empty".to_owned(),
            };
            let place = out.display();
            Found::Foreign(format!("{place}: {what}; --overwrite replaces files of the same names"))
        }
    })
}

/// Takes away what earlier exports have begun, by the journals beside it, unless `files` have that name.
///
/// # Errors
/// `Invalid`, before anything is taken away, where weights or an index of something else would remain: a loader
/// might prefer them.
pub(super) fn clear(view: &View, out: &Path, files: &Files) -> Result<()> {
    let written: HashSet<&Path> =
        files.large.iter().chain(&files.small).map(|file| &*file.path).collect();
    let (mut begun, mut others) = (Vec::new(), Vec::new());
    for dir in dirs(view, out) {
        for path in entries(&dir)? {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if let Some(name) = name.strip_prefix('.').and_then(|n| n.strip_suffix(".journal")) {
                let file = dir.join(name);
                if !written.contains(&*file) && journal::read(&path).is_some() {
                    begun.push(file);
                }
                continue;
            }
            if is_weights(name) && !written.contains(&*path) {
                others.push(path);
            }
        }
    }
    others.retain(|path| !begun.contains(path));
    others.sort();
    if let [first, rest @ ..] = &others[..] {
        let name = first.strip_prefix(out).unwrap_or(first).display();
        let more =
            if rest.is_empty() { String::new() } else { format!(", and {} more", rest.len()) };
        return Err(error::invalid(format!(
            "{}: {name}{more} would stay beside this export, and loaders might read that instead: \
             remove it first",
            out.display()
        )));
    }
    for path in begun {
        remove(&path)?;
        remove(&hidden(&path, ".partial"))?;
        remove(&hidden(&path, ".journal"))?;
    }
    Ok(())
}

/// Fails where `dir`, which need not exist, is inside of the model.
fn check_outside(view: &View, dir: &Path) -> Result<()> {
    let mut ancestor = dir;
    // What is missing of it will be made below its nearest ancestor.
    let found = loop {
        match ancestor.canonicalize() {
            Ok(found) => break found,
            Err(error) if error.kind() == IoKind::NotFound => {
                ancestor = match ancestor.parent() {
                    Some(parent) if parent != Path::new("") => parent,
                    _ => Path::new("."),
                };
            }
            Err(error) => return Err(Error::io(dir.display(), error)),
        }
    };
    if found.starts_with(view.root()) {
        let place = dir.display();
        return Err(error::invalid(format!(
            "{place}: inside of the model, which is never written"
        )));
    }
    Ok(())
}

/// Fails unless every large file is there, whole, of the right size, and about `subject`.
pub(super) fn check_parts(large: &[Output], subject: &Subject, out: &Path) -> Result<()> {
    let what_is_wrong = |file: &Output| {
        let Some((found, progress)) = journal::read(&hidden(&file.path, ".journal")) else {
            return Some("not begun".to_owned());
        };
        if let Some(change) = found.identity.change_to(&subject.identity) {
            return Some(change);
        }
        if !progress.whole || found != *subject {
            return Some("not yet whole".to_owned());
        }
        match file.path.metadata() {
            Ok(metadata) if metadata.len() == file.size => None,
            Ok(metadata) => Some(format!("{} bytes instead of {}", metadata.len(), file.size)),
            Err(error) => Some(error.to_string()),
        }
    };
    let mut wrong = large.iter().filter_map(|file| Some((file, what_is_wrong(file)?)));
    let Some((file, why)) = wrong.next() else { return Ok(()) };
    let others = match wrong.count() {
        0 => String::new(),
        count => format!(", and {count} more"),
    };
    let name = file.path.strip_prefix(out).unwrap_or(&file.path).display();
    Err(error::invalid(format!(
        "{}: can't be finished: {name}: {why}{others}; run the parts that are missing again",
        out.display()
    )))
}

/// Marks a finished export for [`find`] to know it by, where the file system can.
pub(super) fn seal(out: &Path, identity: &Identity) -> Result<()> {
    match rustix::fs::setxattr(out, SEAL, seal_of(identity).as_bytes(), XattrFlags::empty()) {
        // Without it a second run takes it for something else, and says so.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM) => Ok(()),
        Err(errno) => Err(Error::io(out.display(), errno.into())),
    }
}

/// Takes the mark of a finished export away.
pub(super) fn unseal(out: &Path) -> Result<()> {
    match rustix::fs::removexattr(out, SEAL) {
        Err(errno) if sealed_by(out).is_some() => Err(Error::io(out.display(), errno.into())),
        _ => Ok(()),
    }
}

fn seal_of(identity: &Identity) -> String {
    let mut hash = DefaultHasher::new();
    identity.hash(&mut hash);
    format!("{:016x}", hash.finish())
}

fn sealed_by(out: &Path) -> Option<String> {
    let mut value = [0; 64];
    let len = rustix::fs::getxattr(out, SEAL, &mut value[..]).ok()?;
    String::from_utf8(value[..len].to_vec()).ok()
}

/// Whether there is anything but directories in `dir` or below.
fn holds_file(dir: &Path) -> Result<bool> {
    let mut dirs: Vec<PathBuf> = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for path in entries(&dir)? {
            match path.symlink_metadata() {
                Ok(found) if found.is_dir() => dirs.push(path),
                _ => return Ok(true),
            }
        }
    }
    Ok(false)
}

/// What is in a directory; nothing where it isn't there.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let at = |cause| Error::io(dir.display(), cause);
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry.map_err(at)?.path())).collect(),
        Err(error) if error.kind() == IoKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(at(error)),
    }
}
