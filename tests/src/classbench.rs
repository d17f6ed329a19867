//! Rule sets and packet traces in the format of ClassBench (Taylor and Turner, IEEE/ACM ToN 15(3), 2007),
//! sets of the same kind made from a seed, and packets that suit them.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use flate2::read::GzDecoder;
use ipnet::{IpNet, Ipv4Net};
use qos_common::classify::{Family, has_ports};
use qos_userspace::domain::Direction;
use qos_userspace::domain::selector::{Range16, Selector};

use crate::random::Random;

/// What a rule sees of a packet. Ports are zero where the protocol has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Of both addresses.
    pub family: Family,
    /// Source address, left-aligned: an IPv4 address is in the first 32 bits.
    pub source: u128,
    /// Destination address, likewise.
    pub destination: u128,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// IP protocol.
    pub protocol: u8,
}

impl Tuple {
    /// A packet of addresses as [`Tuple::source`].
    #[must_use]
    pub const fn new(
        family: Family,
        [source, destination]: [u128; 2],
        ports: [u16; 2],
        protocol: u8,
    ) -> Self {
        let [source_port, destination_port] = if has_ports(protocol) { ports } else { [0; 2] };
        Self { family, source, destination, source_port, destination_port, protocol }
    }

    /// A packet of IPv4 addresses.
    #[must_use]
    pub const fn v4([source, destination]: [u32; 2], ports: [u16; 2], protocol: u8) -> Self {
        Self::new(Family::V4, [left_aligned(source), left_aligned(destination)], ports, protocol)
    }

    /// Source and destination.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.source, self.destination].map(|bits| address(self.family, bits))
    }
}

/// An IPv4 address as [`Tuple::source`].
const fn left_aligned(address: u32) -> u128 {
    (address as u128) << 96
}

/// An address as [`Tuple::source`].
fn address(family: Family, bits: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits((bits >> 96) as u32).into(),
        Family::V6 => Ipv6Addr::from_bits(bits).into(),
    }
}

/// The first bits of an address of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    /// As [`Tuple::source`]; zero behind the prefix.
    pub bits: u128,
    /// How many there are.
    pub length: u8,
}

impl Prefix {
    fn new(address: u128, length: u8) -> Self {
        Self { bits: address & !host_mask(length), length }
    }

    /// Tells whether the address begins with the prefix.
    #[must_use]
    pub const fn contains(self, address: u128) -> bool {
        (self.bits ^ address).leading_zeros() >= self.length as u32
    }
}

impl From<Ipv4Net> for Prefix {
    fn from(net: Ipv4Net) -> Self {
        Self::new(left_aligned(net.addr().to_bits()), net.prefix_len())
    }
}

/// Ones behind a prefix.
fn host_mask(length: u8) -> u128 {
    u128::MAX.checked_shr(u32::from(length)).unwrap_or(0)
}

/// A rule. Of those that match a packet the first of the set counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TupleRule {
    /// Of both prefixes.
    pub family: Family,
    /// Source prefix.
    pub source: Prefix,
    /// Destination prefix.
    pub destination: Prefix,
    /// First and last source port.
    pub source_ports: [u16; 2],
    /// First and last destination port.
    pub destination_ports: [u16; 2],
    /// IP protocol; none: any.
    pub protocol: Option<u8>,
}

/// What a rule says of a port that says nothing.
pub const ALL_PORTS: [u16; 2] = [0, u16::MAX];

impl TupleRule {
    /// Tells whether the rule matches. Written apart from the classifier's own comparison, which is
    /// checked against it.
    #[must_use]
    pub fn matches(&self, packet: &Tuple) -> bool {
        let within = |port: u16, [first, last]: [u16; 2]| first <= port && port <= last;
        self.family == packet.family
            && self.source.contains(packet.source)
            && self.destination.contains(packet.destination)
            && self.protocol.is_none_or(|protocol| protocol == packet.protocol)
            && (!self.names_ports()
                || has_ports(packet.protocol)
                    && within(packet.source_port, self.source_ports)
                    && within(packet.destination_port, self.destination_ports))
    }

