//! The store on real files: what it gives back, and what it says when it can't.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use rusqlite::Connection;
use serde::Deserialize as _;

use super::{SqliteStore, Store, StoreError};
use crate::domain::{AllocationId, BitsPerSecond, Contract, Directed, Enforcement, Status};
use crate::manager::record::{Actor, RecordQuery, Verdict, records};
use crate::manager::tests::{any_history, grant_on_line, network, town};
use crate::manager::{Change, Command, LevelRequest, State, decide};

fn now() -> Timestamp {
    "2026-01-01T00:00:00.123456789Z".parse().unwrap()
}

/// Opens a store. A process that another test starts has the lock of one that was just closed until it has become
/// the program that it is to be.
fn open(path: impl AsRef<Path>) -> Result<SqliteStore, StoreError> {
    let begin = Instant::now();
    loop {
        match SqliteStore::open(path.as_ref()) {
            Err(StoreError::InUse { holder, .. })
                if holder == Some(std::process::id()) && begin.elapsed() < Duration::from_millis(500) =>
            {
                thread::sleep(Duration::from_millis(5));
            }
            opened => return opened,
        }
    }
}

/// Decides, writes and applies.
fn carry_out(store: &mut SqliteStore, state: &mut State, command: &Command, now: Timestamp) -> Vec<Change> {
    let decision = decide(state, command, now).unwrap();
    store.commit(&decision.changes, &[]).unwrap();
    for change in &decision.changes {
        state.apply(change);
    }
    decision.changes
}

/// A store that holds what [`town`] does.
fn filled(path: &Path) -> (SqliteStore, State) {
    let mut store = open(path).unwrap();
    let (state, changes) = town();
    store.commit(&changes, &[]).unwrap();
    (store, state)
}

fn reopened(path: &Path) -> State {
    open(path).unwrap().load(network()).unwrap()
}

#[test]
fn what_was_written_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let (mut store, mut state) = filled(&path);
    assert!(store.load(network()).unwrap() == state);
    for host in 1..=5 {
        carry_out(&mut store, &mut state, &grant_on_line(host), now());
    }
    carry_out(&mut store, &mut state, &Command::Revoke { id: AllocationId(2) }, now());
    drop(store);
    let loaded = reopened(&path);
    assert!(loaded == state, "{loaded:?}\n{state:?}");
    assert_eq!(loaded.next_allocation, AllocationId(6));
}

/// Before version 3 a class had the number of its allocation's slot.
#[test]
fn allocations_of_an_earlier_version_keep_their_classes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let (mut store, mut state) = filled(&path);
    let policed = |host| {
        let Command::Grant(mut request) = grant_on_line(host) else { panic!("a grant") };
        request.level = LevelRequest {
            maximum: Directed { up: None, down: Some(BitsPerSecond(1_000_000)) },
            enforcement: Some(Enforcement::Police),
            ..LevelRequest::default()
        };
        Command::Grant(request)
    };
    for host in 1..=6 {
        let command = if host % 2 == 0 { policed(host) } else { grant_on_line(host) };
        carry_out(&mut store, &mut state, &command, now());
    }
    for id in [5, 2] {
        carry_out(&mut store, &mut state, &Command::Revoke { id: AllocationId(id) }, now());
    }
    drop(store);
    of_version_3(&path);
    let earlier = "DROP INDEX allocations_by_class; ALTER TABLE allocations DROP COLUMN class;
         ALTER TABLE history DROP COLUMN class; DELETE FROM freed_slots WHERE kind = 'class';
         PRAGMA user_version = 2";
    Connection::open(&path).unwrap().execute_batch(earlier).unwrap();
    let mut store = open(&path).unwrap();
    let mut state = store.load(network()).unwrap();
    let classes: Vec<_> = state.allocations.values().map(|known| (known.slot, known.class)).collect();
    assert_eq!(classes, [(1, Some(1)), (3, Some(3)), (4, None), (6, None)]);
    assert!(store.history(5).unwrap().iter().all(|ended| ended.class.is_none()));
    for host in 7..=8 {
        carry_out(&mut store, &mut state, &grant_on_line(host), now());
    }
    let classes: Vec<_> = state.allocations.values().map(|known| (known.slot, known.class)).skip(4).collect();
    assert_eq!(classes, [(7, Some(4)), (8, Some(6))], "not those that were freed last");
    drop(store);
    assert!(reopened(&path) == state);
}

