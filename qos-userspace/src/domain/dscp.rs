//! Differentiated services code points by name.

/// Highest code point: six bits.
pub const MAX: u8 = 63;

/// Names in use: RFC 2474 (CS), 2597 (AF), 3246 (EF), 5865 (VA), 8622 (LE).
const NAMES: [(&str, u8); 23] = [
    ("CS0", 0),
    ("LE", 1),
    ("CS1", 8),
    ("AF11", 10),
    ("AF12", 12),
    ("AF13", 14),
    ("CS2", 16),
    ("AF21", 18),
    ("AF22", 20),
    ("AF23", 22),
    ("CS3", 24),
    ("AF31", 26),
    ("AF32", 28),
    ("AF33", 30),
    ("CS4", 32),
    ("AF41", 34),
    ("AF42", 36),
    ("AF43", 38),
    ("CS5", 40),
    ("VA", 44),
    ("EF", 46),
    ("CS6", 48),
    ("CS7", 56),
];

/// Why a text is no code point.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a code point: use 0 to 63, EF, VA, LE, CS0 to CS7 or AF11 to AF43")]
pub struct DscpError(pub String);

/// Reads a code point, by name in any case, or as a number from 0 to 63.
///
/// # Errors
/// Where the text is neither.
pub fn parse(text: &str) -> Result<u8, DscpError> {
    let named = || NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)).map(|(_, value)| *value);
    let number = || text.parse().ok().filter(|value| *value <= MAX);
    named().or_else(number).ok_or_else(|| DscpError(text.to_owned()))
}

/// The name of a code point, where it has one; else its number.
#[must_use]
pub fn name(value: u8) -> String {
    NAMES
        .iter()
        .find(|(_, known)| *known == value)
        .map_or_else(|| value.to_string(), |(name, _)| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_point_reads_back_and_nothing_else_does() {
        for value in 0..=MAX {
            assert_eq!(parse(&name(value)), Ok(value));
            assert_eq!(parse(&value.to_string()), Ok(value));
        }
        assert_eq!(parse("af41"), Ok(34));
        for text in ["64", "-1", "AF44", "CS8", "", "expedited"] {
            assert_eq!(parse(text), Err(DscpError(text.to_owned())));
        }
    }
}
