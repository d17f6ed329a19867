//! What is asked of the database. Every column comes back as text, times as seconds since 1970, so that what is
//! made of them is the same for each database.

use std::fmt::Write as _;

use jiff::Timestamp;

use super::{Kind, PAGE, RadacctConfig};

/// Longest name of a table or column: that of PostgreSQL.
const LONGEST: usize = 63;

/// The name of a table or column, as the database has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identifier(String);

impl Identifier {
    /// Reads a name: 1 to 63 letters, digits and `_`, no digit first.
    ///
    /// # Errors
    /// Where it is none.
    pub fn read(text: &str) -> Result<Self, String> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let begins = text.bytes().next().is_some_and(|byte| !byte.is_ascii_digit());
        if begins && text.len() <= LONGEST && text.bytes().all(allowed) {
            return Ok(Self(text.to_owned()));
        }
        Err(format!("expected a name of 1 to {LONGEST} of a-z A-Z 0-9 _, no digit first"))
    }

    /// Reads the name of a table, behind that of its schema and a dot where there is one.
    ///
    /// # Errors
    /// Where it is none.
    pub fn read_path(text: &str) -> Result<Vec<Self>, String> {
        let parts: Vec<_> = text.split('.').map(Self::read).collect::<Result<_, _>>()?;
        if parts.len() > 2 {
            return Err("expected the name of a table, or of a schema, a dot and that of a table".to_owned());
        }
        Ok(parts)
    }

    /// One that is known to be a name.
    pub(crate) fn known(name: &'static str) -> Self {
        Self(name.to_owned())
    }
}

impl Kind {
    /// In quotes, so that no name is taken for a word of SQL; there are none in it.
    fn quoted(self, Identifier(name): &Identifier) -> String {
        match self {
            Self::Sqlite | Self::Postgres => format!("\"{name}\""),
            Self::MySql => format!("`{name}`"),
        }
    }

    fn text(self, column: &Identifier) -> String {
        let column = self.quoted(column);
        match self {
            Self::Sqlite | Self::Postgres => format!("CAST({column} AS TEXT)"),
            Self::MySql => format!("CAST({column} AS CHAR)"),
        }
    }

    fn seconds(self, column: &Identifier) -> String {
        let column = self.quoted(column);
        match self {
            // FreeRADIUS writes seconds; other programs write text.
            Self::Sqlite => format!(
                "CASE typeof({column}) WHEN 'text' THEN strftime('%s', {column}) \
                 ELSE CAST(CAST({column} AS INTEGER) AS TEXT) END"
            ),
            Self::Postgres => format!("CAST(CAST(FLOOR(EXTRACT(EPOCH FROM {column})) AS BIGINT) AS TEXT)"),
            Self::MySql => format!("CAST(FLOOR(UNIX_TIMESTAMP({column})) AS CHAR)"),
        }
    }

    /// A moment that a column can be compared with.
    fn moment(self, moment: Timestamp) -> String {
        let seconds = moment.as_second().max(0);
        match self {
            Self::Sqlite => seconds.to_string(),
            Self::Postgres => format!("TO_TIMESTAMP({seconds})"),
            Self::MySql => format!("FROM_UNIXTIME({seconds})"),
        }
    }
}

/// Open sessions with a number above `after`, that were alive then or later.
pub(super) fn opened(config: &RadacctConfig, after: i64, alive_since: Timestamp) -> String {
    let (kind, columns) = (config.url.kind, &config.columns);
    let (update, start) = (kind.quoted(&columns.update), kind.quoted(&columns.start));
    let alive = format!("COALESCE({update}, {start}) >= {}", kind.moment(alive_since));
    sessions(config, after, &alive)
}

/// Open sessions with a number above `after` that were updated then or later.
pub(super) fn updated(config: &RadacctConfig, after: i64, since: Timestamp) -> String {
    let kind = config.url.kind;
    sessions(config, after, &format!("{} >= {}", kind.quoted(&config.columns.update), kind.moment(since)))
}

fn sessions(config: &RadacctConfig, after: i64, which: &str) -> String {
    let (kind, columns) = (config.url.kind, &config.columns);
    let text =
        |column: &Option<_>| column.as_ref().map_or_else(|| "NULL".to_owned(), |column| kind.text(column));
    let (id, stop) = (kind.quoted(&columns.id), kind.quoted(&columns.stop));
    // In the order in which a row is read.
    let selected = [
        kind.text(&columns.id),
        kind.text(&columns.key),
        kind.text(&columns.line),
        kind.text(&columns.bras),
        kind.seconds(&columns.start),
        kind.seconds(&columns.update),
        text(&columns.address),
        text(&columns.ipv6_address),
        text(&columns.ipv6_prefix),
        text(&columns.delegated_prefix),
        text(&columns.rate_up),
        text(&columns.rate_down),
    ];
    format!(
        "SELECT {} FROM {} WHERE {stop} IS NULL AND {id} > {after} AND {which} ORDER BY {id} LIMIT {PAGE}",
        selected.join(", "),
        table(config)
    )
}

/// The number and the end of sessions, of those that are there.
pub(super) fn ends(config: &RadacctConfig, ids: &[i64]) -> String {
    let kind = config.url.kind;
    let id = &config.columns.id;
    let list: Vec<_> = ids.iter().map(ToString::to_string).collect();
    format!(
        "SELECT {}, {} FROM {} WHERE {} IN ({})",
        kind.text(id),
        kind.seconds(&config.columns.stop),
        table(config),
        kind.quoted(id),
        list.join(", ")
    )
}

/// The key and the end of sessions, of those that are there; as many keys are bound.
pub(super) fn ends_by_key(config: &RadacctConfig, keys: usize) -> String {
    let kind = config.url.kind;
    let key = &config.columns.key;
    let mut list = String::new();
    for number in 1..=keys {
        let separator = if number == 1 { "" } else { ", " };
        // Writing to a String does not fail.
        let _ = match kind {
            Kind::Sqlite | Kind::Postgres => write!(list, "{separator}${number}"),
            Kind::MySql => write!(list, "{separator}?"),
        };
    }
    format!(
        "SELECT {}, {} FROM {} WHERE {} IN ({list})",
        kind.text(key),
        kind.seconds(&config.columns.stop),
        table(config),
        kind.quoted(key)
    )
}

fn table(config: &RadacctConfig) -> String {
    let parts: Vec<_> = config.table.iter().map(|part| config.url.kind.quoted(part)).collect();
    parts.join(".")
}
