//! Lines that sources tell of, in the tables `subscribers` and `subscriber_addresses`.
//!
//! Prefixes of lines never overlap, so the line of an address is the one whose prefix begins last at or before
//! it, if it ends at or after it: one step in a B-tree, whatever the number of lines.

use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::sqlite::{Column, Reader, integer, json, option, text, upsert};
use crate::domain::session::link_layer;
use crate::domain::subscriber::Facts;
use crate::domain::{BitsPerSecond, Directed, Name, Subscriber};
use crate::manager::subscriber::SubscriberQuery;

/// Condition and values that find lines.
pub(super) struct Search {
    condition: String,
    values: Vec<Value>,
}

impl Search {
    pub(super) fn of_line(line: &Name) -> Self {
        Self { condition: "line = ?1".to_owned(), values: vec![text(line)] }
    }

    /// Lines that have any address of a prefix. Where it is one address, it is at most one.
    pub(super) fn within(prefix: &IpNet) -> Self {
        // Those before the last that begins before the end are before it as a whole, or overlap too.
        let (first, last) = span(prefix);
        let condition = "id IN (
            SELECT subscriber FROM (
                SELECT last, subscriber FROM subscriber_addresses WHERE first <= ?1 ORDER BY first DESC LIMIT 1
            ) WHERE last >= ?1
            UNION ALL
            SELECT subscriber FROM subscriber_addresses WHERE first > ?1 AND first <= ?2)";
        Self { condition: condition.to_owned(), values: vec![Value::Blob(first), Value::Blob(last)] }
    }

    /// Lines that are up at a BRAS, as a source tells.
    pub(super) fn at_bras(bras: &str, source: Option<&Name>) -> Self {
        Self {
            condition: "bras = ?1 AND source IS ?2 AND down_since IS NULL".to_owned(),
            values: vec![text(bras), option(source, text)],
        }
    }

    pub(super) fn of_query(query: &SubscriberQuery) -> Self {
        let SubscriberQuery { address, line, bras, source, up, after, limit } = query;
        let mut found = Self { condition: "true".to_owned(), values: Vec::new() };
        if let Some(address) = address {
            found = Self::within(&IpNet::from(*address));
        }
        let mut add = |condition: &str, value: Value| {
            found.values.push(value);
            found.condition.push_str(&format!(" AND {condition} ?{}", found.values.len()));
        };
        if let Some(line) = line {
            add("line =", text(line));
        }
        if let Some(bras) = bras {
            add("bras =", text(bras));
        }
        if let Some(source) = source {
            add("source =", text(source));
        }
        add("sequence >", integer(*after));
        if let Some(up) = up {
            found.condition.push_str(if *up {
                " AND down_since IS NULL"
            } else {
                " AND down_since IS NOT NULL"
            });
        }
        let limit = limit.unwrap_or(SubscriberQuery::MOST);
        found.condition.push_str(&format!(" ORDER BY sequence LIMIT {limit}"));
        found
    }

    pub(super) fn statement(&self) -> String {
        format!("SELECT * FROM subscribers WHERE {}", self.condition)
    }

    pub(super) fn values(&self) -> &[Value] {
        &self.values
    }
}

/// The first and the last address, so that they compare as bytes: 4 or 6, and the address.
fn span(prefix: &IpNet) -> (Vec<u8>, Vec<u8>) {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => [&[4], &address.octets()[..]].concat(),
        IpAddr::V6(address) => [&[6], &address.octets()[..]].concat(),
    };
    (bytes(prefix.network()), bytes(prefix.broadcast()))
}

