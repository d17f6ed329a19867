//! Fields of a packet that forks look at, and what of them rules take.

use qos_common::classify::{Address, CHECK_DSCP, CHECK_PORTS, CHECK_PROTOCOL, Family, Rule, Slot};

/// Most fields that a family has.
pub(super) const MAX_FIELDS: usize = 9;

/// A field: some bits of one of the words of a [`qos_common::classify::Key`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Field {
    kind: Kind,
    /// Number of the word.
    pub(super) word: u32,
    /// The field's lowest bit.
    pub(super) shift: u32,
    /// Its number of bits.
    pub(super) bits: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Bits of an address, from this one on (the first is 0).
    Source(u32),
    Destination(u32),
    SourcePort,
    DestinationPort,
    Length,
    Protocol,
    Dscp,
}

const fn field(kind: Kind, word: u32, shift: u32, bits: u32) -> Field {
    Field { kind, word, shift, bits }
}

const SOURCE_PORT: Field = field(Kind::SourcePort, 4, 0, 16);
const DESTINATION_PORT: Field = field(Kind::DestinationPort, 4, 16, 16);
const LENGTH: Field = field(Kind::Length, 4, 32, 16);
const PROTOCOL: Field = field(Kind::Protocol, 4, 48, 8);
const DSCP: Field = field(Kind::Dscp, 4, 56, 8);

const V4: [Field; 7] = [
    field(Kind::Source(0), 0, 32, 32),
    field(Kind::Destination(0), 2, 32, 32),
    SOURCE_PORT,
    DESTINATION_PORT,
    LENGTH,
    PROTOCOL,
    DSCP,
];
const V6: [Field; MAX_FIELDS] = [
    field(Kind::Source(0), 0, 0, 64),
    field(Kind::Source(64), 1, 0, 64),
    field(Kind::Destination(0), 2, 0, 64),
    field(Kind::Destination(64), 3, 0, 64),
    SOURCE_PORT,
    DESTINATION_PORT,
    LENGTH,
    PROTOCOL,
    DSCP,
];

/// Fields of the packets of a family.
pub(super) const fn fields(family: u8) -> &'static [Field] {
    if family == Family::V4 as u8 { &V4 } else { &V6 }
}

/// First and last value.
pub(super) type Span = (u64, u64);

impl Field {
    /// Largest value of the field's lowest `bits` bits.
    pub(super) const fn ones(bits: u32) -> u64 {
        if bits == 0 { 0 } else { u64::MAX >> (64 - bits) }
    }

    /// Tells whether packets can be without it.
    pub(super) const fn may_be_unknown(&self) -> bool {
        matches!(self.kind, Kind::SourcePort | Kind::DestinationPort | Kind::Protocol)
    }

    /// The values that a rule takes.
    pub(super) fn span(&self, rule: &Rule) -> Span {
        let all = (0, Self::ones(self.bits));
        let wide = |[first, last]: [u16; 2]| (u64::from(first), u64::from(last));
        let one = |checked: u8, value: u8| match rule.checks & checked {
            0 => all,
            _ => (u64::from(value), u64::from(value)),
        };
        match self.kind {
            Kind::Source(first) => self.prefix(rule.source, rule.source_length, first),
            Kind::Destination(first) => self.prefix(rule.destination, rule.destination_length, first),
            Kind::SourcePort | Kind::DestinationPort if rule.checks & CHECK_PORTS == 0 => all,
            Kind::SourcePort => wide(rule.source_ports),
            Kind::DestinationPort => wide(rule.destination_ports),
            Kind::Length => wide(rule.lengths),
            Kind::Protocol => one(CHECK_PROTOCOL, rule.protocol),
            Kind::Dscp => one(CHECK_DSCP, rule.dscp),
        }
    }

    /// What a prefix takes of the address bits from `first` on.
    fn prefix(&self, address: Address, length: u8, first: u32) -> Span {
        let half = if first == 0 { address.high } else { address.low };
        let value = half >> self.shift;
        let open = self.bits - u32::from(length).saturating_sub(first).min(self.bits);
        (value, value | Self::ones(open))
    }
}

/// Bits of one field that choose: `width` of them, from bit `shift` of the field on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Number of the field.
    pub(super) field: usize,
    /// Lowest of its bits.
    pub(super) shift: u32,
    /// Number of bits.
    pub(super) width: u32,
}

impl Window {
    /// The window of a fork.
    pub(super) fn of(fork: Slot, family: u8) -> Option<Self> {
        let fields = fields(family);
        let holds = |field: &Field| {
            field.word == fork.word() && (field.shift..field.shift + field.bits).contains(&fork.shift())
        };
        let number = fields.iter().position(holds)?;
        Some(Self { field: number, shift: fork.shift() - fields[number].shift, width: fork.width() })
    }

