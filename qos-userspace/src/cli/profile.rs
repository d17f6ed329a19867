//! `qos profile`: named levels.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use clap::builder::TypedValueParser;
use jiff::SignedDuration;

use super::CliError;
use super::args::one_of;
use super::client::Client;
use super::level::{self, LevelArgs};
use super::output::{Output, or_dash};
use crate::api::types::{Listing, NewProfile};
use crate::domain::{DurationRange, Name, Profile, ProfileStatus, dscp, duration};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Names a level, or changes what a name stands for in later grants
    #[command(after_long_help = "\
Example:
  qos profile add voice --guaranteed-down 100kbit --guaranteed-up 100kbit --priority 0 --dscp EF --delay 20ms \\
      --longest 12h")]
    Add {
        /// Its name: 1 to 32 of a-z A-Z 0-9 . _ -
        name: Name,
        #[command(flatten)]
        level: Box<LevelArgs>,
        /// The shortest time that it may be asked for
        #[arg(long, value_name = "DURATION", value_parser = duration::parse, help_heading = "Profile")]
        shortest: Option<SignedDuration>,
        /// The longest time that an allocation of it lasts, extensions counted; requests must then name theirs
        #[arg(long, value_name = "DURATION", value_parser = duration::parse, help_heading = "Profile")]
        longest: Option<SignedDuration>,
        /// Whether new requests may name it
        #[arg(long, value_parser = status(), default_value = ProfileStatus::default().name(), help_heading = "Profile")]
        status: ProfileStatus,
    },
    /// Names the levels of a file
    ///
    /// JSON as `qos profile list -o json` prints it. Either all of them are written, or, where one can't be, none.
    /// The file starter-profiles.json among the examples has levels for voice, interactive video, gaming,
    /// streaming, bulk and background traffic.
    #[command(after_long_help = "\
Examples:
  qos profile import /usr/share/doc/qos/examples/starter-profiles.json
  qos --socket /run/qos/other.sock profile list -o json | qos profile import -")]
    Import {
        /// The file; `-` for standard input
        file: PathBuf,
    },
    /// Shows all named levels
    List,
    /// Shows one named level
    Show {
        /// Its name
        name: Name,
    },
    /// Forgets a named level; what was granted with it stays
    Remove {
        /// Its name
        name: Name,
    },
}

fn status() -> impl TypedValueParser<Value = ProfileStatus> {
    one_of(ProfileStatus::NAMES, ["It may", "Not now", "Not any more"])
}

pub(super) fn run(verb: Verb, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    match verb {
        Verb::Add { name, level, shortest, longest, status } => {
            let duration = DurationRange { shortest, longest };
            let profile = NewProfile { level: level.level(), status, duration };
            let answer = client.put(&format!("/v1/profiles/{name}"), &profile)?;
            output.outcome(&answer, |output, profile: Profile| {
                output.line(format_args!("profile {} written", profile.name))
            })
        }
        Verb::Import { file } => import(&file, client, output),
        Verb::List => output.show(&client.get("/v1/profiles")?, |output, profiles: Listing<Profile>| {
            let header = [
                "NAME",
                "GUARANTEED DOWN",
                "MAX DOWN",
                "GUARANTEED UP",
                "MAX UP",
                "PRIORITY",
                "DSCP",
                "ENFORCEMENT",
                "LONGEST",
                "STATUS",
            ];
            let mut table = output.table(&header, &[1, 2, 3, 4, 5]);
            for Profile { name, level, status, duration } in profiles.items {
                table.add_row([
                    name.to_string(),
                    or_dash(level.guaranteed.down),
                    or_dash(level.maximum.down),
                    or_dash(level.guaranteed.up),
                    or_dash(level.maximum.up),
                    level.priority.to_string(),
                    or_dash(level.dscp.map(dscp::name)),
                    level::enforcement(level.enforcement).to_owned(),
                    or_dash(duration.longest.map(|longest| format!("{longest:#}"))),
                    status.name().to_owned(),
                ]);
            }
            output.print(&table)
        }),
        Verb::Show { name } => {
            output.show(&client.get(&format!("/v1/profiles/{name}"))?, |output, profile: Profile| {
                let mut pairs = vec![("name", Some(profile.name.to_string()))];
                pairs.extend(level::pairs(&profile.level));
                let text = |duration: SignedDuration| format!("{duration:#}");
                pairs.push(("shortest", profile.duration.shortest.map(text)));
                pairs.push(("longest", profile.duration.longest.map(text)));
                pairs.push(("status", Some(profile.status.name().to_owned())));
                output.pairs(pairs)
            })
        }
        Verb::Remove { name } => {
            let answer = client.delete(&format!("/v1/profiles/{name}"))?;
            output.outcome(&answer, |output, profile: Profile| {
                output.line(format_args!("profile {} removed", profile.name))
            })
        }
    }
}

fn import(file: &Path, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let name = file.display();
    let read = if file == Path::new("-") {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(file)
    };
    let text = read.map_err(|source| CliError::System { what: format!("read {name}"), source })?;
    let profiles: Listing<Profile> =
        serde_json::from_str(&text).map_err(|error| CliError::Usage(format!("{name}: {error}")))?;
    let path = |profile: &Profile| format!("/v1/profiles/{}", profile.name);
    let new = |profile: Profile| NewProfile {
        level: profile.level,
        status: profile.status,
        duration: profile.duration,
    };
    for profile in &profiles.items {
        client.try_put(&path(profile), &new(profile.clone()))?;
    }
    for profile in profiles.items {
        let answer = client.put(&path(&profile), &new(profile))?;
        output.outcome(&answer, |output, profile: Profile| {
            output.line(format_args!("profile {} written", profile.name))
        })?;
    }
    Ok(())
}
