//! What is printed: tables, JSON, warnings, errors.
//!
//! Tables are aligned columns without frames, so that they read well in a terminal and cut well in
//! a pipe. There is colour only where the output is a terminal and NO_COLOR (no-color.org) is unset.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use serde::de::DeserializeOwned;

use super::CliError;
use super::client::Answer;
use super::level::bargain;
use crate::api::types::{ErrorBody, Outcome};

/// Narrowest terminal that texts are wrapped on, in columns.
const NARROWEST: u16 = 60;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Tables and sentences for people
    Table,
    /// The API's objects unchanged
    Json,
}

/// Where output goes.
pub struct Output {
    out: Box<dyn Write>,
    err: Box<dyn Write>,
    format: Format,
    /// The output is a terminal.
    pub(super) terminal: bool,
    colour: bool,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").field("format", &self.format).field("terminal", &self.terminal).finish()
    }
}

impl Output {
    /// Output to this process's own streams.
    #[must_use]
    pub fn standard() -> Self {
        let terminal = io::stdout().is_terminal();
        let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self {
            out: Box::new(io::stdout()),
            err: Box::new(io::stderr()),
            format: Format::Table,
            terminal,
            colour,
        }
    }

    /// Output to other places, which are no terminal.
    #[must_use]
    pub fn to(out: impl Write + 'static, err: impl Write + 'static) -> Self {
        Self { out: Box::new(out), err: Box::new(err), format: Format::Table, terminal: false, colour: false }
    }

    pub(super) fn set_format(&mut self, format: Format) {
        self.format = format;
    }

    pub(super) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Prints an answer as it is with `-o json`, else what `table` makes of it for people.
    pub(super) fn show<T: DeserializeOwned>(
        &mut self,
        answer: &Answer,
        table: impl FnOnce(&mut Self, T) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        if self.is_json() { answer.write(&mut self.out, true) } else { table(self, answer.typed()?) }
    }

    /// Prints what came of a command, and its warnings.
    pub(super) fn outcome<T: DeserializeOwned>(
        &mut self,
        answer: &Answer,
        table: impl FnOnce(&mut Self, T) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let Outcome { result, warnings, dry_run } = answer.typed::<Outcome<T>>()?;
        self.warnings(&warnings);
        if self.is_json() {
            return answer.write(&mut self.out, true);
        }
        if dry_run {
            self.line("nothing was changed; without --dry-run:")?;
        }
        table(self, result)
    }

    /// Prints an answer as one line of JSON.
    pub(super) fn json_line(&mut self, answer: &Answer) -> Result<(), CliError> {
        answer.write(&mut self.out, false)
    }

    pub(super) fn line(&mut self, text: impl Display) -> Result<(), CliError> {
        writeln!(self.out, "{text}")?;
        self.out.flush()?;
        Ok(())
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.out.flush()
    }

    /// Tells of what the asker should know though all went well.
    pub(super) fn warnings(&mut self, warnings: &[String]) {
        for warning in warnings {
            self.tell("warning", warning);
        }
    }

    pub(super) fn error(&mut self, error: &CliError) {
        self.tell("error", error);
        if let CliError::Refused(ErrorBody { counter_offer: Some(level), .. }) = error {
            self.tell("instead", format_args!("`{}` could be had", bargain(level)));
        }
    }

    fn tell(&mut self, what: &str, text: impl Display) {
        // There is nowhere left to tell that this can't be told.
        let _ = writeln!(self.err, "{what}: {text}");
    }

    /// An empty table with a header; columns at the `right` are numbers.
    pub(super) fn table(&self, header: &[&str], right: &[usize]) -> Table {
        let mut table = self.bare_table();
        table.set_header(header.iter().map(|text| Cell::new(text).add_attribute(Attribute::Bold)));
        for index in right {
            if let Some(column) = table.column_mut(*index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        self.pad(&mut table);
        table
    }

    /// Prints names and values, one pair a line; pairs without a value are left out.
    pub(super) fn pairs(&mut self, pairs: Vec<(&str, Option<String>)>) -> Result<(), CliError> {
        let mut table = self.bare_table();
        for (name, value) in pairs {
            if let Some(value) = value {
                table.add_row([Cell::new(name).add_attribute(Attribute::Bold), Cell::new(value)]);
            }
        }
        self.pad(&mut table);
        self.print(&table)
    }

    pub(super) fn print(&mut self, table: &Table) -> Result<(), CliError> {
        if table.is_empty() && table.header().is_none() {
            return Ok(());
        }
        self.line(table.trim_fmt())
    }

    /// Lets long texts wrap within their columns, on a terminal that is wide enough for that.
    pub(super) fn wrap(&self, table: &mut Table) {
        if self.terminal && table.width().is_some_and(|width| width >= NARROWEST) {
            table.set_content_arrangement(ContentArrangement::Dynamic);
        }
    }

    /// A cell in a colour, where there is colour.
    pub(super) fn coloured(text: impl ToString, colour: Color) -> Cell {
        Cell::new(text).fg(colour)
    }

    fn bare_table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        if self.colour {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table
    }

    fn pad(&self, table: &mut Table) {
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
    }
}

/// Something that may be open.
pub(super) fn or_dash<T: Display>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Several things in one cell.
pub(super) fn joined<T: Display>(values: impl IntoIterator<Item = T>, between: &str) -> String {
    values.into_iter().map(|value| value.to_string()).collect::<Vec<_>>().join(between)
}

/// A time in µs as people write it.
pub(super) fn microseconds(us: u32) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        _ => {
            let text = format!("{:.3}", f64::from(us) / 1_000.0);
            format!("{} ms", text.trim_end_matches('0').trim_end_matches('.'))
        }
    }
}

/// A moment, to the second.
pub(super) fn moment(timestamp: jiff::Timestamp) -> String {
    timestamp.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}
