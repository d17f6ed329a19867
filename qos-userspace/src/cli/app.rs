//! `qos app`: programs of a provider, which may have levels of their own.

use clap::Subcommand;

use super::CliError;
use super::client::Client;
use super::output::Output;
use crate::api::types::{Listing, NewApplication};
use crate::domain::{Application, Name};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Registers an application of a provider
    #[command(after_long_help = "Example:\n  qos app add acme video")]
    Add {
        /// The provider whose it is
        provider: Name,
        /// Its name: 1 to 32 of a-z A-Z 0-9 . _ -
        name: Name,
    },
    /// Shows all applications, or those of one provider
    List {
        /// The provider
        provider: Option<Name>,
    },
    /// Removes an application that has no allocation
    Remove {
        /// The provider whose it is
        provider: Name,
        /// Its name
        name: Name,
    },
}

pub(super) fn run(verb: Verb, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    match verb {
        Verb::Add { provider, name } => {
            let path = format!("/v1/providers/{provider}/applications");
            let answer = client.post(&path, &NewApplication { name })?;
            output.outcome(&answer, |output, application: Application, _| {
                output
                    .line(format_args!("application {} of {} added", application.name, application.provider))
            })
        }
        Verb::List { provider } => {
            let path = match provider {
                Some(provider) => format!("/v1/providers/{provider}/applications"),
                None => "/v1/applications".to_owned(),
            };
            output.show(&client.get(&path)?, |output, applications: Listing<Application>| {
                let mut table = output.table(&["PROVIDER", "NAME"], &[]);
                for application in applications.items {
                    table.add_row([application.provider.to_string(), application.name.to_string()]);
                }
                output.print(&table)
            })
        }
        Verb::Remove { provider, name } => {
            let answer = client.delete(&format!("/v1/providers/{provider}/applications/{name}"))?;
            output.outcome(&answer, |output, application: Application, _| {
                output.line(format_args!(
                    "application {} of {} removed",
                    application.name, application.provider
                ))
            })
        }
    }
}
