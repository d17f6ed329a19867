//! `qos doctor`: looks at everything that has to be right and says what is not, what that costs, and
//! what mends it.
//!
//! Looking changes nothing on the host. What can't be seen from where the process stands (a sandbox,
//! another network namespace than that of `/sys`) is said, and is no failure.

mod daemon;
mod flowtables;
mod hooks;
mod interfaces;
mod lines;
mod machine;
mod mtu;
mod northbound;
mod offloads;
mod queues;

use serde::{Deserialize, Serialize};

pub(crate) use machine::missing_capabilities;

use self::lines::Lines;
use self::northbound::Parties;
use super::types::Status;
use crate::config::Config;
use crate::manager::State;

/// What a check says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be, or as well as it can be here.
    Ok,
    /// It works, but not as well as it could, or it could not be looked at.
    Warning,
    /// It does not work.
    Error,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub severity: Severity,
    /// What was found.
    pub found: String,
    /// What that costs; none where it is as it should be.
    pub cost: Option<String>,
    /// What to do; none where nothing is to be done.
    pub mend: Option<String>,
}

impl Check {
    pub(crate) fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { name: name.into(), severity: Severity::Ok, found: found.into(), cost: None, mend: None }
    }

    pub(crate) fn warning(
        name: impl Into<String>,
        found: impl Into<String>,
        cost: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            name: name.into(),
            severity: Severity::Warning,
            found: found.into(),
            cost: Some(cost.into()),
            mend: Some(mend.into()),
        }
    }

    pub(crate) fn error(
        name: impl Into<String>,
        found: impl Into<String>,
        cost: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self { severity: Severity::Error, ..Self::warning(name, found, cost, mend) }
    }
}

/// What only a running daemon knows.
#[derive(Clone, Debug)]
pub struct Known {
    status: Status,
    lines: Lines,
    parties: Parties,
}

impl Known {
    /// Takes what the checks need.
    #[must_use]
    pub fn new(status: Status, state: &State) -> Self {
        Self { status, lines: Lines::of(state), parties: Parties::of(state) }
    }
}

/// Looks at everything. Without a configuration at the machine only; without what a daemon knows only
/// at what can be seen from outside.
#[must_use]
pub fn examine(config: Option<&Config>, known: Option<&Known>) -> Vec<Check> {
    let mut checks = machine::checks(config.is_some_and(|config| interfaces::bridge_only(&config.gateway)));
    let Some(config) = config else {
        checks.push(Check::warning(
            "configuration",
            "none was given",
            "interfaces and directories are not looked at",
            "name it with --config",
        ));
        return checks;
    };
    checks.push(machine::bpffs(&config.gateway.bpffs_dir));
    checks.extend(interfaces::checks(&config.gateway, known));
    checks.push(machine::state_dir(&config.state_dir));
    checks.push(machine::socket(&config.socket));
    if let Some(northbound) = &config.northbound {
        checks.extend(northbound::checks(northbound, &config.state_dir, known.map(|known| &known.parties)));
    }
    if let Some(known) = known {
        checks.extend(daemon::checks(&known.status));
        checks.extend(lines::checks(&known.lines));
    }
    checks
}

/// The worst of all checks.
#[must_use]
pub fn worst(checks: &[Check]) -> Severity {
    checks.iter().map(|check| check.severity).max().unwrap_or(Severity::Ok)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_is_wrong_is_an_error_with_its_cost_and_a_mend() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let file = directory.path().join("file");
        std::fs::write(&file, "").expect("written");
        let text = format!(
            r#"
state_dir = "{0}/state"
socket = "{0}/file"
bpffs_dir = "{0}/bpf"
[[interface]]
name = "lo"
role = "lan"
capacity = "1Gbit/s"
[[interface]]
name = "no-such-nic"
role = "wan"
capacity = "1Gbit/s"
"#,
            directory.path().display()
        );
        let config = Config::parse(&text, Path::new("qos.toml")).expect("valid");
        let checks = examine(Some(&config), None);
        for (name, severity) in [
            ("BTF", Severity::Ok),
            ("kernel", Severity::Ok),
            ("interface no-such-nic", Severity::Error),
            ("bpffs", Severity::Error),
            ("socket", Severity::Error),
        ] {
            let check = checks.iter().find(|check| check.name == name);
            let check = check.unwrap_or_else(|| panic!("{name} in {checks:?}"));
            assert_eq!(check.severity, severity, "{check:?}");
        }
        for check in &checks {
            let is_ok = check.severity == Severity::Ok;
            assert_eq!((check.cost.is_none(), check.mend.is_none()), (is_ok, is_ok), "{check:?}");
        }
        assert_eq!(worst(&checks), Severity::Error);
        assert!(!directory.path().join("state").exists(), "looking changes nothing");
    }
}
