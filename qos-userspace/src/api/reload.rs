//! A change of the configuration while the daemon runs: by `SIGHUP` or `qos reload`.

use std::path::Path;

use super::northbound::{Northbound, NorthboundError};
use super::service::{Operations, ServiceError};
use super::worker::{Handle, Stopped};
use crate::config::Config;
use crate::manager::record::{Actor, Record};

/// Why the daemon goes on with the configuration that it has.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// It was refused; nothing was changed.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// What it names for the API for providers can't be used; nothing was changed.
    #[error(transparent)]
    Northbound(#[from] NorthboundError),
    /// The daemon is about to end.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Reads the configuration again and has the service take it. Returns what differs, by key.
///
/// # Errors
/// Where it is no configuration, differs in what only a restart changes, has less than is granted, or the
/// kernel refuses it. All stays as it was then.
pub async fn reload(
    handle: &Handle,
    path: &Path,
    northbound: Option<&Northbound>,
    actor: Actor,
) -> Result<Vec<String>, ReloadError> {
    let read = Config::load(path).map_err(ServiceError::Config).and_then(|config| {
        let mtu = config.gateway.largest_mtu().map_err(ServiceError::Interface)?;
        Ok((config, mtu))
    });
    let settings = read.as_ref().ok().and_then(|(config, _)| config.northbound.as_ref());
    let prepared = match northbound.zip(settings) {
        Some((northbound, settings)) => match northbound.prepare(settings) {
            Ok(prepared) => Some((northbound, prepared)),
            Err(error) => {
                let failed = Record::of_operation(&actor, "reload", &Err(&error));
                handle.run(move |service| service.record(failed)).await?;
                return Err(error.into());
            }
        },
        None => None,
    };
    let reload = move |service: &mut dyn Operations| {
        let reloaded = read.and_then(|(config, mtu)| service.reload(config, mtu));
        service.record(Record::of_operation(&actor, "reload", &reloaded));
        reloaded
    };
    let changed = handle.run(reload).await??;
    if let Some((northbound, prepared)) = prepared {
        northbound.take(prepared);
    }
    Ok(changed)
}
