//! The kernel programs of qos.
//!
//! A packet's way, upstream: it comes in on a LAN interface, where `qos_xdp_lan` reads its headers,
//! finds the allocation that its flow belongs to, and drops it if the allocation's or the
//! provider's limit says so. The answer stands in front of the packet until `qos_ingress` moves it
//! into the mark, which survives routing and NAT. Where XDP can't run, `qos_judge_lan` does both
//! behind the driver. On the WAN interface `qos_egress_wan` turns the
//! mark into the class that the packet queues in, and writes its code point. Downstream is the same
//! with LAN and WAN exchanged. `qos_explain` is never attached: it answers what would be done.
//!
//! Only entry points stand here. Each turns every outcome into a verdict; what is passed although
//! nobody could read it is named there.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(
    unreachable_pub,
    missing_docs,
    clippy::needless_pass_by_value,
    reason = "the macros of aya wrap entry points in public functions that hand a context over"
)]
#![expect(internal_features, reason = "BPF has no stable atomics; these compile to its own instructions")]

mod classify;
mod egress;
mod explain;
mod ingress;
mod limit;
mod maps;
mod mark;
mod mtu;
mod packet;
mod required;
mod skb;
mod tell;
mod trace;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use qos_common::abi::Outcome;
use qos_common::classify::Direction;

use crate::tell::{TC_DROP, TC_NEXT, tell_sender};

const UP: u32 = Direction::Upstream as u32;
const DOWN: u32 = Direction::Downstream as u32;

/// In on a LAN interface: from subscribers.
#[xdp(frags)]
pub fn qos_xdp_lan(ctx: XdpContext) -> u32 {
    xdp_verdict(ingress::xdp::<UP>(&ctx))
}

/// In on a WAN interface: to subscribers.
#[xdp(frags)]
pub fn qos_xdp_wan(ctx: XdpContext) -> u32 {
    xdp_verdict(ingress::xdp::<DOWN>(&ctx))
}

/// Takes the place of `qos_xdp_lan` while somebody listens.
#[xdp(frags)]
pub fn qos_trace_lan(ctx: XdpContext) -> u32 {
    let outcome = ingress::xdp::<UP>(&ctx);
    trace::packet(&ctx, outcome);
    xdp_verdict(outcome)
}

/// Takes the place of `qos_xdp_wan` while somebody listens.
#[xdp(frags)]
pub fn qos_trace_wan(ctx: XdpContext) -> u32 {
    let outcome = ingress::xdp::<DOWN>(&ctx);
    trace::packet(&ctx, outcome);
    xdp_verdict(outcome)
}

/// In on any interface, behind XDP.
#[classifier]
pub fn qos_ingress(ctx: TcContext) -> i32 {
    ingress::take_over(&ctx)
}

/// In on a LAN interface without XDP.
#[classifier]
pub fn qos_judge_lan(ctx: TcContext) -> i32 {
    judge_verdict(&ctx, ingress::tc::<UP>(&ctx))
}

/// In on a WAN interface without XDP.
#[classifier]
pub fn qos_judge_wan(ctx: TcContext) -> i32 {
    judge_verdict(&ctx, ingress::tc::<DOWN>(&ctx))
}

/// Takes the place of `qos_judge_lan` while somebody listens.
#[classifier]
pub fn qos_trace_j_lan(ctx: TcContext) -> i32 {
    let outcome = ingress::tc::<UP>(&ctx);
    trace::packet(&ctx, outcome);
    judge_verdict(&ctx, outcome)
}

/// Takes the place of `qos_judge_wan` while somebody listens.
#[classifier]
pub fn qos_trace_j_wan(ctx: TcContext) -> i32 {
    let outcome = ingress::tc::<DOWN>(&ctx);
    trace::packet(&ctx, outcome);
    judge_verdict(&ctx, outcome)
}

/// Out of a LAN interface: to subscribers.
#[classifier]
pub fn qos_egress_lan(ctx: TcContext) -> i32 {
    tc_verdict(&ctx, egress::run::<DOWN>(&ctx), true)
}

/// Out of a WAN interface: from subscribers.
#[classifier]
pub fn qos_egress_wan(ctx: TcContext) -> i32 {
    tc_verdict(&ctx, egress::run::<UP>(&ctx), true)
}

/// Never attached: run by the daemon on a packet that somebody asks about.
#[xdp(frags)]
pub fn qos_explain(ctx: XdpContext) -> u32 {
    explain::run(&ctx);
    XDP_PASS
}

#[inline(always)]
fn xdp_verdict(outcome: Outcome) -> u32 {
    maps::count(outcome);
    if drops(outcome) && !ingress::hands_over(outcome) { XDP_DROP } else { XDP_PASS }
}

#[inline(always)]
fn judge_verdict(ctx: &TcContext, outcome: Outcome) -> i32 {
    maps::count(outcome);
    tc_verdict(ctx, outcome, false)
}

#[inline(always)]
fn tc_verdict(ctx: &TcContext, outcome: Outcome, at_egress: bool) -> i32 {
    if !drops(outcome) {
        return TC_NEXT;
    }
    match (outcome, maps::search()) {
        (Outcome::TooBig, Some(search)) if search.task != 0 => tell_sender(ctx, search.task, at_egress),
        _ => TC_DROP,
    }
}

/// The policy: which outcomes end a packet.
#[inline(always)]
fn drops(outcome: Outcome) -> bool {
    match outcome {
        Outcome::OverMaximum | Outcome::OverAggregate | Outcome::TooBig => !observes(),
        Outcome::Admitted | Outcome::Unclassified => false,
        // Fail-open: a packet that can't be read, or that our own maps can't judge, is somebody
        // else's to judge.
        Outcome::NotIp
        | Outcome::Truncated
        | Outcome::TooManyTags
        | Outcome::StaleMark
        | Outcome::LostMark
        | Outcome::MissingEntry
        | Outcome::Malformed => false,
    }
}

#[inline(always)]
fn observes() -> bool {
    maps::settings().is_some_and(|settings| settings.observe != 0)
}
