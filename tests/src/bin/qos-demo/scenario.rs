//! What the demo shows: who is there, what is granted to whom, and what everybody sends.
//!
//! ```text
//! anna  DSL   20/4  ┐                                              ┌ video
//! ben   fibre 60/20 ┤ lan0  gateway, 100 Mbit/s each way  wan0     ┤ game, voip, backup
//! cafe  fibre 40/20 ┘                                              └ internet (asks for nothing)
//! ```
//! Downstream, Anna's line is overloaded, and so is the link.

use qos_userspace::domain::units::BitsPerSecond;

/// What the gateway can send either way.
pub(crate) const LINK: BitsPerSecond = mbit(100);

/// A machine and its addresses.
pub(crate) struct Machine {
    pub(crate) name: &'static str,
    pub(crate) addresses: &'static [&'static str],
}

pub(crate) const SUBSCRIBERS: [Machine; 3] = [
    Machine { name: "anna", addresses: &["192.0.2.10", "192.0.2.11", "2001:db8:1::10"] },
    Machine { name: "ben", addresses: &["192.0.2.20", "192.0.2.21", "2001:db8:1::20"] },
    Machine { name: "cafe", addresses: &["192.0.2.30", "192.0.2.31", "192.0.2.32"] },
];

pub(crate) const SERVERS: [Machine; 5] = [
    Machine { name: "video", addresses: &["203.0.113.10", "2001:db8:2:10::10"] },
    Machine { name: "game", addresses: &["203.0.113.20"] },
    Machine { name: "voip", addresses: &["203.0.113.40"] },
    Machine { name: "backup", addresses: &["203.0.113.60"] },
    Machine { name: "internet", addresses: &["198.51.100.10", "2001:db8:2:99::10"] },
];

/// A subscriber's line.
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) subscriber: &'static str,
    pub(crate) down: BitsPerSecond,
    pub(crate) up: BitsPerSecond,
}

pub(crate) const LINES: [Line; 3] = [
    Line { name: "dsl-anna", subscriber: "anna", down: mbit(20), up: mbit(4) },
    Line { name: "fibre-ben", subscriber: "ben", down: mbit(60), up: mbit(20) },
    Line { name: "fibre-cafe", subscriber: "cafe", down: mbit(40), up: mbit(20) },
];

/// Providers as they are registered: the arguments of `qos provider add`.
pub(crate) const PROVIDERS: [&str; 5] = [
    "video --kind application --network 203.0.113.0/28 --network 2001:db8:2:10::/64",
    "game --kind application --network 203.0.113.16/28",
    "voip --kind application --network 203.0.113.32/28",
    "backup --kind application --network 203.0.113.48/28 --max-up 8mbit",
    "isp --kind network --network 192.0.2.0/24 --network 2001:db8:1::/48",
];

/// A level that somebody asks for, and the traffic that it is for.
pub(crate) struct Asked {
    pub(crate) title: &'static str,
    /// Arguments of `qos grant`.
    pub(crate) grant: &'static str,
    pub(crate) traffic: &'static [Traffic],
}

/// A flow of packets from one machine to another.
pub(crate) struct Traffic {
    pub(crate) way: Way,
    /// A machine and one of its addresses.
    pub(crate) from: (&'static str, &'static str),
    pub(crate) to: (&'static str, &'static str),
    pub(crate) load: Load,
}

/// Direction as the subscriber sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
}

#[derive(Clone, Copy)]
pub(crate) enum Load {
    /// Packets of one IP length, in bytes, at a rate that nothing slows down.
    Udp(BitsPerSecond, u32),
    /// What the path takes, over so many connections.
    Tcp(u16),
}

/// The flow whose latency is shown, and which is granted last.
pub(crate) const GAME: Asked = Asked {
    title: "cloud game, Anna",
    grant: "--provider game --flow 'down udp from 203.0.113.16/28 to 192.0.2.10' --guaranteed-down 4mbit \
            --max-down 6mbit --priority 0 --dscp EF",
    traffic: &[down(("game", "203.0.113.20"), ("anna", "192.0.2.10"), Load::Udp(mbit(4), 1_500))],
};

/// The level that is revoked.
pub(crate) const EVENT: Asked = Asked {
    title: "live event, Ben",
    grant: "--provider video --flow 'down udp from 203.0.113.0/28 to 192.0.2.20' --guaranteed-down 20mbit \
            --max-down 24mbit --priority 3 --enforcement police",
    traffic: &[down(("video", "203.0.113.10"), ("ben", "192.0.2.20"), Load::Udp(mbit(30), 1_500))],
};

/// The level that expires; its time is added when it is asked for.
pub(crate) const PATCH: Asked = Asked {
    title: "game patch, café",
    grant: "--provider game --flow 'down udp from 203.0.113.16/28 to 192.0.2.30' --guaranteed-down 10mbit \
            --max-down 15mbit --priority 5",
    traffic: &[down(("game", "203.0.113.20"), ("cafe", "192.0.2.30"), Load::Udp(mbit(20), 1_500))],
};

