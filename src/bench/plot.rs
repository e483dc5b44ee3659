//! A report as a picture: what latency a throughput costs, and what money a load costs.

use plotters::prelude::*;

use super::figures as name;
use super::plan::{Arrivals, Load};
use super::{Point, Report};
use crate::measure::picture::{self, COLOURS, Series, panel};

const SIZE: (u32, u32) = (1080, 480);

impl Report {
    /// An SVG document of two panels, a line for each subject through its loads. A panel without
    /// measurements stays empty.
    ///
    /// # Errors
    /// When the picture cannot be drawn.
    pub fn to_svg(&self) -> Result<String, String> {
        let open = self.plan.loads.iter().any(|load| matches!(load, Load::Open(_)));
        let load_name = if open { "requests a second" } else { "clients" };
        let cost_name = format!("{} per 1M tokens", self.plan.rate.currency());
        let figure = |point: &Point, name: &str| point.figures.get(name);
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            let (left, right) = area.split_horizontally(SIZE.0 / 2);
            let draw = || -> Result<(), Box<dyn std::error::Error>> {
                panel(
                    &left,
                    &format!("Latency for throughput, by {load_name}"),
                    ("output tokens a second", "request latency p50, ms"),
                    &self.series(|point| {
                        Some((figure(point, name::OUTPUT_THROUGHPUT)?, figure(point, name::MEDIAN_E2EL)?))
                    }),
                )?;
                panel(
                    &right,
                    "Cost of load",
                    (load_name, &cost_name),
                    &self.series(|point| {
                        let load = match self.plan.loads[point.load] {
                            Load::Closed { concurrency } => concurrency as f64,
                            Load::Open(Arrivals { rate, .. }) => rate,
                        };
                        Some((load, figure(point, name::COST_TOKENS)?))
                    }),
                )?;
                area.present()?;
                Ok(())
            };
            draw().map_err(|error| format!("the picture cannot be drawn: {error}"))?;
        }
        Ok(svg)
    }

    /// A line for each subject. The last point bears its name, the others their load alone.
    fn series(&self, at: impl Fn(&Point) -> Option<(f64, f64)>) -> Vec<Series> {
        let of_subject = |(index, &colour): (usize, &RGBColor)| {
            let own = self.points.iter().filter(|point| point.subject == index);
            let mut points: Vec<picture::Point> = own
                .filter_map(|point| {
                    let (x, y) = at(point)?;
                    let label = match self.plan.loads[point.load] {
                        Load::Closed { concurrency } => concurrency.to_string(),
                        Load::Open(Arrivals { rate, .. }) => rate.to_string(),
                    };
                    Some(picture::Point { x, y, label })
                })
                .collect();
            if let Some(last) = points.last_mut() {
                last.label = format!("{} {}", last.label, self.subjects[index].name);
            }
            Series { colour, points }
        };
        (0..self.subjects.len()).zip(COLOURS.iter().cycle()).map(of_subject).collect()
    }
}