    fn names_ports(&self) -> bool {
        self.source_ports != ALL_PORTS || self.destination_ports != ALL_PORTS
    }

    /// Source and destination prefix.
    ///
    /// # Panics
    /// Where a prefix is longer than an address of the rule's family.
    #[must_use]
    pub fn networks(&self) -> [IpNet; 2] {
        [self.source, self.destination]
            .map(|prefix| IpNet::new_assert(address(self.family, prefix.bits), prefix.length))
    }

    /// The same as a selector of upstream packets.
    ///
    /// # Errors
    /// Where no packet matches.
    pub fn selector(&self) -> Result<Selector> {
        let range = |[first, last]: [u16; 2]| -> Result<_> {
            Ok(if [first, last] == ALL_PORTS { None } else { Some(Range16::new(first, last)?) })
        };
        let [source, destination] = self.networks();
        let selector = Selector {
            direction: Some(Direction::Upstream),
            protocol: self.protocol,
            source: Some(source),
            destination: Some(destination),
            source_ports: range(self.source_ports)?,
            destination_ports: range(self.destination_ports)?,
            ..Selector::default()
        };
        selector.check()?;
        Ok(selector)
    }

    /// A packet that the rule matches, and perhaps an earlier one too.
    fn packet(&self, random: &mut Random) -> Tuple {
        let addresses = [self.source, self.destination].map(|prefix| {
            let bits = match self.family {
                Family::V4 => left_aligned(random.next() as u32),
                Family::V6 => u128::from(random.next()) << 64 | u128::from(random.next()),
            };
            prefix.bits | bits & host_mask(prefix.length)
        });
        let mut port = |[first, last]: [u16; 2]| first + random.below(u64::from(last - first) + 1) as u16;
        let ports = [port(self.source_ports), port(self.destination_ports)];
        // What is left open is mostly TCP, and what names ports has some.
        let protocol = self.protocol.unwrap_or_else(|| match self.names_ports() {
            true => random.choose(&[6, 6, 6, 17]),
            false => random.choose(&[6, 6, 6, 17, 47]),
        });
        Tuple::new(self.family, addresses, ports, protocol)
    }
}

/// How IPv4 addresses become IPv6 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Plan {
    /// As an operator has them: its own /32, in which the IPv4 address is the number of a network of /64, and
    /// a host's interface identifier depends on the seed and the address. /0 stays /0, /1 to /31 become /33
    /// to /63, and /32 becomes /128.
    Subnets,
    /// Each bit of an address becomes four, which depend on the seed, on the bit and on all bits before it,
    /// and never are the same for both values of the bit: /n becomes /4n. Of the values of so many bits that
    /// follow one another few occur, which is hard on whatever looks at some of them at once.
    Nibbles,
}

/// Makes IPv6 sets and packets of the same shapes as IPv4 ones.
///
/// Prefixes contain one another, and packets lie within them, exactly as before. What else a rule says stays,
/// but that ICMP becomes ICMPv6. A set, its trace and the answers to it keep their places.
#[derive(Clone, Copy, Debug)]
pub struct Widening {
    /// Sets of the same seed go together.
    pub seed: u64,
    /// How.
    pub plan: Plan,
}

impl Widening {
    fn bits(self, address: u128) -> u128 {
        match self.plan {
            Plan::Subnets => self.subnet(address),
            Plan::Nibbles => self.nibbles(address),
        }
    }

    fn subnet(self, address: u128) -> u128 {
        let operator = 0x2001_0db8_u128 << 96;
        let host = Random::new(self.seed ^ (address >> 96) as u64).next();
        operator | address >> 32 | u128::from(host)
    }

