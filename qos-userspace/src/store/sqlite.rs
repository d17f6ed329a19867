//! The state in an SQLite file.
//!
//! Journal mode WAL, `synchronous = FULL`: a grant that was told to a provider survives a loss of
//! power, and its number is never given out again. What that costs is one `fdatasync` a decision.
//! One process at a time owns the file, by an advisory lock on a file beside it; others may read it
//! (`sqlite3 -readonly`): rates, times and names are columns, and the view `allocation_status`
//! lists allocations with those that ended. Selectors and prefixes are JSON lists of their text form.

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use jiff::Timestamp;
use rusqlite::types::{FromSql, Value};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension as _, Row, TransactionBehavior};

use super::subscribers::{self, Search};
use super::{Store, StoreError};
use crate::domain::level::LAST_PRIORITY;
use crate::domain::session::link_layer;
use crate::domain::{
    Allocation, AllocationId, ApiKey, Application, BitsPerSecond, ByteCount, Contract, DelayBound, Directed,
    DurationRange, Enforcement, Level, Name, Profile, ProfileStatus, Provider, ProviderKind, Segment,
    Selector, Session, Status, Subscriber, dscp,
};
use crate::manager::record::{Record, RecordQuery, Verdict};
use crate::manager::subscriber::SubscriberQuery;
use crate::manager::{Change, Network, RefusalCode, SlotKind, State};

/// Ended allocations that are kept; the oldest go first.
pub const HISTORY_LIMIT: u32 = 100_000;

/// Records of decisions that are kept; the oldest go first.
pub const RECORDS_LIMIT: u32 = 100_000;

/// How long a commit waits for another program that holds the file's write lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);

/// Statement `n` brings a file of version `n` to version `n + 1`.
const MIGRATIONS: [&str; 4] = [
    include_str!("schema-1.sql"),
    include_str!("schema-2.sql"),
    include_str!("schema-3.sql"),
    include_str!("schema-4.sql"),
];

/// An SQLite file that this process owns.
#[derive(Debug)]
pub struct SqliteStore {
    connection: Connection,
    path: PathBuf,
    history_limit: u32,
    records_limit: u32,
    /// The last place of a change of a line.
    sequence: u64,
    /// Held for as long as the store is open. Field order: the database is closed before.
    _lock: File,
}

impl SqliteStore {
    /// Opens the file at `path`, or makes it; its folder must exist. Checks the whole file, and
    /// brings one of an earlier version up to date.
    ///
    /// # Errors
    /// Where it can't be opened, written or read, is damaged, is not ours, or is in use.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref().to_owned();
        let lock = lock(&path)?;
        let at = |action| {
            let path = path.clone();
            move |source| explain(&path, action, source)
        };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&path, flags).map_err(at("opening it"))?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(at("setting the timeout"))?;
        connection.set_prepared_statement_cache_capacity(64);
        let mut store = Self {
            connection,
            path: path.clone(),
            history_limit: HISTORY_LIMIT,
            records_limit: RECORDS_LIMIT,
            sequence: 0,
            _lock: lock,
        };
        store.check()?;
        store.connection.pragma_update(None, "journal_mode", "wal").map_err(at("choosing the journal"))?;
        store.connection.pragma_update(None, "synchronous", "full").map_err(at("choosing synchronous"))?;
        store.connection.pragma_update(None, "foreign_keys", true).map_err(at("turning on foreign keys"))?;
        store.migrate()?;
        let last: i64 = store
            .connection
            .query_row("SELECT coalesce(max(sequence), 0) FROM subscribers", [], |row| row.get(0))
            .map_err(at("reading the lines"))?;
        store.sequence = last as u64;
        Ok(store)
    }

    /// The same store, keeping `limit` ended allocations instead of [`HISTORY_LIMIT`].
    #[must_use]
    pub fn with_history_limit(mut self, limit: u32) -> Self {
        self.history_limit = limit;
        self
    }

    /// The same store, keeping `limit` records of decisions instead of [`RECORDS_LIMIT`].
    #[must_use]
    pub fn with_records_limit(mut self, limit: u32) -> Self {
        self.records_limit = limit;
        self
    }

    #[cfg(test)]
    pub(crate) fn set_synchronous(&self, mode: &str) {
        self.connection.pragma_update(None, "synchronous", mode).expect("a mode of SQLite");
    }

    /// Refuses a damaged, foreign or read-only file before anything is written.
    fn check(&self) -> Result<(), StoreError> {
        let at = |action| move |source| explain(&self.path, action, source);
        if self.connection.is_readonly("main").map_err(at("asking for its mode"))? {
            let reason = "it can be opened for reading only".to_owned();
            return Err(StoreError::ReadOnly { path: self.path.clone(), reason });
        }
        let found: String = self
            .connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(at("checking the file"))?;
        if found != "ok" {
            return Err(StoreError::Corrupt { path: self.path.clone(), reason: found });
        }
        let tables: u32 = self
            .connection
            .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
            .map_err(at("reading the schema"))?;
        match self.version()? {
            0 if tables > 0 => Err(StoreError::Foreign { path: self.path.clone() }),
            found if found as usize > MIGRATIONS.len() => {
                let known = MIGRATIONS.len() as u32;
                Err(StoreError::TooNew { path: self.path.clone(), found, known })
            }
            _ => Ok(()),
        }
    }

    fn version(&self) -> Result<u32, StoreError> {
        self.connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(|source| explain(&self.path, "reading the schema version", source))
    }

    fn migrate(&mut self) -> Result<(), StoreError> {
        let version = self.version()?;
        let path = self.path.clone();
        let at = |source| explain(&path, "bringing the schema up to date", source);
        for (from, statements) in (0u32..).zip(MIGRATIONS).skip(version as usize) {
            let transaction =
                self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(at)?;
            transaction.execute_batch(statements).map_err(at)?;
            transaction.pragma_update(None, "user_version", from + 1).map_err(at)?;
            transaction.commit().map_err(at)?;
        }
        Ok(())
    }

    /// Begins a transaction, unless one has begun.
    fn begin(&self) -> rusqlite::Result<()> {
        if self.connection.is_autocommit() {
            self.connection.execute_batch("BEGIN IMMEDIATE")
        } else {
            Ok(())
        }
    }

    fn search(&self, search: &Search) -> Result<Vec<Subscriber>, StoreError> {
        let statement = search.statement();
        self.rows_with("subscribers", &statement, search.values(), &["line"], subscribers::read)
    }

    fn rows<T>(
        &self,
        table: &'static str,
        query: &str,
        key: &[&str],
        read: impl FnMut(&Reader<'_, '_>) -> Result<T, String>,
    ) -> Result<Vec<T>, StoreError> {
        self.rows_with(table, query, &[], key, read)
    }

    fn rows_with<T>(
        &self,
        table: &'static str,
        query: &str,
        values: &[Value],
        key: &[&str],
        mut read: impl FnMut(&Reader<'_, '_>) -> Result<T, String>,
    ) -> Result<Vec<T>, StoreError> {
        let at = |source| explain(&self.path, "reading a table", source);
        let mut statement = self.connection.prepare_cached(query).map_err(at)?;
        let columns = |row: &Row<'_>| -> HashMap<String, usize> {
            row.as_ref().column_names().into_iter().map(str::to_owned).zip(0..).collect()
        };
        let mut known = None;
        let mut rows = statement.query(rusqlite::params_from_iter(values)).map_err(at)?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().map_err(at)? {
            let columns = known.get_or_insert_with(|| columns(row));
            let item = read(&Reader { row, columns }).map_err(|reason| StoreError::BadRow {
                path: self.path.clone(),
                table,
                key: key.iter().map(|column| text_of(row, column)).collect::<Vec<_>>().join(" "),
                reason,
            })?;
            found.push(item);
        }
        Ok(found)
    }
}

