//! The native API as a provider has it: `/api/v1`, its own things only. Described in `docs/northbound.md`.
//!
//! What is changed goes the way of the operator's socket, and is held against [`crate::manager::confine`] where it is
//! decided. What is shown is chosen here by the same rules.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body as HttpBody;
use axum::extract::{Extension, FromRequestParts, Request, State as Shared};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body_util::BodyExt as _;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::super::Api;
use super::super::auth::Client;
use super::super::error::ApiError;
use super::super::extract::{Body, Caller, Named, Options};
use super::super::native::{self, Answer, not_found};
use super::super::service::{Operations, ServiceError};
use super::super::types::{ErrorAnswer, ErrorBody, LineReport, Listing, OwnRequest};
use super::Northbound;
use super::guard::Rejection;
use crate::domain::{Allocation, AllocationId, Application, Name, Profile, Provider};
use crate::manager::confine::Own;
use crate::manager::record::{Record, RecordQuery};
use crate::manager::report::DirectedCounts;
use crate::manager::{GrantRequest, State};

/// The routes, to be put behind the guard.
pub(super) fn router(api: Api, northbound: &Arc<Northbound>) -> Router {
    let routes = Router::new()
        .route("/providers", get(providers))
        .route("/providers/{name}", get(provider))
        .route("/providers/{name}/applications", get(applications_of))
        .route("/providers/{name}/applications/{application}", get(application))
        .route("/applications", get(applications))
        .route("/profiles", get(profiles))
        .route("/profiles/{name}", get(profile))
        .route("/sessions", get(lines))
        .route("/sessions/{name}", get(line))
        .route("/allocations", get(allocations).post(grant))
        .route("/allocations/{id}", get(allocation).delete(native::revoke))
        .route("/allocations/{id}/extend", post(native::extend))
        .route("/decisions", get(decisions))
        .route("/statistics", get(statistics));
    Router::new()
        .nest("/api/v1", routes)
        .fallback(unknown_route)
        .method_not_allowed_fallback(native::unknown_method)
        .layer(middleware::from_fn_with_state(Arc::clone(northbound), check_scope))
        .layer(middleware::map_response(without_our_affairs))
        .with_state(api)
}

async fn unknown_route(uri: Uri) -> ApiError {
    let message = format!("there is no {}; see docs/northbound.md", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, "unknown_route", message)
}

/// Who looks needs one scope, who changes something the other, a dry run included.
async fn check_scope(
    Shared(northbound): Shared<Arc<Northbound>>,
    Extension(client): Extension<Client>,
    request: Request,
    next: Next,
) -> Response {
    let live = northbound.live();
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
    let scope = if changes { &live.settings.write_scope } else { &live.settings.read_scope };
    if client.may(scope, changes) { next.run(request).await } else { Rejection::scope(scope).into_native() }
}

/// What goes wrong in the daemon is told to the operator: its text may name files, interfaces, and others.
async fn without_our_affairs(response: Response) -> Response {
    if !response.status().is_server_error() {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let bytes = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    warn!(status = parts.status.as_u16(), "a provider's request failed: {}", String::from_utf8_lossy(&bytes));
    let code = serde_json::from_slice::<ErrorAnswer>(&bytes).map(|answer| answer.error.code);
    let error = ErrorBody {
        code: code.unwrap_or_else(|_| "internal".to_owned()),
        message:
            "this failed at our end, and nothing was changed; try again, and tell the operator if it stays so"
                .to_owned(),
        field: None,
        value: None,
        counter_offer: None,
    };
    parts.headers.remove(axum::http::header::CONTENT_LENGTH);
    let body = serde_json::to_vec(&ErrorAnswer { error }).unwrap_or_default();
    Response::from_parts(parts, HttpBody::from(body))
}

/// What the client that asks is confined to.
#[derive(Debug)]
struct Mine(Own);

impl<S: Send + Sync> FromRequestParts<S> for Mine {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        match parts.extensions.get::<Client>() {
            Some(client) => Ok(Self(client.own())),
            // Not behind the guard.
            None => Err(StatusCode::UNAUTHORIZED.into_response()),
        }
    }
}

