//! An authorization server's keys and tokens, for tests.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jiff::Timestamp;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256,
    RsaKeyPair, RsaPublicKeyComponents,
};
use serde_json::{Value, json};

/// RSAPrivateKey of 2,048 bits, made for these tests and used nowhere else: ring makes none.
const RSA_KEY: &str = "\
    MIIEowIBAAKCAQEAyaOLpAjr3NzLAvoCZKYGHkm4f18OfibkbmJYObq0lT0EueSxQtgeQ8MW/CK3gh0o21/lU8WgffN0UR+/oZ7N\
    N+lHKYgd1sGAqMGRH+y6sigOYxH+HfNQUoM/9vKe5Ov8KiXJzNzjQ23uDpMGT6jePA6RE56E0UGU0VfVWuPw46qjeZCsdzC/ogQg\
    YOYhN6cz3CMWz46w4xECrVw+uiLa2x/Sxi7YpFy59bgKrHRO/1Elgrnr7cdEwPVIDcEK6K/vIdF3xuVu/gTaSK+znmtdPxlquhfB\
    bWDBXBY3EvHynXoS2cw3ZYzuD1Gc+Ttbq2x/8BQw+GrYD4VMwCQ+odXsSwIDAQABAoIBAARo80Y50Q7E4BvHOVjXg2K+MgQhzBYD\
    kRNo9eJYAa28kTyPkouSYSG87o/Cd/OnN5w0qLYAUyuYsNPlYdzjCudMztBLDdFYl2ZuyqxsElk7JGATpf8kXH6xfYClJccpR3E/\
    NP6qBhO/dRQUhcV66AFgQC6xqi35b+Ee4/0CPI5+GZ/mYSK+aMqv7ybbtlndjKZsfSLrMiXsQw1uvvoy6x4wKqm+xHsVaX1Lh0Zu\
    kmSqI05zqorcS1wbYc7oMCJK2ZjLCzQFd4PdEOhCZXgq/YjX4GxtljARb35TLDEA1YLsCtb5OlWLB8W0fjYRT4IFVBzUwUFw6lGg\
    k7dPdGhcUoECgYEA7WswuPAsYFt3OmhNSDvjoFrMYSjLrPCFqjtk1iWJFGopt/vnZ1FY5/WT1M0+3lpc8uBuAyqYw/pZo+/gruj4\
    x+/p1fPbmr7dsPKBstDVZsQE3mC9tVA4EekNWHIz7WFGr0czrns16uxBGAeoJ5IZUB4ycd0STJWAhEPcoUlOjpECgYEA2Wt8lMkQ\
    H7wPyOVFwlEJI9KUOmaklMZL03+yCWTfUJpJiiLZgDwNuEY1+BTvwYKRIwyws+uijoQnUzd6IXMoDRA2dPuj/PgVZscupZ0pTiVW\
    DGnmjwiCEOQmqfe32yDGe4/217iQK0BO7USIcaiJGgBm+Fgo9bWDO8PepTzGMxsCgYAd88P10PcIQQHNsJLvZf7VoB7gsxDfBIkY\
    bN3P1nRwyuPwfis3cZ/Rw72evzYLP0MysPWwGJOlRdRBRmYGKwYX00Cg6V7vKt01EaMjOA10JY6nr3S/hxtLxycT3XSHohoUytrO\
    TGUE+kFMEss4Esp2vRiIHOfOGZ5ZEWaoQmNSwQKBgCOEbZuYpOuqOyHkYlr2Bfo2IkTQE77CDg0E5T6nndt6+Nx6CPHr3Ynm3lYi\
    hXAlNjR1lEAwFCQX7pyniWoBd996cIr3uLhQhp59l18yp1a+vqnUeveOukCsJKzLbNt9JS92OyrOWa7XGI2mDmwSziLTQf771+Ub\
    u859lteDcBVVAoGBAK/Obb4RskRklPxbAnDpP+qPxyJi/1PRcEkJCXt9wfBJHc41e/W1xczP7wU8FaJWFMdNLvdaHUfBEcPTEgh+\
    9yhqd+nmTBJXxgeEur2M8fUe4PsXMHNmx02vcu3OhGrk71V9qDTs2TW5ALZ/trwPAwdxxxNJTP998OQJnrkuyAXY";