impl Store for SqliteStore {
    fn load(&mut self, network: Network) -> Result<State, StoreError> {
        let mut state = State::new(network);
        let freed = self.rows(
            "freed_slots",
            "SELECT * FROM freed_slots ORDER BY sequence",
            &["kind", "slot"],
            |row| {
                let kind: String = row.get("kind")?;
                let kind = SlotKind::ALL.into_iter().find(|known| known.name() == kind);
                let kind = kind.ok_or("column kind: not known")?;
                Ok((kind, row.slot("slot", kind)?))
            },
        )?;
        state.restore_freed_slots(freed);
        for provider in self.rows("providers", "SELECT * FROM providers", &["name"], read_provider)? {
            state.apply(&Change::PutProvider(provider));
        }
        for application in
            self.rows("applications", "SELECT * FROM applications", &["provider", "name"], |row| {
                let application = read_application(row)?;
                let known = state.providers.contains_key(&application.provider);
                known
                    .then_some(application)
                    .ok_or_else(|| "column provider: there is no such provider".to_owned())
            })?
        {
            state.apply(&Change::PutApplication(application));
        }
        for segment in self.rows("segments", "SELECT * FROM segments", &["name"], read_segment)? {
            state.apply(&Change::PutSegment(segment));
        }
        let sessions = self.rows("sessions", "SELECT * FROM sessions", &["name"], |row| {
            let session = read_session(row)?;
            match session.segments.iter().find(|name| !state.segments.contains_key(name)) {
                Some(name) => Err(format!("column segments: there is no segment {name}")),
                None => Ok(session),
            }
        })?;
        for session in sessions {
            state.apply(&Change::PutSession(session));
        }
        for profile in self.rows("profiles", "SELECT * FROM profiles", &["name"], |row| {
            let status: String = row.get("status")?;
            Ok(Profile {
                name: row.parse("name")?,
                level: read_level(row)?,
                status: ProfileStatus::named(&status)
                    .ok_or(format!("column status: `{status}` is not known"))?,
                duration: DurationRange {
                    shortest: row.parse_option("shortest")?,
                    longest: row.parse_option("longest")?,
                },
            })
        })? {
            state.apply(&Change::PutProfile(profile));
        }
        for key in self.rows("keys", "SELECT * FROM keys", &["id"], read_key)? {
            state.apply(&Change::PutKey(key));
        }
        let allocations =
            self.rows("allocations", "SELECT * FROM allocations ORDER BY id", &["id"], |row| {
                let allocation = read_allocation(row, Status::Available)?;
                if allocation.needs_class() != allocation.class.is_some() {
                    return Err("column class: it does not agree with the level".to_owned());
                }
                check_references(&state, &allocation)?;
                Ok(allocation)
            })?;
        for allocation in allocations {
            state.apply(&Change::PutAllocation(allocation));
        }
        let next = self.rows(
            "counters",
            "SELECT * FROM counters WHERE name = 'next_allocation'",
            &["name"],
            |row| row.number("value"),
        )?;
        let next = AllocationId(next.first().copied().unwrap_or(1));
        state.next_allocation = state.next_allocation.max(next);
        Ok(state)
    }

