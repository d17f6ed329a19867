//! The API for providers: HTTPS on TCP, behind tokens and API keys.
//!
//! [`guard`] lets in who may ask and puts a [`super::auth::Client`] among the extensions of each request; `routes` are
//! those of the native API that a provider has; `listener` accepts, and cuts who is too slow. What of all this comes
//! from the configuration is replaced as a whole when that is loaded again.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::net::TcpListener;
use tracing::info;

pub mod guard;
mod listener;
mod routes;
#[cfg(test)]
mod tests;
pub(crate) mod tls;

use self::listener::Connections;
use self::tls::{Shown, TlsError};
use super::Api;
use super::auth::jwks::JwksError;
use super::auth::limits::Limits;
use super::auth::{Authenticator, Keys};
use crate::config::{Config, Northbound as Settings};

/// How often it is looked whether the keys of tokens have grown old.
const LOOK: Duration = Duration::from_secs(5);

/// Why providers can't be served.
#[derive(Debug, thiserror::Error)]
pub enum NorthboundError {
    /// There is no certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The keys of tokens are not there.
    #[error("{0}")]
    Jwks(String),
    /// An address can't be listened on.
    #[error("cannot listen on {address} for providers: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
}

impl From<JwksError> for NorthboundError {
    fn from(error: JwksError) -> Self {
        Self::Jwks(error.to_string())
    }
}

/// What comes from the configuration, read and ready.
#[derive(Debug)]
pub struct Live {
    settings: Settings,
    tls: Shown,
    authenticator: Authenticator,
}

/// The API for providers.
#[derive(Debug)]
pub struct Northbound {
    live: RwLock<Arc<Live>>,
    keys: Arc<Keys>,
    limits: Limits,
    connections: Connections,
    state_dir: PathBuf,
}

impl Northbound {
    /// Makes it ready; none: the configuration has none.
    ///
    /// # Errors
    /// Where the certificate or the file with the keys of tokens can't be used.
    pub fn open(config: &Config, keys: &Arc<Keys>) -> Result<Option<Arc<Self>>, NorthboundError> {
        let Some(settings) = &config.northbound else { return Ok(None) };
        let tls = tls::open(settings, &config.state_dir)?;
        info!(fingerprint = tls.fingerprint, "certificate of the API for providers");
        let authenticator = Authenticator::new(settings, keys, None)?;
        Ok(Some(Arc::new(Self {
            live: RwLock::new(Arc::new(Live { settings: settings.clone(), tls, authenticator })),
            keys: Arc::clone(keys),
            limits: Limits::default(),
            connections: Connections::default(),
            state_dir: config.state_dir.clone(),
        })))
    }

    /// Reads everything that another configuration names, and changes nothing yet.
    ///
    /// # Errors
    /// As [`Northbound::open`].
    pub fn prepare(&self, settings: &Settings) -> Result<Live, NorthboundError> {
        let before = self.live();
        Ok(Live {
            settings: settings.clone(),
            tls: tls::open(settings, &self.state_dir)?,
            authenticator: Authenticator::new(settings, &self.keys, Some(&before.authenticator))?,
        })
    }

    /// Goes on with what was prepared. Connections that are open keep their certificate.
    pub fn take(&self, live: Live) {
        if self.live().tls.fingerprint != live.tls.fingerprint {
            info!(fingerprint = live.tls.fingerprint, "another certificate of the API for providers");
        }
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(live);
    }

    fn live(&self) -> Arc<Live> {
        Arc::clone(&self.live.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Listens on the addresses of the configuration. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// Where one of them can't be listened on.
    pub fn listen(&self) -> Result<Vec<TcpListener>, NorthboundError> {
        let listen = |address: &SocketAddr| {
            listener::listen(*address).map_err(|source| NorthboundError::Listen { address: *address, source })
        };
        self.live().settings.listen.iter().map(listen).collect()
    }

    /// Serves providers until `shutdown` comes, and then finishes what it has begun.
    pub async fn serve(
        self: Arc<Self>,
        listeners: Vec<TcpListener>,
        api: Api,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) {
        let router =
            guard::guarded(routes::router(api, &self), Arc::clone(&self), guard::Rejection::into_native);
        let own = Arc::clone(&self);
        let fresh = tokio::spawn(async move { own.keep_fresh().await });
        listener::serve(self, listeners, router, shutdown).await;
        fresh.abort();
    }

    async fn keep_fresh(&self) {
        loop {
            if let Some(jwks) = self.live().authenticator.jwks().cloned() {
                jwks.refresh_if_due().await;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
