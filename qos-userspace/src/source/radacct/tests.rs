//! A database as FreeRADIUS leaves it, read round after round. The real FreeRADIUS, and the other databases, are in
//! tests/tests/radacct.rs.

use std::path::Path;

use super::*;
use crate::domain::{BitsPerSecond, Directed, Subscriber};

/// The columns of the schema of FreeRADIUS 3.2 that matter, and a view of it with rates.
const SCHEMA: &str = "
CREATE TABLE radacct (
    radacctid INTEGER PRIMARY KEY AUTOINCREMENT, acctuniqueid varchar(32) NOT NULL,
    username varchar(64) NOT NULL, nasipaddress varchar(15) NOT NULL default '10.0.0.1',
    acctstarttime datetime, acctupdatetime datetime, acctstoptime datetime,
    framedipaddress varchar(15) NOT NULL default '', framedipv6address varchar(45) NOT NULL default '',
    framedipv6prefix varchar(45) NOT NULL default '', delegatedipv6prefix varchar(45) NOT NULL default ''
);
CREATE TABLE rates (username varchar(64), up int, down int);
CREATE VIEW with_rates AS SELECT a.*, r.up AS up, r.down AS down FROM radacct a LEFT JOIN rates r USING (username);
";

#[derive(Clone, Debug, Default)]
struct Recorder {
    reports: Arc<Mutex<Vec<Report>>>,
    open: Arc<Mutex<Vec<Subscriber>>>,
    fails: Arc<Mutex<bool>>,
}

impl Sink for Recorder {
    async fn take(&self, reports: Vec<Report>) -> Result<Vec<Taken>, SinkError> {
        if *self.fails.lock().expect("no panic") {
            return Err(SinkError("the disk is full".into()));
        }
        let taken = vec![Taken::Unchanged; reports.len()];
        self.reports.lock().expect("no panic").extend(reports);
        Ok(taken)
    }

    async fn open(&self, _: &Name) -> Result<Vec<Subscriber>, SinkError> {
        Ok(self.open.lock().expect("no panic").clone())
    }
}

struct World {
    _folder: tempfile::TempDir,
    database: rusqlite::Connection,
    recorder: Recorder,
    follower: Follower<Recorder>,
    now: i64,
}

fn config(path: &Path) -> RadacctConfig {
    let known = Identifier::known;
    RadacctConfig {
        url: Url::read(&format!("sqlite://{}", path.display())).expect("a URL"),
        poll: Duration::from_secs(1),
        table: vec![known("with_rates")],
        columns: Columns {
            id: known("radacctid"),
            key: known("acctuniqueid"),
            line: known("username"),
            bras: known("nasipaddress"),
            start: known("acctstarttime"),
            update: known("acctupdatetime"),
            stop: known("acctstoptime"),
            address: Some(known("framedipaddress")),
            ipv6_address: Some(known("framedipv6address")),
            ipv6_prefix: Some(known("framedipv6prefix")),
            delegated_prefix: Some(known("delegatedipv6prefix")),
            rate_up: Some(known("up")),
            rate_down: Some(known("down")),
        },
        rate_unit: 1_000,
        source: "radacct".parse().expect("a name"),
    }
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("radius.sqlite");
        let database = rusqlite::Connection::open(&path).expect("a database");
        database.execute_batch(SCHEMA).expect("the schema");
        let recorder = Recorder::default();
        let follower = Self::follower(&path, &recorder);
        Self { _folder: folder, database, recorder, follower, now: Timestamp::now().as_second() }
    }

    fn follower(path: &Path, recorder: &Recorder) -> Follower<Recorder> {
        Follower {
            config: config(path),
            ttl: Duration::from_secs(3_600),
            sink: recorder.clone(),
            status: Arc::default(),
            database: None,
            known: None,
            refused: Throttle::default(),
        }
    }

    /// As the daemon does when it starts again.
    fn restart(&mut self) {
        let path = self.database.path().expect("a file").to_owned();
        self.follower = Self::follower(Path::new(&path), &self.recorder);
    }

    fn execute(&self, statement: &str) {
        self.database.execute_batch(statement).expect(statement);
    }

    /// A session that began so many seconds ago and was seen then.
    fn open(&self, key: &str, user: &str, address: &str, ago: i64) {
        let at = self.now - ago;
        self.execute(&format!(
            "INSERT INTO radacct (acctuniqueid, username, acctstarttime, acctupdatetime, framedipaddress) \
             VALUES ('{key}', '{user}', {at}, {at}, '{address}')"
        ));
    }

    fn update(&self, key: &str, set: &str) {
        self.execute(&format!("UPDATE radacct SET {set} WHERE acctuniqueid = '{key}'"));
    }

    /// What a round tells, such as "up dsl-1 key -30 192.0.2.1/32".
    async fn round(&mut self) -> Vec<String> {
        self.follower.round().await.expect("a round");
        let reports = std::mem::take(&mut *self.recorder.reports.lock().expect("no panic"));
        let told = reports.into_iter().map(|report| {
            let at = report.at.as_second() - self.now;
            match report.event {
                Event::Up { line, key, facts } => {
                    let addresses: Vec<_> = facts.addresses.iter().map(ToString::to_string).collect();
                    format!("up {line} {} {at} {}", key.expect("a key"), addresses.join(" "))
                }
                Event::Down { line, key } => format!("down {line} {} {at}", key.expect("a key")),
                Event::BrasDown { bras } => format!("down {bras} {at}"),
            }
        });
        told.collect()
    }

    fn status(&self) -> RadacctStatus {
        self.follower.status.lock().expect("no panic").clone()
    }
}

