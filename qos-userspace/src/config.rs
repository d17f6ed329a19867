//! The daemon's configuration file: TOML text in, checked values out.
//!
//! Every error names the file, the line, the key and the value. Keys that are not known are errors
//! too: a mistyped limit that silently isn't there is worse than a daemon that doesn't start.
//! What the keys mean to an operator is written in `docs/qos.example.toml`. Whether interfaces exist
//! and the kernel can do what is asked is for [`crate::api::doctor`] to say.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use jiff::SignedDuration;
use nix::unistd::{Group, User};
use qos_common::abi::{MAX_RULES, MAX_RULES_RANGE};
use qos_common::classify::MAX_LIST;
use qos_common::mark::{MIN_BITS, MarkLayout};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::domain::{BitsPerSecond, Directed};
use crate::gateway::{GatewayConfig, InterfaceConfig, Role, TcHooks, XdpChoice};
use crate::manager::capacity::{SLOWEST_LINE, SMALLEST_REST};
use crate::manager::{LineSide, Network, Preempt};
use crate::source::RadiusConfig;
use crate::source::radacct::RadacctConfig;

mod sources;

pub mod northbound;

pub use northbound::Northbound;

/// Where the daemon looks for its configuration unless it is told.
pub const DEFAULT_PATH: &str = "/etc/qos/qos.toml";

/// Where the daemon listens unless it is told.
pub const DEFAULT_SOCKET: &str = "/run/qos/qosd.sock";

const DEFAULT_STATE_DIR: &str = "/var/lib/qos";
const DEFAULT_BPFFS_DIR: &str = "/sys/fs/bpf/qos";
/// The upper 20 bits: the low 12 stay with the operator's own firewall marks.
const DEFAULT_MARK_MASK: u32 = 0xffff_f000;
const DEFAULT_SOFT_SHARE: f64 = 0.95;
/// Twice the longest usual time between interim reports of a BRAS.
const DEFAULT_SESSION_TTL: Duration = Duration::from_secs(3_600);
const DEFAULT_SESSION_GRACE: Duration = Duration::from_secs(300);
const DEFAULT_RECONCILE_INTERVAL: Duration = Duration::from_secs(5);

/// What no sane set of selectors comes near, and a packet can bear: some microseconds.
const DEFAULT_MAX_CHECKS: u32 = 512;
/// From what a list has anyhow to the longest list that the programs read.
const MAX_CHECKS: RangeInclusive<u32> = 16..=MAX_LIST;

/// Slowest and fastest interface, in bit/s: the range in which the kernel's clocks are exact.
const CAPACITIES: RangeInclusive<u64> = 1_000..=400_000_000_000;
/// `IFNAMSIZ` of the kernel without its final zero.
const LONGEST_INTERFACE_NAME: usize = 15;
/// `sun_path` of a Unix socket address (unix(7)) without its final zero.
const LONGEST_SOCKET_PATH: usize = 107;

/// The configuration, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file that it was read from.
    pub path: PathBuf,
    /// Directory of the database and the lock.
    pub state_dir: PathBuf,
    /// The socket that the API is on.
    pub socket: PathBuf,
    /// Who may connect to the socket.
    pub access: Access,
    /// Requests must name the address of a session.
    pub require_session: bool,
    /// Speed of a line whose source tells none.
    pub line_rate: Directed<Option<BitsPerSecond>>,
    /// Time after its last sign of life for which a reported session counts as up.
    pub session_ttl: Duration,
    /// Time for which what is granted on a line outlives it.
    pub session_grace: Duration,
    /// Whether a request may end what was granted before.
    pub preempt: Preempt,
    /// Time between two comparisons of the kernel with the state.
    pub reconcile_interval: Duration,
    /// On which end of the lines the gateway stands.
    pub line_side: LineSide,
    /// Share of a line's speed that is used in the direction out of the line, above 0 up to 1.
    pub soft_share: f64,
    /// What the rest of each line is sure of.
    pub line_rest: BitsPerSecond,
    /// What traffic on no known line is sure of, on each interface.
    pub link_rest: BitsPerSecond,
    /// The server that RADIUS accounting is sent to; none: there is none.
    pub radius: Option<RadiusConfig>,
    /// The database that FreeRADIUS writes accounting into; none: there is none.
    pub radacct: Option<RadacctConfig>,
    /// The API for providers; none: there is none.
    pub northbound: Option<Northbound>,
    /// What the gateway is made of.
    pub gateway: GatewayConfig,
}

/// In what two configurations differ, by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// What a daemon that runs can change.
    pub live: Vec<String>,
    /// What it can't.
    pub restart: Vec<String>,
}

