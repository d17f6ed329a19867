//! What the gateways of the benchmarks have in common.

use std::path::PathBuf;

use anyhow::Result;
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use qos_tests::topology::{LAN, WAN};
use qos_userspace::domain::selector::Selector;
use qos_userspace::domain::{BitsPerSecond, Contract, Directed, Enforcement, ProviderKind};
use qos_userspace::gateway::{GatewayConfig, InterfaceConfig, Role, TcHooks, XdpChoice};
use qos_userspace::manager::capacity::SMALLEST_REST;
use qos_userspace::manager::{
    self, Change, Command, GrantRequest, LevelRequest, LineSide, Network, NewProvider, Preempt, State,
};

/// More than any machine forwards.
pub(crate) const CAPACITY: BitsPerSecond = BitsPerSecond(100_000_000_000);

/// A gateway between [`LAN`] and [`WAN`].
pub(crate) fn config(bpffs_dir: PathBuf, observe: bool, max_rules: u32) -> GatewayConfig {
    let interface = |name: &str, role| InterfaceConfig {
        name: name.to_owned(),
        role,
        capacity: CAPACITY,
        xdp: XdpChoice::Auto,
    };
    GatewayConfig {
        interfaces: vec![interface(LAN, Role::Lan), interface(WAN, Role::Wan)],
        bpffs_dir,
        observe,
        mark_mask: 0xffff_f000,
        tc_hooks: TcHooks::Auto,
        nat: false,
        max_rules,
        max_checks: 32_767,
    }
}

/// A network in which nothing is registered and no request needs a session.
pub(crate) fn state(max_rules: u32) -> State {
    State::new(Network {
        line_rate: Directed::default(),
        link: Directed { up: CAPACITY, down: CAPACITY },
        line_side: LineSide::Lan,
        soft_share: 0.95,
        line_rest: SMALLEST_REST,
        link_rest: SMALLEST_REST,
        mtu: 1_500,
        max_rules,
        require_session: false,
        session_ttl: SignedDuration::from_hours(1),
        session_grace: SignedDuration::from_mins(5),
        preempt: Preempt::Never,
    })
}

/// What follows from a command; the state has it afterwards.
pub(crate) fn decide(state: &mut State, command: &Command) -> Result<Vec<Change>> {
    let decision = manager::decide(state, command, Timestamp::now())?;
    decision.changes.iter().for_each(|change| state.apply(change));
    Ok(decision.changes)
}

/// Registers a provider that may claim `network`.
pub(crate) fn add_provider(state: &mut State, name: &str, network: IpNet) -> Result<()> {
    let provider = NewProvider {
        name: name.parse()?,
        kind: ProviderKind::Application,
        networks: vec![network],
        contract: Contract { maximum: Directed { up: Some(CAPACITY), down: None }, ..Contract::default() },
    };
    decide(state, &Command::AddProvider(provider)).map(drop)
}

/// Grants a policed level that no packet is over.
pub(crate) fn grant(
    state: &mut State,
    provider: &str,
    selectors: Vec<Selector>,
    precedence: u16,
) -> Result<Vec<Change>> {
    let request = GrantRequest {
        provider: provider.parse()?,
        application: None,
        selectors,
        profile: None,
        level: LevelRequest {
            maximum: Directed { up: Some(CAPACITY), down: None },
            enforcement: Some(Enforcement::Police),
            ..LevelRequest::default()
        },
        precedence,
        duration: None,
    };
    decide(state, &Command::Grant(Box::new(request)))
}
