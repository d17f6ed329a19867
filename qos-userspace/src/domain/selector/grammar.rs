//! The text form of selectors.
//!
//! ```text
//! [up|down] [tcp|udp|sctp|icmp|icmp6|NUMBER] [from PREFIX[:PORTS]] [to PREFIX[:PORTS]]
//!           [dscp NAME|N] [length A-B]
//! between SUBSCRIBER[:PORTS] and REMOTE[:PORTS] [protocol] [dscp …] [length …]
//! ```
//! Fields come in any order, each once. `any` stands for an open address, or for a selector that
//! leaves everything open. IPv6 with ports takes brackets: `[2001:db8::/64]:443`. `between` gives
//! two selectors, one for each direction.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use super::{Direction, Range16, Selector, SelectorError, dscp};

/// Protocols by name; the first name of a number is the one that is printed.
const PROTOCOLS: [(&str, u8); 10] = [
    ("tcp", 6),
    ("udp", 17),
    ("sctp", 132),
    ("icmp", super::ICMP),
    ("icmp6", super::ICMP6),
    ("icmpv6", super::ICMP6),
    ("dccp", 33),
    ("udplite", 136),
    ("gre", 47),
    ("esp", 50),
];

const PORTS: &str = "a port from 1 to 65535, or a range like 8000-8100";
const LENGTHS: &str = "bytes like 64-1500";
const ENDPOINT: &str = "192.0.2.0/24, 192.0.2.7:443, [2001:db8::/32]:443, :443 or any";

/// Reads one selector, or the two that `between` stands for: upstream, then downstream.
///
/// # Errors
/// Where the text is no selector, naming the field and the value.
pub fn parse_flows(text: &str) -> Result<Vec<Selector>, SelectorError> {
    let parsed = Parsed::read(text)?;
    let selectors = match parsed.between {
        None => vec![parsed.selector],
        Some((near, far)) => {
            let towards = |direction, source: Endpoint, destination: Endpoint| Selector {
                direction: Some(direction),
                source: source.prefix,
                source_ports: source.ports,
                destination: destination.prefix,
                destination_ports: destination.ports,
                ..parsed.selector.clone()
            };
            vec![towards(Direction::Upstream, near, far), towards(Direction::Downstream, far, near)]
        }
    };
    for selector in &selectors {
        selector.check()?;
    }
    Ok(selectors)
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let parsed = Parsed::read(text)?;
        if parsed.between.is_some() {
            let hint = "; write the two selectors out, with `from` and `to`";
            return Err(SelectorError::BothDirections { value: "between".to_owned(), hint });
        }
        parsed.selector.check()?;
        Ok(parsed.selector)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        match self.direction {
            Some(Direction::Upstream) => words.push("up".to_owned()),
            Some(Direction::Downstream) => words.push("down".to_owned()),
            None => {}
        }
        words.extend(self.protocol.map(protocol_name));
        for (word, prefix, ports) in
            [("from", self.source, self.source_ports), ("to", self.destination, self.destination_ports)]
        {
            let endpoint = Endpoint { prefix, ports };
            if endpoint != Endpoint::default() {
                words.push(format!("{word} {endpoint}"));
            }
        }
        words.extend(self.dscp.map(|value| format!("dscp {}", dscp::name(value))));
        words.extend(self.lengths.map(|range| format!("length {range}")));
        f.pad(&if words.is_empty() { "any".to_owned() } else { words.join(" ") })
    }
}

impl fmt::Display for Range16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// The name of a protocol, or its number.
#[must_use]
pub fn protocol_name(protocol: u8) -> String {
    PROTOCOLS
        .iter()
        .find(|(_, number)| *number == protocol)
        .map_or_else(|| protocol.to_string(), |(name, _)| (*name).to_owned())
}

/// Reads a protocol, by name or number.
#[must_use]
pub fn parse_protocol(text: &str) -> Option<u8> {
    let named = PROTOCOLS.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)).map(|(_, number)| *number);
    // `u8::from_str` takes a plus sign, which nobody means.
    let number = || text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    named.or_else(number)
}

