//! Sizes as people write them.

use super::ConfigError;

/// `512MiB`, `4GiB`, `1.5GB`, `1048576`.
pub(super) fn bytes(name: &'static str, text: Option<String>) -> Result<Option<u64>, ConfigError> {
    let Some(text) = text else { return Ok(None) };
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let scale: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1048576.0,
        "g" | "gib" => 1073741824.0,
        _ => f64::NAN,
    };
    match number.parse::<f64>().map(|n| n * scale) {
        Ok(value) if (1.0..1e15).contains(&value) => Ok(Some(value as u64)),
        _ => Err(ConfigError::Value {
            name,
            problem: format!("`{text}` is not a size; write a number with KiB, MiB, GiB, KB, MB or GB"),
        }),
    }
}
