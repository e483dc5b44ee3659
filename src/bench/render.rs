//! A report as a table and as JSON. Figures are computed elsewhere; only ratios to the last subject are taken here.

use super::figures as name;
use super::{Point, Report};
use crate::measure::table::aligned;

const NONE: &str = "-";

impl Report {
    /// Aligned columns for a terminal.
    #[must_use]
    pub fn to_table(&self) -> String {
        let currency = self.plan.rate.currency();
        let header = [
            "load",
            "subject",
            "output tokens/s",
            "TTFT p50 ms",
            "TTFT p99 ms",
            "ITL p50 ms",
            "E2E p50 ms",
            &format!("{currency}/1M output"),
            &format!("{currency}/1M tokens"),
            "failed",
        ];
        let rows = self.points.iter().map(|point| self.row(point)).collect();
        aligned(&header, rows, 2)
    }

    fn row(&self, point: &Point) -> Vec<String> {
        let figure = |name: &str, decimals: usize| {
            point.figures.get(name).map_or_else(|| NONE.to_owned(), |value| format!("{value:.decimals$}"))
        };
        vec![
            self.plan.loads[point.load].to_string(),
            self.subjects[point.subject].name.clone(),
            figure(name::OUTPUT_THROUGHPUT, 1),
            figure(name::MEDIAN_TTFT, 0),
            figure(name::P99_TTFT, 0),
            figure(name::MEDIAN_ITL, 1),
            figure(name::MEDIAN_E2EL, 0),
            figure(name::COST_OUTPUT, 4),
            figure(name::COST_TOKENS, 4),
            point.failures.values().sum::<usize>().to_string(),
        ]
    }
}
