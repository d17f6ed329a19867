//! `qos session import`, `find` and `changes`: all lines that are known, in service or not.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read, Seek as _, SeekFrom};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::CliError;
use super::args::{delay, prefix, share};
use super::client::{Answer, Client};
use super::output::{Output, joined, moment, or_dash};
use crate::api::types::{ErrorBody, Listing, Reports};
use crate::domain::session::link_layer;
use crate::domain::subscriber::{Event, Facts, Report};
use crate::domain::{BitsPerSecond, Directed, LinkLayer, Name, Subscriber};
use crate::manager::subscriber::{SubscriberQuery, Taken};

/// Reports of one request: about half of the largest body.
const TOGETHER: usize = 2_000;
/// Time between two looks for changes.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Makes lines known that are up, from a file
///
/// A line that is known need not be in service: it comes into service with the first grant on it. The whole
/// file is checked before anything is told; then lines are told in order, some thousands at a time, and what
/// was told stays if one of them is refused.
///
/// CSV has a header with any of: line, addresses (separated by spaces), down, up, plan_down, plan_up (the
/// smaller of both counts), link_layer, overhead, delay, loss, segments (separated by spaces), bras, key.
/// Only line and addresses have to be there. JSON is one object a line, or a list of them, with the same
/// members; addresses and segments are lists.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  qos session import lines.csv
  crm-export | qos session import - --format json --source crm --complete

  line,addresses,down,up,link_layer,overhead,bras
  dsl-0042,192.0.2.10 2001:db8:42::/56,20mbit,2mbit,atm,32,bras1
  fibre-7,192.0.2.20,1gbit,200mbit,,,bras1")]
pub(super) struct Import {
    /// The file; `-` for standard input
    file: PathBuf,
    /// What the file is written in [default: by its ending; CSV for standard input]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Who tells: its lines are down if they are not told of again for `session_ttl`
    ///
    /// Without it the lines are an operator's, and up until something else is told.
    #[arg(long, value_name = "NAME")]
    source: Option<Name>,
    /// The file has all lines of the source: others of it are down
    #[arg(long, requires = "source")]
    complete: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A table with a header
    Csv,
    /// Objects, one a line or in a list
    Json,
}

/// Finds lines that are known, in service or not
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  qos session find 192.0.2.10
  qos session find --bras bras1 --down")]
pub(super) struct Find {
    /// The line that has this address
    address: Option<IpAddr>,
    /// The line of this name
    #[arg(long, value_name = "NAME")]
    line: Option<Name>,
    /// Lines that end at a BRAS
    #[arg(long, value_name = "NAME")]
    bras: Option<String>,
    /// Lines that a source tells of
    #[arg(long, value_name = "NAME")]
    source: Option<Name>,
    /// Lines that are up
    #[arg(long, conflicts_with = "down")]
    up: bool,
    /// Lines that are down
    #[arg(long)]
    down: bool,
    /// That many at most
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 50,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(SubscriberQuery::MOST)))]
    limit: u32,
}

/// Shows how lines changed, the last change of each
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  qos session changes --after 4711 -o json
  qos session changes --follow")]
pub(super) struct Changes {
    /// Only those after this number: where an earlier answer ended
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    after: u64,
    /// Go on with changes as they come
    #[arg(short, long)]
    follow: bool,
}

/// A line of a file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Row<T> {
    line: String,
    addresses: T,
    down: Option<BitsPerSecond>,
    up: Option<BitsPerSecond>,
    plan_down: Option<BitsPerSecond>,
    plan_up: Option<BitsPerSecond>,
    link_layer: Option<String>,
    overhead: Option<i16>,
    delay: Option<String>,
    loss: Option<String>,
    segments: T,
    bras: Option<String>,
    key: Option<String>,
}

