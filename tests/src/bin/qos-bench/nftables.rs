//! nftables, to compare with.

use std::ops::ControlFlow;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use qos_tests::netns::Namespace;

/// Loads a rule set, in no more than `time`; returns how long it took, or why there is none.
pub(crate) fn load(
    namespace: &Namespace,
    text: &str,
    time: Duration,
) -> Result<ControlFlow<String, Duration>> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    let complaints = tempfile::NamedTempFile::new()?;
    let mut command = Command::new("nft");
    command
        .arg("-f")
        .arg(file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(complaints.reopen()?);
    let begin = Instant::now();
    let Ok(mut nft) = namespace.run(|| command.spawn()) else {
        return Ok(ControlFlow::Break("nftables: no `nft` on this machine".to_owned()));
    };
    let status = loop {
        if let Some(status) = nft.try_wait()? {
            break status;
        }
        if begin.elapsed() > time {
            nft.kill()?;
            nft.wait()?;
            let reason = format!("nftables: nft had not loaded them after {} s", time.as_secs());
            return Ok(ControlFlow::Break(reason));
        }
        thread::sleep(Duration::from_millis(10));
    };
    if status.success() {
        return Ok(ControlFlow::Continue(begin.elapsed()));
    }
    let reason = std::fs::read_to_string(complaints.path())?;
    let reason = reason.lines().next().unwrap_or("");
    Ok(ControlFlow::Break(format!("nftables: nft refused the rule set: {reason}")))
}
