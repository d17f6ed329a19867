//! The native API, version 1: routes and what each does. Described in `docs/api.md`.

use axum::Router;
use axum::body::Body as HttpBody;
use axum::extract::{DefaultBodyLimit, State as Shared};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use serde::{Deserialize, Serialize};

use super::Api;
use super::doctor::{self, Check};
use super::error::ApiError;
use super::extract::{Body, Caller, LARGEST_BODY, Named, Options};
use super::reload::ReloadError;
pub(super) use super::service::HISTORY_SEARCHED;
use super::service::{Operations, ServiceError};
use super::trace_body::TraceBody;
use super::types::{
    ContractChange, ExplainRequest, Explained, Extension, Listing, NewApplication, NewProfile, NewSegment,
    Outcome, Reports, SegmentReport, Status,
};
use crate::domain::{
    Allocation, AllocationId, Application, Direction, Name, Profile, Provider, Segment, Session, Subscriber,
};
use crate::gateway::PACKET_LENGTHS;
use crate::manager::record::{Record, RecordQuery};
use crate::manager::report::Statistics;
use crate::manager::subscriber::{SubscriberQuery, Taken};
use crate::manager::{Change, Command, Decision, GrantRequest, NewProvider, NewSession, State};

/// Most reports of one request.
const MOST_REPORTS: usize = 10_000;

pub(super) type Answer<T> = Result<axum::Json<T>, ApiError>;

/// The routes, for whatever carries them. Who may connect is checked by the carrier.
pub(super) fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/doctor", get(examine))
        .route("/v1/statistics", get(statistics))
        .route("/v1/explain", post(explain))
        .route("/v1/reconcile", post(reconcile))
        .route("/v1/reload", post(reload))
        .route("/v1/trace", get(trace))
        .route("/v1/detach", post(detach))
        .route("/v1/providers", get(providers).post(add_provider))
        .route("/v1/providers/{name}", get(provider).delete(remove_provider))
        .route("/v1/applications", get(applications))
        .route("/v1/providers/{name}/applications", get(applications_of).post(add_application))
        .route("/v1/providers/{name}/contract", put(change_contract))
        .route("/v1/providers/{name}/applications/{application}", get(application).delete(remove_application))
        .route(
            "/v1/providers/{name}/applications/{application}/contract",
            put(change_contract_of_application),
        )
        .route("/v1/sessions", get(sessions).post(add_session))
        .route("/v1/sessions/{name}", get(session).put(start_session).delete(remove_session))
        .route("/v1/sessions/{name}/stop", post(stop_session))
        .route("/v1/subscribers", get(subscribers).post(report))
        .route("/v1/segments", get(segments))
        .route("/v1/segments/{name}", get(segment).put(put_segment).delete(remove_segment))
        .route("/v1/profiles", get(profiles))
        .route("/v1/profiles/{name}", get(profile).put(put_profile).delete(remove_profile))
        .route("/v1/allocations", get(allocations).post(grant))
        .route("/v1/allocations/{id}", get(allocation).delete(revoke))
        .route("/v1/allocations/{id}/extend", post(extend))
        .route("/v1/decisions", get(decisions))
        .merge(super::auth::routes::router())
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_method)
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .with_state(api)
}

/// Options of the list of allocations.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ListOptions {
    /// Only those of this provider.
    provider: Option<Name>,
    /// That many of the last ended ones instead of the live ones.
    ended: Option<usize>,
}

async fn unknown_route(uri: Uri) -> ApiError {
    let message =
        format!("there is no {}; the API begins at /v1/ and is described in docs/api.md", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, "unknown_route", message)
}

pub(super) async fn unknown_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} does not take {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "unknown_method", message)
}

async fn status(Shared(api): Shared<Api>) -> Answer<Status> {
    let status = api.handle.run(|service| service.status()).await?;
    answer(status.map(|status| Status { sources: api.sources.status(), ..status }))
}