impl Row<String> {
    fn split(self) -> Row<Vec<String>> {
        let parts =
            |text: &str| text.split([' ', ';']).filter(|part| !part.is_empty()).map(str::to_owned).collect();
        Row {
            addresses: parts(&self.addresses),
            segments: parts(&self.segments),
            line: self.line,
            down: self.down,
            up: self.up,
            plan_down: self.plan_down,
            plan_up: self.plan_up,
            link_layer: self.link_layer,
            overhead: self.overhead,
            delay: self.delay,
            loss: self.loss,
            bras: self.bras,
            key: self.key,
        }
    }
}

impl Row<Vec<String>> {
    fn event(self) -> Result<Event, String> {
        let told = |text: Option<String>| text.filter(|text| !text.is_empty());
        let layer = match told(self.link_layer) {
            None => LinkLayer::default(),
            Some(text) => link_layer::named(&text)
                .ok_or_else(|| format!("link_layer: `{text}` is none of ethernet, atm, ptm"))?,
        };
        let in_field = |field: &str, error: &dyn std::fmt::Display| format!("{field}: {error}");
        let addresses = self.addresses.iter().map(|text| prefix(text));
        let addresses: Result<Vec<IpNet>, _> = addresses.collect();
        let segments: Result<Vec<Name>, _> = self.segments.iter().map(|text| text.parse()).collect();
        let smaller =
            |line: Option<BitsPerSecond>, plan: Option<BitsPerSecond>| line.into_iter().chain(plan).min();
        let delay_us = told(self.delay).map(|text| delay(&text)).transpose();
        let loss = told(self.loss).map(|text| share(&text)).transpose();
        Ok(Event::Up {
            line: self.line.parse().map_err(|error| in_field("line", &error))?,
            key: told(self.key),
            facts: Facts {
                addresses: addresses.map_err(|error| in_field("addresses", &error))?,
                rate: Directed {
                    up: smaller(self.up, self.plan_up),
                    down: smaller(self.down, self.plan_down),
                },
                link_layer: layer,
                overhead: self.overhead,
                delay_us: delay_us.map_err(|error| in_field("delay", &error))?.unwrap_or(0),
                loss_ppm: loss
                    .map_err(|error| in_field("loss", &error))?
                    .map_or(0, |share| (share * 1e6).round() as u32),
                segments: segments.map_err(|error| in_field("segments", &error))?,
                bras: told(self.bras),
            },
        })
    }
}

/// Reads the lines of a file one after the other, and stops at the first that can't be used.
fn each_line(
    from: impl Read,
    format: Format,
    name: &str,
    mut take: impl FnMut(usize, Event) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let wrong = |at: usize, why: &dyn std::fmt::Display| CliError::Usage(format!("{name}, line {at}: {why}"));
    match format {
        Format::Csv => {
            let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(from);
            let headers = reader.headers().map_err(|error| wrong(1, &error))?.clone();
            for (place, record) in reader.records().enumerate() {
                let record = record.map_err(|error| CliError::Usage(format!("{name}: {error}")))?;
                let at = record.position().map_or(place + 2, |position| position.line() as usize);
                let row: Row<String> =
                    record.deserialize(Some(&headers)).map_err(|error| wrong(at, &reason(&error)))?;
                take(at, row.split().event().map_err(|why| wrong(at, &why))?)?;
            }
        }
        Format::Json => {
            let mut reader = BufReader::new(from);
            let is_list = loop {
                match reader.fill_buf()?.first() {
                    Some(byte) if byte.is_ascii_whitespace() => reader.consume(1),
                    first => break first == Some(&b'['),
                }
            };
            if is_list {
                let rows: Vec<Row<Vec<String>>> = serde_json::from_reader(reader)
                    .map_err(|error| CliError::Usage(format!("{name}: {error}")))?;
                for (place, row) in rows.into_iter().enumerate() {
                    take(place + 1, row.event().map_err(|why| wrong(place + 1, &why))?)?;
                }
                return Ok(());
            }
            for (place, line) in reader.lines().enumerate() {
                let line = line?;
                if line.trim().is_empty() {
                    continue;
                }
                let row: Row<Vec<String>> =
                    serde_json::from_str(&line).map_err(|error| wrong(place + 1, &error))?;
                take(place + 1, row.event().map_err(|why| wrong(place + 1, &why))?)?;
            }
        }
    }
    Ok(())
}