/// Writes a line. Those that have any of its addresses are written first, without them.
pub(super) fn put(connection: &Connection, subscriber: &Subscriber, sequence: u64) -> rusqlite::Result<()> {
    let known = connection
        .prepare_cached("SELECT id, addresses FROM subscribers WHERE line = ?1")?
        .query_row([subscriber.line.as_str()], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?)))
        .optional()?;
    upsert(connection, "subscribers", &["line"], columns(subscriber, sequence))?;
    let id = known.as_ref().map_or_else(|| connection.last_insert_rowid(), |(id, _)| *id);
    if let Some((_, before)) = known {
        if Value::Text(before) == json(&subscriber.facts.addresses) {
            return Ok(());
        }
        connection.prepare_cached("DELETE FROM subscriber_addresses WHERE subscriber = ?1")?.execute([id])?;
    }
    let mut insert = connection.prepare_cached("INSERT INTO subscriber_addresses VALUES (?1, ?2, ?3)")?;
    for prefix in &subscriber.facts.addresses {
        let (first, last) = span(prefix);
        insert.execute(params![first, last, id])?;
    }
    Ok(())
}

/// Forgets lines that have been down since before a moment; those that changed longest ago are looked at first,
/// `most` of them. Returns how many were forgotten.
pub(super) fn forget(connection: &Connection, before: Timestamp, most: u32) -> rusqlite::Result<usize> {
    let mut find = connection.prepare_cached(
        // The last change stays, so that those who follow the changes never see an earlier place again.
        "SELECT id FROM subscribers WHERE down_since IS NOT NULL AND unixepoch(down_since) < ?1
         AND sequence < (SELECT max(sequence) FROM subscribers) ORDER BY sequence LIMIT ?2",
    )?;
    let ids = find.query_map(params![before.as_second(), most], |row| row.get(0))?;
    let ids = ids.collect::<rusqlite::Result<Vec<i64>>>()?;
    for id in &ids {
        connection.prepare_cached("DELETE FROM subscriber_addresses WHERE subscriber = ?1")?.execute([id])?;
        connection.prepare_cached("DELETE FROM subscribers WHERE id = ?1")?.execute([id])?;
    }
    Ok(ids.len())
}

fn columns(subscriber: &Subscriber, sequence: u64) -> Vec<Column> {
    let Subscriber { line, source, key, facts, started_at, seen_at, down_since, reason, sequence: _ } =
        subscriber;
    vec![
        ("line", text(line)),
        ("source", option(source.as_ref(), text)),
        ("key", option(key.as_ref(), text)),
        ("addresses", json(&facts.addresses)),
        ("rate_up", option(facts.rate.up, |rate| integer(rate.0))),
        ("rate_down", option(facts.rate.down, |rate| integer(rate.0))),
        ("link_layer", text(link_layer::name(facts.link_layer))),
        ("overhead", option(facts.overhead, |overhead| Value::Integer(overhead.into()))),
        ("delay_us", integer(facts.delay_us.into())),
        ("loss_ppm", integer(facts.loss_ppm.into())),
        ("segments", json(&facts.segments)),
        ("bras", option(facts.bras.as_ref(), text)),
        ("started_at", text(started_at)),
        ("seen_at", text(seen_at)),
        ("down_since", option(down_since.as_ref(), text)),
        ("reason", option(reason.as_ref(), text)),
        ("sequence", integer(sequence)),
    ]
}

pub(super) fn read(row: &Reader<'_, '_>) -> Result<Subscriber, String> {
    let layer: String = row.get("link_layer")?;
    let Directed { up, down }: Directed<Option<BitsPerSecond>> = row.rates("rate_up", "rate_down")?;
    Ok(Subscriber {
        line: row.parse("line")?,
        source: row.parse_option("source")?,
        key: row.get("key")?,
        facts: Facts {
            addresses: row.json("addresses")?,
            rate: Directed { up, down },
            link_layer: link_layer::named(&layer).ok_or("column link_layer: not known")?,
            overhead: row.number_option("overhead")?,
            delay_us: row.number("delay_us")?,
            loss_ppm: row.number("loss_ppm")?,
            segments: row.json("segments")?,
            bras: row.get("bras")?,
        },
        started_at: row.parse("started_at")?,
        seen_at: row.parse("seen_at")?,
        down_since: row.parse_option("down_since")?,
        reason: row.get("reason")?,
        sequence: row.number("sequence")?,
    })
}