/// Makes a file of version 3 of one of version 4.
fn of_version_3(path: &Path) {
    let mut earlier = "ALTER TABLE providers RENAME COLUMN maximum_up TO aggregate_up;
         ALTER TABLE providers RENAME COLUMN maximum_down TO aggregate_down;
         ALTER TABLE applications DROP COLUMN maximum_up;
         ALTER TABLE applications DROP COLUMN maximum_down;
         ALTER TABLE sessions DROP COLUMN segments; DROP TABLE segments; DROP TABLE decisions; DROP TABLE keys;
         ALTER TABLE sessions DROP COLUMN on_demand; DROP TABLE subscribers; DROP TABLE subscriber_addresses;
         ALTER TABLE sessions DROP COLUMN bras; ALTER TABLE sessions DROP COLUMN source;
         ALTER TABLE sessions DROP COLUMN seen_at; ALTER TABLE sessions DROP COLUMN down_since;
         ALTER TABLE profiles DROP COLUMN status; ALTER TABLE profiles DROP COLUMN shortest;
         ALTER TABLE profiles DROP COLUMN longest;"
        .to_owned();
    for table in ["providers", "applications"] {
        for column in ["guaranteed_up", "guaranteed_down", "best_priority", "profiles", "allocations"] {
            earlier.push_str(&format!("ALTER TABLE {table} DROP COLUMN {column};"));
        }
    }
    for table in ["allocations", "history"] {
        for column in ["jitter_us", "delay_line_us", "delay_line_queue_us", "delay_link_queue_us"] {
            earlier.push_str(&format!("ALTER TABLE {table} DROP COLUMN {column};"));
        }
    }
    earlier.push_str("ALTER TABLE profiles DROP COLUMN jitter_us;");
    earlier.push_str("PRAGMA user_version = 3");
    Connection::open(path).unwrap().execute_batch(&earlier).unwrap();
}

/// Before version 4 a provider had an aggregate and nothing else, an application nothing.
#[test]
fn the_aggregate_of_an_earlier_version_is_the_maximum_of_a_contract() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let (mut store, mut state) = filled(&path);
    let contract = Contract {
        maximum: Directed { up: None, down: Some(BitsPerSecond(50_000_000)) },
        best_priority: 2,
        allocations: Some(7),
        ..Contract::default()
    };
    let provider = state.providers.values().next().unwrap().name.clone();
    let command = Command::ChangeContract { provider, application: None, contract, was: None };
    carry_out(&mut store, &mut state, &command, now());
    drop(store);
    of_version_3(&path);
    let loaded = reopened(&path);
    for (name, provider) in &state.providers {
        let kept = Contract { maximum: provider.contract.maximum, ..Contract::default() };
        assert_eq!(loaded.providers[name].contract, kept, "{name}");
    }
    assert!(loaded.providers.values().any(|provider| provider.contract != Contract::default()));
    assert!(loaded.applications.values().all(|application| application.contract == Contract::default()));
}

#[test]
fn generated_histories_are_read_back() {
    // Each history has its own file; waiting for the disk bounds their number.
    let mut runner = TestRunner::deterministic();
    let mut granted = 0;
    for _ in 0..40 {
        let commands = any_history().new_tree(&mut runner).unwrap().current();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        let mut store = open(&path).unwrap();
        let mut state = State::new(network());
        for (step, command) in commands.iter().enumerate() {
            let now = now().checked_add(SignedDuration::from_secs(3 * step as i64)).unwrap();
            let Ok(decision) = decide(&state, command, now) else { continue };
            let inverse = state.inverse(&decision.changes);
            store.commit(&decision.changes, &[]).unwrap();
            decision.changes.iter().for_each(|change| state.apply(change));
            if step % 5 == 0 {
                store.commit(&inverse, &[]).unwrap();
                inverse.iter().for_each(|change| state.apply(change));
            }
        }
        drop(store);
        assert!(reopened(&path) == state, "{commands:?}");
        granted += state.next_allocation.0 - 1;
    }
    assert!(granted > 100, "the histories grant something: {granted}");
}

