//! Sources of subscriber sessions: who tells, unasked, which lines are up.
//!
//! [`server`] listens to RADIUS accounting, `radius` and [`accounting`] being what it understands of it;
//! [`radacct`] reads the database that a FreeRADIUS writes it into. What either tells becomes [`Report`]s at once,
//! and goes to a [`Sink`], which keeps them. What lines have, and what of several reports holds, is for whoever
//! keeps them to decide.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::config::Config;
use crate::domain::subscriber::Report;
use crate::domain::{Name, Subscriber};
use crate::manager::subscriber::Taken;

pub mod accounting;
mod name;
pub mod radacct;
mod radius;
pub mod server;

use radacct::RadacctStatus;
use server::Counters;
pub use server::{RadiusConfig, RadiusStatistics};

/// Time between two lines of the log about the same trouble.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Why reports were not taken.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SinkError(#[from] pub Box<dyn std::error::Error + Send + Sync>);

/// Keeps what sources tell.
pub trait Sink: Clone + Send + Sync + 'static {
    /// Takes reports in their order, and says what came of each. They are durable when it returns.
    ///
    /// # Errors
    /// Where none of them could be written.
    fn take(&self, reports: Vec<Report>) -> impl Future<Output = Result<Vec<Taken>, SinkError>> + Send;

    /// The lines of a source that are up as far as is known.
    ///
    /// # Errors
    /// Where it can't be read.
    fn open(&self, source: &Name) -> impl Future<Output = Result<Vec<Subscriber>, SinkError>> + Send;
}

/// Why a source can't begin.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A socket can't be had.
    #[error("cannot listen to RADIUS accounting on {address}: {source}")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
}

/// How the sources are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourcesStatus {
    /// The server that RADIUS accounting is sent to; none: there is none.
    pub radius: Option<RadiusStatistics>,
    /// The database that FreeRADIUS writes accounting into; none: there is none.
    pub radacct: Option<RadacctStatus>,
}

/// Says how the sources are, to whoever asks.
#[derive(Clone, Debug, Default)]
pub struct Monitor {
    radius: Option<Arc<Counters>>,
    radacct: Option<Arc<Mutex<RadacctStatus>>>,
}

impl Monitor {
    /// How they are.
    #[must_use]
    pub fn status(&self) -> SourcesStatus {
        let radacct = self.radacct.as_deref();
        SourcesStatus {
            radius: self.radius.as_deref().map(Counters::statistics),
            radacct: radacct.map(|status| status.lock().unwrap_or_else(PoisonError::into_inner).clone()),
        }
    }
}

/// The sources that run. They end when it is dropped.
#[derive(Debug)]
pub struct Sources {
    monitor: Monitor,
    _tasks: JoinSet<()>,
}

impl Sources {
    /// Starts those that the configuration has.
    ///
    /// # Errors
    /// Where a socket can't be had. A database that does not answer is asked again.
    pub async fn start(config: &Config, sink: impl Sink) -> Result<Self, SourceError> {
        let (mut monitor, mut tasks) = (Monitor::default(), JoinSet::new());
        if let Some(radius) = &config.radius {
            let counters = Arc::<Counters>::default();
            server::start(radius, sink.clone(), Arc::clone(&counters), &mut tasks).await?;
            monitor.radius = Some(counters);
        }
        if let Some(radacct) = &config.radacct {
            let status = Arc::<Mutex<RadacctStatus>>::default();
            tasks.spawn(radacct::follow(radacct.clone(), config.session_ttl, sink, Arc::clone(&status)));
            monitor.radacct = Some(status);
        }
        Ok(Self { monitor, _tasks: tasks })
    }

    /// Says how they are, from now on.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }
}

/// What must not be shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub(crate) const fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    pub(crate) fn text(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Lets a line through to the log now and then.
#[derive(Debug, Default)]
struct Throttle(Mutex<(Option<Instant>, u64)>);

impl Throttle {
    /// How many lines were held back since the last one that was let through; none: this one is held back too.
    fn pass(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if state.0.is_some_and(|last| now.duration_since(last) < LOG_INTERVAL) {
            state.1 += 1;
            return None;
        }
        state.0 = Some(now);
        Some(std::mem::take(&mut state.1))
    }
}
