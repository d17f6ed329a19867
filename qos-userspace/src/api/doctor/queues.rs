//! On how many queues and CPUs the work of an interface is done.
//!
//! Interrupts and RPS are in `/proc` and `/sys`, which a sandbox may hide; `/sys` also shows the network
//! namespace that it was mounted in, which may be another one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{SysconfVar, sysconf};

use super::Check;
use crate::gateway::link::Link;
use crate::gateway::port::Channels;

pub(super) fn checks(link: &Link, channels: Option<Channels>) -> Vec<Check> {
    // What software devices carry is worked on where it was sent from, or came in.
    let is_port = link.kind.as_deref().is_none_or(|kind| kind == "veth") && !link.loopback;
    if !is_port {
        return Vec::new();
    }
    let cpus = online_cpus();
    let folder = folder_of(link);
    let rps = folder.as_ref().map(|folder| steered_to(folder));
    let mut checks = vec![queues(&link.name, cpus, channels, rps.as_ref())];
    if link.kind.is_none() {
        let interrupts = folder.and_then(|folder| interrupts(&folder, &link.name));
        checks.push(spread(&link.name, cpus, interrupts.as_deref()));
    }
    checks
}

fn online_cpus() -> usize {
    sysconf(SysconfVar::_NPROCESSORS_ONLN)
        .ok()
        .flatten()
        .and_then(|cpus| usize::try_from(cpus).ok())
        .unwrap_or(1)
}

/// `rps`: CPUs that received packets are handed on to; none: it can't be seen.
fn queues(interface: &str, cpus: usize, channels: Option<Channels>, rps: Option<&BTreeSet<usize>>) -> Check {
    let name = format!("queues of {interface}");
    let Some(channels) = channels else {
        return Check::ok(name, format!("the driver does not tell; {cpus} CPUs"));
    };
    let Channels { receive, send, most_receive, most_combined } = channels;
    let found = format!("{receive} to receive, {send} to send, for {cpus} CPUs");
    if receive != 1 || cpus < 2 {
        return Check::ok(name, format!("{found}; what is sent passes one scheduler"));
    }
    let steered = rps.map_or(0, BTreeSet::len);
    if steered > 1 {
        return Check::ok(name, format!("{found}; RPS hands what comes in to {steered} CPUs"));
    }
    let unseen = if rps.is_none() { "; whether RPS spreads it can't be seen from here" } else { "" };
    let most = cpus.min(most_receive.max(most_combined) as usize);
    let mend = if most > 1 {
        let kind = if most_combined > 1 { "combined" } else { "rx" };
        format!("ethtool -L {interface} {kind} {most}")
    } else {
        format!("echo {} > /sys/class/net/{interface}/queues/rx-0/rps_cpus", mask_of(cpus))
    };
    Check::warning(
        name,
        format!("{found}{unseen}"),
        "one CPU takes everything that comes in by it, XDP and the police included: that is the packet rate",
        mend,
    )
}

/// An interrupt of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Interrupt {
    number: u32,
    /// CPUs that it goes to; none: it can't be seen.
    cpus: Option<BTreeSet<usize>>,
}

/// `interrupts`: those that have come; none: they can't be seen.
fn spread(interface: &str, cpus: usize, interrupts: Option<&[Interrupt]>) -> Check {
    let name = format!("interrupts of {interface}");
    let unseen = || Check::ok(name.clone(), "where they go can't be seen from here");
    let Some(interrupts) = interrupts else { return unseen() };
    let mut used = BTreeSet::new();
    for interrupt in interrupts {
        let Some(to) = &interrupt.cpus else { return unseen() };
        // One that may go to several goes to the first that is free.
        used.extend(to.iter().copied());
    }
    let count = interrupts.len();
    if count < 2 || cpus < 2 || used.len() > 1 {
        return Check::ok(name, format!("{count}, on {} of {cpus} CPUs", used.len().min(cpus)));
    }
    let (cpu, first) = (used.first().copied().unwrap_or(0), &interrupts[1]);
    Check::warning(
        name,
        format!("all {count} go to CPU {cpu}, of {cpus}"),
        "that CPU takes the packets of all its queues, and the others none",
        format!(
            "let irqbalance run, or give each a CPU: echo {} > /proc/irq/{}/smp_affinity_list, …",
            (cpu + 1) % cpus,
            first.number
        ),
    )
}

