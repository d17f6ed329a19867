//! How classes and queues are written to and read from routing netlink
//! (`struct tc_htb_opt` and its neighbours in include/uapi/linux/pkt_sched.h).

use netlink_packet_core::{DefaultNla, Nla as _, NlasIterator};
use netlink_packet_route::tc::{
    TcAttribute, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption, TcQdiscFqCodelOption, TcStats2,
};

use super::class::{Class, DEFAULT, Discipline, Id, Queue, ROOT, group_major};
use crate::gateway::netlink::{ETH_P_ALL, NetlinkError, malformed, read_tc};
use crate::gateway::scheduler::ClassStatistics;

const TCA_OPTIONS: u16 = 2;

const TCA_HTB_PARMS: u16 = 1;
const TCA_HTB_INIT: u16 = 2;
const TCA_HTB_DIRECT_QLEN: u16 = 5;
const TCA_HTB_RATE64: u16 = 6;
const TCA_HTB_CEIL64: u16 = 7;

/// 64-bit count of packets, which the kernel adds where 32 bits don't hold it.
const TCA_STATS_PKT64: u16 = 8;

const HTB_VERSION: u32 = 3;
/// Only for classes that name no quantum; all of ours do.
const RATE_TO_QUANTUM: u32 = 10;
/// Packets that wait outside all classes, before the first class is there. Interfaces without a
/// queue length of their own would have none.
const DIRECT_QUEUE: u32 = 1_000;

const LINK_LAYER_ETHERNET: u8 = 1;
const LINK_LAYER_ATM: u8 = 2;
/// `struct tc_ratespec`.
const RATE_SPEC: usize = 12;
/// `struct tc_htb_opt`.
const PARAMETERS: usize = 2 * RATE_SPEC + 20;

/// A queueing discipline that a dump found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Qdisc {
    pub(super) parent: u32,
    pub(super) handle: u32,
    pub(super) kind: String,
    /// As a leaf's discipline; `Foreign` where it is no such.
    pub(super) discipline: Discipline,
    /// Default class, of an HTB.
    pub(super) default_class: Option<u32>,
    /// Packets dropped.
    pub(super) drops: u64,
}

/// A class that a dump found, without its queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) class: Class,
    pub(super) statistics: ClassStatistics,
}

pub(super) fn root(index: u32) -> TcMessage {
    let mut message = bare(index, u32::from(ROOT) << 16, TcHandle::ROOT.into(), Some("htb"));
    message.attributes.push(htb_options());
    message
}

fn htb_options() -> TcAttribute {
    let mut init = Vec::with_capacity(20);
    for word in [HTB_VERSION, RATE_TO_QUANTUM, u32::from(DEFAULT), 0, 0] {
        init.extend(word.to_ne_bytes());
    }
    TcAttribute::Options(vec![
        TcOption::Other(DefaultNla::new(TCA_HTB_INIT, init)),
        TcOption::Other(DefaultNla::new(TCA_HTB_DIRECT_QLEN, DIRECT_QUEUE.to_ne_bytes().to_vec())),
    ])
}

/// Names the root, to delete it.
pub(super) fn root_name(index: u32) -> TcMessage {
    bare(index, u32::from(ROOT) << 16, TcHandle::ROOT.into(), None)
}

pub(super) fn class(index: u32, class: &Class) -> TcMessage {
    let mut message = bare(index, class.id.handle(), parent(class), Some("htb"));
    let mut options = vec![TcOption::Other(DefaultNla::new(TCA_HTB_PARMS, parameters(class)))];
    for (kind, rate) in [(TCA_HTB_RATE64, class.rate), (TCA_HTB_CEIL64, class.ceil)] {
        if rate > u64::from(u32::MAX) {
            options.push(TcOption::Other(DefaultNla::new(kind, rate.to_ne_bytes().to_vec())));
        }
    }
    message.attributes.push(TcAttribute::Options(options));
    message
}

/// Names a class, to delete it or ask for it.
pub(super) fn class_name(index: u32, id: Id) -> TcMessage {
    bare(index, id.handle(), 0, None)
}

/// Names all classes of a group; of group 0, the root's.
pub(super) fn all_classes(index: u32, group: u16) -> TcMessage {
    bare(index, 0, u32::from(group_major(group)) << 16, None)
}