/// Who may use the API on the socket besides root and the daemon's own user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// User numbers.
    pub users: BTreeSet<u32>,
    /// Group numbers.
    pub groups: BTreeSet<u32>,
}

/// Why a file is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is not TOML.
    #[error("{place}: not TOML: {message}")]
    Syntax {
        /// Where.
        place: Place,
        /// What the parser says.
        message: String,
    },
    /// There is no such key.
    #[error("{place}: unknown key `{key}` in {section}: {}", suggestion(key, known))]
    UnknownKey {
        /// Where.
        place: Place,
        /// The part of the file.
        section: &'static str,
        /// The key.
        key: String,
        /// The keys that may stand there.
        known: Vec<&'static str>,
    },
    /// A key has to be there and isn't.
    #[error("{place}: `{key}` is missing in {section}: {expected}")]
    MissingKey {
        /// Where its section begins.
        place: Place,
        /// The part of the file.
        section: &'static str,
        /// The key.
        key: &'static str,
        /// What it is for.
        expected: &'static str,
    },
    /// A value can't be used.
    #[error("{place}: {key} = {value}: {message}")]
    InvalidValue {
        /// Where.
        place: Place,
        /// The key.
        key: &'static str,
        /// The value as it is written.
        value: String,
        /// What is wrong with it and what is expected.
        message: String,
    },
}

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, line {}", self.path.display(), self.line)
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// Where it can't be read, is not TOML, or holds an unknown key or a value that can't be used.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Checks a text; `path` is what errors call it.
    ///
    /// # Errors
    /// Where it is not TOML, or holds an unknown key or a value that can't be used.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let file = File { path, text };
        let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            place: file.place(error.span().unwrap_or_default()),
            message: error.message().to_owned(),
        })?;
        let mut top = Section::new(file, "the top level", document);

        let interfaces = read_interfaces(&mut top)?;
        let config = Self {
            path: path.to_owned(),
            state_dir: top.optional("state_dir", absolute_path)?.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            socket: top.optional("socket", socket_path)?.unwrap_or_else(|| DEFAULT_SOCKET.into()),
            access: Access {
                users: top.optional("allow_users", |value| all(value, user))?.unwrap_or_default(),
                groups: top.optional("allow_groups", |value| all(value, group))?.unwrap_or_default(),
            },
            require_session: top.optional("require_session", boolean)?.unwrap_or(true),
            line_rate: Directed {
                up: top.optional("line_rate_up", line_rate)?,
                down: top.optional("line_rate_down", line_rate)?,
            },
            session_ttl: top.optional("session_ttl", life)?.unwrap_or(DEFAULT_SESSION_TTL),
            session_grace: top.optional("session_grace", life)?.unwrap_or(DEFAULT_SESSION_GRACE),
            preempt: top
                .optional("preempt", |value| {
                    one_of(value, &[("never", Preempt::Never), ("lower-priority", Preempt::LowerPriority)])
                })?
                .unwrap_or_default(),
            reconcile_interval: top
                .optional("reconcile_interval", interval)?
                .unwrap_or(DEFAULT_RECONCILE_INTERVAL),
            line_side: top
                .optional("line_side", |value| {
                    one_of(value, &[("lan", LineSide::Lan), ("wan", LineSide::Wan)])
                })?
                .unwrap_or_default(),
            soft_share: top.optional("soft_share", share)?.unwrap_or(DEFAULT_SOFT_SHARE),
            line_rest: top.optional("line_rest", rest)?.unwrap_or(SMALLEST_REST),
            link_rest: top.optional("link_rest", rest)?.unwrap_or(SMALLEST_REST),
            radius: sources::radius(&mut top)?,
            radacct: sources::radacct(&mut top)?,
            northbound: northbound::read(&mut top)?,
            gateway: GatewayConfig {
                interfaces,
                bpffs_dir: top
                    .optional("bpffs_dir", absolute_path)?
                    .unwrap_or_else(|| DEFAULT_BPFFS_DIR.into()),
                observe: top
                    .optional("mode", |value| one_of(value, &[("enforce", false), ("observe", true)]))?
                    .unwrap_or(false),
                mark_mask: top.optional("mark_mask", mark_mask)?.unwrap_or(DEFAULT_MARK_MASK),
                nat: top.optional("nat", boolean)?.unwrap_or(false),
                max_rules: top
                    .optional("max_rules", |value| within(value, &MAX_RULES_RANGE, "rules"))?
                    .unwrap_or(MAX_RULES),
                max_checks: top
                    .optional("max_checks", |value| within(value, &MAX_CHECKS, "rules"))?
                    .unwrap_or(DEFAULT_MAX_CHECKS),
                tc_hooks: top
                    .optional("tc_hooks", |value| {
                        one_of(value, &[("auto", TcHooks::Auto), ("clsact", TcHooks::Clsact)])
                    })?
                    .unwrap_or_default(),
            },
        };
        top.finish()?;
        Ok(config)
    }

    /// The network that decisions are made for; `mtu` is the largest IP packet of the interfaces,
    /// in bytes.
    ///
    /// The link's capacity in a direction is that of the slowest interface of the role that sends
    /// it: downstream leaves by LAN interfaces, upstream by WAN interfaces.
    #[must_use]
    pub fn network(&self, mtu: u32) -> Network {
        let slowest = |role| {
            let of_role = self.gateway.interfaces.iter().filter(|interface| interface.role == role);
            of_role.map(|interface| interface.capacity).min().unwrap_or_default()
        };
        Network {
            link: Directed { up: slowest(Role::Wan), down: slowest(Role::Lan) },
            line_side: self.line_side,
            soft_share: self.soft_share,
            line_rest: self.line_rest,
            link_rest: self.link_rest,
            mtu,
            max_rules: self.gateway.max_rules,
            require_session: self.require_session,
            line_rate: self.line_rate,
            session_ttl: signed(self.session_ttl),
            session_grace: signed(self.session_grace),
            preempt: self.preempt,
        }
    }

    /// Names of the keys in which another configuration differs: those that a daemon which runs can
    /// change, and those that only a restart changes.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Differences {
        let (mine, theirs) = (&self.gateway, &other.gateway);
        let named = |list: &[(&'static str, bool)]| {
            list.iter().filter(|(_, differs)| *differs).map(|(name, _)| (*name).to_owned()).collect()
        };
        let mut live: Vec<String> = named(&[
            ("mode", mine.observe != theirs.observe),
            ("line_side", self.line_side != other.line_side),
            ("soft_share", self.soft_share.to_bits() != other.soft_share.to_bits()),
            ("line_rest", self.line_rest != other.line_rest),
            ("link_rest", self.link_rest != other.link_rest),
            ("tc_hooks", mine.tc_hooks != theirs.tc_hooks),
            ("nat", mine.nat != theirs.nat),
            ("max_checks", mine.max_checks != theirs.max_checks),
            ("require_session", self.require_session != other.require_session),
            ("line_rate_up", self.line_rate.up != other.line_rate.up),
            ("line_rate_down", self.line_rate.down != other.line_rate.down),
            ("session_ttl", self.session_ttl != other.session_ttl),
            ("session_grace", self.session_grace != other.session_grace),
            ("preempt", self.preempt != other.preempt),
            ("reconcile_interval", self.reconcile_interval != other.reconcile_interval),
        ]);
        let all = mine.interfaces.iter().chain(&theirs.interfaces).map(|interface| interface.name.as_str());
        let find = |interfaces: &[InterfaceConfig], name: &str| {
            interfaces.iter().find(|interface| interface.name == name).cloned()
        };
        for name in all.collect::<BTreeSet<_>>() {
            live.extend(match (find(&mine.interfaces, name), find(&theirs.interfaces, name)) {
                (None, Some(_)) => Some(format!("interface {name} (added)")),
                (Some(_), None) => Some(format!("interface {name} (removed)")),
                (one, other) if one != other => Some(format!("interface {name}")),
                _ => None,
            });
        }
        let listens = |config: &Self| config.northbound.as_ref().map(|northbound| northbound.listen.clone());
        if let (Some(mine), Some(theirs)) = (&self.northbound, &other.northbound) {
            live.extend(mine.differences(theirs));
        }
        Differences {
            live,
            restart: named(&[
                ("northbound", self.northbound.is_some() != other.northbound.is_some()),
                (
                    "northbound listen",
                    self.northbound.is_some() == other.northbound.is_some()
                        && listens(self) != listens(other),
                ),
                ("state_dir", self.state_dir != other.state_dir),
                ("socket", self.socket != other.socket),
                ("allow_users", self.access.users != other.access.users),
                ("allow_groups", self.access.groups != other.access.groups),
                ("bpffs_dir", mine.bpffs_dir != theirs.bpffs_dir),
                ("mark_mask", mine.mark_mask != theirs.mark_mask),
                ("max_rules", mine.max_rules != theirs.max_rules),
                ("[radius]", self.radius != other.radius),
                ("[radacct]", self.radacct != other.radacct),
            ]),
        }
    }

    /// The database file.
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.state_dir.join("qos.sqlite")
    }

    /// The file that a running daemon holds locked.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.state_dir.join("lock")
    }
}

