//! The rate card as the configuration file has it: `[rates]`, `[rates.tiers]` and `[rates.devices.*]`.

use std::collections::BTreeMap;

use obol_models::device::DeviceId;
use serde::Deserialize;

use super::ConfigError;
use super::decimal::Decimal;
use crate::request::Tier;

/// The price of a CPU device when the configuration names none, per hour.
pub const DEFAULT_DEVICE_HOUR: &str = "0.10";
const DEFAULT_KV_SHARE: &str = "0.20";
const DEFAULT_CURRENCY: &str = "USD";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RatesFile {
    device_hour: Option<Decimal>,
    kv_share: Option<Decimal>,
    currency: Option<String>,
    #[serde(default)]
    tiers: BTreeMap<Tier, Decimal>,
    /// By the device's name.
    #[serde(default)]
    devices: BTreeMap<String, DeviceRateFile>,
}

/// What one device differs in from the others.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceRateFile {
    device_hour: Option<Decimal>,
    kv_share: Option<Decimal>,
}

/// The rate card's text; the ledger parses it exactly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rates {
    pub device_hour: String,
    pub kv_share: String,
    pub currency: String,
    /// What of its cost a request of these tiers pays, 0 to 1; those that are not named pay all.
    pub tiers: Vec<(Tier, String)>,
    /// Nobody configured a price: the default for a CPU device is used.
    pub is_default: bool,
    /// Of devices with a price of their own.
    pub devices: Vec<(DeviceId, DeviceRate)>,
}

/// One device's price, in the currency of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRate {
    pub device_hour: String,
    pub kv_share: String,
}

impl Rates {
    pub(super) fn resolve(file: RatesFile) -> Result<Self, ConfigError> {
        let is_default = file.device_hour.is_none() && file.devices.is_empty();
        let device_hour = file.device_hour.map_or_else(|| DEFAULT_DEVICE_HOUR.into(), Decimal::text);
        let kv_share = file.kv_share.map_or_else(|| DEFAULT_KV_SHARE.into(), Decimal::text);
        let mut devices: Vec<(DeviceId, DeviceRate)> = Vec::new();
        for (name, rate) in file.devices {
            let wrong = |problem| ConfigError::Value { name: "rates.devices", problem };
            let device = name.parse().map_err(wrong)?;
            if devices.iter().any(|(known, _)| *known == device) {
                return Err(wrong(format!("{device} is priced twice")));
            }
            let rate = DeviceRate {
                device_hour: rate.device_hour.map_or_else(|| device_hour.clone(), Decimal::text),
                kv_share: rate.kv_share.map_or_else(|| kv_share.clone(), Decimal::text),
            };
            devices.push((device, rate));
        }
        let currency = file.currency.unwrap_or_else(|| DEFAULT_CURRENCY.into());
        let tiers = file.tiers.into_iter().map(|(tier, price)| (tier, price.text())).collect();
        Ok(Self { device_hour, kv_share, currency, tiers, is_default, devices })
    }

    /// As the rate card takes them.
    pub fn tiers(&self) -> impl Iterator<Item = (Tier, &str)> {
        self.tiers.iter().map(|(tier, price)| (*tier, price.as_str()))
    }

    /// What a device costs: its own price, or everybody's.
    #[must_use]
    pub fn of(&self, device: DeviceId) -> DeviceRate {
        let own = self.devices.iter().find(|(known, _)| *known == device).map(|(_, rate)| rate.clone());
        own.unwrap_or_else(|| DeviceRate {
            device_hour: self.device_hour.clone(),
            kv_share: self.kv_share.clone(),
        })
    }
}
