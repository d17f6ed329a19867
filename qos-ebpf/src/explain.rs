//! `explain`: the same parser, classifier and limits, asked what they would do. Charges nothing,
//! counts nothing, remembers nothing.

use aya_ebpf::programs::XdpContext;
use qos_common::abi::Outcome;
use qos_common::classify::Direction;
use qos_common::length::{LinkLayer, charged};

use crate::classify::{QUESTION, classify};
use crate::egress::rest_class;
use crate::limit::{Judgement, judge};
use crate::maps;
use crate::mtu::would_refuse;
use crate::packet::{Bytes, parse};

/// Answers the question for the packet of this context.
#[inline(always)]
pub(crate) fn run(ctx: &XdpContext) {
    let (Some(settings), Some(question), Some(answer), Some(place)) =
        (maps::settings(), maps::question(), maps::answer(), maps::place_of(QUESTION))
    else {
        return;
    };
    // SAFETY: the map returned a pointer to its live element; the daemon asks one question at a time.
    let answer = unsafe { &mut *answer };
    let bytes = Bytes::new(ctx.data(), ctx.data_end());
    let direction = Direction::from_bit(question.direction);
    let search = place.search();
    search.begin(direction as u32);
    let read = parse(bytes, question.layer3 != 0, bytes.length() as u32, &mut search.packet);
    answer.parsed = u32::from(read.is_ok());
    answer.outcome = match read {
        Ok(()) => Outcome::Unclassified as u32,
        Err(reason) => reason as u32,
    };
    let account = if read.is_ok() { classify::<QUESTION>(place) } else { None };
    let search = place.search();
    answer.key = search.packet.key;
    answer.rank = search.rank;
    answer.slot = search.slot;
    answer.tables = search.tables;
    answer.forks = search.forks;
    answer.rules = search.rules;
    answer.expired = search.expired;
    answer.allocation = 0;
    answer.in_profile = 0;
    answer.charged = 0;
    answer.class = 0;
    if read.is_err() {
        return;
    }
    if let Some(account) = account {
        let allocation = account.allocation;
        let layer = LinkLayer::from_raw(allocation.link_layer);
        let bytes = charged(search.packet.ip_length, allocation.overhead, layer);
        let judgement = judge::<false>(account, direction, search.now_ns, bytes);
        answer.allocation = allocation.id;
        answer.charged = bytes;
        answer.outcome = judgement.outcome() as u32;
        if would_refuse(&search.packet, allocation) {
            answer.outcome = Outcome::TooBig as u32;
        }
        answer.in_profile = u32::from(judgement == Judgement::InProfile);
        if search.limits_only == 0 {
            answer.class = allocation.class;
        }
    }
    if answer.class == 0 {
        answer.class = rest_class(settings, &search.packet.key, direction);
    }
}
