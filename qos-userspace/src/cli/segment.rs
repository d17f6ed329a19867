//! `qos segment`: what lines share on their way to the link.

use clap::{Args, Subcommand};

use super::CliError;
use super::client::Client;
use super::output::{Output, or_dash};
use crate::api::types::{Listing, NewSegment, SegmentReport};
use crate::domain::{BitsPerSecond, Directed, Name, Segment};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Names what lines share before the link, or changes what it carries
    ///
    /// What is guaranteed on all lines behind it fits into its capacity, less its rest. Sessions name the
    /// segments that they are behind: `qos session add … --segment NAME`.
    #[command(after_long_help = "\
Example:
  qos segment add dslam-7 --down 1gbit --up 200mbit --rest-down 100mbit")]
    Add(Add),
    /// Shows all segments, and what is promised on each
    List,
    /// Shows one segment
    Show {
        /// Its name
        name: Name,
    },
    /// Forgets a segment that no session names
    Remove {
        /// Its name
        name: Name,
    },
}

#[derive(Debug, Args)]
pub(super) struct Add {
    /// Its name: 1 to 32 of a-z A-Z 0-9 . _ -
    name: Name,
    /// What it carries to subscribers
    #[arg(long, value_name = "RATE")]
    down: BitsPerSecond,
    /// What it carries from subscribers
    #[arg(long, value_name = "RATE")]
    up: BitsPerSecond,
    /// What of it is promised to nobody, to subscribers
    #[arg(long, value_name = "RATE")]
    rest_down: Option<BitsPerSecond>,
    /// What of it is promised to nobody, from subscribers
    #[arg(long, value_name = "RATE")]
    rest_up: Option<BitsPerSecond>,
}

pub(super) fn run(verb: Verb, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    match verb {
        Verb::Add(add) => {
            let segment = NewSegment {
                capacity: Directed { up: add.up, down: add.down },
                rest: Directed { up: add.rest_up, down: add.rest_down },
            };
            let answer = client.put(&format!("/v1/segments/{}", add.name), &segment)?;
            output.outcome(&answer, |output, segment: Segment| {
                output.line(format_args!("segment {} written", segment.name))
            })
        }
        Verb::List => {
            output.show(&client.get("/v1/segments")?, |output, segments: Listing<SegmentReport>| {
                let header = ["NAME", "DOWN", "PROMISED DOWN", "REST DOWN", "UP", "PROMISED UP", "REST UP"];
                let mut table = output.table(&header, &[1, 2, 3, 4, 5, 6]);
                for SegmentReport { name, capacity, rest, promised } in segments.items {
                    table.add_row([
                        name.to_string(),
                        capacity.down.to_string(),
                        promised.down.to_string(),
                        or_dash(rest.down),
                        capacity.up.to_string(),
                        promised.up.to_string(),
                        or_dash(rest.up),
                    ]);
                }
                output.print(&table)
            })
        }
        Verb::Show { name } => {
            output.show(&client.get(&format!("/v1/segments/{name}"))?, |output, segment: SegmentReport| {
                let SegmentReport { name, capacity, rest, promised } = segment;
                output.pairs(vec![
                    ("name", Some(name.to_string())),
                    ("down", Some(capacity.down.to_string())),
                    ("promised down", Some(promised.down.to_string())),
                    ("rest down", rest.down.map(|rest| rest.to_string())),
                    ("up", Some(capacity.up.to_string())),
                    ("promised up", Some(promised.up.to_string())),
                    ("rest up", rest.up.map(|rest| rest.to_string())),
                ])
            })
        }
        Verb::Remove { name } => {
            let answer = client.delete(&format!("/v1/segments/{name}"))?;
            output.outcome(&answer, |output, segment: Segment| {
                output.line(format_args!("segment {} removed", segment.name))
            })
        }
    }
}
