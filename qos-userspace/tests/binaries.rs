//! The binaries as an operator starts them: exit statuses and messages that need no kernel.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::fcntl::{Flock, FlockArg};

fn qosd(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qosd")).args(arguments).output().expect("qosd runs")
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A configuration in `directory` whose interfaces do not exist.
fn configuration(directory: &Path, more: &str) -> PathBuf {
    let text = format!(
        "state_dir = '{0}/state'\nsocket = '{0}/qosd.sock'\n{more}\n\
         [[interface]]\nname = 'no-such-lan'\nrole = 'lan'\ncapacity = '1Gbit/s'\n\
         [[interface]]\nname = 'no-such-wan'\nrole = 'wan'\ncapacity = '1Gbit/s'\n",
        directory.display()
    );
    let path = directory.join("qos.toml");
    std::fs::write(&path, text).expect("written");
    path
}

#[test]
fn qosd_tells_its_failures_apart() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let good = configuration(directory.path(), "");
    let good = good.to_str().expect("UTF-8");

    let checked = qosd(&["check", "--config", good]);
    assert_eq!(checked.status.code(), Some(0), "{}", error(&checked));

    // Its pins can't be where a plain file system is.
    let elsewhere = configuration(directory.path(), &format!("bpffs_dir = '{}'", directory.path().display()));
    let failed = qosd(&["run", "--config", elsewhere.to_str().expect("UTF-8")]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(error(&failed).contains("is not on a BPF file system"), "{}", error(&failed));
    configuration(directory.path(), "");
    assert!(!directory.path().join("qosd.sock").exists());

    let usage = qosd(&["walk"]);
    assert_eq!(usage.status.code(), Some(2));

    let filter = qosd(&["run", "--config", good, "--log", "qos=loud"]);
    assert_eq!(filter.status.code(), Some(3), "{}", error(&filter));

    let lock = std::fs::File::create(directory.path().join("state/lock")).expect("lock");
    std::fs::write(directory.path().join("state/lock"), "4242\n").expect("written");
    let _held = Flock::lock(lock, FlockArg::LockExclusiveNonblock).expect("free");
    let second = qosd(&["run", "--config", good]);
    assert_eq!(second.status.code(), Some(4));
    assert!(
        error(&second).starts_with("qosd: another qosd (pid 4242) uses the state directory "),
        "{}",
        error(&second)
    );

    let bad = configuration(directory.path(), "sockte = '/run/x'");
    let bad = qosd(&["check", "--config", bad.to_str().expect("UTF-8")]);
    assert_eq!(bad.status.code(), Some(3));
    assert!(
        error(&bad).ends_with("unknown key `sockte` in the top level: did you mean `socket`?\n"),
        "{}",
        error(&bad)
    );
}

#[test]
fn qos_takes_the_socket_from_the_environment() {
    let output = Command::new(env!("CARGO_BIN_EXE_qos"))
        .arg("list")
        .env("QOS_SOCKET", "/nonexistent/from-environment.sock")
        .output()
        .expect("qos runs");
    assert_eq!(output.status.code(), Some(3));
    assert!(error(&output).contains("/nonexistent/from-environment.sock"), "{}", error(&output));
    assert!(output.stdout.is_empty());
}
