//! The command line against a real socket and store, with what it prints.

use std::cell::{Cell, RefCell};
use std::io::{self, Write};
use std::path::Path;
use std::rc::Rc;

use clap::Parser as _;

use super::output::Output;
use super::{Cli, command, run};
use crate::api::testing::TestDaemon;

/// What was written, and after how many writes the reader goes.
#[derive(Clone, Debug)]
struct Pipe {
    text: Rc<RefCell<Vec<u8>>>,
    writes_left: Rc<Cell<usize>>,
}

impl Default for Pipe {
    fn default() -> Self {
        Self { text: Rc::default(), writes_left: Rc::new(Cell::new(usize::MAX)) }
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(left) = self.writes_left.get().checked_sub(1) else {
            return Err(io::Error::from(io::ErrorKind::BrokenPipe));
        };
        self.writes_left.set(left);
        self.text.borrow_mut().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Pipe {
    fn read(&self) -> String {
        String::from_utf8(self.text.borrow().clone()).expect("text")
    }
}

/// What came of a command line.
#[derive(Debug, PartialEq, Eq)]
struct Done {
    status: u8,
    out: String,
    err: String,
}

fn qos(socket: &Path, line: &[&str]) -> Done {
    let (out, err) = (Pipe::default(), Pipe::default());
    let socket = socket.to_str().expect("UTF-8");
    let arguments = [&["qos", "--socket", socket], line].concat();
    let cli = Cli::try_parse_from(arguments).unwrap_or_else(|error| panic!("{line:?}: {error}"));
    let mut output = Output::to(out.clone(), err.clone());
    let status = run(cli, &mut output, &|_| Err("no leftovers are expected".into()));
    Done { status, out: out.read(), err: err.read() }
}

/// A command line that must be carried out, and what it prints.
fn must(daemon: &TestDaemon, line: &[&str]) -> String {
    let done = qos(&daemon.socket(), line);
    assert_eq!(done.status, 0, "{line:?}: {done:?}");
    done.out
}

/// Compares with an expected print, in which a first line break and the indentation do not count.
fn assert_prints(found: &str, expected: &str) {
    let indent =
        expected.lines().find(|line| !line.is_empty()).map_or(0, |line| line.len() - line.trim_start().len());
    let expected: Vec<_> =
        expected.lines().skip(1).map(|line| line.get(indent..).unwrap_or_default()).collect();
    let found: Vec<_> = found.lines().collect();
    assert_eq!(found, expected[..expected.len().saturating_sub(1)], "found:\n{}", found.join("\n"));
}

/// A daemon with a provider, an application, a line and a profile, made by the command line.
fn furnished() -> TestDaemon {
    let daemon = TestDaemon::start();
    for line in [
        "provider add acme --kind application --network 203.0.113.0/24 --network 2001:db8:a::/48 --max-down 50mbit",
        "provider add isp --kind network --network 192.0.2.0/24",
        "app add acme video",
        "session add dsl-1 --address 192.0.2.10 --down 20mbit --up 2mbit --link-layer atm --overhead 32 --delay 8ms --loss 0.1%",
        "session add fibre-7 --address 192.0.2.20,2001:db8:7::/56 --down 80mbit --up 40mbit",
        "profile add voice --guaranteed-down 100kbit --guaranteed-up 100kbit --priority 0 --dscp EF",
    ] {
        must(&daemon, &line.split(' ').collect::<Vec<_>>());
    }
    daemon
}

const GRANT: [&str; 13] = [
    "grant",
    "--provider",
    "acme",
    "--app",
    "video",
    "--flow",
    "down udp from 203.0.113.0/24:5000-5010 to 192.0.2.20",
    "--guaranteed-down",
    "5mbit",
    "--max-down",
    "10mbit",
    "--priority",
    "1",
];

#[test]
fn decisions_are_listed_with_what_they_concern_and_why() {
    let daemon = furnished();
    must(&daemon, &GRANT);
    let flow = "down udp from 203.0.113.0/24:6000 to 192.0.2.20";
    let refused =
        ["grant", "--provider", "acme", "--app", "video", "--flow", flow, "--guaranteed-down", "1gbit"];
    assert_eq!(qos(&daemon.socket(), &refused).status, 1);
    must(&daemon, &["revoke", "1"]);
    let table = must(&daemon, &["decisions", "--provider", "acme", "-n", "3"]);
    let columns = |line: &str| {
        line.split("  ").map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    };
    let lines: Vec<Vec<String>> = table.lines().map(columns).collect();
    assert_eq!(lines[0], ["NUMBER", "AT", "WHO", "WHAT", "OF", "OUTCOME", "WHY"]);
    let of = |line: &[String]| (line[3].clone(), line[4].clone(), line[5].clone());
    let expected = |what: &str, of: &str, outcome: &str| (what.to_owned(), of.to_owned(), outcome.to_owned());
    assert_eq!(of(&lines[1]), expected("revoke", "allocation 1, acme/video, line fibre-7", "done"));
    assert_eq!(of(&lines[2]), expected("grant", "acme/video, line fibre-7", "insufficient capacity"));
    assert!(lines[2][6].contains("asked 1 Gbit/s"), "{table}");
    assert_eq!(of(&lines[3]), expected("grant", "allocation 1, acme/video, line fibre-7", "done"));
    assert_eq!(lines.len(), 4, "{table}");
    let number = &lines[3][0];
    let before = must(&daemon, &["decisions", "--before", number, "-n", "1"]);
    assert!(before.contains("put profile") && before.contains("voice"), "{before}");
    assert_eq!(must(&daemon, &["decisions", "--verdict", "failed"]).lines().count(), 1);
    let json: serde_json::Value =
        serde_json::from_str(&must(&daemon, &["-o", "json", "decisions", "--allocation", "1"]))
            .expect("JSON");
    assert_eq!(json["items"].as_array().map(Vec::len), Some(2));
    assert_eq!(must(&daemon, &["decisions", "--since", "1h"]).lines().count(), 10);
}

#[test]
fn the_command_line_is_sound() {
    command().debug_assert();
}

#[test]
fn every_verb_has_long_help_with_what_it_is_for() {
    let mut command = command();
    command.build();
    for verb in command.get_subcommands_mut().filter(|verb| verb.get_name() != "help") {
        let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
        assert!(!about.is_empty() && !about.ends_with('.'), "{}: {about:?}", verb.get_name());
    }
    let mut long = |verb: &str| {
        command.find_subcommand_mut(verb).unwrap_or_else(|| panic!("{verb}")).render_long_help().to_string()
    };
    for (verb, part) in [
        ("grant", "between SUBSCRIBER[:PORTS] and REMOTE[:PORTS]"),
        ("grant", "--enforcement police"),
        ("revoke", "Each is ended by itself"),
        ("stats", "qos stats --watch 5 -o json"),
        ("explain", "charged or counted"),
        ("doctor", "Exit status"),
        ("detach", "comes back with the next `qosd run`"),
    ] {
        assert!(long(verb).contains(part), "{part} in\n{}", long(verb));
    }
    let help = command.render_long_help().to_string();
    for part in ["Examples:", "Exit status:", "3  the daemon can't be reached", "QOS_SOCKET"] {
        assert!(help.contains(part), "{part} in\n{help}");
    }
}

#[test]
fn lines_that_are_wrong_are_refused_with_the_reason() {
    for (line, expected) in [
        (vec!["grant", "--provider", "acme"], "--flow <FLOW>"),
        (vec!["grant", "--provider", "-x", "--flow", "any"], "unexpected argument '-x'"),
        (vec!["grant", "--provider", "two words", "--flow", "any"], "`two words` is not a name"),
        (vec!["grant", "--provider", "a", "--flow", "down sideways"], "`sideways` is not understood"),
        (vec!["grant", "--provider", "a", "--flow", "up from 192.0.2.1/24"], "did you mean 192.0.2.0/24?"),
        (vec!["grant", "--provider", "a", "--flow", "any", "--max-down", "fast"], "`fast` has no number"),
        (vec!["grant", "--provider", "a", "--flow", "any", "--priority", "8"], "8 is not in 0..=7"),
        (vec!["grant", "--provider", "a", "--flow", "any", "--dscp", "64"], "`64` is not a code point"),
        (vec!["grant", "--provider", "a", "--flow", "any", "--loss", "2"], "`2` is not a share"),
        (vec!["grant", "--provider", "a", "--flow", "any", "--delay", "-1ms"], "unexpected argument"),
        (vec!["grant", "--provider", "a", "--flow", "any", "--for", "soon"], "`soon` is not a duration"),
        (
            vec!["grant", "--provider", "a", "--flow", "any", "--enforcement", "drop"],
            "possible values: police, shape",
        ),
        (
            vec!["session", "add", "s", "--address", "192.0.2.1/33", "--down", "1M", "--up", "1M"],
            "`192.0.2.1/33` is not an address or prefix",
        ),
        (
            vec!["provider", "add", "p", "--kind", "cable", "--network", "::/0"],
            "possible values: application, network",
        ),
        (vec!["revoke"], "<ID>..."),
        (vec!["revoke", "all"], "invalid digit"),
        (vec!["explain", "--direction", "up"], "--protocol <NAME>"),
        (vec!["explain", "--direction", "up", "--protocol", "udp"], "--source"),
        (vec!["explain", "--direction", "up", "--hex", "45", "--pcap", "x"], "cannot be used with"),
        (vec!["stats", "--watch", "0"], "`0` is not a time in seconds"),
        (vec!["frobnicate"], "unrecognized subcommand 'frobnicate'"),
        (vec!["grnat"], "'grant'"),
    ] {
        let error = Cli::try_parse_from(["qos"].iter().chain(&line)).expect_err(expected);
        assert_eq!(error.exit_code(), 2, "{line:?}");
        assert!(error.to_string().contains(expected), "{line:?}: {error}");
    }
}

#[test]
fn lists_are_printed_as_tables() {
    let daemon = furnished();
    assert_prints(
        &must(&daemon, &["provider", "list"]),
        "
        NAME  KIND         NETWORKS                         GUARANTEED DOWN   MAX DOWN  GUARANTEED UP  MAX UP  BEST PRIORITY  PROFILES  ALLOCATIONS
        acme  application  203.0.113.0/24, 2001:db8:a::/48                -  50 Mbit/s              -       -              0  all                 -
        isp   network      192.0.2.0/24                                   -          -              -       -              0  all                 -
        ",
    );
    assert_prints(
        &must(&daemon, &["session", "list"]),
        "
        NAME     STATE       DOWN         UP  LINK LAYER  ADDRESSES
        dsl-1    up     20 Mbit/s   2 Mbit/s  atm         192.0.2.10/32
        fibre-7  up     80 Mbit/s  40 Mbit/s  ethernet    192.0.2.20/32, 2001:db8:7::/56
        ",
    );
    assert_prints(
        &must(&daemon, &["session", "show", "dsl-1"]),
        "
        name        dsl-1
        addresses   192.0.2.10/32
        down        20 Mbit/s
        up          2 Mbit/s
        link layer  atm
        overhead    32 bytes
        delay       8 ms
        loss        0.1 %
        ",
    );
    assert_prints(
        &must(&daemon, &["app", "list"]),
        "
        PROVIDER  NAME   GUARANTEED DOWN  MAX DOWN  GUARANTEED UP  MAX UP  BEST PRIORITY  PROFILES  ALLOCATIONS
        acme      video                -         -              -       -              0  all                 -
        ",
    );
    assert_prints(
        &must(&daemon, &["profile", "list"]),
        "
        NAME   GUARANTEED DOWN  MAX DOWN  GUARANTEED UP  MAX UP  PRIORITY  DSCP  ENFORCEMENT  LONGEST  STATUS
        voice       100 kbit/s         -     100 kbit/s       -         0  EF    shape        -        active
        ",
    );
}

#[test]
fn a_grant_is_granted_listed_shown_and_revoked() {
    let daemon = furnished();
    let granted = must(&daemon, &GRANT);
    assert!(granted.starts_with("granted 1\nid                 1\n"), "{granted}");
    for part in [
        "session            fibre-7",
        "flows              down udp from 203.0.113.0/24:5000-5010 to 192.0.2.20",
        "guaranteed down    5 Mbit/s",
        "maximum down       10 Mbit/s",
        "delay bound down   6.388 ms (3.169 ms queued on it, 3.219 ms on the link)",
        "jitter bound down  6.388 ms",
        "expires            never",
    ] {
        assert!(granted.contains(part), "{part} in\n{granted}");
    }
    assert_prints(
        &must(&daemon, &["list"]),
        "
        ID  PROVIDER  APP    SESSION  DOWN                   UP  PRIORITY  EXPIRES  FLOWS
         1  acme      video  fibre-7  5 Mbit/s to 10 Mbit/s  -          1  never    down udp from 203.0.113.0/24:5000-5010 to 192.0.2.20
        ",
    );
    assert_eq!(must(&daemon, &["list", "--provider", "isp"]).lines().count(), 1);
    assert!(granted.ends_with(&must(&daemon, &["show", "1"])));
    assert_eq!(must(&daemon, &["revoke", "1"]), "revoked 1\n");
    assert!(must(&daemon, &["list", "--ended"]).contains("revoked"));
}

#[test]
fn a_dry_run_and_its_warnings_are_told_apart_from_a_grant() {
    let daemon = furnished();
    let mut line = GRANT.to_vec();
    line.push("--dry-run");
    let done = qos(&daemon.socket(), &line);
    assert!(done.out.starts_with("nothing was changed; without --dry-run:\ngranted 1\n"), "{done:?}");
    assert_eq!(must(&daemon, &["list"]).lines().count(), 1);
    for line in [
        &["session", "stop", "dsl-1"][..],
        &["session", "remove", "dsl-1"],
        &["provider", "remove", "isp"],
        &["provider", "change", "acme", "--best-priority", "3"],
    ] {
        let before = must(&daemon, &["session", "list"]) + &must(&daemon, &["provider", "list"]);
        let mut line = line.to_vec();
        line.push("--dry-run");
        let done = qos(&daemon.socket(), &line);
        assert!(
            done.status == 0 && done.out.starts_with("nothing was changed; without --dry-run:\n"),
            "{done:?}"
        );
        assert_eq!(
            must(&daemon, &["session", "list"]) + &must(&daemon, &["provider", "list"]),
            before,
            "{line:?}"
        );
    }
    let done = qos(&daemon.socket(), &["reload", "--dry-run"]);
    assert!(done.status == 2 && done.err.contains("`qos reload` can't be tried"), "{done:?}");

    // Upstream is out of the line, where this box can't promise.
    let done = qos(
        &daemon.socket(),
        &[
            "grant",
            "--provider",
            "acme",
            "--flow",
            "up udp from 192.0.2.20 to 203.0.113.7",
            "--guaranteed-up",
            "1mbit",
        ],
    );
    assert_eq!(done.status, 0, "{done:?}");
    assert!(done.err.starts_with("warning: ") && done.err.contains("soft"), "{done:?}");
}

#[test]
fn json_is_the_answer_of_the_api() {
    let daemon = furnished();
    must(&daemon, &GRANT);
    for (line, path) in [
        (vec!["list"], "/v1/allocations"),
        (vec!["show", "1"], "/v1/allocations/1"),
        (vec!["provider", "list"], "/v1/providers"),
        (vec!["provider", "show", "acme"], "/v1/providers/acme"),
        (vec!["app", "list", "acme"], "/v1/providers/acme/applications"),
        (vec!["session", "list"], "/v1/sessions"),
        (vec!["profile", "show", "voice"], "/v1/profiles/voice"),
        (vec!["stats"], "/v1/statistics"),
        (vec!["status"], "/v1/status"),
    ] {
        let printed = must(&daemon, &[line.as_slice(), &["-o", "json"]].concat());
        let printed: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
        assert_eq!(printed, daemon.must("GET", path, ""), "{line:?}");
    }
}

#[test]
fn exit_statuses_tell_refusals_failures_and_absence_apart() {
    let daemon = furnished();
    let socket = daemon.socket();

    let refused = qos(&socket, &["show", "99"]);
    assert_eq!(
        refused,
        Done { status: 1, out: String::new(), err: "error: there is no allocation `99`\n".to_owned() }
    );
    let too_much = qos(
        &socket,
        &[
            "grant",
            "--provider",
            "acme",
            "--flow",
            "down from 203.0.113.7 to 192.0.2.20",
            "--guaranteed-down",
            "90mbit",
        ],
    );
    assert_eq!(too_much.status, 1);
    assert!(
        too_much.err.contains("contract of provider acme, guaranteed downstream: asked 90 Mbit/s"),
        "{too_much:?}"
    );

    daemon.recorder.record().refuse = 1;
    let failed = qos(&socket, &GRANT);
    assert_eq!(failed.status, 4);
    assert!(
        failed.err.starts_with("error: the kernel did not take the change, and nothing was changed: "),
        "{failed:?}"
    );

    let absent = qos(Path::new("/nonexistent/qosd.sock"), &["list"]);
    assert_eq!(absent.status, 3);
    assert!(absent.err.contains("cannot reach qosd on /nonexistent/qosd.sock"), "{absent:?}");
    assert!(absent.err.contains("start it with `qosd run`, or name its socket with --socket"), "{absent:?}");
}

#[test]
fn revoking_several_goes_on_behind_one_that_is_not_there() {
    let daemon = furnished();
    must(&daemon, &GRANT);
    let done = qos(&daemon.socket(), &["revoke", "7", "1"]);
    assert_eq!((done.status, done.out.as_str()), (1, "revoked 1\n"), "{done:?}");
    assert!(done.err.starts_with("error: ") && done.err.contains('7'), "{done:?}");
}

#[test]
fn statistics_are_totals_or_rates() {
    let daemon = furnished();
    must(&daemon, &GRANT);
    assert_prints(
        &must(&daemon, &["stats"]),
        "
        ID  PROVIDER        PASSED  PACKETS  IN PROFILE  EXCESS  DROPPED  QUEUE DROPS  MARKED
         1  acme      down  1.5 MB     1000      1.5 MB     0 B    15 kB            0     0 B

        PROVIDER        PASSED  PACKETS  IN PROFILE  EXCESS  DROPPED  QUEUE DROPS  MARKED
        acme      down  1.5 MB     1000      1.5 MB     0 B    15 kB            0     0 B
        isp       down  1.5 MB     1000      1.5 MB     0 B    15 kB            0     0 B

        packets: admitted 1000, over limit 10

        classifier: 3 of 131072 rules in 30.4 MB, at most 3 comparisons a packet (requests are refused above 512)
        1010 look-ups, each in 2.0 tables, 0.0 forks and 1.5 rules on average
        down ipv4: 2 rules in 1 hash table, longest list 2; 1 rule in 1 tree that each packet goes through, longest list 1
        ",
    );

    // A reader that goes ends it, and that is no error.
    let (out, err) = (Pipe { writes_left: Rc::new(Cell::new(4)), ..Pipe::default() }, Pipe::default());
    let socket = daemon.socket();
    let line = ["qos", "--socket", socket.to_str().expect("UTF-8"), "stats", "--watch", "0.1"];
    let mut output = Output::to(out.clone(), err.clone());
    let status = run(Cli::try_parse_from(line).expect("valid"), &mut output, &|_| Ok(()));
    assert_eq!((status, err.read()), (0, String::new()));
    assert!(out.read().contains("RATE"), "{}", out.read());
}

#[test]
fn an_explanation_is_told_in_words() {
    let daemon = furnished();
    must(&daemon, &GRANT);
    let line = "explain --direction down --protocol udp --source 203.0.113.7:5004 --destination 192.0.2.10:4000 --dscp EF";
    assert_prints(
        &must(&daemon, &line.split(' ').collect::<Vec<_>>()),
        "
        packet      down udp from 203.0.113.7:5004 to 192.0.2.10:4000 dscp EF, 28 bytes
        allocation  1 of acme/video
        selector    0: down udp from 203.0.113.0/24:5000-5010 to 192.0.2.20
        level       guaranteed 5 Mbit/s, maximum 10 Mbit/s, priority 1
        outcome     admitted, in profile
        charged     42 bytes
        line        dsl-1
        class       5150:4001
        looked at   1 table, 0 forks, 2 rules; 0 more had matched and are expired
        way         table 1: tree, 2 rules compared, matches selector 0 of 1
        ",
    );
    let odd = qos(&daemon.socket(), &["explain", "--direction", "down", "--hex", "450"]);
    assert_eq!(
        (odd.status, odd.err.as_str()),
        (2, "error: the digits are no packet: 3 hexadecimal digits: each byte takes two\n")
    );
}

#[test]
fn status_and_reconciliation_are_told() {
    let daemon = furnished();
    let status = must(&daemon, &["status"]);
    for part in [
        "mode                 enforce",
        "link                 down 100 Mbit/s, up 100 Mbit/s",
        "providers            2, with 1 applications",
        "lan0       lan   100 Mbit/s      2  native  tcx  htb              2",
    ] {
        assert!(status.contains(part), "{part} in\n{status}");
    }
    assert_eq!(must(&daemon, &["reconcile"]), "the kernel is as it should be\n");
    daemon.recorder.record().drift.push("lan0: class 5150:2 was missing".to_owned());
    assert_eq!(must(&daemon, &["reconcile"]), "repaired: lan0: class 5150:2 was missing\n");
    assert!(must(&daemon, &["status"]).contains("lan0: class 5150:2 was missing"));
}

#[test]
fn the_doctor_asks_the_daemon_or_looks_itself() {
    let daemon = furnished();
    // lan0 and wan0 do not exist here, and that is an error.
    let asked = qos(&daemon.socket(), &["doctor"]);
    assert_eq!(asked.status, 4, "{asked:?}");
    assert!(asked.out.contains("interface lan0 does not exist"), "{}", asked.out);
    assert!(asked.out.contains("programs on lan0"), "{}", asked.out);
    assert_eq!(asked.err, "");

    let alone = qos(Path::new("/nonexistent/qosd.sock"), &["doctor", "-o", "json"]);
    let checks: serde_json::Value = serde_json::from_str(&alone.out).expect("JSON");
    let checks = checks["items"].as_array().expect("items");
    assert!(checks.iter().any(|check| check["name"] == "daemon" && check["severity"] == "warning"));
    assert!(checks.iter().any(|check| check["name"] == "BTF"));
    assert_ne!(alone.status, 0);
}

/// Runs `qos detach` against a socket where nobody is, and says how often leftovers were removed.
fn detach_leftovers(directory: &Path) -> (u8, String, usize) {
    let config = directory.join("qos.toml");
    let text = format!(
        "state_dir = '{0}/state'\n[[interface]]\nname='lan0'\nrole='lan'\ncapacity='1G'\n[[interface]]\nname='wan0'\nrole='wan'\ncapacity='1G'",
        directory.display()
    );
    std::fs::write(&config, text).expect("written");
    let line =
        ["qos", "--socket", "/nonexistent/s", "detach", "--yes", "--config", config.to_str().expect("UTF-8")];
    let (err, calls) = (Pipe::default(), Cell::new(0));
    let mut output = Output::to(io::sink(), err.clone());
    let status = run(Cli::try_parse_from(line).expect("valid"), &mut output, &|gateway| {
        assert_eq!(gateway.interfaces[0].name, "lan0");
        calls.set(calls.get() + 1);
        Ok(())
    });
    (status, err.read(), calls.get())
}

#[test]
fn detach_goes_to_the_daemon_or_without_one_to_the_kernel() {
    let daemon = TestDaemon::start();
    assert_eq!(must(&daemon, &["detach", "--yes"]), "detached; qosd is stopping\n");
    assert!(daemon.recorder.record().detached);

    let directory = tempfile::tempdir().expect("temporary directory");
    assert_eq!(detach_leftovers(directory.path()), (0, String::new(), 1));
}

#[test]
fn leftovers_of_a_daemon_that_runs_are_left_alone() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let config = crate::api::testing::config(directory.path(), "");
    let _held = crate::daemon::lock(&config).expect("free");
    let (status, error, calls) = detach_leftovers(directory.path());
    assert_eq!((status, calls), (4, 0));
    assert!(error.contains("another qosd"), "{error}");
}

#[test]
fn completions_are_made_for_every_shell() {
    let nowhere = Path::new("/nonexistent/s");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let done = qos(nowhere, &["completions", shell]);
        assert_eq!(done.status, 0, "{shell}");
        assert!(done.out.contains("guaranteed-down"), "{shell}");
    }
}

