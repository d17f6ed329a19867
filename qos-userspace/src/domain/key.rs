//! API keys: what a program shows that has no authorization server to get tokens from.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::name::Name;

/// Bytes of a key's number.
pub const KEY_ID_BYTES: usize = 6;

/// The number of an API key: 12 hexadecimal digits. No secret.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId(String);

/// SHA-256 of a key's secret. The secret has 256 random bits, so that nothing slower is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyHash(pub [u8; 32]);

/// Why a text is no part of an API key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It is no number.
    #[error("`{0}` is not the number of an API key: 12 of 0-9 a-f")]
    Id(String),
    /// It is no hash.
    #[error("`{0}` is not the hash of an API key: 64 of 0-9 a-f")]
    Hash(String),
}

/// An API key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiKey {
    /// Its number.
    pub id: KeyId,
    /// Whose requests it is shown with.
    pub provider: Name,
    /// The one application of the provider that it is for; none: for all.
    pub application: Option<Name>,
    /// What its secret is recognised by.
    pub hash: KeyHash,
    /// With it nothing can be changed.
    pub read_only: bool,
    /// When it was made.
    pub created_at: Timestamp,
    /// Until when it is taken; none: until it is removed.
    pub expires_at: Option<Timestamp>,
}

impl KeyId {
    /// The number of these bytes.
    #[must_use]
    pub fn new(bytes: [u8; KEY_ID_BYTES]) -> Self {
        Self(crate::hex::encode(&bytes))
    }

    /// The number as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

impl TryFrom<String> for KeyId {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        if is_hex(&text, 2 * KEY_ID_BYTES) { Ok(Self(text)) } else { Err(KeyError::Id(shortened(&text))) }
    }
}

impl FromStr for KeyId {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::try_from(text.to_owned())
    }
}

impl From<KeyId> for String {
    fn from(id: KeyId) -> Self {
        id.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for KeyHash {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let wrong = || KeyError::Hash(shortened(text));
        if !is_hex(text, 64) {
            return Err(wrong());
        }
        let bytes = crate::hex::decode(text).map_err(|_| wrong())?;
        bytes.try_into().map(Self).map_err(|_| wrong())
    }
}

impl TryFrom<String> for KeyHash {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl From<KeyHash> for String {
    fn from(hash: KeyHash) -> Self {
        hash.to_string()
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::hex::encode(&self.0))
    }
}