async fn examine(Shared(api): Shared<Api>) -> Answer<Listing<Check>> {
    let asked = api.handle.run(|service| {
        let known = doctor::Known::new(service.status()?, service.state());
        Ok::<_, ServiceError>((service.config().clone(), known))
    });
    let (config, known) = asked.await??;
    let items = tokio::task::spawn_blocking(move || doctor::examine(Some(&config), Some(&known)))
        .await
        .map_err(|error| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()))?;
    Ok(axum::Json(Listing { items }))
}

async fn statistics(Shared(api): Shared<Api>) -> Answer<Statistics> {
    answer(api.handle.run(|service| service.statistics()).await?)
}

async fn explain(Shared(api): Shared<Api>, Body(request): Body<ExplainRequest>) -> Answer<Explained> {
    let packet = from_hex(&request.packet)?;
    if !PACKET_LENGTHS.contains(&packet.len()) {
        let message = format!(
            "packet: {} bytes can't be run: {} to {} can",
            packet.len(),
            PACKET_LENGTHS.start(),
            PACKET_LENGTHS.end()
        );
        return Err(ApiError::invalid("packet", packet.len().to_string(), message));
    }
    let explained = api
        .handle
        .run(move |service| {
            let explanation = service.explain(request.direction.into(), &packet, request.layer3)?;
            let allocation =
                explanation.allocation.and_then(|id| service.state().allocations.get(&id).cloned());
            let subscriber = match request.direction.into() {
                Direction::Upstream => explanation.source,
                Direction::Downstream => explanation.destination,
            };
            let line = subscriber.and_then(|address| service.state().line_of(address).cloned());
            Ok::<_, ServiceError>(Explained { explanation, allocation, line })
        })
        .await?;
    answer(explained)
}

async fn reconcile(Shared(api): Shared<Api>, caller: Caller) -> Answer<Listing<String>> {
    let reconciled = move |service: &mut dyn Operations| {
        let repairs = service.reconcile();
        service.record(Record::of_operation(&caller.actor, "reconcile", &repairs));
        repairs
    };
    let items = api.handle.run(reconciled).await??;
    Ok(axum::Json(Listing { items }))
}

async fn reload(Shared(api): Shared<Api>, caller: Caller) -> Answer<Listing<String>> {
    let reloaded =
        super::reload::reload(&api.handle, &api.config_path, api.northbound.as_deref(), caller.actor);
    let items = reloaded.await.map_err(|error| match error {
        ReloadError::Service(error) => ApiError::from(error),
        ReloadError::Northbound(error) => {
            ApiError::new(StatusCode::BAD_REQUEST, "configuration", error.to_string())
        }
        ReloadError::Stopped(error) => ApiError::from(error),
    })?;
    Ok(axum::Json(Listing { items }))
}

async fn trace(Shared(api): Shared<Api>) -> Result<Response, ApiError> {
    let lines = api.handle.run(|service| service.trace()).await??;
    let body = HttpBody::new(TraceBody::new(lines));
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response())
}

async fn detach(Shared(api): Shared<Api>, caller: Caller) -> Result<StatusCode, ApiError> {
    let detach = move |service: &mut dyn Operations| {
        let detached = service.detach();
        let told = detached.as_ref().map(|()| Vec::new());
        service.record(Record::of_operation(&caller.actor, "detach", &told));
        detached
    };
    let detached = api.handle.run(detach).await?;
    // Whatever could not be removed, nothing is looked after any more.
    api.stop.notify_one();
    detached?;
    Ok(StatusCode::NO_CONTENT)
}

async fn providers(Shared(api): Shared<Api>) -> Answer<Listing<Provider>> {
    list(&api, |service| service.state().providers.values().cloned().collect()).await
}

async fn provider(Shared(api): Shared<Api>, Named(name): Named<Name>) -> Answer<Provider> {
    show(&api, "provider", name, |service, name| service.state().providers.get(name).cloned()).await
}

async fn add_provider(
    Shared(api): Shared<Api>,
    caller: Caller,
    Body(provider): Body<NewProvider>,
) -> Result<Response, ApiError> {
    change(&api, Command::AddProvider(provider), caller, |change| match change {
        Change::PutProvider(provider) => Some(provider.clone()),
        _ => None,
    })
    .await
    .map(created)
}

