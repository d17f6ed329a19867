//! Readers of single arguments.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use ipnet::IpNet;

use crate::domain::selector::grammar::parse_protocol;
use crate::domain::selector::{SelectorError, parse_flows};
use crate::domain::{Selector, dscp, duration};

/// One `--flow`: a selector, or the two that `between` stands for.
#[derive(Clone, Debug)]
pub(super) struct Flow(pub(super) Vec<Selector>);

impl FromStr for Flow {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        parse_flows(text).map(Self)
    }
}

/// Why a text is no argument.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ArgumentError {
    #[error("`{0}` is not an address or prefix: write 192.0.2.10, 203.0.113.0/24 or 2001:db8::/32")]
    Prefix(String),
    #[error(
        "`{0}` is not an address with a port: write 192.0.2.10:443, [2001:db8::1]:443 or an address alone"
    )]
    Endpoint(String),
    #[error("`{0}` is not a protocol: write tcp, udp, sctp, icmp, icmp6 or a number from 0 to 255")]
    Protocol(String),
    #[error("`{0}` is not a name")]
    Name(String),
    #[error("`{0}` is not a share: write 0.001 or 0.1%, from 0 to 1 or 100%")]
    Share(String),
    #[error("`{0}` is out of range: from 0 to 4294 s")]
    Delay(String),
}

/// A prefix, or an address as the prefix of itself alone.
pub(super) fn prefix(text: &str) -> Result<IpNet, ArgumentError> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| ArgumentError::Prefix(text.to_owned()))
}

pub(super) fn code_point(text: &str) -> Result<u8, dscp::DscpError> {
    dscp::parse(text)
}

pub(super) fn protocol(text: &str) -> Result<u8, ArgumentError> {
    parse_protocol(text).ok_or_else(|| ArgumentError::Protocol(text.to_owned()))
}

/// One of several that have names; `means` says what each is.
pub(super) fn one_of<T: Copy + Send + Sync + 'static, const N: usize>(
    named: [(T, &'static str); N],
    means: [&'static str; N],
) -> impl TypedValueParser<Value = T> {
    let described = |((_, name), means): (&(T, &'static str), _)| PossibleValue::new(*name).help(means);
    let names = PossibleValuesParser::new(named.iter().zip(means).map(described));
    names.try_map(move |text| {
        named.iter().find(|(_, name)| *name == text).map(|(one, _)| *one).ok_or(ArgumentError::Name(text))
    })
}

/// A share from 0 to 1, or in percent.
pub(super) fn share(text: &str) -> Result<f64, ArgumentError> {
    let (number, whole) = match text.strip_suffix('%') {
        Some(percent) => (percent, 100.0),
        None => (text, 1.0),
    };
    number
        .trim()
        .parse::<f64>()
        .ok()
        .map(|number| number / whole)
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| ArgumentError::Share(text.to_owned()))
}

/// A delay, in µs.
pub(super) fn delay(text: &str) -> Result<u32, Box<dyn std::error::Error + Send + Sync>> {
    let duration = duration::parse(text)?;
    let micros = u32::try_from(duration.as_micros()).map_err(|_| ArgumentError::Delay(text.to_owned()))?;
    Ok(micros)
}

/// An address, with a port or without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) address: IpAddr,
    pub(super) port: Option<u16>,
}

impl FromStr for Endpoint {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, ArgumentError> {
        if let Ok(address) = text.parse::<std::net::SocketAddr>() {
            return Ok(Self { address: address.ip(), port: Some(address.port()) });
        }
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        bare.parse()
            .map(|address| Self { address, port: None })
            .map_err(|_| ArgumentError::Endpoint(text.to_owned()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => std::net::SocketAddr::new(self.address, port).fmt(f),
            None => self.address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_delays() {
        for (text, expected) in
            [("0.001", Some(0.001)), ("0.1%", Some(0.001)), ("0", Some(0.0)), ("100%", Some(1.0))]
        {
            assert_eq!(share(text).ok(), expected, "{text}");
        }
        for text in ["", "2", "-0.1", "101%", "nan", "few"] {
            assert!(share(text).is_err(), "{text}");
        }
        assert_eq!(delay("10ms").expect("valid"), 10_000);
        assert_eq!(delay("2s").expect("valid"), 2_000_000);
        for text in ["-1ms", "2h", "soon"] {
            assert!(delay(text).is_err(), "{text}");
        }
    }

    #[test]
    fn endpoints_and_prefixes() {
        for text in ["192.0.2.1:80", "[2001:db8::1]:443", "192.0.2.1", "2001:db8::1"] {
            assert_eq!(text.parse::<Endpoint>().expect(text).to_string(), text);
        }
        for text in ["192.0.2.1:99999", "host:80", "", "2001:db8::g"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
        assert_eq!(prefix("192.0.2.1").expect("valid").to_string(), "192.0.2.1/32");
        assert_eq!(prefix("2001:db8::/32").expect("valid").to_string(), "2001:db8::/32");
        assert!(prefix("192.0.2.1/33").is_err());
    }
}