    fn commit(&mut self, changes: &[Change], records: &[Record]) -> Result<(), StoreError> {
        if changes.is_empty() && records.is_empty() && self.connection.is_autocommit() {
            return Ok(());
        }
        let write = || -> rusqlite::Result<()> {
            self.begin()?;
            for change in changes {
                write(&self.connection, change, self.history_limit)?;
            }
            write_records(&self.connection, records, self.records_limit)?;
            self.connection.execute_batch("COMMIT")
        };
        let written = write().map_err(|source| explain(&self.path, "writing a decision", source));
        written.inspect_err(|_| self.roll_back())
    }

    fn history(&mut self, limit: usize) -> Result<Vec<Allocation>, StoreError> {
        let query = format!("SELECT * FROM history ORDER BY sequence DESC LIMIT {limit}");
        self.rows("history", &query, &["id"], |row| read_allocation(row, Status::Unavailable))
    }

    fn records(&mut self, query: &RecordQuery) -> Result<Vec<Record>, StoreError> {
        let RecordQuery { provider, application, session, allocation, verdict, since, before, limit } = query;
        let conditions = [
            ("provider =", provider.as_ref().map(text)),
            ("application =", application.as_ref().map(text)),
            ("session =", session.as_ref().map(text)),
            ("allocation =", allocation.map(|id| integer(id.0))),
            ("verdict =", verdict.map(|verdict| text(verdict.name()))),
            (
                "unixepoch(at, 'subsec') >=",
                since.map(|since| Value::Real(since.as_microsecond() as f64 / 1e6)),
            ),
            ("sequence <", before.map(integer)),
        ];
        let (mut sql, mut values) = ("SELECT * FROM decisions WHERE true".to_owned(), Vec::new());
        for (condition, value) in conditions {
            values.extend(value.inspect(|_| sql.push_str(&format!(" AND {condition} ?"))));
        }
        sql.push_str(&format!(" ORDER BY sequence DESC LIMIT {limit}"));
        self.rows_with("decisions", &sql, &values, &["sequence"], read_record)
    }

    fn put_subscriber(&mut self, subscriber: &Subscriber) -> Result<(), StoreError> {
        let sequence = self.sequence + 1;
        let written = self.begin().and_then(|()| subscribers::put(&self.connection, subscriber, sequence));
        self.sequence = sequence;
        let written = written.map_err(|source| explain(&self.path, "writing a line", source));
        written.inspect_err(|_| self.roll_back())
    }

    fn roll_back(&mut self) {
        if !self.connection.is_autocommit() {
            // It fails only where SQLite has done it already.
            let _ = self.connection.execute_batch("ROLLBACK");
        }
    }

    fn subscriber(&mut self, line: &Name) -> Result<Option<Subscriber>, StoreError> {
        Ok(self.search(&Search::of_line(line))?.pop())
    }

    fn subscribers_within(&mut self, prefix: &IpNet) -> Result<Vec<Subscriber>, StoreError> {
        self.search(&Search::within(prefix))
    }

    fn subscribers_at(&mut self, bras: &str, source: Option<&Name>) -> Result<Vec<Subscriber>, StoreError> {
        self.search(&Search::at_bras(bras, source))
    }

    fn subscribers(&mut self, query: &SubscriberQuery) -> Result<Vec<Subscriber>, StoreError> {
        self.search(&Search::of_query(query))
    }

    fn forget_subscribers(&mut self, before: Timestamp, most: u32) -> Result<usize, StoreError> {
        let forget = || -> rusqlite::Result<usize> {
            self.begin()?;
            let forgotten = subscribers::forget(&self.connection, before, most)?;
            self.connection.execute_batch("COMMIT")?;
            Ok(forgotten)
        };
        let forgotten = forget().map_err(|source| explain(&self.path, "forgetting lines", source));
        forgotten.inspect_err(|_| self.roll_back())
    }
}

/// Takes the lock that says which process owns the store.
fn lock(path: &Path) -> Result<File, StoreError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(name).map_err(
            |error| {
                let (path, reason) = (path.to_owned(), error.to_string());
                match error.kind() {
                    ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => {
                        StoreError::ReadOnly { path, reason }
                    }
                    ErrorKind::StorageFull => StoreError::Full { path },
                    _ => StoreError::CannotOpen { path, reason },
                }
            },
        )?;
    match file.try_lock() {
        Ok(()) => {
            // Only for the message that another one shows, so a full disk must not stop us here.
            let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            Err(StoreError::InUse { path: path.to_owned(), holder: holder.trim().parse().ok() })
        }
        Err(TryLockError::Error(error)) => {
            Err(StoreError::CannotOpen { path: path.to_owned(), reason: error.to_string() })
        }
    }
}