const NOTHING: [&str; 0] = [];

#[tokio::test]
async fn a_session_is_told_when_it_opens_changes_and_ends() {
    let mut world = World::new();
    assert_eq!(world.round().await, NOTHING);
    world.open("k1", "dsl-1", "192.0.2.1", 30);
    assert_eq!(world.round().await, ["up dsl-1 k1 -30 192.0.2.1/32", "up dsl-1 k1 -30 192.0.2.1/32"]);
    assert_eq!(world.round().await, NOTHING);
    world.update("k1", &format!("acctupdatetime = {}, framedipv6prefix = '2001:db8::/64'", world.now - 10));
    assert_eq!(world.round().await, ["up dsl-1 k1 -10 192.0.2.1/32 2001:db8::/64"]);
    // As FreeRADIUS's stop query for SQLite, which leaves the time of the update alone.
    world.update("k1", &format!("acctstoptime = {}", world.now - 2));
    assert_eq!(world.round().await, ["down dsl-1 k1 -2"]);
    assert_eq!(world.round().await, NOTHING);
    assert_eq!((world.status().open, world.status().told), (0, 4));
}

#[tokio::test]
async fn what_a_row_has_is_told_whole() {
    let mut world = World::new();
    world.open("k1", "ann@isp.example", "192.0.2.1", 30);
    world.update("k1", "framedipv6address = '2001:db8:1::7', delegatedipv6prefix = '2001:db8:2:300::/56'");
    world.execute("INSERT INTO rates VALUES ('ann@isp.example', 2000, 50000)");
    world.follower.round().await.expect("a round");
    let Event::Up { line, facts, .. } = world.recorder.reports.lock().expect("no panic")[0].event.clone()
    else {
        panic!("not up")
    };
    assert!(line.as_str().starts_with("ann-isp.example-"), "{line}");
    let rate = Directed { up: Some(BitsPerSecond(2_000_000)), down: Some(BitsPerSecond(50_000_000)) };
    assert_eq!((facts.rate, facts.bras.as_deref()), (rate, Some("10.0.0.1")));
    assert_eq!(facts.addresses.len(), 3);
}

