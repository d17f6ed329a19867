//! Names of lines from what sources call them.

use md5::{Digest as _, Md5};

use crate::domain::Name;

/// Letters of the part that keeps names apart.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
/// Length of that part: 50 bits.
const DISTINCTION: usize = 10;
const LONGEST_READABLE: usize = qos_common::abi::NAME_LENGTH - 1 - DISTINCTION;

/// The name of a line that is called `text`: the text itself where it is a name. Else what can stand in a name of its
/// first 21 bytes, each other byte as `-`, and behind another `-` ten letters and digits that are made from all of
/// it, so that different texts have different names. Zero bytes at the end are no part of it; none: it is empty.
pub(crate) fn line_name(text: &[u8]) -> Option<Name> {
    let length = text.iter().rposition(|byte| *byte != 0)? + 1;
    let text = &text[..length];
    if let Some(name) = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()) {
        return Some(name);
    }
    let readable = |byte: &u8| match byte {
        b'.' | b'_' => char::from(*byte),
        byte if byte.is_ascii_alphanumeric() => char::from(*byte),
        _ => '-',
    };
    let begins = text.iter().position(u8::is_ascii_alphanumeric).unwrap_or(text.len());
    let mut name: String = text[begins..].iter().take(LONGEST_READABLE).map(readable).collect();
    if name.is_empty() {
        name.push_str("line");
    }
    name.push('-');
    let digest: [u8; 16] = Md5::digest(text).into();
    let bits = u128::from_be_bytes(digest);
    name.extend((0..DISTINCTION).map(|place| char::from(ALPHABET[(bits >> (place * 5)) as usize % 32])));
    name.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn named(text: &str) -> String {
        line_name(text.as_bytes()).map_or_else(String::new, String::from)
    }

    #[test]
    fn what_is_a_name_stays_and_the_rest_stays_readable() {
        for (text, begins) in [
            ("dsl-0042", "dsl-0042"),
            ("dsl-0042\0", "dsl-0042"),
            ("AA-BB-CC-DD-EE-FF", "AA-BB-CC-DD-EE-FF"),
            ("", ""),
            ("\0\0", ""),
            ("ann@isp.example", "ann-isp.example-"),
            ("Access-Node-7 atm 1/1/03/42:8.35", "Access-Node-7-atm-1-1-"),
            ("@@@", "line-"),
            ("-x", "x-"),
            ("zoë", "zo---"),
        ] {
            let name = named(text);
            assert!(name.starts_with(begins) && name.is_empty() == begins.is_empty(), "{text}: {name}");
        }
    }

    #[test]
    fn texts_that_look_alike_are_told_apart() {
        let long = "x".repeat(40);
        let texts = ["a@b", "a b", "a-b", "a:b", "@a:b", &long, &format!("{long}x"), "\u{1}", "\u{2}"];
        let names: BTreeSet<_> = texts.iter().map(|text| named(text)).collect();
        assert_eq!(names.len(), texts.len(), "{names:?}");
    }

    proptest! {
        #[test]
        fn any_text_has_a_name(text in prop::collection::vec(any::<u8>(), 1..300)) {
            prop_assert_eq!(line_name(&text).is_some(), text.iter().any(|byte| *byte != 0));
        }
    }
}
