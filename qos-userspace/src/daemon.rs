//! The daemon's life: lock, socket, service, API, and the end of all of them.
//!
//! What enforces in the kernel outlives it: a daemon that stops, or is killed, leaves the programs
//! as they are, and the next one takes them over.

use std::fs::{DirBuilder, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, oneshot};
use tracing::{error, info, warn};

use crate::api::auth::Keys;
use crate::api::northbound::{Northbound, NorthboundError};
use crate::api::reload::reload;
use crate::api::service::{Service, ServiceError};
use crate::api::sink::ServiceSink;
use crate::api::socket::{self, SocketError};
use crate::api::worker::{Handle, Worker};
use crate::api::{self, Api, doctor};
use crate::config::Config;
use crate::gateway::GatewayConfig;
use crate::gateway::link::LinkError;
use crate::gateway::netlink::LinkEvents;
use crate::manager::record::Actor;
use crate::manager::{Gateway, State};
use crate::notify;
use crate::source::{SourceError, Sources};
use crate::store::sqlite::SqliteStore;

/// How long answers that are under way may take at the end.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Why the daemon does not run, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another one has the state.
    #[error(
        "another qosd{} uses the state directory {}; stop it first, or give this one its own `state_dir`, \
         `socket`, `bpffs_dir` and interfaces",
        pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(),
        state_dir.display()
    )]
    Locked {
        /// The state directory of both.
        state_dir: PathBuf,
        /// The other one's process.
        pid: Option<u32>,
    },
    /// The process may not do what it has to.
    #[error("qosd must run as root, or with {}; it runs as uid {uid} without", missing.join(", "))]
    Unprivileged {
        /// Who it runs as.
        uid: u32,
        /// Capabilities that it lacks.
        missing: Vec<&'static str>,
    },
    /// The state directory can't be used.
    #[error("cannot {what} {}: {source}", path.display())]
    StateDirectory {
        /// What was attempted.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// An interface can't be used.
    #[error(transparent)]
    Interface(#[from] LinkError),
    /// There is no socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Providers can't be served.
    #[error(transparent)]
    Northbound(#[from] NorthboundError),
    /// The state can't be loaded, or the kernel does not take it.
    #[error("cannot start: {0}")]
    Service(#[from] ServiceError),
    /// A source of sessions can't begin.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The system lacks something.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The service ended by itself.
    #[error("the service ended by an error in qosd; the log above tells which")]
    Panicked,
}

/// Runs the daemon until SIGTERM, SIGINT or `qos detach`. `start_gateway` brings the kernel to a
/// state.
///
/// # Errors
/// Where it can't start, or the service ends by itself.
pub fn run<G: Gateway<Config = GatewayConfig> + 'static>(
    config: Config,
    start_gateway: impl FnOnce(&GatewayConfig, &State) -> Result<G, G::Error> + Send + 'static,
) -> Result<(), DaemonError> {
    // First, for whatever fails later would tell of a consequence.
    let missing = doctor::missing_capabilities().unwrap_or_default();
    if !missing.is_empty() {
        return Err(DaemonError::Unprivileged { uid: nix::unistd::geteuid().as_raw(), missing });
    }
    let _lock = lock(&config)?;
    let mtu = config.gateway.largest_mtu()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| DaemonError::System { what: "make threads", source })?;
    let result = runtime.block_on(live(config, mtu, start_gateway));
    // Whoever was not waited for on purpose is not waited for here either.
    runtime.shutdown_background();
    result
}

async fn live<G: Gateway<Config = GatewayConfig> + 'static>(
    config: Config,
    mtu: u32,
    start_gateway: impl FnOnce(&GatewayConfig, &State) -> Result<G, G::Error> + Send + 'static,
) -> Result<(), DaemonError> {
    // Before the service: a signal that comes while it starts must not end it half-way.
    let handled = |source| DaemonError::System { what: "handle signals", source };
    let mut terminate = signal(SignalKind::terminate()).map_err(handled)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(handled)?;

    // Who is second must find out before it touches the kernel.
    socket::refuse_live(&config.socket)?;

    let keys = Arc::new(Keys::default());
    let northbound = Northbound::open(&config, &keys)?;
    let listeners = match &northbound {
        Some(northbound) => northbound.listen()?,
        None => Vec::new(),
    };

    let mut hang_up = signal(SignalKind::hangup()).map_err(handled)?;

    let own = config.clone();
    let mut worker = Worker::spawn(move || {
        let store = SqliteStore::open(own.database()).map_err(ServiceError::Store)?;
        let gateway = own.gateway.clone();
        Service::start(own, mtu, store, |state| start_gateway(&gateway, state))
    })?;
    let sources = Sources::start(&config, ServiceSink(worker.handle())).await?;
    let known = Arc::clone(&keys);
    // Ends with the service alone, which is waited for below.
    let _ = worker.handle().run(move |service| known.replace(&service.state().keys)).await;
    // Last, so that whoever can connect meets a gateway that enforces.
    let (listener, _socket) = socket::bind(&config.socket, &config.access)?;
    info!(socket = %config.socket.display(), version = env!("CARGO_PKG_VERSION"), "qosd is ready");

    watch_interfaces(worker.handle())?;
    tokio::spawn(notify::report(worker.handle()));

    let stop = Arc::new(Notify::new());
    let (closing, closed) = oneshot::channel::<()>();
    let api = Api {
        handle: worker.handle(),
        access: config.access.clone(),
        config_path: config.path.clone(),
        sources: sources.monitor(),
        keys,
        northbound: northbound.clone(),
        stop: Arc::clone(&stop),
    };
    let (providers_closing, providers_closed) = oneshot::channel::<()>();
    let providers = northbound.clone().map(|northbound| {
        let until = async {
            let _ = providers_closed.await;
        };
        tokio::spawn(northbound.serve(listeners, api.clone(), until))
    });
    let server = tokio::spawn(api::serve(listener, api, async {
        let _ = closed.await;
    }));

    let mut detached = false;
    let handle = worker.handle();
    loop {
        tokio::select! {
            _ = terminate.recv() => info!("SIGTERM: stopping; the programs in the kernel go on enforcing"),
            _ = interrupt.recv() => info!("SIGINT: stopping; the programs in the kernel go on enforcing"),
            _ = hang_up.recv() => {
                match reload(&handle, &config.path, northbound.as_deref(), Actor::Daemon).await {
                    Ok(changed) if changed.is_empty() => info!("SIGHUP: the configuration is as it was"),
                    Ok(changed) => info!("SIGHUP: changed {}", changed.join(", ")),
                    Err(error) => error!("SIGHUP: going on with the configuration as it was: {error}"),
                }
                continue;
            }
            () = stop.notified() => detached = true,
            () = worker.ended() => {}
        }
        break;
    }
    notify::stopping();
    drop(sources);
    let _ = closing.send(());
    let _ = providers_closing.send(());
    let finish = async {
        // What was asked before is done; listeners to debugging are let go, or the server would wait.
        let ended = tokio::task::spawn_blocking(|| worker.stop()).await;
        let servers = async {
            let _ = server.await;
            if let Some(providers) = providers {
                let _ = providers.await;
            }
        };
        if tokio::time::timeout(LAST_ANSWERS, servers).await.is_err() {
            warn!("some connections did not end in time and are cut");
        }
        ended
    };
    let ended = tokio::select! {
        ended = finish => ended,
        _ = terminate.recv() => {
            at_once("SIGTERM");
            return Ok(());
        }
        _ = interrupt.recv() => {
            at_once("SIGINT");
            return Ok(());
        }
    };
    if detached {
        info!("stopped; nothing is left in the kernel to enforce");
    }
    match ended {
        Ok(Ok(())) => Ok(()),
        _ => Err(DaemonError::Panicked),
    }
}