/// Says in our words what SQLite says.
fn explain(path: &Path, action: &'static str, source: rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    let rusqlite::Error::SqliteFailure(failure, _) = &source else {
        return StoreError::Sqlite { path, action, source };
    };
    // On a full disk the shared memory beside the journal can't grow, which has a code of its own.
    if failure.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE {
        return StoreError::Full { path };
    }
    match failure.code {
        ErrorCode::CannotOpen => StoreError::CannotOpen { path, reason: source.to_string() },
        ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => {
            StoreError::Corrupt { path, reason: source.to_string() }
        }
        ErrorCode::ReadOnly => StoreError::ReadOnly { path, reason: source.to_string() },
        ErrorCode::DiskFull => StoreError::Full { path },
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => StoreError::Locked { path },
        _ => StoreError::Sqlite { path, action, source },
    }
}

// Writing.

/// A column and what goes into it.
pub(super) type Column = (&'static str, Value);

fn write(transaction: &Connection, change: &Change, history_limit: u32) -> rusqlite::Result<()> {
    match change {
        Change::PutProvider(provider) => {
            take_slot(
                transaction,
                SlotKind::Provider,
                "name = ?1",
                &[&provider.name.as_str()],
                provider.slot,
            )?;
            upsert(transaction, "providers", &["name"], provider_columns(provider))
        }
        Change::DeleteProvider(name) => {
            delete(transaction, SlotKind::Provider, "name = ?1", &[&name.as_str()])
        }
        Change::PutApplication(application) => {
            let key = [application.provider.as_str(), application.name.as_str()];
            take_slot(
                transaction,
                SlotKind::Application,
                "provider = ?1 AND name = ?2",
                &[&key[0], &key[1]],
                application.slot,
            )?;
            upsert(transaction, "applications", &["provider", "name"], application_columns(application))
        }
        Change::DeleteApplication(provider, name) => delete(
            transaction,
            SlotKind::Application,
            "provider = ?1 AND name = ?2",
            &[&provider.as_str(), &name.as_str()],
        ),
        Change::PutSession(session) => {
            take_slot(transaction, SlotKind::Session, "name = ?1", &[&session.name.as_str()], session.slot)?;
            upsert(transaction, "sessions", &["name"], session_columns(session))
        }
        Change::DeleteSession(name) => delete(transaction, SlotKind::Session, "name = ?1", &[&name.as_str()]),
        Change::PutSegment(segment) => upsert(transaction, "segments", &["name"], segment_columns(segment)),
        Change::DeleteSegment(name) => {
            transaction.prepare_cached("DELETE FROM segments WHERE name = ?1")?.execute([name.as_str()])?;
            Ok(())
        }
        Change::PutProfile(profile) => {
            let mut columns = vec![
                ("name", text(&profile.name)),
                ("status", text(profile.status.name())),
                ("shortest", option(profile.duration.shortest, text)),
                ("longest", option(profile.duration.longest, text)),
            ];
            columns.extend(level_columns(&profile.level));
            upsert(transaction, "profiles", &["name"], columns)
        }
        Change::DeleteProfile(name) => {
            transaction.prepare_cached("DELETE FROM profiles WHERE name = ?1")?.execute([name.as_str()])?;
            Ok(())
        }
        Change::PutKey(key) => upsert(transaction, "keys", &["id"], key_columns(key)),
        Change::DeleteKey(id) => {
            transaction.prepare_cached("DELETE FROM keys WHERE id = ?1")?.execute([id.as_str()])?;
            Ok(())
        }
        Change::PutAllocation(allocation) => {
            let id = integer(allocation.id.0);
            take_slot(transaction, SlotKind::Allocation, "id = ?1", &[&id], allocation.slot)?;
            match allocation.class {
                Some(class) => take_slot(transaction, SlotKind::Class, "id = ?1", &[&id], class)?,
                None => free_slot(transaction, SlotKind::Class, "id = ?1", &[&id], None)?,
            }
            transaction.prepare_cached("DELETE FROM history WHERE id = ?1")?.execute([&id])?;
            upsert(transaction, "allocations", &["id"], allocation_columns(allocation))?;
            transaction
                .prepare_cached(
                    "INSERT INTO counters (name, value) VALUES ('next_allocation', ?1 + 1) \
                     ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)",
                )?
                .execute([&id])?;
            Ok(())
        }
        Change::EndAllocation(allocation) => {
            let id = integer(allocation.id.0);
            free_slot(transaction, SlotKind::Class, "id = ?1", &[&id], None)?;
            delete(transaction, SlotKind::Allocation, "id = ?1", &[&id])?;
            let mut columns = allocation_columns(allocation);
            columns.push(("ended_at", option(allocation.ended_at.as_ref(), text)));
            columns.push(("reason", option(allocation.reason.as_ref(), text)));
            upsert(transaction, "history", &["id"], columns)?;
            transaction
                .prepare_cached(
                    "DELETE FROM history WHERE sequence <= (SELECT max(sequence) FROM history) - ?1",
                )?
                .execute([history_limit])?;
            Ok(())
        }
    }
}

/// Adds records, and forgets those that are too many.
fn write_records(transaction: &Connection, records: &[Record], limit: u32) -> rusqlite::Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let mut insert = transaction.prepare_cached(
        "INSERT INTO decisions (at, actor, action, verdict, provider, application, session, allocation, code, \
         reason, asked) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )?;
    for record in records {
        insert.execute((
            text(record.at),
            &record.actor,
            &record.action,
            record.verdict.name(),
            option(record.provider.as_ref(), text),
            option(record.application.as_ref(), text),
            option(record.session.as_ref(), text),
            option(record.allocation, |id| integer(id.0)),
            option(record.code, |code| text(code.name())),
            &record.reason,
            option(record.asked.as_ref(), text),
        ))?;
    }
    let last = transaction.last_insert_rowid();
    transaction
        .prepare_cached("DELETE FROM decisions WHERE sequence <= ?1")?
        .execute([last - i64::from(limit)])?;
    Ok(())
}

fn table(kind: SlotKind) -> &'static str {
    match kind {
        SlotKind::Provider => "providers",
        SlotKind::Application => "applications",
        SlotKind::Session => "sessions",
        SlotKind::Allocation | SlotKind::Class => "allocations",
    }
}