#[test]
fn ended_allocations_are_history_and_the_oldest_go() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let (store, mut state) = filled(&path);
    let mut store = store.with_history_limit(3);
    for host in 1..=5 {
        carry_out(&mut store, &mut state, &grant_on_line(host), now());
    }
    let before_undone = decide(&state, &Command::Revoke { id: AllocationId(5) }, now()).unwrap().changes;
    let inverse = state.inverse(&before_undone);
    for id in [4, 3, 2, 1] {
        carry_out(&mut store, &mut state, &Command::Revoke { id: AllocationId(id) }, now());
    }
    let history = store.history(10).unwrap();
    let found: Vec<_> = history.iter().map(|ended| ended.id.0).collect();
    assert_eq!(found, [1, 2, 3]);
    assert_eq!(store.history(1).unwrap()[0].id, AllocationId(1));
    for ended in &history {
        assert_eq!((ended.status, ended.reason.as_deref()), (Status::Unavailable, Some("revoked")));
        assert_eq!(ended.ended_at, Some(now()));
    }
    // What is undone has not ended.
    store.commit(&before_undone, &[]).unwrap();
    assert_eq!(store.history(1).unwrap()[0].id, AllocationId(5));
    store.commit(&inverse, &[]).unwrap();
    assert_eq!(store.history(1).unwrap()[0].id, AllocationId(1));
    drop(store);
    // The last allocation ends, its provider goes, all is closed: its number is not given out again.
    let mut store = open(&path).unwrap();
    carry_out(&mut store, &mut state, &Command::Revoke { id: AllocationId(5) }, now());
    drop(store);
    assert_eq!(reopened(&path).next_allocation, AllocationId(6));
}

#[test]
fn a_decision_is_written_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let (mut store, state) = filled(&path);
    let good = decide(&state, &grant_on_line(1), now()).unwrap().changes;
    let [Change::PutAllocation(allocation)] = &good[..] else { panic!("{good:?}") };
    let mut stray = allocation.clone();
    stray.id = AllocationId(2);
    stray.slot = 2;
    stray.provider = "nobody".parse().unwrap();
    let error = store.commit(&[good[0].clone(), Change::PutAllocation(stray)], &[]).unwrap_err();
    assert!(matches!(error, StoreError::Sqlite { action: "writing a decision", .. }), "{error}");
    assert!(store.load(network()).unwrap() == state);
    store.commit(&good, &[]).unwrap();
}

#[test]
fn a_file_that_is_not_ours_is_told_from_a_damaged_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let open = || open(&path).map(|_| ());

    fs::write(
        &path,
        "[state]\nthis is no database, but long enough to be looked at as if it were one\n".repeat(9),
    )
    .unwrap();
    assert!(matches!(open(), Err(StoreError::Corrupt { .. })), "{:?}", open());
    fs::remove_file(&path).unwrap();

    Connection::open(&path).unwrap().execute_batch("CREATE TABLE songs (title TEXT)").unwrap();
    assert!(matches!(open(), Err(StoreError::Foreign { .. })), "{:?}", open());
    fs::remove_file(&path).unwrap();

    drop(filled(&path));
    Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 9").unwrap();
    let error = open().unwrap_err();
    assert!(matches!(error, StoreError::TooNew { found: 9, known: 4, .. }), "{error}");
    assert!(error.to_string().contains("schema version 9, this qosd knows versions up to 4"), "{error}");

    let error = SqliteStore::open(folder.path().join("no/such/folder/state.db")).unwrap_err();
    assert!(matches!(error, StoreError::CannotOpen { .. }), "{error}");
    assert!(error.to_string().contains("no/such/folder"), "{error}");
    let error = SqliteStore::open(folder.path()).unwrap_err();
    assert!(matches!(error, StoreError::CannotOpen { .. }), "{error}");
}

#[test]
fn damage_is_found_before_anything_is_decided() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let (mut store, mut state) = filled(&path);
    for host in 1..=200 {
        carry_out(&mut store, &mut state, &grant_on_line(host), now());
    }
    drop(store);
    let sound = fs::read(&path).unwrap();
    assert!(sound.len() > 20 * 4_096, "{}", sound.len());
    for (what, damaged) in [
        ("cut off", sound[..sound.len() / 2].to_vec()),
        ("a page overwritten", [&sound[..10 * 4_096], &[0xa5; 4_096], &sound[11 * 4_096..]].concat()),
        ("its head overwritten", [&[0; 100], &sound[100..]].concat()),
    ] {
        fs::write(&path, damaged).unwrap();
        let error = open(&path).map(|_| ()).expect_err(what);
        assert!(matches!(error, StoreError::Corrupt { .. }), "{what}: {error}");
        assert!(error.to_string().contains("move it away"), "{what}: {error}");
    }
    fs::write(&path, sound).unwrap();
    assert!(reopened(&path) == state);
}

