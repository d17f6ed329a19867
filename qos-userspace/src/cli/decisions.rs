//! `qos decisions`: who asked for what, and what came of it.

use clap::Args;
use clap::builder::TypedValueParser;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::CliError;
use super::args::one_of;
use super::client::Client;
use super::output::{Output, joined, moment};
use crate::api::types::Listing;
use crate::domain::{Name, duration};
use crate::manager::record::{Record, RecordQuery, Verdict};

/// Shows who asked for what, and what came of it
///
/// The newest first: what was granted, changed and refused, what ended and why. A decision that ends
/// or moves other allocations has a line for each of them too. What is kept are the last 100,000 lines.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  qos decisions --allocation 17
  qos decisions --session dsl-0042 --since 1h
  qos decisions --provider acme --verdict refused -o json | jq '.items[].reason'")]
pub(super) struct Decisions {
    /// Only those that concern a provider
    #[arg(long, value_name = "NAME")]
    provider: Option<Name>,
    /// Only those that concern an application of this name
    #[arg(long, value_name = "NAME")]
    app: Option<Name>,
    /// Only those that concern a line
    #[arg(long, value_name = "NAME")]
    session: Option<Name>,
    /// Only those that concern an allocation
    #[arg(long, value_name = "ID")]
    allocation: Option<u64>,
    /// Only those with this outcome
    #[arg(long, value_parser = verdict())]
    verdict: Option<Verdict>,
    /// Only those of the last time, as 90s, 15m or 2 days
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    since: Option<SignedDuration>,
    /// Only those before this number: what follows on a list that ended there
    #[arg(long, value_name = "NUMBER")]
    before: Option<u64>,
    /// That many at most
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 50,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(RecordQuery::MOST)))]
    limit: u32,
}

fn verdict() -> impl TypedValueParser<Value = Verdict> {
    one_of(Verdict::NAMES, ["Carried out", "Refused", "Not carried out: the kernel or the disk failed"])
}

pub(super) fn run(decisions: &Decisions, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let since = match decisions.since {
        None => None,
        Some(since) => Some(
            Timestamp::now()
                .checked_sub(since)
                .map_err(|_| CliError::Usage("--since: that is before all time".to_owned()))?,
        ),
    };
    let options = [
        decisions.provider.as_ref().map(|name| format!("provider={name}")),
        decisions.app.as_ref().map(|name| format!("application={name}")),
        decisions.session.as_ref().map(|name| format!("session={name}")),
        decisions.allocation.map(|id| format!("allocation={id}")),
        decisions.verdict.map(|verdict| format!("verdict={}", verdict.name())),
        since.map(|since| format!("since={since}")),
        decisions.before.map(|before| format!("before={before}")),
        Some(format!("limit={}", decisions.limit)),
    ];
    let path = format!("/v1/decisions?{}", joined(options.into_iter().flatten(), "&"));
    output.show(&client.get(&path)?, |output, records: Listing<Record>| {
        let header = ["NUMBER", "AT", "WHO", "WHAT", "OF", "OUTCOME", "WHY"];
        let mut table = output.table(&header, &[0]);
        for record in records.items {
            let outcome = record.code.map_or(record.verdict.name(), |code| code.name());
            table.add_row([
                record.sequence.to_string(),
                moment(record.at),
                record.actor.clone(),
                record.action.replace('_', " "),
                subject(&record),
                outcome.replace('_', " "),
                record.reason.unwrap_or_else(|| "-".to_owned()),
            ]);
        }
        output.print(&table)
    })
}

/// What it concerns.
fn subject(record: &Record) -> String {
    let asked = || record.asked.as_ref().and_then(|asked| asked.get("name")).and_then(Value::as_str);
    let provider = record.provider.as_ref().map(|provider| match &record.application {
        Some(application) => format!("{provider}/{application}"),
        None => provider.to_string(),
    });
    let parts = [
        record.allocation.map(|id| format!("allocation {id}")),
        provider,
        record.session.as_ref().map(|session| format!("line {session}")),
    ];
    match joined(parts.into_iter().flatten(), ", ") {
        none if none.is_empty() => asked().unwrap_or("-").to_owned(),
        subject => subject,
    }
}
