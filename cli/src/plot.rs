//! Figures as SVG, drawn by plotters. Colours are those of the light page, which its style sheet replaces in the dark.

use std::borrow::Cow;

use anyhow::{Context, Result, anyhow};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

/// Colours of series in their order, and the marks that go with them: those of Okabe and Ito, which colour-blind people tell apart.
pub(crate) const COLOURS: [RGBColor; 9] = [
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x56, 0xB4, 0xE9),
    RGBColor(0x8C, 0x56, 0x4B),
    RGBColor(0x7F, 0x7F, 0x7F),
    RGBColor(0x54, 0x38, 0xA8),
];
/// Text and axes.
pub(crate) const INK: RGBColor = RGBColor(0x1A, 0x1A, 0x1A);
/// Lines of the mesh.
pub(crate) const GRID: RGBColor = RGBColor(0xD9, 0xD9, 0xD9);

/// How numbers of an axis are written.
pub(crate) type Unit = fn(f64) -> String;

/// One of two axes.
pub(crate) struct Axis {
    pub(crate) label: &'static str,
    pub(crate) unit: Unit,
    /// Logarithmic, with labels at powers of this base.
    pub(crate) log: Option<f64>,
}

/// How a series is drawn.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Style {
    /// A line with a mark at each point: what was measured.
    Measured,
    /// A thin line: what follows from a formula. Without a name it is left out of the legend.
    Formula,
    /// Marks alone.
    Marks,
}

/// Points that belong together.
pub(crate) struct Series {
    pub(crate) name: String,
    /// Which of [`COLOURS`], if not its place among the series.
    pub(crate) colour: Option<usize>,
    pub(crate) style: Style,
    pub(crate) points: Vec<(f64, f64)>,
}

impl Series {
    pub(crate) fn new(name: impl Into<String>, style: Style, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), colour: None, style, points }
    }

    pub(crate) fn with_colour(self, colour: usize) -> Self {
        Self { colour: Some(colour), ..self }
    }
}

/// A figure before it is drawn.
pub(crate) struct Plot {
    /// For links and for whoever can't see it.
    pub(crate) title: String,
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    pub(crate) series: Vec<Series>,
}

const SIZE: (u32, u32) = (760, 380);

impl Plot {
    /// The colour of a series.
    pub(crate) fn colour_of(&self, i: usize) -> usize {
        self.series.get(i).and_then(|series| series.colour).unwrap_or(i) % COLOURS.len()
    }

    /// The figure as an `svg` element, with its title in it. Its legend is the page's.
    pub(crate) fn svg(&self) -> Result<String> {
        self.render(false)
    }

    /// The figure as a file of its own: on white, with title and legend.
    pub(crate) fn svg_alone(&self) -> Result<String> {
        self.render(true)
    }

    fn render(&self, alone: bool) -> Result<String> {
        let mut text = String::new();
        {
            let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            let (x, y) = (self.range(|point| point.0, &self.x), self.range(|point| point.1, &self.y));
            let drawn = match (base(&self.x, &x), base(&self.y, &y)) {
                (None, None) => self.draw(&area, alone, x, y),
                (None, Some(base)) => self.draw(&area, alone, x, y.log_scale().base(base)),
                (Some(base), None) => self.draw(&area, alone, x.log_scale().base(base), y),
                (Some(x_base), Some(y_base)) => {
                    self.draw(&area, alone, x.log_scale().base(x_base), y.log_scale().base(y_base))
                }
            };
            drawn.and_then(|()| area.present().map_err(failed)).with_context(|| self.title.clone())?;
        }
        let (head, body) = text.split_once('>').context("plotters wrote no svg element")?;
        Ok(format!("{head} role=\"img\">\n<title>{}</title>{body}", escape(&self.title)))
    }

    /// From the smallest to the largest value, with some room; from 0 on a linear axis.
    fn range(&self, of: impl Fn(&(f64, f64)) -> f64, axis: &Axis) -> std::ops::Range<f64> {
        let values = self.series.iter().flat_map(|series| &series.points).map(of);
        let values = values.filter(|value| value.is_finite() && (axis.log.is_none() || *value > 0.0));
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        match (low <= high, axis.log.is_some()) {
            (false, _) => 0.1..1.0,
            (true, true) => low / 1.3..high * 1.3,
            (true, false) => low.min(0.0)..if high > 0.0 { high * 1.06 } else { 1.0 },
        }
    }