/// The column of that table.
fn column(kind: SlotKind) -> &'static str {
    if kind == SlotKind::Class { "class" } else { "slot" }
}

/// Takes `slot` from the free ones for the row that is about to be written, and frees what the row
/// had before.
fn take_slot(
    transaction: &Connection,
    kind: SlotKind,
    condition: &str,
    key: &[&dyn rusqlite::ToSql],
    slot: u16,
) -> rusqlite::Result<()> {
    free_slot(transaction, kind, condition, key, Some(slot))?;
    transaction
        .prepare_cached("DELETE FROM freed_slots WHERE kind = ?1 AND slot = ?2")?
        .execute((kind.name(), slot))?;
    Ok(())
}

/// Removes a row and puts its slot behind the free ones.
fn delete(
    transaction: &Connection,
    kind: SlotKind,
    condition: &str,
    key: &[&dyn rusqlite::ToSql],
) -> rusqlite::Result<()> {
    free_slot(transaction, kind, condition, key, None)?;
    let statement = format!("DELETE FROM {} WHERE {condition}", table(kind));
    transaction.prepare_cached(&statement)?.execute(key)?;
    Ok(())
}

fn free_slot(
    transaction: &Connection,
    kind: SlotKind,
    condition: &str,
    key: &[&dyn rusqlite::ToSql],
    kept: Option<u16>,
) -> rusqlite::Result<()> {
    let find = format!("SELECT {} FROM {} WHERE {condition}", column(kind), table(kind));
    let found: Option<Option<u16>> =
        transaction.prepare_cached(&find)?.query_row(key, |row| row.get(0)).optional()?;
    if let Some(slot) = found.flatten().filter(|slot| Some(*slot) != kept) {
        // Replacing gives the row a new, higher sequence number.
        transaction
            .prepare_cached("INSERT OR REPLACE INTO freed_slots (kind, slot) VALUES (?1, ?2)")?
            .execute((kind.name(), slot))?;
    }
    Ok(())
}

pub(super) fn upsert(
    transaction: &Connection,
    table: &str,
    key: &[&str],
    columns: Vec<Column>,
) -> rusqlite::Result<()> {
    let (names, values): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
    let marks = vec!["?"; names.len()].join(", ");
    let updates: Vec<_> = names
        .iter()
        .filter(|name| !key.contains(name))
        .map(|name| format!("{name} = excluded.{name}"))
        .collect();
    let statement = format!(
        "INSERT INTO {table} ({}) VALUES ({marks}) ON CONFLICT ({}) DO UPDATE SET {}",
        names.join(", "),
        key.join(", "),
        updates.join(", ")
    );
    transaction.prepare_cached(&statement)?.execute(rusqlite::params_from_iter(values))?;
    Ok(())
}

fn provider_columns(provider: &Provider) -> Vec<Column> {
    let kind = match provider.kind {
        ProviderKind::Application => "application",
        ProviderKind::Network => "network",
    };
    let mut columns = vec![
        ("name", text(&provider.name)),
        ("kind", text(kind)),
        ("networks", json(&provider.networks)),
        ("slot", integer(provider.slot.into())),
    ];
    columns.extend(contract_columns(&provider.contract));
    columns
}

fn contract_columns(contract: &Contract) -> [Column; 7] {
    let rate = |rate: Option<BitsPerSecond>| option(rate, |rate| integer(rate.0));
    let profiles = contract.profiles.as_ref().map(|names| names.iter().collect::<Vec<_>>());
    [
        ("guaranteed_up", rate(contract.guaranteed.up)),
        ("guaranteed_down", rate(contract.guaranteed.down)),
        ("maximum_up", rate(contract.maximum.up)),
        ("maximum_down", rate(contract.maximum.down)),
        ("best_priority", integer(contract.best_priority.into())),
        ("profiles", option(profiles, |names| json(&names))),
        ("allocations", option(contract.allocations, |most| integer(most.into()))),
    ]
}

fn application_columns(application: &Application) -> Vec<Column> {
    let mut columns = vec![
        ("provider", text(&application.provider)),
        ("name", text(&application.name)),
        ("slot", integer(application.slot.into())),
    ];
    columns.extend(contract_columns(&application.contract));
    columns
}

