//! The configured interfaces: each by itself, and what lies between them.

use super::{Check, Known, flowtables, hooks, mtu, offloads, queues};
use crate::gateway::chain::Chains;
use crate::gateway::flowtable::Flowtable;
use crate::gateway::link::{Framing, Link, LinkError};
use crate::gateway::port::Port;
use crate::gateway::scheduler::htb::{Htb, LeafQueue, RootOwner};
use crate::gateway::{GatewayConfig, InterfaceConfig};
use crate::manager::report::{InterfaceStatus, Why};

pub(super) fn checks(config: &GatewayConfig, known: Option<&Known>) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut links = Vec::new();
    for interface in &config.interfaces {
        let status = known.and_then(|known| {
            known.status.gateway.interfaces.iter().find(|status| status.name == interface.name)
        });
        let name = format!("interface {}", interface.name);
        let found = match Link::by_name(&interface.name) {
            Ok(link) => {
                let (whole, found) = one(&name, interface, &link, config, status, known);
                checks.extend(found);
                whole.then_some(link)
            }
            Err(error @ LinkError::NotFound { .. }) => {
                checks.push(Check::error(
                    name,
                    error.to_string(),
                    "nothing that goes by it is held",
                    "correct `name` in [[interface]], or make the interface",
                ));
                checks.extend(status.map(|status| hooks::programs(status, config.observe, None, None)));
                None
            }
            Err(error) => {
                checks.push(unseen(name, &error));
                None
            }
        };
        links.extend(found);
    }
    let lines = known.map(|known| &known.lines);
    match Link::all() {
        Ok(all) => {
            checks.extend(mtu::checks(&links, &all, lines));
            checks.extend(flowtables::checks(Flowtable::all(), &links, &all));
        }
        Err(error) => checks.push(unseen("interfaces".to_owned(), &error)),
    }
    checks
}

/// Whether all interfaces are ports of bridges.
pub(super) fn bridge_only(config: &GatewayConfig) -> bool {
    let is_port = |interface: &InterfaceConfig| {
        let bridge = Link::by_name(&interface.name).ok().and_then(|link| link.controller);
        let bridge = bridge.and_then(|index| Link::by_index(index).ok());
        bridge.is_some_and(|bridge| bridge.kind.as_deref() == Some("bridge"))
    };
    config.interfaces.iter().all(is_port)
}

/// One interface that exists. Tells also whether it can carry packets of IP at all.
fn one(
    name: &str,
    interface: &InterfaceConfig,
    link: &Link,
    config: &GatewayConfig,
    status: Option<&InterfaceStatus>,
    known: Option<&Known>,
) -> (bool, Vec<Check>) {
    if let Framing::Other(number) = link.framing {
        let check = Check::error(
            name,
            format!("its packets begin with neither an Ethernet nor an IP header (hardware type {number})"),
            "its packets can't be read: qosd does not start",
            "name the interface that carries IP",
        );
        return (false, vec![check]);
    }
    let mut checks = Vec::new();
    let port = Port::read(&interface.name);
    checks.push(match &port {
        _ if !link.up => Check::error(
            name,
            "it is down",
            "nothing goes by it",
            format!("ip link set {} up", interface.name),
        ),
        Ok(port) => carries(name, interface, link, port),
        Err(error) => unseen(name.to_owned(), error),
    });
    let chains = Chains::read(link, &config.bpffs_dir);
    checks.extend(
        status.map(|status| hooks::programs(status, config.observe, Some(link), chains.as_ref().ok())),
    );
    match &chains {
        Ok(chains) => {
            let named = status.is_some_and(|status| matches!(status.why, Some(Why::Foreign { .. })));
            checks.extend(hooks::others(&interface.name, chains, named));
        }
        Err(error) => checks.push(unseen(format!("others on {}", interface.name), error)),
    }
    checks.push(qdisc(link, config.observe, known.is_some()));
    if let Ok(port) = &port {
        let judged = status.map(|status| status.judged.as_str());
        let lines = known.map(|known| &known.lines);
        checks.extend(offloads::checks(&interface.name, port, judged, lines));
        checks.extend(queues::checks(link, port.channels));
    }
    (true, checks)
}

fn carries(name: &str, interface: &InterfaceConfig, link: &Link, port: &Port) -> Check {
    match port.speed {
        _ if !port.carrier => {
            Check::error(name, "it has no carrier", "nothing goes by it", "check the cable and the other end")
        }
        Some(speed) if interface.capacity > speed => Check::warning(
            name,
            format!("its capacity is set to {}, the port has {speed}", interface.capacity),
            "more is promised than can be sent: the port's own queue orders nothing",
            "set `capacity` to what can really be sent",
        ),
        speed => {
            let port = speed.map(|speed| format!(", the port has {speed}")).unwrap_or_default();
            let bridge = match link.kind.as_deref() {
                Some("bridge") => "; what passes between its own ports does not pass it: name these for that",
                _ => "",
            };
            Check::ok(name, format!("up, capacity {}{port}{bridge}", interface.capacity))
        }
    }
}

/// `enforced`: a daemon runs, which should have put its tree there.
fn qdisc(link: &Link, observing: bool, enforced: bool) -> Check {
    let name = format!("qdisc of {}", link.name);
    let owner = match Htb::new(link, LeafQueue::Best).and_then(|htb| htb.root()) {
        Ok(owner) => owner,
        Err(error) => return unseen(name, &error),
    };
    let unordered =
        "nothing is ordered: guarantees and priorities are not kept; maxima are held by the police";
    match owner {
        RootOwner::Ours => Check::ok(name, "htb 5150:, ours"),
        RootOwner::Default(kind) if observing || !enforced => {
            Check::ok(name, format!("the kernel's default, {kind}"))
        }
        RootOwner::Default(kind) => Check::error(
            name,
            format!("the kernel's default, {kind}: ours is missing"),
            unordered,
            "run `qos reconcile`, and find out who took it off",
        ),
        RootOwner::Foreign { kind, handle } if observing => {
            Check::ok(name, format!("somebody's {kind} {handle}; enforcing will need its place"))
        }
        RootOwner::Foreign { kind, handle } => Check::error(
            name,
            format!("{kind} {handle}, which is not ours, and stays"),
            if enforced { unordered } else { "qosd does not start beside it" },
            format!("tc qdisc del dev {} root; then qos reconcile", link.name),
        ),
    }
}

fn unseen(name: String, error: &dyn std::error::Error) -> Check {
    Check::warning(name, format!("not looked at: {error}"), "what is wrong there is not seen", "run as root")
}
