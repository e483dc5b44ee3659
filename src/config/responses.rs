//! How long responses are kept, as the configuration file has it: `[responses]`.

use serde::Deserialize;

use super::ConfigError;
use super::size::bytes;

const DAYS: u32 = 30;
const BYTES: u64 = 1 << 30;
const DAYS_MAX: u32 = 36_500;

/// How long and how much of what clients had answered is kept for them to go on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// 0: nothing is kept.
    pub days: u32,
    /// Of all together; past it the oldest go.
    pub bytes: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ResponsesFile {
    days: Option<u32>,
    bytes: Option<String>,
}

impl ResponsesFile {
    pub(super) fn resolve(self) -> Result<Retention, ConfigError> {
        let days = self.days.unwrap_or(DAYS);
        if days > DAYS_MAX {
            let problem = format!("{days} is over {DAYS_MAX}");
            return Err(ConfigError::Value { name: "responses.days", problem });
        }
        Ok(Retention { days, bytes: bytes("responses.bytes", self.bytes)?.unwrap_or(BYTES) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_are_kept_for_a_month_unless_told_otherwise() {
        let read = |text: &str| toml::from_str::<ResponsesFile>(text).unwrap().resolve();
        assert_eq!(read("").unwrap(), Retention { days: 30, bytes: 1 << 30 });
        let told = read("days = 0\nbytes = '2MiB'").unwrap();
        assert_eq!(told, Retention { days: 0, bytes: 2 << 20 });
        assert!(read("days = 100000").unwrap_err().to_string().contains("responses.days"));
        assert!(read("bytes = 'lots'").unwrap_err().to_string().contains("responses.bytes"));
    }
}