/// The interface's folder in `/sys`, if that shows this network namespace.
fn folder_of(link: &Link) -> Option<PathBuf> {
    let folder = Path::new("/sys/class/net").join(&link.name);
    let text = |file: &str| fs::read_to_string(folder.join(file)).ok();
    let same_number = text("ifindex")?.trim().parse() == Ok(link.index);
    // An interface of that name and number may be in another namespace too; an address is one's own.
    let address = link.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
    let same_address =
        address.is_none_or(|address| text("address").is_some_and(|text| text.trim() == address));
    (same_number && same_address).then_some(folder)
}

/// CPUs that RPS hands received packets to.
fn steered_to(folder: &Path) -> BTreeSet<usize> {
    let queues = fs::read_dir(folder.join("queues")).into_iter().flatten().flatten();
    let masks = queues.filter_map(|queue| fs::read_to_string(queue.path().join("rps_cpus")).ok());
    masks.flat_map(|mask| mask_cpus(&mask)).collect()
}

/// Interrupts of a port that have come; none where they can't be seen.
fn interrupts(folder: &Path, interface: &str) -> Option<Vec<Interrupt>> {
    let text = fs::read_to_string("/proc/interrupts").ok()?;
    // Of a virtual device the interrupts are those of what it is on.
    let listed = ["device/msi_irqs", "device/../msi_irqs"].into_iter().find_map(|path| {
        let entries = fs::read_dir(folder.join(path)).ok()?;
        let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        Some(numbers.collect::<BTreeSet<_>>()).filter(|numbers| !numbers.is_empty())
    });
    let numbers = busy(&text, |number, action| match &listed {
        Some(listed) => listed.contains(&number),
        None => is_of(action, interface),
    });
    let interrupt = |number| {
        let read = |file: &str| fs::read_to_string(format!("/proc/irq/{number}/{file}")).ok();
        // The first is where it goes, the second where it may go.
        let cpus = read("effective_affinity_list").filter(|text| !text.trim().is_empty());
        let cpus = cpus.or_else(|| read("smp_affinity_list"));
        Interrupt { number, cpus: cpus.map(|text| list_cpus(&text)) }
    };
    Some(numbers.into_iter().map(interrupt).collect())
}

/// Numbers of the wanted interrupts that have come, from the text of `/proc/interrupts`.
fn busy(text: &str, wanted: impl Fn(u32, &str) -> bool) -> Vec<u32> {
    let mut lines = text.lines();
    let cpus = lines.next().map_or(0, |header| header.split_whitespace().count());
    let busy = lines.filter_map(|line| {
        let (number, rest) = line.split_once(':')?;
        let number = number.trim().parse().ok()?;
        let words: Vec<_> = rest.split_whitespace().collect();
        let (counts, names) = words.split_at_checked(cpus)?;
        let has_come = counts.iter().any(|count| count.parse::<u64>().is_ok_and(|count| count > 0));
        let is_wanted = || wanted(number, names.last().copied().unwrap_or_default());
        (has_come && is_wanted()).then_some(number)
    });
    busy.collect()
}

/// Whether an interrupt's name is the interface's: `eth0`, `eth0-rx-1`, `i40e-eth0-TxRx-0`.
fn is_of(action: &str, interface: &str) -> bool {
    let is_part = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    action.match_indices(interface).any(|(start, found)| {
        let before = start.checked_sub(1).and_then(|at| action.as_bytes().get(at));
        !is_part(before) && !is_part(action.as_bytes().get(start + found.len()))
    })
}

/// CPUs of a list such as `0-3,8`.
fn list_cpus(text: &str) -> BTreeSet<usize> {
    let ranges = text.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?)
    });
    ranges.flatten().collect()
}

/// CPUs of a mask such as `00000001,0000000f`, the highest 32 first.
fn mask_cpus(text: &str) -> BTreeSet<usize> {
    let words = text.trim().split(',').rev().map(|word| u32::from_str_radix(word, 16).unwrap_or(0));
    let cpus = words.enumerate().flat_map(|(place, word)| {
        (0..32).filter(move |bit| word >> bit & 1 != 0).map(move |bit| place * 32 + bit)
    });
    cpus.collect()
}

