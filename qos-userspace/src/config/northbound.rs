//! `[northbound]`: the API for providers, over TLS.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use hyper::http::uri::Scheme;
use toml::de::DeValue;

use super::{ConfigError, Reading, Section, absolute_path, text, time, within};
use crate::domain::Name;

const DEFAULT_REFRESH: Duration = Duration::from_secs(15 * 60);
const DEFAULT_LEEWAY: Duration = Duration::from_secs(30);
const DEFAULT_READ_SCOPE: &str = "qos:read";
const DEFAULT_WRITE_SCOPE: &str = "qos:write";
const DEFAULT_RATE: u32 = 50;
const DEFAULT_BURST: u32 = 100;
const DEFAULT_HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const DEFAULT_BODY_TIMEOUT: Duration = Duration::from_secs(30);
const DEFAULT_ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A grant with 4,096 selectors takes about half of it.
const DEFAULT_MAX_BODY: u32 = 1 << 20;
const DEFAULT_MAX_CONNECTIONS: u32 = 1_024;
const DEFAULT_MAX_CONNECTIONS_PER_ADDRESS: u32 = 64;

const RATES: RangeInclusive<u32> = 1..=1_000_000;
const BODIES: RangeInclusive<u32> = 1_024..=1 << 20;
const CONNECTIONS: RangeInclusive<u32> = 1..=65_536;
/// Characters of the text that names a client, an issuer, an audience or a scope.
const LONGEST_WORD: usize = 256;

/// The API for providers, over TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Northbound {
    /// Where it listens: one address or more.
    pub listen: Vec<SocketAddr>,
    /// What it shows to be; none: a self-signed certificate that it makes itself.
    pub certificate: Option<Certificate>,
    /// Which tokens it takes; none: API keys only.
    pub tokens: Option<Tokens>,
    /// The scope of a token that may look.
    pub read_scope: String,
    /// The scope of a token that may change something.
    pub write_scope: String,
    /// Requests a second that each provider may make.
    pub rate: u32,
    /// Requests that a provider may make at once.
    pub burst: u32,
    /// Time for the TLS handshake, for the header of a request, and between two requests.
    pub header_timeout: Duration,
    /// Time for the body of a request.
    pub body_timeout: Duration,
    /// Time for which a client may take nothing of its answer.
    pub answer_timeout: Duration,
    /// Largest body of a request, in bytes.
    pub max_body: u32,
    /// Most connections at once.
    pub max_connections: u32,
    /// Most of them from one address; of IPv6, from one /64.
    pub max_connections_per_address: u32,
    /// Who may show a token.
    pub clients: Vec<ClientConfig>,
}

/// A certificate and its key, as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The certificate and those that lead to its root.
    pub chain: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// Which tokens are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Where the keys are that tokens are signed with.
    pub jwks: JwksSource,
    /// PEM file with authorities that the URL is trusted by besides the system's.
    pub ca: Option<PathBuf>,
    /// Time after which the keys are read again.
    pub refresh: Duration,
    /// The `iss` that tokens must have; none: any.
    pub issuer: Option<String>,
    /// The `aud` that tokens must have.
    pub audience: String,
    /// By how much the clocks of issuer and daemon may differ.
    pub leeway: Duration,
}

/// Where a JSON Web Key Set is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JwksSource {
    /// A file.
    File(PathBuf),
    /// An https URL.
    Url(Uri),
}

/// A client that tokens name, and what it asks as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// `client_id`, `azp` or `sub` of its tokens.
    pub id: String,
    /// The provider whose it is.
    pub provider: Name,
    /// The one application that it may ask for; none: for all.
    pub application: Option<Name>,
}

impl std::fmt::Display for JwksSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Url(url) => url.fmt(f),
        }
    }
}

impl Northbound {
    /// Keys that differ and that a daemon which runs can change; `listen` it can't.
    pub(super) fn differences(&self, other: &Self) -> Vec<String> {
        let named = [
            ("certificate", self.certificate != other.certificate),
            ("jwks", self.tokens != other.tokens),
            ("client", self.clients != other.clients),
            ("scopes", (&self.read_scope, &self.write_scope) != (&other.read_scope, &other.write_scope)),
            ("rate", (self.rate, self.burst) != (other.rate, other.burst)),
            ("timeouts", self.timeouts() != other.timeouts()),
            ("max_body", self.max_body != other.max_body),
            (
                "max_connections",
                (self.max_connections, self.max_connections_per_address)
                    != (other.max_connections, other.max_connections_per_address),
            ),
        ];
        named.iter().filter(|(_, differs)| *differs).map(|(name, _)| format!("northbound {name}")).collect()
    }

