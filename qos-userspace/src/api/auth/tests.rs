//! Tokens of all kinds against keys that come and go.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};
use serde_json::{Value, json};
use tokio_rustls::rustls::{ServerConnection, StreamOwned};

use super::testing::{TestKey, base64url, claims, key_set, unsigned};
use super::token::TokenError;
use super::*;
use crate::config::northbound::{JwksSource, Tokens};

fn tokens(jwks: JwksSource, ca: Option<PathBuf>) -> Tokens {
    Tokens {
        jwks,
        ca,
        refresh: Duration::from_secs(900),
        issuer: Some("https://auth.example.net".to_owned()),
        audience: "qos".to_owned(),
        leeway: Duration::from_secs(30),
    }
}

fn rules() -> Rules {
    Rules {
        issuer: Some("https://auth.example.net".to_owned()),
        audience: "qos".to_owned(),
        leeway: Duration::from_secs(30),
    }
}

fn set(keys: &[&TestKey]) -> KeySet {
    KeySet::parse(key_set(keys).as_bytes()).expect("a set")
}

fn with(mut claims: Value, name: &str, value: Value) -> Value {
    claims[name] = value;
    claims
}

#[test]
fn tokens_of_all_three_algorithms_are_taken_and_no_other_key_s() {
    let keys = [TestKey::rsa("1"), TestKey::ec("2"), TestKey::ed("3")];
    let set = set(&[&keys[0], &keys[1], &keys[2]]);
    for key in &keys {
        let claims = claims("shop", "qos:read qos:write");
        let found =
            set.verify(&key.token(&claims), &rules()).unwrap_or_else(|e| panic!("{}: {e}", key.algorithm()));
        assert_eq!(found.client(), Some("shop"));
        assert_eq!(found.scopes().into_iter().collect::<Vec<_>>(), ["qos:read", "qos:write"]);
        // Of its algorithm there is one key, so that none has to be named.
        let nameless = key.sign(&json!({"alg": key.algorithm()}), &claims);
        assert!(set.verify(&nameless, &rules()).is_ok(), "{}", key.algorithm());
    }
    for stranger in [TestKey::ec("2"), TestKey::ed("3")] {
        let token = stranger.token(&claims("shop", "qos:read"));
        assert_eq!(set.verify(&token, &rules()), Err(TokenError::Signature), "{}", stranger.algorithm());
    }
    let mut forged = keys[0].token(&claims("shop", "qos:read"));
    let first = if forged.pop() == Some('A') { 'Q' } else { 'A' };
    forged.push(first);
    assert!(set.verify(&forged, &rules()).is_err(), "a signature with another last digit");
}

#[test]
fn a_token_that_is_for_another_time_or_place_is_refused() {
    let key = TestKey::ed("1");
    let set = set(&[&key]);
    let good = claims("shop", "qos:read");
    let now = Timestamp::now().as_second();
    for (name, claims, expected) in [
        ("expired", with(good.clone(), "exp", json!(now - 60)), TokenError::Expired),
        ("without an end", with(good.clone(), "exp", Value::Null), TokenError::Claim("exp".to_owned())),
        (
            "an end that is no time",
            with(good.clone(), "exp", json!("never")),
            TokenError::Claim("exp".to_owned()),
        ),
        ("early", with(good.clone(), "nbf", json!(now + 60)), TokenError::Early),
        (
            "a start that is no time",
            with(good.clone(), "nbf", json!("now")),
            TokenError::Claim("nbf".to_owned()),
        ),
        ("another audience", with(good.clone(), "aud", json!("billing")), TokenError::Audience),
        ("no audience", with(good.clone(), "aud", Value::Null), TokenError::Claim("aud".to_owned())),
        ("another issuer", with(good.clone(), "iss", json!("https://evil.example")), TokenError::Issuer),
        ("no issuer", with(good.clone(), "iss", Value::Null), TokenError::Claim("iss".to_owned())),
    ] {
        assert_eq!(set.verify(&key.token(&claims), &rules()), Err(expected), "{name}");
    }
    for (name, claims) in [
        ("within the leeway", with(good.clone(), "exp", json!(now - 10))),
        ("one of several audiences", with(good.clone(), "aud", json!(["billing", "qos"]))),
        ("scopes as a list", with(good, "scp", json!(["qos:write"]))),
    ] {
        assert!(set.verify(&key.token(&claims), &rules()).is_ok(), "{name}");
    }
}