fn read_interfaces(top: &mut Section<'_>) -> Result<Vec<InterfaceConfig>, ConfigError> {
    let mut interfaces = Vec::<InterfaceConfig>::new();
    for mut section in top.tables("interface", "[[interface]]")? {
        let name = section.required("name", "the name of a network interface", |value| {
            let name = interface_name(value)?;
            if interfaces.iter().any(|other| other.name == name) {
                return Err("this interface is there twice; each has one [[interface]]".to_owned());
            }
            Ok(name)
        })?;
        let role = section.required("role", "\"lan\" (towards subscribers) or \"wan\"", |value| {
            one_of(value, &[("lan", Role::Lan), ("wan", Role::Wan)])
        })?;
        let capacity =
            section.required("capacity", "what the interface can send, such as \"1Gbit/s\"", capacity)?;
        let xdp = section.optional("xdp", |value| {
            one_of(
                value,
                &[
                    ("auto", XdpChoice::Auto),
                    ("native", XdpChoice::Native),
                    ("generic", XdpChoice::Generic),
                    ("off", XdpChoice::Off),
                ],
            )
        })?;
        section.finish()?;
        interfaces.push(InterfaceConfig { name, role, capacity, xdp: xdp.unwrap_or_default() });
    }
    for (role, expected) in [
        (Role::Lan, "at least one with role = \"lan\", towards the subscribers"),
        (Role::Wan, "at least one with role = \"wan\", towards the providers"),
    ] {
        if !interfaces.iter().any(|interface| interface.role == role) {
            return Err(top.missing("[[interface]]", expected));
        }
    }
    Ok(interfaces)
}

