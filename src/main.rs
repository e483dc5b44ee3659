//! Reads the environment and hands over to the command that was asked for.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use obol::bench::ApiKey;
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
        hub_token: hub_token(&home, |name| std::env::var_os(name)),
        admin_key: std::env::var_os("OBOL_ADMIN_KEY"),
        bench_api_key: std::env::var("OBOL_BENCH_API_KEY").ok().and_then(|text| ApiKey::new(&text)),
    }
}

/// The hub's token where its own tools have it: HF_TOKEN, or a file that logging in leaves, unless
/// HF_HUB_DISABLE_IMPLICIT_TOKEN says that such files are not meant.
fn hub_token(home: &Path, variable: impl Fn(&str) -> Option<OsString>) -> Option<Token> {
    let text = |name: &str| variable(name).and_then(|value| value.into_string().ok());
    let path = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let given = text("HF_TOKEN").and_then(|text| Token::new(&text));
    let disabled = text("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|text| {
        ["1", "true", "yes", "on"].iter().any(|yes| text.trim().eq_ignore_ascii_case(yes))
    });
    if given.is_some() || disabled {
        return given;
    }
    let hub_home = path("HF_HOME")
        .unwrap_or_else(|| path("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache")).join("huggingface"));
    let files = [path("HF_TOKEN_PATH"), Some(hub_home.join("token"))];
    files.into_iter().flatten().find_map(|file| Token::new(&std::fs::read_to_string(file).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_yes_keeps_the_file_of_the_hub_from_being_read_and_never_a_given_token() {
        let home = tempfile::tempdir().expect("temporary directory");
        let has_token = |variables: &[(&str, &str)]| {
            let find = |name: &str| variables.iter().find(|(other, _)| *other == name);
            hub_token(home.path(), |name| find(name).map(|(_, value)| OsString::from(value))).is_some()
        };
        const DISABLE: &str = "HF_HUB_DISABLE_IMPLICIT_TOKEN";
        assert!(!has_token(&[]), "not logged in");
        let dir = home.path().join(".cache/huggingface");
        std::fs::create_dir_all(&dir).expect("create");
        std::fs::write(dir.join("token"), "hf_secret\n").expect("write");
        assert!(has_token(&[]));
        assert!(has_token(&[("HF_TOKEN", " "), ("HF_TOKEN_PATH", "/nowhere")]), "blank is unset");
        for no in ["", "0", "false", "NO", "off"] {
            assert!(has_token(&[(DISABLE, no)]), "{no:?}");
        }
        for yes in ["1", "true", "TRUE", "Yes", "on"] {
            assert!(!has_token(&[(DISABLE, yes)]), "{yes:?}");
            assert!(has_token(&[(DISABLE, yes), ("HF_TOKEN", "hf_secret")]), "{yes:?}");
        }
    }
}