#[tokio::test]
async fn a_session_without_signs_of_life_is_not_told_until_there_is_one() {
    let mut world = World::new();
    world.open("k1", "dsl-1", "192.0.2.1", 7_200);
    world.open("k2", "dsl-2", "192.0.2.2", 3_000);
    assert_eq!(world.round().await.len(), 2);
    assert_eq!(world.status().open, 1);
    world.update("k1", &format!("acctupdatetime = {}", world.now));
    assert_eq!(world.round().await, ["up dsl-1 k1 -7200 192.0.2.1/32", "up dsl-1 k1 0 192.0.2.1/32"]);
}

#[tokio::test]
async fn of_two_on_one_address_the_newer_counts_until_it_ends() {
    let mut world = World::new();
    world.open("k1", "dsl-1", "192.0.2.1", 600);
    world.open("k2", "dsl-2", "192.0.2.1", 60);
    assert_eq!(world.round().await, ["up dsl-2 k2 -60 192.0.2.1/32"; 2]);
    assert_eq!((world.status().open, world.status().contested), (2, 1));
    world.update("k1", &format!("acctupdatetime = {}", world.now - 20));
    assert_eq!(world.round().await, NOTHING, "the older one goes on saying that it lives");
    world.update("k2", &format!("acctstoptime = {}", world.now - 10));
    assert_eq!(
        world.round().await,
        ["down dsl-2 k2 -10", "up dsl-1 k1 -600 192.0.2.1/32", "up dsl-1 k1 -20 192.0.2.1/32"]
    );
    assert_eq!((world.status().open, world.status().contested), (1, 0));
}

#[tokio::test]
async fn a_line_that_comes_back_without_having_ended_has_its_newer_session() {
    let mut world = World::new();
    world.open("k1", "dsl-1", "192.0.2.1", 600);
    world.round().await;
    world.open("k2", "dsl-1", "192.0.2.9", 5);
    assert_eq!(world.round().await, ["up dsl-1 k2 -5 192.0.2.9/32"; 2]);
    world.update("k1", &format!("acctstoptime = {}", world.now - 1));
    assert_eq!(world.round().await, NOTHING, "its end is nobody's");
}

#[tokio::test]
async fn what_ended_while_the_daemon_was_down_is_told() {
    let mut world = World::new();
    for (key, user) in [("k1", "dsl-1"), ("k2", "dsl-2"), ("k3", "dsl-3")] {
        world.open(key, user, &format!("192.0.2.{}", &key[1..]), 600);
        let name: Name = user.parse().expect("a name");
        world.recorder.open.lock().expect("no panic").push(Subscriber {
            line: name,
            source: None,
            key: Some(key.to_owned()),
            facts: crate::domain::subscriber::Facts::default(),
            started_at: Timestamp::UNIX_EPOCH,
            seen_at: Timestamp::UNIX_EPOCH,
            down_since: None,
            reason: None,
            sequence: 1,
        });
    }
    world.round().await;
    world.update("k1", &format!("acctstoptime = {}", world.now - 7));
    world.execute("DELETE FROM radacct WHERE acctuniqueid = 'k2'");
    world.restart();
    let told = world.round().await;
    assert_eq!(told[0], "down dsl-1 k1 -7");
    assert!(told[1].starts_with("down dsl-2 k2 "), "{told:?}");
    assert_eq!(told[2..], ["up dsl-3 k3 -600 192.0.2.3/32"; 2]);
}

#[tokio::test]
async fn a_row_that_vanishes_ended() {
    let mut world = World::new();
    world.open("k1", "dsl-1", "192.0.2.1", 60);
    world.round().await;
    world.execute("DELETE FROM radacct");
    let told = world.round().await;
    assert!(told.len() == 1 && told[0].starts_with("down dsl-1 k1 "), "{told:?}");
}

#[tokio::test]
async fn what_was_not_kept_is_told_again() {
    let mut world = World::new();
    world.open("k1", "dsl-1", "192.0.2.1", 60);
    *world.recorder.fails.lock().expect("no panic") = true;
    let error = world.follower.round().await.expect_err("not kept").to_string();
    assert_eq!(error, "what was read could not be kept: the disk is full");
    *world.recorder.fails.lock().expect("no panic") = false;
    assert_eq!(world.round().await.len(), 2);
}

