//! The real `qosd` in a gateway's namespace, spoken to by the real `qos`.
//!
//! Both binaries come from the folder that `QOS_BIN_DIR` names, or from the target folder of the
//! running test.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use qos_userspace::domain::units::BitsPerSecond;
use serde_json::Value;
use tempfile::TempDir;

use crate::netns::{Namespace, Process};
use crate::topology::{LAN, WAN};

/// How long a daemon may take to answer after its start.
const START: Duration = Duration::from_secs(60);
/// How long it may take to end after SIGTERM.
const STOP: Duration = Duration::from_secs(10);

/// What `qosd` is to be configured with.
#[derive(Clone, Debug)]
pub struct Config {
    /// `enforce` or `observe`.
    pub mode: &'static str,
    /// `lan` or `wan`.
    pub line_side: &'static str,
    /// Share of a line's rate that soft directions are shaped to.
    pub soft_share: f64,
    /// Capacity of the interface to the subscribers.
    pub lan_capacity: BitsPerSecond,
    /// Capacity of the interface to the providers.
    pub wan_capacity: BitsPerSecond,
    /// The interfaces and their roles.
    pub interfaces: Vec<(&'static str, &'static str)>,
    /// TOML put into each `[[interface]]` table.
    pub each_interface: String,
    /// TOML put in front of the `[[interface]]` tables.
    pub more: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: "enforce",
            line_side: "lan",
            soft_share: 0.95,
            lan_capacity: BitsPerSecond(1_000_000_000),
            wan_capacity: BitsPerSecond(1_000_000_000),
            interfaces: vec![(LAN, "lan"), (WAN, "wan")],
            each_interface: String::new(),
            more: String::new(),
        }
    }
}

/// A `qosd` with its own folder, socket and pins. Dropping it detaches it from the kernel, stops it
/// and removes all three; while a panic unwinds it prints the end of the daemon's log first.
#[derive(Debug)]
pub struct Daemon {
    gateway: Namespace,
    /// `None` between a kill and the next start.
    process: Option<Process>,
    folder: TempDir,
    bpffs_dir: PathBuf,
    binaries: PathBuf,
}

impl Daemon {
    /// Writes the configuration, starts `qosd` in `gateway` and waits until its socket answers.
    ///
    /// # Errors
    /// When the binary can't be found, or ends or doesn't answer within a minute; the end of its log is
    /// in the text.
    pub fn start(gateway: &Namespace, config: &Config) -> Result<Self> {
        let mut daemon = Self::prepare(gateway, config)?;
        daemon.restart()?;
        Ok(daemon)
    }

    /// Writes the configuration and starts nothing.
    ///
    /// # Errors
    /// When the binary can't be found.
    pub fn prepare(gateway: &Namespace, config: &Config) -> Result<Self> {
        static DAEMONS: AtomicU32 = AtomicU32::new(0);

        let folder = tempfile::Builder::new().prefix("qos-test-").tempdir().context("a folder for qosd")?;
        let number = DAEMONS.fetch_add(1, Ordering::Relaxed);
        let bpffs_dir = PathBuf::from(format!("/sys/fs/bpf/qos-test-{}-{number}", std::process::id()));
        let daemon =
            Self { gateway: gateway.clone(), process: None, folder, bpffs_dir, binaries: binaries()? };
        fs::write(daemon.config_path(), daemon.config_text(config)?).context("writing qos.toml")?;
        Ok(daemon)
    }