    const fn timeouts(&self) -> [Duration; 3] {
        [self.header_timeout, self.body_timeout, self.answer_timeout]
    }
}

pub(super) fn read(top: &mut Section<'_>) -> Result<Option<Northbound>, ConfigError> {
    let Some(mut section) = top.table("northbound", "[northbound]")? else { return Ok(None) };
    let clients = read_clients(&mut section)?;
    let listen = section.required("listen", "addresses with ports, such as [\"0.0.0.0:8443\"]", listen)?;
    let chain = section.optional("certificate", absolute_path)?;
    let key = section.optional("key", absolute_path)?;
    let certificate = match (chain, key) {
        (Some(chain), Some(key)) => Some(Certificate { chain, key }),
        (Some(_), None) => return Err(section.missing("key", "the private key of `certificate`, a PEM file")),
        (None, Some(_)) => return Err(section.missing("certificate", "that of `key`, a PEM file")),
        (None, None) => None,
    };
    let tokens = read_tokens(&mut section)?;
    if tokens.is_none() && !clients.is_empty() {
        return Err(section.missing("jwks", "[[northbound.client]] is about who shows tokens"));
    }
    let mut number = |key, range: &RangeInclusive<u32>, what, default: u32| {
        section.optional(key, |value| within(value, range, what)).map(|number| number.unwrap_or(default))
    };
    let rate = number("rate", &RATES, "requests a second", DEFAULT_RATE)?;
    let burst = number("burst", &RATES, "requests", DEFAULT_BURST)?;
    let max_body = number("max_body", &BODIES, "bytes", DEFAULT_MAX_BODY)?;
    let max_connections = number("max_connections", &CONNECTIONS, "connections", DEFAULT_MAX_CONNECTIONS)?;
    let max_connections_per_address = number(
        "max_connections_per_address",
        &CONNECTIONS,
        "connections",
        DEFAULT_MAX_CONNECTIONS_PER_ADDRESS,
    )?;
    let mut wait = |key, default| section.optional(key, patience).map(|time| time.unwrap_or(default));
    let header_timeout = wait("header_timeout", DEFAULT_HEADER_TIMEOUT)?;
    let body_timeout = wait("body_timeout", DEFAULT_BODY_TIMEOUT)?;
    let answer_timeout = wait("answer_timeout", DEFAULT_ANSWER_TIMEOUT)?;
    let read_scope = section.optional("read_scope", word)?;
    let write_scope = section.optional("write_scope", word)?;
    section.finish()?;
    Ok(Some(Northbound {
        listen,
        certificate,
        tokens,
        read_scope: read_scope.unwrap_or_else(|| DEFAULT_READ_SCOPE.to_owned()),
        write_scope: write_scope.unwrap_or_else(|| DEFAULT_WRITE_SCOPE.to_owned()),
        rate,
        burst,
        header_timeout,
        body_timeout,
        answer_timeout,
        max_body,
        max_connections,
        max_connections_per_address,
        clients,
    }))
}

fn read_tokens(section: &mut Section<'_>) -> Result<Option<Tokens>, ConfigError> {
    let jwks = section.optional("jwks", jwks)?;
    let ca = section.optional("jwks_ca", absolute_path)?;
    let refresh = section.optional("jwks_refresh", refresh)?;
    let issuer = section.optional("issuer", word)?;
    let audience = section.optional("audience", word)?;
    let leeway = section.optional("leeway", leeway)?;
    let Some(jwks) = jwks else {
        let is_for_tokens =
            ca.is_some() || refresh.is_some() || issuer.is_some() || audience.is_some() || leeway.is_some();
        return match is_for_tokens {
            true => Err(section.missing("jwks", "the keys of tokens: a file, or an https URL")),
            false => Ok(None),
        };
    };
    let audience = audience.ok_or_else(|| {
        section.missing("audience", "the `aud` of tokens for this API: others are for somebody else")
    })?;
    Ok(Some(Tokens {
        jwks,
        ca,
        refresh: refresh.unwrap_or(DEFAULT_REFRESH),
        issuer,
        audience,
        leeway: leeway.unwrap_or(DEFAULT_LEEWAY),
    }))
}