#[tokio::test]
async fn rows_of_which_no_line_can_be_made_are_counted() {
    let mut world = World::new();
    world.open("k1", "", "192.0.2.1", 60);
    world.open("k2", "dsl-2", "", 60);
    world.open("k3", "dsl-3", "nowhere", 60);
    world.open("k4", "dsl-4", "255.255.255.254", 60);
    assert_eq!(world.round().await, NOTHING);
    assert_eq!(world.status().unusable, 4);
}

#[tokio::test]
async fn more_than_a_page_is_read_whole() {
    let mut world = World::new();
    world.execute(&format!(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) \
         INSERT INTO radacct (acctuniqueid, username, acctstarttime, acctupdatetime, framedipaddress) \
         SELECT 'k' || i, 'dsl-' || i, {now}, {now}, '10.' || (i / 65536) || '.' || (i / 256 % 256) || '.' || (i % 256) \
         FROM n",
        count = 2 * PAGE + 7,
        now = world.now
    ));
    assert_eq!(world.round().await.len(), 2 * (2 * PAGE + 7));
    assert_eq!(world.round().await, NOTHING);
    world.execute(&format!("UPDATE radacct SET acctstoptime = {} WHERE radacctid % 2 = 0", world.now));
    assert_eq!(world.round().await.len(), PAGE + 3);
}

#[tokio::test]
async fn a_database_that_is_not_there_is_told() {
    let mut world = World::new();
    world.follower.config.url = Url::read("sqlite:///nowhere/radius.sqlite").expect("a URL");
    let error = world.follower.round().await.expect_err("nothing there").to_string();
    assert!(error.starts_with("cannot open /nowhere/radius.sqlite: "), "{error}");
    world.follower.config.url = Url::read("postgresql://qos:secret@127.0.0.1:1/radius").expect("a URL");
    let error = world.follower.round().await.expect_err("nobody there").to_string();
    assert!(error.starts_with("cannot connect: ") && !error.contains("secret"), "{error}");
}

#[test]
fn names_are_quoted_and_nothing_else_is_one() {
    for text in ["", "1st", "a b", "a\"", "a`", "a;", "ä", &"x".repeat(64)] {
        assert!(Identifier::read(text).is_err(), "{text}");
    }
    assert!(Identifier::read_path("a.b.c").is_err());
    let mut config = config(Path::new("/radius.sqlite"));
    config.table = Identifier::read_path("acct.radacct").expect("a table");
    config.columns.delegated_prefix = None;
    for (url, expected) in [
        (
            "sqlite:///radius.sqlite",
            "NULL, CAST(\"up\" AS TEXT), CAST(\"down\" AS TEXT) FROM \"acct\".\"radacct\"",
        ),
        (
            "postgresql://a@b/c",
            "NULL, CAST(\"up\" AS TEXT), CAST(\"down\" AS TEXT) FROM \"acct\".\"radacct\"",
        ),
        ("mariadb://a@b/c", "NULL, CAST(`up` AS CHAR), CAST(`down` AS CHAR) FROM `acct`.`radacct`"),
    ] {
        config.url = Url::read(url).expect("a URL");
        let statement = statement::opened(&config, 7, Timestamp::UNIX_EPOCH);
        assert!(statement.contains(expected), "{statement}");
    }
}

#[test]
fn urls_say_which_database_and_keep_the_password() {
    for (text, expected) in [
        ("radius.sqlite", "expected the URL of a database"),
        ("oracle://x", "expected the URL of a database"),
        ("sqlite:radius.sqlite", "expected an absolute path"),
    ] {
        let error = Url::read(text).expect_err(text);
        assert!(error.starts_with(expected), "{text}: {error}");
    }
    let url = Url::read("mysql://qos:hidden@localhost/radius").expect("a URL");
    assert!(!format!("{url:?}").contains("hidden"));
}