/// The mask of the first `cpus` ones.
fn mask_of(cpus: usize) -> String {
    let words = (0..cpus.div_ceil(32)).rev().map(|place| match cpus - place * 32 {
        left @ 0..32 => (1_u32 << left) - 1,
        _ => u32::MAX,
    });
    words
        .enumerate()
        .map(|(n, word)| if n == 0 { format!("{word:x}") } else { format!(",{word:08x}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    fn set<const N: usize>(cpus: [usize; N]) -> BTreeSet<usize> {
        BTreeSet::from(cpus)
    }

    #[test]
    fn one_queue_for_several_cpus_is_worth_a_warning_unless_rps_spreads_it() {
        let channels = |receive, most_receive, most_combined| {
            Some(Channels { receive, send: 1, most_receive, most_combined })
        };
        for (cpus, channels, rps, severity, part) in [
            (4, None, None, Severity::Ok, "does not tell"),
            (1, channels(1, 1, 0), Some(set([])), Severity::Ok, "1 to receive"),
            (4, channels(4, 8, 0), Some(set([])), Severity::Ok, "4 to receive"),
            (4, channels(1, 1, 0), Some(set([0, 1])), Severity::Ok, "to 2 CPUs"),
            (
                4,
                channels(1, 1, 0),
                Some(set([1])),
                Severity::Warning,
                "echo f > /sys/class/net/eth0/queues/rx-0",
            ),
            (4, channels(1, 8, 0), Some(set([])), Severity::Warning, "ethtool -L eth0 rx 4"),
            (4, channels(1, 0, 2), Some(set([])), Severity::Warning, "ethtool -L eth0 combined 2"),
            (4, channels(1, 1, 0), None, Severity::Warning, "can't be seen"),
        ] {
            let check = queues("eth0", cpus, channels, rps.as_ref());
            assert_eq!(check.severity, severity, "{check:?}");
            assert!(format!("{check:?}").contains(part), "{part}: {check:?}");
        }
    }

    #[test]
    fn interrupts_that_all_go_to_one_cpu_are_worth_a_warning() {
        let on = |cpus: Option<BTreeSet<usize>>, number| Interrupt { number, cpus };
        for (cpus, interrupts, severity) in [
            (4, Some(vec![on(Some(set([2])), 30), on(Some(set([2])), 31)]), Severity::Warning),
            (4, Some(vec![on(Some(set([2])), 30), on(Some(set([3])), 31)]), Severity::Ok),
            (4, Some(vec![on(Some(set([2])), 30)]), Severity::Ok),
            (1, Some(vec![on(Some(set([0])), 30), on(Some(set([0])), 31)]), Severity::Ok),
            (4, Some(vec![on(Some(set([2])), 30), on(None, 31)]), Severity::Ok),
            (4, None, Severity::Ok),
        ] {
            let check = spread("eth0", cpus, interrupts.as_deref());
            assert_eq!(check.severity, severity, "{check:?}");
        }
        let both = [on(Some(set([2])), 30), on(Some(set([2])), 31)];
        let mend = spread("eth0", 4, Some(&both)).mend.expect("a mend");
        assert!(mend.contains("echo 3 > /proc/irq/31/smp_affinity_list"), "{mend}");
    }

    #[test]
    fn interrupts_are_found_by_number_or_name() {
        let text = "           CPU0       CPU1\n \
             24:          1          0  IO-APIC   5-edge      ACPI:Ged\n \
             37:          0          0 PCI-MSIX-0000:00:03.0   0-edge      eth0\n \
             38:          0      38520 PCI-MSIX-0000:00:03.0   1-edge      eth0-rx-0\n \
             39:      27346          0 PCI-MSIX-0000:00:03.0   2-edge      eth0-tx-0\n \
             40:          7          0 PCI-MSIX-0000:00:04.0   2-edge      i40e-eth01-TxRx-0\n\
             NMI:          0          0   Non-maskable interrupts\n";
        assert_eq!(busy(text, |_, action| is_of(action, "eth0")), [38, 39]);
        assert_eq!(busy(text, |_, action| is_of(action, "eth01")), [40]);
        assert_eq!(busy(text, |number, _| [24, 37].contains(&number)), [24]);
        assert_eq!(busy("", |_, _| true), [0; 0]);
    }

    #[test]
    fn lists_and_masks_of_cpus_are_read_and_written() {
        for (text, expected) in [("0-2,8\n", set([0, 1, 2, 8])), ("3\n", set([3])), ("\n", set([]))] {
            assert_eq!(list_cpus(text), expected, "{text:?}");
        }
        for (text, expected) in
            [("3\n", set([0, 1])), ("00000001,80000000\n", set([31, 32])), ("00\n", set([]))]
        {
            assert_eq!(mask_cpus(text), expected, "{text:?}");
        }
        for (cpus, expected) in
            [(1, "1"), (4, "f"), (32, "ffffffff"), (33, "1,ffffffff"), (64, "ffffffff,ffffffff")]
        {
            assert_eq!(mask_of(cpus), expected);
            assert_eq!(mask_cpus(expected).len(), cpus);
        }
    }
}
