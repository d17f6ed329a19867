//! The thread that the service runs on.
//!
//! Store and kernel calls block, so they stay off the threads that serve connections. One thread
//! does one thing at a time in the order it was asked, which is all the locking there is; between
//! requests it does what is due: expiry, reconciliation, passing debugging on.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};

use tokio::sync::oneshot;

use super::service::{Asked, Operations, Service, ServiceError};
use crate::gateway::GatewayConfig;
use crate::manager::{Decision, Gateway};
use crate::store::Store;

/// The thread has ended, so that nothing can be asked any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("qosd is stopping")]
pub struct Stopped;

type Job = Box<dyn FnOnce(&mut dyn Operations) + Send>;

/// Commands that are carried out together at most, so that the first of them does not wait for long.
const MOST_TOGETHER: usize = 256;

enum Message {
    Execute(Box<Asked>, oneshot::Sender<Result<Decision, ServiceError>>),
    Do(Job),
    Stop,
}

/// Asks the service from any thread.
#[derive(Clone, Debug)]
pub struct Handle {
    messages: Sender<Message>,
}

/// The thread.
#[derive(Debug)]
pub struct Worker {
    handle: Handle,
    thread: JoinHandle<()>,
    /// Closes when the thread ends, for whatever reason.
    ended: oneshot::Receiver<()>,
}

impl Handle {
    /// Carries a command out when its turn has come, together with others that wait for theirs. One that
    /// was asked for is carried out even if nobody waits any more.
    ///
    /// # Errors
    /// Where the thread has ended.
    pub async fn execute(&self, asked: Asked) -> Result<Result<Decision, ServiceError>, Stopped> {
        let (sender, receiver) = oneshot::channel();
        self.messages.send(Message::Execute(Box::new(asked), sender)).map_err(|_| Stopped)?;
        receiver.await.map_err(|_| Stopped)
    }

    /// Runs `job` on the service when its turn has come, and waits for what it answers. A job once
    /// asked for is done even if nobody waits any more.
    ///
    /// # Errors
    /// Where the thread has ended.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Operations) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let (sender, receiver) = oneshot::channel();
        let job: Job = Box::new(move |service| {
            // The asker may be gone.
            let _ = sender.send(job(service));
        });
        self.messages.send(Message::Do(job)).map_err(|_| Stopped)?;
        receiver.await.map_err(|_| Stopped)
    }

    /// Runs `job` likewise, from a thread that may be held up.
    ///
    /// # Errors
    /// Where the thread has ended.
    pub fn run_blocking<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Operations) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let (sender, receiver) = channel();
        let job: Job = Box::new(move |service| {
            let _ = sender.send(job(service));
        });
        self.messages.send(Message::Do(job)).map_err(|_| Stopped)?;
        receiver.recv().map_err(|_| Stopped)
    }
}

impl Worker {
    /// Runs the service that `start` makes on a thread of its own, and waits until it is made. It
    /// is made there too, so that nothing in it has to be able to change threads.
    ///
    /// # Errors
    /// What `start` answers.
    ///
    /// # Panics
    /// Where the system has no thread left, or `start` panics.
    pub fn spawn<S, G, E>(
        start: impl FnOnce() -> Result<Service<S, G>, E> + Send + 'static,
    ) -> Result<Self, E>
    where
        S: Store + 'static,
        G: Gateway<Config = GatewayConfig> + 'static,
        E: Send + 'static,
    {
        let (messages, inbox) = channel();
        let (started_sender, started) = channel();
        let (ended_sender, ended) = oneshot::channel();
        let thread = Builder::new()
            .name("qos-service".to_owned())
            .spawn(move || {
                let _ended: oneshot::Sender<()> = ended_sender;
                match start() {
                    Ok(service) => {
                        let _ = started_sender.send(Ok(()));
                        serve(service, &inbox);
                    }
                    Err(error) => {
                        let _ = started_sender.send(Err(error));
                    }
                }
            })
            .expect("a thread can be made while the daemon starts");
        started.recv().expect("the service starts without a panic")?;
        Ok(Self { handle: Handle { messages }, thread, ended })
    }

    /// Asks the service.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits until the thread ends without having been asked to, which it only does by a panic.
    pub async fn ended(&mut self) {
        let _ = (&mut self.ended).await;
    }

    /// Ends the thread after what was asked before, and waits for it. The kernel goes on enforcing.
    ///
    /// # Errors
    /// Where it had ended by a panic.
    pub fn stop(self) -> std::thread::Result<()> {
        let _ = self.handle.messages.send(Message::Stop);
        self.thread.join()
    }
}

fn serve<S: Store, G: Gateway<Config = GatewayConfig>>(
    mut service: Service<S, G>,
    inbox: &Receiver<Message>,
) {
    let mut next = None;
    loop {
        let message = next.take().map_or_else(|| inbox.recv_timeout(service.idle()), Ok);
        match message {
            Ok(Message::Execute(asked, sender)) => {
                let (mut all, mut senders) = (vec![*asked], vec![sender]);
                while all.len() < MOST_TOGETHER && next.is_none() {
                    match inbox.try_recv() {
                        Ok(Message::Execute(asked, sender)) => {
                            all.push(*asked);
                            senders.push(sender);
                        }
                        Ok(other) => next = Some(other),
                        Err(_) => break,
                    }
                }
                for (answer, sender) in service.execute_all(&all).into_iter().zip(senders) {
                    // The asker may be gone.
                    let _ = sender.send(answer);
                }
            }
            Ok(Message::Do(job)) => job(&mut service),
            Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => {
                service.close();
                return;
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        service.tick();
    }
}
