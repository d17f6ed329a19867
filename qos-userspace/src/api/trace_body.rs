//! Lines of the programs' debugging as the body of an answer that ends when the listener leaves or
//! the daemon stops.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Bytes;
use hyper::body::{Body, Frame};
use tokio::sync::mpsc::Receiver;

#[derive(Debug)]
pub(super) struct TraceBody {
    lines: Receiver<String>,
}

impl TraceBody {
    pub(super) fn new(lines: Receiver<String>) -> Self {
        Self { lines }
    }
}

impl Body for TraceBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.lines.poll_recv(context).map(|line| {
            line.map(|mut line| {
                line.push('\n');
                Ok(Frame::data(Bytes::from(line)))
            })
        })
    }
}
