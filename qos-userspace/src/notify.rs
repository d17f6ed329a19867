//! Tells the service manager how the daemon is, as sd_notify(3) describes. Without one nothing is sent.

use std::env;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

use crate::api::types::Status;
use crate::api::worker::Handle;

/// Time between two reports where nobody asked for a sign of life.
const INTERVAL: Duration = Duration::from_secs(10);

/// Tells that the daemon is ready, and from then on what it does.
///
/// The sign of life that `WATCHDOG_USEC` asks for is given only after the worker has answered: one
/// that hangs gets the daemon restarted. Ends when the worker does.
pub(crate) async fn report(worker: Handle) {
    tell(&[NotifyState::Ready]);
    if env::var_os("NOTIFY_SOCKET").is_some() {
        report_to(tell, worker, sd_notify::watchdog_enabled()).await;
    }
}

/// Tells that the daemon is about to end.
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

fn tell(states: &[NotifyState<'_>]) {
    // Nothing depends on it here, and who waits for it will say so.
    if let Err(error) = sd_notify::notify(states) {
        debug!(%error, "the service manager was not told");
    }
}

async fn report_to(tell: impl Fn(&[NotifyState<'_>]), worker: Handle, watchdog: Option<Duration>) {
    // Twice as often as asked, as sd_watchdog_enabled(3) advises.
    let interval = watchdog.map_or(INTERVAL, |limit| limit / 2).min(INTERVAL);
    let mut told = String::new();
    while let Ok(status) = worker.run(|service| service.status()).await {
        let text = status.map_or_else(|error| error.to_string(), |status| summary(&status));
        if watchdog.is_some() {
            tell(&[NotifyState::Watchdog]);
        }
        if text != told {
            tell(&[NotifyState::Status(&text)]);
            told = text;
        }
        tokio::time::sleep(interval).await;
    }
}

/// Such as "enforcing 12 allocations on lan0, wan0".
fn summary(status: &Status) -> String {
    let doing = if status.gateway.mode == "observe" { "observing" } else { "enforcing" };
    let allocations = match status.counted.allocations {
        1 => "1 allocation".to_owned(),
        number => format!("{number} allocations"),
    };
    let names: Vec<_> = status.gateway.interfaces.iter().map(|interface| interface.name.as_str()).collect();
    format!("{doing} {allocations} on {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;
    use crate::api::service::Service;
    use crate::api::testing::{Recorder, config, store};
    use crate::api::worker::Worker;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_worker_that_hangs_gives_no_sign_of_life() {
        const LIMIT: Duration = Duration::from_millis(100);
        let directory = tempfile::tempdir().expect("temporary directory");
        let config = config(directory.path(), "");
        let worker = Worker::spawn(move || {
            let store = store(&config);
            Service::start(config, 1_500, store, |state| Recorder::default().start(state))
        })
        .expect("the service starts");
        let (sender, received) = mpsc::channel();
        let send = move |states: &[NotifyState<'_>]| {
            for state in states {
                let _ = sender.send(state.to_string());
            }
        };
        let reporting = tokio::spawn(report_to(send, worker.handle(), Some(LIMIT)));
        let next = || received.recv_timeout(Duration::from_secs(10)).expect("a report");
        assert_eq!(next(), "WATCHDOG=1");
        assert_eq!(next(), "STATUS=enforcing 0 allocations on lan0");
        let began = Instant::now();
        for _ in 0..3 {
            assert_eq!(next(), "WATCHDOG=1", "the status is told when it changes");
        }
        assert!(began.elapsed() >= LIMIT, "{:?}", began.elapsed());

        let (release, held) = mpsc::channel::<()>();
        let (entered, inside) = mpsc::channel();
        let handle = worker.handle();
        let stuck = tokio::spawn(async move {
            handle
                .run(move |_| {
                    let _ = entered.send(());
                    let _ = held.recv();
                })
                .await
        });
        inside.recv().expect("the worker hangs");
        while received.recv_timeout(LIMIT * 2).is_ok() {}
        assert!(received.recv_timeout(LIMIT * 5).is_err(), "a sign of life of a worker that hangs");
        drop(release);
        stuck.await.expect("no panic").expect("the worker lives");
        assert_eq!(next(), "WATCHDOG=1");

        worker.stop().expect("no panic");
        reporting.await.expect("ends with the worker");
    }
}
