//! Where the state is kept: one trait, transactional.
//!
//! A store writes the changes of a decision all or none, and gives the whole state back after a
//! restart. It decides nothing.

use std::path::PathBuf;

use ipnet::IpNet;
use jiff::Timestamp;

use crate::domain::{Allocation, Name, Subscriber};
use crate::manager::record::{Record, RecordQuery};
use crate::manager::subscriber::SubscriberQuery;
use crate::manager::{Change, Network, State};

pub mod sqlite;
mod subscribers;
#[cfg(test)]
mod tests;

pub use sqlite::SqliteStore;

/// Keeps the state.
pub trait Store: Send {
    /// Reads the whole state. The network is not kept: it is the configuration's.
    ///
    /// # Errors
    /// Where the store can't be read, or holds what no decision can have written.
    fn load(&mut self, network: Network) -> Result<State, StoreError>;

    /// Writes `changes` and the records of what led to them, with what [`Store::put_subscriber`] was given before,
    /// all or none. When it returns they survive a loss of power.
    ///
    /// # Errors
    /// Where they can't be written; the store is then as it was before all of them.
    fn commit(&mut self, changes: &[Change], records: &[Record]) -> Result<(), StoreError>;

    /// The last `limit` allocations that ended, the last one first.
    ///
    /// # Errors
    /// As [`Store::load`].
    fn history(&mut self, limit: usize) -> Result<Vec<Allocation>, StoreError>;

    /// Records of decisions, the last one first.
    ///
    /// # Errors
    /// As [`Store::load`].
    fn records(&mut self, query: &RecordQuery) -> Result<Vec<Record>, StoreError>;

    /// Keeps a line as it is now, and is how it is read from then on; the next [`Store::commit`] makes it last,
    /// [`Store::roll_back`] takes it back. A line that has any of its addresses is put before it, without them.
    ///
    /// # Errors
    /// Where it can't be written; everything since the last commit is then taken back.
    fn put_subscriber(&mut self, subscriber: &Subscriber) -> Result<(), StoreError>;

    /// Takes back everything since the last [`Store::commit`].
    fn roll_back(&mut self);

    /// What is known of a line.
    ///
    /// # Errors
    /// As [`Store::load`].
    fn subscriber(&mut self, line: &Name) -> Result<Option<Subscriber>, StoreError>;

    /// Lines that have any address of a prefix.
    ///
    /// # Errors
    /// As [`Store::load`].
    fn subscribers_within(&mut self, prefix: &IpNet) -> Result<Vec<Subscriber>, StoreError>;

    /// Lines that are up at a BRAS, as a source tells.
    ///
    /// # Errors
    /// As [`Store::load`].
    fn subscribers_at(&mut self, bras: &str, source: Option<&Name>) -> Result<Vec<Subscriber>, StoreError>;

    /// Lines that are looked for, in the order of their last changes.
    ///
    /// # Errors
    /// As [`Store::load`].
    fn subscribers(&mut self, query: &SubscriberQuery) -> Result<Vec<Subscriber>, StoreError>;

    /// Forgets lines that have been down since before a moment, `most` of them at a time, and says how many.
    ///
    /// # Errors
    /// As [`Store::commit`].
    fn forget_subscribers(&mut self, before: Timestamp, most: u32) -> Result<usize, StoreError>;
}

/// Why the store does not do what was asked. Every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file can't be opened or made.
    #[error("cannot open the store {path}: {reason}")]
    CannotOpen {
        /// The database file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// Another process works with it.
    #[error("the store {path} is in use by another qosd{}; stop that one first", holder.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    InUse {
        /// The database file.
        path: PathBuf,
        /// Who.
        holder: Option<u32>,
    },
    /// Another process holds a write lock for longer than we wait.
    #[error(
        "the store {path} is locked by another program, a `sqlite3` shell perhaps; close it and try again"
    )]
    Locked {
        /// The database file.
        path: PathBuf,
    },
    /// The file is damaged, or no SQLite database at all.
    #[error(
        "the store {path} is damaged: {reason}; move it away and put back a copy, or start with an empty store \
         and grant anew (the programs in the kernel go on as they are until then)"
    )]
    Corrupt {
        /// The database file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file is a database of some other program.
    #[error("{path} is an SQLite database, but not one of qosd's; name another file")]
    Foreign {
        /// The database file.
        path: PathBuf,
    },
    /// The file was written by a later version.
    #[error(
        "the store {path} has schema version {found}, this qosd knows versions up to {known}; start the later qosd"
    )]
    TooNew {
        /// The database file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The last version known.
        known: u32,
    },
    /// The file or its folder can't be written.
    #[error("the store {path} is read-only: {reason}; qosd must be able to write the file and its folder")]
    ReadOnly {
        /// The database file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// No space is left on the disk.
    #[error("no space is left for the store {path}; nothing was changed")]
    Full {
        /// The database file.
        path: PathBuf,
    },
    /// A row holds what no decision can have written.
    #[error("the store {path}, table {table}, row {key}: {reason}")]
    BadRow {
        /// The database file.
        path: PathBuf,
        /// The table.
        table: &'static str,
        /// The row's key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// SQLite refuses for another reason.
    #[error("the store {path}: {action}: {source}")]
    Sqlite {
        /// The database file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// What SQLite said.
        source: rusqlite::Error,
    },
}