#[test]
fn records_are_found_by_what_they_concern_and_the_oldest_go() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let (store, mut state) = filled(&path);
    let mut store = store.with_records_limit(30);
    for host in 1..=40 {
        let command = grant_on_line(host);
        let decision = decide(&state, &command, now()).unwrap();
        let records = records(&state, &command, &decision, &Actor::User(Some(7)), now());
        store.commit(&decision.changes, &records).unwrap();
        for change in &decision.changes {
            state.apply(change);
        }
    }
    drop(store);
    let mut store = open(&path).unwrap();
    let mut found = |query: RecordQuery| store.records(&query).unwrap();
    let all = found(RecordQuery::default());
    assert_eq!(
        all.iter().map(|record| record.sequence).collect::<Vec<_>>(),
        (11..=40).rev().collect::<Vec<_>>()
    );
    assert_eq!(
        (all[0].actor.as_str(), all[0].action.as_str(), all[0].verdict),
        ("uid 7", "grant", Verdict::Done)
    );
    assert_eq!((all[0].at, all[0].allocation), (now(), Some(AllocationId(40))));
    let asked = Command::deserialize(&{
        let mut asked = all[0].asked.clone().unwrap();
        asked["command"] = "grant".into();
        asked
    });
    assert_eq!(asked.unwrap(), grant_on_line(40));
    let one = RecordQuery { allocation: Some(AllocationId(20)), ..RecordQuery::default() };
    assert_eq!(found(one.clone())[..], all[20..=20]);
    let line = all[20].session.clone();
    assert!(line.is_some());
    assert!(found(RecordQuery { session: line, ..one.clone() }).len() == 1);
    assert!(found(RecordQuery { verdict: Some(Verdict::Refused), ..one.clone() }).is_empty());
    assert_eq!(
        found(RecordQuery { since: Some(now() - SignedDuration::from_secs(1)), ..one.clone() }).len(),
        1
    );
    assert!(found(RecordQuery { since: Some(now() + SignedDuration::from_secs(1)), ..one }).is_empty());
    let rest = RecordQuery { before: Some(15), limit: 3, ..RecordQuery::default() };
    assert_eq!(found(rest)[..], all[26..29]);
}

#[test]
fn a_bad_row_is_named() {
    for (statement, table, key, said) in [
        (
            "UPDATE providers SET networks = '[\"192.0.2.0/33\"]' WHERE name = 'acme'",
            "providers",
            "acme",
            "column networks",
        ),
        ("UPDATE providers SET slot = 0 WHERE name = 'isp'", "providers", "isp", "slot: 0 is out of range"),
        ("UPDATE applications SET name = 'two words'", "applications", "acme two words", "is not a name"),
        (
            "UPDATE sessions SET link_layer = 'pigeon' WHERE name = 'dsl-1'",
            "sessions",
            "dsl-1",
            "link_layer: not known",
        ),
        (
            "UPDATE sessions SET rate_up = -5 WHERE name = 'dsl-1'",
            "sessions",
            "dsl-1",
            "rate_up: -5 is out of range",
        ),
        ("UPDATE profiles SET priority = 12", "profiles", "voice", "priority: 12 is out of range"),
        (
            "UPDATE allocations SET selectors = '[\"sideways\"]'",
            "allocations",
            "1",
            "`sideways` is not understood",
        ),
        ("UPDATE allocations SET granted_at = 'yesterday'", "allocations", "1", "column granted_at"),
        ("UPDATE allocations SET class = NULL", "allocations", "1", "column class: it does not agree"),
        ("UPDATE allocations SET class = 16384", "allocations", "1", "class: 16384 is out of range"),
        ("UPDATE allocations SET dscp = 99", "allocations", "1", "dscp: 99 is out of range"),
        ("UPDATE allocations SET session = 'dsl-9'", "allocations", "1", "there is no session dsl-9"),
        ("UPDATE allocations SET provider = 'nobody'", "allocations", "1", "there is no provider nobody"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        let (mut store, mut state) = filled(&path);
        carry_out(&mut store, &mut state, &grant_on_line(1), now());
        drop(store);
        let by_hand = Connection::open(&path).unwrap();
        by_hand.execute_batch(&format!("PRAGMA foreign_keys = OFF; {statement}")).unwrap();
        drop(by_hand);
        let error = open(&path).unwrap().load(network()).map(|_| ()).expect_err(statement);
        match &error {
            StoreError::BadRow { table: found, key: row, reason, .. } => {
                assert_eq!((*found, row.as_str()), (table, key), "{statement}");
                assert!(reason.contains(said), "{statement}: {reason}");
            }
            other => panic!("{statement}: {other}"),
        }
    }
}

#[test]
fn one_process_owns_the_file_and_others_may_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let (mut store, mut state) = filled(&path);
    let error = open(&path).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, StoreError::InUse { holder: Some(pid), .. } if pid == std::process::id()),
        "{error}"
    );

    carry_out(&mut store, &mut state, &grant_on_line(1), now());
    let reader = Connection::open(&path).unwrap();
    let status: String =
        reader.query_row("SELECT status FROM allocation_status WHERE id = 1", [], |row| row.get(0)).unwrap();
    assert_eq!(status, "available");

    // A shell that began to write and was left so.
    reader.execute_batch("BEGIN IMMEDIATE").unwrap();
    let changes = decide(&state, &grant_on_line(2), now()).unwrap().changes;
    let error = store.commit(&changes, &[]).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    reader.execute_batch("ROLLBACK").unwrap();
    store.commit(&changes, &[]).unwrap();

    drop(store);
    assert_eq!(reopened(&path).allocations.len(), 2);
}