/// Shows what `read` finds.
async fn shown<T: Send + 'static>(
    api: &Api,
    what: &'static str,
    name: &impl ToString,
    read: impl FnOnce(&State) -> Option<T> + Send + 'static,
) -> Answer<T> {
    let found = api.handle.run(move |service| read(service.state())).await?;
    found.map(Json).ok_or_else(|| not_found(what, name))
}

async fn listed<T: Send + 'static>(
    api: &Api,
    read: impl FnOnce(&State) -> Vec<T> + Send + 'static,
) -> Answer<Listing<T>> {
    native::list(api, |service| read(service.state())).await
}

async fn providers(Shared(api): Shared<Api>, Mine(own): Mine) -> Answer<Listing<Provider>> {
    listed(&api, move |state| state.providers.get(&own.provider).cloned().into_iter().collect()).await
}

async fn provider(Shared(api): Shared<Api>, Mine(own): Mine, Named(name): Named<Name>) -> Answer<Provider> {
    let asked = name.clone();
    let read = move |state: &State| state.providers.get(&asked).filter(|_| asked == own.provider).cloned();
    shown(&api, "provider", &name, read).await
}

async fn applications(Shared(api): Shared<Api>, Mine(own): Mine) -> Answer<Listing<Application>> {
    listed(&api, move |state| {
        state.applications.values().filter(|application| own.has_application(application)).cloned().collect()
    })
    .await
}

async fn applications_of(
    api: Shared<Api>,
    Mine(own): Mine,
    Named(provider): Named<Name>,
) -> Answer<Listing<Application>> {
    if provider != own.provider {
        return Err(not_found("provider", &provider));
    }
    applications(api, Mine(own)).await
}

async fn application(
    Shared(api): Shared<Api>,
    Mine(own): Mine,
    Named((provider, name)): Named<(Name, Name)>,
) -> Answer<Application> {
    let key = (provider, name.clone());
    let read = move |state: &State| {
        state.applications.get(&key).filter(|application| own.has_application(application)).cloned()
    };
    shown(&api, "application", &name, read).await
}

/// Whether a profile is in the contracts: others may be made for somebody else.
fn may_name(state: &State, own: &Own, profile: &Profile) -> bool {
    let provider = state.providers.get(&own.provider).map(|provider| &provider.contract);
    let application = own.application.as_ref().and_then(|name| {
        state.applications.get(&(own.provider.clone(), name.clone())).map(|application| &application.contract)
    });
    let mut contracts = provider.into_iter().chain(application);
    contracts.all(|contract| contract.profiles.as_ref().is_none_or(|names| names.contains(&profile.name)))
}

async fn profiles(Shared(api): Shared<Api>, Mine(own): Mine) -> Answer<Listing<Profile>> {
    listed(&api, move |state| {
        state.profiles.values().filter(|profile| may_name(state, &own, profile)).cloned().collect()
    })
    .await
}

async fn profile(Shared(api): Shared<Api>, Mine(own): Mine, Named(name): Named<Name>) -> Answer<Profile> {
    let asked = name.clone();
    let read = move |state: &State| {
        state.profiles.get(&asked).filter(|profile| may_name(state, &own, profile)).cloned()
    };
    shown(&api, "profile", &name, read).await
}

/// Nothing of the subscriber but what the provider's own allocations on its line name.
fn report(state: &State, own: &Own, name: &Name) -> Option<LineReport> {
    let session = state.sessions.get(name).filter(|_| own.is_on(state, name))?;
    Some(LineReport { name: name.clone(), down_since: session.down_since })
}

async fn lines(Shared(api): Shared<Api>, Mine(own): Mine) -> Answer<Listing<LineReport>> {
    listed(&api, move |state| {
        let allocations = state.allocations.values().filter(|allocation| own.has(allocation));
        let names: std::collections::BTreeSet<_> =
            allocations.filter_map(|allocation| allocation.session.as_ref()).collect();
        names.into_iter().filter_map(|name| report(state, &own, name)).collect()
    })
    .await
}

async fn line(Shared(api): Shared<Api>, Mine(own): Mine, Named(name): Named<Name>) -> Answer<LineReport> {
    let asked = name.clone();
    shown(&api, "session", &name, move |state| report(state, &own, &asked)).await
}

/// Options of the list of allocations.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ListOptions {
    /// Only those of this provider, which is the own one.
    provider: Option<Name>,
    /// That many of the last ended ones instead of the live ones.
    ended: Option<usize>,
}