#[test]
fn no_token_chooses_its_algorithm() {
    let keys = [TestKey::rsa("rsa"), TestKey::ec("ec"), TestKey::ed("ed")];
    let set = set(&[&keys[0], &keys[1], &keys[2]]);
    let good = claims("shop", "qos:write");
    let hmac = |header: &Value, secret: &[u8]| {
        let message = unsigned(header, &good);
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret);
        format!("{message}.{}", base64url(ring::hmac::sign(&key, message.as_bytes()).as_ref()))
    };
    let public = keys[0].jwk()["n"].as_str().expect("a modulus").to_owned();
    for (name, token) in [
        ("none", format!("{}.", unsigned(&json!({"alg": "none"}), &good))),
        ("none, with a key", format!("{}.", unsigned(&json!({"alg": "none", "kid": "rsa"}), &good))),
        ("an HMAC with the public key", hmac(&json!({"alg": "HS256", "kid": "rsa"}), public.as_bytes())),
        ("an HMAC without a name", hmac(&json!({"alg": "HS256"}), public.as_bytes())),
        ("another key's algorithm", keys[1].sign(&json!({"alg": "ES256", "kid": "ed"}), &good)),
        ("another hash", keys[0].sign(&json!({"alg": "RS512", "kid": "rsa"}), &good)),
        ("its own key", keys[1].sign(&json!({"alg": "ES256", "kid": "new", "jwk": keys[1].jwk()}), &good)),
        (
            "something that must be understood",
            keys[2].sign(&json!({"alg": "EdDSA", "kid": "ed", "crit": ["b64"], "b64": true}), &good),
        ),
        ("no access token", keys[2].sign(&json!({"alg": "EdDSA", "kid": "ed", "typ": "dpop+jwt"}), &good)),
        ("no JWT", "a.b.c".to_owned()),
        ("too long", "a".repeat(9_000)),
    ] {
        assert!(set.verify(&token, &rules()).is_err(), "{name}");
    }
}

#[test]
fn only_keys_for_signatures_are_in_a_set() {
    let key = TestKey::ed("1");
    let entry = |name: &str, value: Value| with(key.jwk(), name, value);
    for (name, entry) in [
        ("for encryption", entry("use", json!("enc"))),
        ("to sign with", entry("key_ops", json!(["sign"]))),
        ("for another algorithm", entry("alg", json!("ES256"))),
        ("a secret", json!({"kty": "oct", "kid": "1", "k": "c2VjcmV0"})),
        ("too short", json!({"kty": "RSA", "kid": "1", "n": base64url(&[0xff; 128]), "e": "AQAB"})),
        ("a point of no curve", json!({"kty": "EC", "kid": "1", "crv": "P-256", "x": "AA", "y": "AA"})),
        ("nothing", json!({})),
    ] {
        let text = json!({"keys": [entry]}).to_string();
        assert!(KeySet::parse(text.as_bytes()).is_err(), "{name}");
        let text = json!({"keys": [entry, TestKey::ec("2").jwk()]}).to_string();
        assert_eq!(KeySet::parse(text.as_bytes()).expect("the other is good").len(), 1, "{name}");
    }
    assert!(KeySet::parse(b"[]").is_err() && KeySet::parse(b"").is_err());
}

#[tokio::test]
async fn a_key_that_is_new_is_looked_for_now_and_then_and_old_ones_outlive_a_failure() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("jwks.json");
    let (old, new) = (TestKey::ed("old"), TestKey::ec("new"));
    std::fs::write(&path, key_set(&[&old])).expect("written");
    let tokens = tokens(JwksSource::File(path.clone()), None);
    let jwks = Jwks::open(&tokens, None).expect("read").with_pause(Duration::from_millis(300));
    let taken = |key: &TestKey| jwks.keys().verify(&key.token(&claims("shop", "")), &rules()).is_ok();
    assert!(taken(&old) && !taken(&new));

    std::fs::write(&path, key_set(&[&old, &new])).expect("written");
    jwks.refresh_for_unknown().await;
    assert!(!taken(&new), "not so soon after the last time");
    tokio::time::sleep(Duration::from_millis(350)).await;
    jwks.refresh_for_unknown().await;
    assert!(taken(&old) && taken(&new));

    std::fs::remove_file(&path).expect("removed");
    tokio::time::sleep(Duration::from_millis(350)).await;
    jwks.refresh_for_unknown().await;
    assert!(taken(&old) && taken(&new), "what is known stays");
    assert!(Jwks::open(&tokens, None).is_err(), "but none is begun with");
}

