//! What is being measured, on stderr: a bar on a terminal, else a line a stage.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Stages follow one another; each ends when the next begins.
pub struct Progress {
    bar: Option<ProgressBar>,
    silent: bool,
}

impl Progress {
    #[must_use]
    pub fn stderr() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{msg} [{bar:30}] {pos}/{len} {elapsed}";
            let style = ProgressStyle::with_template(style).expect("the template is constant; this is a bug");
            ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr()).with_style(style)
        });
        Self { bar, silent: false }
    }

    #[must_use]
    pub fn silent() -> Self {
        Self { bar: None, silent: true }
    }

    /// A stage of `total` parts begins.
    pub fn stage(&self, of: &str, what: &str, total: u64) {
        match &self.bar {
            Some(bar) => {
                bar.reset();
                bar.set_length(total);
                bar.set_message(format!("{of}: {what}"));
            }
            // A closed stderr is no reason to stop.
            None if !self.silent => drop(writeln!(std::io::stderr().lock(), "{of}: {what}")),
            None => {}
        }
    }

    /// So many parts are done.
    pub fn at(&self, parts: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(parts);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