/// What a reader of a value makes of it, or what is wrong and what is expected.
type Reading<T> = Result<T, String>;

fn text<'v>(value: &'v DeValue<'_>) -> Reading<&'v str> {
    value.as_str().ok_or_else(|| format!("expected text in quotes, found {}", value.type_str()))
}

fn boolean(value: &DeValue<'_>) -> Reading<bool> {
    value.as_bool().ok_or_else(|| format!("expected true or false, found {}", value.type_str()))
}

fn one_of<T: Copy>(value: &DeValue<'_>, choices: &[(&'static str, T)]) -> Reading<T> {
    let names = || choices.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    let text = text(value)?;
    choices
        .iter()
        .find(|(name, _)| *name == text)
        .map(|(_, choice)| *choice)
        .ok_or_else(|| suggestion(text, &names()))
}

fn absolute_path(value: &DeValue<'_>) -> Reading<PathBuf> {
    let path = PathBuf::from(text(value)?);
    if path.is_absolute() { Ok(path) } else { Err("expected a path that begins with /".to_owned()) }
}

fn socket_path(value: &DeValue<'_>) -> Reading<PathBuf> {
    let path = absolute_path(value)?;
    let length = path.as_os_str().len();
    if length > LONGEST_SOCKET_PATH {
        return Err(format!(
            "the path of a socket has at most {LONGEST_SOCKET_PATH} bytes, this one has {length}"
        ));
    }
    Ok(path)
}

fn all<T: Ord>(value: &DeValue<'_>, read: impl Fn(&DeValue<'_>) -> Reading<T>) -> Reading<BTreeSet<T>> {
    let array =
        value.as_array().ok_or_else(|| format!("expected a list [ … ], found {}", value.type_str()))?;
    array.iter().map(|item| read(item.get_ref())).collect()
}

fn user(value: &DeValue<'_>) -> Reading<u32> {
    number_or_known(value, "user", |name| Ok(User::from_name(name)?.map(|user| user.uid.as_raw())))
}

fn group(value: &DeValue<'_>) -> Reading<u32> {
    number_or_known(value, "group", |name| Ok(Group::from_name(name)?.map(|group| group.gid.as_raw())))
}

fn number_or_known(
    value: &DeValue<'_>,
    what: &str,
    look_up: impl FnOnce(&str) -> nix::Result<Option<u32>>,
) -> Reading<u32> {
    if value.is_integer() {
        return integer(value);
    }
    let name = text(value)?;
    match look_up(name) {
        Ok(Some(number)) => Ok(number),
        Ok(None) => Err(format!("there is no {what} `{name}` on this machine")),
        Err(error) => Err(format!("cannot look up the {what} `{name}`: {error}")),
    }
}

fn integer<T: TryFrom<u64>>(value: &DeValue<'_>) -> Reading<T> {
    let integer =
        value.as_integer().ok_or_else(|| format!("expected a whole number, found {}", value.type_str()))?;
    u64::from_str_radix(integer.as_str(), integer.radix())
        .ok()
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| "the number is out of range".to_owned())
}

fn mark_mask(value: &DeValue<'_>) -> Reading<u32> {
    let mask = integer(value)?;
    if MarkLayout::new(mask, 0).is_none() {
        return Err(format!(
            "expected one unbroken run of at least {MIN_BITS} one-bits, such as {DEFAULT_MARK_MASK:#010x}"
        ));
    }
    Ok(mask)
}

