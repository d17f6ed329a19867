//! A change of the configuration while the daemon runs: by `SIGHUP` or `qos reload`.

use std::path::Path;

use super::service::ServiceError;
use super::worker::{Handle, Stopped};
use crate::config::Config;

/// Why the daemon goes on with the configuration that it has.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// It was refused; nothing was changed.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The daemon is about to end.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Reads the configuration again and has the service take it. Returns what differs, by key.
///
/// # Errors
/// Where it is no configuration, differs in what only a restart changes, has less than is granted, or the
/// kernel refuses it. All stays as it was then.
pub async fn reload(handle: &Handle, path: &Path) -> Result<Vec<String>, ReloadError> {
    let config = Config::load(path).map_err(ServiceError::Config)?;
    let mtu = config.gateway.largest_mtu().map_err(ServiceError::Interface)?;
    Ok(handle.run(move |service| service.reload(config, mtu)).await??)
}
