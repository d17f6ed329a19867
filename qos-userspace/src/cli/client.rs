//! One HTTP request at a time to the daemon, over its Unix socket.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Deserializer, Serializer};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

use super::CliError;
use crate::api::types::{ErrorAnswer, ErrorBody};

/// Longest wait for an answer. Thousands of classes take the kernel seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Asks the daemon.
#[derive(Debug)]
pub(super) struct Client {
    socket: PathBuf,
    /// Changes are asked about, and not made.
    dry_run: bool,
    runtime: Runtime,
}

impl Client {
    pub(super) fn new(socket: PathBuf, dry_run: bool) -> Result<Self, CliError> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| CliError::System { what: "start".to_owned(), source })?;
        Ok(Self { socket, dry_run, runtime })
    }

    /// Whether changes are only asked about.
    pub(super) const fn is_dry_run(&self) -> bool {
        self.dry_run
    }

    /// What is at `path`.
    pub(super) fn get(&self, path: &str) -> Result<Answer, CliError> {
        self.ask(Method::GET, path, None)
    }

    /// Posts `body`.
    pub(super) fn post(&self, path: &str, body: &impl Serialize) -> Result<Answer, CliError> {
        self.ask(Method::POST, path, Some(to_json(body)?))
    }

    /// Puts `body`.
    pub(super) fn put(&self, path: &str, body: &impl Serialize) -> Result<Answer, CliError> {
        self.ask(Method::PUT, path, Some(to_json(body)?))
    }

    /// Asks what would come of putting `body`.
    pub(super) fn try_put(&self, path: &str, body: &impl Serialize) -> Result<Answer, CliError> {
        self.ask(Method::PUT, &format!("{path}?dry_run=true"), Some(to_json(body)?))
    }

    /// Deletes what is at `path`.
    pub(super) fn delete(&self, path: &str) -> Result<Answer, CliError> {
        self.ask(Method::DELETE, path, None)
    }

    /// Passes what comes from `path` on to `take`, piece by piece, until it ends.
    pub(super) fn stream(
        &self,
        path: &str,
        mut take: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), CliError> {
        self.runtime.block_on(async {
            let response = self.send(Method::GET, path, None).await?;
            let mut body = accepted(response).await?.into_body();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|error| CliError::Answer(error.to_string()))?;
                if let Some(piece) = frame.data_ref() {
                    take(piece)?;
                }
            }
            Ok(())
        })
    }

    fn ask(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Answer, CliError> {
        let tried = (self.dry_run && method != Method::GET && !path.contains("dry_run"))
            .then(|| format!("{path}?dry_run=true"));
        let path = tried.as_deref().unwrap_or(path);
        self.runtime.block_on(async {
            let asked = async {
                let response = accepted(self.send(method, path, body).await?).await?;
                read(response).await
            };
            let bytes = tokio::time::timeout(ANSWER_TIMEOUT, asked).await.map_err(|_| {
                self.unreachable(format!("no answer in {} s; see what qosd logs", ANSWER_TIMEOUT.as_secs()))
            })??;
            // Nothing stands for "done".
            Ok(Answer(if bytes.is_empty() { Bytes::from_static(b"null") } else { bytes }))
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Response<Incoming>, CliError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| {
            self.unreachable(match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    format!("{error}; start it with `qosd run`, or name its socket with --socket")
                }
                io::ErrorKind::PermissionDenied => {
                    format!(
                        "{error}; run as root, or have `allow_users` or `allow_groups` in its configuration \
                         name you"
                    )
                }
                _ => error.to_string(),
            })
        })?;
        let broken = |error: hyper::Error| self.unreachable(format!("the connection broke: {error}"));
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // Errors of the connection are those of the request.
        drop(tokio::spawn(connection));

        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "qosd");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| CliError::Usage(format!("`{path}` can't be asked for: {error}")))?;
        sender.send_request(request).await.map_err(broken)
    }

    fn unreachable(&self, reason: String) -> CliError {
        CliError::Unreachable { socket: self.socket.clone(), reason }
    }
}

/// An answer: JSON, as it came.
#[derive(Clone, Debug)]
pub(super) struct Answer(Bytes);

impl Answer {
    /// The answer that says this.
    pub(super) fn of(value: &impl Serialize) -> Result<Self, CliError> {
        Ok(Self(to_json(value)?.into()))
    }

    /// The answer as what it should be.
    pub(super) fn typed<T: DeserializeOwned>(&self) -> Result<T, CliError> {
        serde_json::from_slice(&self.0).map_err(|error| CliError::Answer(error.to_string()))
    }

    /// Writes it for people to read, or in one line. Piece by piece: it may be of some size.
    pub(super) fn write(&self, out: &mut dyn Write, pretty: bool) -> Result<(), CliError> {
        let mut from = Deserializer::from_slice(&self.0);
        let mut out = BufWriter::new(out);
        let result = if pretty {
            serde_transcode::transcode(&mut from, &mut Serializer::pretty(&mut out))
        } else {
            serde_transcode::transcode(&mut from, &mut Serializer::new(&mut out))
        };
        result.map_err(|error| match error.is_io() {
            true => io::Error::from(error).into(),
            false => CliError::Answer(error.to_string()),
        })?;
        out.write_all(b"\n")?;
        Ok(out.flush()?)
    }
}

fn to_json(body: &impl Serialize) -> Result<Vec<u8>, CliError> {
    serde_json::to_vec(body).map_err(|error| CliError::Usage(format!("this can't be asked: {error}")))
}

/// The answer, or the error that it is.
async fn accepted(response: Response<Incoming>) -> Result<Response<Incoming>, CliError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let bytes = read(response).await?;
    let error = match serde_json::from_slice::<ErrorAnswer>(&bytes) {
        Ok(answer) => answer.error,
        Err(_) => foreign(status, &bytes),
    };
    Err(if status.is_server_error() { CliError::Failed(error) } else { CliError::Refused(error) })
}

async fn read(response: Response<Incoming>) -> Result<Bytes, CliError> {
    let collected = response.into_body().collect().await;
    collected.map(http_body_util::Collected::to_bytes).map_err(|error| CliError::Answer(error.to_string()))
}

/// The error for an answer that is none of qosd's.
fn foreign(status: StatusCode, bytes: &[u8]) -> ErrorBody {
    let text: String = String::from_utf8_lossy(bytes).chars().take(200).collect();
    ErrorBody {
        code: "unknown".to_owned(),
        message: format!("{status}: {text}"),
        field: None,
        value: None,
        counter_offer: None,
    }
}
