//! A comparison as a picture: what a variant loses against what it saves, and against its size.
//!
//! Colours are chosen to be read on white and on black; the background is left to the viewer.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::{Comparison, Measured};

const SIZE: (u32, u32) = (960, 480);
const GREY: RGBColor = RGBColor(128, 128, 128);
const COLOURS: [RGBColor; 6] = [
    RGBColor(38, 139, 210),
    RGBColor(203, 75, 22),
    RGBColor(42, 161, 90),
    RGBColor(211, 54, 130),
    RGBColor(150, 110, 220),
    RGBColor(170, 130, 0),
];
const FONT: &str = "sans-serif";

struct Point {
    x: f64,
    y: f64,
    label: String,
    colour: RGBColor,
}

impl Comparison {
    /// An SVG document of two panels: perplexity lost against cost saved at the most clients, and
    /// divergence against bytes of weights. A panel without measurements stays empty.
    ///
    /// # Errors
    /// When the picture cannot be drawn.
    pub fn to_svg(&self) -> Result<String, String> {
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            let (left, right) = area.split_horizontally(SIZE.0 / 2);
            let clients = self.settings.clients.last().copied().unwrap_or(0);
            let draw = || -> Result<(), Box<dyn std::error::Error>> {
                panel(
                    &left,
                    &format!("Quality lost for cost saved, {clients} clients"),
                    ("cost per 1M tokens saved, %", "perplexity lost, %"),
                    &self.points(|variant| {
                        let speed = variant.speeds.last()?;
                        let loss = variant.quality?.distance.map_or(0.0, |distance| distance.loss);
                        Some((self.saved(speed)? * 100.0, loss * 100.0))
                    }),
                )?;
                panel(
                    &right,
                    "Divergence for size",
                    ("weights, MiB", "mean KL divergence"),
                    &self.points(|variant| {
                        let divergence = variant.quality?.distance.map_or(0.0, |distance| distance.kl_mean);
                        Some((variant.weight_bytes as f64 / f64::from(1 << 20), divergence))
                    }),
                )?;
                area.present()?;
                Ok(())
            };
            draw().map_err(|error| format!("the picture cannot be drawn: {error}"))?;
        }
        Ok(svg)
    }

    fn points(&self, at: impl Fn(&Measured) -> Option<(f64, f64)>) -> Vec<Point> {
        let variants = self.variants.iter().zip(COLOURS.iter().cycle());
        let points = variants.filter_map(|(variant, &colour)| {
            let (x, y) = at(variant)?;
            Some(Point { x, y, label: variant.label.clone(), colour })
        });
        points.collect()
    }
}

/// Around all values, with room for labels; never empty.
fn range(values: impl Iterator<Item = f64>, room: f64) -> Range<f64> {
    let finite = values.filter(|value| value.is_finite());
    let (low, high) = finite.fold((0.0_f64, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
    let width = (high - low).max(1e-6);
    low - width * 0.08..high + width * room
}

/// As many as tell a tenth of the range.
fn decimals(range: &Range<f64>) -> usize {
    let digits = -((range.end - range.start) / 10.0).log10().floor();
    digits.clamp(0.0, 8.0) as usize
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    (x_name, y_name): (&str, &str),
    points: &[Point],
) -> Result<(), Box<dyn std::error::Error>> {
    let text = |size: u32| (FONT, size).into_font().color(&GREY);
    let (x, y) = (range(points.iter().map(|p| p.x), 0.3), range(points.iter().map(|p| p.y), 0.12));
    let (x_decimals, y_decimals) = (decimals(&x), decimals(&y));
    let mut chart = ChartBuilder::on(area)
        .caption(title, text(16))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .axis_style(GREY)
        .light_line_style(TRANSPARENT)
        .bold_line_style(GREY.mix(0.25))
        .label_style(text(12))
        .axis_desc_style(text(13))
        .x_desc(x_name)
        .y_desc(y_name)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|value| format!("{value:.x_decimals$}"))
        .y_label_formatter(&|value| format!("{value:.y_decimals$}"))
        .draw()?;
    for point in points {
        let (at, style) = ((point.x, point.y), (FONT, 13).into_font().color(&point.colour));
        chart.draw_series([EmptyElement::at(at)
            + Circle::new((0, 0), 5, point.colour.filled())
            + plotters::element::Text::new(point.label.clone(), (8, -6), style)])?;
    }
    Ok(())
}
