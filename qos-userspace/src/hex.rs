//! Bytes as hexadecimal digits, the way people paste packets: with or without spaces, colons, line
//! breaks and `0x`.

use std::fmt::Write as _;

/// Why a text is no sequence of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HexError {
    /// A character is no digit.
    #[error("`{0}` is not a hexadecimal digit")]
    NotADigit(char),
    /// The last byte lacks a digit.
    #[error("{0} hexadecimal digits: each byte takes two")]
    OddLength(usize),
    /// There is nothing.
    #[error("there is no byte in it")]
    Empty,
}

/// The bytes of a text.
///
/// # Errors
/// Where a character is no hexadecimal digit, their number is odd, or there is none.
pub fn decode(text: &str) -> Result<Vec<u8>, HexError> {
    let text = text.trim();
    let text = text.strip_prefix("0x").unwrap_or(text);
    let digits = text
        .chars()
        .filter(|c| !c.is_ascii_whitespace() && *c != ':')
        .map(|c| c.to_digit(16).ok_or(HexError::NotADigit(c)))
        .collect::<Result<Vec<_>, _>>()?;
    if digits.is_empty() {
        return Err(HexError::Empty);
    }
    if digits.len() % 2 != 0 {
        return Err(HexError::OddLength(digits.len()));
    }
    Ok(digits.chunks_exact(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect())
}

/// The text of bytes, without separators.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_as_people_paste_them() {
        for (text, expected) in [
            ("4500", Ok(vec![0x45, 0])),
            ("0x45 00\n45:FF", Ok(vec![0x45, 0, 0x45, 0xff])),
            ("", Err(HexError::Empty)),
            ("450", Err(HexError::OddLength(3))),
            ("45 zz", Err(HexError::NotADigit('z'))),
        ] {
            assert_eq!(decode(text), expected, "{text:?}");
        }
        assert_eq!(encode(&[0, 0x1f, 0xff]), "001fff");
    }
}