#[test]
fn manual_pages_are_made_for_every_verb() {
    let nowhere = Path::new("/nonexistent/s");
    let done = qos(nowhere, &["man"]);
    assert!(done.out.contains(".TH qos 1") && done.out.contains("Exit status"), "{}", done.out);

    let directory = tempfile::tempdir().expect("temporary directory");
    let pages = directory.path().join("man1");
    assert_eq!(qos(nowhere, &["man", pages.to_str().expect("UTF-8")]).status, 0);
    for (page, part) in [
        ("qos.1", "Exit status"),
        ("qos-grant.1", "guaranteed"),
        ("qos-provider-add.1", "network"),
        ("qosd.8", "Exit status"),
        ("qosd-run.8", "config"),
    ] {
        let text =
            std::fs::read_to_string(pages.join(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
        assert!(text.contains(part), "{part} in {page}:\n{text}");
    }
}

#[test]
fn lines_are_made_known_from_a_file_or_not_at_all() {
    let daemon = furnished();
    let directory = tempfile::tempdir().expect("temporary directory");
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    };
    let csv = write(
        "lines.csv",
        "line,addresses,down,up,plan_down,link_layer,overhead,delay,loss,bras\n\
         dsl-7,192.0.2.70 2001:db8:7::/56,20mbit,2mbit,16mbit,atm,32,8ms,0.1%,bras1\n\
         fibre-8,192.0.2.80,,,,,,,,\n",
    );
    let tried = must(&daemon, &["session", "import", &csv, "--dry-run"]);
    assert_eq!(tried, "2 lines could be read; none was told\n");
    assert_eq!(must(&daemon, &["session", "import", &csv]), "2 changed, 0 as they were, 0 refused\n");
    assert_eq!(must(&daemon, &["session", "import", &csv]), "0 changed, 2 as they were, 0 refused\n");
    let found = must(&daemon, &["session", "find", "2001:db8:7:1::9", "-o", "json"]);
    let found: serde_json::Value = serde_json::from_str(&found).expect("JSON");
    let found = &found["items"][0];
    assert_eq!((&found["line"], &found["link_layer"]), (&"dsl-7".into(), &"atm".into()), "{found}");
    assert_eq!((&found["rate"]["down"], &found["loss_ppm"]), (&16_000_000.into(), &1_000.into()), "{found}");

    for (text, told) in [
        ("line,addresses\nok,192.0.2.1\nno name,192.0.2.2\n", "line 3: line: `no name` is not a name"),
        ("line,addresses,down\na,192.0.2.1,fast\n", "line 2: "),
        ("line,addresses\na,192.0.2.300\n", "line 2: addresses: `192.0.2.300` is not an address or prefix"),
        ("line,addresses,speed\na,192.0.2.1,1\n", "unknown field `speed`"),
        ("line,addresses\na\n", "found record with 1 fields"),
        ("line,addresses,link_layer\na,192.0.2.1,sdsl\n", "`sdsl` is none of ethernet, atm, ptm"),
    ] {
        let done = qos(&daemon.socket(), &["session", "import", &write("bad.csv", text)]);
        assert_eq!(done.status, 2, "{text}: {done:?}");
        assert!(done.err.contains(told), "{text}: {}", done.err);
    }
    let found = must(&daemon, &["session", "changes"]);
    assert_eq!(found.lines().count(), 2, "{found}");

    let json = write(
        "lines.jsonl",
        "{\"line\":\"a\",\"addresses\":[\"192.0.2.90\"],\"down\":\"10mbit\",\"up\":1000000}\n\
         \n{\"line\":\"b\",\"addresses\":[\"192.0.2.91\",\"192.0.2.92\"]}\n",
    );
    let line = ["session", "import", &json, "--source", "crm", "--complete"];
    assert_eq!(must(&daemon, &line), "2 changed, 0 as they were, 0 refused\n");
    let json = write("lines.json", "[{\"line\":\"b\",\"addresses\":[\"192.0.2.91\"]}]");
    let line = ["session", "import", &json, "--source", "crm", "--complete"];
    assert_eq!(must(&daemon, &line), "2 changed, 0 as they were, 0 refused\n");
    let down = must(&daemon, &["session", "find", "--down"]);
    assert!(down.lines().count() == 2 && down.contains("\na "), "{down}");

    // What can be read, but can't be so, is told by its place, and the rest is taken.
    let csv = write(
        "twice.csv",
        "line,addresses,down\nx,192.0.2.5 192.0.2.0/24,\ny,192.0.2.6,1kbit\nz,192.0.2.7,\n",
    );
    let done = qos(&daemon.socket(), &["session", "import", &csv]);
    assert_eq!((done.status, done.out.as_str()), (1, "1 changed, 0 as they were, 2 refused\n"), "{done:?}");
    assert!(done.err.contains("line 2 is refused: ") && done.err.contains("line 3 is refused: "), "{done:?}");
}

/// On lines of both kinds, each by itself and all together.
#[test]
fn the_starter_profiles_can_be_had_on_dsl_and_fibre() {
    let daemon = furnished();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/starter-profiles.json");
    let written = must(&daemon, &["profile", "import", file]);
    assert_eq!(written.lines().count(), 6, "{written}");
    for (address, port) in [("192.0.2.10", 6_000), ("192.0.2.20", 7_000)] {
        for profile in ["voice", "interactive-video", "gaming", "streaming", "bulk", "background"] {
            let flow = format!("between {address} and 203.0.113.0/24:{}", port + profile.len());
            let flow = if profile == "streaming" {
                format!("down tcp from 203.0.113.0/24:443 to {address}")
            } else {
                flow
            };
            must(
                &daemon,
                &["grant", "--provider", "acme", "--profile", profile, "--flow", &flow, "--for", "1h"],
            );
        }
    }
    // One that can't be keeps all others of its file from being written.
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("profiles.json");
    let text = r#"{"items":[{"name":"one","level":{"priority":1}},{"name":"two","level":{"priority":9}}]}"#;
    std::fs::write(&path, text).expect("written");
    let done = qos(&daemon.socket(), &["profile", "import", path.to_str().expect("UTF-8")]);
    assert_eq!(done.status, 1, "{done:?}");
    assert!(!must(&daemon, &["profile", "list"]).contains("one"));
}

#[test]
fn a_key_is_printed_once() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    let added = must(&daemon, &["key", "add", "--provider", "acme", "--app", "video", "--expires", "1h"]);
    let [first, secret, last] = added.lines().collect::<Vec<_>>()[..] else { panic!("{added}") };
    let id = first.strip_prefix("key ").and_then(|text| text.strip_suffix(" of acme added")).expect(first);
    assert!(secret.starts_with(&format!("qos_{id}_")) && last == "it is not shown again", "{added}");
    let listed = must(&daemon, &["key", "list"]);
    assert!(listed.contains(id) && listed.contains("video") && !listed.contains(secret), "{listed}");
    let tried = must(&daemon, &["--dry-run", "key", "add", "--provider", "acme"]);
    assert!(tried.starts_with("nothing was changed") && !tried.contains("qos_"), "{tried}");
    assert_eq!(must(&daemon, &["key", "remove", id]), format!("key {id} of acme removed\n"));
    assert_eq!(qos(&daemon.socket(), &["key", "remove", id]).status, 1);
}
