//! `qos key`: API keys of providers' programs.

use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};

use super::CliError;
use super::client::Client;
use super::output::{Output, moment, or_dash};
use crate::api::types::{ApiKeyReport, Listing, NewApiKey};
use crate::domain::{KeyId, Name, duration};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Makes an API key for a provider's program, and shows it once
    ///
    /// Who shows it on the API for providers (`[northbound]` in the configuration) asks as this provider. Only its
    /// SHA-256 is kept: a key that is lost is removed, and another made.
    #[command(after_long_help = "\
Examples:
  qos key add --provider acme --expires '90 days'
  qos key add --provider acme --app video --read-only
  curl -H \"Authorization: Bearer $KEY\" https://gateway.example.net:8443/api/v1/allocations")]
    Add(Add),
    /// Shows all keys; their secrets are not kept
    List,
    /// Takes a key no more, from now on
    Remove {
        /// Its number, the first 12 digits after `qos_`
        id: KeyId,
    },
}

#[derive(Debug, Args)]
pub(super) struct Add {
    /// Whose key it is
    #[arg(long, value_name = "NAME")]
    provider: Name,
    /// The one application of the provider that it is for
    #[arg(long, value_name = "NAME")]
    app: Option<Name>,
    /// With it nothing can be changed
    #[arg(long)]
    read_only: bool,
    /// For how long it is taken; without, until it is removed
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    expires: Option<SignedDuration>,
}

pub(super) fn run(verb: Verb, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    match verb {
        Verb::Add(Add { provider, app: application, read_only, expires }) => {
            let end = |after| {
                let end = Timestamp::now().checked_add(after);
                end.map_err(|_| CliError::Usage("--expires: that is after the last date there is".to_owned()))
            };
            let expires_at = expires.map(end).transpose()?;
            let answer =
                client.post("/v1/keys", &NewApiKey { provider, application, read_only, expires_at })?;
            output.outcome(&answer, |output, key: ApiKeyReport| {
                output.line(format_args!("key {} of {} added", key.id, key.provider))?;
                match key.key {
                    Some(secret) => output.line(format_args!("{secret}\nit is not shown again")),
                    None => Ok(()),
                }
            })
        }
        Verb::List => output.show(&client.get("/v1/keys")?, |output, keys: Listing<ApiKeyReport>| {
            let mut table = output.table(&["ID", "PROVIDER", "APP", "MAY", "ADDED", "EXPIRES"], &[]);
            for key in keys.items {
                table.add_row([
                    key.id.to_string(),
                    key.provider.to_string(),
                    or_dash(key.application),
                    if key.read_only { "look" } else { "ask" }.to_owned(),
                    moment(key.created_at),
                    or_dash(key.expires_at.map(moment)),
                ]);
            }
            output.print(&table)
        }),
        Verb::Remove { id } => {
            let answer = client.delete(&format!("/v1/keys/{id}"))?;
            output.outcome(&answer, |output, key: ApiKeyReport| {
                output.line(format_args!("key {} of {} removed", key.id, key.provider))
            })
        }
    }
}
