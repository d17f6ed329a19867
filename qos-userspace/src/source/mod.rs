//! Sources of subscriber sessions: who tells, unasked, which lines are up.
//!
//! [`server`] listens to RADIUS accounting, `radius` and [`accounting`] being what it understands of it. What any
//! source tells becomes [`Report`]s at once, and goes to a [`Sink`], which keeps them. What lines have, and what of
//! several reports holds, is for whoever keeps them to decide.

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::domain::subscriber::Report;
use crate::domain::{Name, Subscriber};

pub mod accounting;
mod name;
mod radius;
pub mod server;

pub use server::{RadiusConfig, RadiusStatistics};

/// Time between two lines of the log about the same trouble.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// What came of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is kept; with what somebody should know.
    Changed(Vec<String>),
    /// It tells nothing new.
    Unchanged,
    /// It can't be true, for this reason. Telling it again does not help.
    Refused(String),
}

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

/// What must not be shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub(crate) const fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
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
        let mut state = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let now = Instant::now();
        if state.0.is_some_and(|last| now.duration_since(last) < LOG_INTERVAL) {
            state.1 += 1;
            return None;
        }
        state.0 = Some(now);
        Some(std::mem::take(&mut state.1))
    }
}
