//! A comparison as a picture: what a variant loses against what it saves, and against its size.

use plotters::prelude::*;

use super::{Comparison, Measured};
use crate::measure::picture::{COLOURS, Point, Series, panel};

const SIZE: (u32, u32) = (960, 480);
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

    fn points(&self, at: impl Fn(&Measured) -> Option<(f64, f64)>) -> Vec<Series> {
        let variants = self.variants.iter().zip(COLOURS.iter().cycle());
        let points = variants.filter_map(|(variant, &colour)| {
            let (x, y) = at(variant)?;
            Some(Series { colour, points: vec![Point { x, y, label: variant.label.clone() }] })
        });
        points.collect()
    }
}
