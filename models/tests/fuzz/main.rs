//! Hostile model files: spoiled fixtures go the whole way from opening to a forward pass, and the answer must
//! be a model or an error; no panic, no hang, no memory far beyond the file.
//!
//! A case is made from its number alone. `OBOL_FUZZ_CASE=77` repeats one; `OBOL_FUZZ_SECONDS=600` runs for that
//! long, from the case `OBOL_FUZZ_START` or one that the clock chooses. Should the process die, its last lines
//! and the file that it names at the start say in which case.

mod gguf;
mod json;
mod random;
mod regressions;
mod safetensors;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use obol_kernels::Cpu;
use obol_models::batch::{Batch, CausalLm, Span};
use obol_models::load::LoadOptions;
use obol_models::quant::Quant;
use obol_models::{Decoder, KvDtype, ModelFiles, text_files};

use random::Random;

/// A case may hold that much more memory than there was before it; fixtures have a few hundred KB.
const BYTES_MAX: usize = 64 << 20;
const CASE_MAX: Duration = Duration::from_secs(5);
/// A case that takes so long will never end.
const HANG: Duration = Duration::from_secs(120);
/// Cases of the ordinary run.
const CASES: u64 = 600;

// ---------------------------------------------------------------- memory

struct Limited;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// What may be live; beyond it memory is refused.
static ALLOWED: AtomicUsize = AtomicUsize::new(usize::MAX);
/// The largest request that was refused.
static REFUSED: AtomicUsize = AtomicUsize::new(0);
static CASE: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is handed on to the system's allocator, or refused with null as an allocator may.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        if live > ALLOWED.load(Relaxed) {
            LIVE.fetch_sub(layout.size(), Relaxed);
            REFUSED.fetch_max(layout.size(), Relaxed);
            return std::ptr::null_mut();
        }
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static LIMITED: Limited = Limited;

// ---------------------------------------------------------------- one model

/// How far a model came: an error's kind, or the end.
fn try_model(path: &Path, random: &mut Random) -> String {
    let threads = 1 + random.below(2);
    let quant = random.pick(&[Quant::File, Quant::File, Quant::Int4, Quant::Int8, Quant::F32]);
    let kv_dtype = random.pick(&[KvDtype::F32, KvDtype::default()]);
    let rows = 1 + random.below(20);
    let kind = |error: &dyn std::fmt::Debug| {
        let text = format!("{error:?}");
        text.chars().take_while(char::is_ascii_alphanumeric).collect::<String>()
    };
    let files = match ModelFiles::open(path) {
        Ok(files) => files,
        Err(error) => return kind(&error),
    };
    files.fingerprint();
    drop((files.name(), files.precision()));
    if let ModelFiles::Gguf(file) = &files {
        drop(text_files::from_gguf(file));
    }
    let options = LoadOptions { threads, quant, kv_dtype, ..LoadOptions::default() };
    let mut model = match Decoder::load(&files, Cpu::new(threads), &options) {
        Ok(model) => model,
        Err(error) => return kind(&error),
    };
    if let Err(error) = model.allocate_kv(3, 16) {
        return format!("loaded, no pool: {}", kind(&error));
    }
    let (rows, vocab) = (rows.min(model.context_length()), model.vocab_size());
    let batch = Batch {
        tokens: (0..rows).map(|_| random.below(vocab) as u32).collect(),
        positions: (0..rows as u32).collect(),
        spans: vec![Span { rows: 0..rows, table: 0..3 }],
        block_tables: vec![2, 0, 1],
        logit_rows: vec![rows - 1],
        hidden_rows: Vec::new(),
    };
    match model.forward(&batch) {
        Ok(logits) => assert_eq!(logits.len(), vocab, "a row of logits"),
        Err(error) => return format!("loaded, not computed: {}", kind(&error)),
    }
    "loaded".into()
}

// ---------------------------------------------------------------- many

/// What spoils files of one format.
struct Format {
    name: &'static str,
    /// Writes the spoiled model of a case into the directory; returns its path.
    spoil: fn(&mut Random, &Path, &mut Vec<String>) -> PathBuf,
}

fn panic_text() -> &'static Mutex<String> {
    static TEXT: Mutex<String> = Mutex::new(String::new());
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            let message = info.payload_as_str().unwrap_or("");
            let place = info.location().map(ToString::to_string).unwrap_or_default();
            if ALLOWED.load(Relaxed) == usize::MAX {
                drop(writeln!(std::io::stderr(), "outside of a case: {place}: {message}"));
            }
            let mut text = TEXT.lock().unwrap_or_else(PoisonError::into_inner);
            if text.is_empty() {
                *text = format!("{place}: {message}");
            }
        }));
    });
    &TEXT
}

