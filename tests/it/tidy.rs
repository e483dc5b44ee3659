//! Keeps the rules that no compiler keeps: who may import whom, how long a file may be, that the docs
//! name files which exist, where SQL and environment reads live, and that no text names a machine.
//!
//! Works on text, not on a syntax tree: comments and strings are blanked out, then paths are read word
//! by word. Knows nothing of what the code does. Each rule is a function from text to complaints, so the
//! rules are tested on small strings below; the tests over the repository only feed them files.

mod text;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use text::{Keep, keep, without_tests, words};

/// Modules of `src/`, lowest level first; ARCHITECTURE.md draws the same table. An import points to a
/// lower level, except inside level 0, whose modules are plain data and may use each other.
const LEVELS: &[&[&str]] = &[
    &["units", "clock", "request", "usage", "config", "metrics", "random"],
    &["text", "grammar", "meter", "ledger", "control", "archive", "batches", "nvml"],
    &["engine", "admission", "alerting", "measure"],
    &["pipeline", "compare", "bench"],
    &["http", "cli"],
];

/// Imports on one level that the table would refuse: (from, to, why).
const SAME_LEVEL: &[(&str, &str, &str)] = &[
    ("cli", "http", "`obol serve` starts the listener"),
    ("measure", "engine", "it asks the engine as the pipeline does"),
];

const LINES_MAX: usize = 600;
const ARCHITECTURE_LINES_MAX: usize = 150;

/// Files of the server crate that may hold SQL.
const SQL_HOMES: &[&str] = &[
    "src/archive/schema.sql",
    "src/archive/store.rs",
    "src/batches/schema.sql",
    "src/batches/store.rs",
    "src/control/schema.sql",
    "src/control/alerts.sql",
    "src/control/foreseen.rs",
    "src/control/foreseen.sql",
    "src/control/outbox.rs",
    "src/control/outbox/tests.rs",
    "src/control/store.rs",
    "src/control/tests.rs",
    "src/ledger/coarse.rs",
    "src/ledger/coarse.sql",
    "src/ledger/parties.rs",
    "src/ledger/schema.sql",
    "src/ledger/store.rs",
    "src/ledger/store/receipts.rs",
    "src/ledger/migrate.rs",
    "src/ledger/spent.rs",
    "src/ledger/rows.rs",
    "src/ledger/query.rs",
    "src/ledger/report.rs",
    "src/ledger/audit.rs",
    "src/ledger/rollup.rs",
    "src/ledger/rollup_check.rs",
    "src/ledger/scale.rs",
    "src/ledger/showback.rs",
];

/// Files that may read the environment: flags become a `Config` once, and then it is passed.
const ENVIRONMENT_HOMES: &[&str] = &["src/main.rs", "src/config.rs"];

/// Words that kernels and models have no business knowing.
const MONEY_WORDS: &[&str] =
    &["obol", "RequestId", "Ticket", "Receipt", "Ledger", "Picos", "Tenant", "price"];

// ---------------------------------------------------------------- the rules

