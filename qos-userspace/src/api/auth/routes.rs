//! `/v1/keys` on the operator's socket: API keys of providers.

use std::sync::Arc;

use axum::Router;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;

use super::super::Api;
use super::super::error::ApiError;
use super::super::extract::{Body, Caller, Named};
use super::super::native::{Answer, created, list, not_found, outcome};
use super::super::service::Operations;
use super::super::types::{ApiKeyReport, Listing, NewApiKey, Outcome};
use super::keys::{Keys, Secret};
use crate::domain::{ApiKey, KeyId};
use crate::manager::{Change, Command, Decision, NewKey};

/// The routes, for the operator.
pub(crate) fn router() -> Router<Api> {
    Router::new().route("/v1/keys", get(keys).post(add)).route("/v1/keys/{id}", get(key).delete(remove))
}

fn report(key: &ApiKey, secret: Option<String>) -> ApiKeyReport {
    let ApiKey { id, provider, application, hash: _, read_only, created_at, expires_at } = key.clone();
    ApiKeyReport { id, provider, application, read_only, created_at, expires_at, key: secret }
}

async fn keys(Shared(api): Shared<Api>) -> Answer<Listing<ApiKeyReport>> {
    list(&api, |service| service.state().keys.values().map(|key| report(key, None)).collect()).await
}

async fn key(Shared(api): Shared<Api>, Named(id): Named<KeyId>) -> Answer<ApiKeyReport> {
    let known = id.clone();
    let found = api.handle.run(move |service| service.state().keys.get(&known).cloned()).await?;
    found.map(|key| axum::Json(report(&key, None))).ok_or_else(|| not_found("key", &id))
}

async fn add(
    Shared(api): Shared<Api>,
    caller: Caller,
    Body(request): Body<NewApiKey>,
) -> Result<Response, ApiError> {
    let secret = Secret::random()
        .map_err(|error| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()))?;
    let NewApiKey { provider, application, read_only, expires_at } = request;
    let (id, hash) = (secret.id.clone(), secret.hash());
    let command = Command::AddKey(NewKey { id, hash, provider, application, read_only, expires_at });
    let decision = carry_out(&api, command, &caller).await?;
    // What was only tried is no key.
    let shown = (!caller.dry_run).then(|| secret.text());
    let made = decision.changes.iter().find_map(|change| match change {
        Change::PutKey(key) => Some(report(key, shown.clone())),
        _ => None,
    });
    outcome(made, decision.warnings, &caller).map(created)
}

async fn remove(
    Shared(api): Shared<Api>,
    Named(id): Named<KeyId>,
    caller: Caller,
) -> Answer<Outcome<ApiKeyReport>> {
    let known = id.clone();
    let before = api.handle.run(move |service| service.state().keys.get(&known).cloned()).await?;
    let decision = carry_out(&api, Command::RemoveKey { id }, &caller).await?;
    outcome(before.map(|key| report(&key, None)), decision.warnings, &caller)
}

/// Carries a command out and says at once what keys there are, even if the asker is gone by then.
async fn carry_out(api: &Api, command: Command, caller: &Caller) -> Result<Decision, ApiError> {
    let (asked, keys): (_, Arc<Keys>) = (caller.asked(command), Arc::clone(&api.keys));
    let job = move |service: &mut dyn Operations| {
        let decision = service.execute(asked);
        keys.replace(&service.state().keys);
        decision
    };
    Ok(api.handle.run(job).await??)
}
