//! `qos provider`: who may ask for levels.

use clap::{Args, Subcommand, ValueEnum};
use ipnet::IpNet;

use super::CliError;
use super::args::prefix;
use super::client::Client;
use super::output::{Output, joined, or_dash};
use crate::api::types::Listing;
use crate::domain::{BitsPerSecond, Directed, Name, Provider, ProviderKind};
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
  qos provider add isp --kind network --network 192.0.2.0/24 --max-down 200mbit --max-up 50mbit")]
    Add(Add),
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
    /// What all its allocations together may carry to subscribers
    #[arg(long, value_name = "RATE")]
    max_down: Option<BitsPerSecond>,
    /// What all its allocations together may carry from subscribers
    #[arg(long, value_name = "RATE")]
    max_up: Option<BitsPerSecond>,
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
                aggregate: Directed { up: add.max_up, down: add.max_down },
            };
            let answer = client.post("/v1/providers", &request)?;
            output.outcome(&answer, |output, provider: Provider, _| {
                output.line(format_args!("provider {} added", provider.name))
            })
        }
        Verb::List => output.show(&client.get("/v1/providers")?, |output, providers: Listing<Provider>| {
            let mut table = output.table(&["NAME", "KIND", "MAX DOWN", "MAX UP", "NETWORKS"], &[2, 3]);
            for provider in providers.items {
                table.add_row([
                    provider.name.to_string(),
                    kind(provider.kind).to_owned(),
                    or_dash(provider.aggregate.down),
                    or_dash(provider.aggregate.up),
                    joined(&provider.networks, ", "),
                ]);
            }
            output.print(&table)
        }),
        Verb::Show { name } => {
            output.show(&client.get(&format!("/v1/providers/{name}"))?, |output, provider: Provider| {
                output.pairs(vec![
                    ("name", Some(provider.name.to_string())),
                    ("kind", Some(kind(provider.kind).to_owned())),
                    ("networks", Some(joined(&provider.networks, "\n"))),
                    ("maximum down", provider.aggregate.down.map(|rate| rate.to_string())),
                    ("maximum up", provider.aggregate.up.map(|rate| rate.to_string())),
                ])
            })
        }
        Verb::Remove { name } => {
            let answer = client.delete(&format!("/v1/providers/{name}"))?;
            output.outcome(&answer, |output, provider: Provider, _| {
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
