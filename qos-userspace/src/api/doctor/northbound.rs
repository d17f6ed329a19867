//! The API for providers: certificate, keys of tokens, and whom clients stand for.

use std::collections::BTreeSet;
use std::path::Path;

use jiff::{SignedDuration, Timestamp};

use super::super::auth::jwks;
use super::super::northbound::tls::{self, Shown};
use super::Check;
use crate::config::northbound::{Northbound, Tokens};
use crate::domain::Name;
use crate::manager::State;
use crate::plural::counted;

/// Time before the end of a certificate from which on it is told of.
const SOON: SignedDuration = SignedDuration::from_hours(14 * 24);

/// Providers and applications there are.
#[derive(Clone, Debug, Default)]
pub(super) struct Parties(BTreeSet<(Name, Option<Name>)>);

impl Parties {
    pub(super) fn of(state: &State) -> Self {
        let providers = state.providers.keys().map(|name| (name.clone(), None));
        let applications =
            state.applications.keys().map(|(provider, name)| (provider.clone(), Some(name.clone())));
        Self(providers.chain(applications).collect())
    }
}

/// Looks at all of it. A URL is asked.
pub(super) fn checks(config: &Northbound, state_dir: &Path, parties: Option<&Parties>) -> Vec<Check> {
    let mut checks = vec![certificate(config, state_dir, Timestamp::now())];
    checks.extend(config.tokens.as_ref().map(keys_of_tokens));
    checks.extend(parties.map(|parties| clients(config, parties)));
    checks
}

fn certificate(config: &Northbound, state_dir: &Path, now: Timestamp) -> Check {
    const NAME: &str = "certificate for providers";
    let own = tls::own_files(state_dir);
    let files = match &config.certificate {
        Some(files) => files,
        None if !own.chain.exists() => {
            return Check::ok(NAME, "none yet: a self-signed one is made at the first start");
        }
        None => &own,
    };
    let renew = match config.certificate {
        Some(_) => "put a new one in its place, and run `qos reload`".to_owned(),
        None => format!(
            "remove {} and restart qosd, or name a certificate that clients trust",
            own.chain.display()
        ),
    };
    match tls::read(files) {
        Err(error) => Check::error(
            NAME,
            error.to_string(),
            "qosd takes no such configuration, and does not start with it",
            "name a certificate and its key, both as PEM, that qosd's user can read",
        ),
        Ok(Shown { ends: Some(ends), .. }) if ends <= now => {
            Check::error(NAME, format!("it ended at {ends}"), "no client trusts it", renew)
        }
        Ok(Shown { ends: Some(ends), .. }) if ends.duration_since(now) < SOON => {
            Check::warning(NAME, format!("it ends at {ends}"), "from then on no client trusts it", renew)
        }
        Ok(Shown { ends, fingerprint, .. }) => {
            let until = ends.map(|ends| format!("until {ends}, ")).unwrap_or_default();
            let kind = if config.certificate.is_some() { "" } else { "self-signed, " };
            Check::ok(NAME, format!("{kind}{until}SHA-256 {fingerprint}"))
        }
    }
}

fn keys_of_tokens(tokens: &Tokens) -> Check {
    const NAME: &str = "keys of tokens";
    let read = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())
        .and_then(|runtime| runtime.block_on(jwks::read(tokens)).map_err(|error| error.to_string()));
    match read {
        Ok(keys) => Check::ok(NAME, format!("{} from {}", counted(keys.len(), "key"), tokens.jwks)),
        Err(error) => Check::error(
            NAME,
            error,
            "tokens that are signed with a key that is not known yet are refused",
            "set `jwks` to a JSON Web Key Set that qosd's user can read, or to an https URL that answers with one \
             and whose authority is in the system's store or in `jwks_ca`",
        ),
    }
}

fn clients(config: &Northbound, parties: &Parties) -> Check {
    const NAME: &str = "clients of providers";
    let lost = config
        .clients
        .iter()
        .filter(|client| !parties.0.contains(&(client.provider.clone(), client.application.clone())))
        .map(|client| match &client.application {
            Some(application) => format!("{} (application {application} of {})", client.id, client.provider),
            None => format!("{} (provider {})", client.id, client.provider),
        })
        .collect::<Vec<_>>();
    if lost.is_empty() {
        return Check::ok(NAME, counted(config.clients.len(), "client"));
    }
    Check::warning(
        NAME,
        format!("clients stand for what is not registered: {}", lost.join(", ")),
        "all that they ask for is refused",
        "register it with `qos provider add` or `qos app add`, or take the client out of the configuration",
    )
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;
    use crate::api::auth::testing::key_set;
    use crate::api::testing::config;

    #[test]
    fn what_is_wrong_with_certificate_keys_and_clients_is_said() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = |name: &str| directory.path().join(name);
        let text = format!(
            "[northbound]\nlisten = ['127.0.0.1:0']\njwks = '{}'\naudience = 'qos'\n[[northbound.client]]\nid = 'shop'\n\
             provider = 'acme'\n",
            path("jwks.json").display()
        );
        let config = config(directory.path(), &text);
        let settings = config.northbound.clone().expect("there");
        let found = |severity: Severity, expected: &str| {
            let parties = Parties::default();
            let checks = checks(&settings, &config.state_dir, Some(&parties));
            assert!(
                checks.iter().any(|check| check.severity == severity && check.found.contains(expected)),
                "{severity:?} {expected} in {checks:#?}"
            );
        };
        found(Severity::Ok, "none yet: a self-signed one is made");
        found(Severity::Error, "cannot read the keys of tokens, ");
        found(Severity::Warning, "clients stand for what is not registered: shop (provider acme)");

        std::fs::write(path("jwks.json"), key_set(&[])).expect("written");
        found(Severity::Error, "none of its 0 keys is for");
        let shown = tls::open(&settings, &config.state_dir).expect("made");
        found(Severity::Ok, &format!("SHA-256 {}", shown.fingerprint));

        let ends = shown.ends.expect("it says so");
        let at = |before: SignedDuration| certificate(&settings, &config.state_dir, ends - before).severity;
        assert_eq!(at(SignedDuration::from_hours(24 * 15)), Severity::Ok);
        assert_eq!(at(SignedDuration::from_hours(24 * 13)), Severity::Warning);
        assert_eq!(at(SignedDuration::ZERO), Severity::Error);

        let own = tls::own_files(&config.state_dir);
        let other = rcgen::KeyPair::generate().expect("a key");
        std::fs::write(&own.key, other.serialize_pem()).expect("written");
        found(Severity::Error, "cannot use the certificate ");
    }
}