enum Signer {
    Rsa(Box<RsaKeyPair>),
    Ec(EcdsaKeyPair),
    Ed(Ed25519KeyPair),
}

/// A key that signs tokens.
pub(crate) struct TestKey {
    id: String,
    signer: Signer,
}

impl TestKey {
    pub(crate) fn rsa(id: &str) -> Self {
        let der = STANDARD.decode(RSA_KEY).expect("base64");
        let key = RsaKeyPair::from_der(&der).expect("a key");
        Self { id: id.to_owned(), signer: Signer::Rsa(Box::new(key)) }
    }

    pub(crate) fn ec(id: &str) -> Self {
        let (random, kind) = (SystemRandom::new(), &ECDSA_P256_SHA256_FIXED_SIGNING);
        let document = EcdsaKeyPair::generate_pkcs8(kind, &random).expect("random");
        let key = EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), &random).expect("a key");
        Self { id: id.to_owned(), signer: Signer::Ec(key) }
    }

    pub(crate) fn ed(id: &str) -> Self {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("random");
        let key = Ed25519KeyPair::from_pkcs8(document.as_ref()).expect("a key");
        Self { id: id.to_owned(), signer: Signer::Ed(key) }
    }

    pub(crate) fn algorithm(&self) -> &'static str {
        match self.signer {
            Signer::Rsa(_) => "RS256",
            Signer::Ec(_) => "ES256",
            Signer::Ed(_) => "EdDSA",
        }
    }

    /// Its public half.
    pub(crate) fn jwk(&self) -> Value {
        let id = &self.id;
        match &self.signer {
            Signer::Rsa(key) => {
                let public = RsaPublicKeyComponents::<Vec<u8>>::from(key.public());
                let (n, e) = (base64url(&public.n), base64url(&public.e));
                json!({"kty": "RSA", "kid": id, "use": "sig", "alg": "RS256", "n": n, "e": e})
            }
            Signer::Ec(key) => {
                let point = key.public_key().as_ref();
                let (x, y) = (base64url(&point[1..33]), base64url(&point[33..]));
                json!({"kty": "EC", "kid": id, "crv": "P-256", "x": x, "y": y})
            }
            Signer::Ed(key) => {
                json!({"kty": "OKP", "kid": id, "crv": "Ed25519", "x": base64url(key.public_key().as_ref())})
            }
        }
    }

    /// A token that says what it is given.
    pub(crate) fn sign(&self, header: &Value, claims: &Value) -> String {
        let message = unsigned(header, claims);
        let bytes = message.as_bytes();
        let signature = match &self.signer {
            Signer::Rsa(key) => {
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), bytes, &mut signature).expect("signed");
                signature
            }
            Signer::Ec(key) => key.sign(&SystemRandom::new(), bytes).expect("signed").as_ref().to_vec(),
            Signer::Ed(key) => key.sign(bytes).as_ref().to_vec(),
        };
        format!("{message}.{}", base64url(&signature))
    }

    /// A token as an authorization server gives it.
    pub(crate) fn token(&self, claims: &Value) -> String {
        self.sign(&json!({"alg": self.algorithm(), "kid": self.id, "typ": "at+jwt"}), claims)
    }
}

/// Header and claims as they are signed.
pub(crate) fn unsigned(header: &Value, claims: &Value) -> String {
    format!("{}.{}", base64url(header.to_string().as_bytes()), base64url(claims.to_string().as_bytes()))
}

pub(crate) fn base64url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A JSON Web Key Set.
pub(crate) fn key_set(keys: &[&TestKey]) -> String {
    json!({"keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>()}).to_string()
}

/// What a token for `client` says that is good for five minutes.
pub(crate) fn claims(client: &str, scope: &str) -> Value {
    let now = Timestamp::now().as_second();
    json!({
        "iss": "https://auth.example.net", "aud": "qos", "sub": "somebody", "client_id": client, "scope": scope,
        "iat": now, "exp": now + 300,
    })
}