    /// Starts `qosd` again, after [`Daemon::kill`], [`Daemon::terminate`] or its own end.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.restart_with(|_| {})
    }

    /// Like [`Daemon::restart`] with something done to the command first.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn restart_with(&mut self, prepare: impl FnOnce(&mut Command)) -> Result<()> {
        self.launch_with(prepare)?;
        let process = self.process.as_mut().context("qosd doesn't run")?;
        let deadline = Instant::now() + START;
        loop {
            if let Some(status) = process.status()? {
                self.process = None;
                bail!("qosd ended with {status}; its log ends:\n{}", self.log_tail());
            }
            if UnixStream::connect(self.folder.path().join("qosd.sock")).is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                self.process = None;
                bail!("qosd doesn't answer after {START:?}; its log ends:\n{}", self.log_tail());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts `qosd` and waits for nothing.
    ///
    /// # Errors
    /// When the binary can't be started.
    pub fn launch(&mut self) -> Result<()> {
        self.launch_with(|_| {})
    }

    fn launch_with(&mut self, prepare: impl FnOnce(&mut Command)) -> Result<()> {
        let log =
            File::options().create(true).append(true).open(self.log_path()).context("opening qosd's log")?;
        let mut command = Command::new(self.binaries.join("qosd"));
        command
            .args([OsStr::new("run"), OsStr::new("--config"), self.config_path().as_os_str()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("qosd's log")?)
            .stderr(log);
        prepare(&mut command);
        self.process = Some(self.gateway.spawn(command)?);
        Ok(())
    }

    /// `kill -9`. What is in the kernel stays.
    ///
    /// # Errors
    /// When it doesn't run.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("qosd doesn't run")?.kill()
    }

    /// SIGTERM, and waits for the end. What is in the kernel stays.
    ///
    /// # Errors
    /// When it doesn't run, doesn't end within 10 s or ends with a failure.
    pub fn terminate(&mut self) -> Result<()> {
        let mut process = self.process.take().context("qosd doesn't run")?;
        process.signal(Signal::SIGTERM)?;
        let status = process.wait(STOP)?;
        ensure!(status.success(), "qosd ended with {status}; its log ends:\n{}", self.log_tail());
        Ok(())
    }

    /// Sends a signal and waits for nothing.
    ///
    /// # Errors
    /// When it doesn't run.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process.as_mut().context("qosd doesn't run")?.signal(signal)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it doesn't run, or still does after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let mut process = self.process.take().context("qosd doesn't run")?;
        process.wait(limit)
    }

    /// Takes the `qosd` of another folder from the next start on.
    pub fn use_binaries(&mut self, folder: &Path) {
        folder.clone_into(&mut self.binaries);
    }

    /// The folder of `qosd` and `qos`.
    #[must_use]
    pub fn binaries(&self) -> &Path {
        &self.binaries
    }

    /// Whether it runs.
    ///
    /// # Errors
    /// When the kernel can't say.
    pub fn is_running(&mut self) -> Result<bool> {
        match &mut self.process {
            Some(process) => Ok(process.status()?.is_none()),
            None => Ok(false),
        }
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// Runs `qos --socket … -o json ARGS…` and reads its answer; an empty one is `null`.
    ///
    /// # Errors
    /// When it fails; its standard error is in the text.
    pub fn qos<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<Value> {
        let args: Vec<_> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        let output = self.qos_output(&args)?;
        let shown = || args.join(OsStr::new(" ")).to_string_lossy().into_owned();
        ensure!(
            output.status.success(),
            "`qos {}` ended with {}: {}",
            shown(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        if output.stdout.trim_ascii().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!("`qos {}` printed no JSON: {}", shown(), String::from_utf8_lossy(&output.stdout))
        })
    }

    /// Like [`Daemon::qos`] with the arguments in one text, split at blanks; `'…'` keeps blanks.
    ///
    /// # Errors
    /// As [`Daemon::qos`].
    pub fn qos_line(&self, line: &str) -> Result<Value> {
        self.qos(split(line))
    }

    /// Runs `qos --socket … -o json ARGS…` and returns status and texts, for requests that are to
    /// be refused.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn qos_output<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<Output> {
        let mut command = Command::new(self.binaries.join("qos"));
        command.arg("--socket").arg(self.socket()).args(["-o", "json"]).args(args).stdin(Stdio::null());
        self.gateway.output(command)
    }

    /// Path of the API's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("qosd.sock")
    }

    /// Folder of the pins.
    #[must_use]
    pub fn bpffs_dir(&self) -> &Path {
        &self.bpffs_dir
    }

    /// Folder of the state.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Path of `qos.toml`, to be rewritten before a [`Daemon::restart`].
    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        self.folder.path().join("qos.toml")
    }

    /// Path of what `qosd` writes to its standard output and error, over all its runs.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.folder.path().join("qosd.log")
    }

    /// The last 40 lines of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = fs::read(self.log_path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// The text of a `qos.toml` with this daemon's folders.
    ///
    /// # Errors
    /// When a path isn't UTF-8.
    pub fn config_text(&self, config: &Config) -> Result<String> {
        let quoted = |path: &Path| -> Result<String> {
            let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
            Ok(format!("{text:?}"))
        };
        let mut text = format!(
            "state_dir = {}\nsocket = {}\nbpffs_dir = {}\nmode = {:?}\nline_side = {:?}\nsoft_share = {:?}\n{}\n",
            quoted(&self.state_dir())?,
            quoted(&self.socket())?,
            quoted(&self.bpffs_dir)?,
            config.mode,
            config.line_side,
            config.soft_share,
            config.more,
        );
        for (name, role) in &config.interfaces {
            let capacity = if *role == "lan" { config.lan_capacity } else { config.wan_capacity };
            write!(
                text,
                "\n[[interface]]\nname = {name:?}\nrole = {role:?}\ncapacity = \"{}bit\"\n{}\n",
                capacity.0, config.each_interface
            )
            .context("writing to a String")?;
        }
        Ok(text)
    }

    fn stop(&mut self) {
        if self.process.is_some() {
            // Whatever fails here, the pins and the process go below.
            let _ = self.qos(["detach", "--yes"]);
            let _ = self.terminate();
        }
        self.process = None;
        // Unpinning is what takes programs off that a killed daemon left behind.
        let _ = fs::remove_dir_all(&self.bpffs_dir);
    }
}

impl Drop for Daemon {
    #[expect(clippy::print_stderr, reason = "the log is gone afterwards, and a failed test needs it")]
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- the log of qosd ends:\n{}\n---", self.log_tail());
        }
        self.stop();
    }
}

/// Folder of `qosd` and `qos`.
fn binaries() -> Result<PathBuf> {
    let folder = match env::var_os("QOS_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            // target/debug/deps/TEST or target/debug/DEMO
            let program = env::current_exe().context("the running program's path")?;
            let folder = program.parent().context("the running program's folder")?;
            if folder.ends_with("deps") { folder.parent().unwrap_or(folder).into() } else { folder.into() }
        }
    };
    for name in ["qosd", "qos"] {
        ensure!(
            folder.join(name).is_file(),
            "{} doesn't exist; `cargo xtask build` makes it, QOS_BIN_DIR names its folder",
            folder.join(name).display()
        );
    }
    Ok(folder)
}

/// Splits at blanks outside single quotes, which are taken off.
fn split(line: &str) -> Vec<String> {
    let mut parts = Vec::new();
    for (index, quoted) in line.split('\'').enumerate() {
        if index % 2 == 1 {
            parts.push(quoted.to_owned());
        } else {
            parts.extend(quoted.split_whitespace().map(str::to_owned));
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_splits_as_a_shell_would() {
        assert_eq!(
            split("grant --provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10' --priority 0"),
            [
                "grant",
                "--provider",
                "video",
                "--flow",
                "down udp from 203.0.113.0/24 to 192.0.2.10",
                "--priority",
                "0"
            ]
        );
    }
}
