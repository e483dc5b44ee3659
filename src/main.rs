//! Reads the environment and hands over to the command that was asked for.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use obol::cli::{self, Directories};
use obol_models::fetch::Token;

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
        hub_token: hub_token(&home),
    }
}

/// The hub's token where its own tools have it: HF_TOKEN, or the file that logging in leaves.
fn hub_token(home: &Path) -> Option<Token> {
    let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if path("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some() {
        return None;
    }
    let hub_home = path("HF_HOME")
        .unwrap_or_else(|| path("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache")).join("huggingface"));
    let given = std::env::var("HF_TOKEN").ok().and_then(|text| Token::new(&text));
    let files = [path("HF_TOKEN_PATH"), Some(hub_home.join("token"))];
    given.or_else(|| {
        files.into_iter().flatten().find_map(|file| Token::new(&std::fs::read_to_string(file).ok()?))
    })
}
