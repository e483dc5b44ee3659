//! Bounds of files and batches as the configuration has them: `[batches]`.

use serde::Deserialize;

use super::ConfigError;
use super::size::bytes;

/// What files and batches may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Bytes of one uploaded file.
    pub file_bytes: u64,
    /// Bytes of all files together with which no more are taken.
    pub all_bytes: u64,
    /// Lines of one batch.
    pub lines: usize,
    /// Batches that have not ended.
    pub open: usize,
    /// Lines that run at the same time, all batches together; `None`: as many as there are sequences, and a few.
    pub running: Option<usize>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BatchesFile {
    max_file: Option<String>,
    max_files: Option<String>,
    max_lines: Option<usize>,
    max_open: Option<usize>,
    max_running: Option<usize>,
}

impl BatchesFile {
    pub(super) fn resolve(self) -> Result<BatchLimits, ConfigError> {
        let Self { max_file, max_files, max_lines, max_open, max_running } = self;
        let limits = BatchLimits {
            file_bytes: bytes("batches.max_file", max_file)?.unwrap_or(100 << 20),
            all_bytes: bytes("batches.max_files", max_files)?.unwrap_or(4 << 30),
            lines: max_lines.unwrap_or(50_000),
            open: max_open.unwrap_or(1_000),
            running: max_running,
        };
        for (name, value) in [
            ("batches.max_lines", Some(limits.lines)),
            ("batches.max_open", Some(limits.open)),
            ("batches.max_running", limits.running),
        ] {
            if value.is_some_and(|value| !(1..=1_000_000).contains(&value)) {
                return Err(ConfigError::Value { name, problem: "must be between 1 and 1000000".to_owned() });
            }
        }
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_have_defaults_and_are_checked() {
        let resolve = |text: &str| toml::from_str::<BatchesFile>(text).unwrap().resolve();
        let limits = resolve("max_file = '1MiB'\nmax_running = 3").unwrap();
        assert_eq!((limits.file_bytes, limits.lines, limits.running), (1 << 20, 50_000, Some(3)));
        let said = |text| resolve(text).unwrap_err().to_string();
        assert!(said("max_lines = 0").contains("batches.max_lines: must be"));
        assert!(said("max_file = 'much'").contains("batches.max_file: `much` is not a size"));
    }
}
