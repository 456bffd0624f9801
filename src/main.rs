//! The `aq-fs` program.

fn main() -> std::process::ExitCode {
    aq_fs::cli::run()
}
