//! Charts that stand side by side in one SVG document. Colours are chosen to be read on white and on black;
//! the background is left to the viewer.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::element::Text;
use plotters::prelude::*;

/// Of all that is no data.
pub const GREY: RGBColor = RGBColor(128, 128, 128);
/// For one thing after another.
pub const COLOURS: [RGBColor; 6] = [
    RGBColor(38, 139, 210),
    RGBColor(203, 75, 22),
    RGBColor(42, 161, 90),
    RGBColor(211, 54, 130),
    RGBColor(150, 110, 220),
    RGBColor(170, 130, 0),
];
/// As SVG names it.
pub const FONT: &str = "sans-serif";

/// A dot with its name beside it.
pub struct Point {
    pub x: f64,
    pub y: f64,
    pub label: String,
}

/// Points of one colour, joined by a line.
pub struct Series {
    pub colour: RGBColor,
    pub points: Vec<Point>,
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

/// Both axes linear.
type Plane = Cartesian2d<RangedCoordf64, RangedCoordf64>;

/// How values beside an axis are written.
type Shown<'a> = &'a dyn Fn(&f64) -> String;

/// A chart with its axes over these ranges, about so many labels on each.
///
/// # Errors
/// When the picture cannot be drawn.
pub fn axes<'a>(
    area: &DrawingArea<SVGBackend<'a>, Shift>,
    title: &str,
    (x_name, y_name): (&str, &str),
    (x, y): (Range<f64>, Range<f64>),
    (labels, (x_shown, y_shown)): (usize, (Shown<'_>, Shown<'_>)),
) -> Result<ChartContext<'a, SVGBackend<'a>, Plane>, Box<dyn std::error::Error>> {
    let text = |size: u32| (FONT, size).into_font().color(&GREY);
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
        .x_labels(labels)
        .y_labels(labels)
        .x_label_formatter(x_shown)
        .y_label_formatter(y_shown)
        .draw()?;
    Ok(chart)
}

/// Draws one chart: dots with their labels, and a line through each series' points in their order.
///
/// # Errors
/// When the picture cannot be drawn.
pub fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    (x_name, y_name): (&str, &str),
    series: &[Series],
) -> Result<(), Box<dyn std::error::Error>> {
    let points = || series.iter().flat_map(|series| &series.points);
    let (x, y) = (range(points().map(|p| p.x), 0.3), range(points().map(|p| p.y), 0.12));
    let (x_decimals, y_decimals) = (decimals(&x), decimals(&y));
    let x_shown = |value: &f64| format!("{value:.x_decimals$}");
    let y_shown = |value: &f64| format!("{value:.y_decimals$}");
    let mut chart = axes(area, title, (x_name, y_name), (x, y), (6, (&x_shown, &y_shown)))?;
    for Series { colour, points } in series {
        let line: Vec<(f64, f64)> = points.iter().map(|point| (point.x, point.y)).collect();
        chart.draw_series([PathElement::new(line, colour)])?;
        for point in points {
            let (at, style) = ((point.x, point.y), (FONT, 13).into_font().color(colour));
            chart.draw_series([EmptyElement::at(at)
                + Circle::new((0, 0), 5, colour.filled())
                + Text::new(point.label.clone(), (8, -6), style)])?;
        }
    }
    Ok(())
}