    /// The bits, as people count them: from an address's or number's first one.
    pub(super) fn in_words(self, family: u8) -> String {
        let field = fields(family)[self.field];
        let (name, begin) = match field.kind {
            Kind::Source(first) => ("source", first),
            Kind::Destination(first) => ("destination", first),
            Kind::SourcePort => ("source port", 0),
            Kind::DestinationPort => ("destination port", 0),
            Kind::Length => ("length", 0),
            Kind::Protocol => ("protocol", 0),
            Kind::Dscp => ("code point", 0),
        };
        let last = begin + field.bits - self.shift;
        let first = last.saturating_sub(self.width).max(begin) + 1;
        if first == last {
            format!("bit {last} of the {name}")
        } else {
            format!("bits {first} to {last} of the {name}")
        }
    }

    /// Number of choices.
    pub(super) const fn choices(&self) -> u32 {
        1 << self.width
    }

    /// The choices that values of a span lead to: the first, and how many from there on, the first
    /// following the last.
    pub(super) const fn chosen(&self, (first, last): Span) -> (u32, u32) {
        let (from, to) = (first >> self.shift, last >> self.shift);
        let mask = self.choices() as u64 - 1;
        if to - from >= mask { (0, self.choices()) } else { ((from & mask) as u32, (to - from) as u32 + 1) }
    }

    /// What is left of a span, of the bits below the window, where it led to `choice`. A span that comes
    /// round to it more than once leaves all.
    const fn narrow(&self, (first, last): Span, choice: u32) -> Span {
        let (from, to) = (first >> self.shift, last >> self.shift);
        let below = Field::ones(self.shift);
        let mask = self.choices() as u64 - 1;
        if to - from > mask {
            return (0, below);
        }
        let at = from + ((choice as u64).wrapping_sub(from) & mask);
        let low = if at == from { first & below } else { 0 };
        let high = if at == to { last & below } else { below };
        (low, high)
    }
}

/// The way to a slot: what forks before it chose.
#[derive(Clone, Debug, Default)]
pub(super) struct Way {
    steps: [Vec<(Window, u32)>; MAX_FIELDS],
    /// Forks passed.
    pub(super) depth: u32,
    /// What packets come here.
    pub(super) packets: Packets,
}

/// Packets that come to a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Packets {
    /// Any.
    #[default]
    All,
    /// Those of which all is known.
    Known,
    /// Those whose ports are not known.
    Unknown,
}

impl Way {
    /// The way on, through the choice of a fork.
    pub(super) fn through(&self, window: Window, choice: u32, splits: bool) -> Self {
        let mut way = self.clone();
        way.depth += 1;
        if splits && choice == window.choices() {
            way.packets = Packets::Unknown;
            return way;
        }
        if splits {
            way.packets = Packets::Known;
        }
        way.steps[window.field].push((window, choice));
        way
    }

    /// Bits of a field that no fork has looked at, below those that one has.
    pub(super) fn bits(&self, fields: &[Field], field: usize) -> u32 {
        self.steps[field].last().map_or(fields[field].bits, |(window, _)| window.shift)
    }

    /// What of a rule's values of a field is left here, in those bits.
    pub(super) fn span(&self, fields: &[Field], field: usize, rule: &Rule) -> Span {
        self.steps[field]
            .iter()
            .fold(fields[field].span(rule), |span, (window, choice)| window.narrow(span, *choice))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use qos_common::classify::Key;

    use super::*;

    proptest! {
        /// A value of a rule's span is led to one of the choices of the span, and stays in what is left.
        #[test]
        fn a_value_goes_where_its_span_goes(
            a in any::<u16>(), b in any::<u16>(), pick in any::<u16>(),
            widths in prop::collection::vec((1u32..=8, 0u32..4), 1..5),
        ) {
            let (first, last) = (a.min(b), a.max(b));
            let value = u64::from(first) + u64::from(pick) % (u64::from(last - first) + 1);
            let rule = Rule {
                checks: CHECK_PORTS, destination_ports: [first, last], source_ports: [0, u16::MAX],
                ..Rule::default()
            };
            let fields = fields(0);
            let mut way = Way::default();
            for (width, skip) in widths {
                let bits = way.bits(fields, 3);
                if width + skip > bits { continue }
                let window = Window { field: 3, shift: bits - width - skip, width };
                let key = Key { destination_port: value as u16, ..Key::default() };
                let fork = Slot::fork(0, 4, 16 + window.shift, width, false);
                prop_assert_eq!(Window::of(fork, 0), Some(window));
                let choice = fork.child(&key);
                let span = way.span(fields, 3, &rule);
                let (from, count) = window.chosen(span);
                prop_assert!((choice.wrapping_sub(from) & (window.choices() - 1)) < count);
                way = way.through(window, choice, false);
                let (low, high) = way.span(fields, 3, &rule);
                let rest = value & Field::ones(window.shift);
                prop_assert!((low..=high).contains(&rest));
            }
        }
    }
}
