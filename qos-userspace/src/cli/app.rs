//! `qos app`: programs of a provider, which may have levels of their own.

use clap::Subcommand;

use super::CliError;
use super::client::Client;
use super::contract::{self, ContractArgs};
use super::output::Output;
use crate::api::types::{ContractChange, Listing, NewApplication};
use crate::domain::{Application, Contract, Name};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Registers an application of a provider
    #[command(after_long_help = "\
Examples:
  qos app add acme video
  qos app add acme chat --max-down 5mbit --best-priority 4")]
    Add {
        /// The provider whose it is
        provider: Name,
        /// Its name: 1 to 32 of a-z A-Z 0-9 . _ -
        name: Name,
        #[command(flatten)]
        contract: ContractArgs,
    },
    /// Changes what an application may have of what its provider has: what is named becomes as it says
    Change {
        /// The provider whose it is
        provider: Name,
        /// Its name
        name: Name,
        #[command(flatten)]
        contract: ContractArgs,
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
        Verb::Add { provider, name, contract } => {
            let path = format!("/v1/providers/{provider}/applications");
            let contract = contract.applied_to(&Contract::default());
            let answer = client.post(&path, &NewApplication { name, contract })?;
            output.outcome(&answer, |output, application: Application| {
                output
                    .line(format_args!("application {} of {} added", application.name, application.provider))
            })
        }
        Verb::Change { provider, name, contract } => {
            let path = format!("/v1/providers/{provider}/applications/{name}");
            let was = client.get(&path)?.typed::<Application>()?.contract;
            let change = ContractChange { contract: contract.applied_to(&was), was: Some(was) };
            let answer = client.put(&format!("{path}/contract"), &change)?;
            output.outcome(&answer, |output, application: Application| {
                let Application { provider, name, .. } = &application;
                output.line(format_args!("the contract of {name} of {provider} is changed"))?;
                output.pairs(contract::pairs(&application.contract))
            })
        }
        Verb::List { provider } => {
            let path = match provider {
                Some(provider) => format!("/v1/providers/{provider}/applications"),
                None => "/v1/applications".to_owned(),
            };
            output.show(&client.get(&path)?, |output, applications: Listing<Application>| {
                let header: Vec<_> = ["PROVIDER", "NAME"].into_iter().chain(contract::HEADER).collect();
                let mut table = output.table(&header, &[2, 3, 4, 5, 6, 8]);
                for application in applications.items {
                    let names = [application.provider.to_string(), application.name.to_string()];
                    table.add_row(names.into_iter().chain(contract::cells(&application.contract)));
                }
                output.print(&table)
            })
        }
        Verb::Remove { provider, name } => {
            let answer = client.delete(&format!("/v1/providers/{provider}/applications/{name}"))?;
            output.outcome(&answer, |output, application: Application| {
                output.line(format_args!(
                    "application {} of {} removed",
                    application.name, application.provider
                ))
            })
        }
    }
}
