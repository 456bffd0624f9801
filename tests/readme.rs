//! The README's table of formats is that of the code.
//!
//! `UPDATE_README=1 cargo test --test readme` writes it.

use std::fs;
use std::path::Path;

use aq_fs::format::{FORMATS, Format, Reader, ranges};

const HEAD: &str = "\
| format | what it is | bits | one scale per | codes | run on mounts | by layout alone |
|---|---|---|---|---|---|---|
";

fn row(format: &dyn Format) -> String {
    let takes = format.takes();
    let codes = match takes.symmetry {
        _ if takes.bits.is_empty() => "",
        None => "symmetric (default), asymmetric",
        Some(true) => "symmetric",
        Some(false) => "asymmetric",
    };
    let ran = |reader: &Reader| Some(format!("{} {}", reader.loader, reader.ran?));
    let ran: Vec<String> = format.readers().iter().filter_map(ran).collect();
    let by_layout = format.readers().iter().filter(|reader| reader.ran.is_none());
    let by_layout: Vec<&str> = by_layout.map(|reader| reader.loader).collect();
    let cells = [
        format!("`{}`", format.name()),
        format.about().to_owned(),
        ranges(takes.bits),
        takes.grain.to_string(),
        codes.to_owned(),
        ran.join(". "),
        by_layout.join(", "),
    ];
    format!("| {} |\n", cells.join(" | "))
}

#[test]
fn the_readme_s_table_is_that_of_the_formats() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = fs::read_to_string(&path).expect("it is read");
    let start = readme.find("| format |").expect("the table is there");
    let len = readme[start..].find("\n\n").expect("a blank line ends it") + 1;
    let expected = HEAD.to_owned() + &FORMATS.iter().map(|format| row(*format)).collect::<String>();
    let found = &readme[start..start + len];
    if found != expected && std::env::var_os("UPDATE_README").is_some() {
        let updated = readme.replacen(found, &expected, 1);
        fs::write(&path, updated).expect("it is written");
        return;
    }
    assert_eq!(found, expected, "UPDATE_README=1 cargo test --test readme writes the new table");
}
