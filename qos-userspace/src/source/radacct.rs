//! Sessions from the database that a FreeRADIUS writes accounting into: a table like `radacct`, only read.
//!
//! Each round reads rows that are new, by their number, rows of open sessions that were updated, by the time of it,
//! and, since FreeRADIUS may end a session without touching that time, the ends of those that were open, by their
//! numbers. Both of the former overlap with the round before, for a transaction may become visible late. No look-up is
//! by address: PostgreSQL has no index for that.
//!
//! Sessions whose last sign of life is older than `session_ttl` are not told. Of sessions that are open on one address,
//! or of one line, that which began last counts.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{Secret, Sink, SinkError, Throttle};
use crate::domain::Name;
use crate::domain::subscriber::{Event, Report};
use crate::manager::subscriber::Taken;

mod database;
mod known;
mod row;
mod statement;

use database::{Database, DatabaseError};
use known::{Known, Reports};
pub use statement::Identifier;

/// Sessions that are read at a time.
const PAGE: usize = 5_000;
/// Sessions whose end is looked for at a time.
const ENDS: usize = 500;
/// Sessions whose end is looked for in a round; with more, it takes several rounds to come round.
const MOST_ENDS: usize = 50_000;
/// How far back what was read before is read again: longer than a transaction takes to become visible.
const OVERLAP: Duration = Duration::from_secs(60);
/// Longest wait between two tries to reach the database, unless rounds are further apart.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Reports that go to the sink together at most.
const MOST_TOGETHER: usize = 1_000;

/// What is to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RadacctConfig {
    /// Where the database is.
    pub url: Url,
    /// Time between two rounds.
    pub poll: Duration,
    /// The table or view, behind the schema it is in where it is in another one.
    pub table: Vec<Identifier>,
    /// What its columns are called.
    pub columns: Columns,
    /// How many bit/s a rate of one is.
    pub rate_unit: u64,
    /// What the lines' source is called.
    pub source: Name,
}

/// Names of columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns {
    /// Number of the row; a later one is higher.
    pub id: Identifier,
    /// What tells the session from all others.
    pub key: Identifier,
    /// What names the line.
    pub line: Identifier,
    /// The BRAS.
    pub bras: Identifier,
    /// When the session began.
    pub start: Identifier,
    /// The last sign of life.
    pub update: Identifier,
    /// When it ended; null: it has not.
    pub stop: Identifier,
    /// The IPv4 address.
    pub address: Option<Identifier>,
    /// The IPv6 address.
    pub ipv6_address: Option<Identifier>,
    /// The prefix of the link to the subscriber.
    pub ipv6_prefix: Option<Identifier>,
    /// The prefix behind the subscriber's router.
    pub delegated_prefix: Option<Identifier>,
    /// Speed of the line from the subscriber.
    pub rate_up: Option<Identifier>,
    /// Speed of the line to the subscriber.
    pub rate_down: Option<Identifier>,
}

/// Which database, as `sqlite:`, `postgresql:`, `mysql:` or `mariadb:` and what its driver needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    kind: Kind,
    /// It may have a password in it.
    text: Secret,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Sqlite,
    Postgres,
    MySql,
}

impl Url {
    /// Reads a URL as far as it says which kind of database.
    ///
    /// # Errors
    /// Where it is of another kind, or its driver can't read it. The password is not in the text.
    pub fn read(text: &str) -> Result<Self, String> {
        let kind = match text.split_once(':').map(|(scheme, _)| scheme) {
            Some("sqlite") => Kind::Sqlite,
            Some("postgres" | "postgresql") => Kind::Postgres,
            Some("mysql" | "mariadb") => Kind::MySql,
            _ => {
                return Err(
                    "expected the URL of a database: sqlite:///PATH, postgresql://USER:PASSWORD@HOST/NAME, \
                            mysql://… or mariadb://…"
                        .to_owned(),
                );
            }
        };
        let url = Self { kind, text: Secret::from(text.to_owned()) };
        database::check(&url).map(|()| url)
    }
}

/// How the database is, and what was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RadacctStatus {
    /// When the last round ended well.
    pub read_at: Option<Timestamp>,
    /// Why no round did since.
    pub error: Option<String>,
    /// Sessions that are open and alive.
    pub open: u64,
    /// Of these: not told, for another on the same address or line began later.
    pub contested: u64,
    /// Reports, since the daemon started.
    pub told: u64,
    /// Of these: refused, as they can't be true.
    pub refused: u64,
    /// Rows, since the daemon started, of which no line could be made: no name, or nothing of an address.
    pub unusable: u64,
}

/// Why a round did not end well.
#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error("what was read could not be kept: {0}")]
    Sink(#[from] SinkError),
}

/// Reads round after round. `ttl` is the time after its last sign of life for which a session counts as up.
pub(crate) async fn follow(
    config: RadacctConfig,
    ttl: Duration,
    sink: impl Sink,
    status: Arc<Mutex<RadacctStatus>>,
) {
    let poll = config.poll;
    let mut follower =
        Follower { config, ttl, sink, status, database: None, known: None, refused: Throttle::default() };
    let (mut failures, trouble) = (0_u32, Throttle::default());
    loop {
        let result = follower.round().await;
        let wait = match &result {
            Ok(()) => {
                if failures > 0 {
                    info!(failures, "the accounting database is read again");
                }
                failures = 0;
                poll
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                if let Some(more) = trouble.pass() {
                    warn!(more, "cannot read the accounting database, and will try again: {error}");
                }
                (poll * failures.min(64)).min(LONGEST_WAIT.max(poll))
            }
        };
        follower.note(result);
        tokio::time::sleep(wait).await;
    }
}

