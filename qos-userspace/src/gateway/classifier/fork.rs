//! Which bits of a packet a fork looks at.

use qos_common::classify::Rule;

use super::field::{Packets, Way, Window, fields};

/// Widths of forks that are tried, in bits.
const WIDTHS: [u32; 7] = [1, 2, 3, 4, 5, 6, 8];
/// A fork must leave at most this part of the rules to compare.
const WORTH: f64 = 0.85;
/// What a copy of a rule costs beside a comparison.
const COPY: f64 = 0.02;

/// The window that leaves packets, of rules that are drawn evenly and of bits that are, the fewest rules to
/// compare, with at most `budget` places for rules in all; none is worth it otherwise.
pub(super) fn best_window(
    rules: &[Rule],
    members: &[u32],
    family: u8,
    way: &Way,
    budget: usize,
) -> Option<Window> {
    let fields = fields(family);
    let count = members.len();
    let mut best: Option<(f64, Window)> = None;
    let mut spans = Vec::with_capacity(count);
    let mut steps = [0i32; (1 << 8) + 1];
    for (number, field) in fields.iter().enumerate() {
        let bits = way.bits(fields, number);
        if bits == 0 || way.packets == Packets::Unknown && field.may_be_unknown() {
            continue;
        }
        spans.clear();
        spans.extend(members.iter().map(|&member| way.span(fields, number, &rules[member as usize])));
        // Bits that are the same in all rules that look at the field say nothing.
        let all = super::field::Field::ones(bits);
        let narrow = || spans.iter().filter(|&&(first, last)| (first, last) != (0, all));
        let Some(&(one, _)) = narrow().next() else {
            continue;
        };
        let differ = narrow().fold(0, |differ, (first, last)| differ | (first ^ one) | (last ^ one));
        let top = 64 - differ.leading_zeros();
        let top = if top == 0 { bits } else { top };
        for width in WIDTHS {
            if width > top || 1usize << width > 8 * count {
                continue;
            }
            let window = Window { field: number, shift: top - width, width };
            let choices = window.choices() as usize;
            steps[..=choices].fill(0);
            for &span in &spans {
                let (from, chosen) = window.chosen(span);
                let (from, to) = (from as usize, from as usize + chosen as usize);
                steps[from] += 1;
                if to <= choices {
                    steps[to] -= 1;
                } else {
                    steps[0] += 1;
                    steps[to - choices] -= 1;
                }
            }
            let (mut here, mut sum, mut squares) = (0i32, 0f64, 0f64);
            for step in &steps[..choices] {
                here += step;
                sum += f64::from(here);
                squares += f64::from(here) * f64::from(here);
            }
            let copies_for_unknown =
                if way.packets == Packets::All && field.may_be_unknown() { count } else { 0 };
            if sum + copies_for_unknown as f64 > budget as f64 {
                continue;
            }
            let score = squares / sum + sum / choices as f64 + COPY * sum / count as f64;
            if best.is_none_or(|(other, _)| score < other) {
                best = Some((score, window));
            }
        }
    }
    best.filter(|(score, _)| *score <= WORTH * 2.0 * count as f64).map(|(_, window)| window)
}