async fn remove_provider(
    Shared(api): Shared<Api>,
    Named(name): Named<Name>,
    caller: Caller,
) -> Answer<Outcome<Provider>> {
    let key = name.clone();
    remove(&api, Command::RemoveProvider { name }, caller, move |service| {
        service.state().providers.get(&key).cloned()
    })
    .await
}

async fn applications(Shared(api): Shared<Api>) -> Answer<Listing<Application>> {
    list(&api, |service| service.state().applications.values().cloned().collect()).await
}

async fn applications_of(
    Shared(api): Shared<Api>,
    Named(provider): Named<Name>,
) -> Answer<Listing<Application>> {
    let key = provider.clone();
    let found = api
        .handle
        .run(move |service| {
            let state = service.state();
            state.providers.get(&key)?;
            let all = state.applications.values();
            Some(all.filter(|application| application.provider == key).cloned().collect())
        })
        .await?;
    found.map(|items| axum::Json(Listing { items })).ok_or_else(|| not_found("provider", &provider))
}

async fn add_application(
    Shared(api): Shared<Api>,
    Named(provider): Named<Name>,
    caller: Caller,
    Body(NewApplication { name, contract }): Body<NewApplication>,
) -> Result<Response, ApiError> {
    change(&api, Command::AddApplication { provider, name, contract }, caller, |change| match change {
        Change::PutApplication(application) => Some(application.clone()),
        _ => None,
    })
    .await
    .map(created)
}

async fn application(
    Shared(api): Shared<Api>,
    Named((provider, name)): Named<(Name, Name)>,
) -> Answer<Application> {
    show(&api, "application", name, move |service, name| {
        service.state().applications.get(&(provider, name.clone())).cloned()
    })
    .await
}

async fn change_contract(
    Shared(api): Shared<Api>,
    Named(provider): Named<Name>,
    caller: Caller,
    Body(ContractChange { contract, was }): Body<ContractChange>,
) -> Answer<Outcome<Provider>> {
    let command = Command::ChangeContract { provider, application: None, contract, was };
    change(&api, command, caller, |change| match change {
        Change::PutProvider(provider) => Some(provider.clone()),
        _ => None,
    })
    .await
}

async fn change_contract_of_application(
    Shared(api): Shared<Api>,
    Named((provider, name)): Named<(Name, Name)>,
    caller: Caller,
    Body(ContractChange { contract, was }): Body<ContractChange>,
) -> Answer<Outcome<Application>> {
    let command = Command::ChangeContract { provider, application: Some(name), contract, was };
    change(&api, command, caller, |change| match change {
        Change::PutApplication(application) => Some(application.clone()),
        _ => None,
    })
    .await
}

async fn remove_application(
    Shared(api): Shared<Api>,
    Named((provider, name)): Named<(Name, Name)>,
    caller: Caller,
) -> Answer<Outcome<Application>> {
    let key = (provider.clone(), name.clone());
    remove(&api, Command::RemoveApplication { provider, name }, caller, move |service| {
        service.state().applications.get(&key).cloned()
    })
    .await
}

async fn sessions(Shared(api): Shared<Api>) -> Answer<Listing<Session>> {
    list(&api, |service| service.state().sessions.values().cloned().collect()).await
}

async fn session(Shared(api): Shared<Api>, Named(name): Named<Name>) -> Answer<Session> {
    show(&api, "session", name, |service, name| service.state().sessions.get(name).cloned()).await
}

async fn add_session(
    Shared(api): Shared<Api>,
    caller: Caller,
    Body(session): Body<NewSession>,
) -> Result<Response, ApiError> {
    change(&api, Command::AddSession(session), caller, |change| match change {
        Change::PutSession(session) => Some(session.clone()),
        _ => None,
    })
    .await
    .map(created)
}

