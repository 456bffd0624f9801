//! The README's table of formats is that of the code.

use aq_fs::format::FORMATS;

#[test]
fn the_readme_s_table_has_a_row_for_each_format_and_no_other() {
    let readme = include_str!("../README.md");
    let table = readme.split("## Formats").nth(1).expect("the section is there");
    let rows: Vec<&str> = table
        .lines()
        .skip_while(|line| !line.starts_with("|---"))
        .skip(1)
        .take_while(|line| line.starts_with('|'))
        .collect();
    let expected: Vec<String> = FORMATS
        .iter()
        .map(|format| format!("| `{}` | {} |", format.name(), format.about()))
        .collect();
    assert_eq!(rows.len(), expected.len());
    for (row, start) in rows.iter().zip(&expected) {
        assert!(row.starts_with(start), "{row:?} does not start with {start:?}");
    }
}
