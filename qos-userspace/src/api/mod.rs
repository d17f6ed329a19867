//! The daemon's API: HTTP with JSON bodies, under `/v1/`, on a Unix socket.
//!
//! Providers have theirs by HTTPS: [`northbound`].
//!
//! [`service`] does the work, [`worker`] gives it a thread, `native` has the routes, [`socket`]
//! says who may connect. Decisions are made by the manager; nothing here judges a request.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{ConnectInfo, Request};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tracing::{debug, info, warn};

pub mod auth;
pub mod doctor;
mod error;
mod extract;
#[cfg(test)]
mod histories;
mod native;
pub mod northbound;
pub mod reload;
pub mod service;
pub mod sink;
pub mod socket;
#[cfg(test)]
mod subscriber_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod trace_body;
pub mod types;
pub mod worker;

use auth::Keys;
use error::ApiError;
use northbound::Northbound;
use socket::Peer;
use worker::Handle;

use crate::config::Access;
use crate::source::Monitor;

/// What the routes work with.
#[derive(Clone, Debug)]
pub struct Api {
    /// Asks the service.
    pub handle: Handle,
    /// Who may connect.
    pub access: Access,
    /// The daemon's configuration file.
    pub config_path: PathBuf,
    /// Says how the sources are.
    pub sources: Monitor,
    /// The API keys there are.
    pub keys: Arc<Keys>,
    /// The API for providers; none: the configuration has none.
    pub northbound: Option<Arc<Northbound>>,
    /// Told when the daemon has to stop, everything having been removed from the kernel.
    pub stop: Arc<Notify>,
}

/// Serves the API on a socket until `shutdown` comes, and then finishes what it has begun.
///
/// # Errors
/// Those of the listener.
pub async fn serve(
    listener: UnixListener,
    api: Api,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let access = Arc::new(api.access.clone());
    let router = guarded(native::router(api), access);
    let service = router.into_make_service_with_connect_info::<Peer>();
    axum::serve(listener, service).with_graceful_shutdown(shutdown).await
}

/// The routes behind a check of who connects.
fn guarded(router: Router, access: Arc<Access>) -> Router {
    let own_uid = nix::unistd::geteuid().as_raw();
    router.layer(middleware::from_fn(
        move |ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next| {
            let access = Arc::clone(&access);
            async move {
                if peer.may_connect(&access, own_uid) {
                    logged(&peer, request, next).await
                } else {
                    refused(&peer)
                }
            }
        },
    ))
}

fn refused(peer: &Peer) -> Response {
    warn!(uid = peer.uid, pid = peer.pid, "connection refused: the user may not use the socket");
    let message = "you may not use this socket; `allow_users` and `allow_groups` in qosd's configuration \
                   say who may, besides root";
    ApiError::new(StatusCode::FORBIDDEN, "peer_refused", message)
        .about(Some("uid".to_owned()), peer.uid.map(|uid| uid.to_string()))
        .into_response()
}

async fn logged(peer: &Peer, request: Request, next: Next) -> Response {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let response = next.run(request).await;
    let status = response.status().as_u16();
    if method.is_safe() {
        debug!(uid = peer.uid, pid = peer.pid, %method, %uri, status);
    } else {
        info!(uid = peer.uid, pid = peer.pid, %method, %uri, status);
    }
    response
}
