//! Requests read into types, with JSON errors that name the field, the value and the place.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use hyper::body::Body as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::error::Category;
use serde_path_to_error::Segment;

use super::auth::Client;
use super::error::ApiError;
use super::service::Asked;
use super::socket::Peer;
use crate::manager::Command;
use crate::manager::record::Actor;

/// Largest body of a request, in bytes. A grant with 4,096 selectors takes about half of it.
pub(super) const LARGEST_BODY: usize = 1 << 20;

/// The body as JSON, whatever its content type is called.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        // Not after the client has sent it all, or goes on waiting to.
        let announced = request.body().size_hint().lower();
        if announced > LARGEST_BODY as u64 {
            return Err(too_large());
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| unreadable(&rejection))?;
        parse(&bytes).map(Self)
    }
}

/// The query string.
#[derive(Debug)]
pub(super) struct Options<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Options<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(options)) => Ok(Self(options)),
            Err(rejection) => {
                Err(ApiError::invalid("query", parts.uri.query().unwrap_or_default(), rejection.body_text()))
            }
        }
    }
}

/// Who asks for a change, and whether it is only to be tried.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) actor: Actor,
    pub(super) dry_run: bool,
}

/// Options of everything that changes something.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ChangeOptions {
    dry_run: bool,
}

impl Caller {
    pub(super) fn asked(&self, command: Command) -> Asked {
        Asked { command, actor: self.actor.clone(), dry_run: self.dry_run }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let uid = parts.extensions.get::<ConnectInfo<Peer>>().and_then(|ConnectInfo(peer)| peer.uid);
        let actor = parts.extensions.get::<Client>().map_or(Actor::User(uid), Client::actor);
        let Options(ChangeOptions { dry_run }) = Options::from_request_parts(parts, state).await?;
        Ok(Self { actor, dry_run })
    }
}

/// What stands in the path for one `{…}`, or for two.
#[derive(Debug)]
pub(super) struct Named<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Named<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(named)) => Ok(Self(named)),
            Err(rejection) => {
                let text = rejection.body_text();
                let message = text.strip_prefix("Invalid URL: ").unwrap_or(&text);
                Err(ApiError::invalid("path", parts.uri.path(), message))
            }
        }
    }
}

fn unreadable(rejection: &BytesRejection) -> ApiError {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return too_large();
    }
    ApiError::new(StatusCode::BAD_REQUEST, "malformed", format!("the body can't be read: {rejection}"))
}

fn too_large() -> ApiError {
    let message = format!("the body is larger than {LARGEST_BODY} bytes; split the request");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let field = match error.path().to_string() {
            root if root == "." => None,
            path => Some(path),
        };
        if error.inner().classify() != Category::Data {
            return malformed(error.inner());
        }
        let written = serde_json::from_slice(bytes).ok();
        let value = written.as_ref().and_then(|body| value_at(body, error.path())).map(shortened);
        let subject = field.as_ref().map(|field| format!("{field}: ")).unwrap_or_default();
        ApiError::new(StatusCode::BAD_REQUEST, "invalid", format!("{subject}{}", error.inner()))
            .about(field, value)
    })?;
    deserializer.end().map_err(|error| malformed(&error))?;
    Ok(value)
}

fn malformed(error: &serde_json::Error) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "malformed", format!("the body is not JSON: {error}"))
}

fn value_at<'v>(body: &'v Value, path: &serde_path_to_error::Path) -> Option<&'v Value> {
    path.iter().try_fold(body, |value, segment| match segment {
        Segment::Seq { index } => value.get(index),
        Segment::Map { key } => value.get(key),
        Segment::Enum { .. } => Some(value),
        Segment::Unknown => None,
    })
}

fn shortened(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if text.chars().count() <= 80 { text } else { text.chars().take(80).chain(['…']).collect() }
}