/// Addresses and ports on one side of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Endpoint {
    prefix: Option<IpNet>,
    ports: Option<Range16>,
}

/// A text, read but not checked as a whole.
#[derive(Default)]
struct Parsed {
    selector: Selector,
    between: Option<(Endpoint, Endpoint)>,
}

impl Parsed {
    fn read(text: &str) -> Result<Self, SelectorError> {
        let mut parsed = Self::default();
        let mut given = Vec::new();
        let mut once = |field: &'static str, value: &str| {
            if given.contains(&field) {
                return Err(SelectorError::Twice { field, value: value.to_owned() });
            }
            given.push(field);
            Ok(())
        };
        let mut words = text.split_whitespace();
        let mut read_any_word = false;
        while let Some(word) = words.next() {
            read_any_word = true;
            let keyword = word.to_ascii_lowercase();
            let selector = &mut parsed.selector;
            match keyword.as_str() {
                "any" => once("any", word)?,
                "up" | "upstream" | "down" | "downstream" => {
                    once("direction", word)?;
                    let up = keyword.starts_with("up");
                    selector.direction = Some(if up { Direction::Upstream } else { Direction::Downstream });
                }
                "from" => {
                    let text = value("source", word, ENDPOINT, words.next())?;
                    once("source", text)?;
                    let endpoint = Endpoint::read("source", "source_ports", text)?;
                    (selector.source, selector.source_ports) = (endpoint.prefix, endpoint.ports);
                }
                "to" => {
                    let text = value("destination", word, ENDPOINT, words.next())?;
                    once("destination", text)?;
                    let endpoint = Endpoint::read("destination", "destination_ports", text)?;
                    (selector.destination, selector.destination_ports) = (endpoint.prefix, endpoint.ports);
                }
                "between" => {
                    let near = value("subscriber", word, ENDPOINT, words.next())?;
                    let and = value("remote", near, "`and`", words.next())?;
                    if !and.eq_ignore_ascii_case("and") {
                        return Err(SelectorError::Missing {
                            field: "remote",
                            after: near.to_owned(),
                            expected: "`and`, and the remote addresses",
                        });
                    }
                    let far = value("remote", and, ENDPOINT, words.next())?;
                    once("between", near)?;
                    parsed.between = Some((
                        Endpoint::read("subscriber", "subscriber_ports", near)?,
                        Endpoint::read("remote", "remote_ports", far)?,
                    ));
                }
                "dscp" => {
                    let text = value("dscp", word, "EF, AF41, CS5 or 0 to 63", words.next())?;
                    once("dscp", text)?;
                    selector.dscp = Some(dscp::parse(text)?);
                }
                "length" => {
                    let text = value("length", word, LENGTHS, words.next())?;
                    once("length", text)?;
                    selector.lengths = Some(read_range("length", text, LENGTHS)?);
                }
                _ => {
                    let Some(protocol) = parse_protocol(&keyword) else { return Err(unknown(word)) };
                    once("protocol", word)?;
                    selector.protocol = Some(protocol);
                }
            }
        }
        if !read_any_word {
            return Err(unknown(""));
        }
        if parsed.between.is_some() {
            parsed.refuse_beside_between()?;
        }
        Ok(parsed)
    }

    fn refuse_beside_between(&self) -> Result<(), SelectorError> {
        let selector = &self.selector;
        if let Some(direction) = selector.direction {
            let value = if direction == Direction::Upstream { "up" } else { "down" };
            return Err(SelectorError::BothDirections {
                value: value.to_owned(),
                hint: "; leave it out, or use `from` and `to`",
            });
        }
        for (field, prefix, ports) in [
            ("source", selector.source, selector.source_ports),
            ("destination", selector.destination, selector.destination_ports),
        ] {
            let endpoint = Endpoint { prefix, ports };
            if endpoint != Endpoint::default() {
                return Err(SelectorError::Twice { field, value: endpoint.to_string() });
            }
        }
        Ok(())
    }
}