/// What is wrong with a record, without its place, which is told already.
fn reason(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::Deserialize { err, .. } => err.to_string(),
        _ => error.to_string(),
    }
}

pub(super) fn import(import: &Import, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let name = import.file.display().to_string();
    let format = import.format.unwrap_or_else(|| by_ending(&import.file));
    let mut file = open(&import.file)?;
    let mut count = 0;
    each_line(&mut file, format, &name, |_, _| {
        count += 1;
        Ok(())
    })?;
    if client.is_dry_run() {
        let none = Counts { unchanged: count, ..Counts::default() };
        return output.show(&Answer::of(&none)?, |output, _: Counts| {
            output.line(format_args!("{count} lines could be read; none was told"))
        });
    }
    file.seek(SeekFrom::Start(0))?;
    let mut sending = Sending { source: import.source.clone(), at: Timestamp::now(), ..Sending::default() };
    let mut named = BTreeSet::new();
    each_line(&mut file, format, &name, |at, event| {
        if let (true, Event::Up { line, .. }) = (import.complete, &event) {
            named.insert(line.clone());
        }
        sending.add(format!("line {at}"), event, client, output)
    })?;
    if import.complete {
        for line in others(&named, import.source.as_ref(), client)? {
            sending.add(format!("line {line}"), Event::Down { line, key: None }, client, output)?;
        }
    }
    sending.send(client, output)?;
    let Sending { counts, .. } = sending;
    let Counts { changed, unchanged, refused } = counts;
    output.show(&Answer::of(&counts)?, |output, _: Counts| {
        output.line(format_args!("{changed} changed, {unchanged} as they were, {refused} refused"))
    })?;
    if refused == 0 {
        return Ok(());
    }
    Err(CliError::Refused(ErrorBody {
        code: "invalid".to_owned(),
        message: format!("{refused} of {} lines; the others were taken", changed + unchanged + refused),
        field: None,
        value: None,
        counter_offer: None,
    }))
}

fn by_ending(file: &Path) -> Format {
    let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    if ["json", "jsonl", "ndjson"].contains(&ending) { Format::Json } else { Format::Csv }
}

/// The file, or what came from standard input as one.
fn open(file: &Path) -> Result<File, CliError> {
    if file != Path::new("-") {
        let source = |source| CliError::System { what: format!("read {}", file.display()), source };
        return File::open(file).map_err(source);
    }
    let source = |source| CliError::System { what: "keep standard input".to_owned(), source };
    let mut kept = tempfile::tempfile().map_err(source)?;
    io::copy(&mut io::stdin().lock(), &mut kept).map_err(source)?;
    kept.seek(SeekFrom::Start(0)).map_err(source)?;
    Ok(kept)
}

/// Lines of a source that are up and not among those named.
fn others(named: &BTreeSet<Name>, source: Option<&Name>, client: &Client) -> Result<Vec<Name>, CliError> {
    let source = source.map(Name::as_str).unwrap_or_default();
    let (mut others, mut after) = (Vec::new(), 0);
    loop {
        let path = format!("/v1/subscribers?source={source}&up=true&after={after}");
        let found: Listing<Subscriber> = client.get(&path)?.typed()?;
        let Some(last) = found.items.last() else { return Ok(others) };
        after = last.sequence;
        others.extend(found.items.into_iter().map(|known| known.line).filter(|line| !named.contains(line)));
    }
}

/// Reports on their way, and what became of those before.
#[derive(Debug, Default)]
struct Sending {
    source: Option<Name>,
    at: Timestamp,
    waiting: Vec<(String, Report)>,
    counts: Counts,
}

