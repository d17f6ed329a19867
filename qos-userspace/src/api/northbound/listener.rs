//! Connections of providers: how many, how long, and no slow ones.

use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use super::super::auth::limits::site;
use super::Northbound;
use super::guard::Remote;
use crate::config::Northbound as Settings;

/// Connections that the kernel accepts before we do.
const BACKLOG: u32 = 1_024;
/// Wait after a failure to accept, as when there are no file descriptors left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Header fields of a request.
const MOST_HEADERS: usize = 64;
/// Bytes of a request's header, and of what is read ahead.
const LARGEST_HEADER: usize = 32 * 1_024;
/// How long connections may take to end when the daemon does.
const LAST_ANSWERS: Duration = Duration::from_secs(4);

/// Listens on an address.
pub(super) fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => {
            let socket = TcpSocket::new_v6()?;
            // 0.0.0.0 and [::] can both be listened on.
            nix::sys::socket::setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
            socket
        }
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Connections that are open, by site.
#[derive(Debug, Default)]
pub(super) struct Connections(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    all: u32,
    by_site: HashMap<IpAddr, u32>,
}

/// One of them; it ends with the value.
#[derive(Debug)]
struct Counted {
    northbound: Arc<Northbound>,
    site: IpAddr,
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, site: IpAddr, settings: &Settings) -> bool {
        let mut open = self.lock();
        let of_site = open.by_site.get(&site).copied().unwrap_or(0);
        if open.all >= settings.max_connections || of_site >= settings.max_connections_per_address {
            return false;
        }
        open.all += 1;
        open.by_site.insert(site, of_site + 1);
        true
    }

    fn remove(&self, site: IpAddr) {
        let mut open = self.lock();
        open.all = open.all.saturating_sub(1);
        if let Some(of_site) = open.by_site.get_mut(&site) {
            *of_site = of_site.saturating_sub(1);
            if *of_site == 0 {
                open.by_site.remove(&site);
            }
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.northbound.connections.remove(self.site);
    }
}

/// Accepts and serves until `shutdown` comes.
pub(super) async fn serve(
    northbound: Arc<Northbound>,
    listeners: Vec<TcpListener>,
    router: Router,
    shutdown: impl Future<Output = ()>,
) {
    let (sender, mut accepted) = mpsc::channel(1);
    let accepting: Vec<_> =
        listeners.into_iter().map(|listener| tokio::spawn(accept(listener, sender.clone()))).collect();
    drop(sender);
    let graceful = GracefulShutdown::new();
    tokio::pin!(shutdown);
    loop {
        let (stream, address) = tokio::select! {
            Some(next) = accepted.recv() => next,
            () = &mut shutdown => break,
        };
        let site = site(address.ip());
        if !northbound.connections.add(site, &northbound.live().settings) {
            debug!(%address, "connection cut: there are too many");
            continue;
        }
        let counted = Counted { northbound: Arc::clone(&northbound), site };
        tokio::spawn(connection(stream, address, counted, router.clone(), graceful.watcher()));
    }
    accepting.iter().for_each(tokio::task::JoinHandle::abort);
    let _ = tokio::time::timeout(LAST_ANSWERS, graceful.shutdown()).await;
}

async fn accept(listener: TcpListener, to: mpsc::Sender<(TcpStream, SocketAddr)>) {
    loop {
        match listener.accept().await {
            Ok(accepted) => {
                if to.send(accepted).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                warn!("cannot accept a connection of a provider: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn connection(
    stream: TcpStream,
    address: SocketAddr,
    counted: Counted,
    router: Router,
    watcher: Watcher,
) {
    let live = counted.northbound.live();
    let settings = &live.settings;
    // Answers are written whole.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(settings.answer_timeout));
    let handshake = TlsAcceptor::from(Arc::clone(&live.tls.config)).accept(Box::pin(stream));
    let stream = match tokio::time::timeout(settings.header_timeout, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return debug!(%address, "no TLS: {error}"),
        Err(_) => return debug!(%address, "connection cut: the TLS handshake takes too long"),
    };
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Remote(address));
        router.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(settings.header_timeout)
        .max_headers(MOST_HEADERS)
        .max_header_size(LARGEST_HEADER)
        .max_buf_size(LARGEST_HEADER)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection).await {
        debug!(%address, "connection ended: {error}");
    }
}