fn session_columns(session: &Session) -> Vec<Column> {
    vec![
        ("name", text(&session.name)),
        ("addresses", json(&session.addresses)),
        ("rate_up", integer(session.rate.up.0)),
        ("rate_down", integer(session.rate.down.0)),
        ("link_layer", text(link_layer::name(session.link_layer))),
        ("overhead", Value::Integer(session.overhead.into())),
        ("delay_us", integer(session.delay_us.into())),
        ("loss_ppm", integer(session.loss_ppm.into())),
        ("segments", json(&session.segments)),
        ("bras", option(session.bras.as_ref(), text)),
        ("source", option(session.source.as_ref(), text)),
        ("seen_at", option(session.seen_at, text)),
        ("down_since", option(session.down_since, text)),
        ("on_demand", Value::Integer(session.on_demand.into())),
        ("slot", integer(session.slot.into())),
    ]
}

fn segment_columns(segment: &Segment) -> Vec<Column> {
    vec![
        ("name", text(&segment.name)),
        ("capacity_up", integer(segment.capacity.up.0)),
        ("capacity_down", integer(segment.capacity.down.0)),
        ("rest_up", option(segment.rest.up, |rate| integer(rate.0))),
        ("rest_down", option(segment.rest.down, |rate| integer(rate.0))),
    ]
}

fn key_columns(key: &ApiKey) -> Vec<Column> {
    vec![
        ("id", text(&key.id)),
        ("provider", text(&key.provider)),
        ("application", option(key.application.as_ref(), text)),
        ("hash", text(key.hash)),
        ("read_only", integer(key.read_only.into())),
        ("created_at", text(key.created_at)),
        ("expires_at", option(key.expires_at, text)),
    ]
}

fn level_columns(level: &Level) -> Vec<Column> {
    let enforcement = match level.enforcement {
        Enforcement::Shape => "shape",
        Enforcement::Police => "police",
    };
    vec![
        ("guaranteed_up", option(level.guaranteed.up, |rate| integer(rate.0))),
        ("guaranteed_down", option(level.guaranteed.down, |rate| integer(rate.0))),
        ("maximum_up", option(level.maximum.up, |rate| integer(rate.0))),
        ("maximum_down", option(level.maximum.down, |rate| integer(rate.0))),
        ("burst_up", option(level.burst.up, |size| integer(size.0))),
        ("burst_down", option(level.burst.down, |size| integer(size.0))),
        ("priority", integer(level.priority.into())),
        ("delay_us", option(level.delay_us, |delay| integer(delay.into()))),
        ("jitter_us", option(level.jitter_us, |jitter| integer(jitter.into()))),
        ("loss", option(level.loss, Value::Real)),
        ("dscp", option(level.dscp, |dscp| integer(dscp.into()))),
        ("mtu", option(level.mtu, |mtu| integer(mtu.into()))),
        ("enforcement", text(enforcement)),
        ("hard", integer(level.hard.into())),
    ]
}

fn allocation_columns(allocation: &Allocation) -> Vec<Column> {
    let selectors: Vec<_> = allocation.selectors.iter().map(ToString::to_string).collect();
    let bound = &allocation.delay_bound;
    let mut columns = vec![
        ("id", integer(allocation.id.0)),
        ("provider", text(&allocation.provider)),
        ("application", option(allocation.application.as_ref(), text)),
        ("profile", option(allocation.profile.as_ref(), text)),
        ("session", option(allocation.session.as_ref(), text)),
        ("selectors", json(&selectors)),
        ("precedence", integer(allocation.precedence.into())),
        ("delay_bound_up_us", option(bound.up, |bound| integer(bound.whole_us.into()))),
        ("delay_bound_down_us", option(bound.down, |bound| integer(bound.whole_us.into()))),
        ("delay_line_us", option(bound.up.or(bound.down), |bound| integer(bound.line_us.into()))),
        ("delay_line_queue_us", option(bound.up.or(bound.down), |bound| integer(bound.line_queue_us.into()))),
        ("delay_link_queue_us", option(bound.up.or(bound.down), |bound| integer(bound.link_queue_us.into()))),
        ("granted_at", text(allocation.granted_at)),
        ("expires_at", option(allocation.expires_at, text)),
        ("slot", integer(allocation.slot.into())),
        ("class", option(allocation.class, |class| integer(class.into()))),
    ];
    columns.extend(level_columns(&allocation.level));
    columns
}

pub(super) fn text(value: impl Display) -> Value {
    Value::Text(value.to_string())
}

/// SQLite's integers are signed. Values of the domain are below 2^63: rates are at most 400 Gbit/s,
/// bursts what a clock can express, and numbers count up from one.
pub(super) fn integer(value: u64) -> Value {
    Value::Integer(i64::try_from(value).unwrap_or(i64::MAX))
}

pub(super) fn option<T>(value: Option<T>, write: impl FnOnce(T) -> Value) -> Value {
    value.map_or(Value::Null, write)
}

pub(super) fn json<T: serde::Serialize>(values: &[T]) -> Value {
    Value::Text(serde_json::to_string(values).expect("lists of texts have a JSON form"))
}

// Reading.

/// A row that is being read. What is wrong with a column is said with its name.
pub(super) struct Reader<'a, 'b> {
    row: &'a Row<'b>,
    /// Where each column is. SQLite would look through all their names.
    columns: &'a HashMap<String, usize>,
}