pub(crate) const OTHERS: [Asked; 8] = [
    Asked {
        title: "phone call, Anna",
        grant: "--provider voip --flow 'between 192.0.2.10 and 203.0.113.32/28 udp' --guaranteed-down 200kbit \
                --max-down 300kbit --guaranteed-up 200kbit --max-up 300kbit --priority 0 --enforcement police",
        traffic: &[
            down(("voip", "203.0.113.40"), ("anna", "192.0.2.10"), Load::Udp(CALL, 200)),
            up(("anna", "192.0.2.10"), ("voip", "203.0.113.40"), Load::Udp(CALL, 200)),
        ],
    },
    Asked {
        title: "film, Anna",
        grant: "--provider video --flow 'down tcp from 2001:db8:2:10::/64 to 2001:db8:1::10' \
                --guaranteed-down 8mbit --max-down 10mbit --priority 2",
        traffic: &[down(("video", "2001:db8:2:10::10"), ("anna", "2001:db8:1::10"), Load::Tcp(2))],
    },
    Asked {
        title: "192.0.2.11, Anna's tablet",
        grant: "--provider isp --flow 'down to 192.0.2.11' --guaranteed-down 1mbit --max-down 2mbit \
                --enforcement police",
        traffic: &[down(("internet", "198.51.100.10"), ("anna", "192.0.2.11"), Load::Udp(mbit(5), 1_500))],
    },
    Asked {
        title: "192.0.2.21, Ben's office",
        grant: "--provider isp --flow 'down to 192.0.2.21' --max-down 10mbit",
        traffic: &[down(("internet", "198.51.100.10"), ("ben", "192.0.2.21"), Load::Tcp(2))],
    },
    Asked {
        title: "2001:db8:1::20, Ben",
        grant: "--provider isp --flow 'down to 2001:db8:1::20' --guaranteed-down 5mbit --max-down 8mbit \
                --enforcement police",
        traffic: &[down(
            ("internet", "2001:db8:2:99::10"),
            ("ben", "2001:db8:1::20"),
            Load::Udp(mbit(12), 1_500),
        )],
    },
    Asked {
        title: "nightly backup, Ben",
        grant: "--provider backup --flow 'between 192.0.2.20 and 203.0.113.48/28 tcp' --guaranteed-up 3mbit \
                --max-up 6mbit --guaranteed-down 300kbit --max-down 500kbit --priority 7",
        traffic: &[up(("ben", "192.0.2.20"), ("backup", "203.0.113.60"), Load::Tcp(2))],
    },
    Asked {
        title: "192.0.2.31, café camera",
        grant: "--provider isp --flow 'up from 192.0.2.31' --max-up 3mbit --enforcement police",
        traffic: &[up(("cafe", "192.0.2.31"), ("internet", "198.51.100.10"), Load::Udp(mbit(6), 1_500))],
    },
    Asked {
        title: "192.0.2.32, café guests",
        grant: "--provider isp --flow 'between 192.0.2.32 and any' --max-up 5mbit --max-down 1mbit",
        traffic: &[up(("cafe", "192.0.2.32"), ("internet", "198.51.100.10"), Load::Tcp(2))],
    },
];

/// What nobody asked a level for: it overloads Anna's line, and the link.
pub(crate) const CROWD: [(&str, Traffic); 4] = [
    ("downloads, Anna", down(("internet", "198.51.100.10"), ("anna", "192.0.2.10"), FLOOD_OF_A_LINE)),
    ("downloads, Ben", down(("internet", "198.51.100.10"), ("ben", "192.0.2.20"), FLOOD_OF_THE_LINK)),
    ("downloads, café", down(("internet", "198.51.100.10"), ("cafe", "192.0.2.30"), FLOOD_OF_THE_LINK)),
    ("uploads, Ben", up(("ben", "192.0.2.20"), ("internet", "198.51.100.10"), Load::Tcp(2))),
];

const FLOOD_OF_A_LINE: Load = Load::Udp(mbit(25), 1_500);
const FLOOD_OF_THE_LINK: Load = Load::Udp(mbit(45), 1_500);

/// Sound and a small picture.
const CALL: BitsPerSecond = BitsPerSecond(200_000);

const fn mbit(rate: u64) -> BitsPerSecond {
    BitsPerSecond(rate * 1_000_000)
}

const fn down(from: (&'static str, &'static str), to: (&'static str, &'static str), load: Load) -> Traffic {
    Traffic { way: Way::Down, from, to, load }
}

const fn up(from: (&'static str, &'static str), to: (&'static str, &'static str), load: Load) -> Traffic {
    Traffic { way: Way::Up, from, to, load }
}
