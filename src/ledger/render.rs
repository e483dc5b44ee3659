//! A report as text: table, JSON, CSV. Exact decimals everywhere; nothing is computed here.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::report::{By, Report, Spend};
use crate::units::BlockNanos;

/// In place of a label that requests do not have.
const UNTAGGED: &str = "untagged";

const COLUMNS: [&str; 9] = [
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "gpu_seconds",
    "kv_byte_seconds",
    "usage_cost",
    "tier_discount",
    "loaded_cost",
];

fn cells(spend: &Spend) -> [String; 9] {
    [
        spend.requests.to_string(),
        spend.prompt_tokens.to_string(),
        spend.cached_tokens.to_string(),
        spend.completion_tokens.to_string(),
        spend.device_time.seconds(),
        BlockNanos(spend.kv_byte_nanos).byte_seconds(1),
        spend.usage_cost.decimal(),
        spend.discount.decimal(),
        spend.loaded_cost.decimal(),
    ]
}

impl Report {
    /// Aligned columns for a terminal: spend, then the house, then how it adds up to the bill.
    #[must_use]
    pub fn to_table(&self) -> String {
        let by = &self.query.by;
        let names = by.iter().map(|by| by.as_str());
        let header: Vec<String> = names.chain(["currency"]).chain(COLUMNS).map(str::to_owned).collect();
        let rows = self.rows.iter().map(|row| {
            let group = row.group.iter().map(|value| shown(value));
            group.chain([row.currency.clone()]).chain(cells(&row.spend)).collect()
        });
        let mut text = aligned(header, rows.collect(), by.len() + 1);
        text.push('\n');
        let header = ["house account", "currency", "gpu_seconds", "kv_block_seconds", "cost"];
        let house = self.house.iter().map(|house| {
            vec![
                house.account.clone(),
                house.currency.clone(),
                house.time.seconds(),
                house.kv.byte_seconds(1),
                house.money.decimal(),
            ]
        });
        text += &aligned(header.map(str::to_owned).to_vec(), house.collect(), 2);
        for (currency, sum) in &self.balances {
            let _infallible = write!(
                text,
                "\nbill {} {currency} = requests {} + house {} + open {}\n  of the house, {} in hours without requests\n",
                sum.bill.decimal(),
                sum.usage.decimal(),
                sum.house.decimal(),
                sum.open.decimal(),
                sum.unallocated.decimal()
            );
        }
        text
    }

    /// One JSON document: `rows`, `house`, `balances`. A label that requests do not have is null.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let names = || self.query.by.iter().copied().map(By::as_str);
        let rows = self.rows.iter().map(|row| {
            let labels = row.group.iter().map(|label| Some(label).filter(|label| !label.is_empty()));
            let mut object: Map<String, Value> =
                names().zip(labels).map(|(name, label)| (name.to_owned(), json!(label))).collect();
            object.insert("currency".to_owned(), json!(row.currency));
            for (index, (column, cell)) in COLUMNS.iter().zip(cells(&row.spend)).enumerate() {
                // Counts are numbers, quantities and money decimal strings.
                let value = if index < 4 { json!(cell.parse::<u64>().ok()) } else { json!(cell) };
                object.insert((*column).to_owned(), value);
            }
            object.insert("energy_mj".to_owned(), json!(row.spend.energy_mj));
            Value::Object(object)
        });
        let house = self.house.iter().map(|house| {
            json!({
                "account": house.account, "currency": house.currency, "gpu_seconds": house.time.seconds(),
                "kv_block_seconds": house.kv.byte_seconds(1), "cost": house.money.decimal(),
            })
        });
        let balances = self.balances.iter().map(|(currency, sum)| {
            json!({
                "currency": currency, "bill": sum.bill.decimal(), "usage": sum.usage.decimal(),
                "house": sum.house.decimal(), "open": sum.open.decimal(), "unallocated": sum.unallocated.decimal(),
            })
        });
        json!({
            "by": names().collect::<Vec<_>>(),
            "timezone": self.query.calendar.name(),
            "rows": rows.collect::<Vec<_>>(),
            "house": house.collect::<Vec<_>>(),
            "balances": balances.collect::<Vec<_>>(),
        })
    }

    /// RFC 4180: the spend rows, then a row for each house account, for what is open, and for house money that no
    /// requests carry. `kind` says which; each column of money adds up to the bill.
    #[must_use]
    pub fn to_csv(&self) -> String {
        let names: Vec<&str> = self.query.by.iter().copied().map(By::as_str).collect();
        let mut lines: Vec<Vec<String>> = Vec::new();
        let mut line = |cells: &[String]| lines.push(cells.to_vec());
        let header = ["kind"].into_iter().chain(names.iter().copied()).chain(["currency"]).chain(COLUMNS);
        line(&header.map(str::to_owned).collect::<Vec<_>>());
        for row in &self.rows {
            let group = row.group.iter().map(|label| shown(label));
            let labels = std::iter::once("usage".to_owned()).chain(group).chain([row.currency.clone()]);
            line(&labels.chain(cells(&row.spend)).collect::<Vec<_>>());
        }
        let mut apart = |kind: &str, currency: &str, seconds: String, usage: String, loaded: String| {
            let mut cells = vec![kind.to_owned()];
            cells.extend(names.iter().map(|_| String::new()));
            cells.push(currency.to_owned());
            cells.extend(vec![String::new(); 4]);
            cells.extend([seconds, String::new(), usage, loaded]);
            line(&cells);
        };
        for house in &self.house {
            let (seconds, money) = (house.time.seconds(), house.money.decimal());
            apart(&house.account, &house.currency, seconds, money, String::new());
        }
        for (currency, sum) in &self.balances {
            apart("open", currency, String::new(), sum.open.decimal(), sum.open.decimal());
            apart("unallocated", currency, String::new(), String::new(), sum.unallocated.decimal());
        }
        csv(lines)
    }
}

fn shown(value: &str) -> String {
    if value.is_empty() { UNTAGGED.to_owned() } else { value.chars().filter(|c| !c.is_control()).collect() }
}

/// Lines as RFC 4180 has them.
#[must_use]
pub fn csv(lines: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut text = String::new();
    for cells in lines {
        let cells: Vec<String> = cells.iter().map(|cell| quoted(cell)).collect();
        text += &cells.join(",");
        text += "\r\n";
    }
    text
}

/// A cell that a spreadsheet takes as text: quoted where needed, and no formula.
pub(super) fn quoted(cell: &str) -> String {
    let formula = cell.starts_with(['=', '+', '-', '@']);
    let number = cell.trim_start_matches('-').bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let guarded = if formula && !number { format!("'{cell}") } else { cell.to_owned() };
    if guarded.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", guarded.replace('"', "\"\""))
    } else {
        guarded
    }
}

/// Columns padded to their widest cell; the first `left` to the left, the rest to the right.
fn aligned(header: Vec<String>, rows: Vec<Vec<String>>, left: usize) -> String {
    let lines: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .enumerate()
            .map(
                |(column, (cell, &width))| {
                    if column < left { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                },
            )
            .collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}