impl Reader<'_, '_> {
    pub(super) fn get<T: FromSql>(&self, column: &str) -> Result<T, String> {
        let at = *self.columns.get(column).ok_or_else(|| format!("column {column}: it is missing"))?;
        self.row.get(at).map_err(|error| format!("column {column}: {error}"))
    }

    pub(super) fn parse<T: FromStr<Err: Display>>(&self, column: &str) -> Result<T, String> {
        let text: String = self.get(column)?;
        text.parse().map_err(|error| format!("column {column}: {error}"))
    }

    pub(super) fn parse_option<T: FromStr<Err: Display>>(&self, column: &str) -> Result<Option<T>, String> {
        let text: Option<String> = self.get(column)?;
        text.map(|text| text.parse().map_err(|error| format!("column {column}: {error}"))).transpose()
    }

    pub(super) fn number<T: TryFrom<i64>>(&self, column: &str) -> Result<T, String> {
        let number: i64 = self.get(column)?;
        T::try_from(number).map_err(|_| format!("column {column}: {number} is out of range"))
    }

    pub(super) fn number_option<T: TryFrom<i64>>(&self, column: &str) -> Result<Option<T>, String> {
        let number: Option<i64> = self.get(column)?;
        let convert =
            |number| T::try_from(number).map_err(|_| format!("column {column}: {number} is out of range"));
        number.map(convert).transpose()
    }

    pub(super) fn json<T: serde::de::DeserializeOwned>(&self, column: &str) -> Result<T, String> {
        let text: String = self.get(column)?;
        serde_json::from_str(&text).map_err(|error| format!("column {column}: {error}"))
    }

    fn json_option<T: serde::de::DeserializeOwned>(&self, column: &str) -> Result<Option<T>, String> {
        let text: Option<String> = self.get(column)?;
        let read =
            |text: String| serde_json::from_str(&text).map_err(|error| format!("column {column}: {error}"));
        text.map(read).transpose()
    }

    fn slot(&self, column: &str, kind: SlotKind) -> Result<u16, String> {
        self.slot_option(column, kind)?.ok_or_else(|| format!("column {column}: nothing is there"))
    }

    fn slot_option(&self, column: &str, kind: SlotKind) -> Result<Option<u16>, String> {
        let slot: Option<u16> = self.number_option(column)?;
        match slot.filter(|slot| !(1..=kind.last()).contains(slot)) {
            Some(slot) => Err(format!("column {column}: {slot} is out of range")),
            None => Ok(slot),
        }
    }

    pub(super) fn rates(&self, up: &str, down: &str) -> Result<Directed<Option<BitsPerSecond>>, String> {
        Ok(Directed {
            up: self.number_option(up)?.map(BitsPerSecond),
            down: self.number_option(down)?.map(BitsPerSecond),
        })
    }
}

fn text_of(row: &Row<'_>, column: &str) -> String {
    match row.get(column) {
        Ok(Value::Text(text)) => text,
        Ok(Value::Integer(number)) => number.to_string(),
        _ => "?".to_owned(),
    }
}

fn read_provider(row: &Reader<'_, '_>) -> Result<Provider, String> {
    let kind: String = row.get("kind")?;
    Ok(Provider {
        name: row.parse("name")?,
        kind: match kind.as_str() {
            "application" => ProviderKind::Application,
            "network" => ProviderKind::Network,
            other => return Err(format!("column kind: `{other}` is not known")),
        },
        networks: row.json("networks")?,
        contract: read_contract(row)?,
        slot: row.slot("slot", SlotKind::Provider)?,
    })
}

fn read_record(row: &Reader<'_, '_>) -> Result<Record, String> {
    let verdict: String = row.get("verdict")?;
    Ok(Record {
        sequence: row.number("sequence")?,
        at: row.parse("at")?,
        actor: row.get("actor")?,
        action: row.get("action")?,
        verdict: Verdict::named(&verdict).ok_or(format!("column verdict: `{verdict}` is not known"))?,
        provider: row.parse_option("provider")?,
        application: row.parse_option("application")?,
        session: row.parse_option("session")?,
        allocation: row.number_option("allocation")?.map(AllocationId),
        code: row
            .get::<Option<String>>("code")?
            .map(|code| RefusalCode::named(&code).ok_or(format!("column code: `{code}` is not known")))
            .transpose()?,
        reason: row.get("reason")?,
        asked: row.json_option("asked")?,
    })
}

fn read_application(row: &Reader<'_, '_>) -> Result<Application, String> {
    Ok(Application {
        provider: row.parse("provider")?,
        name: row.parse("name")?,
        contract: read_contract(row)?,
        slot: row.slot("slot", SlotKind::Application)?,
    })
}

fn read_contract(row: &Reader<'_, '_>) -> Result<Contract, String> {
    let best_priority = row.number("best_priority")?;
    if best_priority > LAST_PRIORITY {
        return Err(format!("column best_priority: {best_priority} is out of range"));
    }
    Ok(Contract {
        guaranteed: row.rates("guaranteed_up", "guaranteed_down")?,
        maximum: row.rates("maximum_up", "maximum_down")?,
        best_priority,
        profiles: row.json_option("profiles")?,
        allocations: row.number_option("allocations")?,
    })
}

