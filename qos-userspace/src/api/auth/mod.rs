//! Who asks over the network: a provider's program with a token or an API key.
//!
//! Whatever is shown is held against the configuration and the state, and becomes a [`Client`]. What a client may
//! see and touch is not decided here but by [`crate::manager::confine`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::http::{HeaderMap, header};
use jiff::Timestamp;

pub(crate) mod https;
pub(crate) mod jwks;
pub(crate) mod keys;
pub(crate) mod limits;
pub(crate) mod routes;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub(crate) mod token;

pub use keys::Keys;

use self::jwks::{Jwks, JwksError};
use self::keys::Secret;
use self::token::{KeySet, Rules, TokenError};
use crate::config::Northbound;
use crate::config::northbound::ClientConfig;
use crate::domain::Name;
use crate::manager::confine::Own;
use crate::manager::record::Actor;

/// A provider's program that has shown who it is. Among the extensions of every request behind
/// [`super::northbound::guard::guarded`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Whose it is.
    pub provider: Name,
    /// The one application that it may ask for; none: for all.
    pub application: Option<Name>,
    /// Its name in tokens, or `key:` and the number of its API key.
    pub id: String,
    rights: Rights,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Rights {
    /// An API key's.
    Key { read_only: bool },
    /// A token's.
    Scopes(BTreeSet<String>),
}

impl Client {
    /// Whether it may do what needs `scope`; `changes` says whether that changes something.
    #[must_use]
    pub fn may(&self, scope: &str, changes: bool) -> bool {
        match &self.rights {
            Rights::Key { read_only } => !(*read_only && changes),
            Rights::Scopes(scopes) => scopes.contains(scope),
        }
    }

    /// As the history has it.
    #[must_use]
    pub fn actor(&self) -> Actor {
        Actor::Client {
            provider: self.provider.clone(),
            application: self.application.clone(),
            client: self.id.clone(),
        }
    }

    /// What it is confined to.
    #[must_use]
    pub fn own(&self) -> Own {
        Own { provider: self.provider.clone(), application: self.application.clone() }
    }
}

/// Why somebody is not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AuthError {
    /// Nothing was shown.
    #[error("show a token or an API key: `Authorization: Bearer …`")]
    Missing,
    /// What was shown is neither.
    #[error("`Authorization` is not `Bearer` and one token or API key")]
    Malformed,
    /// There is no such API key.
    #[error("the API key is not known, was removed, or has expired")]
    Key,
    /// Tokens are not taken.
    #[error("no tokens are taken here, only API keys")]
    NoTokens,
    /// The keys of tokens could not be read yet.
    #[error(
        "tokens can't be checked now: the keys of the authorization server are not there; try again later"
    )]
    NoKeys,
    /// The token is not taken.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The token is for nobody that the configuration names.
    #[error("the token is for a client that is not registered here")]
    Client,
}

/// Knows who may ask.
#[derive(Debug)]
pub(crate) struct Authenticator {
    clients: BTreeMap<String, ClientConfig>,
    tokens: Option<(Rules, Arc<Jwks>)>,
    keys: Arc<Keys>,
}

impl Authenticator {
    /// By a configuration; `before` is what it replaces.
    pub(crate) fn new(
        config: &Northbound,
        keys: &Arc<Keys>,
        before: Option<&Self>,
    ) -> Result<Self, JwksError> {
        let known = before.and_then(Self::jwks);
        let tokens = match &config.tokens {
            Some(tokens) => {
                let rules = Rules {
                    issuer: tokens.issuer.clone(),
                    audience: tokens.audience.clone(),
                    leeway: tokens.leeway,
                };
                Some((rules, Arc::new(Jwks::open(tokens, known.map(Arc::as_ref))?)))
            }
            None => None,
        };
        let clients = config.clients.iter().map(|client| (client.id.clone(), client.clone())).collect();
        Ok(Self { clients, tokens, keys: Arc::clone(keys) })
    }

    /// The keys of tokens.
    pub(crate) fn jwks(&self) -> Option<&Arc<Jwks>> {
        self.tokens.as_ref().map(|(_, jwks)| jwks)
    }

    /// Who asks, by the header of a request.
    pub(crate) async fn authenticate(&self, headers: &HeaderMap) -> Result<Client, AuthError> {
        let mut shown = headers.get_all(header::AUTHORIZATION).iter();
        let first = shown.next().ok_or(AuthError::Missing)?;
        if shown.next().is_some() {
            return Err(AuthError::Malformed);
        }
        let (scheme, shown) =
            first.to_str().ok().and_then(|text| text.split_once(' ')).ok_or(AuthError::Malformed)?;
        let shown = shown.trim_matches(' ');
        if !scheme.eq_ignore_ascii_case("bearer") || shown.is_empty() || shown.contains(' ') {
            return Err(AuthError::Malformed);
        }
        if shown.starts_with(keys::PREFIX) { self.by_key(shown) } else { self.by_token(shown).await }
    }

    fn by_key(&self, shown: &str) -> Result<Client, AuthError> {
        let found = Secret::parse(shown).and_then(|secret| self.keys.find(&secret, Timestamp::now()));
        let key = found.ok_or(AuthError::Key)?;
        Ok(Client {
            provider: key.provider,
            application: key.application,
            id: format!("key:{}", key.id),
            rights: Rights::Key { read_only: key.read_only },
        })
    }

    async fn by_token(&self, shown: &str) -> Result<Client, AuthError> {
        let (rules, jwks) = self.tokens.as_ref().ok_or(AuthError::NoTokens)?;
        let claims = match jwks.keys().verify(shown, rules) {
            Err(TokenError::UnknownKey) => {
                jwks.refresh_for_unknown().await;
                let keys: Arc<KeySet> = jwks.keys();
                if keys.len() == 0 {
                    return Err(AuthError::NoKeys);
                }
                keys.verify(shown, rules)?
            }
            verified => verified?,
        };
        let client = claims.client().and_then(|client| self.clients.get(client)).ok_or(AuthError::Client)?;
        Ok(Client {
            provider: client.provider.clone(),
            application: client.application.clone(),
            id: client.id.clone(),
            rights: Rights::Scopes(claims.scopes()),
        })
    }
}
