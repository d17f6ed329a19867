//! Tokens: JWTs that an authorization server has signed (RFC 7519, RFC 9068).
//!
//! A token says by which key and algorithm it is signed, but what is believed is only the number of the key. The
//! algorithm is the key's own, and the verifier below knows three, all of public keys: a token can choose neither
//! none nor a secret that everybody knows.

use std::collections::BTreeSet;
use std::time::Duration;

use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error as JwtError, ErrorKind, new_error};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse};
use jsonwebtoken::signature::{Error as SignatureError, Verifier};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, EncodingKey, Validation};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde::Deserialize;
use serde_json::Value;

/// Longest token that is looked at, in bytes.
const LONGEST_TOKEN: usize = 8_192;
/// Keys of a set that are looked at.
const MOST_KEYS: usize = 256;
/// What `typ` may say, if anything: RFC 7519 section 5.1, RFC 9068 section 2.1.
const TYPES: [&str; 3] = ["jwt", "at+jwt", "application/at+jwt"];

/// Why a token is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenError {
    /// It is no JWT, or one of a kind that is not taken.
    #[error("the token is not a JWT that is taken here: {0}")]
    Malformed(String),
    /// No key of the set is the one that it names, or it names none and there are several.
    #[error("the token names a key that is not known, or none")]
    UnknownKey,
    /// The signature is not the key's.
    #[error("the token's signature is wrong")]
    Signature,
    /// It was for a time that is over.
    #[error("the token has expired")]
    Expired,
    /// It is for a time to come.
    #[error("the token is not valid yet")]
    Early,
    /// It is for somebody else.
    #[error("the token is for another audience")]
    Audience,
    /// Somebody else has issued it.
    #[error("the token is from another issuer")]
    Issuer,
    /// It lacks something, or has it in a form that is none.
    #[error("the token's {0} is missing or malformed")]
    Claim(String),
}

/// Why a text is no set of keys.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeySetError {
    /// It is no JSON, or no set.
    #[error("not a JSON Web Key Set: {0}")]
    Malformed(#[from] serde_json::Error),
    /// None of its keys can be used.
    #[error("none of its {0} keys is for RS256 (2,048 bits or more), ES256 or EdDSA (Ed25519) signatures")]
    NoKey(usize),
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    algorithm: Algorithm,
    key: DecodingKey,
}

/// The public keys of an authorization server.
#[derive(Debug, Default)]
pub(crate) struct KeySet(Vec<Key>);

/// What a token must say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) issuer: Option<String>,
    pub(crate) audience: String,
    pub(crate) leeway: Duration,
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Claims {
    client_id: Option<String>,
    azp: Option<String>,
    sub: Option<String>,
    scope: Option<Scope>,
    scp: Option<Scope>,
}

/// RFC 8693 has one text with spaces, others a list.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Scope {
    Text(String),
    List(Vec<String>),
}

impl Claims {
    /// The client that it was issued to: what RFC 9068 calls it, else what OpenID Connect does, else its subject.
    pub(crate) fn client(&self) -> Option<&str> {
        self.client_id.as_deref().or(self.azp.as_deref()).or(self.sub.as_deref())
    }

    /// What it may be used for.
    pub(crate) fn scopes(&self) -> BTreeSet<String> {
        let words = [&self.scope, &self.scp].into_iter().flatten().flat_map(|scope| match scope {
            Scope::Text(text) => text.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>(),
            Scope::List(list) => list.clone(),
        });
        words.collect()
    }
}

impl KeySet {
    /// Reads a set. Keys in it that are for something else are left out.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, KeySetError> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Value>,
        }
        let Set { keys } = serde_json::from_slice(bytes)?;
        let found = keys.len();
        let keys: Vec<_> = keys.into_iter().take(MOST_KEYS).filter_map(Key::read).collect();
        if keys.is_empty() { Err(KeySetError::NoKey(found)) } else { Ok(Self(keys)) }
    }

    /// How many keys are in it.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Checks a token by the rules.
    pub(crate) fn verify(&self, token: &str, rules: &Rules) -> Result<Claims, TokenError> {
        install_verifier();
        if token.len() > LONGEST_TOKEN {
            return Err(TokenError::Malformed(format!("it is longer than {LONGEST_TOKEN} bytes")));
        }
        let header = jsonwebtoken::decode_header(token).map_err(|error| explain(&error))?;
        if header.crit.is_some() {
            return Err(TokenError::Malformed("crit asks for what is not known here".to_owned()));
        }
        if let Some(typ) = header.typ.filter(|typ| !TYPES.contains(&typ.to_ascii_lowercase().as_str())) {
            return Err(TokenError::Malformed(format!(
                "typ is `{}`",
                typ.chars().take(40).collect::<String>()
            )));
        }
        let key = self.find(header.kid.as_deref(), header.alg).ok_or(TokenError::UnknownKey)?;
        let mut validation = Validation::new(key.algorithm);
        validation.leeway = rules.leeway.as_secs();
        validation.validate_nbf = true;
        validation.set_audience(&[&rules.audience]);
        let mut required = vec!["exp", "aud"];
        if let Some(issuer) = &rules.issuer {
            validation.set_issuer(&[issuer]);
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        let decoded = jsonwebtoken::decode::<Claims>(token, &key.key, &validation);
        decoded.map(|decoded| decoded.claims).map_err(|error| explain(&error))
    }

    /// The key of that number. A token without one means the only key that it can.
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Option<&Key> {
        match id {
            Some(id) => self.0.iter().find(|key| key.id.as_deref() == Some(id)),
            None => {
                let mut could = self.0.iter().filter(|key| key.algorithm == algorithm);
                could.next().filter(|_| could.next().is_none())
            }
        }
    }
}