#[test]
fn what_a_crash_leaves_is_a_prefix_of_the_decisions() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let (mut store, mut state) = filled(&path);
    let mut states = vec![State::new(network()), state.clone()];
    for host in 1..=20 {
        carry_out(&mut store, &mut state, &grant_on_line(host), now());
        states.push(state.clone());
    }
    let database = fs::read(&path).unwrap();
    let journal = fs::read(folder.path().join("state.db-wal")).unwrap();
    assert!(journal.len() > 20 * 4_096);
    // What is on the disk when the power goes: the journal up to some byte, or with a bad sector.
    let copy = folder.path().join("copy.db");
    let mut seen = std::collections::BTreeSet::new();
    for step in 0..60 {
        let at = journal.len() * step / 60;
        let torn = if step % 3 == 0 {
            let mut torn = journal.clone();
            torn[at] ^= 0x55;
            torn
        } else {
            journal[..at].to_vec()
        };
        fs::write(&copy, &database).unwrap();
        fs::write(folder.path().join("copy.db-wal"), torn).unwrap();
        let loaded = reopened(&copy);
        let found = states.iter().position(|state| *state == loaded);
        seen.insert(found.unwrap_or_else(|| panic!("torn at {at}: no state of the history: {loaded:?}")));
        fs::remove_file(&copy).unwrap();
    }
    assert!(seen.len() > 10, "cuts fall between many decisions: {seen:?}");
}

const CHILD: &str = "QOS_TEST_STORE";

/// Run in a process of its own by the test below, and killed by it.
#[test]
fn commits_until_killed() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let mut store = open(Path::new(&path)).unwrap();
    let mut state = store.load(network()).unwrap();
    for host in 0.. {
        let changes = carry_out(&mut store, &mut state, &grant_on_line(host % 3), now());
        let [Change::PutAllocation(granted)] = &changes[..] else { panic!("{changes:?}") };
        println!("granted {}", granted.id);
        std::io::stdout().flush().unwrap();
        let id = granted.id;
        carry_out(&mut store, &mut state, &Command::Revoke { id }, now());
        println!("revoked {id}");
    }
}

#[test]
fn kill_9_loses_nothing_that_was_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    drop(filled(&path));
    let mut last_told = 0;
    for round in 0..6 {
        let mut child = Process::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::commits_until_killed", "--nocapture", "--test-threads=1"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut told = Vec::new();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        while told.len() < 10 + 7 * round {
            let line = lines.next().expect("the child goes on until it is killed").unwrap();
            if line.contains("granted ") || line.contains("revoked ") {
                told.push(line);
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        told.extend(lines.map_while(Result::ok));

        let state = reopened(&path);
        let id_of = |line: &str| line.rsplit(' ').next().and_then(|id| id.parse::<u64>().ok());
        let ids = |verb: &str| -> Vec<u64> {
            told.iter().filter(|line| line.contains(verb)).filter_map(|line| id_of(line)).collect()
        };
        let granted = ids("granted ");
        assert!(granted.iter().all(|id| *id > last_told), "round {round}: a number was given out twice");
        last_told = *granted.last().unwrap();
        assert!(state.next_allocation.0 > last_told);
        for id in ids("revoked ") {
            assert!(!state.allocations.contains_key(&AllocationId(id)), "round {round}: {id} is back");
        }
        // At most the one grant that was under way is there.
        assert!(state.allocations.len() <= 1, "round {round}");
        let mut store = open(&path).unwrap();
        let left: Vec<_> = state.allocations.keys().copied().collect();
        let mut state = state;
        for id in left {
            carry_out(&mut store, &mut state, &Command::Revoke { id }, now());
            last_told = last_told.max(id.0);
        }
    }
}