struct Follower<S> {
    config: RadacctConfig,
    ttl: Duration,
    sink: S,
    status: Arc<Mutex<RadacctStatus>>,
    /// None: it is not connected.
    database: Option<Database>,
    /// None: all of it has to be read.
    known: Option<Known>,
    refused: Throttle,
}

impl<S: Sink> Follower<S> {
    async fn round(&mut self) -> Result<(), RoundError> {
        let mut database = match self.database.take() {
            Some(database) => database,
            None => Database::connect(&self.config.url).await?,
        };
        // What failed half-way is connected to again.
        let reports = self.read(&mut database).await?;
        self.database = Some(database);
        self.tell(reports).await
    }

    fn note(&self, result: Result<(), RoundError>) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => {
                status.read_at = Some(Timestamp::now());
                status.error = None;
            }
            Err(error) => status.error = Some(error.to_string()),
        }
    }

    /// Reads what changed since the round before, or all.
    async fn read(&mut self, database: &mut Database) -> Result<Reports, RoundError> {
        let now = Timestamp::now();
        let alive_since =
            now.checked_sub(SignedDuration::try_from(self.ttl).unwrap_or_default()).unwrap_or(Timestamp::MIN);
        let mut known = match self.known.take() {
            Some(known) => known,
            None => self.begin(database, now).await?,
        };
        let result = self.read_on(database, &mut known, alive_since, now).await;
        // Whatever was read so far holds; what was not read will be.
        let reports = match result {
            Ok(()) => Ok(known.reports()),
            Err(error) => Err(error.into()),
        };
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        (status.open, status.contested) = known.counts();
        drop(status);
        self.known = Some(known);
        reports
    }

    async fn read_on(
        &self,
        database: &mut Database,
        known: &mut Known,
        alive_since: Timestamp,
        now: Timestamp,
    ) -> Result<(), DatabaseError> {
        let config = &self.config;
        let (first, updated_since) = (known.read_from(), known.updated_since());
        let mut after = first;
        loop {
            let rows = database.query(&statement::opened(config, after, alive_since), &[]).await?;
            after = self.take_rows(known, &rows, after, alive_since);
            if rows.len() < PAGE {
                break;
            }
        }
        known.read_to(after);
        if let Some(since) = updated_since {
            let mut after = 0;
            loop {
                let rows = database.query(&statement::updated(config, after, since), &[]).await?;
                after = self.take_rows(known, &rows, after, alive_since);
                if rows.len() < PAGE {
                    break;
                }
            }
        }
        for ids in known.next_to_end().chunks(ENDS) {
            let rows = database.query(&statement::ends(config, ids), &[]).await?;
            known.take_ends(ids, &rows, now);
        }
        Ok(())
    }

    /// Takes rows of open sessions, and returns the number of the last one.
    fn take_rows(&self, known: &mut Known, rows: &[row::Row], after: i64, alive_since: Timestamp) -> i64 {
        let mut last = after;
        let mut unusable = 0;
        for row in rows {
            last = last.max(row.id());
            match row.session(self.config.rate_unit) {
                Some(session) if session.seen >= alive_since => known.take(session),
                Some(_) => {}
                None => unusable += 1,
            }
        }
        self.status.lock().unwrap_or_else(PoisonError::into_inner).unusable += unusable;
        last
    }

    /// What was told before the daemon started, and is not open any more.
    async fn begin(&self, database: &mut Database, now: Timestamp) -> Result<Known, RoundError> {
        let mut known = Known::default();
        let open = self.sink.open(&self.config.source).await?;
        let told: Vec<_> = open.into_iter().filter_map(|line| Some((line.key?, line.line))).collect();
        for part in told.chunks(ENDS) {
            let keys: Vec<_> = part.iter().map(|(key, _)| key.as_str()).collect();
            let rows = database.query(&statement::ends_by_key(&self.config, keys.len()), &keys).await?;
            known.take_ends_by_key(part, &rows, now);
        }
        Ok(known)
    }

    async fn tell(&mut self, reports: Reports) -> Result<(), RoundError> {
        let source = &self.config.source;
        let report = |at, event| Report { source: Some(source.clone()), at, event };
        let downs = reports
            .downs
            .into_iter()
            .map(|down| report(down.at, Event::Down { line: down.line, key: Some(down.key) }));
        // First when it began, so that this is known, and then that it is alive.
        let ups = reports.ups.into_iter().flat_map(|(session, is_new)| {
            let moments = if is_new { vec![session.start, session.seen] } else { vec![session.seen] };
            moments.into_iter().map(move |at| report(at, session.up()))
        });
        let all: Vec<_> = downs.chain(ups).collect();
        for part in all.chunks(MOST_TOGETHER) {
            let taken = self.sink.take(part.to_vec()).await.inspect_err(|_| {
                // All that is known counts as told.
                self.known = None;
            })?;
            let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
            status.told += part.len() as u64;
            for (report, taken) in part.iter().zip(taken) {
                match taken {
                    Taken::Changed(warnings) => {
                        warnings.iter().for_each(|warning| warn!("radacct: {warning}"));
                    }
                    Taken::Unchanged => {}
                    Taken::Refused(reason) => {
                        status.refused += 1;
                        if let Some(more) = self.refused.pass() {
                            warn!(more, ?report.event, "what the accounting database tells was refused: {reason}");
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
