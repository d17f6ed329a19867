//! `qos provider`: who may ask for levels.

use clap::{Args, Subcommand, ValueEnum};
use ipnet::IpNet;

use super::CliError;
use super::args::prefix;
use super::client::Client;
use super::contract::{self, ContractArgs};
use super::output::{Output, joined};
use crate::api::types::{ContractChange, Listing};
use crate::domain::{Contract, Name, Provider, ProviderKind};
use crate::manager::NewProvider;

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Registers a provider
    ///
    /// Its grants may only name flows from or to the networks it claims here: an application
    /// provider's own servers, a network provider's subscribers.
    #[command(after_long_help = "\
Examples:
  qos provider add acme --kind application --network 203.0.113.0/24 --network 2001:db8:a::/48
  qos provider add isp --kind network --network 192.0.2.0/24 --max-down 200mbit --max-up 50mbit
  qos provider add games --kind application --network 198.51.100.0/24 --best-priority 2 --allocations 1000")]
    Add(Add),
    /// Changes a provider's contract: what is named becomes as it says, the rest stays
    ///
    /// What is granted stays as it is until it ends. What the new contract would not have admitted is told.
    #[command(after_long_help = "\
Examples:
  qos provider change acme --guaranteed-down 100mbit --profiles voice,video
  qos provider change acme --max-down none --profiles all --dry-run")]
    Change {
        /// Its name
        name: Name,
        #[command(flatten)]
        contract: ContractArgs,
    },
    /// Shows all providers
    List,
    /// Shows one provider
    Show {
        /// Its name
        name: Name,
    },
    /// Removes a provider that has no allocation and no application
    Remove {
        /// Its name
        name: Name,
    },
}

#[derive(Debug, Args)]
pub(super) struct Add {
    /// Its name: 1 to 32 of a-z A-Z 0-9 . _ -
    name: Name,
    /// Which side of a flow is its own to claim
    #[arg(long, value_enum)]
    kind: Kind,
    /// A network it may claim; may be given several times
    #[arg(long = "network", value_name = "PREFIX", required = true, value_parser = prefix, value_delimiter = ',')]
    networks: Vec<IpNet>,
    #[command(flatten)]
    contract: ContractArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// Serves an application from its own networks: the far side of a flow
    Application,
    /// Serves subscribers over this network: the near side of a flow
    Network,
}

pub(super) fn run(verb: Verb, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    match verb {
        Verb::Add(add) => {
            let request = NewProvider {
                name: add.name,
                kind: match add.kind {
                    Kind::Application => ProviderKind::Application,
                    Kind::Network => ProviderKind::Network,
                },
                networks: add.networks,
                contract: add.contract.applied_to(&Contract::default()),
            };
            let answer = client.post("/v1/providers", &request)?;
            output.outcome(&answer, |output, provider: Provider| {
                output.line(format_args!("provider {} added", provider.name))
            })
        }
        Verb::Change { name, contract } => {
            let path = format!("/v1/providers/{name}");
            let was = client.get(&path)?.typed::<Provider>()?.contract;
            let change = ContractChange { contract: contract.applied_to(&was), was: Some(was) };
            let answer = client.put(&format!("{path}/contract"), &change)?;
            output.outcome(&answer, |output, provider: Provider| {
                output.line(format_args!("the contract of provider {} is changed", provider.name))?;
                output.pairs(contract::pairs(&provider.contract))
            })
        }
        Verb::List => output.show(&client.get("/v1/providers")?, |output, providers: Listing<Provider>| {
            let header: Vec<_> = ["NAME", "KIND", "NETWORKS"].into_iter().chain(contract::HEADER).collect();
            let mut table = output.table(&header, &[3, 4, 5, 6, 7, 9]);
            for provider in providers.items {
                let cells = [
                    provider.name.to_string(),
                    kind(provider.kind).to_owned(),
                    joined(&provider.networks, ", "),
                ];
                table.add_row(cells.into_iter().chain(contract::cells(&provider.contract)));
            }
            output.print(&table)
        }),
        Verb::Show { name } => {
            output.show(&client.get(&format!("/v1/providers/{name}"))?, |output, provider: Provider| {
                let mut pairs = vec![
                    ("name", Some(provider.name.to_string())),
                    ("kind", Some(kind(provider.kind).to_owned())),
                    ("networks", Some(joined(&provider.networks, "\n"))),
                ];
                pairs.extend(contract::pairs(&provider.contract));
                output.pairs(pairs)
            })
        }
        Verb::Remove { name } => {
            let answer = client.delete(&format!("/v1/providers/{name}"))?;
            output.outcome(&answer, |output, provider: Provider| {
                output.line(format_args!("provider {} removed", provider.name))
            })
        }
    }
}

fn kind(kind: ProviderKind) -> &'static str {
    match kind {
        ProviderKind::Application => "application",
        ProviderKind::Network => "network",
    }
}
