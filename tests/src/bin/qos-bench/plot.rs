//! A plot as SVG: lines over two logarithmic axes, on white, so that it can be read wherever it is shown.

use std::fmt::Write as _;

/// One line of a plot.
pub(crate) struct Series<'a> {
    pub(crate) name: &'a str,
    /// As CSS has it.
    pub(crate) color: &'a str,
    pub(crate) points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 460.0;
/// Where the axes are: left, right, top, bottom.
const FRAME: [f64; 4] = [72.0, 560.0, 48.0, 404.0];
/// What is too small for a logarithmic axis is drawn here.
const LEAST: f64 = 1.0;

/// Draws lines over axes that grow tenfold from mark to mark.
pub(crate) fn log_log(title: &str, x_label: &str, y_label: &str, series: &[Series<'_>]) -> String {
    let [left, right, top, bottom] = FRAME;
    let all = || series.iter().flat_map(|line| &line.points);
    let [x_axis, y_axis] = [
        Axis::over(all().map(|point| point.0), [left, right]),
        Axis::over(all().map(|point| point.1), [bottom, top]),
    ];
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
         height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <title>{title}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    text(&mut svg, [(left + right) / 2.0, 28.0], "text-anchor=\"middle\" font-size=\"16\"", title);
    text(&mut svg, [(left + right) / 2.0, bottom + 42.0], "text-anchor=\"middle\"", x_label);
    let middle = (top + bottom) / 2.0;
    let turned = format!("text-anchor=\"middle\" transform=\"rotate(-90 20 {middle})\"");
    text(&mut svg, [20.0, middle], &turned, y_label);
    for (mark, x) in x_axis.marks() {
        line(&mut svg, [x, top], [x, bottom], "#ddd");
        text(&mut svg, [x, bottom + 20.0], "text-anchor=\"middle\"", &mark);
    }
    for (mark, y) in y_axis.marks() {
        line(&mut svg, [left, y], [right, y], "#ddd");
        text(&mut svg, [left - 8.0, y + 4.0], "text-anchor=\"end\"", &mark);
    }
    line(&mut svg, [left, bottom], [right, bottom], "#222");
    line(&mut svg, [left, top], [left, bottom], "#222");
    for (number, Series { name, color, points }) in series.iter().enumerate() {
        let places: Vec<_> = points.iter().map(|(x, y)| [x_axis.place(*x), y_axis.place(*y)]).collect();
        let path: Vec<_> = places.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2.5\"/>",
            path.join(" ")
        );
        places.iter().for_each(|place| mark(&mut svg, number, *place, color));
        let y = top + 14.0 + 24.0 * number as f64;
        let x = right + 16.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{x}\" y1=\"{y}\" x2=\"{}\" y2=\"{y}\" stroke=\"{color}\" stroke-width=\"2.5\"/>",
            x + 24.0
        );
        mark(&mut svg, number, [x + 12.0, y], color);
        text(&mut svg, [x + 32.0, y + 4.0], "", name);
    }
    svg.push_str("</svg>\n");
    svg
}

/// An axis between powers of ten.
struct Axis {
    /// Exponents of both ends.
    powers: [i32; 2],
    places: [f64; 2],
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>, places: [f64; 2]) -> Self {
        let logarithms: Vec<_> = values.map(|value| value.max(LEAST).log10()).collect();
        let least = logarithms.iter().copied().fold(f64::INFINITY, f64::min);
        let most = logarithms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let first = if least.is_finite() { least.floor() as i32 } else { 0 };
        Self { powers: [first, (most.ceil() as i32).max(first + 1)], places }
    }

    fn place(&self, value: f64) -> f64 {
        let [first, last] = self.powers.map(f64::from);
        let share = (value.max(LEAST).log10() - first) / (last - first);
        self.places[0] + share * (self.places[1] - self.places[0])
    }

    fn marks(&self) -> impl Iterator<Item = (String, f64)> {
        (self.powers[0]..=self.powers[1]).map(|power| (grouped(power), self.place(10f64.powi(power))))
    }
}

/// A power of ten, not below one, with its thousands apart.
fn grouped(power: i32) -> String {
    let zeros = power.max(0) as usize;
    format!("1{}{}", "0".repeat(zeros % 3), ",000".repeat(zeros / 3))
}

/// A mark of its own shape for each line.
fn mark(svg: &mut String, number: usize, [x, y]: [f64; 2], color: &str) {
    let shape = match number % 4 {
        0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\""),
        1 => format!("<rect x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\"", x - 4.0, y - 4.0),
        2 => {
            let [left, right, top, bottom] = [x - 5.0, x + 5.0, y - 5.5, y + 4.5];
            format!("<polygon points=\"{left:.1},{bottom:.1} {right:.1},{bottom:.1} {x:.1},{top:.1}\"")
        }
        _ => {
            let [left, right, top, bottom] = [x - 5.5, x + 5.5, y - 5.5, y + 5.5];
            format!(
                "<polygon points=\"{left:.1},{y:.1} {x:.1},{top:.1} {right:.1},{y:.1} {x:.1},{bottom:.1}\""
            )
        }
    };
    let _ = writeln!(svg, "{shape} fill=\"{color}\"/>");
}

fn line(svg: &mut String, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2], color: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{color}\"/>"
    );
}

fn text(svg: &mut String, [x, y]: [f64; 2], attributes: &str, text: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {attributes}>{text}</text>");
}