fn read_clients(section: &mut Section<'_>) -> Result<Vec<ClientConfig>, ConfigError> {
    let mut clients = Vec::<ClientConfig>::new();
    for mut client in section.tables("client", "[[northbound.client]]")? {
        let id = client.required("id", "`client_id`, `azp` or `sub` of its tokens", |value| {
            let id = word(value)?;
            if id.starts_with("key:") {
                return Err("what begins with key: are API keys".to_owned());
            }
            if clients.iter().any(|other| other.id == id) {
                return Err("this client is there twice".to_owned());
            }
            Ok(id)
        })?;
        let provider = client.required("provider", "the provider whose client it is", name)?;
        let application = client.optional("application", name)?;
        client.finish()?;
        clients.push(ClientConfig { id, provider, application });
    }
    Ok(clients)
}

fn listen(value: &DeValue<'_>) -> Reading<Vec<SocketAddr>> {
    let array = value.as_array().filter(|array| !array.is_empty());
    let array = array.ok_or_else(|| "expected a list of addresses with ports [ … ]".to_owned())?;
    let address = |value: &DeValue<'_>| {
        text(value)?
            .parse()
            .map_err(|_| "expected addresses with ports: 192.0.2.1:8443, [::]:8443".to_owned())
    };
    array.iter().map(|item| address(item.get_ref())).collect()
}

fn jwks(value: &DeValue<'_>) -> Reading<JwksSource> {
    let written = text(value)?;
    if written.starts_with('/') {
        return absolute_path(value).map(JwksSource::File);
    }
    let url = written.parse::<Uri>().ok().filter(|url| url.scheme() == Some(&Scheme::HTTPS));
    url.filter(|url| url.host().is_some_and(|host| !host.is_empty()))
        .map(JwksSource::Url)
        .ok_or_else(|| "expected a path that begins with /, or a URL that begins with https://".to_owned())
}

fn word(value: &DeValue<'_>) -> Reading<String> {
    let word = text(value)?;
    let is_word =
        word.len() <= LONGEST_WORD && !word.is_empty() && word.bytes().all(|b| b.is_ascii_graphic());
    if is_word {
        Ok(word.to_owned())
    } else {
        Err(format!("expected 1 to {LONGEST_WORD} printable characters without spaces"))
    }
}

fn name(value: &DeValue<'_>) -> Reading<Name> {
    text(value)?.parse().map_err(|error: crate::domain::name::NameError| error.to_string())
}

fn refresh(value: &DeValue<'_>) -> Reading<Duration> {
    let range = Duration::from_secs(60)..=Duration::from_secs(24 * 3_600);
    time(value, &range).ok_or_else(|| "expected a time from 1m to 24h, such as \"15m\"".to_owned())
}

fn leeway(value: &DeValue<'_>) -> Reading<Duration> {
    let range = Duration::ZERO..=Duration::from_secs(300);
    time(value, &range).ok_or_else(|| "expected a time from 0s to 5m, such as \"30s\"".to_owned())
}

