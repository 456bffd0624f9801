//! Patterns on module names: globs, or regular expressions after `re:`.

use globset::{Glob, GlobMatcher};
use regex::Regex;

use crate::error::{Error, ErrorKind, Result};

/// A list of patterns; a name matches the list if it matches any of them.
#[derive(Debug)]
pub(super) struct Patterns(Vec<(String, Pattern)>);

#[derive(Debug)]
enum Pattern {
    Glob(GlobMatcher),
    Regex(Regex),
}

impl Patterns {
    /// Compiles patterns; `flag` names their origin in complaints.
    ///
    /// A glob covers the whole name, and its `*` crosses dots. A regex is anchored at the start
    /// alone, as in compressed-tensors' own `ignore`.
    pub(super) fn new(flag: &str, patterns: &[String]) -> Result<Self> {
        let compile = |text: &String| {
            let refused = |cause: Box<dyn std::error::Error + Send + Sync>| {
                let what = format!("{flag} {text:?} is not a valid pattern");
                Error::caused(ErrorKind::Invalid, what, cause)
            };
            let pattern = match text.strip_prefix("re:") {
                Some(regex) => Pattern::Regex(
                    Regex::new(&format!("^(?:{regex})")).map_err(|cause| refused(cause.into()))?,
                ),
                None => Pattern::Glob(
                    Glob::new(text).map_err(|cause| refused(cause.into()))?.compile_matcher(),
                ),
            };
            Ok((text.clone(), pattern))
        };
        Ok(Self(patterns.iter().map(compile).collect::<Result<_>>()?))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first pattern that a module's name matches.
    pub(super) fn find(&self, module: &str) -> Option<&str> {
        let hit = self.0.iter().find(|(_, pattern)| pattern.matches(module));
        hit.map(|(text, _)| text.as_str())
    }

    /// The position of the last pattern that a module's name matches.
    pub(super) fn find_last(&self, module: &str) -> Option<usize> {
        self.0.iter().rposition(|(_, pattern)| pattern.matches(module))
    }

    /// The patterns that match none of the modules.
    pub(super) fn unused<'a>(
        &self,
        modules: impl Iterator<Item = &'a str> + Clone,
    ) -> impl Iterator<Item = &str> {
        self.0
            .iter()
            .filter(move |(_, pattern)| !modules.clone().any(|module| pattern.matches(module)))
            .map(|(text, _)| text.as_str())
    }
}

impl Pattern {
    fn matches(&self, module: &str) -> bool {
        match self {
            Self::Glob(glob) => glob.is_match(module),
            Self::Regex(regex) => regex.is_match(module),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_cover_the_whole_name_and_regexes_its_start() {
        #[track_caller]
        fn check(pattern: &str, module: &str, expected: bool) {
            let patterns = Patterns::new("--skip", &[pattern.to_owned()]).expect("valid");
            assert_eq!(patterns.find(module).is_some(), expected, "{pattern} on {module}");
        }
        check("lm_head", "lm_head", true);
        check("lm_head", "model.lm_head", false);
        check("*down_proj", "model.layers.0.mlp.down_proj", true);
        check("model.layers.[01].*", "model.layers.1.mlp.up_proj", true);
        check("model.layers.[01].*", "model.layers.11.mlp.up_proj", false);
        check("*.{q,k}_proj", "a.b.k_proj", true);
        check(r"re:.*\.mlp\..*", "model.layers.0.mlp.up_proj", true);
        check("re:mlp", "model.layers.0.mlp.up_proj", false);
        check("re:a|model", "model.layers.0.mlp.up_proj", true);
    }

    #[test]
    fn refuses_a_malformed_pattern_by_flag_and_text() {
        for text in ["re:(", "a[", "{a"] {
            let error = Patterns::new("--only", &[text.to_owned()]).expect_err("accepted");
            assert!(error.to_string().starts_with(&format!("--only {text:?} is not")), "{error}");
        }
    }
}