fn value<'a>(
    field: &'static str,
    after: &str,
    expected: &'static str,
    word: Option<&'a str>,
) -> Result<&'a str, SelectorError> {
    word.ok_or_else(|| SelectorError::Missing { field, after: after.to_owned(), expected })
}

fn unknown(word: &str) -> SelectorError {
    const WORDS: [&str; 10] =
        ["up", "down", "from", "to", "between", "dscp", "length", "any", "upstream", "downstream"];
    let suggestion = WORDS
        .into_iter()
        .chain(PROTOCOLS.iter().map(|(name, _)| *name))
        .map(|known| (strsim::osa_distance(known, &word.to_ascii_lowercase()), known))
        .filter(|(edits, known)| *edits <= 2 && *edits < known.len().min(word.len()))
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, known)| known);
    SelectorError::UnknownWord { word: word.chars().take(80).collect(), suggestion }
}

impl Endpoint {
    fn read(field: &'static str, port_field: &'static str, text: &str) -> Result<Self, SelectorError> {
        let not_a_prefix = || SelectorError::NotAPrefix { field, value: text.chars().take(80).collect() };
        let (prefix, ports) = if let Some(rest) = text.strip_prefix('[') {
            let (prefix, rest) = rest.split_once(']').ok_or_else(not_a_prefix)?;
            match rest.strip_prefix(':') {
                Some(ports) => (prefix, Some(ports)),
                None if rest.is_empty() => (prefix, None),
                None => return Err(not_a_prefix()),
            }
        } else if text.matches(':').count() == 1 {
            let (prefix, ports) = text.split_once(':').ok_or_else(not_a_prefix)?;
            (prefix, Some(ports))
        } else {
            (text, None)
        };
        let prefix = if prefix.is_empty() || prefix.eq_ignore_ascii_case("any") {
            None
        } else {
            let address = || prefix.parse::<IpAddr>().ok().map(IpNet::from);
            let prefix = prefix.parse().ok().or_else(address).ok_or_else(not_a_prefix)?;
            super::check_prefix(field, prefix)?;
            Some(prefix)
        };
        let ports = ports.map(|ports| read_range(port_field, ports, PORTS)).transpose()?;
        Ok(Self { prefix, ports })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = self.prefix.map(|prefix| {
            if prefix.prefix_len() == prefix.max_prefix_len() {
                prefix.addr().to_string()
            } else {
                prefix.to_string()
            }
        });
        match (prefix, self.ports) {
            (None, None) => f.write_str("any"),
            (None, Some(ports)) => write!(f, ":{ports}"),
            (Some(prefix), None) => f.write_str(&prefix),
            (Some(prefix), Some(ports)) if prefix.contains(':') => write!(f, "[{prefix}]:{ports}"),
            (Some(prefix), Some(ports)) => write!(f, "{prefix}:{ports}"),
        }
    }
}