    fn draw<X, Y>(
        &self,
        area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
        alone: bool,
        x: X,
        y: Y,
    ) -> Result<()>
    where
        X: AsRangedCoord<Value = f64>,
        Y: AsRangedCoord<Value = f64>,
        X::CoordDescType: ValueFormatter<f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let text = ("sans-serif", 14).into_font().color(&INK);
        let mut builder = ChartBuilder::on(area);
        if alone {
            area.fill(&WHITE).map_err(failed)?;
            builder.caption(&self.title, ("sans-serif", 18).into_font().color(&INK));
        }
        let mut chart = builder
            .margin(12)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(100)
            .build_cartesian_2d(x, y)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc(self.x.label)
            .y_desc(self.y.label)
            .x_labels(8)
            .y_labels(7)
            .x_label_formatter(&|value| (self.x.unit)(*value))
            .y_label_formatter(&|value| (self.y.unit)(*value))
            .label_style(text.clone())
            .axis_desc_style(text.clone())
            .axis_style(INK)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(failed)?;
        for (i, series) in self.series.iter().enumerate() {
            let colour = self.colour_of(i);
            let ink = COLOURS[colour];
            let points = series.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
            let points: Vec<_> = points
                .filter(|(x, y)| (self.x.log.is_none() || *x > 0.0) && (self.y.log.is_none() || *y > 0.0))
                .collect();
            let line = if series.style == Style::Formula { 1 } else { 2 };
            if series.style != Style::Marks {
                let line = LineSeries::new(points.iter().copied(), ink.stroke_width(line));
                chart.draw_series(line).map_err(failed)?;
            }
            let shape = (series.style != Style::Formula).then_some(colour % 4);
            // Shapes differ, too, for print in black and for who sees no colours.
            let marks = points.iter().copied();
            let drawn = match shape {
                None => chart.draw_series(LineSeries::new([], ink)),
                Some(0) => chart.draw_series(marks.map(|point| Circle::new(point, 4, ink.filled()))),
                Some(1) => chart.draw_series(marks.map(|point| TriangleMarker::new(point, 5, ink.filled()))),
                Some(2) => chart.draw_series(marks.map(|point| Cross::new(point, 4, ink.stroke_width(2)))),
                Some(_) => chart.draw_series(marks.map(|point| Circle::new(point, 4, ink.stroke_width(2)))),
            }
            .map_err(failed)?;
            if alone && !series.name.is_empty() {
                drawn.label(&series.name).legend(move |(x, y)| {
                    let at = (x + 10, y);
                    match shape {
                        None => PathElement::new([(x, y), (x + 20, y)], ink).into_dyn(),
                        Some(0) => Circle::new(at, 4, ink.filled()).into_dyn(),
                        Some(1) => TriangleMarker::new(at, 5, ink.filled()).into_dyn(),
                        Some(2) => Cross::new(at, 4, ink.stroke_width(2)).into_dyn(),
                        Some(_) => Circle::new(at, 4, ink.stroke_width(2)).into_dyn(),
                    }
                });
            }
        }
        if alone {
            let mut legend = chart.configure_series_labels();
            legend
                .position(SeriesLabelPosition::UpperRight)
                .background_style(WHITE)
                .border_style(GRID)
                .label_font(text);
            legend.draw().map_err(failed)?;
        }
        Ok(())
    }
}

/// The base of a logarithmic axis: 2 where there are too few powers of its own within the range to read it by.
fn base(axis: &Axis, range: &std::ops::Range<f64>) -> Option<f64> {
    axis.log.map(|base| if range.end / range.start < base * base { 2.0 } else { base })
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing: {error}")
}

/// Text within SVG and HTML.
fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(['<', '>', '&', '"']) {
        return text.into();
    }
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").into()
}

/// A number with an SI prefix and three digits: `1.53 G`, without a unit.
pub(crate) fn si(value: f64) -> String {
    const PREFIXES: [(f64, &str); 8] =
        [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")];
    if value == 0.0 || !value.is_finite() {
        return format!("{value} ");
    }
    let (factor, prefix) =
        PREFIXES.into_iter().find(|(factor, _)| value.abs() >= factor * 0.9995).unwrap_or((1e-9, "n"));
    format!("{} {prefix}", digits(value / factor))
}

/// Three digits.
fn digits(value: f64) -> String {
    let magnitude = value.abs();
    let places = if magnitude >= 99.95 {
        0
    } else if magnitude >= 9.995 {
        1
    } else {
        2
    };
    let text = format!("{value:.places$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

pub(crate) fn seconds(value: f64) -> String {
    si(value) + "s"
}

pub(crate) fn bytes(value: f64) -> String {
    indicatif::BinaryBytes(value.max(0.0).round() as u64).to_string()
}

/// A count without a unit.
pub(crate) fn count(value: f64) -> String {
    if value.abs() < 1e5 { digits(value) } else { si(value) }.trim_end().to_owned()
}

/// A part of a whole.
pub(crate) fn percent(value: f64) -> String {
    format!("{} %", digits(100.0 * value))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_prefix() {
        for (value, text) in [(0.0, "0 s"), (1.0, "1 s"), (0.001_234, "1.23 ms"), (2.5e-7, "250 ns"), (99.96, "100 s")]
        {
            assert_eq!(seconds(value), text);
        }
        assert_eq!((si(64.7e9), si(999.9e6)), ("64.7 G".to_owned(), "1 G".to_owned()));
        assert_eq!((count(4096.0), count(2e6), percent(0.876)), ("4096".into(), "2 M".into(), "87.6 %".into()));
        assert_eq!(bytes(2048.0), "2.00 KiB");
    }

    #[test]
    fn figures_are_one_element_with_a_title_and_only_finite_coordinates() {
        let axis = |log| Axis { label: "x & y", unit: seconds, log };
        for log in [None, Some(10.0), Some(2.0)] {
            let series = [
                Series::new("<a>", Style::Measured, vec![(1.0, 2.0), (10.0, f64::NAN), (100.0, 30.0)]),
                Series::new("b", Style::Formula, vec![(0.0, 0.0), (50.0, 5.0)]),
                Series::new("c", Style::Marks, Vec::new()).with_colour(9),
            ];
            let plot = Plot { title: "a < b".into(), x: axis(log), y: axis(log), series: series.into() };
            let svg = plot.svg().unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
            assert!(svg.contains("role=\"img\"") && svg.contains("<title>a &lt; b</title>"), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf") && !svg.contains("x & y"), "{svg}");
            assert_eq!(plot.colour_of(2), 0);
            let alone = plot.svg_alone().unwrap();
            assert!(alone.contains("&lt;a&gt;") && !svg.contains("&lt;a&gt;") && !alone.contains("<a>"), "{alone}");
        }
        let empty = Plot { title: String::new(), x: axis(Some(10.0)), y: axis(None), series: Vec::new() };
        assert!(empty.svg().unwrap().contains("</svg>"));
    }
}