/// The queue of a class, to be made (`new`) or changed.
pub(super) fn queue(index: u32, id: Id, queue: &Queue, new: bool) -> TcMessage {
    let mut message = queue_name(index, id, queue);
    match &queue.discipline {
        Discipline::Fifo { limit } => {
            message.attributes.push(TcAttribute::Kind("bfifo".to_owned()));
            // Not nested: the options are `struct tc_fifo_qopt` itself.
            let options = DefaultNla::new(TCA_OPTIONS, limit.to_ne_bytes().to_vec());
            message.attributes.push(TcAttribute::Other(options));
        }
        Discipline::FqCodel { limit, memory, target, interval, flows } => {
            message.attributes.push(TcAttribute::Kind("fq_codel".to_owned()));
            let mut options = vec![
                TcQdiscFqCodelOption::Limit(*limit),
                TcQdiscFqCodelOption::MemoryLimit(*memory),
                // Rounded up, so that the kernel, which rounds down, keeps what was asked for.
                TcQdiscFqCodelOption::Target(target.saturating_add(1)),
                TcQdiscFqCodelOption::Interval(interval.saturating_add(1)),
            ];
            if new {
                // The kernel refuses it in a change.
                options.push(TcQdiscFqCodelOption::Flows(*flows));
            }
            let options = options.into_iter().map(TcOption::FqCodel).collect();
            message.attributes.push(TcAttribute::Options(options));
        }
        Discipline::Group => {
            message.attributes.push(TcAttribute::Kind("htb".to_owned()));
            message.attributes.push(htb_options());
        }
        Discipline::Foreign(kind) => message.attributes.push(TcAttribute::Kind(kind.to_string())),
    }
    message
}

/// Names the queue of a class, to delete it.
pub(super) fn queue_name(index: u32, id: Id, queue: &Queue) -> TcMessage {
    bare(index, u32::from(queue.handle) << 16, id.handle(), None)
}

/// The filter of groups, whose program is open as `program`. Its precedence is our major number.
pub(super) fn filter(index: u32, program: u32) -> TcMessage {
    let mut message = all_filters(index);
    message.header.info = u32::from(ROOT) << 16 | u32::from(ETH_P_ALL.to_be());
    message.attributes.push(TcAttribute::Kind("bpf".to_owned()));
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(program)),
        TcOption::Bpf(TcFilterBpfOption::ProgName("qos_group".to_owned())),
    ]));
    message
}

/// Names all filters of our root.
pub(super) fn all_filters(index: u32) -> TcMessage {
    bare(index, 0, u32::from(ROOT) << 16, None)
}

/// Whether a message is about the filter of groups.
pub(super) fn is_filter(index: u32, payload: &[u8]) -> Result<bool, NetlinkError> {
    let ours = |message: TcMessage| message.header.info >> 16 == u32::from(ROOT);
    Ok(read_tc(index, payload)?.is_some_and(ours))
}

/// Reads a class of ours out of a message; none: it is another interface's or kind's.
pub(super) fn read_class(index: u32, payload: &[u8]) -> Result<Option<Found>, NetlinkError> {
    let Some(message) = read_tc(index, payload)? else { return Ok(None) };
    let header = &message.header;
    let Some(id) = Id::of_handle(header.handle.into()) else { return Ok(None) };
    let mut class = Class {
        id,
        parent: if header.parent == TcHandle::ROOT { 0 } else { header.parent.minor },
        level: 0,
        rate: 0,
        ceil: 0,
        atm: false,
        overhead: 0,
        mpu: 0,
        buffer: 0,
        cbuffer: 0,
        quantum: 0,
        priority: 0,
        queue: None,
    };
    let mut statistics = ClassStatistics::default();
    let mut htb = false;
    for attribute in &message.attributes {
        match attribute {
            TcAttribute::Kind(kind) => htb = kind == "htb",
            TcAttribute::Options(_) if htb => read_parameters(&mut class, &value(attribute))?,
            TcAttribute::Stats2(parts) => read_statistics(&mut statistics, parts)?,
            _ => {}
        }
    }
    Ok(htb.then_some(Found { class, statistics }))
}

