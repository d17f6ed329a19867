//! Units people write: rates and sizes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A rate in bit/s.
///
/// Written `20mbit`, `1.5 Gbit/s`, `800 kbps` (bits) or a plain number of bit/s; multiples are
/// decimal. In JSON it is a number of bit/s; a string is read too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitsPerSecond(pub u64);

/// A size in bytes.
///
/// Written `300kB`, `64KiB`, `1500` and the like. In JSON it is a number; a string is read too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteCount(pub u64);

/// Why a text is no rate or size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// The text holds no number.
    #[error("`{0}` has no number; write a rate as 20mbit or 1.5Gbit/s, a size as 300kB or 64KiB")]
    NoNumber(String),
    /// The unit is not known.
    #[error("`{unit}` in `{text}` is not a unit; {expected}")]
    UnknownUnit {
        /// The whole text.
        text: String,
        /// The part behind the number.
        unit: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// The number is negative, not finite or too large.
    #[error("`{0}` is out of range")]
    OutOfRange(String),
}

const RATE_UNITS: &str = "expected bit, kbit, mbit, gbit or tbit, with or without /s (bps is bits too)";
const SIZE_UNITS: &str = "expected B, kB, MB, GB (decimal) or KiB, MiB, GiB";

impl BitsPerSecond {
    /// The rate times a share between 0 and 1, rounded down.
    #[must_use]
    pub fn share(self, share: f64) -> Self {
        Self((self.0 as f64 * share) as u64)
    }

    /// Time in ns that `bytes` take at this rate, rounded up; `u64::MAX` at a rate of zero.
    #[must_use]
    pub const fn time_of(self, bytes: u64) -> u64 {
        if self.0 == 0 {
            return u64::MAX;
        }
        let ns = (bytes as u128 * 8_000_000_000).div_ceil(self.0 as u128);
        if ns > u64::MAX as u128 { u64::MAX } else { ns as u64 }
    }

    /// Bytes that pass in `ns` at this rate, rounded down.
    #[must_use]
    pub const fn bytes_in(self, ns: u64) -> u64 {
        let bytes = self.0 as u128 * ns as u128 / 8_000_000_000;
        if bytes > u64::MAX as u128 { u64::MAX } else { bytes as u64 }
    }
}

impl FromStr for BitsPerSecond {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = split(text)?;
        let unit_lower = unit.to_ascii_lowercase();
        let stem = unit_lower.strip_suffix("/s").unwrap_or(&unit_lower);
        let factor = match stem {
            "" | "b" | "bit" | "bits" | "bps" => 1.0,
            "k" | "kb" | "kbit" | "kbits" | "kbps" => 1e3,
            "m" | "mb" | "mbit" | "mbits" | "mbps" => 1e6,
            "g" | "gb" | "gbit" | "gbits" | "gbps" => 1e9,
            "t" | "tb" | "tbit" | "tbits" | "tbps" => 1e12,
            _ => {
                return Err(UnitError::UnknownUnit {
                    text: text.to_owned(),
                    unit: unit.to_owned(),
                    expected: RATE_UNITS,
                });
            }
        };
        scale(text, number, factor).map(Self)
    }
}

impl FromStr for ByteCount {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = split(text)?;
        let factor = match unit {
            "" | "B" | "b" | "byte" | "bytes" => 1.0,
            "k" | "kB" | "KB" | "kb" => 1e3,
            "M" | "MB" | "mB" | "mb" => 1e6,
            "G" | "GB" | "gb" => 1e9,
            "K" | "Ki" | "KiB" | "kib" => 1024.0,
            "Mi" | "MiB" | "mib" => 1_048_576.0,
            "Gi" | "GiB" | "gib" => 1_073_741_824.0,
            _ => {
                return Err(UnitError::UnknownUnit {
                    text: text.to_owned(),
                    unit: unit.to_owned(),
                    expected: SIZE_UNITS,
                });
            }
        };
        scale(text, number, factor).map(Self)
    }
}

/// Splits `1.5 Gbit/s` into the number and the unit.
fn split(text: &str) -> Result<(f64, &str), UnitError> {
    let trimmed = text.trim();
    let end = trimmed
        .find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '-' | '+' | '_')))
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(end);
    let number = number.replace('_', "").parse().map_err(|_| UnitError::NoNumber(text.to_owned()))?;
    Ok((number, unit.trim()))
}

fn scale(text: &str, number: f64, factor: f64) -> Result<u64, UnitError> {
    let value = (number * factor).round();
    // 2^53: up to here every whole number of bits or bytes is exact in an f64.
    if !(0.0..=9_007_199_254_740_992.0).contains(&value) {
        return Err(UnitError::OutOfRange(text.to_owned()));
    }
    Ok(value as u64)
}

impl fmt::Display for BitsPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = decimal(self.0, ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"]);
        f.pad(&text)
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = decimal(self.0, ["B", "kB", "MB", "GB", "TB"]);
        f.pad(&text)
    }
}

/// At most three decimals, trailing zeros dropped, so that round values read as they were written.
fn decimal(value: u64, units: [&str; 5]) -> String {
    let mut index = 0;
    let mut scaled = value as f64;
    while scaled >= 1000.0 && index + 1 < units.len() {
        scaled /= 1000.0;
        index += 1;
    }
    let number = format!("{scaled:.3}");
    let number =
        if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { &number };
    format!("{number} {}", units[index])
}

macro_rules! serde_as_number_or_text {
    ($name:ident, $expected:literal) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_u64(self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Written;
                impl de::Visitor<'_> for Written {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }

                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$name, E> {
                        Ok($name(number))
                    }

                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$name, E> {
                        u64::try_from(number)
                            .map($name)
                            .map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Written)
            }
        }
    };
}

serde_as_number_or_text!(BitsPerSecond, "a number of bit/s or a text such as \"20mbit\"");
serde_as_number_or_text!(ByteCount, "a number of bytes or a text such as \"300kB\"");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_as_people_write_them() {
        for (text, bits) in [
            ("20mbit", 20_000_000),
            ("1.5 Gbit/s", 1_500_000_000),
            ("800 kbps", 800_000),
            ("64000", 64_000),
            ("1_000_000", 1_000_000),
            ("10M", 10_000_000),
            ("0", 0),
            ("400Gbit/s", 400_000_000_000),
        ] {
            assert_eq!(text.parse(), Ok(BitsPerSecond(bits)), "{text}");
        }
    }

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [("300kB", 300_000), ("64KiB", 65_536), ("1500", 1_500), ("1.5 MB", 1_500_000)] {
            assert_eq!(text.parse(), Ok(ByteCount(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_rate_is_said() {
        for (text, expected) in [
            ("fast", "`fast` has no number"),
            ("", "`` has no number"),
            ("20 parsec", "`parsec` in `20 parsec` is not a unit"),
            ("-3mbit", "`-3mbit` is out of range"),
            ("99999999tbit", "out of range"),
        ] {
            let error = text.parse::<BitsPerSecond>().expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn values_read_back_as_they_print() {
        for bits in [1_000, 20_000_000, 12_500_000, 1_500_000_000, 999] {
            let printed = BitsPerSecond(bits).to_string();
            assert_eq!(printed.parse(), Ok(BitsPerSecond(bits)), "{printed}");
        }
        assert_eq!(BitsPerSecond(12_500_000).to_string(), "12.5 Mbit/s");
        assert_eq!(ByteCount(300_000).to_string(), "300 kB");
    }
}