fn read_range(field: &'static str, text: &str, expected: &'static str) -> Result<Range16, SelectorError> {
    let not_a_range = || SelectorError::NotARange { field, value: text.chars().take(80).collect(), expected };
    let number = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| text.parse().ok())
            .flatten()
            .ok_or_else(not_a_range)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Range16::new(number(first)?, number(last)?).map_err(|reason| SelectorError::Inverted { field, reason })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use ipnet::{Ipv4Net, Ipv6Net};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn selectors_as_people_write_them() {
        for (text, printed) in [
            ("any", "any"),
            ("up", "up"),
            ("Down TCP to 192.0.2.1", "down tcp to 192.0.2.1"),
            ("from 198.51.100.0/24:5000-6000 udp down", "down udp from 198.51.100.0/24:5000-6000"),
            ("to :443 tcp", "tcp to :443"),
            ("from any:80", "from :80"),
            ("from any to 192.0.2.0/24", "to 192.0.2.0/24"),
            ("to [2001:db8::/64]:443", "to [2001:db8::/64]:443"),
            ("to [2001:db8::1]", "to 2001:db8::1"),
            ("from 2001:db8::1:80", "from 2001:db8::1:80"),
            ("47 dscp 46", "gre dscp EF"),
            ("dscp af41 length 64-1500", "dscp AF41 length 64-1500"),
            ("length 1500", "length 1500"),
            ("from 0.0.0.0/0", "from 0.0.0.0/0"),
            ("from ::/0", "from ::/0"),
            ("89", "89"),
            ("icmpv6", "icmp6"),
        ] {
            let selector: Selector = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(selector.to_string(), printed, "{text}");
        }
    }

    #[test]
    fn between_is_both_directions() {
        let flows = parse_flows("between 192.0.2.7:1000-2000 and 198.51.100.0/24:443 udp dscp EF").unwrap();
        let printed: Vec<_> = flows.iter().map(ToString::to_string).collect();
        assert_eq!(
            printed,
            [
                "up udp from 192.0.2.7:1000-2000 to 198.51.100.0/24:443 dscp EF",
                "down udp from 198.51.100.0/24:443 to 192.0.2.7:1000-2000 dscp EF",
            ]
        );
        assert_eq!(parse_flows("down tcp").unwrap().len(), 1);
    }

    #[test]
    fn what_is_no_selector_is_said() {
        for (text, field, value, said) in [
            ("", "selector", "", "expected up, down"),
            ("form 192.0.2.0/24", "selector", "form", "did you mean `from`?"),
            ("tpc", "selector", "tpc", "did you mean `tcp`?"),
            ("256", "selector", "256", "is not understood"),
            ("up down", "direction", "down", "already given"),
            ("tcp udp", "protocol", "udp", "already given"),
            ("from", "source", "from", "a value is missing"),
            ("from banana", "source", "banana", "not an address or prefix"),
            ("from 192.0.2.0/33", "source", "192.0.2.0/33", "not an address or prefix"),
            ("to 192.0.2.1/24", "destination", "192.0.2.1/24", "did you mean 192.0.2.0/24?"),
            ("to 2001:db8::1/64", "destination", "2001:db8::1/64", "did you mean 2001:db8::/64?"),
            ("to ::ffff:192.0.2.1", "destination", "::ffff:192.0.2.1/128", "write the IPv4 address"),
            ("from 192.0.2.1:0", "source_ports", "0", "no packet is in the range"),
            ("from 192.0.2.1:90-80", "source_ports", "90-80", "inverted"),
            ("from 192.0.2.1:http", "source_ports", "http", "a port from 1 to 65535"),
            ("from 192.0.2.1:", "source_ports", "", "a port from 1 to 65535"),
            ("from 192.0.2.1:+80", "source_ports", "+80", "a port from 1 to 65535"),
            ("to :70000", "destination_ports", "70000", "a port from 1 to 65535"),
            ("to [2001:db8::1]443", "destination", "[2001:db8::1]443", "not an address"),
            ("to [2001:db8::1", "destination", "[2001:db8::1", "not an address"),
            ("from 192.0.2.1 to 2001:db8::1", "destination", "2001:db8::1/128", "one is IPv4"),
            ("icmp to :80", "destination_ports", "80", "icmp, which has no ports"),
            ("89 from :80", "source_ports", "80", "89, which has no ports"),
            ("icmp to 2001:db8::1", "protocol", "icmp", "use icmp6"),
            ("icmp6 to 192.0.2.1", "protocol", "icmp6", "use icmp"),
            ("dscp 64", "dscp", "64", "0 to 63"),
            ("dscp", "dscp", "dscp", "EF, AF41"),
            ("length 0-0", "length", "0", "from 20 bytes on"),
            ("length 1500-64", "length", "1500-64", "inverted"),
            ("length", "length", "length", "64-1500"),
            ("up between 192.0.2.1 and 198.51.100.1", "direction", "up", "both directions"),
            ("between 192.0.2.1 198.51.100.1", "remote", "192.0.2.1", "`and`"),
            ("between 192.0.2.1 and", "remote", "and", "a value is missing"),
            ("between 192.0.2.9/24 and any", "subscriber", "192.0.2.9/24", "192.0.2.0/24"),
            ("between any and 192.0.2.1 from 192.0.2.2", "source", "192.0.2.2", "already given"),
        ] {
            let error = parse_flows(text).expect_err(text);
            assert_eq!((error.field(), error.value().as_str()), (field, value), "{text}: {error}");
            assert!(error.to_string().contains(said), "{text}: {error}");
        }
        assert!("between any and 192.0.2.1".parse::<Selector>().is_err());
    }

    #[test]
    fn json_takes_members_or_text_and_checks_both() {
        let expected: Selector = "down udp from 198.51.100.0/24:53".parse().unwrap();
        let json = serde_json::to_string(&expected).unwrap();
        assert_eq!(serde_json::from_str::<Selector>(&json).unwrap(), expected);
        assert_eq!(
            serde_json::from_str::<Selector>(r#""down udp from 198.51.100.0/24:53""#).unwrap(),
            expected
        );
        for (json, said) in [
            (r#"{"source":"192.0.2.1/24"}"#, "192.0.2.0/24"),
            (r#"{"source_ports":[9,1]}"#, "inverted"),
            (r#"{"dscp":64}"#, "0 to 63"),
            (r#"{"colour":1}"#, "unknown field `colour`"),
            (r#"{"direction":"sideways"}"#, "sideways"),
            (r#""sideways""#, "not understood"),
            ("7", "a selector, as an object or a text"),
        ] {
            let error = serde_json::from_str::<Selector>(json).expect_err(json).to_string();
            assert!(error.contains(said), "{json}: {error}");
        }
    }

    pub(crate) fn any_selector() -> impl Strategy<Value = Selector> {
        let v4 = || {
            (any::<u32>(), 0u8..=32).prop_map(|(bits, length)| {
                IpNet::V4(Ipv4Net::new(Ipv4Addr::from(bits), length).unwrap().trunc())
            })
        };
        let v6 = || {
            (any::<u128>(), 0u8..=128).prop_map(|(bits, length)| {
                IpNet::V6(Ipv6Net::new(Ipv6Addr::from(bits), length).unwrap().trunc())
            })
        };
        let pair = prop_oneof![
            (prop::option::of(v4()), prop::option::of(v4())),
            (prop::option::of(v6()), prop::option::of(v6())),
        ];
        let range =
            || (any::<u16>(), any::<u16>()).prop_map(|(a, b)| Range16::new(a.min(b), a.max(b)).unwrap());
        (
            prop::option::of(prop::sample::select(Direction::BOTH.to_vec())),
            prop::option::of(any::<u8>()),
            pair,
            prop::option::of(range()),
            prop::option::of(range()),
            prop::option::of(0u8..=63),
            prop::option::of(range()),
        )
            .prop_map(
                |(
                    direction,
                    protocol,
                    (source, destination),
                    source_ports,
                    destination_ports,
                    dscp,
                    lengths,
                )| {
                    Selector {
                        direction,
                        protocol,
                        source,
                        destination,
                        source_ports,
                        destination_ports,
                        dscp,
                        lengths,
                    }
                },
            )
            .prop_filter("checked", |selector| selector.check().is_ok())
    }

    proptest! {
        #[test]
        fn text_and_json_read_back(selector in any_selector()) {
            prop_assert_eq!(selector.to_string().parse::<Selector>(), Ok(selector.clone()));
            let json = serde_json::to_string(&selector).unwrap();
            prop_assert_eq!(serde_json::from_str::<Selector>(&json).unwrap(), selector);
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,60}", words in prop::collection::vec(
            prop::sample::select(vec!["up", "from", "to", "[", "]:1", "::", ":1-", "between", "and", "dscp", "length", "any", "6", "192.0.2.0/24:5"]), 0..6)
        ) {
            let _ = parse_flows(&text);
            let _ = parse_flows(&words.join(" "));
        }
    }
}