/// Reads a qdisc out of a message.
pub(super) fn read_qdisc(message: &TcMessage) -> Result<Qdisc, NetlinkError> {
    let mut qdisc = Qdisc {
        parent: message.header.parent.into(),
        handle: message.header.handle.into(),
        kind: String::new(),
        discipline: Discipline::Foreign("".into()),
        default_class: None,
        drops: 0,
    };
    for attribute in &message.attributes {
        match attribute {
            TcAttribute::Kind(kind) => {
                qdisc.kind.clone_from(kind);
                qdisc.discipline = Discipline::Foreign(kind.as_str().into());
            }
            TcAttribute::Options(options) => match qdisc.kind.as_str() {
                "htb" => {
                    qdisc.default_class = read_default_class(&value(attribute))?;
                    if qdisc.default_class == Some(u32::from(DEFAULT)) {
                        qdisc.discipline = Discipline::Group;
                    }
                }
                "bfifo" => qdisc.discipline = Discipline::Fifo { limit: word(&value(attribute), 0)? },
                "fq_codel" => qdisc.discipline = read_fq_codel(options),
                _ => {}
            },
            TcAttribute::Stats2(parts) => {
                let mut statistics = ClassStatistics::default();
                read_statistics(&mut statistics, parts)?;
                qdisc.drops = statistics.drops;
            }
            _ => {}
        }
    }
    Ok(qdisc)
}

fn bare(index: u32, handle: u32, parent: u32, kind: Option<&str>) -> TcMessage {
    let header = TcHeader {
        index: index.cast_signed(),
        handle: handle.into(),
        parent: parent.into(),
        ..TcHeader::default()
    };
    let attributes = kind.map(|kind| TcAttribute::Kind(kind.to_owned())).into_iter().collect();
    TcMessage::from_parts(header, attributes)
}

fn parent(class: &Class) -> u32 {
    if class.parent == 0 { TcHandle::ROOT.into() } else { Id { minor: class.parent, ..class.id }.handle() }
}

/// `struct tc_htb_opt`.
fn parameters(class: &Class) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PARAMETERS);
    for rate in [class.rate, class.ceil] {
        // cell_log stays 0: with a link layer set the kernel wants no rate table.
        bytes.extend([0, if class.atm { LINK_LAYER_ATM } else { LINK_LAYER_ETHERNET }]);
        bytes.extend(class.overhead.to_ne_bytes());
        bytes.extend((-1_i16).to_ne_bytes());
        bytes.extend(class.mpu.to_ne_bytes());
        bytes.extend((rate.min(u64::from(u32::MAX)) as u32).to_ne_bytes());
    }
    for word in [class.buffer, class.cbuffer, class.quantum, 0, class.priority] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

fn read_parameters(class: &mut Class, options: &[u8]) -> Result<(), NetlinkError> {
    let (mut rate64, mut ceil64) = (0, 0);
    for attribute in NlasIterator::new(options) {
        let attribute = attribute.map_err(malformed)?;
        let bytes = attribute.value();
        match attribute.kind() {
            TCA_HTB_PARMS => {
                if bytes.len() < PARAMETERS {
                    return Err(malformed("class parameters are too short"));
                }
                class.atm = bytes[1] & 0xf == LINK_LAYER_ATM;
                class.overhead = u16::from_ne_bytes([bytes[2], bytes[3]]);
                class.mpu = u16::from_ne_bytes([bytes[6], bytes[7]]);
                class.rate = word(bytes, 8)?.into();
                class.ceil = word(bytes, RATE_SPEC + 8)?.into();
                let counts = 2 * RATE_SPEC;
                class.buffer = word(bytes, counts)?;
                class.cbuffer = word(bytes, counts + 4)?;
                class.quantum = word(bytes, counts + 8)?;
                class.level = word(bytes, counts + 12)? as u8;
                class.priority = word(bytes, counts + 16)?;
            }
            TCA_HTB_RATE64 => rate64 = long(bytes)?,
            TCA_HTB_CEIL64 => ceil64 = long(bytes)?,
            _ => {}
        }
    }
    class.rate = class.rate.max(rate64);
    class.ceil = class.ceil.max(ceil64);
    Ok(())
}

fn read_default_class(options: &[u8]) -> Result<Option<u32>, NetlinkError> {
    for attribute in NlasIterator::new(options) {
        let attribute = attribute.map_err(malformed)?;
        if attribute.kind() == TCA_HTB_INIT {
            return word(attribute.value(), 8).map(Some);
        }
    }
    Ok(None)
}