fn read_session(row: &Reader<'_, '_>) -> Result<Session, String> {
    let layer: String = row.get("link_layer")?;
    Ok(Session {
        name: row.parse("name")?,
        addresses: row.json("addresses")?,
        rate: Directed {
            up: BitsPerSecond(row.number("rate_up")?),
            down: BitsPerSecond(row.number("rate_down")?),
        },
        link_layer: link_layer::named(&layer).ok_or("column link_layer: not known")?,
        overhead: row.number("overhead")?,
        delay_us: row.number("delay_us")?,
        loss_ppm: row.number("loss_ppm")?,
        segments: row.json("segments")?,
        bras: row.get("bras")?,
        source: row.parse_option("source")?,
        seen_at: row.parse_option("seen_at")?,
        down_since: row.parse_option("down_since")?,
        on_demand: row.get("on_demand")?,
        slot: row.slot("slot", SlotKind::Session)?,
    })
}

fn read_key(row: &Reader<'_, '_>) -> Result<ApiKey, String> {
    Ok(ApiKey {
        id: row.parse("id")?,
        provider: row.parse("provider")?,
        application: row.parse_option("application")?,
        hash: row.parse("hash")?,
        read_only: row.get("read_only")?,
        created_at: row.parse("created_at")?,
        expires_at: row.parse_option("expires_at")?,
    })
}

fn read_segment(row: &Reader<'_, '_>) -> Result<Segment, String> {
    Ok(Segment {
        name: row.parse("name")?,
        capacity: Directed {
            up: BitsPerSecond(row.number("capacity_up")?),
            down: BitsPerSecond(row.number("capacity_down")?),
        },
        rest: row.rates("rest_up", "rest_down")?,
    })
}

fn read_level(row: &Reader<'_, '_>) -> Result<Level, String> {
    let enforcement: String = row.get("enforcement")?;
    let level = Level {
        guaranteed: row.rates("guaranteed_up", "guaranteed_down")?,
        maximum: row.rates("maximum_up", "maximum_down")?,
        burst: Directed {
            up: row.number_option("burst_up")?.map(ByteCount),
            down: row.number_option("burst_down")?.map(ByteCount),
        },
        priority: row.number("priority")?,
        delay_us: row.number_option("delay_us")?,
        jitter_us: row.number_option("jitter_us")?,
        loss: row.get("loss")?,
        dscp: row.number_option("dscp")?,
        mtu: row.number_option("mtu")?,
        enforcement: match enforcement.as_str() {
            "shape" => Enforcement::Shape,
            "police" => Enforcement::Police,
            other => return Err(format!("column enforcement: `{other}` is not known")),
        },
        hard: row.get("hard")?,
    };
    if level.priority > LAST_PRIORITY {
        return Err(format!("column priority: {} is out of range", level.priority));
    }
    if let Some(value) = level.dscp.filter(|value| *value > dscp::MAX) {
        return Err(format!("column dscp: {value} is out of range"));
    }
    Ok(level)
}

/// The bound of the direction into the line; the other has none. Before version 4 its parts were not kept.
fn read_bound(row: &Reader<'_, '_>, column: &str) -> Result<Option<DelayBound>, String> {
    let Some(whole_us) = row.number_option(column)? else { return Ok(None) };
    Ok(Some(DelayBound {
        whole_us,
        line_us: row.number_option("delay_line_us")?.unwrap_or(0),
        line_queue_us: row.number_option("delay_line_queue_us")?.unwrap_or(0),
        link_queue_us: row.number_option("delay_link_queue_us")?.unwrap_or(whole_us),
    }))
}

/// `status` says which table the row is of: allocations, or the history.
fn read_allocation(row: &Reader<'_, '_>, status: Status) -> Result<Allocation, String> {
    let selectors: Vec<Selector> = row.json("selectors")?;
    let has_ended = status == Status::Unavailable;
    Ok(Allocation {
        id: AllocationId(row.number("id")?),
        provider: row.parse("provider")?,
        application: row.parse_option("application")?,
        profile: row.parse_option("profile")?,
        selectors,
        level: read_level(row)?,
        precedence: row.number("precedence")?,
        session: row.parse_option("session")?,
        delay_bound: Directed {
            up: read_bound(row, "delay_bound_up_us")?,
            down: read_bound(row, "delay_bound_down_us")?,
        },
        granted_at: row.parse::<Timestamp>("granted_at")?,
        expires_at: row.parse_option("expires_at")?,
        ended_at: if has_ended { row.parse_option("ended_at")? } else { None },
        status,
        reason: if has_ended { row.get("reason")? } else { None },
        slot: row.slot("slot", SlotKind::Allocation)?,
        class: row.slot_option("class", SlotKind::Class)?,
    })
}

/// Foreign keys hold where we write; a hand that writes with them off is found out here.
fn check_references(state: &State, allocation: &Allocation) -> Result<(), String> {
    if !state.providers.contains_key(&allocation.provider) {
        return Err(format!("column provider: there is no provider {}", allocation.provider));
    }
    if let Some(application) = &allocation.application
        && !state.applications.contains_key(&(allocation.provider.clone(), application.clone()))
    {
        return Err(format!("column application: there is no application {application}"));
    }
    match &allocation.session {
        Some(session) if !state.sessions.contains_key(session) => {
            Err(format!("column session: there is no session {session}"))
        }
        _ => Ok(()),
    }
}