/// An https server that answers whatever is asked with `body`, and the file with its authority. It lives as long as
/// the process.
fn server(directory: &Path, body: String) -> (u16, PathBuf) {
    let key = rcgen::KeyPair::generate().expect("a key");
    let certificate = rcgen::CertificateParams::new(["localhost".to_owned()]).expect("a name");
    let certificate = certificate.self_signed(&key).expect("a certificate");
    let files = crate::config::northbound::Certificate {
        chain: directory.join("server.pem"),
        key: directory.join("server-key.pem"),
    };
    std::fs::write(&files.chain, certificate.pem()).expect("written");
    std::fs::write(&files.key, key.serialize_pem()).expect("written");
    let tls = crate::api::northbound::tls::read(&files).expect("usable").config;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        loop {
            let (stream, _) = listener.accept().expect("a connection");
            let connection = ServerConnection::new(Arc::clone(&tls)).expect("a connection");
            let mut stream = StreamOwned::new(connection, stream);
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            // Who does not trust it goes away at once.
            let _ = stream.read(&mut [0; 4_096]);
            let _ = stream.write_all(format!("{head}{body}").as_bytes());
            let _ = stream.flush();
        }
    });
    (port, files.chain)
}

#[tokio::test]
async fn keys_come_from_a_url_whose_certificate_is_trusted() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let key = TestKey::ed("1");
    let (port, ca) = server(directory.path(), key_set(&[&key]));
    let url = JwksSource::Url(format!("https://localhost:{port}/jwks.json").parse().expect("a URL"));
    let config = |ca: Option<PathBuf>| Northbound {
        tokens: Some(tokens(url.clone(), ca)),
        clients: vec![ClientConfig {
            id: "shop".to_owned(),
            provider: "acme".parse().expect("a name"),
            application: None,
        }],
        ..crate::api::testing::config(directory.path(), "[northbound]\nlisten = ['127.0.0.1:0']")
            .northbound
            .expect("there")
    };
    let shown = |token: &str| {
        let value = HeaderValue::from_str(&format!("Bearer {token}")).expect("a header");
        HeaderMap::from_iter([(header::AUTHORIZATION, value)])
    };
    let trusting = Authenticator::new(&config(Some(ca)), &Arc::default(), None).expect("ready");
    let client = trusting.authenticate(&shown(&key.token(&claims("shop", "qos:read")))).await.expect("known");
    assert_eq!((client.provider.as_str(), client.id.as_str()), ("acme", "shop"));
    assert!(client.may("qos:read", false) && !client.may("qos:write", true));
    let stranger = trusting.authenticate(&shown(&key.token(&claims("other", "qos:read")))).await;
    assert_eq!(stranger, Err(AuthError::Client));

    // Another configuration of the same URL goes on with its keys.
    let again = Authenticator::new(
        &config(Some(directory.path().join("server.pem"))),
        &Arc::default(),
        Some(&trusting),
    );
    assert_eq!(again.expect("ready").jwks().expect("tokens").keys().len(), 1);

    let wary = Authenticator::new(&config(None), &Arc::default(), None).expect("ready");
    let refused = wary.authenticate(&shown(&key.token(&claims("shop", "qos:read")))).await;
    assert_eq!(refused, Err(AuthError::NoKeys), "a server that nobody vouches for");
}

#[tokio::test]
async fn what_is_shown_is_one_bearer_token() {
    let config = crate::api::testing::config(Path::new("/nowhere"), "[northbound]\nlisten = ['127.0.0.1:0']");
    let authenticator =
        Authenticator::new(&config.northbound.expect("there"), &Arc::default(), None).expect("ready");
    for (headers, expected) in [
        (vec![], AuthError::Missing),
        (vec!["Basic YTpi"], AuthError::Malformed),
        (vec!["Bearer"], AuthError::Malformed),
        (vec!["Bearer "], AuthError::Malformed),
        (vec!["Bearer a b"], AuthError::Malformed),
        (vec!["Bearer a", "Bearer b"], AuthError::Malformed),
        (vec!["Bearer a.b.c"], AuthError::NoTokens),
        (vec!["bearer qos_nonsense"], AuthError::Key),
    ] {
        let shown = headers.iter().map(|value| (header::AUTHORIZATION, HeaderValue::from_static(value)));
        let mut map = HeaderMap::new();
        shown.for_each(|(name, value)| {
            map.append(name, value);
        });
        assert_eq!(authenticator.authenticate(&map).await, Err(expected), "{headers:?}");
    }
}
