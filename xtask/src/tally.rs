//! Reads the test runner's output as it passes, and adds it up.

use std::collections::BTreeSet;

/// What the output of one tier said.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// As the runner counts: a test that skipped itself is in it.
    passed: u64,
    pub(crate) failed: u64,
    /// Lines `SKIP <test>: kernel <release>: <reason>` without the first word.
    pub(crate) skips: Vec<String>,
    /// Tests that are slow and were left out, each with the reason.
    pub(crate) left_out: Vec<String>,
}

impl Tally {
    /// Takes one line of output.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(skip) = line.strip_prefix("SKIP ") {
            self.skips.push(skip.to_owned());
        }
        // test name ... ignored, slow: reason
        if let Some((test, reason)) =
            line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ignored, slow: "))
        {
            self.left_out.push(format!("{test}: {reason}"));
        }
        // test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 1s
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for count in counts.split("; ") {
            match count.split_once(' ').map(|(number, what)| (number.parse::<u64>(), what)) {
                Some((Ok(number), "passed")) => self.passed += number,
                Some((Ok(number), "failed")) => self.failed += number,
                _ => {}
            }
        }
    }

    /// Tests that did their work.
    pub(crate) fn passed(&self) -> u64 {
        self.passed.saturating_sub(self.skips.len() as u64)
    }

    /// Whether any test ran at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.passed + self.failed == 0
    }

    /// Skips that `expected` doesn't name.
    pub(crate) fn unexpected_skips<'a>(&'a self, expected: &BTreeSet<String>) -> Vec<&'a str> {
        let is_unexpected =
            |skip: &&String| !skip.split_once(':').is_some_and(|(test, _)| expected.contains(test));
        self.skips.iter().filter(is_unexpected).map(String::as_str).collect()
    }
}

/// Reads `tests/expected-skips.txt`: a test a line, `#` starts a comment.
pub(crate) fn read_expected(text: &str) -> BTreeSet<String> {
    text.lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 3 tests
test fast ... ok
test shaped_by_fq ...
SKIP shaped_by_fq: kernel 6.18.44: no fq
ok
test broken ... FAILED
test big ... ignored, slow: 65,000 allocations
test privileged ... ignored, needs root
test result: FAILED. 2 passed; 1 failed; 4 ignored; 0 measured; 7 filtered out; finished in 1.20s
   Doc-tests qos_common
test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn results_add_up_and_skips_do_not_count_as_passed() {
        let mut tally = Tally::default();
        OUTPUT.lines().for_each(|line| tally.line(line));
        assert_eq!((tally.passed(), tally.failed, tally.skips.len()), (6, 1, 1));
        assert_eq!(tally.left_out, ["big: 65,000 allocations"]);
        assert!(!tally.is_empty());
        assert_eq!(tally.unexpected_skips(&BTreeSet::new()), ["shaped_by_fq: kernel 6.18.44: no fq"]);
        let expected = read_expected("# kernels without fq\nshaped_by_fq  # 6.18\n\n");
        assert_eq!(tally.unexpected_skips(&expected), Vec::<&str>::new());
    }

    #[test]
    fn no_result_line_means_that_nothing_ran() {
        let mut tally = Tally::default();
        tally.line("error: could not compile `qos-userspace`");
        assert!(tally.is_empty());
    }
}
