//! Growth as a picture: decode steps against the batch and against the context, dots as measured and lines as
//! fitted, both axes in powers of two.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::measure::picture::{COLOURS, FONT, GREY, axes};
use crate::meter::calibration::steps::{Group, works};

use super::{BATCHES, Growth, LENGTHS, Point};

const SIZE: (u32, u32) = (1040, 500);
/// Contexts that have a line against the batch, and batches that have one against the context.
const LENGTHS_DRAWN: [usize; 4] = [128, 1024, 4096, 8192];
const BATCHES_DRAWN: [usize; 4] = [1, 8, 16, 64];

/// One line and its dots, in powers of two of size and milliseconds.
struct Series {
    label: String,
    measured: Vec<(f64, f64)>,
    fitted: Vec<(f64, f64)>,
}

impl Growth {
    /// An SVG document of two panels.
    ///
    /// # Errors
    /// When the picture cannot be drawn.
    pub fn to_svg(&self) -> Result<String, String> {
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            let (left, right) = area.split_horizontally(SIZE.0 / 2);
            let lengths = LENGTHS_DRAWN.map(|length| {
                let label = format!("{length} positions");
                self.series(label, |point| point.length == length, |point| point.sequences)
            });
            let batches = BATCHES_DRAWN.map(|batch| {
                let label = if batch == 1 { "1 sequence".into() } else { format!("{batch} sequences") };
                self.series(label, |point| point.sequences == batch, |point| point.length)
            });
            let draw = || -> Result<(), Box<dyn std::error::Error>> {
                panel(&left, "Decode step against the batch", "sequences", &BATCHES, &lengths)?;
                panel(&right, "Decode step against the context", "positions each", &LENGTHS, &batches)?;
                area.present()?;
                Ok(())
            };
            draw().map_err(|error| format!("the picture cannot be drawn: {error}"))?;
        }
        Ok(svg)
    }

    fn series(&self, label: String, of: impl Fn(&Point) -> bool, size: impl Fn(&Point) -> usize) -> Series {
        let points: Vec<&Point> = self.points.iter().filter(|p| p.tokens == 1 && of(p)).collect();
        let at = |point: &Point, time: f64| ((size(point) as f64).log2(), time.log2());
        let measured = points.iter().map(|point| at(point, point.measured)).collect();
        // Between two measured steps the fit is a curve here, where its axes are not even.
        let between = points.windows(2).flat_map(|pair| {
            let steps = 4;
            (0..=steps).map(move |step| {
                let mix = |a: usize, b: usize| a + (b - a) * step / steps;
                let sequences = mix(pair[0].sequences, pair[1].sequences);
                let length = mix(pair[0].length, pair[1].length);
                Point { sequences, length, ..*pair[0] }
            })
        });
        let fitted = between.map(|point| at(&point, self.fitted(&point.group()))).collect();
        Series { label, measured, fitted }
    }

    /// In milliseconds.
    fn fitted(&self, group: &Group) -> f64 {
        let (class, works) = works(&[*group]);
        self.calibration.estimate(class, &works) / 1e6
    }
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    x_name: &str,
    sizes: &[usize],
    series: &[Series],
) -> Result<(), Box<dyn std::error::Error>> {
    let text = |size: u32| (FONT, size).into_font().color(&GREY);
    let all = || series.iter().flat_map(|series| series.measured.iter().chain(&series.fitted));
    let low = all().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let high = all().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if low < high { (low, high) } else { (0.0, 1.0) };
    let (first, last) = (sizes[0] as f64, sizes[sizes.len() - 1] as f64);
    let x = first.log2() - 0.3..last.log2() + 0.3;
    let y = low.floor()..high.ceil();
    let shown = |value: &f64| match value.exp2() {
        small if small < 0.95 => format!("{small:.2}"),
        large => format!("{large:.0}"),
    };
    let names = (x_name, "step, ms (dots measured, lines fitted)");
    let mut chart = axes(area, title, names, (x, y), (8, (&shown, &shown)))?;
    for (Series { label, measured, fitted }, colour) in series.iter().zip(COLOURS) {
        chart
            .draw_series([PathElement::new(fitted.clone(), colour.stroke_width(2))])?
            .label(label.as_str())
            .legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
        chart.draw_series(measured.iter().map(|at| Circle::new(*at, 4, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .label_font(text(13))
        .legend_area_size(20)
        .draw()?;
    Ok(())
}
