//! The one error type.

use std::fmt::{self, Write};

/// What went wrong, at the grain that callers act on: errno, exit code and exception follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A file, tensor or mount that was asked for does not exist.
    NotFound,
    /// The checkpoint contradicts itself or its format.
    Corrupt,
    /// Well formed, but not something that can be quantized, decoded or mounted here.
    Unsupported,
    /// The request itself makes no sense: a bad flag, pattern, mountpoint or output directory.
    Invalid,
    /// The source changed after it was opened.
    Stale,
    /// The operating system refused.
    Io,
}

/// An error with its kind, a message that says what was found and where, and the cause if any.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with no deeper cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), cause: None }
    }

    /// An error with the error that caused it.
    pub fn caused(
        kind: ErrorKind,
        message: impl Into<String>,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), cause: Some(cause.into()) }
    }

    /// An I/O error on something named by `what`, a path or an action. A missing file is
    /// [`ErrorKind::NotFound`], anything else [`ErrorKind::Io`].
    pub fn io(what: impl fmt::Display, cause: std::io::Error) -> Self {
        let kind = match cause.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        Self::caused(kind, what.to_string(), cause)
    }

    /// What callers act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error, its message preceded by where it happened.
    pub fn within(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    /// The message and, after a colon, every cause: the whole chain on one line. Control characters,
    /// which names of tensors and files may have, are escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = OneLine(f);
        f.write_str(&self.message)?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            // One of ours has written its own chain.
            cause = if error.is::<Self>() { None } else { error.source() };
        }
        Ok(())
    }
}

/// Text with its control characters escaped: names come from files that were downloaded.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    OneLine(&mut out).write_str(text).expect("a string takes any text");
    out
}

/// Escapes control characters on their way.
struct OneLine<'a, W>(&'a mut W);

impl<W: fmt::Write> fmt::Write for OneLine<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(char::is_control) {
            let (plain, control) = rest.split_at(at);
            let c = control.chars().next().expect("it was found there");
            write!(self.0, "{plain}{}", c.escape_default())?;
            rest = &control[c.len_utf8()..];
        }
        self.0.write_str(rest)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_ref().map(|cause| cause.as_ref() as _)
    }
}

/// Shorthands for the kinds whose messages are written in place.
macro_rules! shorthand {
    ($($name:ident => $kind:ident),*) => {$(
        #[doc = concat!("An error of kind [`ErrorKind::", stringify!($kind), "`].")]
        pub fn $name(message: impl Into<String>) -> Error {
            Error::new(ErrorKind::$kind, message)
        }
    )*};
}

shorthand!(not_found => NotFound, corrupt => Corrupt, unsupported => Unsupported, invalid => Invalid, stale => Stale);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_carries_its_whole_chain_once() {
        let inner = Error::io("open a.json", std::io::Error::from_raw_os_error(libc::EACCES));
        let outer = Error::caused(ErrorKind::Corrupt, "index", inner);
        assert_eq!(
            outer.within("model").to_string(),
            "model: index: open a.json: Permission denied (os error 13)"
        );
    }

    #[test]
    fn a_message_is_one_line_whatever_it_names() {
        let cause = std::io::Error::other("so\nwhat");
        let error = Error::io("a\nb\u{7f}\u{1b}[31mé\u{85}", cause);
        assert_eq!(error.to_string(), "a\\nb\\u{7f}\\u{1b}[31mé\\u{85}: so\\nwhat");
    }
}
