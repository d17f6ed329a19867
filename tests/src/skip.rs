//! How a test says that this kernel can't run it.
//!
//! `cargo xtask test` collects these lines and compares them with `tests/expected-skips.txt`, so
//! that skips don't grow unseen.

use std::io::Write as _;

/// Writes `SKIP <test>: kernel <release>: <reason>` past the test runner's capture, to the real
/// standard output. The test then returns.
pub fn skip(test: &str, reason: &str) {
    let release = nix::sys::utsname::uname()
        .map_or_else(|_| "unknown".to_owned(), |name| name.release().to_string_lossy().into_owned());
    // The line starts on its own: libtest has printed `test NAME ... ` already.
    // A closed standard output leaves nobody to tell.
    let _ = writeln!(std::io::stdout().lock(), "\nSKIP {test}: kernel {release}: {reason}");
}