fn share(value: &DeValue<'_>) -> Reading<f64> {
    let written = match value {
        DeValue::Float(float) => float.as_str(),
        DeValue::Integer(integer) => integer.as_str(),
        _ => return Err(format!("expected a number, found {}", value.type_str())),
    };
    match written.parse::<f64>() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("expected a share above 0 and at most 1, such as 0.95".to_owned()),
    }
}

fn within(value: &DeValue<'_>, range: &RangeInclusive<u32>, what: &str) -> Reading<u32> {
    let number = integer(value)?;
    if range.contains(&number) {
        return Ok(number);
    }
    Err(format!("expected a number of {what} from {} to {}", range.start(), range.end()))
}

/// At most every other hour is often enough for idle clocks ([`qos_common::clock::is_long_idle`]).
fn interval(value: &DeValue<'_>) -> Reading<Duration> {
    let range = Duration::from_millis(100)..=Duration::from_secs(3_600);
    time(value, &range).ok_or_else(|| "expected a time from 100ms to 1h, such as \"5s\"".to_owned())
}

fn life(value: &DeValue<'_>) -> Reading<Duration> {
    let range = Duration::from_secs(1)..=Duration::from_secs(7 * 24 * 3_600);
    time(value, &range).ok_or_else(|| "expected a time from 1s to 168h, such as \"5m\"".to_owned())
}

fn time(value: &DeValue<'_>, range: &RangeInclusive<Duration>) -> Option<Duration> {
    let duration = SignedDuration::from_str(text(value).ok()?).ok()?;
    Duration::try_from(duration).ok().filter(|duration| range.contains(duration))
}

/// A time of a configuration is a week at most.
fn signed(time: Duration) -> SignedDuration {
    SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX)
}

fn interface_name(value: &DeValue<'_>) -> Reading<String> {
    let name = text(value)?;
    let allowed = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    if name.is_empty() || name.len() > LONGEST_INTERFACE_NAME || !name.bytes().all(allowed) {
        return Err(format!(
            "expected the name of a network interface: 1 to {LONGEST_INTERFACE_NAME} characters, no space, / or :"
        ));
    }
    Ok(name.to_owned())
}

fn capacity(value: &DeValue<'_>) -> Reading<BitsPerSecond> {
    rate(value, CAPACITIES)
}

/// Not below what keeps a connection alive, nor above any capacity.
fn rest(value: &DeValue<'_>) -> Reading<BitsPerSecond> {
    rate(value, SMALLEST_REST.0..=*CAPACITIES.end())
}

fn line_rate(value: &DeValue<'_>) -> Reading<BitsPerSecond> {
    rate(value, SLOWEST_LINE.0..=*CAPACITIES.end())
}

fn rate(value: &DeValue<'_>, range: RangeInclusive<u64>) -> Reading<BitsPerSecond> {
    let rate = match value {
        DeValue::Integer(_) => BitsPerSecond(integer(value)?),
        _ => text(value)?.parse().map_err(|error: crate::domain::units::UnitError| error.to_string())?,
    };
    if !range.contains(&rate.0) {
        return Err(format!("expected {} to {}", BitsPerSecond(*range.start()), BitsPerSecond(*range.end())));
    }
    Ok(rate)
}

/// Words that are at least this like each other may be meant for each other.
const ALIKE: f64 = 0.8;

/// How like two words are, 0 to 1. Jaro-Winkler forgives swapped and missing letters.
fn likeness(one: &str, other: &str) -> f64 {
    strsim::jaro_winkler(one, other)
}

/// "did you mean …?" where a known word is near, else the words there are.
fn suggestion(word: &str, known: &[&str]) -> String {
    let nearest = known
        .iter()
        .map(|candidate| (likeness(word, candidate), candidate))
        .max_by(|(one, _), (other, _)| one.total_cmp(other));
    match nearest {
        Some((likeness, candidate)) if likeness >= ALIKE => format!("did you mean `{candidate}`?"),
        _ => format!("expected one of {}", known.join(", ")),
    }
}

/// The text and its name, for errors.
#[derive(Clone, Copy)]
struct File<'t> {
    path: &'t Path,
    text: &'t str,
}

impl File<'_> {
    fn place(&self, span: Range<usize>) -> Place {
        let before = &self.text.as_bytes()[..span.start.min(self.text.len())];
        Place { path: self.path.to_owned(), line: 1 + before.iter().filter(|byte| **byte == b'\n').count() }
    }

    /// The value as it is written, cut to a readable length.
    fn written(&self, span: Range<usize>) -> String {
        let text = self.text.get(span).unwrap_or_default();
        if text.chars().count() <= 60 {
            return text.to_owned();
        }
        text.chars().take(60).chain(['…']).collect()
    }
}