/// What became of the lines of a file.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Counts {
    /// Lines that are other now than they were.
    changed: usize,
    /// Lines of which nothing new was told.
    unchanged: usize,
    /// Lines that can't be so.
    refused: usize,
}

impl Sending {
    fn add(
        &mut self,
        what: String,
        event: Event,
        client: &Client,
        output: &mut Output,
    ) -> Result<(), CliError> {
        self.waiting.push((what, Report { source: self.source.clone(), at: self.at, event }));
        if self.waiting.len() < TOGETHER { Ok(()) } else { self.send(client, output) }
    }

    fn send(&mut self, client: &Client, output: &mut Output) -> Result<(), CliError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let (whats, reports): (Vec<_>, Vec<_>) = self.waiting.drain(..).unzip();
        let taken: Listing<Taken> = client.post("/v1/subscribers", &Reports { reports })?.typed()?;
        for (what, taken) in whats.into_iter().zip(taken.items) {
            match taken {
                Taken::Changed(warnings) => {
                    self.counts.changed += 1;
                    let told: Vec<_> = warnings.iter().map(|warning| format!("{what}: {warning}")).collect();
                    output.warnings(&told);
                }
                Taken::Unchanged => self.counts.unchanged += 1,
                Taken::Refused(why) => {
                    self.counts.refused += 1;
                    output.warnings(&[format!("{what} is refused: {why}")]);
                }
            }
        }
        Ok(())
    }
}

pub(super) fn find(find: &Find, client: &Client, output: &mut Output) -> Result<(), CliError> {
    let options = [
        find.address.map(|address| format!("address={address}")),
        find.line.as_ref().map(|line| format!("line={line}")),
        find.bras.as_ref().map(|bras| format!("bras={}", encoded(bras))),
        find.source.as_ref().map(|source| format!("source={source}")),
        (find.up || find.down).then(|| format!("up={}", find.up)),
        Some(format!("limit={}", find.limit)),
    ];
    let path = format!("/v1/subscribers?{}", joined(options.into_iter().flatten(), "&"));
    output.show(&client.get(&path)?, |output, found: Listing<Subscriber>| {
        let header = ["LINE", "STATE", "SINCE", "DOWN", "UP", "LINK LAYER", "BRAS", "SOURCE", "ADDRESSES"];
        let mut table = output.table(&header, &[3, 4]);
        for known in found.items {
            let facts = &known.facts;
            table.add_row([
                known.line.to_string(),
                if known.down_since.is_some() { "down" } else { "up" }.to_owned(),
                moment(known.down_since.unwrap_or(known.started_at)),
                or_dash(facts.rate.down),
                or_dash(facts.rate.up),
                link_layer::name(facts.link_layer).to_owned(),
                or_dash(facts.bras.as_ref()),
                or_dash(known.source.as_ref()),
                joined(&facts.addresses, ", "),
            ]);
        }
        output.print(&table)
    })
}

/// A value of a query string: what is no letter, digit, `.`, `_` or `-` as `%` and two digits.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

pub(super) fn changes(changes: &Changes, client: &Client, output: &mut Output) -> Result<(), CliError> {
    let mut after = changes.after;
    loop {
        let answer = client.get(&format!("/v1/subscribers?after={after}&limit=1000"))?;
        let found: Listing<Subscriber> = answer.typed()?;
        let more = found.items.len() == 1_000;
        for known in &found.items {
            after = known.sequence;
            if output.is_json() {
                output.json_line(&Answer::of(known)?)?;
                continue;
            }
            let state = match (known.down_since, &known.reason) {
                (None, _) => {
                    format!("up since {}: {}", known.started_at, joined(&known.facts.addresses, ", "))
                }
                (Some(down), None) => format!("down since {down}"),
                (Some(down), Some(reason)) => format!("down since {down}: {reason}"),
            };
            output.line(format_args!("{} line {} {state}", known.sequence, known.line))?;
        }
        if !more && !changes.follow {
            return Ok(());
        }
        if !more {
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
}