/// Modules named right after `crate::` in code, with their lines; `crate::{a::X, b}` names a and b.
fn crate_imports(code: &str) -> Vec<(usize, &str)> {
    let words = words(code);
    let mut found = Vec::new();
    for (i, (_, word)) in words.iter().enumerate() {
        if *word != "crate" || words.get(i + 1).is_none_or(|(_, w)| *w != "::") {
            continue;
        }
        let Some(&(line, next)) = words.get(i + 2) else { continue };
        if next != "{" {
            found.push((line, next));
            continue;
        }
        // The first word of every branch of the outer braces.
        let (mut depth, mut branch_starts) = (1_usize, true);
        for &(line, word) in &words[i + 3..] {
            match word {
                "{" => depth += 1,
                "}" => depth -= 1,
                "," if depth == 1 => branch_starts = true,
                _ if depth == 1 && branch_starts => {
                    found.push((line, word));
                    branch_starts = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

fn level(module: &str) -> Option<usize> {
    LEVELS.iter().position(|modules| modules.contains(&module))
}

/// Complaints about what `module` (a top-level module of `src/`) imports.
fn check_imports(module: &str, source: &str) -> Vec<String> {
    let Some(own) = level(module) else {
        return vec![format!("module `{module}` has no level: add it to LEVELS and to ARCHITECTURE.md")];
    };
    let code = keep(source, Keep::Code);
    let mut complaints = Vec::new();
    for (line, target) in crate_imports(&code) {
        // Not a module: a macro or an item re-exported by lib.rs.
        let Some(theirs) = level(target) else { continue };
        let shared = own == 0 && theirs == 0;
        let granted = SAME_LEVEL.iter().any(|(from, to, _)| *from == module && *to == target);
        if target != module && theirs >= own && !shared && !granted {
            complaints.push(format!(
                "{line}: `{module}` (level {own}) may not use `{target}` (level {theirs}): imports point only to a lower level"
            ));
        }
    }
    complaints
}

fn check_length(source: &str) -> Vec<String> {
    let lines = source.lines().count();
    if lines > LINES_MAX { vec![format!("{lines} lines, at most {LINES_MAX}: split it")] } else { Vec::new() }
}

/// Complaints about SQL in string literals.
fn check_sql(source: &str) -> Vec<String> {
    const STARTS: &[&str] = &[
        "SELECT ",
        "INSERT INTO",
        "INSERT OR",
        "UPDATE ",
        "DELETE FROM",
        "CREATE TABLE",
        "CREATE INDEX",
        "CREATE TRIGGER",
        "PRAGMA ",
        "BEGIN IMMEDIATE",
    ];
    let strings = keep(source, Keep::Strings);
    let mut complaints = Vec::new();
    for (number, line) in strings.lines().enumerate() {
        if let Some(word) = STARTS.iter().find(|word| line.contains(*word)) {
            complaints.push(format!("{}: SQL (`{}`) outside a store", number + 1, word.trim()));
        }
    }
    complaints
}

/// Complaints about reads of the environment outside tests.
fn check_environment(source: &str) -> Vec<String> {
    let code = without_tests(&keep(source, Keep::Code));
    let words = words(&code);
    let reads = |window: &&[(usize, &str)]| {
        window[0].1 == "env"
            && window[1].1 == "::"
            && matches!(window[2].1, "var" | "var_os" | "vars" | "vars_os")
    };
    words
        .windows(3)
        .filter(reads)
        .map(|window| format!("{}: reads the environment: only main.rs and config.rs do", window[0].0))
        .collect()
}

/// Complaints about a lower crate that knows of requests or money.
fn check_no_money(source: &str) -> Vec<String> {
    let code = keep(source, Keep::Code);
    words(&code)
        .into_iter()
        .filter(|(_, word)| MONEY_WORDS.contains(word))
        .map(|(line, word)| format!("{line}: `{word}`: kernels and models know no request, account or price"))
        .collect()
}

/// Complaints about text that names a machine's folders or a registry's host.
fn check_places(text: &str) -> Vec<String> {
    // Put together here, so that this file passes its own rule.
    let banned = [
        concat!("/wo", "rk/"),
        concat!("/ro", "ot/"),
        concat!("/ho", "me/"),
        concat!("/t", "mp/"),
        concat!("crates", ".io"),
        concat!("py", "pi.org"),
        concat!("pythonhosted", ".org"),
        concat!("registry.", "npmjs"),
        concat!("docker", ".io"),
        concat!("huggingface", ".co"),
    ];
    let mut complaints = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for word in banned.iter().filter(|word| line.contains(*word)) {
            complaints.push(format!("{}: names a place of some machine or registry: {word}", number + 1));
        }
    }
    complaints
}

/// What a document names in backticks that looks like a path of this repository, braces expanded:
/// it has a source's ending, or a slash behind a folder that exists. Code blocks are left out.
fn named_paths(text: &str, is_folder: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            continue;
        }
        if fenced {
            continue;
        }
        for span in line.split('`').skip(1).step_by(2) {
            let plain = |c: char| c.is_ascii_alphanumeric() || "._-/{},*".contains(c);
            if span.is_empty() || !span.chars().all(plain) || span.starts_with(['/', '-', '.', '{']) {
                continue;
            }
            let ending = Path::new(span).extension().and_then(|e| e.to_str()).unwrap_or("");
            let source = matches!(ending, "rs" | "md" | "sql" | "cu" | "py" | "sh");
            let folder = span.split_once('/').is_some_and(|(first, _)| is_folder(first));
            if source || folder {
                found.extend(expand_braces(span));
            }
        }
    }
    found
}

/// `a/{b,c}.rs` is `a/b.rs` and `a/c.rs`.
fn expand_braces(path: &str) -> Vec<String> {
    let Some((head, (inner, tail))) =
        path.split_once('{').and_then(|(head, rest)| Some((head, rest.split_once('}')?)))
    else {
        return vec![path.to_owned()];
    };
    inner.split(',').flat_map(|part| expand_braces(&format!("{head}{part}{tail}"))).collect()
}

// ---------------------------------------------------------------- over the repository

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files of the repository that git tracks or would track, relative to its root.
fn repository_files() -> Vec<PathBuf> {
    let listing = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git runs: the tidy tests read the list of tracked files from it");
    assert!(listing.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listing.stderr));
    let text = String::from_utf8(listing.stdout).expect("paths of this repository are UTF-8");
    let files: Vec<PathBuf> = text
        .split('\0')
        .filter(|p| !p.is_empty())
        .map(PathBuf::from)
        .filter(|p| root().join(p).is_file())
        .collect();
    assert!(!files.is_empty(), "git lists no file");
    files
}

fn text_of(file: &Path) -> Option<String> {
    String::from_utf8(std::fs::read(root().join(file)).expect("a listed file can be read")).ok()
}

fn is_rust(file: &Path) -> bool {
    file.extension().is_some_and(|e| e == "rs")
}

/// Runs a rule over the files that `of` takes and fails with all complaints at once.
fn for_each_file(of: impl Fn(&Path) -> bool, rule: impl Fn(&Path, &str) -> Vec<String>) {
    let mut report = String::new();
    for file in repository_files().iter().filter(|file| of(file)) {
        let Some(text) = text_of(file) else { continue };
        for complaint in rule(file, &text) {
            writeln!(report, "{}:{complaint}", file.display()).expect("a String takes everything");
        }
    }
    assert!(report.is_empty(), "\n{report}");
}

/// `src/engine/block.rs` belongs to `engine`, `src/clock.rs` to `clock`; `main` and `lib` to nobody.
fn module_of(file: &Path) -> Option<String> {
    let inside = file.strip_prefix("src").ok()?;
    let first = Path::new(inside.components().next()?.as_os_str());
    let name = first.file_stem()?.to_str()?.to_owned();
    (is_rust(file) && name != "main" && name != "lib").then_some(name)
}

#[test]
fn imports_point_to_a_lower_level() {
    for_each_file(
        |file| module_of(file).is_some(),
        |file, text| check_imports(&module_of(file).expect("filtered above"), text),
    );
}

#[test]
fn no_file_is_too_long() {
    for_each_file(is_rust, |_, text| check_length(text));
}

#[test]
fn sql_lives_in_the_stores() {
    let home = |file: &Path| SQL_HOMES.iter().any(|home| file == Path::new(home));
    for_each_file(|f| f.starts_with("src") && is_rust(f) && !home(f), |_, text| check_sql(text));
}

#[test]
fn only_main_and_config_read_the_environment() {
    let inside = |f: &Path| ["src", "kernels/src", "models/src"].iter().any(|dir| f.starts_with(dir));
    let home = |f: &Path| ENVIRONMENT_HOMES.iter().any(|home| f == Path::new(home));
    for_each_file(|f| inside(f) && is_rust(f) && !home(f), |_, text| check_environment(text));
}

#[test]
fn kernels_and_models_know_no_request_and_no_price() {
    let lower = |f: &Path| f.starts_with("kernels/src") || f.starts_with("models/src");
    for_each_file(|f| lower(f) && is_rust(f), |_, text| check_no_money(text));
}

#[test]
fn no_text_names_a_machine_or_a_registry() {
    // The lock file names its registry by design.
    let exempt = |f: &Path| f.ends_with("Cargo.lock");
    for_each_file(|f| !exempt(f), |_, text| check_places(text));
}

#[test]
fn documents_name_files_that_exist() {
    let bases = ["", "src", "kernels", "kernels/src", "models", "models/src"];
    let is_folder = |name: &str| bases.iter().any(|base| root().join(base).join(name).is_dir());
    let exists = |path: &str| {
        // A pattern stands for its folder.
        let fixed = path.split('*').next().unwrap_or(path);
        let fixed =
            if fixed == path { fixed } else { fixed.rsplit_once('/').map_or("", |(folder, _)| folder) };
        bases.iter().any(|base| root().join(base).join(fixed).exists())
    };
    let documents = |f: &Path| f == Path::new("README.md") || f == Path::new("ARCHITECTURE.md");
    for_each_file(documents, |_, text| {
        named_paths(text, is_folder)
            .into_iter()
            .filter(|path| !path.starts_with("target/") && !exists(path))
            .map(|path| format!(" names `{path}`, which does not exist"))
            .collect()
    });
}

#[test]
fn the_map_stays_short() {
    for_each_file(
        |f| f == Path::new("ARCHITECTURE.md"),
        |_, text| match text.lines().count() {
            lines if lines < ARCHITECTURE_LINES_MAX => Vec::new(),
            lines => {
                vec![format!("{lines} lines; it is read whole, so keep it under {ARCHITECTURE_LINES_MAX}")]
            }
        },
    );
}

// ---------------------------------------------------------------- the checker itself

#[test]
fn imports_are_read_from_use_lines_and_from_paths() {
    let modules =
        |source: &str| crate_imports(source).into_iter().map(|(_, m)| m.to_owned()).collect::<Vec<_>>();
    assert_eq!(modules("use crate::units::Picos;"), ["units"]);
    assert_eq!(modules("pub(crate) use crate::{units::{A, B}, meter, text::c};"), ["units", "meter", "text"]);
    assert_eq!(modules("let x: crate::engine::Seat = y;"), ["engine"]);
    assert_eq!(modules("pub(in crate::http) fn f() {}"), ["http"]);
    assert!(modules("pub(crate) fn f() {} mod crates {}").is_empty());
}

#[test]
fn an_import_upward_or_sideways_is_refused() {
    let refused = |module: &str, source: &str| !check_imports(module, source).is_empty();
    assert!(refused("meter", "use crate::engine::Step;"));
    assert!(refused("meter", "use crate::ledger::Receipt;"));
    assert!(refused("units", "fn f() { crate::http::g() }"));
    assert!(refused("shelf", ""), "a module without a level");
    assert!(!refused("engine", "use crate::{meter, units, engine::block};"));
    assert!(!refused("request", "use crate::units::Ticket;"));
    assert!(!refused("cli", "use crate::http::serve;"));
    assert!(!refused("meter", "// not crate::http\nlet s = \"crate::http\";"));
    assert_eq!(check_imports("text", "\n\nuse crate::http;").first().map(|c| &c[..2]), Some("3:"));
}

#[test]
fn sql_is_found_in_strings_only() {
    assert_eq!(check_sql("let q = \"SELECT id FROM t\";").len(), 1);
    assert_eq!(check_sql("let q = r#\"\n  INSERT INTO t VALUES (1)\"#;").len(), 1);
    assert!(check_sql("// SELECT id\nlet SELECT = 1; let s = \"select a model\";").is_empty());
}

#[test]
fn environment_reads_are_found_outside_tests() {
    assert_eq!(check_environment("fn f() { std::env::var(\"A\"); env :: var_os(x) }").len(), 2);
    assert!(check_environment("#[arg(env = \"OBOL_LISTEN\")] let v = env!(\"X\");").is_empty());
    let test = "fn f() {}\n#[cfg(test)]\nmod tests { fn g() { std::env::var(\"{\"); } }\n";
    assert!(check_environment(test).is_empty());
    assert_eq!(
        check_environment(&format!("{test}fn h() {{ std::env::vars() }}")),
        ["4: reads the environment: only main.rs and config.rs do"]
    );
}

#[test]
fn money_words_are_found_as_whole_words() {
    assert_eq!(check_no_money("use obol::units::Picos;").len(), 2);
    assert!(check_no_money("use obol_kernels::Cpu; // the price\nlet prices = 1;").is_empty());
}

#[test]
fn places_are_found_anywhere_in_a_text() {
    assert_eq!(check_places(concat!("a\nsee https://py", "pi.org/x and /t", "mp/y")).len(), 2);
    assert!(check_places("/var/lib/obol, target/tmp, ./work").is_empty());
}

#[test]
fn paths_are_read_from_backticks() {
    let folder = |name: &str| name == "src" || name == "engine";
    let found = |text: &str| named_paths(text, folder);
    assert_eq!(
        found("see `src/{a,b}.rs` and `engine/`, not `v1/models`"),
        ["src/a.rs", "src/b.rs", "engine/"]
    );
    assert_eq!(found("`main.rs` `obol serve` `/v1/x` `--data-dir` `a::b` src/none.rs"), ["main.rs"]);
    assert!(found("```\n`src/x.rs`\n```").is_empty());
    assert_eq!(expand_braces("{a,b}/{c,d}"), ["a/c", "a/d", "b/c", "b/d"]);
}
