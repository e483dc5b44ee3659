//! Reads the environment and hands over to the command that was asked for.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use obol::cli::{self, Directories};

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("OBOL_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,obol=info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    cli::run(std::env::args_os().collect(), &directories())
}

/// The XDG base directories; without a home, the working directory.
fn directories() -> Directories {
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let base = |variable: &str, under_home: &str| {
        let set = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
        set.unwrap_or_else(|| home.join(under_home)).join("obol")
    };
    Directories {
        data: base("XDG_DATA_HOME", ".local/share"),
        models: base("XDG_CACHE_HOME", ".cache").join("models"),
    }
}
