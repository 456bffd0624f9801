//! A checkpoint's `config.json`: read, and edited without touching its other bytes.

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::decode::{DECLARATIONS, NESTED};
use super::file::open_regular;
use crate::error::{self, Error, ErrorKind, Result};

/// A checkpoint's `config.json`.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file's text.
    pub text: String,
    /// The same, parsed. Bare `NaN` and `Infinity`, which Python writes, read as `null`.
    pub value: Value,
}

impl Config {
    /// Reads `config.json` of a directory; `None` where it has none.
    ///
    /// # Errors
    /// `Corrupt` where it isn't a JSON object, `Io` where it can't be read.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        match read_small(&dir.join("config.json")) {
            Ok(bytes) => {
                let text = String::from_utf8(bytes);
                Self::parse(text.map_err(|_| error::corrupt("config.json: not UTF-8"))?).map(Some)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// `Corrupt` where it isn't a JSON object.
    pub fn parse(text: String) -> Result<Self> {
        let value: Value = serde_json::from_str(&without_bare_floats(&text))
            .map_err(|cause| Error::caused(ErrorKind::Corrupt, "config.json", cause))?;
        if !value.is_object() {
            return Err(error::corrupt("config.json: not an object"));
        }
        Ok(Self { text, value })
    }

    /// The config of the same model with nothing quantized.
    ///
    /// # Errors
    /// None, as what is left of a config parses.
    pub(super) fn without_quantization(&self) -> Result<Self> {
        let edit = Edit { remove: DECLARATIONS.to_vec(), set: Map::new() };
        let text = edited(&self.text, &edit.remove, &edit.set);
        Self::parse(NESTED.iter().fold(text, |text, member| edited_within(&text, member, &edit)))
    }
}

/// Reads a config or an index.
///
/// # Errors
/// `NotFound` or `Io` where it can't be read, `Corrupt` where it isn't a regular file.
pub(super) fn read_small(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = open_regular(path, path.display())?.read_to_end(&mut bytes);
    read.map_err(|cause| Error::io(path.display(), cause))?;
    Ok(bytes)
}

/// A change of a JSON object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Edit {
    /// Members to be removed.
    pub remove: Vec<&'static str>,
    /// Members that are added, or replace others.
    pub set: Map<String, Value>,
}

/// JSON as Python writes it, with `NaN`, `Infinity` and `-Infinity` outside of strings made `null`.
fn without_bare_floats(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(c) = rest.chars().next() {
        let bare = ["NaN", "Infinity", "-Infinity"].into_iter().find(|w| rest.starts_with(w));
        let taken = match (in_string, c, bare) {
            (true, '\\', _) => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (false, _, Some(word)) => {
                out.push_str("null");
                rest = &rest[word.len()..];
                continue;
            }
            (_, '"', _) => {
                in_string = !in_string;
                1
            }
            _ => c.len_utf8(),
        };
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    out
}

/// The text of a JSON object with top-level members removed and others appended.
///
/// What is appended is indented by two spaces, as transformers writes its configs. `text` is an
/// object that parses but for Python's bare floats.
pub(crate) fn edited(text: &str, remove: &[&str], append: &Map<String, Value>) -> String {
    let (open, members, close) = members(text);
    let kept: Vec<&str> = members
        .iter()
        .filter(|(key, _)| !remove.contains(&key.as_str()) && !append.contains_key(key.as_str()))
        .map(|(_, span)| &text[span.clone()])
        .collect();
    let mut out = text[..=open].to_owned();
    out.push_str(&kept.join(","));
    let mut first = kept.is_empty();
    for (key, value) in append {
        if !first {
            // What stood between the last member and the next comma or brace.
            out.truncate(out.trim_end().len());
            out.push(',');
        }
        first = false;
        let value = serde_json::to_string_pretty(value).expect("JSON values serialize");
        let key = Value::from(key.as_str());
        out.push_str(&format!("\n  {key}: {}", value.replace('\n', "\n  ")));
    }
    if !append.is_empty() {
        out.push('\n');
    }
    out.push_str(&text[close..]);
    out
}

/// The same for an object that is a member of the text's, where it is one.
pub(crate) fn edited_within(text: &str, member: &str, edit: &Edit) -> String {
    let (_, members, _) = members(text);
    let Some((_, span)) = members.into_iter().find(|(key, _)| key == member) else {
        return text.to_owned();
    };
    let Some(brace) = text[span.clone()].find('{') else { return text.to_owned() };
    let start = span.start + brace;
    let value = text[start..span.end].trim_end();
    let value = edited(value, &edit.remove, &edit.set);
    let rest = text[start..span.end].trim_end().len() + start;
    format!("{}{value}{}", &text[..start], &text[rest..])
}

type Member = (String, std::ops::Range<usize>);

/// The positions of a JSON object's braces, and its members with the white space around them.
fn members(text: &str) -> (usize, Vec<Member>, usize) {
    let open = text.find('{').expect("the config is an object");
    let mut members = Vec::new();
    let mut depth = 0usize;
    let mut in_string = false;
    let mut escaped = false;
    let mut start = open + 1;
    for (at, byte) in text.bytes().enumerate().skip(open) {
        if in_string {
            (in_string, escaped) = (escaped || byte != b'"', !escaped && byte == b'\\');
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => depth += 1,
            b',' if depth == 1 => {
                members.push((key_of(&text[start..at]), start..at));
                start = at + 1;
            }
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    if !text[start..at].trim().is_empty() {
                        members.push((key_of(&text[start..at]), start..at));
                    }
                    return (open, members, at);
                }
            }
            _ => {}
        }
    }
    unreachable!("the config's last brace closes it")
}

