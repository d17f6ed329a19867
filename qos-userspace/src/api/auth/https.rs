//! One small answer from an https URL.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring as provider;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// Time for the whole of it.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer, in bytes.
const LARGEST_ANSWER: usize = 1 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// The authorities' file can't be used.
    #[error("cannot read the authorities in {}: {reason}", path.display())]
    Authorities { path: PathBuf, reason: String },
    /// No certificate can be trusted.
    #[error("the system has no certificate authorities (package ca-certificates), and `jwks_ca` names none")]
    NoAuthorities,
    /// The address can't be asked.
    #[error("{0} can't be asked")]
    Url(Uri),
    /// It can't be reached, or does not show to be who it should.
    #[error("cannot reach {authority}: {source}")]
    Connection { authority: String, source: io::Error },
    /// It does not speak HTTP.
    #[error("the connection to {authority} broke: {source}")]
    Http { authority: String, source: hyper::Error },
    /// It answers something else.
    #[error("{url} answers {status}")]
    Status { url: Uri, status: StatusCode },
    /// Its answer is cut short, or too long.
    #[error("the answer of {url} can't be read: {reason}")]
    Body { url: Uri, reason: String },
    /// It takes too long.
    #[error("no answer from {0} in {seconds} s", seconds = TIMEOUT.as_secs())]
    Timeout(Uri),
}

/// Gets what is at `url`, which may be shown by an authority in `ca` besides those of the system. Redirections are not
/// followed.
pub(crate) async fn fetch(url: &Uri, ca: Option<&Path>) -> Result<Bytes, FetchError> {
    let tls = connector(ca)?;
    let asked = tokio::time::timeout(TIMEOUT, ask(url, tls));
    asked.await.unwrap_or_else(|_| Err(FetchError::Timeout(url.clone())))
}

async fn ask(url: &Uri, tls: TlsConnector) -> Result<Bytes, FetchError> {
    let authority = url.authority().ok_or_else(|| FetchError::Url(url.clone()))?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let unreachable = |source| FetchError::Connection { authority: authority.to_string(), source };
    let broken = |source| FetchError::Http { authority: authority.to_string(), source };
    let name = ServerName::try_from(host.to_owned()).map_err(|_| FetchError::Url(url.clone()))?;
    let stream =
        TcpStream::connect((host, authority.port_u16().unwrap_or(443))).await.map_err(unreachable)?;
    let stream = tls.connect(name, stream).await.map_err(unreachable)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // Errors of the connection are those of the request.
    drop(tokio::spawn(connection));
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header(header::HOST, authority.as_str())
        .header(header::ACCEPT, "application/json")
        .header(header::USER_AGENT, concat!("qosd/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .map_err(|_| FetchError::Url(url.clone()))?;
    let response = sender.send_request(request).await.map_err(broken)?;
    if response.status() != StatusCode::OK {
        return Err(FetchError::Status { url: url.clone(), status: response.status() });
    }
    let body = Limited::new(response.into_body(), LARGEST_ANSWER).collect().await;
    body.map(http_body_util::Collected::to_bytes)
        .map_err(|error| FetchError::Body { url: url.clone(), reason: error.to_string() })
}

fn connector(ca: Option<&Path>) -> Result<TlsConnector, FetchError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = ca {
        let unusable = |reason: String| FetchError::Authorities { path: path.to_owned(), reason };
        let certificates =
            CertificateDer::pem_file_iter(path).map_err(|error| unusable(error.to_string()))?;
        for certificate in certificates {
            let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
            roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
        }
    }
    if roots.is_empty() {
        return Err(FetchError::NoAuthorities);
    }
    let config = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has cipher suites for TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}
