//! Where sources take what they are told: the session data store, through the service.

use super::service::{Operations, ServiceError};
use super::worker::Handle;
use crate::domain::subscriber::Report;
use crate::domain::{Name, Subscriber};
use crate::manager::record::Actor;
use crate::manager::subscriber::{SubscriberQuery, Taken};
use crate::source::{Sink, SinkError};

/// Asks the service to keep what sources tell.
#[derive(Clone, Debug)]
pub struct ServiceSink(pub Handle);

impl ServiceSink {
    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Operations) -> Result<T, ServiceError> + Send + 'static,
    ) -> Result<T, SinkError> {
        let answer = self.0.run(job).await.map_err(|stopped| SinkError(Box::new(stopped)))?;
        answer.map_err(|error| SinkError(Box::new(error)))
    }
}

impl Sink for ServiceSink {
    async fn take(&self, reports: Vec<Report>) -> Result<Vec<Taken>, SinkError> {
        // All are of one source.
        let source = reports.iter().find_map(|report| report.source.clone());
        let actor = source.map_or(Actor::Daemon, Actor::Source);
        self.run(move |service| service.take_reports(&reports, &actor)).await
    }

    async fn open(&self, source: &Name) -> Result<Vec<Subscriber>, SinkError> {
        let mut query =
            SubscriberQuery { source: Some(source.clone()), up: Some(true), ..SubscriberQuery::default() };
        let mut all = Vec::new();
        loop {
            // In parts, so that others are served between.
            let asked = query.clone();
            let part = self.run(move |service| service.subscribers(&asked)).await?;
            let Some(last) = part.last() else { return Ok(all) };
            query.after = last.sequence;
            all.extend(part);
        }
    }
}