fn read_fq_codel(options: &[TcOption]) -> Discipline {
    let (mut limit, mut memory, mut target, mut interval, mut flows) = (0, 0, 0, 0, 0);
    for option in options {
        match option {
            TcOption::FqCodel(TcQdiscFqCodelOption::Limit(value)) => limit = *value,
            TcOption::FqCodel(TcQdiscFqCodelOption::MemoryLimit(value)) => memory = *value,
            TcOption::FqCodel(TcQdiscFqCodelOption::Target(value)) => target = *value,
            TcOption::FqCodel(TcQdiscFqCodelOption::Interval(value)) => interval = *value,
            TcOption::FqCodel(TcQdiscFqCodelOption::Flows(value)) => flows = *value,
            _ => {}
        }
    }
    Discipline::FqCodel { limit, memory, target, interval, flows }
}

fn read_statistics(statistics: &mut ClassStatistics, parts: &[TcStats2]) -> Result<(), NetlinkError> {
    for part in parts {
        match part {
            TcStats2::Basic(basic) => {
                statistics.bytes = basic.bytes;
                statistics.packets = statistics.packets.max(basic.packets.into());
            }
            TcStats2::Queue(queue) => {
                statistics.drops = queue.drops.into();
                statistics.backlog = queue.backlog.into();
            }
            TcStats2::Other(other) if other.kind() == TCA_STATS_PKT64 => {
                let mut bytes = vec![0; other.value_len()];
                other.emit_value(&mut bytes);
                statistics.packets = long(&bytes)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// The bytes of an attribute whose content the library does not know: it keeps them whole, wrapped
/// in the attribute's own kind.
fn value(attribute: &TcAttribute) -> Vec<u8> {
    match attribute {
        TcAttribute::Options(options) => options.first().map(|option| {
            let mut bytes = vec![0; option.value_len()];
            option.emit_value(&mut bytes);
            bytes
        }),
        _ => None,
    }
    .unwrap_or_default()
}

fn word(bytes: &[u8], at: usize) -> Result<u32, NetlinkError> {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map(|word| u32::from_ne_bytes(*word))
        .ok_or_else(|| malformed(format!("{} bytes, none at {at}", bytes.len())))
}

fn long(bytes: &[u8]) -> Result<u64, NetlinkError> {
    bytes
        .first_chunk()
        .map(|long| u64::from_ne_bytes(*long))
        .ok_or_else(|| malformed(format!("{} bytes, not 8", bytes.len())))
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::Emitable as _;

    use super::*;

    const INDEX: u32 = 7;

    fn sample() -> Class {
        Class {
            id: Id::root(0x4001),
            parent: 0x12,
            level: 0,
            rate: 625_000,
            ceil: 2_500_000,
            atm: true,
            overhead: 18,
            mpu: 0,
            buffer: 43_725,
            cbuffer: 15_625,
            quantum: 70_000,
            priority: 3,
            queue: None,
        }
    }

    fn emitted(message: &TcMessage) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_class_is_written_as_the_kernel_wants_it() {
        #[rustfmt::skip]
        let expected = [
            // tcmsg: family, padding, index, handle 5150:4001, parent 5150:12, info
            0, 0, 0, 0,  7, 0, 0, 0,  0x01, 0x40, 0x50, 0x51,  0x12, 0, 0x50, 0x51,  0, 0, 0, 0,
            // TCA_KIND "htb"
            8, 0, 1, 0,  b'h', b't', b'b', 0,
            // TCA_OPTIONS { TCA_HTB_PARMS
            52, 0, 2, 0,  48, 0, 1, 0,
            // rate: cell_log, linklayer, overhead, cell_align, mpu, bytes a second
            0, 2, 18, 0,  0xff, 0xff, 0, 0,  0x68, 0x89, 0x09, 0,
            // ceil
            0, 2, 18, 0,  0xff, 0xff, 0, 0,  0xa0, 0x25, 0x26, 0,
            // buffer, cbuffer, quantum, level, prio
            0xcd, 0xaa, 0, 0,  0x09, 0x3d, 0, 0,  0x70, 0x11, 1, 0,  0, 0, 0, 0,  3, 0, 0, 0,
        ];
        assert_eq!(emitted(&class(INDEX, &sample())), expected);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn the_root_and_its_queues_are_written_as_the_kernel_wants_them() {
        #[rustfmt::skip]
        let expected = [
            0, 0, 0, 0,  7, 0, 0, 0,  0, 0, 0x50, 0x51,  0xff, 0xff, 0xff, 0xff,  0, 0, 0, 0,
            8, 0, 1, 0,  b'h', b't', b'b', 0,
            36, 0, 2, 0,
            // TCA_HTB_INIT: version, r2q, default class, debug, direct packets
            24, 0, 2, 0,  3, 0, 0, 0,  10, 0, 0, 0,  2, 0, 0, 0,  0, 0, 0, 0,  0, 0, 0, 0,
            // TCA_HTB_DIRECT_QLEN
            8, 0, 5, 0,  0xe8, 3, 0, 0,
        ];
        assert_eq!(emitted(&root(INDEX)), expected);

        let fifo = Queue { handle: 0x4001, discipline: Discipline::Fifo { limit: 15_140 } };
        #[rustfmt::skip]
        let expected = [
            0, 0, 0, 0,  7, 0, 0, 0,  0, 0, 0x01, 0x40,  0x01, 0x40, 0x50, 0x51,  0, 0, 0, 0,
            10, 0, 1, 0,  b'b', b'f', b'i', b'f', b'o', 0, 0, 0,
            8, 0, 2, 0,  0x24, 0x3b, 0, 0,
        ];
        assert_eq!(emitted(&queue(INDEX, Id::root(0x4001), &fifo, true)), expected);

        let discipline =
            Discipline::FqCodel { limit: 42, memory: 128_000, target: 4_999, interval: 99_999, flows: 128 };
        let fair = Queue { handle: 0x4001, discipline };
        #[rustfmt::skip]
        let expected = [
            0, 0, 0, 0,  7, 0, 0, 0,  0, 0, 0x01, 0x40,  0x01, 0x40, 0x50, 0x51,  0, 0, 0, 0,
            13, 0, 1, 0,  b'f', b'q', b'_', b'c', b'o', b'd', b'e', b'l', 0, 0, 0, 0,
            44, 0, 2, 0,
            // TCA_FQ_CODEL_LIMIT, MEMORY_LIMIT, TARGET, INTERVAL, FLOWS
            8, 0, 2, 0,  42, 0, 0, 0,
            8, 0, 9, 0,  0, 0xf4, 1, 0,
            8, 0, 1, 0,  0x88, 0x13, 0, 0,
            8, 0, 3, 0,  0xa0, 0x86, 1, 0,
            8, 0, 5, 0,  128, 0, 0, 0,
        ];
        assert_eq!(emitted(&queue(INDEX, Id::root(0x4001), &fair, true)), expected);
        assert_eq!(
            emitted(&queue(INDEX, Id::root(0x4001), &fair, false)).len(),
            expected.len() - 8,
            "no flows"
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        let fast = Class { rate: 5_000_000_000, ceil: 50_000_000_000, atm: false, ..sample() };
        let top = Class { id: Id::root(1), parent: 0, ..sample() };
        let grouped = Class { id: Id { group: 9, minor: 0x4001 }, ..sample() };
        for wanted in [sample(), fast, top, grouped] {
            let found = read_class(INDEX, &emitted(&class(INDEX, &wanted))).expect("readable");
            assert_eq!(found.expect("ours").class, wanted);
        }
        let other = emitted(&class(INDEX + 1, &sample()));
        assert_eq!(read_class(INDEX, &other).expect("readable"), None, "another interface's");
        assert!(read_class(INDEX, &other[..6]).is_err(), "cut off");
        let read_back = |message: &TcMessage| {
            let message = read_tc(INDEX, &emitted(message)).expect("readable").expect("ours");
            read_qdisc(&message).expect("readable")
        };
        let found = read_back(&root(INDEX));
        assert_eq!((found.kind.as_str(), found.default_class), ("htb", Some(2)));
        let group = Queue { handle: 0x5325, discipline: Discipline::Group };
        let found = read_back(&queue(INDEX, Id::root(0x3001), &group, true));
        assert_eq!(
            (found.handle, found.parent, found.discipline),
            (0x5325_0000, 0x5150_3001, Discipline::Group)
        );
        let written = emitted(&filter(INDEX, 5));
        assert!(is_filter(INDEX, &written).expect("readable"));
        assert!(!is_filter(INDEX + 1, &written).expect("readable"), "another interface's");
    }
}
