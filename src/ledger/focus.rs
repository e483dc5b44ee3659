//! Rows of the FinOps Open Cost and Usage Specification, FOCUS 1.2, as CSV: the ledger for cost tools.
//!
//! Source: the column rules of version 1.2 in the specification's repository,
//! <https://github.com/FinOps-Open-Cost-and-Usage-Spec/FOCUS_Spec>.
//! Does: a row for each roll-up row's device time and one for its KV memory, and a row for each house account, by
//! clock hour and device. Does not know: where they go.
//! Invariants: `BilledCost` of all rows is the bill without what is open, and so is `x_LoadedCost`; quantities are
//! exact in the `x_` columns, and cut after 24 places in FOCUS's own.
//!
//! A device is a capacity reservation: what nobody could use of it, or did not, is `Unused`. There are no
//! discounts, so the four costs are equal. House money is in rows of its own; requests' share of it stands beside
//! in `x_LoadedCost`. What flooring took is no usage: an `Adjustment`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use super::LedgerError;
use super::calendar::{utc_hour, utc_month};
use super::entry::{Amounts, CAP_OVERRUN, CRASH, DISCOUNT, ROUNDING};
use super::render::quoted;
use super::report::ReportQuery;
use super::rollup::{Dimension, Label};
use super::rows::{self, DeviceNames};
use super::showback::{Hour, HourRow, Showback};
use crate::units::Picos;
use crate::usage::{HouseKv, HouseTime};

/// FOCUS's columns, then ours.
const COLUMNS: [&str; 51] = [
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "CapacityReservationId",
    "CapacityReservationStatus",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuMeter",
    "SubAccountId",
    "SubAccountName",
    "SubAccountType",
    "Tags",
    "x_Account",
    "x_CachedTokens",
    "x_CompletionTokens",
    "x_DeviceNanoseconds",
    "x_Endpoint",
    "x_EnergyMillijoules",
    "x_KeyId",
    "x_KvByteNanoseconds",
    "x_LoadedCost",
    "x_Model",
    "x_PromptTokens",
    "x_RateVersion",
    "x_Requests",
    "x_ServiceTier",
    "x_Status",
];

const GIB: u128 = 1 << 30;
const HOUR_NANOS: u128 = 3_600_000_000_000;
const PLACES: usize = 24;

/// Writes the rows of the query's time, in pieces that end with a line. `by` and `only` have no effect.
///
/// # Errors
/// As `report`; and what `out` says.
pub fn focus(
    data_dir: &Path,
    query: &ReportQuery,
    mut out: impl FnMut(&str) -> std::io::Result<()>,
) -> Result<(), LedgerError> {
    let (mut connection, path) = rows::open_for_reading(data_dir)?;
    let header = COLUMNS.join(",") + "\r\n";
    let mut written = out(&header);
    rows::in_snapshot(&mut connection, &path, |connection| {
        let devices = rows::device_names(connection)?;
        let mut showback = query.open(connection)?;
        showback.walk_hours(connection, |showback, hour| {
            if written.is_ok() {
                written = out(&rows_of(showback, hour, &devices));
            }
            Ok(())
        })
    })?;
    written.map_err(|source| LedgerError::Output { source })
}

/// What is measured, and in which unit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Meter {
    Time,
    Memory,
}

impl Meter {
    fn sku(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Time => ("device-time", "Device time", "Device-Hours"),
            Self::Memory => ("kv-memory", "KV cache memory", "GiB-Hours"),
        }
    }

    fn hours(self, quantity: u128) -> String {
        match self {
            Self::Time => decimal(quantity, HOUR_NANOS),
            Self::Memory => decimal(quantity, GIB * HOUR_NANOS),
        }
    }
}

