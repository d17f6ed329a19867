//! The three kinds of database. SQLite is read by the library that the daemon's own state is in, since a program has
//! room for one; the others by sqlx.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::OpenFlags;
use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlRow};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgRow};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Executor as _, Row as _};

use super::row::Row;
use super::{Kind, Url};

/// How long a database may take for one answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long FreeRADIUS may keep a SQLite database locked.
const LOCKED_FOR: Duration = Duration::from_secs(10);

/// Why the database was not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum DatabaseError {
    #[error("cannot open {}: {source}", path.display())]
    Open { path: PathBuf, source: rusqlite::Error },
    #[error("cannot connect: {0}")]
    Connect(#[source] sqlx::Error),
    #[error("cannot read: {0}")]
    Query(#[from] sqlx::Error),
    #[error("cannot read: {0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Slow,
    #[error("the reader ended by an error in qosd")]
    Panicked,
}

/// A connection. It can't write.
pub(super) enum Database {
    Sqlite(Arc<Mutex<rusqlite::Connection>>),
    Postgres(Box<PgConnection>),
    MySql(Box<MySqlConnection>),
}

/// Whether a driver can read the URL.
pub(super) fn check(url: &Url) -> Result<(), String> {
    match url.kind {
        Kind::Sqlite => {
            let path = sqlite_path(url);
            if path.is_absolute() {
                return Ok(());
            }
            Err("expected an absolute path, such as sqlite:///var/lib/freeradius/radius.sqlite".to_owned())
        }
        Kind::Postgres => postgres(url).map(|_| ()).map_err(|error| error.to_string()),
        Kind::MySql => mysql(url).map(|_| ()).map_err(|error| error.to_string()),
    }
}

fn sqlite_path(url: &Url) -> PathBuf {
    let path = url.text.text().trim_start_matches("sqlite:");
    path.strip_prefix("//").unwrap_or(path).into()
}

fn postgres(url: &Url) -> Result<PgConnectOptions, sqlx::Error> {
    let options: PgConnectOptions = url.text.text().parse()?;
    Ok(options.application_name("qosd").disable_statement_logging())
}

fn mysql(url: &Url) -> Result<MySqlConnectOptions, sqlx::Error> {
    let options: MySqlConnectOptions = url.text.text().parse()?;
    // FreeRADIUS writes times in the zone of the server, in which they have to be read.
    Ok(options.timezone(None).disable_statement_logging())
}

impl Database {
    /// Connects, for reading only.
    ///
    /// # Errors
    /// Where it can't.
    pub(super) async fn connect(url: &Url) -> Result<Self, DatabaseError> {
        within_patience(async {
            match url.kind {
                Kind::Sqlite => {
                    let path = sqlite_path(url);
                    let open = move || {
                        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
                        let connection = rusqlite::Connection::open_with_flags(&path, flags);
                        let connection =
                            connection.and_then(|open| open.busy_timeout(LOCKED_FOR).map(|()| open));
                        connection.map_err(|source| DatabaseError::Open { path, source })
                    };
                    let connection =
                        tokio::task::spawn_blocking(open).await.map_err(|_| DatabaseError::Panicked)??;
                    Ok(Self::Sqlite(Arc::new(Mutex::new(connection))))
                }
                Kind::Postgres => {
                    let mut connection = postgres(url)
                        .map_err(DatabaseError::Connect)?
                        .connect()
                        .await
                        .map_err(DatabaseError::Connect)?;
                    connection.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY").await?;
                    Ok(Self::Postgres(Box::new(connection)))
                }
                Kind::MySql => {
                    let mut connection = mysql(url)
                        .map_err(DatabaseError::Connect)?
                        .connect()
                        .await
                        .map_err(DatabaseError::Connect)?;
                    connection.execute("SET SESSION TRANSACTION READ ONLY").await?;
                    Ok(Self::MySql(Box::new(connection)))
                }
            }
        })
        .await
    }

    /// Runs a statement with texts bound to it. Its columns are text.
    ///
    /// # Errors
    /// Where the database does not answer, or refuses it.
    pub(super) async fn query(&mut self, statement: &str, texts: &[&str]) -> Result<Vec<Row>, DatabaseError> {
        // Names in it were checked and quoted, and nothing else in it is from outside.
        let safe = AssertSqlSafe(statement.to_owned());
        within_patience(async {
            match self {
                Self::Sqlite(connection) => {
                    let connection = Arc::clone(connection);
                    let texts: Vec<_> = texts.iter().map(|text| (*text).to_owned()).collect();
                    let statement = statement.to_owned();
                    let read = move || {
                        let connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
                        sqlite_rows(&connection, &statement, &texts)
                    };
                    Ok(tokio::task::spawn_blocking(read).await.map_err(|_| DatabaseError::Panicked)??)
                }
                Self::Postgres(connection) => {
                    let query = sqlx::query(safe).persistent(false);
                    let query = texts.iter().fold(query, |query, text| query.bind((*text).to_owned()));
                    let rows = query.fetch_all(&mut **connection).await?;
                    rows.iter().map(postgres_row).collect()
                }
                Self::MySql(connection) => {
                    let query = sqlx::query(safe).persistent(false);
                    let query = texts.iter().fold(query, |query, text| query.bind((*text).to_owned()));
                    let rows = query.fetch_all(&mut **connection).await?;
                    rows.iter().map(mysql_row).collect()
                }
            }
        })
        .await
    }
}

async fn within_patience<T>(
    work: impl Future<Output = Result<T, DatabaseError>>,
) -> Result<T, DatabaseError> {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or(Err(DatabaseError::Slow))
}

fn sqlite_rows(
    connection: &rusqlite::Connection,
    statement: &str,
    texts: &[String],
) -> rusqlite::Result<Vec<Row>> {
    let mut prepared = connection.prepare(statement)?;
    let columns = prepared.column_count();
    let rows = prepared.query_map(rusqlite::params_from_iter(texts), |row| {
        (0..columns).map(|column| row.get(column)).collect::<Result<_, _>>().map(Row)
    })?;
    rows.collect()
}

fn postgres_row(row: &PgRow) -> Result<Row, DatabaseError> {
    Ok(Row((0..row.len()).map(|column| row.try_get(column)).collect::<Result<_, _>>()?))
}

fn mysql_row(row: &MySqlRow) -> Result<Row, DatabaseError> {
    Ok(Row((0..row.len()).map(|column| row.try_get(column)).collect::<Result<_, _>>()?))
}