async fn start_session(
    Shared(api): Shared<Api>,
    Named(name): Named<Name>,
    caller: Caller,
    Body(session): Body<NewSession>,
) -> Answer<Outcome<Session>> {
    if session.name != name {
        let message = format!("name: {} is not the session of the path, {name}", session.name);
        return Err(ApiError::invalid("name", session.name.to_string(), message));
    }
    change_session(&api, name, Command::StartSession(session), caller).await
}

async fn stop_session(
    Shared(api): Shared<Api>,
    Named(name): Named<Name>,
    caller: Caller,
) -> Answer<Outcome<Session>> {
    let command = Command::StopSession { name: name.clone() };
    change_session(&api, name, command, caller).await
}

/// Answers with the session also where nothing had to be changed.
async fn change_session(api: &Api, name: Name, command: Command, caller: Caller) -> Answer<Outcome<Session>> {
    let asked = caller.asked(command);
    let written = |decision: &Decision| {
        decision.changes.iter().find_map(|change| match change {
            Change::PutSession(session) => Some(session.clone()),
            _ => None,
        })
    };
    let decision = api.handle.execute(asked.clone()).await??;
    if let Some(session) = written(&decision) {
        return outcome(Some(session), decision.warnings, &caller);
    }
    // It may have been removed since. What changes nothing can be asked again, with nobody in between.
    let again = move |service: &mut dyn Operations| {
        let decision = service.execute(asked)?;
        let session = written(&decision).or_else(|| service.state().sessions.get(&name).cloned());
        Ok::<_, ServiceError>((session, decision))
    };
    let (session, decision) = api.handle.run(again).await??;
    outcome(session, decision.warnings, &caller)
}

async fn remove_session(
    Shared(api): Shared<Api>,
    Named(name): Named<Name>,
    caller: Caller,
) -> Answer<Outcome<Session>> {
    let key = name.clone();
    remove(&api, Command::RemoveSession { name }, caller, move |service| {
        service.state().sessions.get(&key).cloned()
    })
    .await
}

fn segment_report(state: &State, segment: &Segment) -> SegmentReport {
    let Segment { name, capacity, rest } = segment.clone();
    let promised = state.promised_on_segment(&name);
    SegmentReport { name, capacity, rest, promised }
}

async fn segments(Shared(api): Shared<Api>) -> Answer<Listing<SegmentReport>> {
    list(&api, |service| {
        let state = service.state();
        state.segments.values().map(|segment| segment_report(state, segment)).collect()
    })
    .await
}

async fn segment(Shared(api): Shared<Api>, Named(name): Named<Name>) -> Answer<SegmentReport> {
    show(&api, "segment", name, |service, name| {
        let state = service.state();
        state.segments.get(name).map(|segment| segment_report(state, segment))
    })
    .await
}

async fn put_segment(
    Shared(api): Shared<Api>,
    Named(name): Named<Name>,
    caller: Caller,
    Body(NewSegment { capacity, rest }): Body<NewSegment>,
) -> Answer<Outcome<Segment>> {
    let segment = Segment { name, capacity, rest };
    change(&api, Command::PutSegment(segment), caller, |change| match change {
        Change::PutSegment(segment) => Some(segment.clone()),
        _ => None,
    })
    .await
}

async fn remove_segment(
    Shared(api): Shared<Api>,
    Named(name): Named<Name>,
    caller: Caller,
) -> Answer<Outcome<Segment>> {
    let key = name.clone();
    remove(&api, Command::RemoveSegment { name }, caller, move |service| {
        service.state().segments.get(&key).cloned()
    })
    .await
}

async fn profiles(Shared(api): Shared<Api>) -> Answer<Listing<Profile>> {
    list(&api, |service| service.state().profiles.values().cloned().collect()).await
}

async fn profile(Shared(api): Shared<Api>, Named(name): Named<Name>) -> Answer<Profile> {
    show(&api, "profile", name, |service, name| service.state().profiles.get(name).cloned()).await
}