    fn nibbles(self, address: u128) -> u128 {
        (0..32).fold(0, |wide, place| {
            // Bits before this one, behind a one that tells how many they are.
            let before = (address >> 96 | 1 << 32) >> (32 - place);
            let number = Random::new(self.seed ^ before as u64).next();
            let (low, step) = (number % 16, 1 + (number >> 8) % 15);
            let is_set = address >> (127 - place) & 1 == 1;
            wide << 4 | u128::from(if is_set { (low + step) % 16 } else { low })
        })
    }

    /// The IPv6 prefix of an IPv4 one.
    #[must_use]
    pub fn prefix(self, prefix: Prefix) -> Prefix {
        Prefix::new(self.bits(prefix.bits), self.length(prefix.length))
    }

    const fn length(self, length: u8) -> u8 {
        match (self.plan, length) {
            (_, 0) => 0,
            (Plan::Subnets, 32) => 128,
            (Plan::Subnets, length) => 32 + length,
            (Plan::Nibbles, length) => 4 * length,
        }
    }

    /// The IPv6 rule of an IPv4 one.
    #[must_use]
    pub fn rule(self, rule: &TupleRule) -> TupleRule {
        TupleRule {
            family: Family::V6,
            source: self.prefix(rule.source),
            destination: self.prefix(rule.destination),
            protocol: rule.protocol.map(widened_protocol),
            ..*rule
        }
    }

    /// The IPv6 packet of an IPv4 one.
    #[must_use]
    pub fn packet(self, packet: &Tuple) -> Tuple {
        Tuple {
            family: Family::V6,
            source: self.bits(packet.source),
            destination: self.bits(packet.destination),
            protocol: widened_protocol(packet.protocol),
            ..*packet
        }
    }
}

/// ICMP and ICMPv6 change places.
const fn widened_protocol(protocol: u8) -> u8 {
    match protocol {
        1 => 58,
        58 => 1,
        other => other,
    }
}

/// Reads a rule set, plain or as `.gz`: a rule a line,
/// `@SOURCE/LENGTH DESTINATION/LENGTH FIRST : LAST FIRST : LAST PROTOCOL/MASK [FLAGS/MASK]`, ports of the
/// source first. Flags are passed over, and so are rules that an earlier one is equal to: no packet would
/// be theirs.
///
/// # Errors
/// Where a line is not a rule.
pub fn read_rules(path: &Path) -> Result<Vec<TupleRule>> {
    let mut rules = read_lines(path, |line| {
        let words: Vec<&str> = line.trim_start_matches('@').split_whitespace().collect();
        let word = |at: usize| words.get(at).copied().context("it ends too early");
        let net = |at| -> Result<Ipv4Net> {
            let net: Ipv4Net = word(at)?.parse().with_context(|| format!("no prefix: {}", words[at]))?;
            Ok(net.trunc())
        };
        let ports = |at| -> Result<[u16; 2]> {
            ensure!(word(at + 1)? == ":", "no range of ports at word {at}");
            Ok([word(at)?.parse()?, word(at + 2)?.parse()?])
        };
        let (protocol, mask) = word(8)?.split_once('/').context("no protocol and mask")?;
        let hexadecimal = |text: &str| -> Result<u8> {
            let digits = text.strip_prefix("0x").with_context(|| format!("no protocol: {text}"))?;
            Ok(u8::from_str_radix(digits, 16)?)
        };
        let rule = TupleRule {
            family: Family::V4,
            source: net(0)?.into(),
            destination: net(1)?.into(),
            source_ports: ports(2)?,
            destination_ports: ports(5)?,
            protocol: match hexadecimal(mask)? {
                0 => None,
                0xff => Some(hexadecimal(protocol)?),
                other => anyhow::bail!("a protocol mask of {other:#x}"),
            },
        };
        for [first, last] in [rule.source_ports, rule.destination_ports] {
            ensure!(first <= last, "ports {first} to {last}");
        }
        Ok(rule)
    })?;
    let mut seen = HashSet::new();
    rules.retain(|rule| seen.insert(*rule));
    Ok(rules)
}

