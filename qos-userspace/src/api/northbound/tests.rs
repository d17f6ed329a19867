//! The API for providers over real TLS connections.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::super::auth::testing::{TestKey, claims, key_set};
use super::super::testing::TestDaemon;
use super::tls;

const PATIENCE: Duration = Duration::from_secs(10);

type Stream = StreamOwned<ClientConnection, TcpStream>;

/// A provider's program.
struct Program {
    address: SocketAddr,
    config: Arc<ClientConfig>,
    /// The token or API key that it shows.
    shows: Option<String>,
}

struct Answer {
    status: u16,
    head: String,
    body: Value,
    text: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().filter_map(|line| line.split_once(": "));
        fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    fn code(&self) -> (u16, &str) {
        (self.status, self.body["error"]["code"].as_str().unwrap_or_default())
    }
}

impl Program {
    /// One that trusts the daemon's own certificate.
    fn new(daemon: &TestDaemon, shows: Option<&str>) -> Self {
        let own = tls::own_files(&daemon.directory().join("state"));
        Self::trusting(daemon, &own.chain, shows)
    }

    fn trusting(daemon: &TestDaemon, certificate: &Path, shows: Option<&str>) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(certificate).expect("a certificate")).expect("a root");
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { address: daemon.providers[0], config: Arc::new(config), shows: shows.map(str::to_owned) }
    }

    fn connect(&self) -> std::io::Result<Stream> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let name = "localhost".try_into().expect("a name");
        let connection = ClientConnection::new(Arc::clone(&self.config), name).expect("a connection");
        let mut stream = StreamOwned::new(connection, stream);
        stream.conn.complete_io(&mut stream.sock)?;
        Ok(stream)
    }

    fn head(&self, method: &str, path: &str, length: usize) -> String {
        let shows = self.shows.as_ref().map(|shows| format!("authorization: Bearer {shows}\r\n"));
        let shows = shows.unwrap_or_default();
        format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{shows}content-length: {length}\r\n\r\n"
        )
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        let mut stream = self.connect().expect("connected");
        // The daemon may refuse and close before it has read everything.
        let _ = stream.write_all(self.head(method, path, body.len()).as_bytes());
        let _ = stream.write_all(body.as_bytes());
        let _ = stream.flush();
        answer(&mut stream)
    }

    fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "")
    }

    fn must(&self, method: &str, path: &str, body: &str) -> Value {
        let answer = self.ask(method, path, body);
        assert!((200..300).contains(&answer.status), "{method} {path}: {} {}", answer.status, answer.text);
        answer.body
    }
}

