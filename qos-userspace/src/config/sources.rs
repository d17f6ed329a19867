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
    // First, or its key would be taken for a mistyped other one.
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
    let listen =
        section.required("listen", "addresses of this machine, such as [\"192.0.2.1\"]", |value| {
            some(value, listen)
        })?;
    let line = section.optional("line", |value| some(value, line_attribute))?;
    let source = section.optional("source", name)?;
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
    let read = section
        .optional(file_key, |value| first_line(&absolute_path(value)?).and_then(|line| filled(&line)))?;
    read.ok_or_else(|| section.missing(key, expected))
}

fn first_line(path: &Path) -> Reading<String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read the file: {error}"))?;
    Ok(text.lines().next().unwrap_or_default().trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Config;
    use super::*;

    const INTERFACES: &str = "[[interface]]\nname='a'\nrole='lan'\ncapacity='1G'\n\
                              [[interface]]\nname='b'\nrole='wan'\ncapacity='1G'\n";

    fn parse(text: &str) -> Result<Config, String> {
        let text = format!("{text}\n{INTERFACES}");
        Config::parse(&text, Path::new("qos.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn without_the_tables_there_are_no_sources() {
        let config = parse("").expect("valid");
        assert_eq!((config.radius, config.radacct), (None, None));
    }

    /// What is commented out in the example, as it is.
    #[test]
    fn the_tables_of_the_example_can_be_used() {
        let example = include_str!("../../../docs/qos.example.toml");
        let (_, sources) =
            example.split_once("\n# Sources of subscriber sessions").expect("a part of its own");
        let lines = sources.lines().filter_map(|line| line.strip_prefix("# "));
        let lines: Vec<_> = lines.filter(|line| line.starts_with('[') || line.contains(" = ")).collect();
        let config = parse(&lines.join("\n")).expect("valid");
        let radius = config.radius.expect("there");
        assert_eq!(radius.listen, [SocketAddr::from(([192, 0, 2, 1], 1_813))]);
        assert_eq!((radius.line, radius.clients.len()), (vec![LineAttribute::UserName], 1));
        let mut shown = config.radacct.expect("there");
        assert_eq!(shown.poll, Duration::from_secs(10));
        // All but these are the defaults.
        (shown.columns.rate_up, shown.columns.rate_down) = (None, None);
        let least = format!("[radacct]\nurl = '{}'", "postgresql://qos:…@db.example/radius");
        assert_eq!(parse(&least).expect("valid").radacct, Some(shown));
    }

    #[test]
    fn secrets_may_stand_in_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        std::fs::write(&path, "testing123\n").expect("written");
        let text = format!(
            "[radius]\nlisten = ['::1', '[2001:db8::1]:1646']\n[[radius.client]]\naddress = '::1'\nsecret_file = {path:?}"
        );
        let radius = parse(&text).expect("valid").radius.expect("there");
        assert_eq!(radius.clients[0].secret, Secret::from("testing123".to_owned()));
        assert_eq!(radius.listen[1].port(), 1_646);
        std::fs::write(&path, "sqlite:///radius.sqlite\n").expect("written");
        parse(&format!("[radacct]\nurl_file = {path:?}")).expect("valid").radacct.expect("there");
    }

    #[test]
    fn what_is_wrong_with_a_source_is_said() {
        let client = "[[radius.client]]\naddress = '192.0.2.0/24'\nsecret = 's'";
        let radius = |lines: &str| format!("[radius]\nlisten = '127.0.0.1'\n{lines}");
        for (name, text, expected) in [
            ("no address", format!("[radius]\n{client}"), "`listen` is missing in [radius]"),
            ("no list", format!("[radius]\nlisten = []\n{client}"), "listen = []: expected at least one"),
            ("a host", format!("[radius]\nlisten = 'here'\n{client}"), "`here` is no address"),
            ("no client", radius(""), "`client` is missing in [radius]"),
            ("a strange line", radius(&format!("line = 'user'\n{client}")), "line = 'user': "),
            ("no secret", radius("[[radius.client]]\naddress = '::1'"), "`secret` is missing"),
            (
                "an empty secret",
                radius("[[radius.client]]\naddress = '::1'\nsecret = ''"),
                "at least one character",
            ),
            (
                "no file",
                radius("[[radius.client]]\naddress = '::1'\nsecret_file = '/nowhere'"),
                "cannot read the file",
            ),
            (
                "bits behind",
                radius("[[radius.client]]\naddress = '10.0.0.1/8'\nsecret = 's'"),
                "did you mean `10.0.0.0/8`?",
            ),
            ("twice", radius(&format!("{client}\n{client}")), "this address is there twice"),
            ("no URL", "[radacct]".to_owned(), "`url_file` is missing in [radacct]: or `url`"),
            ("a strange URL", "[radacct]\nurl = 'oracle://x'".to_owned(), "expected the URL of a database"),
            (
                "SQL",
                "[radacct]\nurl = 'sqlite:///r'\ntable = 'a; b'".to_owned(),
                "expected a name of 1 to 63",
            ),
            (
                "no key",
                "[radacct]\nurl = 'sqlite:///r'\nkey_column = ''".to_owned(),
                "expected a name of 1 to 63",
            ),
            (
                "a unit",
                "[radacct]\nurl = 'sqlite:///r'\nrate_unit = 'mbit'".to_owned(),
                "rate_unit = 'mbit': ",
            ),
            ("mistyped", "[radacct]\nurl = 'sqlite:///r'\npol = '1s'".to_owned(), "did you mean `poll`?"),
            ("no table", "radius = 3".to_owned(), "expected a table [radius]"),
        ] {
            let error = parse(&text).expect_err(name);
            assert!(error.contains(expected), "{name}: {error}");
        }
    }
}