/// Reads a trace, plain or as `.gz`: a packet a line, source, destination, source port, destination port
/// and protocol as numbers; what follows is passed over.
///
/// # Errors
/// Where a line is not a packet.
pub fn read_trace(path: &Path) -> Result<Vec<Tuple>> {
    read_lines(path, |line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| -> Result<u32> { Ok(words.get(at).context("it ends too early")?.parse()?) };
        let port = |at| -> Result<u16> { Ok(u16::try_from(number(at)?)?) };
        Ok(Tuple::v4([number(0)?, number(1)?], [port(2)?, port(3)?], u8::try_from(number(4)?)?))
    })
}

fn read_lines<T>(path: &Path, parse: impl Fn(&str) -> Result<T>) -> Result<Vec<T>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let reader: Box<dyn Read> = match path.extension() {
        Some(extension) if extension == "gz" => Box::new(GzDecoder::new(file)),
        _ => Box::new(file),
    };
    let mut found = Vec::new();
    for (line, number) in BufReader::new(reader).lines().zip(1..) {
        let line = line.with_context(|| format!("reading {}", path.display()))?;
        if !line.trim().is_empty() {
            found.push(parse(&line).with_context(|| format!("{}, line {number}", path.display()))?);
        }
    }
    ensure!(!found.is_empty(), "{} is empty", path.display());
    Ok(found)
}

/// A set of `count` distinct rules that look like an access network's: hosts and small networks of
/// subscribers (10.0.0.0/8) towards hosts and networks of providers, one in fifty with a short prefix on one
/// side or both; services by port, a tenth of them ranges. Precise rules come first, as people write them.
#[must_use]
pub fn generate(count: usize, seed: u64) -> Vec<TupleRule> {
    let mut random = Random::new(seed);
    let mut rules = HashSet::new();
    let mut ordered = Vec::with_capacity(count);
    while ordered.len() < count {
        let rule = any_rule(&mut random);
        if rules.insert(rule) {
            ordered.push(rule);
        }
    }
    ordered.sort_by_key(|rule| 64 - rule.source.length - rule.destination.length);
    ordered
}

fn any_rule(random: &mut Random) -> TupleRule {
    const SERVICES: [u16; 12] = [22, 25, 53, 80, 110, 123, 443, 993, 1_935, 3_478, 5_060, 8_080];
    let is_wild = random.once_in(50);
    let (near, far) = match (is_wild, random.below(3)) {
        (false, _) => (random.choose(&[32, 32, 32, 32, 30, 29, 24]), random.choose(&[32, 32, 28, 24, 22])),
        (true, 0) => (random.choose(&[0, 8, 12]), random.choose(&[24, 32])),
        (true, 1) => (random.choose(&[24, 32]), random.choose(&[0, 4, 8])),
        (true, _) => (random.choose(&[8, 16]), random.choose(&[0, 8, 16])),
    };
    let source = prefix(0x0a00_0000 | random.next() as u32 & 0x00ff_ffff, near);
    // Providers are few, so that their networks meet.
    let provider = Random::new(random.below(2_000)).next() as u32;
    let destination = prefix(provider ^ (random.next() as u32 & 0xff), far);
    let (destination_ports, protocol) = match random.below(10) {
        0 => (ALL_PORTS, None),
        1 => (ALL_PORTS, Some(random.choose(&[1, 47, 50]))),
        2 => ([1_024, u16::MAX], Some(17)),
        _ => ([random.choose(&SERVICES); 2], Some(random.choose(&[6, 6, 17]))),
    };
    let family = Family::V4;
    TupleRule { family, source, destination, source_ports: ALL_PORTS, destination_ports, protocol }
}

