//! Where the keys of tokens come from: a file or a URL, read again from time to time.
//!
//! Keys that can't be read again stay as they are: an authorization server that is down for a while locks nobody out.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tracing::{info, warn};

use super::https::{self, FetchError};
use super::token::{KeySet, KeySetError};
use crate::config::northbound::{JwksSource, Tokens};

/// Shortest time between two attempts to read the keys because a token names one that is not known.
const SHORTEST_PAUSE: Duration = Duration::from_secs(60);

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JwksError {
    /// The file can't be read.
    #[error("cannot read the keys of tokens, {}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// The URL does not give them.
    #[error("cannot get the keys of tokens: {0}")]
    Fetch(#[from] FetchError),
    /// It is no set of keys.
    #[error("the keys of tokens, {from}: {source}")]
    Set { from: String, source: KeySetError },
}

/// Reads the keys once.
pub(crate) async fn read(tokens: &Tokens) -> Result<KeySet, JwksError> {
    let bytes = match &tokens.jwks {
        JwksSource::File(_) => return read_file(tokens),
        JwksSource::Url(url) => https::fetch(url, tokens.ca.as_deref()).await?,
    };
    parse(tokens, &bytes)
}

fn read_file(tokens: &Tokens) -> Result<KeySet, JwksError> {
    let JwksSource::File(path) = &tokens.jwks else { return Ok(KeySet::default()) };
    let bytes = std::fs::read(path).map_err(|source| JwksError::File { path: path.clone(), source })?;
    parse(tokens, &bytes)
}

fn parse(tokens: &Tokens, bytes: &[u8]) -> Result<KeySet, JwksError> {
    KeySet::parse(bytes).map_err(|source| JwksError::Set { from: tokens.jwks.to_string(), source })
}

/// Keys, and when they were read.
#[derive(Debug)]
pub(crate) struct Jwks {
    tokens: Tokens,
    keys: RwLock<Arc<KeySet>>,
    /// The last attempt to read them, and whether it was one with success. Held while one is under way.
    attempt: Mutex<Option<(Instant, bool)>>,
    pause: Duration,
}

impl Jwks {
    /// Those of the configuration. A file is read here; a URL is asked when keys are needed, and as long as it has not
    /// answered its keys are those that `before` had from it.
    pub(crate) fn open(tokens: &Tokens, before: Option<&Self>) -> Result<Self, JwksError> {
        let same_url = |before: &&Self| {
            (&before.tokens.jwks, &before.tokens.ca) == (&tokens.jwks, &tokens.ca)
                && matches!(tokens.jwks, JwksSource::Url(_))
        };
        let (keys, attempt) = match before.filter(same_url) {
            Some(before) => (before.keys(), None),
            None => {
                let read = matches!(tokens.jwks, JwksSource::File(_)).then(|| (Instant::now(), true));
                (Arc::new(read_file(tokens)?), read)
            }
        };
        let (tokens, keys, attempt) = (tokens.clone(), RwLock::new(keys), Mutex::new(attempt));
        Ok(Self { tokens, keys, attempt, pause: SHORTEST_PAUSE })
    }

    #[cfg(test)]
    pub(crate) const fn with_pause(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }

    /// The keys as they are.
    pub(crate) fn keys(&self) -> Arc<KeySet> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads them again if they have grown old, or could not be read.
    pub(crate) async fn refresh_if_due(&self) {
        self.read_again(|(at, done)| at.elapsed() >= if done { self.tokens.refresh } else { self.pause })
            .await;
    }

    /// Reads them again because one is asked for that is not among them; at most once a minute, however often.
    pub(crate) async fn refresh_for_unknown(&self) {
        self.read_again(|(at, _)| at.elapsed() >= self.pause).await;
    }

    async fn read_again(&self, is_due: impl FnOnce((Instant, bool)) -> bool) {
        let mut attempt = self.attempt.lock().await;
        if attempt.is_some_and(|last| !is_due(last)) {
            return;
        }
        let result = read(&self.tokens).await;
        *attempt = Some((Instant::now(), result.is_ok()));
        match result {
            Ok(keys) => {
                info!(from = %self.tokens.jwks, keys = keys.len(), "keys of tokens read");
                *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
            }
            Err(error) => warn!("{error}; those that are known stay"),
        }
    }
}
