//! The picture in ARCHITECTURE.md is true: imports point one way, `unsafe` has few addresses.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What each module may import of the crate. Whatever is not listed may import anything.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("dtype", &[]),
    ("error", &[]),
    ("isa", &[]),
    ("memory", &[]),
    ("modality", &[]),
    ("threads", &[]),
    ("quant", &["dtype", "isa"]),
    ("source", &["dtype", "error", "isa", "threads"]),
    ("recipe", &["dtype", "error", "quant", "source", "threads"]),
    ("format", &["dtype", "error", "quant", "recipe", "source", "threads"]),
    ("view", &["dtype", "error", "format", "quant", "recipe", "source", "threads"]),
    ("export", &["error", "view"]),
    ("loader", &["error", "format", "quant", "recipe", "view"]),
    ("adapter", &["dtype", "error", "isa", "modality", "recipe", "source", "view"]),
    ("fuse", &["error", "view"]),
];

/// The only files that may hold `unsafe`.
const UNSAFE: &[&str] =
    &["cli/bench.rs", "isa.rs", "memory.rs", "source/file.rs", "source/guard.rs"];

/// Crates that only some files may name.
const ADDRESSES: &[(&str, &[&str])] = &[("fuser", &["fuse.rs"]), ("clap", &["cli/", "main.rs"])];

/// Every source file below `src`, by its path there, with its text less comments.
fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("listed") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    files.sort();
    let name = |path: &Path| {
        path.strip_prefix(&root).expect("below src").to_str().expect("UTF-8").to_owned()
    };
    files.iter().map(|path| (name(path), fs::read_to_string(path).expect("read"))).collect()
}

fn code(text: &str) -> String {
    let lines = text.lines().map(|line| line.split("//").next().expect("a first part"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The identifiers that follow each `prefix` in `code`, a braced list's included.
fn names_after(code: &str, prefix: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices(prefix) {
        let rest = &code[at + prefix.len()..];
        let list = match rest.strip_prefix('{') {
            Some(inner) => inner.split('}').next().expect("a first part"),
            None => rest,
        };
        let items: Vec<&str> =
            if rest.starts_with('{') { list.split(',').collect() } else { vec![list] };
        for item in items {
            let name: String = item
                .trim()
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                .collect();
            if !name.is_empty() {
                names.insert(name);
            }
        }
    }
    names
}

#[test]
fn imports_point_one_way() {
    let mut seen = 0;
    for (file, text) in sources() {
        let module = file.split('/').next().expect("a first part").trim_end_matches(".rs");
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == module) else {
            continue;
        };
        for name in names_after(&code(&text), "crate::") {
            assert!(
                name == module || allowed.contains(&name.as_str()),
                "src/{file} imports `{name}`, which lies above it"
            );
            seen += 1;
        }
    }
    assert!(seen > 20, "only {seen} imports were found: this test no longer reads them");
}

#[test]
fn unsafe_code_stays_where_it_is_listed() {
    for (file, text) in sources() {
        let holds = code(&text).contains("unsafe {") || code(&text).contains("unsafe fn");
        assert_eq!(holds, UNSAFE.contains(&file.as_str()), "src/{file}");
    }
}

#[test]
fn crates_are_named_where_they_belong() {
    for (file, text) in sources() {
        for (name, places) in ADDRESSES {
            let named = code(&text).contains(&format!("{name}::"));
            let belongs = places.iter().any(|place| file.starts_with(place));
            assert!(!named || belongs, "src/{file} names `{name}`");
        }
    }
}

#[test]
fn every_file_opens_with_a_line_that_says_what_it_is() {
    for (file, text) in sources() {
        let first = text.lines().next().unwrap_or_default();
        let title = first.strip_prefix("//! ").unwrap_or_default();
        let words = title.split_whitespace().count();
        assert!((1..=15).contains(&words), "src/{file} opens with {first:?}");
        assert!(title.ends_with(['.', ':']), "src/{file} opens with half a sentence: {first:?}");
    }
}
