//! API keys: made, and no longer taken.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::decide::{find_application, find_provider, only, refuse_in_use};
use super::{Change, Decision, Refusal, RefusalCode, State};
use crate::domain::{ApiKey, KeyHash, KeyId, Name};

/// An API key to add. Number and secret are random, and so not the core's to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    /// Its number.
    pub id: KeyId,
    /// What its secret is recognised by. The history does without.
    #[serde(skip_serializing)]
    pub hash: KeyHash,
    /// Whose it is.
    pub provider: Name,
    /// The one application of the provider that it is for; none: for all.
    pub application: Option<Name>,
    /// With it nothing can be changed.
    pub read_only: bool,
    /// Until when it is taken; none: until it is removed.
    pub expires_at: Option<Timestamp>,
}

pub(super) fn add(state: &State, new: &NewKey, now: Timestamp) -> Result<Decision, Refusal> {
    find_provider(state, "provider", &new.provider)?;
    if let Some(application) = &new.application {
        find_application(state, "application", &new.provider, application)?;
    }
    if state.keys.contains_key(&new.id) {
        let message = format!("id: there is a key {} already", new.id);
        return Err(Refusal::new(RefusalCode::Conflict, "id", &new.id, message));
    }
    if let Some(end) = new.expires_at.filter(|end| *end <= now) {
        return Err(Refusal::invalid("expires_at", end, "is over already"));
    }
    let NewKey { id, hash, provider, application, read_only, expires_at } = new.clone();
    let key = ApiKey { id, provider, application, hash, read_only, created_at: now, expires_at };
    Ok(only(Change::PutKey(key)))
}

pub(super) fn remove(state: &State, id: &KeyId) -> Result<Decision, Refusal> {
    if !state.keys.contains_key(id) {
        return Err(Refusal::new(RefusalCode::NotFound, "id", id, format!("id: there is no key {id}")));
    }
    Ok(only(Change::DeleteKey(id.clone())))
}

/// Refuses to remove a provider, or one of its applications, while somebody could ask as it.
pub(super) fn refuse_while_there(
    state: &State,
    provider: &Name,
    application: Option<&Name>,
) -> Result<(), Refusal> {
    let of = state.keys.values().filter(|key| {
        key.provider == *provider && (application.is_none() || key.application.as_ref() == application)
    });
    let (what, name) = match application {
        Some(application) => ("application", application),
        None => ("provider", provider),
    };
    refuse_in_use(what, name, "API key", of.map(|key| &key.id))
}