impl Key {
    /// The key of an entry of a set; none: it is not for signatures that are taken.
    fn read(entry: Value) -> Option<Self> {
        let jwk: Jwk = serde_json::from_value(entry).ok()?;
        let common = &jwk.common;
        let signs = common.public_key_use.as_ref().is_none_or(|used| *used == PublicKeyUse::Signature)
            && common.key_operations.as_ref().is_none_or(|all| all.contains(&KeyOperations::Verify));
        let (algorithm, named) = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
            AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
                (Algorithm::ES256, KeyAlgorithm::ES256)
            }
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
                (Algorithm::EdDSA, KeyAlgorithm::EdDSA)
            }
            _ => return None,
        };
        let agrees = common.key_algorithm.as_ref().is_none_or(|known| *known == named);
        let key = DecodingKey::from_jwk(&jwk).ok()?;
        let is_long_enough = match key.kind() {
            DecodingKeyKind::RsaModulusExponent { n, .. } => {
                n.iter().skip_while(|byte| **byte == 0).count() >= 256
            }
            DecodingKeyKind::SecretOrDer(bytes) => {
                bytes.len() == if algorithm == Algorithm::ES256 { 65 } else { 32 }
            }
        };
        (signs && agrees && is_long_enough).then(|| Self { id: jwk.common.key_id.clone(), algorithm, key })
    }
}

fn explain(error: &JwtError) -> TokenError {
    match error.kind() {
        ErrorKind::InvalidSignature => TokenError::Signature,
        ErrorKind::ExpiredSignature => TokenError::Expired,
        ErrorKind::ImmatureSignature => TokenError::Early,
        ErrorKind::InvalidAudience => TokenError::Audience,
        ErrorKind::InvalidIssuer => TokenError::Issuer,
        ErrorKind::MissingRequiredClaim(claim) | ErrorKind::InvalidClaimFormat(claim) => {
            TokenError::Claim(claim.clone())
        }
        ErrorKind::InvalidAlgorithm => TokenError::Malformed("its alg is not that of its key".to_owned()),
        _ => TokenError::Malformed(error.to_string()),
    }
}

/// What the library checks signatures with: three algorithms of public keys, on ring. It signs nothing.
static VERIFIER: CryptoProvider = CryptoProvider {
    signer_factory: no_signer,
    verifier_factory: verifier,
    key_utils: KeyUtils::new_unimplemented(),
};

fn install_verifier() {
    // It can be installed once; whoever comes later finds it.
    let _ = VERIFIER.install_default();
}

fn no_signer(_: &Algorithm, _: &EncodingKey) -> Result<Box<dyn JwtSigner>, JwtError> {
    Err(new_error(ErrorKind::UnsupportedAlgorithm))
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>, JwtError> {
    match algorithm {
        Algorithm::RS256 | Algorithm::ES256 | Algorithm::EdDSA => {
            Ok(Box::new(OfKey { algorithm: *algorithm, key: key.clone() }))
        }
        _ => Err(new_error(ErrorKind::UnsupportedAlgorithm)),
    }
}

struct OfKey {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl JwtVerifier for OfKey {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

impl Verifier<Vec<u8>> for OfKey {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), SignatureError> {
        let verified = match (self.algorithm, self.key.kind()) {
            (Algorithm::RS256, DecodingKeyKind::RsaModulusExponent { n, e }) => {
                // ring takes no leading zeros.
                let n = &n[n.iter().take_while(|byte| **byte == 0).count()..];
                let key = RsaPublicKeyComponents { n, e: e.as_slice() };
                key.verify(&RSA_PKCS1_2048_8192_SHA256, message, signature)
            }
            (Algorithm::ES256, DecodingKeyKind::SecretOrDer(point)) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature)
            }
            (Algorithm::EdDSA, DecodingKeyKind::SecretOrDer(point)) => {
                UnparsedPublicKey::new(&ED25519, point).verify(message, signature)
            }
            _ => return Err(SignatureError::new()),
        };
        verified.map_err(|_| SignatureError::new())
    }
}
