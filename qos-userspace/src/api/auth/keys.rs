//! API keys: made, recognised, and looked up without asking the service.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use jiff::Timestamp;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom as _, SystemRandom};
use subtle::ConstantTimeEq as _;

use crate::domain::key::KEY_ID_BYTES;
use crate::domain::{ApiKey, KeyHash, KeyId};

/// What every API key begins with, so that people and scanners know one where it should not be.
pub(crate) const PREFIX: &str = "qos_";

/// Bytes of a secret.
const SECRET_BYTES: usize = 32;

/// The system has no randomness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system gives no random numbers for a key")]
pub(crate) struct NoRandomness;

/// An API key as its owner has it: `qos_`, its number, `_`, its secret.
#[derive(Clone)]
pub(crate) struct Secret {
    pub(crate) id: KeyId,
    digits: String,
}

impl Secret {
    /// A new one, of 256 random bits.
    pub(crate) fn random() -> Result<Self, NoRandomness> {
        let (mut id, mut secret) = ([0; KEY_ID_BYTES], [0; SECRET_BYTES]);
        let random = SystemRandom::new();
        random.fill(&mut id).and_then(|()| random.fill(&mut secret)).map_err(|_| NoRandomness)?;
        Ok(Self { id: KeyId::new(id), digits: crate::hex::encode(&secret) })
    }

    /// The one that a text is; none: it is none.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (id, digits) = text.strip_prefix(PREFIX)?.split_once('_')?;
        let is_secret = digits.len() == 2 * SECRET_BYTES
            && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        is_secret.then_some(())?;
        Some(Self { id: id.parse().ok()?, digits: digits.to_owned() })
    }

    /// The text that is shown once.
    pub(crate) fn text(&self) -> String {
        format!("{PREFIX}{}_{}", self.id, self.digits)
    }

    /// What it is recognised by.
    pub(crate) fn hash(&self) -> KeyHash {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, self.digits.as_bytes()).as_ref());
        KeyHash(hash)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The keys there are, as the state has them. A request is not to wait for the service to know whose it is.
#[derive(Debug, Default)]
pub struct Keys(RwLock<Arc<BTreeMap<KeyId, ApiKey>>>);

impl Keys {
    /// Takes over what the state has. Called by the service's thread, so that a later state comes later.
    pub(crate) fn replace(&self, keys: &BTreeMap<KeyId, ApiKey>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys.clone());
    }

    /// The key that is shown; none: there is no such key, or it has expired.
    pub(crate) fn find(&self, secret: &Secret, now: Timestamp) -> Option<ApiKey> {
        let keys = Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner));
        let key = keys.get(&secret.id)?;
        let is_it = bool::from(key.hash.0.ct_eq(&secret.hash().0));
        let lives = key.expires_at.is_none_or(|end| now < end);
        (is_it && lives).then(|| key.clone())
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    #[test]
    fn a_key_is_recognised_by_its_secret_until_it_expires() {
        let secret = Secret::random().expect("random");
        let text = secret.text();
        assert_eq!((text.len(), text.starts_with(PREFIX)), (4 + 12 + 1 + 64, true));
        let again = Secret::parse(&text).expect("its own text");
        assert_eq!((&again.id, again.hash()), (&secret.id, secret.hash()));
        assert!(!format!("{secret:?}").contains(&text[17..]), "debugging does not show it");

        let now: Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
        let key = ApiKey {
            id: secret.id.clone(),
            provider: "acme".parse().expect("a name"),
            application: None,
            hash: secret.hash(),
            read_only: false,
            created_at: now,
            expires_at: Some(now + SignedDuration::from_secs(60)),
        };
        let keys = Keys::default();
        assert_eq!(keys.find(&secret, now), None);
        keys.replace(&BTreeMap::from([(key.id.clone(), key.clone())]));
        assert_eq!(keys.find(&secret, now), Some(key));
        assert_eq!(keys.find(&secret, now + SignedDuration::from_secs(60)), None);
        let other = Secret { id: secret.id, digits: Secret::random().expect("random").digits };
        assert_eq!(keys.find(&other, now), None, "the number alone is none");
    }

    #[test]
    fn what_is_no_key_is_none() {
        let digits = "0".repeat(64);
        assert!(Secret::parse(&format!("qos_0123456789ab_{digits}")).is_some());
        for text in [
            String::new(),
            "qos_".to_owned(),
            format!("0123456789ab_{digits}"),
            format!("qos_0123456789ab{digits}"),
            format!("qos_0123456789AB_{digits}"),
            format!("qos_0123456789ab_{digits}0"),
            format!("qos_0123456789ab_{}", "g".repeat(64)),
        ] {
            assert!(Secret::parse(&text).is_none(), "{text}");
        }
    }
}
