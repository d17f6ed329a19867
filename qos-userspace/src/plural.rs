//! Numbers of things, as people write them.

use std::fmt::Display;

/// So many of something: `1 rule`, `2 rules`.
pub(crate) fn counted<N: Copy + Display + PartialEq + From<u8>>(count: N, what: &str) -> String {
    let plural = if count == N::from(1) { "" } else { "s" };
    format!("{count} {what}{plural}")
}