async fn put_profile(
    Shared(api): Shared<Api>,
    Named(name): Named<Name>,
    caller: Caller,
    Body(NewProfile { level, status, duration }): Body<NewProfile>,
) -> Answer<Outcome<Profile>> {
    let profile = Profile { name, level, status, duration };
    change(&api, Command::PutProfile(profile), caller, |change| match change {
        Change::PutProfile(profile) => Some(profile.clone()),
        _ => None,
    })
    .await
}

async fn remove_profile(
    Shared(api): Shared<Api>,
    Named(name): Named<Name>,
    caller: Caller,
) -> Answer<Outcome<Profile>> {
    let key = name.clone();
    remove(&api, Command::RemoveProfile { name }, caller, move |service| {
        service.state().profiles.get(&key).cloned()
    })
    .await
}

async fn allocations(
    Shared(api): Shared<Api>,
    Options(options): Options<ListOptions>,
) -> Answer<Listing<Allocation>> {
    let mut items: Vec<Allocation> = api
        .handle
        .run(move |service| match options.ended {
            Some(limit) => service.history(limit),
            None => Ok(service.state().allocations.values().cloned().collect()),
        })
        .await??;
    if let Some(provider) = options.provider {
        items.retain(|allocation| allocation.provider == provider);
    }
    Ok(axum::Json(Listing { items }))
}

async fn allocation(Shared(api): Shared<Api>, Named(id): Named<AllocationId>) -> Answer<Allocation> {
    let found = api.handle.run(move |service| allocation_by_id(service, id)).await??;
    found.map(axum::Json).ok_or_else(|| not_found("allocation", &id))
}

/// One that is live, or is among those that ended last.
pub(super) fn allocation_by_id(
    service: &mut dyn Operations,
    id: AllocationId,
) -> Result<Option<Allocation>, ServiceError> {
    if let Some(live) = service.state().allocations.get(&id) {
        return Ok(Some(live.clone()));
    }
    let ended = service.history(HISTORY_SEARCHED)?;
    Ok(ended.into_iter().find(|allocation| allocation.id == id))
}

async fn grant(
    Shared(api): Shared<Api>,
    caller: Caller,
    Body(request): Body<GrantRequest>,
) -> Result<Response, ApiError> {
    ask(&api, request, caller).await
}

/// Asks for an allocation.
pub(super) async fn ask(api: &Api, request: GrantRequest, caller: Caller) -> Result<Response, ApiError> {
    change(api, Command::Grant(Box::new(request)), caller, |change| match change {
        Change::PutAllocation(allocation) => Some(allocation.clone()),
        _ => None,
    })
    .await
    .map(created)
}

pub(super) async fn extend(
    Shared(api): Shared<Api>,
    Named(id): Named<AllocationId>,
    caller: Caller,
    Body(Extension { by }): Body<Extension>,
) -> Answer<Outcome<Allocation>> {
    change(&api, Command::Extend { id, by }, caller, |change| match change {
        Change::PutAllocation(allocation) => Some(allocation.clone()),
        _ => None,
    })
    .await
}

pub(super) async fn revoke(
    Shared(api): Shared<Api>,
    Named(id): Named<AllocationId>,
    caller: Caller,
) -> Answer<Outcome<Allocation>> {
    change(&api, Command::Revoke { id }, caller, |change| match change {
        Change::EndAllocation(allocation) => Some(allocation.clone()),
        _ => None,
    })
    .await
}

async fn decisions(
    Shared(api): Shared<Api>,
    Options(query): Options<RecordQuery>,
) -> Answer<Listing<Record>> {
    check_limit(&query)?;
    let items = api.handle.run(move |service| service.records(&query)).await??;
    Ok(axum::Json(Listing { items }))
}

async fn subscribers(
    Shared(api): Shared<Api>,
    Options(query): Options<SubscriberQuery>,
) -> Answer<Listing<Subscriber>> {
    if let Some(limit) = query.limit.filter(|limit| !(1..=SubscriberQuery::MOST).contains(limit)) {
        let message = format!("limit: {limit} is out of range: 1 to {}", SubscriberQuery::MOST);
        return Err(ApiError::invalid("limit", limit.to_string(), message));
    }
    let items = api.handle.run(move |service| service.subscribers(&query)).await??;
    Ok(axum::Json(Listing { items }))
}

