//! The daemon's API over one connection that stays open, for requests that `qos` would not send and
//! for many in a row.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// A connection.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

/// What was answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body; `null` where it is empty.
    pub body: Value,
}

impl Answer {
    /// A text of the answer's `error`, such as `message`; empty where there is none.
    #[must_use]
    pub fn error(&self, key: &str) -> &str {
        self.body["error"][key].as_str().unwrap_or_default()
    }
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).context("SO_RCVTIMEO")?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Asks, with an object as the body if there is one.
    ///
    /// # Errors
    /// When the connection breaks or the answer is not JSON.
    pub fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
        let body = body.map(Value::to_string).unwrap_or_default();
        self.send(method, path, body.as_bytes())
    }

    /// Asks with any bytes as the body.
    ///
    /// # Errors
    /// When the connection breaks or the answer is not JSON.
    pub fn send(&mut self, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
        self.begin(method, path, body.len(), body)?;
        self.answer()
    }

    /// Sends the head of a request with a body of `length` bytes, and as much of it as is given.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn begin(&mut self, method: &str, path: &str, length: usize, part: &[u8]) -> Result<()> {
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nhost: qosd\r\ncontent-length: {length}\r\n\r\n")
                .into_bytes();
        request.extend_from_slice(part);
        // A body that is refused unread ends the connection while it is sent; the answer tells why.
        match self.stream.get_mut().write_all(&request) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            result => result.with_context(|| format!("{method} {path}")),
        }
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        self.stream.read_line(&mut line).context("the status line")?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.with_context(|| format!("no status line: {line:?}"))?;
        let mut length = 0;
        loop {
            line.clear();
            self.stream.read_line(&mut line).context("a header")?;
            match line.trim_end().split_once(": ") {
                None => break,
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.parse().with_context(|| format!("content-length {value}"))?;
                }
                Some(_) => {}
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).context("the body")?;
        let body = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&body)
                .with_context(|| format!("no JSON: {}", String::from_utf8_lossy(&body)))?
        };
        Ok(Answer { status, body })
    }
}
