//! Alert rules as the configuration names them, made exact.

use jiff::tz::TimeZone;

use crate::config::{AlertsText, DailyText};
use crate::control::budgets::Scope;
use crate::units::Picos;

/// What alerts are raised about, beside budgets and the books.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    pub request_cost: Option<Picos>,
    pub anomalies: bool,
    pub forecasts: bool,
    pub daily: Vec<Daily>,
}

/// A day's total of one value of a scope, or of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daily {
    pub over: Picos,
    pub scope: Scope,
    /// `None`: each value has a total of its own.
    pub value: Option<String>,
    /// Whose days.
    pub zone: TimeZone,
    pub zone_name: String,
}

impl Rules {
    /// # Errors
    /// Says which rule is wrong, and what it may be.
    pub fn parse(text: &AlertsText) -> Result<Self, String> {
        let amount = |name: &str, text: &str| {
            Picos::parse(text).map_err(|problem| format!("alerts: {name}: {problem}"))
        };
        let request_cost =
            text.request_cost.as_deref().map(|cost| amount("request_cost", cost)).transpose()?;
        let daily = |(at, text)| daily(text).map_err(|problem| format!("alerts.daily {}: {problem}", at + 1));
        let daily = text.daily.iter().enumerate().map(daily).collect::<Result<Vec<Daily>, _>>()?;
        Ok(Self { request_cost, anomalies: text.anomalies, forecasts: text.forecasts, daily })
    }
}

fn daily(text: &DailyText) -> Result<Daily, String> {
    let scope = text.scope.as_deref().map_or(Ok(Scope::All), |name| {
        Scope::parse(name)
            .ok_or_else(|| format!("scope {name:?} is not one of {}", Scope::ALL.map(Scope::name).join(", ")))
    })?;
    if scope == Scope::All && text.value.is_some() {
        return Err("scope \"all\" has no value; name another scope, or leave the value out".to_owned());
    }
    let zone_name = text.time_zone.clone().unwrap_or_else(|| "UTC".to_owned());
    let zone = TimeZone::get(&zone_name)
        .map_err(|_| format!("time_zone {zone_name:?} is not known; write a name such as Europe/Berlin"))?;
    let over = Picos::parse(&text.over).map_err(|problem| format!("over: {problem}"))?;
    Ok(Daily { over, scope, value: text.value.clone(), zone, zone_name })
}
