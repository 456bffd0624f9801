//! The `aq-fs` program.

fn main() {}