/// A row by its columns' names; those that are not there are null.
struct Cells(BTreeMap<&'static str, String>);

impl Cells {
    fn new(showback: &Showback, device: usize, hour: u64, devices: &DeviceNames) -> Self {
        let (currency, device) = &showback.devices[device];
        let (first, next) = utc_month(hour);
        let mut cells = Self(BTreeMap::new());
        for (column, text) in [
            ("BillingAccountId", "obol"),
            ("BillingAccountName", "Obol"),
            ("BillingCurrency", currency),
            ("BillingPeriodStart", &first),
            ("BillingPeriodEnd", &next),
            ("ChargePeriodStart", &utc_hour(hour)),
            ("ChargePeriodEnd", &utc_hour(hour + 1)),
            ("InvoiceIssuerName", "Obol"),
            ("ProviderName", "Obol"),
            ("PublisherName", "Obol"),
            ("ServiceCategory", "AI and Machine Learning"),
            ("ServiceSubcategory", "Generative AI"),
            ("ServiceName", "LLM inference"),
            ("ResourceId", device),
        ] {
            cells.set(column, text);
        }
        if let Some((name, kind)) = devices.get(device) {
            cells.set("ResourceName", name);
            cells.set("ResourceType", kind);
        }
        cells
    }

    fn set(&mut self, column: &'static str, text: impl Into<String>) {
        self.0.insert(column, text.into());
    }

    fn cost(&mut self, cost: Picos, loaded: Picos) {
        for column in ["BilledCost", "ContractedCost", "EffectiveCost", "ListCost"] {
            self.set(column, cost.decimal());
        }
        self.set("x_LoadedCost", loaded.decimal());
    }

    /// Nanoseconds of a device, or byte-nanoseconds.
    fn usage(&mut self, meter: Meter, quantity: u128, used: bool) {
        let (sku, name, unit) = meter.sku();
        for column in ["ConsumedQuantity", "PricingQuantity"] {
            self.set(column, meter.hours(quantity));
        }
        for column in ["ConsumedUnit", "PricingUnit"] {
            self.set(column, unit);
        }
        let exact = if meter == Meter::Time { "x_DeviceNanoseconds" } else { "x_KvByteNanoseconds" };
        self.set(exact, quantity.to_string());
        self.set("ChargeCategory", "Usage");
        self.set("ChargeFrequency", "Usage-Based");
        self.set("SkuId", sku);
        self.set("SkuMeter", name);
        let device = self.0["ResourceId"].clone();
        self.set("CapacityReservationId", device);
        self.set("CapacityReservationStatus", if used { "Used" } else { "Unused" });
    }

    fn line(&self, text: &mut String) {
        for (place, column) in COLUMNS.iter().enumerate() {
            if place > 0 {
                text.push(',');
            }
            text.push_str(&self.0.get(column).map(|cell| quoted(cell)).unwrap_or_default());
        }
        text.push_str("\r\n");
    }
}

fn rows_of(showback: &Showback, hour: &Hour<'_>, devices: &DeviceNames) -> String {
    let mut text = String::new();
    for row in hour.rows.iter().filter(|row| !showback.is_error(row)) {
        usage_rows(showback, hour.hour, row, devices, &mut text);
    }
    for ((device, account), amounts) in hour.house {
        if *amounts == Amounts::default() {
            continue;
        }
        let mut cells = Cells::new(showback, *device, hour.hour, devices);
        let alone = hour.unallocated.iter().any(|(of, _)| of == device);
        cells.cost(amounts.money, if alone { amounts.money } else { Picos::ZERO });
        cells.set("x_Account", account);
        cells.set("ChargeDescription", format!("House: {}", said(account)));
        if [ROUNDING, CAP_OVERRUN, DISCOUNT].contains(&account.as_str()) {
            cells.set("ChargeCategory", "Adjustment");
        } else if amounts.time.0 > 0 {
            cells.usage(Meter::Time, u128::from(amounts.time.0), is_used(account));
        } else {
            let bytes = showback.bytes_per_block(*device).into();
            cells.usage(Meter::Memory, amounts.kv.0.saturating_mul(bytes), is_used(account));
        }
        cells.line(&mut text);
    }
    text
}

/// One for device time and one for memory; counts and the share of the house stand in the first of them.
fn usage_rows(showback: &Showback, hour: u64, row: &HourRow, devices: &DeviceNames, text: &mut String) {
    let (dimension, sums) = (&showback.dimensions.sorted[row.dimension], &row.sums);
    let bytes = sums.kv.0.saturating_mul(u128::from(dimension.bytes_per_block));
    let parts = [(Meter::Time, u128::from(sums.device.0), sums.time), (Meter::Memory, bytes, sums.memory)];
    let mut share = Some(row.share);
    for (meter, quantity, cost) in parts.into_iter().filter(|(_, quantity, _)| *quantity > 0) {
        let mut cells = Cells::new(showback, showback.device_of(row), hour, devices);
        cells.usage(meter, quantity, true);
        labels(&mut cells, dimension);
        cells.set("ChargeDescription", format!("{}: {}", dimension.label(Label::Model), meter.sku().1));
        if let Some(share) = share.take() {
            cells.cost(cost, cost + share);
            cells.set("x_Requests", sums.requests.to_string());
            cells.set("x_PromptTokens", sums.prompt_tokens.to_string());
            cells.set("x_CachedTokens", sums.cached_tokens.to_string());
            cells.set("x_CompletionTokens", sums.completion_tokens.to_string());
            if sums.metered > 0 {
                cells.set("x_EnergyMillijoules", sums.energy_mj.to_string());
            }
        } else {
            cells.cost(cost, cost);
        }
        cells.line(text);
    }
    for (credit, what) in [
        (sums.overrun, "Past a budget's cap: on the house"),
        (sums.discount, "Service tier: what it costs less"),
    ] {
        if credit == Picos::ZERO {
            continue;
        }
        let mut cells = Cells::new(showback, showback.device_of(row), hour, devices);
        labels(&mut cells, dimension);
        cells.set("ChargeCategory", "Credit");
        cells.set("ChargeDescription", what);
        let credit = Picos(-credit.0);
        cells.cost(credit, credit);
        cells.line(text);
    }
}

fn labels(cells: &mut Cells, dimension: &Dimension) {
    let label = |label| dimension.label(label);
    let tags = [
        ("team", Label::Team),
        ("feature", Label::Feature),
        ("environment", Label::Environment),
        ("cost_center", Label::CostCenter),
    ];
    let tags: serde_json::Map<_, _> = tags
        .into_iter()
        .filter(|(_, tag)| !label(*tag).is_empty())
        .map(|(name, tag)| (name.to_owned(), json!(label(tag))))
        .collect();
    if !tags.is_empty() {
        cells.set("Tags", serde_json::Value::Object(tags).to_string());
    }
    for (column, of) in [
        ("SubAccountId", Label::Tenant),
        ("SubAccountName", Label::Tenant),
        ("x_Model", Label::Model),
        ("x_RateVersion", Label::RateVersion),
        ("x_KeyId", Label::Key),
        ("x_Endpoint", Label::Endpoint),
        ("x_Status", Label::Status),
        ("x_ServiceTier", Label::Tier),
    ] {
        cells.set(column, label(of));
    }
    cells.set("SubAccountType", "Tenant");
}

/// Whether a house account stands for capacity that did something.
fn is_used(account: &str) -> bool {
    let unused = [HouseTime::Idle.account(), HouseTime::HostGap.account(), HouseKv::Free.account(), CRASH];
    !unused.contains(&account)
}

fn said(account: &str) -> &str {
    account.strip_prefix("house:").unwrap_or(account)
}

/// `numerator / denominator`, cut after `PLACES` places, without zeros at the end.
fn decimal(numerator: u128, denominator: u128) -> String {
    let mut text = (numerator / denominator).to_string();
    let mut rest = numerator % denominator;
    if rest > 0 {
        text.push('.');
    }
    for _ in 0..PLACES {
        if rest == 0 {
            break;
        }
        rest *= 10;
        text.push(char::from(b'0' + u8::try_from(rest / denominator).expect("one digit")));
        rest %= denominator;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_decimals() {
        assert_eq!(Meter::Time.hours(HOUR_NANOS), "1");
        assert_eq!(Meter::Time.hours(9_000_000_000_000), "2.5");
        assert_eq!(Meter::Time.hours(1), "0.000000000000277777777777");
        assert_eq!(Meter::Memory.hours(3 * GIB * HOUR_NANOS / 2), "1.5");
        assert_eq!(Meter::Memory.hours(0), "0");
    }

    #[test]
    fn columns_are_named_once_and_in_order() {
        let mut sorted = COLUMNS.to_vec();
        sorted.sort_by_key(|column| (column.starts_with("x_"), *column));
        sorted.dedup();
        assert_eq!(COLUMNS.to_vec(), sorted);
    }
}
