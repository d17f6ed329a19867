//! What every request of a provider goes through before anything else looks at it: who asks, how often, how much.
//!
//! One guard for all APIs on this listener, whatever their routes and the form of their errors (docs/adr/0023).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State as Shared};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Body as _;
use tracing::{debug, info, warn};

use super::super::auth::limits::Allowance;
use super::super::auth::{AuthError, Client};
use super::super::error::ApiError;
use super::{Live, Northbound};

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Remote(pub(super) SocketAddr);

/// Why a request goes no further.
#[derive(Clone, Debug)]
pub struct Rejection {
    /// What it is answered with.
    pub status: StatusCode,
    /// One word that programs tell cases by.
    pub code: &'static str,
    /// What is wrong, and what to do.
    pub message: String,
    /// `WWW-Authenticate` (RFC 6750), where somebody has not shown who it is, or lacks a scope.
    pub challenge: Option<String>,
    /// `Retry-After`: the time after which the same may be asked again.
    pub retry_after: Option<Duration>,
}

impl Rejection {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), challenge: None, retry_after: None }
    }

    /// The client may not do what needs `scope`.
    #[must_use]
    pub fn scope(scope: &str) -> Self {
        let challenge = format!("Bearer realm=\"qos\", error=\"insufficient_scope\", scope=\"{scope}\"");
        let message = format!("this needs a token with the scope {scope}, or an API key that may do it");
        let rejection = Self::new(StatusCode::FORBIDDEN, "insufficient_scope", message);
        Self { challenge: Some(challenge), ..rejection }
    }

    fn too_often(what: &str, wait: Duration) -> Self {
        let seconds = seconds(wait);
        let message = format!("{what}; try again in {seconds} s");
        let rejection = Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", message);
        Self { retry_after: Some(wait), ..rejection }
    }

    /// The header fields that belong to it, added to an answer that says it in whatever form.
    #[must_use]
    pub fn with_headers(&self, mut response: Response) -> Response {
        let challenge = self.challenge.as_ref().and_then(|text| HeaderValue::from_str(text).ok());
        if let Some(challenge) = challenge {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        if let Some(wait) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds(wait).into());
        }
        response
    }

    /// The answer as the native API has it.
    #[must_use]
    pub fn into_native(self) -> Response {
        let response = ApiError::new(self.status, self.code, self.message.as_str()).into_response();
        self.with_headers(response)
    }
}

impl From<AuthError> for Rejection {
    fn from(error: AuthError) -> Self {
        let message = error.to_string();
        let (status, code, challenge) = match error {
            AuthError::Missing => (StatusCode::UNAUTHORIZED, "unauthenticated", Some("")),
            AuthError::Malformed => {
                (StatusCode::UNAUTHORIZED, "unauthenticated", Some(", error=\"invalid_request\""))
            }
            AuthError::Key | AuthError::NoTokens | AuthError::Token(_) => {
                (StatusCode::UNAUTHORIZED, "unauthenticated", Some(", error=\"invalid_token\""))
            }
            AuthError::Client => (StatusCode::FORBIDDEN, "unknown_client", None),
            AuthError::NoKeys => (StatusCode::SERVICE_UNAVAILABLE, "unavailable", None),
        };
        let challenge = challenge.map(|more| format!("Bearer realm=\"qos\"{more}"));
        Self { challenge, ..Self::new(status, code, message) }
    }
}

fn seconds(wait: Duration) -> u64 {
    wait.as_millis().div_ceil(1_000).max(1).try_into().unwrap_or(u64::MAX)
}

/// Gives a refusal of the guard the form that errors of an API have.
pub type Render = fn(Rejection) -> Response;

/// The routes behind the guard. Each request that reaches them has its [`Client`] among its extensions, and its
/// body in memory. `render` gives a refusal of the guard the form that errors of these routes have.
pub fn guarded(router: Router, northbound: Arc<Northbound>, render: Render) -> Router {
    router.layer(middleware::from_fn_with_state((northbound, render), guard))
}

async fn guard(
    Shared((northbound, render)): Shared<(Arc<Northbound>, Render)>,
    request: Request,
    next: Next,
) -> Response {
    let remote = request.extensions().get::<Remote>().map(|Remote(address)| *address);
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let live = northbound.live();
    let (client, response) = match admit(&northbound, &live, remote, request).await {
        Ok((client, request)) => (Some(client), next.run(request).await),
        Err((client, rejection)) => {
            debug!(?remote, %method, code = rejection.code, "refused: {}", rejection.message);
            (client, render(rejection))
        }
    };
    let status = response.status();
    let client = client.map(|client| client.actor().to_string());
    let (client, path) = (client.as_deref(), uri.path());
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            warn!(?remote, client, %method, path, status = status.as_u16());
        }
        _ if method.is_safe() => debug!(?remote, client, %method, path, status = status.as_u16()),
        _ => info!(?remote, client, %method, path, status = status.as_u16()),
    }
    response
}

/// The request with its client and its body, or why it goes no further, and who has asked as far as that is known.
async fn admit(
    northbound: &Northbound,
    live: &Live,
    remote: Option<SocketAddr>,
    request: Request,
) -> Result<(Client, Request), (Option<Client>, Rejection)> {
    let limits = &northbound.limits;
    if let Some(remote) = remote {
        limits.may_try(remote.ip()).map_err(|wait| {
            (None, Rejection::too_often("this address has failed too often to show who it is", wait))
        })?;
    }
    let client = live.authenticator.authenticate(request.headers()).await.map_err(|error| {
        if let Some(remote) = remote.filter(|_| error != AuthError::NoKeys) {
            limits.failed(remote.ip());
        }
        (None, error.into())
    })?;
    let settings = &live.settings;
    let allowance = Allowance { per_second: settings.rate.into(), burst: settings.burst.into() };
    if let Err(wait) = limits.request(&client.provider, allowance) {
        let what = format!("more than {} requests a second of one provider", settings.rate);
        return Err((Some(client), Rejection::too_often(&what, wait)));
    }
    let (mut parts, body) = request.into_parts();
    match read(body, settings.max_body as usize, settings.body_timeout).await {
        Ok(body) => {
            parts.extensions.insert(client.clone());
            Ok((client, Request::from_parts(parts, body)))
        }
        Err(rejection) => Err((Some(client), rejection)),
    }
}

/// The whole body, in time and within bounds.
async fn read(body: Body, most: usize, patience: Duration) -> Result<Body, Rejection> {
    let too_large = || {
        let message = format!("the body is larger than {most} bytes; split the request");
        Rejection::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    };
    // Not after the client has sent it all, or goes on waiting to.
    if body.size_hint().lower() > most as u64 {
        return Err(too_large());
    }
    match tokio::time::timeout(patience, Limited::new(body, most).collect()).await {
        Ok(Ok(collected)) => Ok(Body::from(collected.to_bytes())),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => {
            let message = format!("the body can't be read: {error}");
            Err(Rejection::new(StatusCode::BAD_REQUEST, "malformed", message))
        }
        Err(_) => {
            let message = format!("the body did not come within {} s", patience.as_secs_f64());
            Err(Rejection::new(StatusCode::REQUEST_TIMEOUT, "timeout", message))
        }
    }
}