/// A table that is read key by key. The keys asked for are the keys there are, so a key that is
/// left over at the end is unknown.
struct Section<'t> {
    file: File<'t>,
    title: &'static str,
    span: Range<usize>,
    table: DeTable<'t>,
    known: Vec<&'static str>,
}

impl<'t> Section<'t> {
    fn new(file: File<'t>, title: &'static str, table: Spanned<DeTable<'t>>) -> Self {
        Self { file, title, span: table.span(), table: table.into_inner(), known: Vec::new() }
    }

    fn optional<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&DeValue<'_>) -> Reading<T>,
    ) -> Result<Option<T>, ConfigError> {
        self.known.push(key);
        let Some(value) = self.table.remove(key) else { return Ok(None) };
        read(value.get_ref()).map(Some).map_err(|message| ConfigError::InvalidValue {
            place: self.file.place(value.span()),
            key,
            value: self.file.written(value.span()),
            message,
        })
    }

    fn required<T>(
        &mut self,
        key: &'static str,
        expected: &'static str,
        read: impl FnOnce(&DeValue<'_>) -> Reading<T>,
    ) -> Result<T, ConfigError> {
        self.optional(key, read)?.ok_or_else(|| self.missing(key, expected))
    }

    /// The tables of an array of tables; none where the key is absent.
    fn tables(&mut self, key: &'static str, title: &'static str) -> Result<Vec<Self>, ConfigError> {
        self.known.push(key);
        let Some(value) = self.table.remove(key) else { return Ok(Vec::new()) };
        let wrong = |span: Range<usize>| ConfigError::InvalidValue {
            place: self.file.place(span.clone()),
            key,
            value: self.file.written(span),
            message: format!("expected a {title} table for each"),
        };
        let span = value.span();
        let DeValue::Array(items) = value.into_inner() else { return Err(wrong(span)) };
        items
            .into_iter()
            .map(|item| {
                let span = item.span();
                match item.into_inner() {
                    DeValue::Table(table) => Ok(Self::new(self.file, title, Spanned::new(span, table))),
                    _ => Err(wrong(span)),
                }
            })
            .collect()
    }

    /// A table of its own; none where the key is absent.
    fn table(&mut self, key: &'static str, title: &'static str) -> Result<Option<Self>, ConfigError> {
        self.known.push(key);
        let Some(value) = self.table.remove(key) else { return Ok(None) };
        let span = value.span();
        match value.into_inner() {
            DeValue::Table(table) => Ok(Some(Self::new(self.file, title, Spanned::new(span, table)))),
            _ => Err(ConfigError::InvalidValue {
                place: self.file.place(span.clone()),
                key,
                value: self.file.written(span),
                message: format!("expected a table {title}"),
            }),
        }
    }

    /// The error for a key that isn't there: a mistyped one in its place is the likelier news.
    fn missing(&self, key: &'static str, expected: &'static str) -> ConfigError {
        if let Some((mistyped, _)) =
            self.table.iter().find(|(other, _)| likeness(key, other.get_ref()) >= ALIKE)
        {
            return ConfigError::UnknownKey {
                place: self.file.place(mistyped.span()),
                section: self.title,
                key: mistyped.get_ref().to_string(),
                known: vec![key],
            };
        }
        ConfigError::MissingKey {
            place: self.file.place(self.span.clone()),
            section: self.title,
            key,
            expected,
        }
    }

    fn finish(self) -> Result<(), ConfigError> {
        // The first one in the file, as that is where a reader begins.
        match self.table.into_iter().min_by_key(|(key, _)| key.span().start) {
            None => Ok(()),
            Some((key, _)) => Err(ConfigError::UnknownKey {
                place: self.file.place(key.span()),
                section: self.title,
                key: key.into_inner().into_owned(),
                known: self.known,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERFACES: &str = r#"
[[interface]]
name = "eth0"
role = "lan"
capacity = "1Gbit/s"

[[interface]]
name = "eth1"
role = "wan"
capacity = 100_000_000
"#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("qos.toml"))
    }

    #[test]
    fn interfaces_alone_are_a_configuration() {
        let config = parse(INTERFACES).expect("valid");
        assert_eq!(config.socket, Path::new(DEFAULT_SOCKET));
        assert_eq!(config.gateway.mark_mask, 0xffff_f000);
        assert!(config.require_session && !config.gateway.observe);
        let network = config.network(1_500);
        assert_eq!(
            network.link,
            Directed { up: BitsPerSecond(100_000_000), down: BitsPerSecond(1_000_000_000) }
        );
    }

    #[test]
    fn the_documented_example_loads_and_shows_every_key() {
        let example = include_str!("../../docs/qos.example.toml");
        let config = Config::parse(example, Path::new("docs/qos.example.toml")).expect("valid");
        assert_eq!(config.reconcile_interval, DEFAULT_RECONCILE_INTERVAL);
        for key in [
            "state_dir",
            "socket",
            "allow_users",
            "allow_groups",
            "require_session",
            "reconcile_interval",
            "bpffs_dir",
            "mode",
            "mark_mask",
            "tc_hooks",
            "nat",
            "line_side",
            "soft_share",
            "line_rest",
            "link_rest",
            "name",
            "role",
            "capacity",
        ] {
            let shown = |line: &str| line.split('=').next().is_some_and(|before| before.trim() == key);
            assert!(example.lines().any(shown), "{key} is not set in the example");
        }
    }

    #[test]
    fn every_key_is_read() {
        let text = format!(
            r#"
state_dir = "/srv/qos"
socket = "/tmp/qos.sock"
bpffs_dir = "/sys/fs/bpf/other"
mode = "observe"
line_side = "wan"
soft_share = 0.9
line_rest = "256kbit/s"
link_rest = 1000000
tc_hooks = "clsact"
nat = true
mark_mask = 0x000fffff
require_session = false
reconcile_interval = "250ms"
allow_users = ["root", 1000]
allow_groups = ["root"]
{INTERFACES}"#
        );
        let config = parse(&text).expect("valid");
        assert_eq!(config.database(), Path::new("/srv/qos/qos.sqlite"));
        assert_eq!(config.access.users, BTreeSet::from([0, 1_000]));
        assert_eq!(config.access.groups, BTreeSet::from([0]));
        assert_eq!(config.reconcile_interval, Duration::from_millis(250));
        assert_eq!((config.gateway.tc_hooks, config.gateway.nat), (TcHooks::Clsact, true));
        assert_eq!((config.line_rest.0, config.link_rest.0), (256_000, 1_000_000));
        assert!(!config.require_session);
        assert_eq!(
            (config.gateway.observe, config.line_side, config.gateway.mark_mask),
            (true, LineSide::Wan, 0x000f_ffff)
        );
    }

    #[test]
    fn the_slowest_interface_of_a_role_is_the_link() {
        let text = format!("{INTERFACES}\n[[interface]]\nname='eth2'\nrole='lan'\ncapacity='10mbit'");
        assert_eq!(parse(&text).expect("valid").network(1_500).link.down, BitsPerSecond(10_000_000));
    }

    #[test]
    fn what_is_wrong_is_said_with_line_key_and_value() {
        let with = |line: &str| format!("{line}\n{INTERFACES}");
        let interface = |lines: &str| format!("{INTERFACES}[[interface]]\n{lines}");
        for (name, text, expected) in [
            (
                "no interface",
                String::new(),
                "qos.toml, line 1: `[[interface]]` is missing in the top level: at least one with role = \"lan\", towards the subscribers",
            ),
            (
                "no wan",
                "[[interface]]\nname='a'\nrole='lan'\ncapacity='1G'".into(),
                "at least one with role = \"wan\", towards the providers",
            ),
            (
                "mistyped key",
                interface("name='a'\nrole='lan'\ncapcity='1G'"),
                "qos.toml, line 14: unknown key `capcity` in [[interface]]: did you mean `capacity`?",
            ),
            (
                "capacity missing",
                interface("name='a'\nrole='lan'"),
                "qos.toml, line 11: `capacity` is missing in [[interface]]: what the interface can send, such as \"1Gbit/s\"",
            ),
            (
                "mistyped key beside the right one",
                interface("name='a'\nrole='lan'\ncapacity='1G'\ncapcity='1G'"),
                "qos.toml, line 15: unknown key `capcity` in [[interface]]: did you mean `capacity`?",
            ),
            (
                "unknown key at the top",
                with("line-side = 'lan'"),
                "qos.toml, line 1: unknown key `line-side` in the top level: did you mean `line_side`?",
            ),
            (
                "unknown key like no other",
                with("zzz = 1"),
                "unknown key `zzz` in the top level: expected one of interface, state_dir, socket",
            ),
            (
                "unknown table",
                with("[daemon]\nx = 1"),
                "qos.toml, line 1: unknown key `daemon` in the top level: expected one of",
            ),
            ("not TOML", with("socket = "), "qos.toml, line 1: not TOML: "),
            (
                "key twice",
                with("mode='observe'\nmode='enforce'"),
                "qos.toml, line 2: not TOML: duplicate key",
            ),
            (
                "mode",
                with("mode = \"enforced\""),
                "qos.toml, line 1: mode = \"enforced\": did you mean `enforce`?",
            ),
            ("line side", with("line_side = 'left'"), "line_side = 'left': expected one of lan, wan"),
            (
                "line side is a number",
                with("line_side = 1"),
                "line_side = 1: expected text in quotes, found integer",
            ),
            (
                "soft share zero",
                with("soft_share = 0"),
                "soft_share = 0: expected a share above 0 and at most 1",
            ),
            (
                "soft share above one",
                with("soft_share = 1.2"),
                "soft_share = 1.2: expected a share above 0 and at most 1",
            ),
            (
                "soft share not a number",
                with("soft_share = nan"),
                "soft_share = nan: expected a share above 0",
            ),
            (
                "a rest too small to live on",
                with("line_rest = \"1kbit\""),
                "line_rest = \"1kbit\": expected 8 kbit/s to 400 Gbit/s",
            ),
            (
                "mark mask with a hole",
                with("mark_mask = 0xff00ff00"),
                "mark_mask = 0xff00ff00: expected one unbroken run of at least 20 one-bits",
            ),
            (
                "mark mask too small",
                with("mark_mask = 0x7ffff"),
                "mark_mask = 0x7ffff: expected one unbroken run",
            ),
            (
                "mark mask too large",
                with("mark_mask = 0x1ffffffff"),
                "mark_mask = 0x1ffffffff: the number is out of range",
            ),
            ("mark mask negative", with("mark_mask = -1"), "mark_mask = -1: the number is out of range"),
            (
                "require session",
                with("require_session = 'yes'"),
                "require_session = 'yes': expected true or false, found string",
            ),
            (
                "interval too short",
                with("reconcile_interval = '1ms'"),
                "reconcile_interval = '1ms': expected a time from 100ms to 1h",
            ),
            ("interval negative", with("reconcile_interval = '-5s'"), "expected a time from 100ms to 1h"),
            ("interval not a time", with("reconcile_interval = 'soon'"), "expected a time from 100ms to 1h"),
            (
                "relative path",
                with("state_dir = 'var'"),
                "state_dir = 'var': expected a path that begins with /",
            ),
            (
                "socket path too long",
                with(&format!("socket = '/{}'", "x".repeat(107))),
                "the path of a socket has at most 107 bytes, this one has 108",
            ),
            (
                "no such user",
                with("allow_users = ['no-such-user']"),
                "there is no user `no-such-user` on this machine",
            ),
            (
                "no such group",
                with("allow_groups = ['no-such-group']"),
                "there is no group `no-such-group` on this machine",
            ),
            ("users not a list", with("allow_users = 'root'"), "expected a list [ … ], found string"),
            ("uid too large", with("allow_users = [4294967296]"), "the number is out of range"),
            (
                "interface not tables",
                "interface = 3".into(),
                "interface = 3: expected a [[interface]] table for each",
            ),
            (
                "interface twice",
                interface("name='eth0'\nrole='lan'\ncapacity='1G'"),
                "line 12: name = 'eth0': this interface is there twice",
            ),
            (
                "interface name too long",
                interface("name='interface0123456'\nrole='lan'\ncapacity='1G'"),
                "expected the name of a network interface: 1 to 15 characters",
            ),
            (
                "role",
                interface("name='a'\nrole='wna'\ncapacity='1G'"),
                "line 13: role = 'wna': expected one of lan, wan",
            ),
            (
                "role missing",
                interface("name='a'\ncapacity='1G'"),
                "`role` is missing in [[interface]]: \"lan\" (towards subscribers) or \"wan\"",
            ),
            (
                "capacity zero",
                interface("name='a'\nrole='lan'\ncapacity=0"),
                "capacity = 0: expected 1 kbit/s to 400 Gbit/s",
            ),
            (
                "capacity too large",
                interface("name='a'\nrole='lan'\ncapacity='401Gbit/s'"),
                "capacity = '401Gbit/s': expected 1 kbit/s to 400 Gbit/s",
            ),
            (
                "capacity without unit",
                interface("name='a'\nrole='lan'\ncapacity='fast'"),
                "capacity = 'fast': `fast` has no number",
            ),
            (
                "capacity with a strange unit",
                interface("name='a'\nrole='lan'\ncapacity='1 parsec'"),
                "`parsec` in `1 parsec` is not a unit",
            ),
        ] {
            let error = parse(&text).expect_err(name).to_string();
            assert!(error.contains(expected), "{name}:\n  expected {expected}\n  got      {error}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = Config::load(Path::new("/nonexistent/qos.toml")).expect_err("no file").to_string();
        assert!(error.starts_with("cannot read the configuration /nonexistent/qos.toml: "), "{error}");
    }
}
