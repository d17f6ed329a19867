//! The tables that say which sources there are: `[radius]` and `[radacct]`.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use ipnet::IpNet;

use super::{ConfigError, DeValue, Reading, Section, absolute_path, interval, one_of, text};
use crate::domain::Name;
use crate::source::accounting::LineAttribute;
use crate::source::radacct::{Columns, Identifier, RadacctConfig, Url};
use crate::source::server::{PORT, RadiusClient};
use crate::source::{RadiusConfig, Secret};

const DEFAULT_POLL: std::time::Duration = std::time::Duration::from_secs(10);

/// Reads `[radius]`, if it is there.
pub(super) fn radius(top: &mut Section<'_>) -> Result<Option<RadiusConfig>, ConfigError> {
    let Some(mut section) = top.table("radius", "[radius]")? else { return Ok(None) };
    let listen = section.required("listen", "addresses of this machine, such as [\"192.0.2.1\"]", |value| {
        some(value, listen)
    })?;
    let line = section.optional("line", |value| some(value, line_attribute))?;
    let source = section.optional("source", name)?;
    let mut clients = Vec::<RadiusClient>::new();
    for mut client in section.tables("client", "[[radius.client]]")? {
        let address = client.required("address", "an address or prefix of who may send", |value| {
            let address = prefix(value)?;
            if clients.iter().any(|other| other.address == address) {
                return Err("this address is there twice; each has one [[radius.client]]".to_owned());
            }
            Ok(address)
        })?;
        let secret = secret(&mut client, "secret", "secret_file", "what the client signs with")?;
        client.finish()?;
        clients.push(RadiusClient { address, secret });
    }
    if clients.is_empty() {
        return Err(section.missing("client", "a [[radius.client]] table for each that may send"));
    }
    section.finish()?;
    Ok(Some(RadiusConfig {
        listen,
        clients,
        line: line.unwrap_or_else(|| vec![LineAttribute::UserName]),
        source: default_name(source, "radius"),
    }))
}

/// Reads `[radacct]`, if it is there.
pub(super) fn radacct(top: &mut Section<'_>) -> Result<Option<RadacctConfig>, ConfigError> {
    let Some(mut section) = top.table("radacct", "[radacct]")? else { return Ok(None) };
    let url = match section.optional("url", |value| Url::read(text(value)?))? {
        Some(url) => url,
        None => section.required("url_file", "or `url`: where the database is", |value| {
            Url::read(&first_line(&absolute_path(value)?)?)
        })?,
    };
    let mut column = |key, default: &'static str| -> Result<Identifier, ConfigError> {
        let read = section.optional(key, |value| Identifier::read(text(value)?))?;
        Ok(read.unwrap_or_else(|| Identifier::known(default)))
    };
    let (id, key) = (column("id_column", "radacctid")?, column("key_column", "acctuniqueid")?);
    let (line, bras) = (column("line_column", "username")?, column("bras_column", "nasipaddress")?);
    let start = column("start_column", "acctstarttime")?;
    let update = column("update_column", "acctupdatetime")?;
    let stop = column("stop_column", "acctstoptime")?;
    let mut optional = |key, default: Option<&'static str>| -> Result<Option<Identifier>, ConfigError> {
        let read = section.optional(key, |value| match text(value)? {
            "" => Ok(None),
            name => Identifier::read(name).map(Some),
        })?;
        Ok(read.unwrap_or_else(|| default.map(Identifier::known)))
    };
    let columns = Columns {
        id,
        key,
        line,
        bras,
        start,
        update,
        stop,
        address: optional("address_column", Some("framedipaddress"))?,
        ipv6_address: optional("ipv6_address_column", Some("framedipv6address"))?,
        ipv6_prefix: optional("ipv6_prefix_column", Some("framedipv6prefix"))?,
        delegated_prefix: optional("delegated_prefix_column", Some("delegatedipv6prefix"))?,
        rate_up: optional("rate_up_column", None)?,
        rate_down: optional("rate_down_column", None)?,
    };
    let rate_unit = section.optional("rate_unit", |value| {
        one_of(value, &[("bit/s", 1), ("kbit/s", 1_000), ("Mbit/s", 1_000_000)])
    })?;
    let table = section.optional("table", |value| Identifier::read_path(text(value)?))?;
    let poll = section.optional("poll", interval)?;
    let source = section.optional("source", name)?;
    section.finish()?;
    Ok(Some(RadacctConfig {
        url,
        poll: poll.unwrap_or(DEFAULT_POLL),
        table: table.unwrap_or_else(|| vec![Identifier::known("radacct")]),
        columns,
        rate_unit: rate_unit.unwrap_or(1),
        source: default_name(source, "radacct"),
    }))
}

/// One or several, at least one.
fn some<T>(value: &DeValue<'_>, read: impl Fn(&str) -> Reading<T>) -> Reading<Vec<T>> {
    let Some(array) = value.as_array() else { return Ok(vec![read(text(value)?)?]) };
    if array.is_empty() {
        return Err("expected at least one".to_owned());
    }
    array.iter().map(|item| read(text(item.get_ref())?)).collect()
}

fn listen(text: &str) -> Reading<SocketAddr> {
    let whole = text.parse::<SocketAddr>().ok();
    whole.or_else(|| text.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, PORT))).ok_or_else(
        || format!("`{text}` is no address: expected one such as \"192.0.2.1\" or \"[2001:db8::1]:{PORT}\""),
    )
}

fn line_attribute(text: &str) -> Reading<LineAttribute> {
    let found = LineAttribute::NAMES.iter().find(|(name, _)| *name == text);
    found.map(|(_, attribute)| *attribute).ok_or_else(|| {
        super::suggestion(text, &LineAttribute::NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>())
    })
}

fn name(value: &DeValue<'_>) -> Reading<Name> {
    text(value)?.parse().map_err(|error: crate::domain::name::NameError| error.to_string())
}

fn default_name(name: Option<Name>, default: &str) -> Name {
    name.or_else(|| default.parse().ok()).expect("the default is a name")
}

fn prefix(value: &DeValue<'_>) -> Reading<IpNet> {
    let text = text(value)?;
    let prefix = text.parse::<IpNet>().ok();
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    prefix.or_else(address).ok_or_else(|| "expected an address or prefix".to_owned()).and_then(|prefix| {
        if prefix.trunc() == prefix {
            return Ok(prefix);
        }
        Err(format!("bits behind the prefix are set: did you mean `{}`?", prefix.trunc()))
    })
}

/// What stands in the file itself, or in another one that only the daemon can read.
fn secret(
    section: &mut Section<'_>,
    key: &'static str,
    file_key: &'static str,
    expected: &'static str,
) -> Result<Secret, ConfigError> {
    let filled = |text: &str| match text {
        "" => Err("expected at least one character".to_owned()),
        text => Ok(Secret::from(text.to_owned())),
    };
    if let Some(secret) = section.optional(key, |value| filled(text(value)?))? {
        return Ok(secret);
    }
    let read =
        section.optional(file_key, |value| first_line(&absolute_path(value)?).and_then(|line| filled(&line)))?;
    read.ok_or_else(|| section.missing(key, expected))
}

fn first_line(path: &Path) -> Reading<String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read the file: {error}"))?;
    Ok(text.lines().next().unwrap_or_default().trim_end().to_owned())
}