/// Runs `test` in a thread with a mount namespace of its own, in a fresh tmpfs of `size` bytes.
fn in_tmpfs(size: u32, test: impl FnOnce(&Path) + Send + 'static) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace (needs root)");
        let nothing = None::<&str>;
        mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).unwrap();
        let options = format!("size={size}");
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).unwrap();
        test(&path);
        umount2(&path, MntFlags::MNT_DETACH).unwrap();
    };
    let finished = thread::spawn(run).join();
    if let Err(panic) = finished {
        std::panic::resume_unwind(panic);
    }
}

#[test]
#[ignore = "needs root: mounts a small tmpfs in a mount namespace of its own"]
fn a_full_disk_refuses_and_changes_nothing() {
    in_tmpfs(1 << 20, |folder| {
        let path = folder.join("state.db");
        let filler = folder.join("filler");
        let (mut store, mut state) = filled(&path);
        fs::write(&filler, vec![0; 250_000]).unwrap();
        let mut error = None;
        for host in 0..2_000 {
            let changes = decide(&state, &grant_on_line(host), now()).unwrap().changes;
            match store.commit(&changes, &[]) {
                Ok(()) => changes.iter().for_each(|change| state.apply(change)),
                Err(refused) => {
                    error = Some(refused);
                    break;
                }
            }
        }
        let error = error.expect("a megabyte is full some day");
        assert!(matches!(error, StoreError::Full { .. }), "{error}");
        assert!(state.allocations.len() > 20, "{}", state.allocations.len());
        assert!(store.load(network()).unwrap() == state);
        // Space is found, and work goes on.
        fs::remove_file(&filler).unwrap();
        carry_out(&mut store, &mut state, &grant_on_line(5_000), now());
        drop(store);
        assert!(reopened(&path) == state);
    });
}

#[test]
#[ignore = "needs root: mounts a small tmpfs in a mount namespace of its own"]
fn a_disk_that_is_full_at_the_start_is_said() {
    for left in [0, 4_096, 20_000, 40_000] {
        in_tmpfs(1 << 20, move |folder| {
            let filler = fs::write(folder.join("filler"), vec![0; (1 << 20) - left]);
            filler.unwrap();
            let error = open(folder.join("state.db")).map(|_| ()).unwrap_err();
            assert!(matches!(error, StoreError::Full { .. }), "{left} bytes left: {error}");
        });
    }
}

#[test]
#[ignore = "needs root: mounts in a mount namespace of its own"]
fn what_is_read_only_is_said() {
    in_tmpfs(1 << 20, |folder| {
        let path = folder.join("state.db");
        drop(filled(&path));
        let nothing = None::<&str>;
        let remount = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
        // The file alone, its folder writable.
        mount(Some(&path), &path, nothing, MsFlags::MS_BIND, nothing).unwrap();
        mount(nothing, &path, nothing, remount | MsFlags::MS_RDONLY, nothing).unwrap();
        let error = open(&path).map(|_| ()).unwrap_err();
        assert!(matches!(error, StoreError::ReadOnly { .. }), "{error}");
        umount2(&path, MntFlags::empty()).unwrap();
        // The folder.
        mount(nothing, folder, nothing, remount | MsFlags::MS_RDONLY, nothing).unwrap();
        let error = open(&path).map(|_| ()).unwrap_err();
        assert!(matches!(error, StoreError::ReadOnly { .. }), "{error}");
        assert!(error.to_string().contains("must be able to write"), "{error}");
    });
}

#[test]
fn time_of_a_commit() {
    for synchronous in ["full", "normal"] {
        let folder = tempfile::tempdir().unwrap();
        let (mut store, mut state) = filled(&folder.path().join("state.db"));
        store.set_synchronous(synchronous);
        let started = Instant::now();
        for host in 0..200 {
            carry_out(&mut store, &mut state, &grant_on_line(host), now());
        }
        let each = started.elapsed().as_secs_f64() * 1e6 / 200.0;
        println!("decide and commit, synchronous = {synchronous}: {each:.0} µs a grant");
    }
}