fn answer(stream: &mut Stream) -> Answer {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let all = String::from_utf8_lossy(&bytes).into_owned();
    let (head, text) = all.split_once("\r\n\r\n").unwrap_or((&all, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = serde_json::from_str(text).unwrap_or_default();
    Answer { status, head: head.to_owned(), body, text: text.to_owned() }
}

/// A daemon with two providers, each with an application, on the same lines; `more` stands in `[northbound]`.
fn town(more: &str) -> TestDaemon {
    let daemon = TestDaemon::start_with(&northbound(more));
    for (provider, network) in [("acme", "203.0.113.0/24"), ("bolt", "198.51.100.0/24")] {
        let body = json!({"name": provider, "kind": "application", "networks": [network]}).to_string();
        daemon.must("POST", "/v1/providers", &body);
        let body = json!({"name": format!("{provider}-app")}).to_string();
        daemon.must("POST", &format!("/v1/providers/{provider}/applications"), &body);
    }
    daemon.must("PUT", "/v1/segments/dslam-x", r#"{"capacity":{"down":"1gbit","up":"1gbit"}}"#);
    for (line, address) in [("line-one", "192.0.2.10/32"), ("line-two", "192.0.2.20/32")] {
        let rate = json!({"down": "20mbit", "up": "2mbit"});
        let body = json!({"name": line, "addresses": [address], "rate": rate, "segments": ["dslam-x"]});
        daemon.must("POST", "/v1/sessions", &body.to_string());
    }
    daemon
}

fn northbound(more: &str) -> String {
    let clients = more.find("[[").unwrap_or(more.len());
    let (more, clients) = more.split_at(clients);
    format!("[northbound]\nlisten = ['127.0.0.1:0']\n{more}\n{clients}")
}

fn key(daemon: &TestDaemon, more: &str) -> (String, String) {
    let made = daemon.must("POST", "/v1/keys", &format!("{{{more}}}"));
    let text = |name: &str| made["result"][name].as_str().expect("a text").to_owned();
    (text("id"), text("key"))
}

fn program(daemon: &TestDaemon, provider: &str) -> Program {
    Program::new(daemon, Some(&key(daemon, &format!(r#""provider":"{provider}""#)).1))
}

/// A grant for a port of a line of [`town`].
fn grant(network: &str, port: u16, line: &str, rate: &str) -> String {
    let selector = format!("down udp from {network}:{port} to {line}");
    json!({"selectors": [selector], "level": {"guaranteed": {"down": rate}}}).to_string()
}

const ACME: &str = "203.0.113.0/24";
const BOLT: &str = "198.51.100.0/24";
const ONE: &str = "192.0.2.10";
const TWO: &str = "192.0.2.20";

#[test]
fn a_key_is_shown_once_lets_its_provider_ask_and_does_not_when_it_is_removed() {
    let daemon = town("");
    let (id, secret) = key(&daemon, r#""provider":"acme""#);
    let acme = Program::new(&daemon, Some(&secret));
    let granted = acme.ask("POST", "/api/v1/allocations", &grant(ACME, 5_000, ONE, "5mbit"));
    assert_eq!(
        (granted.status, &granted.body["result"]["provider"]),
        (201, &json!("acme")),
        "{}",
        granted.text
    );
    assert_eq!(acme.must("GET", "/api/v1/allocations", "")["items"][0]["session"], "line-one");
    assert_eq!(
        acme.must("POST", "/api/v1/allocations?dry_run=true", &grant(ACME, 5_001, ONE, "1mbit"))["dry_run"],
        true
    );

    let record = &daemon.must("GET", "/v1/decisions?allocation=1", "")["items"][0];
    assert_eq!(record["actor"], format!("client key:{id} of acme"));
    for path in ["/v1/keys", &format!("/v1/keys/{id}"), "/v1/decisions"] {
        let shown = daemon.must("GET", path, "").to_string();
        assert!(
            shown.contains(&id) && !shown.contains(&secret) && !shown.contains("hash"),
            "{path}: {shown}"
        );
    }
    let (status, used) = daemon.ask("DELETE", "/v1/providers/bolt?dry_run=true", "");
    assert_eq!(status, 409, "{used}");

    daemon.must("DELETE", &format!("/v1/keys/{id}"), "");
    let refused = acme.get("/api/v1/allocations");
    assert_eq!(refused.code(), (401, "unauthenticated"), "{}", refused.text);
    assert_eq!(refused.header("www-authenticate"), Some("Bearer realm=\"qos\", error=\"invalid_token\""));
    let tried = daemon.must("POST", "/v1/keys?dry_run=true", r#"{"provider":"acme"}"#);
    assert_eq!((&tried["dry_run"], &tried["result"]["key"]), (&json!(true), &Value::Null));
    assert_eq!(daemon.must("GET", "/v1/keys", "")["items"], json!([]));
}

#[test]
fn keys_outlive_a_restart_and_end_when_they_should() {
    let daemon = town("");
    let (_, secret) = key(&daemon, r#""provider":"acme","application":"acme-app","read_only":true"#);
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(3);
    let (_, short) = key(&daemon, &format!(r#""provider":"acme","expires_at":"{soon}""#));
    assert_eq!(Program::new(&daemon, Some(&short)).get("/api/v1/applications").status, 200);
    thread::sleep(Duration::from_millis(3_100));
    assert_eq!(Program::new(&daemon, Some(&short)).get("/api/v1/applications").status, 401);

    let certificate = fs::read(tls::own_files(&daemon.directory().join("state")).chain).expect("made");
    let daemon = daemon.restart();
    assert_eq!(fs::read(tls::own_files(&daemon.directory().join("state")).chain).expect("kept"), certificate);
    let program = Program::new(&daemon, Some(&secret));
    assert_eq!(program.must("GET", "/api/v1/applications", "")["items"][0]["name"], "acme-app");
    let refused = program.ask("POST", "/api/v1/allocations", &grant(ACME, 5_000, ONE, "1mbit"));
    assert_eq!(refused.code(), (403, "insufficient_scope"), "{}", refused.text);
    let (status, refused) = daemon.ask("DELETE", "/v1/providers/acme/applications/acme-app", "");
    assert!(
        status == 409 && refused["error"]["message"].as_str().expect("a text").contains("API key"),
        "{refused}"
    );
}

#[test]
fn tokens_let_clients_do_what_their_scopes_say_and_keys_rotate_by_a_reload() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let jwks = directory.path().join("jwks.json");
    let keys = [TestKey::rsa("1"), TestKey::ec("2"), TestKey::ed("3")];
    fs::write(&jwks, key_set(&[&keys[0], &keys[1], &keys[2]])).expect("written");
    let with = |clients: &str| {
        format!(
            "jwks = '{}'\naudience = 'qos'\nissuer = 'https://auth.example.net'\n{clients}",
            jwks.display()
        )
    };
    let shop = "[[northbound.client]]\nid = 'shop'\nprovider = 'acme'\n";
    let daemon = town(&with(shop));
    for key in &keys {
        let token = key.token(&claims("shop", "qos:read"));
        let listed = Program::new(&daemon, Some(&token)).get("/api/v1/providers");
        assert_eq!(
            (listed.status, &listed.body["items"][0]["name"]),
            (200, &json!("acme")),
            "{}",
            listed.text
        );
    }
    let reader = Program::new(&daemon, Some(&keys[1].token(&claims("shop", "openid qos:read"))));
    let refused = reader.ask("POST", "/api/v1/allocations", &grant(ACME, 5_000, ONE, "1mbit"));
    assert_eq!(refused.code(), (403, "insufficient_scope"));
    let challenge = refused.header("www-authenticate").expect("a challenge");
    assert!(challenge.contains("error=\"insufficient_scope\", scope=\"qos:write\""), "{challenge}");
    let writer = Program::new(&daemon, Some(&keys[1].token(&claims("shop", "qos:write"))));
    writer.must("POST", "/api/v1/allocations", &grant(ACME, 5_000, ONE, "1mbit"));
    assert_eq!(writer.get("/api/v1/allocations").code(), (403, "insufficient_scope"));
    let record = &daemon.must("GET", "/v1/decisions?allocation=1", "")["items"][0];
    assert_eq!(record["actor"], "client shop of acme");

    let other = Program::new(&daemon, Some(&keys[2].token(&claims("bolt-shop", "qos:read"))));
    assert_eq!(other.get("/api/v1/providers").code(), (403, "unknown_client"));
    let new = TestKey::ed("4");
    let rotated = Program::new(&daemon, Some(&new.token(&claims("bolt-shop", "qos:read"))));
    assert_eq!(rotated.get("/api/v1/providers").code(), (401, "unauthenticated"));
    fs::write(&jwks, key_set(&[&new])).expect("written");
    let both = format!("{shop}[[northbound.client]]\nid = 'bolt-shop'\nprovider = 'bolt'\n");
    let (status, changed) = daemon.reload(&northbound(&with(&both)));
    assert_eq!((status, &changed["items"]), (200, &json!(["northbound client"])), "{changed}");
    assert_eq!(rotated.must("GET", "/api/v1/providers", "")["items"][0]["name"], "bolt");
    assert_eq!(reader.get("/api/v1/providers").code(), (401, "unauthenticated"), "its key is gone");

    fs::write(&jwks, "{}").expect("written");
    let (status, refused) = daemon.reload(&northbound(&with(shop)));
    assert_eq!((status, &refused["error"]["code"]), (400, &json!("configuration")), "{refused}");
    assert_eq!(rotated.get("/api/v1/providers").status, 200, "all stays as it was");
}

#[test]
fn what_is_anothers_is_not_there() {
    let daemon = town("");
    let (acme, bolt) = (program(&daemon, "acme"), program(&daemon, "bolt"));
    acme.must("POST", "/api/v1/allocations", &grant(ACME, 5_000, ONE, "5mbit"));
    let never = bolt.get("/api/v1/allocations/99");
    assert_eq!(never.code(), (404, "not_found"));
    for (method, path, body) in [
        ("GET", "/api/v1/allocations/1", ""),
        ("DELETE", "/api/v1/allocations/1", ""),
        ("DELETE", "/api/v1/allocations/1?dry_run=true", ""),
        ("POST", "/api/v1/allocations/1/extend", r#"{"by":"1h"}"#),
        ("GET", "/api/v1/providers/acme", ""),
        ("GET", "/api/v1/providers/acme/applications", ""),
        ("GET", "/api/v1/providers/acme/applications/acme-app", ""),
        ("GET", "/api/v1/sessions/line-one", ""),
        ("GET", "/api/v1/allocations?provider=acme", ""),
        ("GET", "/api/v1/decisions?provider=acme", ""),
    ] {
        let refused = bolt.ask(method, path, body);
        assert_eq!(refused.code(), (404, "not_found"), "{method} {path}: {}", refused.text);
        // As for what never was.
        let path = path.replace("/1", "/99").replace("acme", "none").replace("line-one", "line-none");
        let as_never = bolt.ask(method, &path, body).text;
        let as_never =
            as_never.replace("99", "1").replace("none-app", "acme-app").replace("line-none", "line-one");
        assert_eq!(refused.text, as_never.replace("none", "acme"), "{method} {path}");
    }
    let mut asked: Value = serde_json::from_str(&grant(ACME, 5_001, ONE, "1mbit")).expect("JSON");
    asked["provider"] = json!("acme");
    assert_eq!(bolt.ask("POST", "/api/v1/allocations", &asked.to_string()).code(), (404, "not_found"));
    let mut asked: Value = serde_json::from_str(&grant(BOLT, 5_001, ONE, "1mbit")).expect("JSON");
    asked["application"] = json!("acme-app");
    assert_eq!(bolt.ask("POST", "/api/v1/allocations", &asked.to_string()).code(), (404, "not_found"));
    let claimed = bolt.ask("POST", "/api/v1/allocations", &grant(ACME, 5_001, ONE, "1mbit"));
    assert_eq!(claimed.code(), (403, "forbidden"));

    for (method, path) in [
        ("POST", "/api/v1/providers"),
        ("PUT", "/api/v1/profiles/x"),
        ("DELETE", "/api/v1/sessions/line-one"),
        ("PUT", "/api/v1/providers/bolt/contract"),
        ("GET", "/api/v1/status"),
        ("POST", "/api/v1/detach"),
        ("GET", "/v1/allocations"),
        ("GET", "/v1/keys"),
    ] {
        let status = bolt.ask(method, path, "{}").status;
        assert!(matches!(status, 404 | 405), "{method} {path}: {status}");
    }
    acme.must("DELETE", "/api/v1/allocations/1", "");
    assert_eq!(acme.must("GET", "/api/v1/allocations?ended=5", "")["items"][0]["reason"], "revoked");
    assert_eq!(bolt.must("GET", "/api/v1/allocations?ended=5", "")["items"], json!([]));
}

#[test]
fn a_client_of_one_application_has_only_that() {
    let daemon = town("");
    daemon.must("POST", "/v1/providers/acme/applications", r#"{"name":"acme-two"}"#);
    let whole = program(&daemon, "acme");
    let part = Program::new(&daemon, Some(&key(&daemon, r#""provider":"acme","application":"acme-app""#).1));
    whole.must("POST", "/api/v1/allocations", &grant(ACME, 5_000, ONE, "1mbit"));
    let granted = part.must("POST", "/api/v1/allocations", &grant(ACME, 5_001, ONE, "1mbit"));
    assert_eq!(granted["result"]["application"], "acme-app", "it need not be named");
    assert_eq!(part.must("GET", "/api/v1/allocations", "")["items"].as_array().map(Vec::len), Some(1));
    assert_eq!(whole.must("GET", "/api/v1/allocations", "")["items"].as_array().map(Vec::len), Some(2));
    assert_eq!(part.ask("DELETE", "/api/v1/allocations/1", "").code(), (404, "not_found"));
    let applications = part.must("GET", "/api/v1/applications", "");
    assert_eq!(applications["items"].as_array().map(Vec::len), Some(1), "{applications}");
    assert_eq!(part.get("/api/v1/providers/acme/applications/acme-two").status, 404);
    assert_eq!(part.get("/api/v1/decisions?application=acme-two").status, 404);
    let decisions = part.must("GET", "/api/v1/decisions", "");
    let of = |record: &Value| record["application"] == "acme-app";
    assert!(decisions["items"].as_array().expect("items").iter().all(of), "{decisions}");
    assert_eq!(part.must("GET", "/api/v1/statistics", "")["providers"], json!({}));
}

/// Everything that a provider can read.
const SHOWN: [&str; 15] = [
    "/api/v1/providers",
    "/api/v1/providers/acme",
    "/api/v1/providers/bolt",
    "/api/v1/providers/acme/applications",
    "/api/v1/providers/bolt/applications",
    "/api/v1/applications",
    "/api/v1/profiles",
    "/api/v1/sessions",
    "/api/v1/sessions/line-one",
    "/api/v1/sessions/line-two",
    "/api/v1/allocations",
    "/api/v1/allocations?ended=1000",
    "/api/v1/decisions?limit=1000",
    "/api/v1/decisions?session=line-one",
    "/api/v1/statistics",
];

#[test]
fn nothing_of_one_provider_is_in_any_answer_to_another() {
    let daemon = TestDaemon::start_with(&format!("preempt = 'lower-priority'\n{}", northbound("")));
    for (provider, network) in [("acme", ACME), ("bolt", BOLT)] {
        let contract = json!({"profiles": Value::Null});
        let body =
            json!({"name": provider, "kind": "application", "networks": [network], "contract": contract})
                .to_string();
        daemon.must("POST", "/v1/providers", &body);
        let body = json!({"name": format!("{provider}-app")}).to_string();
        daemon.must("POST", &format!("/v1/providers/{provider}/applications"), &body);
    }
    daemon.must("PUT", "/v1/segments/dslam-x", r#"{"capacity":{"down":"25mbit","up":"1gbit"}}"#);
    for (line, address) in [("line-one", ONE), ("line-two", TWO), ("line-three", "192.0.2.30")] {
        let rate = json!({"down": "20mbit", "up": "2mbit"});
        let body = json!({
            "name": line, "addresses": [format!("{address}/32")], "rate": rate, "segments": ["dslam-x"], "loss_ppm": 100,
        });
        daemon.must("POST", "/v1/sessions", &body.to_string());
    }
    let (acme, bolt) = (program(&daemon, "acme"), program(&daemon, "bolt"));
    let ask = |program: &Program, body: Value| program.ask("POST", "/api/v1/allocations", &body.to_string());
    let of = |selector: String, level: Value| json!({"selectors": [selector], "level": level});
    let body = |network: &str, port: u16, line: &str, level: Value| {
        of(format!("down udp from {network}:{port} to {line}"), level)
    };
    let rate = |rate: &str, priority: u8| json!({"guaranteed": {"down": rate}, "priority": priority});
    // On the line of both; on one's own; ended; with a delay budget that the other would break.
    assert_eq!(ask(&acme, body(ACME, 5_000, ONE, rate("5mbit", 3))).status, 201);
    assert_eq!(ask(&acme, body(ACME, 5_001, "192.0.2.30", rate("1mbit", 3))).status, 201);
    assert_eq!(ask(&acme, body(ACME, 5_002, ONE, rate("1mbit", 3))).status, 201);
    acme.must("DELETE", "/api/v1/allocations/3", "");
    let tight =
        json!({"guaranteed": {"down": "1mbit"}, "priority": 1, "delay_us": 14_000, "burst": {"down": 3_000}});
    assert_eq!(ask(&acme, body(ACME, 5_003, TWO, tight)).status, 201);

    let wide = |prefix: &str| of(format!("down udp from {prefix} to {ONE}"), rate("1mbit", 4));
    let mut answers = vec![
        ask(&bolt, wide(BOLT)),
        ask(&bolt, body(BOLT, 6_000, ONE, rate("50mbit", 5))),
        ask(&bolt, body(BOLT, 6_000, TWO, rate("19mbit", 5))),
        ask(&bolt, body(BOLT, 6_000, TWO, rate("18500kbit", 5))),
        ask(
            &bolt,
            body(
                BOLT,
                6_000,
                TWO,
                json!({"guaranteed": {"down": "1mbit"}, "priority": 1, "burst": {"down": 900_000}}),
            ),
        ),
        ask(&bolt, body(BOLT, 6_000, TWO, json!({"guaranteed": {"down": "1mbit"}, "loss": 0.00001}))),
        ask(&bolt, body(BOLT, 6_000, TWO, json!({"guaranteed": {"down": "1mbit"}, "delay_us": 10}))),
        ask(&bolt, body(BOLT, 6_000, "192.0.2.99", rate("1mbit", 5))),
        ask(
            &bolt,
            json!({
                "selectors": ([ONE, TWO].map(|line| format!("down udp from {BOLT}:1 to {line}"))),
                "level": rate("1mbit", 5),
            }),
        ),
        ask(
            &bolt,
            body(BOLT, 6_001, ONE, json!({"guaranteed": {"down": "1mbit"}, "maximum": {"down": "90mbit"}})),
        ),
        bolt.ask("DELETE", "/api/v1/allocations/1", ""),
        bolt.ask("POST", "/api/v1/allocations/4/extend", r#"{"by":"1h"}"#),
    ];
    // A network that both may claim: selectors to the letter, and over and under each other.
    daemon.must(
        "POST",
        "/v1/providers",
        &json!({"name": "both", "kind": "network", "networks": ["192.0.2.0/24"]}).to_string(),
    );
    let both = program(&daemon, "both");
    for selector in [
        format!("down udp from {ACME}:5000 to {ONE}"),
        format!("down udp to {ONE}"),
        format!("down udp from 203.0.113.7:5000 to {ONE}"),
    ] {
        answers.push(ask(&both, json!({"selectors": [selector], "level": rate("1mbit", 5)})));
    }
    let told: Vec<&str> = answers.iter().map(|answer| answer.text.as_str()).collect();
    assert!(told.iter().any(|text| text.contains("another allocation")), "{told:#?}");
    assert!(told.iter().any(|text| text.contains("the line downstream: asked")), "{told:#?}");
    assert!(told.iter().any(|text| text.contains("a shared segment downstream: asked")), "{told:#?}");
    assert!(told.iter().any(|text| text.contains("budget of another allocation")), "{told:#?}");

    // What is better preempts: bolt's goes for acme's.
    assert_eq!(ask(&bolt, body(BOLT, 6_002, ONE, rate("3mbit", 7))).status, 201);
    let preempting = ask(&acme, body(ACME, 5_004, ONE, rate("10500kbit", 0)));
    assert_eq!(preempting.status, 201, "{}", preempting.text);
    assert!(preempting.text.contains("another provider"), "{}", preempting.text);
    daemon.must("POST", "/v1/sessions/line-two/stop", "");
    let down = ask(&bolt, body(BOLT, 6_000, TWO, rate("1mbit", 5)));
    assert_eq!(down.code(), (409, "session_down"));
    answers.push(down);
    for answer in &answers {
        assert!(!answer.text.contains("line-two"), "{}", answer.text);
    }

    answers.extend(SHOWN.iter().map(|path| bolt.get(path)));
    answers.extend(SHOWN.iter().map(|path| both.get(path)));
    for answer in &answers {
        let text = &answer.text;
        // What bolt and both asked for themselves may be in the answer.
        let own = ["/api/v1/providers/acme", "`acme`", "\"value\":\"acme\"", ACME];
        let rest = own.iter().fold(text.clone(), |text, own| text.replace(own, ""));
        for word in ["acme", "203.0.113.0", "dslam", "uid", "line-three"] {
            assert!(!rest.contains(word), "{word} in {text}");
        }
    }
    let ended = bolt.get("/api/v1/allocations?ended=1000").text;
    assert!(ended.contains("preempted by another allocation of another provider"), "{ended}");
    for record in bolt.must("GET", "/api/v1/decisions?limit=1000", "")["items"].as_array().expect("items") {
        let actor = record["actor"].as_str().expect("a text");
        assert!(actor == "operator" || actor.ends_with(" of bolt"), "{record}");
        assert_eq!(record["provider"], "bolt");
    }
    let statistics = bolt.must("GET", "/api/v1/statistics", "");
    assert_eq!(statistics["providers"].as_object().map(serde_json::Map::len), Some(1), "{statistics}");
}

#[test]
fn who_asks_too_often_waits() {
    let daemon = town("rate = 1\nburst = 3");
    let (acme, bolt) = (program(&daemon, "acme"), program(&daemon, "bolt"));
    // On a busy machine one or the other comes back meanwhile.
    let answers: Vec<_> = (0..30).map(|_| acme.get("/api/v1/providers")).collect();
    assert!(answers[..3].iter().all(|answer| answer.status == 200));
    let refused = answers.last().expect("30");
    assert_eq!(refused.code(), (429, "too_many_requests"));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(bolt.get("/api/v1/providers").status, 200, "others do not");
    thread::sleep(Duration::from_millis(1_100));
    assert_eq!(acme.get("/api/v1/providers").status, 200);
}

#[test]
fn an_address_that_keeps_failing_to_show_who_it_is_waits() {
    let daemon = town("");
    let wrong = format!("qos_0123456789ab_{}", "0".repeat(64));
    let stranger = Program::new(&daemon, Some(&wrong));
    let answers: Vec<_> = (0..30).map(|_| stranger.get("/api/v1/providers")).collect();
    assert!(answers[..10].iter().all(|answer| answer.status == 401));
    let refused = answers.iter().find(|answer| answer.status == 429).expect("refused at last");
    assert_eq!(refused.code(), (429, "too_many_requests"));
    let wait: u64 = refused.header("retry-after").expect("a time").parse().expect("seconds");
    assert!((1..=5).contains(&wait), "{wait}");
}

#[test]
fn who_shows_nothing_learns_nothing() {
    let daemon = town("");
    let nobody = Program::new(&daemon, None);
    for path in ["/api/v1/providers", "/api/v1/nothing", "/", "/v1/status"] {
        let refused = nobody.get(path);
        assert_eq!(refused.code(), (401, "unauthenticated"), "{path}");
        assert_eq!(refused.header("www-authenticate"), Some("Bearer realm=\"qos\""));
    }
}

/// Whether the daemon ends the connection within the patience, having answered or not.
fn is_cut(mut stream: impl std::io::Read) -> (Duration, String) {
    let start = Instant::now();
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("not cut within {PATIENCE:?}"),
        _ => (start.elapsed(), String::from_utf8_lossy(&bytes).into_owned()),
    }
}

#[test]
fn slow_clients_are_cut_and_others_are_served_meanwhile() {
    let daemon = town("header_timeout = '2s'\nbody_timeout = '2s'");
    let acme = program(&daemon, "acme");
    let silent = TcpStream::connect(acme.address).expect("connected");
    silent.set_read_timeout(Some(PATIENCE)).expect("set");
    let idle = acme.connect().expect("connected");
    let mut slow = acme.connect().expect("connected");
    slow.write_all(b"GET /api/v1/providers HTTP/1.1\r\nhost: loc").expect("written");
    let mut dripping = acme.connect().expect("connected");
    dripping.write_all(acme.head("POST", "/api/v1/allocations", 100).as_bytes()).expect("written");
    dripping.write_all(b"{").expect("written");
    assert_eq!(acme.get("/api/v1/providers").status, 200);

    let _ = is_cut(&silent);
    let _ = is_cut(idle);
    let _ = is_cut(slow);
    let (_, told) = is_cut(dripping);
    assert!(told.starts_with("HTTP/1.1 408") && told.contains(r#""code":"timeout""#), "{told}");
}

#[test]
fn there_are_no_more_connections_than_may_be() {
    let daemon = town("max_connections_per_address = 3\nheader_timeout = '2s'");
    let acme = program(&daemon, "acme");
    let held: Vec<_> = (0..3).map(|_| acme.connect().expect("connected")).collect();
    assert!(acme.connect().is_err(), "a fourth");
    drop(held);
    let start = Instant::now();
    while acme.connect().is_err() {
        assert!(start.elapsed() < PATIENCE, "none comes free");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn large_bodies_and_headers_are_refused() {
    let daemon = town("max_body = 2048");
    let acme = program(&daemon, "acme");
    let announced = acme.ask("POST", "/api/v1/allocations", &" ".repeat(3_000));
    assert_eq!(announced.code(), (413, "too_large"));
    let mut stream = acme.connect().expect("connected");
    let head = acme
        .head("POST", "/api/v1/allocations", 0)
        .replace("content-length: 0", "transfer-encoding: chunked");
    stream.write_all(head.as_bytes()).expect("written");
    for _ in 0..3 {
        let _ = stream.write_all(format!("400\r\n{}\r\n", " ".repeat(1_024)).as_bytes());
    }
    let _ = stream.flush();
    assert_eq!(answer(&mut stream).code(), (413, "too_large"), "one that does not say so before");

    let mut stream = acme.connect().expect("connected");
    let _ = stream.write_all(format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(40_000)).as_bytes());
    assert_eq!(answer(&mut stream).status, 431);
    assert_eq!(acme.ask("POST", "/api/v1/allocations", "{").code(), (400, "malformed"));
}

#[test]
fn another_certificate_is_shown_after_a_reload() {
    let daemon = town("");
    let acme = program(&daemon, "acme");
    assert_eq!(acme.get("/api/v1/providers").status, 200);
    let own = tls::own_files(&daemon.directory().join("state"));
    let mode = |path: &Path| {
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).expect("there").permissions())
    };
    assert_eq!(mode(&own.key) & 0o777, 0o600);

    let key = rcgen::KeyPair::generate().expect("a key");
    let other = rcgen::CertificateParams::new(["localhost".to_owned()]).expect("a name");
    let other = other.self_signed(&key).expect("a certificate");
    let path = |name: &str| daemon.directory().join(name);
    fs::write(path("chain.pem"), other.pem()).expect("written");
    fs::write(path("key.pem"), key.serialize_pem()).expect("written");
    let more =
        format!("certificate = '{}'\nkey = '{}'", path("chain.pem").display(), path("key.pem").display());
    let (status, changed) = daemon.reload(&northbound(&more));
    assert_eq!((status, &changed["items"]), (200, &json!(["northbound certificate"])), "{changed}");
    assert!(acme.connect().is_err(), "it trusts the first");
    let again = Program::trusting(&daemon, &path("chain.pem"), acme.shows.as_deref());
    assert_eq!(again.get("/api/v1/providers").status, 200);

    fs::write(path("key.pem"), rcgen::KeyPair::generate().expect("a key").serialize_pem()).expect("written");
    let (status, refused) = daemon.reload(&northbound(&more));
    assert_eq!((status, &refused["error"]["code"]), (400, &json!("configuration")), "{refused}");
    assert_eq!(again.get("/api/v1/providers").status, 200, "all stays as it was");
    let (status, refused) = daemon.reload("");
    assert_eq!((status, &refused["error"]["code"]), (400, &json!("configuration")), "{refused}");
}

#[test]
fn what_goes_wrong_inside_is_told_to_the_operator_alone() {
    let daemon = town("");
    let acme = program(&daemon, "acme");
    daemon.recorder.record().refuse = 1;
    let failed = acme.ask("POST", "/api/v1/allocations", &grant(ACME, 5_000, ONE, "1mbit"));
    assert_eq!(failed.code(), (500, "kernel"));
    assert!(!failed.text.contains("lan0") && failed.text.contains("at our end"), "{}", failed.text);
    let record = &daemon.must("GET", "/v1/decisions?verdict=failed", "")["items"][0];
    assert!(record["reason"].as_str().expect("a text").contains("lan0"), "{record}");
}
