//! Packets a second through a router with a whole rule set: without any, with ours, and with the same rules in
//! a set of nftables.

use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use qos_common::abi::MAX_RULES;
use qos_tests::classbench::{Tuple, TupleRule};
use serde::Serialize;

use crate::forwarding::Router;
use crate::nftables::{self, Verdict};
use crate::programs::Driver;
use crate::rules::{Gateway, steps_to};
use crate::{median, world};

/// Time of one round of one router.
const ROUND: Duration = Duration::from_millis(300);

/// Everything that was measured: packets a second, medians; ratios are medians of those of a round.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    forward_plain_pps: f64,
    /// No packet is on a line.
    forward_qos_pps: f64,
    /// As in operation: with lines, so that packets go through classes of HTB.
    forward_qos_lines_pps: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    forward_nft_pps: Option<f64>,
    forward_qos_of_plain: f64,
    forward_qos_lines_of_plain: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    forward_nft_of_plain: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    forward_qos_of_nft: Option<f64>,
    /// Rules that the set of nftables holds, and the part of its packets that were in it.
    forward_nft_rules: usize,
    forward_nft_matched: f64,
    forward_nft_load_ms: f64,
    /// What can't be had, and why.
    forward_skipped: Option<String>,
}

impl Figures {
    /// As rows of a table: what, packets a second, what of plain forwarding.
    pub(crate) fn rows(&self) -> Vec<Vec<String>> {
        [
            ("no rules", Some(self.forward_plain_pps), Some(1.0)),
            ("qos", Some(self.forward_qos_pps), Some(self.forward_qos_of_plain)),
            ("qos, with lines", Some(self.forward_qos_lines_pps), Some(self.forward_qos_lines_of_plain)),
            ("nftables", self.forward_nft_pps, self.forward_nft_of_plain),
        ]
        .into_iter()
        .filter_map(|(what, rate, ratio)| {
            Some(vec![what.to_owned(), format!("{:.0}", rate?), format!("{:.2}", ratio?)])
        })
        .collect()
    }

    /// Ratios that have a goal: what, the figure, and the goal.
    pub(crate) fn goals(&self) -> Vec<(String, String, &'static str)> {
        let mut goals = vec![(
            "packets a second, of no rules".to_owned(),
            format!("{:.2}", self.forward_qos_of_plain),
            "≥ 0.80",
        )];
        if let Some(ratio) = self.forward_qos_of_nft {
            goals.push(("packets a second, of nftables".to_owned(), format!("{ratio:.2}"), "≥ 1.50"));
        }
        goals
    }

    /// What one must know of nftables' part.
    pub(crate) fn note(&self, rules: usize) -> String {
        match &self.forward_skipped {
            Some(reason) => format!("skipped: {reason}"),
            None => format!(
                "nftables: {} of {rules} rules in one concatenated set at netdev ingress, loaded in {:.0} ms; \
                 the others overlap these in a way that such a set refuses; {:.0} % of packets were in it",
                self.forward_nft_rules,
                self.forward_nft_load_ms,
                100.0 * self.forward_nft_matched
            ),
        }
    }
}

/// A router, and what comes to it.
struct Way<'a> {
    router: &'a Router,
    driver: Driver,
    sent: u64,
    rates: Vec<f64>,
}

/// Sends packets of these rules through routers in turn; one of them is `with_lines`, which has the rules.
pub(crate) fn measure(
    rules: &[TupleRule],
    packets: &[Tuple],
    with_lines: &Gateway,
    rounds: usize,
) -> Result<Figures> {
    let packets: Vec<_> = packets.iter().filter(|packet| is_forwarded(packet)).copied().collect();
    ensure!(!packets.is_empty(), "no packet of these rules is one that a router forwards");
    let plain = Router::new()?;
    let mut without_lines = Gateway::start("forward", None, 0, MAX_RULES)?;
    without_lines.load(rules)?;
    let nft = Router::new()?;
    let held = nftables::holdable(rules);
    let loaded = nftables::load(&nft.namespace, &nftables::text(&held, Verdict::Accept, Verdict::Accept)?)?;

    let mut ways = Vec::new();
    for (router, gateway) in [
        (&plain, None),
        (&without_lines.router, Some(&without_lines)),
        (&with_lines.router, Some(with_lines)),
        (&nft, None),
    ] {
        let mut driver = Driver::load()?;
        router.drive(&mut driver, &steps_to(router.lan.mac, &packets))?;
        if let Some(gateway) = gateway {
            driver.set_target(&gateway.program("qos_xdp_lan")?, true)?;
        }
        ways.push(Way { router, driver, sent: 0, rates: Vec::new() });
    }
    if loaded.is_break() {
        ways.pop();
    }
    // The first round resolves neighbours and warms caches.
    for round in 0..=rounds {
        for way in &mut ways {
            let forwarded = way.driver.forward(&way.router.path(), ROUND)?;
            ensure!(
                round == 0 || forwarded.left * 100 > forwarded.sent * 99,
                "{} of {} packets were forwarded",
                forwarded.left,
                forwarded.sent
            );
            way.sent += forwarded.sent;
            if round > 0 {
                way.rates.push(forwarded.per_second);
            }
        }
    }
    let rate = |way: usize| ways.get(way).map(|way| median(&mut way.rates.clone()));
    let ratio = |way: usize, of: usize| {
        let (way, of) = (ways.get(way)?, ways.get(of)?);
        Some(median(&mut way.rates.iter().zip(&of.rates).map(|(way, of)| way / of).collect::<Vec<_>>()))
    };
    let (load_ms, matched, skipped) = match loaded {
        ControlFlow::Continue(time) => {
            let sent = ways.last().map_or(0, |way| way.sent);
            (time.as_secs_f64() * 1e3, nftables::counted(&nft.namespace)? as f64 / sent as f64, None)
        }
        ControlFlow::Break(reason) => (0.0, 0.0, Some(reason)),
    };
    Ok(Figures {
        forward_plain_pps: rate(0).context("measured")?,
        forward_qos_pps: rate(1).context("measured")?,
        forward_qos_lines_pps: rate(2).context("measured")?,
        forward_nft_pps: rate(3),
        forward_qos_of_plain: ratio(1, 0).context("measured")?,
        forward_qos_lines_of_plain: ratio(2, 0).context("measured")?,
        forward_nft_of_plain: ratio(3, 0),
        forward_qos_of_nft: ratio(1, 3),
        forward_nft_rules: held.len(),
        forward_nft_matched: matched,
        forward_nft_load_ms: load_ms,
        forward_skipped: skipped,
    })
}

/// Whether a router has a way for such a packet.
fn is_forwarded(packet: &Tuple) -> bool {
    // Not 0/8, 127/8, and from 224/3 on (net/ipv4/route.c), nor the router's own networks.
    packet.addresses().iter().all(|address| match address {
        std::net::IpAddr::V4(address) => {
            let [first, second, ..] = address.octets();
            !matches!(first, 0 | 127 | 224..) && [first, second] != world::ROUTER
        }
        std::net::IpAddr::V6(_) => false,
    })
}
