//! The certificate that the API for providers shows: the operator's, or one of its own for trying out.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::{Timestamp, ToSpan as _, tz::TimeZone};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use ring::digest::{SHA256, digest};
use tokio_rustls::rustls::crypto::ring as provider;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{self, ServerConfig};
use tracing::info;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::config::Northbound;
use crate::config::northbound::Certificate;

/// Years for which a certificate of our own is good.
const OWN_YEARS: i64 = 2;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file can't be read, or has not what it should.
    #[error("cannot read the {what} in {}: {reason}", path.display())]
    Pem {
        /// What should be in it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Certificate and key can't be used together.
    #[error("cannot use the certificate {} with the key {}: {source}", files.chain.display(), files.key.display())]
    Unusable {
        /// Both.
        files: Certificate,
        /// Why not.
        source: rustls::Error,
    },
    /// A certificate of our own can't be made.
    #[error("cannot make a self-signed certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// It can't be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A certificate, ready for use.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) config: Arc<ServerConfig>,
    /// SHA-256 of the certificate, as `openssl x509 -fingerprint -sha256` prints it.
    pub(crate) fingerprint: String,
    /// When it ends; none: it does not say so in a way that is understood.
    pub(crate) ends: Option<Timestamp>,
}

/// Where a certificate of our own is kept.
pub(crate) fn own_files(state_dir: &Path) -> Certificate {
    Certificate {
        chain: state_dir.join("northbound-certificate.pem"),
        key: state_dir.join("northbound-key.pem"),
    }
}

/// Reads the certificate that the configuration names; where it names none, the one of our own, which is made if it
/// is not there.
pub(crate) fn open(config: &Northbound, state_dir: &Path) -> Result<Shown, TlsError> {
    match &config.certificate {
        Some(files) => read(files),
        None => {
            let files = own_files(state_dir);
            if !(files.chain.exists() && files.key.exists()) {
                make(&files, config)?;
                let shown = read(&files)?;
                info!(fingerprint = shown.fingerprint, "self-signed certificate made, for trying out");
                return Ok(shown);
            }
            read(&files)
        }
    }
}

/// Reads a certificate with its key.
pub(crate) fn read(files: &Certificate) -> Result<Shown, TlsError> {
    let (chain, first) = read_chain(&files.chain)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| TlsError::Pem {
        what: "private key",
        path: files.key.clone(),
        reason: error.to_string(),
    })?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .expect("ring has cipher suites for both")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|source| TlsError::Unusable { files: files.clone(), source })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let hash: Vec<_> = digest(&SHA256, &first).as_ref().iter().map(|byte| format!("{byte:02X}")).collect();
    let ends = X509Certificate::from_der(&first)
        .ok()
        .and_then(|(_, parsed)| Timestamp::from_second(parsed.validity().not_after.timestamp()).ok());
    Ok(Shown { config: Arc::new(config), fingerprint: hash.join(":"), ends })
}

/// The certificates of a file, and the first of them, which is the one that is shown.
fn read_chain(path: &Path) -> Result<(Vec<CertificateDer<'static>>, CertificateDer<'static>), TlsError> {
    let unusable = |reason: String| TlsError::Pem { what: "certificate", path: path.to_owned(), reason };
    let chain = CertificateDer::pem_file_iter(path).map_err(|error| unusable(error.to_string()))?;
    let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|error| unusable(error.to_string()))?;
    let first = chain.first().cloned().ok_or_else(|| unusable("there is none in it".to_owned()))?;
    Ok((chain, first))
}

fn make(files: &Certificate, config: &Northbound) -> Result<(), TlsError> {
    let host = nix::sys::utsname::uname().ok().map(|system| system.nodename().to_string_lossy().into_owned());
    let mut names: Vec<String> = host.into_iter().filter(|host| !host.is_empty()).collect();
    names.push("localhost".to_owned());
    names.extend(["127.0.0.1".to_owned(), "::1".to_owned()]);
    let listened =
        config.listen.iter().map(std::net::SocketAddr::ip).filter(|ip: &IpAddr| !ip.is_unspecified());
    names.extend(listened.map(|ip| ip.to_string()));
    names.sort_unstable();
    names.dedup();
    let mut params = CertificateParams::new(names)?;
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, "qosd, self-signed");
    params.distinguished_name = subject;
    let now = Timestamp::now().to_zoned(TimeZone::UTC).date();
    let date = |date: jiff::civil::Date| {
        rcgen::date_time_ymd(date.year().into(), date.month().unsigned_abs(), date.day().unsigned_abs())
    };
    // A day earlier, for clients whose clock is behind.
    params.not_before = date(now.saturating_sub(1.day()));
    params.not_after = date(now.saturating_add(OWN_YEARS.years()));
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    // The key first: a certificate is there only with its key.
    write(&files.key, &key.serialize_pem(), 0o600)?;
    write(&files.chain, &certificate.pem(), 0o644)
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), TlsError> {
    let failed = |source| TlsError::Write { path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    let fresh = path.with_extension("new");
    let _ = fs::remove_file(&fresh);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&fresh, path).map_err(failed)
}