/// The key of `"key": value`.
fn key_of(member: &str) -> String {
    let keys = serde_json::Deserializer::from_str(member).into_iter::<String>();
    keys.flatten().next().expect("a member starts with its key")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(text: &str, remove: &[&str], append: Value, expected: &str) {
        let append = append.as_object().expect("an object").clone();
        assert_eq!(edited(text, remove, &append), expected);
    }

    #[test]
    fn a_nested_object_is_edited_in_place() {
        let edit = |remove: &[&'static str], set: Value| Edit {
            remove: remove.to_vec(),
            set: set.as_object().expect("an object").clone(),
        };
        #[track_caller]
        fn check(text: &str, edit: &Edit, expected: &str) {
            assert_eq!(edited_within(text, "t", edit), expected);
        }
        let both = edit(&["q"], json!({"d": "x"}));
        check(
            r#"{"a": Infinity, "t" : {"d": "y", "q": {"t": 1}} , "b": 1}"#,
            &both,
            "{\"a\": Infinity, \"t\" : {\n  \"d\": \"x\"\n} , \"b\": 1}",
        );
        check(r#"{"t":{"q":[],"e":1}}"#, &edit(&["q"], json!({})), r#"{"t":{"e":1}}"#);
        check(r#"{"t": 1, "b": {"t": {}}}"#, &both, r#"{"t": 1, "b": {"t": {}}}"#);
    }

    #[test]
    fn every_other_byte_stays() {
        check("{}", &[], json!({}), "{}");
        check("{}\n", &[], json!({"q": 1}), "{\n  \"q\": 1\n}\n");
        check(
            "{\n  \"eps\": 1e-06,\n  \"inf\": [0.0, Infinity]\n}\n",
            &[],
            json!({"q": {"bits": 4}}),
            "{\n  \"eps\": 1e-06,\n  \"inf\": [0.0, Infinity],\n  \"q\": {\n    \"bits\": 4\n  }\n}\n",
        );
        check(
            r#" {"a":"}\",{","q":{"x":[1,2]},"b":2}"#,
            &[],
            json!({"q": null}),
            " {\"a\":\"}\\\",{\",\"b\":2,\n  \"q\": null\n}",
        );
        check(r#"{"a":1,"q":2}"#, &["q"], json!({}), r#"{"a":1}"#);
        check(r#"{"q\u0071":"\\","b":[{}]}"#, &["qq"], json!({}), r#"{"b":[{}]}"#);
    }
}