/// The first bits of an IPv4 address.
#[must_use]
pub fn prefix(address: u32, length: u8) -> Prefix {
    Prefix::new(left_aligned(address), length)
}

/// `count` packets spread evenly over the rules, each of a flow of its own, in an order that no prefetcher
/// guesses.
#[must_use]
pub fn uniform(rules: &[TupleRule], count: usize, seed: u64) -> Vec<Tuple> {
    let mut random = Random::new(seed);
    let mut packets: Vec<_> =
        (0..count).map(|flow| rules[flow * rules.len() / count].packet(&mut random)).collect();
    random.shuffle(&mut packets);
    packets
}

/// `count` IPv4 packets of random addresses, ports and protocol.
#[must_use]
pub fn flood(count: usize, seed: u64) -> Vec<Tuple> {
    let mut random = Random::new(seed);
    let mut packet = || {
        let (addresses, rest) = (random.next(), random.next());
        let protocol = random.choose(&[6, 17, 1]);
        let addresses = [(addresses >> 32) as u32, addresses as u32];
        Tuple::v4(addresses, [rest as u16, (rest >> 16) as u16], protocol)
    };
    (0..count).map(|_| packet()).collect()
}

/// The first rule that matches each packet, by linear search on all CPUs.
#[must_use]
pub fn first_matches(rules: &[TupleRule], packets: &[Tuple]) -> Vec<Option<usize>> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let share = packets.len().div_ceil(threads).max(1);
    let find = |packet: &Tuple| rules.iter().position(|rule| rule.matches(packet));
    thread::scope(|scope| {
        let workers: Vec<_> = packets
            .chunks(share)
            .map(|packets| scope.spawn(move || packets.iter().map(find).collect::<Vec<_>>()))
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a search does not panic")).collect()
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    const RULES: &str = "@192.0.2.0/24\t198.51.100.7/32\t0 : 65535\t53 : 53\t0x11/0xFF\t0x0000/0x0000\t\n\
                         @0.0.0.0/0 198.51.100.7/32 0 : 65535 1024 : 65535 0x00/0x00\n\
                         \n\
                         @192.0.2.0/24\t198.51.100.7/32\t0 : 65535\t53 : 53\t0x11/0xFF\t0x1000/0x1000\n";

    fn file(name: &str, bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    #[test]
    fn sets_and_traces_are_read_plain_and_compressed() {
        let mut compressed = GzEncoder::new(Vec::new(), Compression::default());
        compressed.write_all(RULES.as_bytes()).unwrap();
        let (_plain, plain) = file("set.rules", RULES.as_bytes());
        let (_packed, packed) = file("set.rules.gz", &compressed.finish().unwrap());
        let rules = read_rules(&plain).unwrap();
        assert_eq!(read_rules(&packed).unwrap(), rules);
        let selectors: Vec<_> = rules.iter().map(|rule| rule.selector().unwrap().to_string()).collect();
        assert_eq!(
            selectors,
            ["up udp from 192.0.2.0/24 to 198.51.100.7:53", "up from 0.0.0.0/0 to 198.51.100.7:1024-65535"]
        );
        // 192.0.2.9 to 198.51.100.7 by UDP to 53, TCP to 1024, ICMP, and UDP from elsewhere to 53.
        let (_trace, trace) = file(
            "set.trace",
            b"3221225993\t3325256711\t40000\t53\t17\t0\t1\n3221225993 3325256711 1 1024 6\n\
              3221225993 3325256711 9 1024 1\n1 3325256711 1 53 17\n",
        );
        let packets = read_trace(&trace).unwrap();
        assert_eq!(first_matches(&rules, &packets), [Some(0), Some(1), None, None]);
    }

    #[test]
    fn a_line_that_is_no_rule_is_named() {
        for (line, reason) in [
            ("@192.0.2.0/24 198.51.100.7/32 0 : 65535 53 : 53", "ends too early"),
            ("@192.0.2.0/33 198.51.100.7/32 0 : 65535 53 : 53 0x11/0xFF", "no prefix: 192.0.2.0/33"),
            ("@192.0.2.0/24 198.51.100.7/32 0 : 65535 53 : 52 0x11/0xFF", "ports 53 to 52"),
            ("@192.0.2.0/24 198.51.100.7/32 0 : 65535 53 : 53 0x11/0xF0", "a protocol mask of 0xf0"),
        ] {
            let (_folder, path) = file("set.rules", format!("{RULES}{line}\n").as_bytes());
            let error = format!("{:#}", read_rules(&path).unwrap_err());
            assert!(error.contains("set.rules, line 5: ") && error.contains(reason), "{error}");
        }
        let (_folder, empty) = file("set.rules", b"");
        assert!(read_rules(&empty).unwrap_err().to_string().contains("is empty"));
    }

    #[test]
    fn packets_of_a_rule_match_it() {
        let rules = generate(500, 9);
        assert_eq!(rules, generate(500, 9));
        let wide = PLANS.map(|plan| rules.iter().map(|rule| Widening { seed: 7, plan }.rule(rule)).collect());
        for rules in [rules.clone()].into_iter().chain(wide) {
            let packets = uniform(&rules, 2_000, 1);
            assert_eq!(packets, uniform(&rules, 2_000, 1));
            assert!(first_matches(&rules, &packets).iter().all(Option::is_some));
            let mut random = Random::new(2);
            for rule in &rules {
                assert!(rule.matches(&rule.packet(&mut random)), "{rule:?}");
            }
        }
    }

    const PLANS: [Plan; 2] = [Plan::Subnets, Plan::Nibbles];

    #[test]
    fn wide_rules_answer_wide_packets_as_narrow_ones_do() {
        let rules = generate(2_000, 3);
        let mut packets = uniform(&rules, 2_000, 4);
        packets.extend(flood(2_000, 5));
        let answers = first_matches(&rules, &packets);
        assert!(answers.contains(&None) && answers[..2_000].iter().all(Option::is_some));
        for widening in PLANS.map(|plan| Widening { seed: 7, plan }) {
            let wide_rules: Vec<_> = rules.iter().map(|rule| widening.rule(rule)).collect();
            let wide_packets: Vec<_> = packets.iter().map(|packet| widening.packet(packet)).collect();
            assert_eq!(first_matches(&wide_rules, &wide_packets), answers, "{widening:?}");
            for rule in wide_rules {
                let selector = rule.selector().unwrap();
                assert_eq!(selector.source, Some(rule.networks()[0]));
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn widening_keeps_which_prefix_contains_which(
            [a, b] in proptest::array::uniform2(proptest::prelude::any::<u32>()),
            common in 0u8..=32,
            [long, short] in proptest::array::uniform2(0u8..=32),
            seed in 0u64..4,
        ) {
            // Random addresses have little in common.
            let b = (u64::from(a) >> (32 - common) << (32 - common)) as u32
                | (u64::from(b) & ((1u64 << (32 - common)) - 1)) as u32;
            let [narrow_a, narrow_b] = [prefix(a, long), prefix(b, short)];
            let contains = |outer: Prefix, inner: Prefix| {
                outer.length <= inner.length && outer.contains(inner.bits)
            };
            for widening in PLANS.map(|plan| Widening { seed, plan }) {
                let [wide_a, wide_b] = [narrow_a, narrow_b].map(|prefix| widening.prefix(prefix));
                proptest::prop_assert_eq!(contains(wide_b, wide_a), contains(narrow_b, narrow_a));
                proptest::prop_assert_eq!(wide_a == wide_b, narrow_a == narrow_b);
                proptest::prop_assert_eq!(wide_a.length == 128, long == 32);
                proptest::prop_assert_eq!(widening.prefix(narrow_a), wide_a);
            }
        }
    }
}