/// Has the service look at its interfaces whenever the kernel tells of any. The thread ends with the
/// process: nothing waits for it.
fn watch_interfaces(handle: Handle) -> Result<(), DaemonError> {
    let failed = |source| DaemonError::System { what: "watch interfaces", source };
    let events = LinkEvents::open().map_err(failed)?;
    let watch = move || loop {
        if let Err(error) = events.wait() {
            warn!("interfaces are not watched any more, only looked at from time to time: {error}");
            return;
        }
        // Meanwhile further events wait, and count as one.
        if handle.run_blocking(|service| service.look_at_interfaces()).is_err() {
            return;
        }
    };
    std::thread::Builder::new().name("qos-interfaces".to_owned()).spawn(watch).map_err(failed)?;
    Ok(())
}

/// A decision under way is in the store whole or not at all, and the next start carries it out.
fn at_once(signal: &str) {
    warn!("{signal} again: ending at once, without the answers under way");
}

/// Holds the state directory: while it lives no daemon runs, or this process is the daemon.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

/// Makes the state directory and takes its lock, which the system lets go when the process ends,
/// however it ends.
///
/// # Errors
/// Where another daemon holds it, or the directory can't be made or written.
pub fn lock(config: &Config) -> Result<Lock, DaemonError> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| DaemonError::StateDirectory { what, path, source }
    };
    let directory = &config.state_dir;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(failed("make the state directory", directory))?;
    let path = config.lock();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(failed("open the lock", &path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut file) => {
            let written = file
                .set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| writeln!(file, "{}", std::process::id()));
            written.map_err(failed("write the lock", &path))?;
            Ok(Lock { _file: file })
        }
        Err((mut file, nix::Error::EWOULDBLOCK)) => {
            let mut text = String::new();
            let _ = file.read_to_string(&mut text);
            Err(DaemonError::Locked { state_dir: directory.clone(), pid: text.trim().parse().ok() })
        }
        Err((_, error)) => Err(failed("lock", &path)(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(directory: &Path, interface: &str) -> Config {
        let text = format!(
            r#"
state_dir = "{0}/state"
socket = "{0}/qosd.sock"
[[interface]]
name = "lo"
role = "lan"
capacity = "1Gbit/s"
[[interface]]
name = "{interface}"
role = "wan"
capacity = "1Gbit/s"
"#,
            directory.display()
        );
        Config::parse(&text, Path::new("qos.toml")).expect("valid")
    }

    #[test]
    fn a_second_daemon_is_told_of_the_first() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let config = config(directory.path(), "eth1");
        let first = lock(&config).expect("free");
        let error = lock(&config).expect_err("taken").to_string();
        let expected = format!("another qosd (pid {}) uses the state directory ", std::process::id());
        assert!(error.starts_with(&expected), "{error}");
        drop(first);
        drop(lock(&config).expect("free again"));
    }

    #[test]
    fn a_state_directory_that_cannot_be_made_is_named() {
        let directory = tempfile::tempdir().expect("temporary directory");
        std::fs::write(directory.path().join("state"), "a file").expect("written");
        let error = lock(&config(directory.path(), "eth1")).expect_err("in the way").to_string();
        assert!(error.starts_with("cannot make the state directory "), "{error}");
    }
}