async fn allocations(
    Shared(api): Shared<Api>,
    Mine(own): Mine,
    Options(options): Options<ListOptions>,
) -> Answer<Listing<Allocation>> {
    check_provider(&own, options.provider.as_ref())?;
    let read = move |service: &mut dyn Operations| {
        let all = match options.ended {
            Some(_) => service.history(native::HISTORY_SEARCHED)?,
            None => service
                .state()
                .allocations
                .values()
                .filter(|allocation| own.has(allocation))
                .cloned()
                .collect(),
        };
        let state = service.state();
        let mine = all.iter().filter(|allocation| own.has(allocation));
        let told = mine.map(|allocation| own.told_allocation(state, allocation));
        Ok::<_, ServiceError>(told.take(options.ended.unwrap_or(usize::MAX)).collect())
    };
    let items = api.handle.run(read).await??;
    Ok(Json(Listing { items }))
}

fn check_provider(own: &Own, asked: Option<&Name>) -> Result<(), ApiError> {
    match asked.filter(|asked| **asked != own.provider) {
        Some(other) => Err(not_found("provider", other)),
        None => Ok(()),
    }
}

async fn allocation(
    Shared(api): Shared<Api>,
    Mine(own): Mine,
    Named(id): Named<AllocationId>,
) -> Answer<Allocation> {
    let read = move |service: &mut dyn Operations| {
        let found = native::allocation_by_id(service, id)?.filter(|allocation| own.has(allocation));
        Ok::<_, ServiceError>(found.map(|allocation| own.told_allocation(service.state(), &allocation)))
    };
    api.handle.run(read).await??.map(Json).ok_or_else(|| not_found("allocation", &id))
}

async fn grant(
    Shared(api): Shared<Api>,
    Mine(own): Mine,
    caller: Caller,
    Body(request): Body<OwnRequest>,
) -> Result<Response, ApiError> {
    let OwnRequest { provider, application, selectors, profile, level, precedence, duration } = request;
    let request = GrantRequest {
        provider: provider.unwrap_or(own.provider),
        application: application.or(own.application),
        selectors,
        profile,
        level,
        precedence,
        duration,
    };
    native::ask(&api, request, caller).await
}

async fn decisions(
    Shared(api): Shared<Api>,
    Mine(own): Mine,
    Options(query): Options<RecordQuery>,
) -> Answer<Listing<Record>> {
    native::check_limit(&query)?;
    check_provider(&own, query.provider.as_ref())?;
    let application = match (&own.application, query.application.clone()) {
        (Some(own), Some(asked)) if *own != asked => return Err(not_found("application", &asked)),
        (own, asked) => own.clone().or(asked),
    };
    let by_line = query.session.is_some();
    let query = RecordQuery { provider: Some(own.provider.clone()), application, ..query };
    let read = move |service: &mut dyn Operations| {
        let records = service.records(&query)?;
        let state = service.state();
        let told = records.into_iter().map(|record| own.told_record(state, record));
        // Whoever asks by a line must not learn from the answer which requests were for it.
        Ok::<_, ServiceError>(told.filter(|record| !by_line || record.session.is_some()).collect())
    };
    let items = api.handle.run(read).await??;
    Ok(Json(Listing { items }))
}

/// Counters of the provider's own.
#[derive(Debug, Serialize)]
struct OwnStatistics {
    at_ns: u64,
    allocations: BTreeMap<AllocationId, DirectedCounts>,
    providers: BTreeMap<Name, DirectedCounts>,
}

async fn statistics(Shared(api): Shared<Api>, Mine(own): Mine) -> Answer<OwnStatistics> {
    let read = move |service: &mut dyn Operations| {
        let mut statistics = service.statistics()?;
        let state = service.state();
        statistics.allocations.retain(|id, _| state.allocations.get(id).is_some_and(|known| own.has(known)));
        // The sum is not for a client of one application.
        statistics.providers.retain(|name, _| *name == own.provider && own.application.is_none());
        let (at_ns, allocations, providers) =
            (statistics.at_ns, statistics.allocations, statistics.providers);
        Ok::<_, ServiceError>(OwnStatistics { at_ns, allocations, providers })
    };
    Ok(Json(api.handle.run(read).await??))
}