/// Runs case `number`; the kind of its end, or what went wrong, and what had been done to the file.
fn run_case(format: &Format, number: u64, dir: &Path) -> (Result<String, String>, Vec<String>) {
    let mut random = Random::new(number);
    let mut changes = Vec::new();
    panic_text().lock().unwrap_or_else(PoisonError::into_inner).clear();
    // A mistake of the test itself must not end a long run.
    let spoiled = catch_unwind(AssertUnwindSafe(|| (format.spoil)(&mut random, dir, &mut changes)));
    let Ok(path) = spoiled else {
        let text = panic_text().lock().unwrap_or_else(PoisonError::into_inner);
        return (Err(format!("no model was made: panic at {text}")), changes);
    };
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    REFUSED.store(0, Relaxed);
    ALLOWED.store(before + BYTES_MAX, Relaxed);
    let start = Instant::now();
    let end = catch_unwind(AssertUnwindSafe(|| try_model(&path, &mut random)));
    ALLOWED.store(usize::MAX, Relaxed);
    let (took, refused) = (start.elapsed(), REFUSED.load(Relaxed));
    let result = match end {
        Err(_) => Err(format!("panic at {}", panic_text().lock().unwrap_or_else(PoisonError::into_inner))),
        Ok(_) if refused > 0 => Err(format!("more than {BYTES_MAX} bytes: {refused} at once")),
        Ok(_) if took > CASE_MAX => Err("too slow".into()),
        Ok(kind) => Ok(kind),
    };
    (result, changes)
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a whole number"))
}

/// One at a time: memory is counted for the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn survive(format: &Format) {
    let _alone = alone();
    let seconds = number("OBOL_FUZZ_SECONDS");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
    let (first, last) = match (number("OBOL_FUZZ_CASE"), seconds) {
        (Some(case), _) => (case, case + 1),
        (None, Some(_)) => (number("OBOL_FUZZ_START").unwrap_or(now >> 10), u64::MAX),
        (None, None) => (0, CASES),
    };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let note = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}.case", format.name));
    println!("{}: from case {first}; should the process die, see {}", format.name, note.display());
    let start = Instant::now();
    watch(format.name);
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    let mut failures: BTreeMap<String, (u64, Vec<String>)> = BTreeMap::new();
    let (mut peak, mut slowest, mut cases) = (0, Duration::ZERO, 0);
    for case in first..last {
        if seconds.is_some_and(|seconds| start.elapsed().as_secs() >= seconds) {
            break;
        }
        CASE.store(case, Relaxed);
        std::fs::write(&note, case.to_string()).expect("a note of the case");
        let (before, began) = (LIVE.load(Relaxed), Instant::now());
        let (result, changes) = run_case(format, case, dir.path());
        (peak, slowest) = (peak.max(PEAK.load(Relaxed).saturating_sub(before)), slowest.max(began.elapsed()));
        cases += 1;
        if number("OBOL_FUZZ_CASE").is_some() {
            println!("{result:?}\n{changes:#?}");
        }
        match result {
            Ok(kind) => *ends.entry(kind).or_default() += 1,
            Err(problem) => {
                *ends.entry("FAILED".into()).or_default() += 1;
                if failures.len() < 50 && !failures.contains_key(&problem) {
                    println!("{} case {case}: {problem}\n    {}", format.name, changes.join("\n    "));
                    failures.insert(problem, (case, changes));
                }
            }
        }
    }
    CASE.store(0, Relaxed);
    println!(
        "{}: {cases} cases in {:.0?} from {first} on, at most {} MiB and {slowest:.1?}; {} failures",
        format.name,
        start.elapsed(),
        peak >> 20,
        failures.len()
    );
    for (kind, count) in &ends {
        println!("{count:10} {kind}");
    }
    let name = format.name;
    assert!(failures.is_empty(), "{name}: repeat with OBOL_FUZZ_CASE=...: {failures:#?}");
    assert!(cases < CASES || ends.get("loaded").is_some_and(|loaded| loaded * 50 > cases), "few get far");
}

/// Ends the process, with the case's number, when a case hangs.
#[expect(clippy::disallowed_methods, reason = "a thread that hangs cannot be made to panic")]
fn watch(name: &'static str) {
    std::thread::spawn(move || {
        let (mut last, mut since) = (0, Instant::now());
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let case = CASE.load(Relaxed);
            if case != last || case == 0 {
                (last, since) = (case, Instant::now());
            } else if since.elapsed() > HANG {
                drop(writeln!(std::io::stderr(), "{name} case {case} hangs"));
                std::process::abort();
            }
        }
    });
}

#[test]
fn spoiled_gguf_files_are_survived() {
    survive(&Format { name: "gguf", spoil: gguf::spoil });
}

#[test]
fn spoiled_safetensors_are_survived() {
    survive(&Format { name: "safetensors", spoil: safetensors::spoil });
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}