fn patience(value: &DeValue<'_>) -> Reading<Duration> {
    let range = Duration::from_millis(100)..=Duration::from_secs(600);
    time(value, &range).ok_or_else(|| "expected a time from 100ms to 10m, such as \"10s\"".to_owned())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    const INTERFACES: &str = "
[[interface]]
name = 'eth0'
role = 'lan'
capacity = '1G'
[[interface]]
name = 'eth1'
role = 'wan'
capacity = '1G'
";

    fn parse(northbound: &str) -> Result<Config, ConfigError> {
        Config::parse(&format!("{northbound}\n{INTERFACES}"), Path::new("qos.toml"))
    }

    fn northbound(text: &str) -> Northbound {
        parse(text).expect("valid").northbound.expect("there")
    }

    #[test]
    fn an_address_is_enough() {
        assert_eq!(parse("").expect("valid").northbound, None);
        let least = northbound("[northbound]\nlisten = ['127.0.0.1:8443', '[::1]:8443']");
        assert_eq!((least.listen.len(), least.certificate, least.tokens), (2, None, None));
        assert_eq!((least.rate, least.burst, least.max_body), (50, 100, 1 << 20));
    }

    #[test]
    fn the_part_of_the_example_that_is_commented_out_loads_and_shows_every_key() {
        let example = include_str!("../../../docs/qos.example.toml");
        let (_, commented) = example.split_once("# [northbound]").expect("it is there");
        let commented: String = format!("# [northbound]{commented}")
            .lines()
            .filter(|line| line.contains(" = ") || line.starts_with("# ["))
            .filter_map(|line| line.strip_prefix("# "))
            .fold(String::new(), |text, line| text + line + "\n");
        let found = northbound(&commented);
        assert_eq!(found.clients.len(), 2, "{commented}");
        let defaults = northbound("[northbound]\nlisten = ['[::]:8443']");
        assert_eq!(
            (found.rate, found.burst, found.timeouts()),
            (defaults.rate, defaults.burst, defaults.timeouts())
        );
        assert_eq!((found.read_scope, found.write_scope), (defaults.read_scope, defaults.write_scope));
        let tokens = found.tokens.expect("tokens");
        assert_eq!((tokens.refresh, tokens.leeway), (DEFAULT_REFRESH, DEFAULT_LEEWAY));
        for key in [
            "listen",
            "certificate",
            "key",
            "jwks",
            "jwks_ca",
            "jwks_refresh",
            "issuer",
            "audience",
            "leeway",
            "read_scope",
            "write_scope",
            "rate",
            "burst",
            "header_timeout",
            "body_timeout",
            "answer_timeout",
            "max_body",
            "max_connections",
            "max_connections_per_address",
            "id",
            "provider",
            "application",
        ] {
            assert!(commented.lines().any(|line| line.starts_with(&format!("{key} = "))), "{key}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let with = |line: &str| format!("[northbound]\nlisten = ['127.0.0.1:8443']\n{line}");
        for (text, expected) in [
            ("northbound = 3".to_owned(), "northbound = 3: expected a table [northbound]"),
            ("[northbound]".to_owned(), "`listen` is missing in [northbound]"),
            ("[northbound]\nlisten = []".to_owned(), "expected a list of addresses with ports"),
            ("[northbound]\nlisten = ['here']".to_owned(), "expected addresses with ports"),
            (with("certificate = '/c.pem'"), "`key` is missing in [northbound]"),
            (with("key = '/k.pem'"), "`certificate` is missing in [northbound]"),
            (with("jwks = 'http://a/b'\naudience = 'qos'"), "a URL that begins with https://"),
            (with("jwks = 'https://a/b'"), "`audience` is missing in [northbound]"),
            (with("issuer = 'https://a'"), "`jwks` is missing in [northbound]"),
            (with("[[northbound.client]]\nid = 'a'\nprovider = 'b'"), "`jwks` is missing in [northbound]"),
            (with("[[northbound.client]]\nid = 'key:1'\nprovider = 'b'"), "are API keys"),
            (with("[[northbound.client]]\nid = 'a b'\nprovider = 'b'"), "without spaces"),
            (with("[[northbound.client]]\nid = 'a'"), "`provider` is missing in [[northbound.client]]"),
            (
                with(
                    "[[northbound.client]]\nid='a'\nprovider='b'\n[[northbound.client]]\nid='a'\nprovider='c'",
                ),
                "this client is there twice",
            ),
            (with("rate = 0"), "expected a number of requests a second from 1 to"),
            (with("header_timeout = '1h'"), "expected a time from 100ms to 10m"),
            (with("max_boddy = 3"), "did you mean `max_body`?"),
        ] {
            let error = parse(&text).expect_err(expected).to_string();
            assert!(error.contains(expected), "{text}\n  expected {expected}\n  got      {error}");
        }
    }

    #[test]
    fn the_address_needs_a_restart_and_the_rest_does_not() {
        let one = parse("[northbound]\nlisten = ['127.0.0.1:8443']").expect("valid");
        let other = parse("[northbound]\nlisten = ['127.0.0.1:8444']\nrate = 7").expect("valid");
        let found = one.differences(&other);
        assert_eq!(
            (found.restart, found.live),
            (vec!["northbound listen".to_owned()], vec!["northbound rate".to_owned()])
        );
        let none = parse("").expect("valid");
        assert_eq!(none.differences(&one).restart, ["northbound"]);
    }
}
