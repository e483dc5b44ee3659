//! Who is computed next when not everybody can be: `--scheduling` and `[scheduling.weights]`.

use std::collections::BTreeMap;
use std::str::FromStr;

use clap::ValueEnum;
use serde::Deserialize;

use super::ConfigError;
use super::decimal::Decimal;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheduling {
    /// First come, first served.
    Fcfs,
    /// Each tenant's share of the device follows its weight; one tenant's requests in order of arrival.
    Fair,
}

/// How much of the device a tenant gets beside others, in millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weight(u64);

impl Weight {
    pub const ONE: Self = Self(1_000_000);

    #[must_use]
    pub fn millionths(self) -> u64 {
        self.0
    }
}

impl FromStr for Weight {
    type Err = String;

    /// A decimal from 0.001 to 1000 with at most 6 places.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no weight; write 0.001 to 1000, with at most 6 decimal places");
        let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(part) || whole.len() > 4 || part.len() > 6 {
            return Err(wrong());
        }
        let millionths = format!("{whole}{part:0<6}").parse().map_err(|_| wrong())?;
        (1_000..=1_000_000_000).contains(&millionths).then_some(Self(millionths)).ok_or_else(wrong)
    }
}

/// The tenants' weights; 1 for those that are not named.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Weights(BTreeMap<String, Weight>);

impl Weights {
    #[must_use]
    pub fn new(weights: impl IntoIterator<Item = (String, Weight)>) -> Self {
        Self(weights.into_iter().collect())
    }

    #[must_use]
    pub fn of(&self, tenant: &str) -> Weight {
        self.0.get(tenant).copied().unwrap_or(Weight::ONE)
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SchedulingFile {
    #[serde(default)]
    weights: BTreeMap<String, Decimal>,
    pub(super) priority: Option<Vec<String>>,
}

impl SchedulingFile {
    pub(super) fn weights(self) -> Result<Weights, ConfigError> {
        let weight = |(tenant, weight): (String, Decimal)| match weight.text().parse() {
            Ok(weight) => Ok((tenant, weight)),
            Err(problem) => {
                let problem = format!("{tenant}: {problem}");
                Err(ConfigError::Value { name: "scheduling.weights", problem })
            }
        };
        self.weights.into_iter().map(weight).collect::<Result<_, _>>().map(Weights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_exact_decimals_within_bounds() {
        let read = |text: &str| text.parse::<Weight>().map(Weight::millionths);
        let good = [("1", 1_000_000), ("2.5", 2_500_000), ("0.001", 1_000), ("1000", 1_000_000_000)];
        for (text, millionths) in good {
            assert_eq!(read(text), Ok(millionths), "{text}");
        }
        for text in ["", ".", "1.", "0", "-1", "+1", "1e3", "0.0009", "1000.1", "1.0000001", "NaN"] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn who_is_not_named_weighs_one() {
        let file: SchedulingFile = toml::from_str("weights = { a = 3, 'b c' = '0.5', d = 2.0 }").unwrap();
        let weights = file.weights().unwrap();
        let millionths = ["a", "b c", "d", "e"].map(|tenant| weights.of(tenant).millionths());
        assert_eq!(millionths, [3_000_000, 500_000, 2_000_000, 1_000_000]);
        let file: SchedulingFile = toml::from_str("weights = { a = 0 }").unwrap();
        assert!(file.weights().unwrap_err().to_string().contains("scheduling.weights: a: `0` is no weight"));
    }
}
