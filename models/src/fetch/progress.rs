//! How a fetch tells its progress: a trait, a bar for terminals that falls back to plain lines, and silence.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where a fetch tells what it does. Calls come from one thread at a time, in the order note, start,
/// (file, at..).., finish.
pub trait Progress: Sync {
    /// A line worth reading: a source that failed, a wait.
    fn note(&self, line: &str);
    /// A transfer begins; `total` is its length in bytes.
    fn start(&self, what: &str, total: u64);
    /// The transfer of several files has come to this one.
    fn file(&self, _name: &str) {}
    /// So many bytes are there.
    fn at(&self, bytes: u64);
    /// The transfer is over, well or badly.
    fn finish(&self);
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn note(&self, _: &str) {}
    fn start(&self, _: &str, _: u64) {}
    fn at(&self, _: u64) {}
    fn finish(&self) {}
}

/// To stderr: a bar on a terminal, else a line at the start, every five seconds and at the end.
#[derive(Debug, Default)]
pub struct Stderr {
    transfer: Mutex<Option<Transfer>>,
}

#[derive(Debug)]
enum Transfer {
    Bar(ProgressBar),
    Lines { what: String, file: String, total: u64, at: u64, next: Instant },
}

/// Between two plain lines of one transfer.
const LINES_EVERY: Duration = Duration::from_secs(5);

impl Stderr {
    /// Nothing is written before the first call.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn transfer(&self) -> std::sync::MutexGuard<'_, Option<Transfer>> {
        self.transfer.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Progress for Stderr {
    fn note(&self, line: &str) {
        match &*self.transfer() {
            Some(Transfer::Bar(bar)) => bar.println(line),
            _ => print_line(line),
        }
    }

    fn start(&self, what: &str, total: u64) {
        let transfer = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            bar.set_style(
                ProgressStyle::with_template(style).expect("the template is constant; this is a bug"),
            );
            bar.set_message(what.to_owned());
            Transfer::Bar(bar)
        } else {
            print_line(&format!("{what}: {} MB", megabytes(total)));
            let (what, next) = (what.to_owned(), Instant::now() + LINES_EVERY);
            Transfer::Lines { what, file: String::new(), total, at: 0, next }
        };
        *self.transfer() = Some(transfer);
    }

    fn file(&self, name: &str) {
        match &mut *self.transfer() {
            Some(Transfer::Bar(bar)) => bar.set_message(name.to_owned()),
            Some(Transfer::Lines { file, .. }) => *file = format!(", {name}"),
            None => {}
        }
    }

    fn at(&self, bytes: u64) {
        match &mut *self.transfer() {
            Some(Transfer::Bar(bar)) => bar.set_position(bytes),
            Some(Transfer::Lines { what, file, total, at, next }) => {
                *at = bytes;
                if Instant::now() >= *next {
                    print_line(&format!("{what}{file}: {} of {} MB", megabytes(bytes), megabytes(*total)));
                    *next = Instant::now() + LINES_EVERY;
                }
            }
            None => {}
        }
    }

    fn finish(&self) {
        match self.transfer().take() {
            Some(Transfer::Bar(bar)) => bar.finish_and_clear(),
            Some(Transfer::Lines { what, total, at, .. }) => {
                print_line(&format!("{what}: ended at {} of {} MB", megabytes(at), megabytes(total)));
            }
            None => {}
        }
    }
}

/// A closed stderr must not end the program, so a failed write is let go.
fn print_line(line: &str) {
    drop(writeln!(std::io::stderr().lock(), "{line}"));
}

fn megabytes(bytes: u64) -> u64 {
    bytes.div_ceil(1_000_000)
}