async fn report(
    Shared(api): Shared<Api>,
    caller: Caller,
    Body(Reports { reports }): Body<Reports>,
) -> Answer<Listing<Taken>> {
    if caller.dry_run {
        return Err(ApiError::invalid("dry_run", "true", "dry_run: a report is what is; it can't be tried"));
    }
    if reports.len() > MOST_REPORTS {
        let message = format!("reports: {} are too many: {MOST_REPORTS} at most", reports.len());
        return Err(ApiError::invalid("reports", reports.len().to_string(), message));
    }
    let items = api.handle.run(move |service| service.take_reports(&reports, &caller.actor)).await??;
    Ok(axum::Json(Listing { items }))
}

pub(super) fn check_limit(query: &RecordQuery) -> Result<(), ApiError> {
    if (1..=RecordQuery::MOST).contains(&query.limit) {
        return Ok(());
    }
    let message = format!("limit: {} is out of range: 1 to {}", query.limit, RecordQuery::MOST);
    Err(ApiError::invalid("limit", query.limit.to_string(), message))
}

fn answer<T>(result: Result<T, ServiceError>) -> Answer<T> {
    Ok(axum::Json(result?))
}

/// 201, or 200 where it was a dry run.
pub(super) fn created<T: Serialize>(axum::Json(outcome): axum::Json<Outcome<T>>) -> Response {
    let status = if outcome.dry_run { StatusCode::OK } else { StatusCode::CREATED };
    (status, axum::Json(outcome)).into_response()
}

pub(super) fn not_found(what: &str, name: &impl ToString) -> ApiError {
    let name = name.to_string();
    ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is no {what} `{name}`"))
        .about(Some(what.to_owned()), Some(name))
}

pub(super) async fn list<T: Send + 'static>(
    api: &Api,
    read: impl FnOnce(&dyn Operations) -> Vec<T> + Send + 'static,
) -> Answer<Listing<T>> {
    let items = api.handle.run(move |service| read(service)).await?;
    Ok(axum::Json(Listing { items }))
}

async fn show<T: Send + 'static>(
    api: &Api,
    what: &'static str,
    name: Name,
    read: impl FnOnce(&dyn Operations, &Name) -> Option<T> + Send + 'static,
) -> Answer<T> {
    api.handle
        .run(move |service| read(service, &name).ok_or(name))
        .await?
        .map(axum::Json)
        .map_err(|name| not_found(what, &name))
}

/// Carries a command out; `written` finds the object that it is about among the changes.
async fn change<T: Send + 'static>(
    api: &Api,
    command: Command,
    caller: Caller,
    written: impl Fn(&Change) -> Option<T> + Send + 'static,
) -> Answer<Outcome<T>> {
    let decision = api.handle.execute(caller.asked(command)).await??;
    outcome(decision.changes.iter().find_map(written), decision.warnings, &caller)
}

/// Carries a removal out; `before` reads the object while it is there.
async fn remove<T: Send + 'static>(
    api: &Api,
    command: Command,
    caller: Caller,
    before: impl FnOnce(&dyn Operations) -> Option<T> + Send + 'static,
) -> Answer<Outcome<T>> {
    let asked = caller.asked(command);
    let (object, decision) = api
        .handle
        .run(move |service| {
            let object = before(service);
            service.execute(asked).map(|decision| (object, decision))
        })
        .await??;
    outcome(object, decision.warnings, &caller)
}

pub(super) fn outcome<T>(object: Option<T>, warnings: Vec<String>, caller: &Caller) -> Answer<Outcome<T>> {
    let result = object.ok_or_else(|| {
        let message = "the decision does not contain what was asked for; this is an error in qosd";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    })?;
    Ok(axum::Json(Outcome { result, warnings, dry_run: caller.dry_run }))
}

fn from_hex(text: &str) -> Result<Vec<u8>, ApiError> {
    crate::hex::decode(text).map_err(|error| ApiError::invalid("packet", shortened(text), error.to_string()))
}

fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}
