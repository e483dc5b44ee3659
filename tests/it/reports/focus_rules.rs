//! The rules of FOCUS 1.2 for the columns that we write, from the specification's column pages: presence, types,
//! nullability, allowed values, and how columns go together.

use std::collections::BTreeMap;

use obol::ledger::Calendar;
use obol::units::Picos;
use serde_json::Value;

pub(crate) type Row = BTreeMap<String, String>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Type {
    Decimal,
    Text,
    Time,
    /// A flat JSON object of finished values.
    Pairs,
}

/// Name, type, whether it must be there, whether it may be null, allowed values (all where none are named).
type Column = (&'static str, Type, bool, bool, &'static [&'static str]);

const MANDATORY: bool = true;
const NULLABLE: bool = true;

const COLUMNS: [Column; 36] = [
    ("BilledCost", Type::Decimal, MANDATORY, false, &[]),
    ("EffectiveCost", Type::Decimal, MANDATORY, false, &[]),
    ("ContractedCost", Type::Decimal, MANDATORY, false, &[]),
    ("ListCost", Type::Decimal, MANDATORY, false, &[]),
    ("PricingQuantity", Type::Decimal, MANDATORY, NULLABLE, &[]),
    ("BillingAccountId", Type::Text, MANDATORY, false, &[]),
    ("BillingAccountName", Type::Text, MANDATORY, NULLABLE, &[]),
    ("BillingCurrency", Type::Text, MANDATORY, false, &[]),
    ("BillingPeriodStart", Type::Time, MANDATORY, false, &[]),
    ("BillingPeriodEnd", Type::Time, MANDATORY, false, &[]),
    ("ChargeCategory", Type::Text, MANDATORY, false, &["Usage", "Purchase", "Tax", "Credit", "Adjustment"]),
    ("ChargeClass", Type::Text, MANDATORY, NULLABLE, &["Correction"]),
    ("ChargeDescription", Type::Text, MANDATORY, NULLABLE, &[]),
    ("ChargePeriodStart", Type::Time, MANDATORY, false, &[]),
    ("ChargePeriodEnd", Type::Time, MANDATORY, false, &[]),
    ("InvoiceIssuerName", Type::Text, MANDATORY, false, &[]),
    ("PricingUnit", Type::Text, MANDATORY, NULLABLE, &[]),
    ("ProviderName", Type::Text, MANDATORY, false, &[]),
    ("PublisherName", Type::Text, MANDATORY, false, &[]),
    ("ServiceCategory", Type::Text, MANDATORY, false, &["AI and Machine Learning", "Compute", "Storage"]),
    ("ServiceName", Type::Text, MANDATORY, false, &[]),
    ("CapacityReservationId", Type::Text, false, NULLABLE, &[]),
    ("CapacityReservationStatus", Type::Text, false, NULLABLE, &["Used", "Unused"]),
    ("ChargeFrequency", Type::Text, false, NULLABLE, &["One-Time", "Recurring", "Usage-Based"]),
    ("ConsumedQuantity", Type::Decimal, false, NULLABLE, &[]),
    ("ConsumedUnit", Type::Text, false, NULLABLE, &[]),
    ("ResourceId", Type::Text, false, NULLABLE, &[]),
    ("ResourceName", Type::Text, false, NULLABLE, &[]),
    ("ResourceType", Type::Text, false, NULLABLE, &[]),
    ("ServiceSubcategory", Type::Text, false, false, &["Generative AI", "AI Platforms", "Machine Learning"]),
    ("SkuId", Type::Text, false, NULLABLE, &[]),
    ("SkuMeter", Type::Text, false, NULLABLE, &[]),
    ("SubAccountId", Type::Text, false, NULLABLE, &[]),
    ("SubAccountName", Type::Text, false, NULLABLE, &[]),
    ("SubAccountType", Type::Text, false, NULLABLE, &[]),
    ("Tags", Type::Pairs, false, NULLABLE, &[]),
];

/// Checks a whole file, and gives its rows.
pub(crate) fn check(text: &str) -> Vec<Row> {
    let mut lines = csv(text).into_iter();
    let header = lines.next().expect("a header");
    for (name, _, mandatory, ..) in COLUMNS {
        assert!(!mandatory || header.iter().any(|column| column == name), "{name} is missing");
    }
    for column in &header {
        let known = COLUMNS.iter().any(|(name, ..)| name == column);
        assert!(known || column.starts_with("x_"), "{column} is neither FOCUS's nor marked as ours");
        assert_eq!(header.iter().filter(|other| *other == column).count(), 1, "{column}");
    }
    let rows: Vec<Row> = lines
        .map(|cells| {
            assert_eq!(cells.len(), header.len(), "{cells:?}");
            header.iter().cloned().zip(cells).collect()
        })
        .collect();
    assert!(!rows.is_empty());
    for row in &rows {
        for column in COLUMNS {
            check_cell(row, column);
        }
        check_together(row);
    }
    rows
}

fn check_cell(row: &Row, (name, kind, _, nullable, allowed): Column) {
    let Some(cell) = row.get(name) else { return };
    if cell.is_empty() {
        assert!(nullable, "{name} is null: {row:?}");
        return;
    }
    assert!(allowed.is_empty() || allowed.contains(&cell.as_str()), "{name} = {cell:?}");
    match kind {
        Type::Text => assert_eq!(cell.trim(), cell, "{name}"),
        Type::Decimal => check_decimal(name, cell),
        Type::Time => {
            let pattern = |at: usize, c: char| match at {
                4 | 7 => c == '-',
                10 => c == 'T',
                13 | 16 => c == ':',
                19 => c == 'Z',
                _ => c.is_ascii_digit(),
            };
            assert!(
                cell.len() == 20 && cell.char_indices().all(|(at, c)| pattern(at, c)),
                "{name} = {cell:?}"
            );
            Calendar::utc().instant(cell).expect("a time");
        }
        Type::Pairs => {
            let value: Value = serde_json::from_str(cell).expect("JSON");
            let pairs = value.as_object().expect("an object");
            assert!(pairs.values().all(|value| value.is_string() || value.is_number()), "{name} = {cell}");
        }
    }
}

fn check_decimal(name: &str, cell: &str) {
    let digits = cell.strip_prefix('-').unwrap_or(cell);
    let (whole, places) = digits.split_once('.').unwrap_or((digits, "0"));
    let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    assert!(number(whole) && number(places), "{name} = {cell:?}");
}

fn check_together(row: &Row) {
    let null = |name: &str| row[name].is_empty();
    let same_null = |a: &str, b: &str| assert_eq!(null(a), null(b), "{a} and {b}: {row:?}");
    same_null("ConsumedQuantity", "ConsumedUnit");
    same_null("PricingQuantity", "PricingUnit");
    same_null("SubAccountId", "SubAccountName");
    same_null("SubAccountId", "SubAccountType");
    same_null("ResourceName", "ResourceType");
    assert!(null("ResourceName") || !null("ResourceId"));
    assert!(null("SkuMeter") || !null("SkuId"));
    let currency = &row["BillingCurrency"];
    assert!(currency.len() == 3 && currency.bytes().all(|byte| byte.is_ascii_uppercase()), "{currency}");
    // Usage has a quantity and a SKU; nothing else has been consumed.
    let usage = row["ChargeCategory"] == "Usage";
    for column in ["PricingQuantity", "SkuId"] {
        assert!(!usage || !null(column), "{column}: {row:?}");
    }
    assert_eq!(usage, !null("ConsumedQuantity"), "{row:?}");
    assert!(!usage || row["ConsumedQuantity"].bytes().any(|byte| (b'1'..=b'9').contains(&byte)), "{row:?}");
    assert!(null("ChargeFrequency") || usage || row["ChargeFrequency"] != "Usage-Based");
    // A reservation's status says whether it was used.
    assert!(!null("CapacityReservationId") || null("CapacityReservationStatus"));
    assert!(!usage || null("CapacityReservationId") || !null("CapacityReservationStatus"));
    let idle = ["house:idle", "house:kv_free", "house:crash"].contains(&row["x_Account"].as_str());
    assert!(!idle || row["CapacityReservationStatus"] == "Unused", "{row:?}");
    let credit = row["ChargeCategory"] == "Credit";
    assert_eq!(credit, row["BilledCost"].starts_with('-'), "{row:?}");
    assert!(credit || !null("x_Account") || row["CapacityReservationStatus"] == "Used", "{row:?}");
    // Half-open periods of UTC: hours inside months.
    let at = |name: &str| Calendar::utc().instant(&row[name]).expect("a time").0;
    assert_eq!(at("ChargePeriodEnd") - at("ChargePeriodStart"), super::HOUR);
    assert!(at("BillingPeriodStart") <= at("ChargePeriodStart"), "{row:?}");
    assert!(at("ChargePeriodEnd") <= at("BillingPeriodEnd"), "{row:?}");
    for column in ["BillingPeriodStart", "BillingPeriodEnd"] {
        assert!(row[column].ends_with("-01T00:00:00Z"), "{column} = {}", row[column]);
    }
    // No discounts: a row costs what it lists.
    for column in ["EffectiveCost", "ContractedCost", "ListCost"] {
        assert_eq!(row[column], row["BilledCost"], "{row:?}");
    }
}

/// An amount with twelve places.
pub(crate) fn picos(text: &str) -> Picos {
    let (whole, places) = text.split_once('.').expect("a point");
    assert_eq!(places.len(), 12, "{text}");
    Picos(format!("{whole}{places}").parse().expect("digits"))
}

/// RFC 4180, read.
pub(crate) fn csv(text: &str) -> Vec<Vec<String>> {
    let (mut lines, mut cells, mut cell, mut inside) = (Vec::new(), Vec::new(), String::new(), false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if inside && chars.peek() == Some(&'"') => {
                cell.push('"');
                chars.next();
            }
            '"' => inside = !inside,
            ',' if !inside => cells.push(std::mem::take(&mut cell)),
            '\r' if !inside => {
                assert_eq!(chars.next(), Some('\n'), "lines end with CR LF");
                cells.push(std::mem::take(&mut cell));
                lines.push(std::mem::take(&mut cells));
            }
            c => cell.push(c),
        }
    }
    assert!(cell.is_empty() && cells.is_empty() && !inside, "the last line ends");
    lines
}
