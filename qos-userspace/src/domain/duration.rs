//! Durations as people write them: `1h`, `90s`, `2 days`, `1h 30m`.

use jiff::{SignedDuration, Span, SpanRelativeTo};

/// Why a text is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a duration: write 90s, 15m, 1h 30m, 2 days or 3 weeks ({reason})")]
pub struct DurationError {
    text: String,
    reason: String,
}

/// Reads a duration. A day is 24 hours and a week 7 days; months and years, which have no fixed
/// length, are refused. Negative durations are read: whoever uses one says what it may be.
///
/// # Errors
/// Where the text is no duration.
pub fn parse(text: &str) -> Result<SignedDuration, DurationError> {
    let error = |reason: String| DurationError { text: text.chars().take(80).collect(), reason };
    let span: Span = text.trim().parse().map_err(|problem: jiff::Error| error(problem.to_string()))?;
    span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|problem| error(problem.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_people_write_them() {
        for (text, seconds) in [
            ("1h", 3_600),
            ("90s", 90),
            ("2 days", 172_800),
            ("1h 30m", 5_400),
            ("1 hour", 3_600),
            ("1w", 604_800),
            (" 5min ", 300),
            ("PT1H", 3_600),
            ("-1h", -3_600),
            ("0s", 0),
        ] {
            assert_eq!(parse(text), Ok(SignedDuration::from_secs(seconds)), "{text}");
        }
    }

    #[test]
    fn what_is_no_duration_is_said() {
        for text in ["", "soon", "90", "1 fortnight", "2 months", "1y"] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.starts_with(&format!("`{text}` is not a duration")), "{error}");
        }
    }
}
