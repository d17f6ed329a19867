//! The Unix socket that the API is on: made, guarded, and removed.
//!
//! Who connects is known from the kernel (SO_PEERCRED), so there is no password. Root and the user
//! that the daemon runs as may always connect; others where the configuration lists them or one of
//! their groups.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use tokio::net::{UnixListener, UnixStream};

use crate::config::Access;

/// Supplementary groups of a peer that are looked at; Linux allows 65,536, people have a dozen.
const GROUPS_READ: usize = 256;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A daemon answers there.
    #[error(
        "another qosd{} answers on {}; stop it, or set another `socket` in the configuration",
        pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(),
        path.display()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
        /// The process that answers.
        pid: Option<i32>,
    },
    /// Something else is there.
    #[error("{} exists and is not a socket; remove it, or set another `socket` in the configuration", .0.display())]
    NotASocket(PathBuf),
    /// The system refuses.
    #[error("cannot {what} {}: {source}", path.display())]
    System {
        /// What was attempted.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The socket; its file goes when it is dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    /// Device and inode, to tell our file from one that has replaced it.
    identity: (u64, u64),
}

impl Drop for Socket {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // Best effort: a file that stays is recognised as dead by the next daemon.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes the socket at `path`, and its directory where that is missing. The socket of a daemon that
/// is no more is replaced. Must be called within a tokio runtime.
///
/// # Errors
/// Where a daemon answers there, something else is there, or the system refuses.
pub fn bind(path: &Path, access: &Access) -> Result<(UnixListener, Socket), SocketError> {
    let failed = |what| move |source| SocketError::System { what, path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(|source| {
            SocketError::System { what: "make the directory", path: directory.to_owned(), source }
        })?;
    }
    refuse_live(path)?;

    // Made under another name and renamed, so that nobody meets it before its mode is right, and
    // the dead socket is replaced in one step.
    let fresh = path.with_file_name(format!(".{}", std::process::id()));
    let _ = fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(failed("listen on the socket"))?;
    let ready = (|| {
        if let Some(group) = access.groups.first() {
            chown(&fresh, None, Some(*group))?;
        }
        fs::set_permissions(&fresh, Permissions::from_mode(mode(access)))?;
        fs::rename(&fresh, path)?;
        identity(path)
    })();
    match ready {
        Ok(identity) => Ok((listener, Socket { path: path.to_owned(), identity })),
        Err(error) => {
            let _ = fs::remove_file(&fresh);
            Err(failed("set owner and mode of the socket")(error))
        }
    }
}

/// The file mode can name one user and one group. Where more may connect, the file lets everybody
/// in and the check of each connection decides.
fn mode(access: &Access) -> u32 {
    if access.users.is_empty() && access.groups.len() <= 1 { 0o660 } else { 0o666 }
}

/// Refuses where a daemon answers at `path`, or something is there that is no socket.
///
/// # Errors
/// In these cases, and where the system does not let it look.
pub fn refuse_live(path: &Path) -> Result<(), SocketError> {
    let in_the_way = |source| SocketError::System { what: "look at", path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(in_the_way(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(stream) => {
            let peer = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials).ok();
            Err(SocketError::InUse { path: path.to_owned(), pid: peer.map(|peer| peer.pid()) })
        }
        // Nobody listens: its daemon died without removing it.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(in_the_way(error)),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// None: the kernel does not tell.
    pub uid: Option<u32>,
    /// Its process, where the kernel tells.
    pub pid: Option<i32>,
    /// Its groups, the effective one first.
    pub groups: Vec<u32>,
}

impl Peer {
    fn of(stream: &UnixStream) -> Self {
        let Ok(credentials) = stream.peer_cred() else { return Self::default() };
        let mut groups = vec![credentials.gid()];
        groups.extend(supplementary_groups(stream));
        Self { uid: Some(credentials.uid()), pid: credentials.pid(), groups }
    }

    /// Whether `access` lets it in; `own_uid` is the user that the daemon runs as.
    #[must_use]
    pub fn may_connect(&self, access: &Access, own_uid: u32) -> bool {
        let Some(uid) = self.uid else { return false };
        uid == 0
            || uid == own_uid
            || access.users.contains(&uid)
            || self.groups.iter().any(|group| access.groups.contains(group))
    }
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self::of(stream.io())
    }
}

/// The groups of the peer when it connected (SO_PEERGROUPS, Linux 4.13).
fn supplementary_groups(stream: &UnixStream) -> Vec<u32> {
    let mut groups = vec![0_u32; GROUPS_READ];
    let mut bytes = (groups.len() * size_of::<u32>()) as libc::socklen_t;
    // SAFETY: the kernel writes at most `bytes` bytes to the vector, which has that many, and
    // leaves in `bytes` how many it wrote.
    let result = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    if result != 0 {
        return Vec::new();
    }
    groups.truncate(bytes as usize / size_of::<u32>());
    groups
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn who_may_connect() {
        let access = Access { users: BTreeSet::from([1_000]), groups: BTreeSet::from([50]) };
        let peer = |uid, groups: &[u32]| Peer { uid, pid: None, groups: groups.to_vec() };
        for (name, peer, allowed) in [
            ("root", peer(Some(0), &[0]), true),
            ("the daemon's user", peer(Some(77), &[77]), true),
            ("a listed user", peer(Some(1_000), &[9]), true),
            ("a stranger", peer(Some(2_000), &[9]), false),
            ("by a supplementary group", peer(Some(2_000), &[9, 50]), true),
            ("unknown to the kernel", peer(None, &[50]), false),
        ] {
            assert_eq!(peer.may_connect(&access, 77), allowed, "{name}");
        }
    }

    #[test]
    fn the_mode_keeps_out_whom_it_can() {
        let access = |users: &[u32], groups: &[u32]| Access {
            users: users.iter().copied().collect(),
            groups: groups.iter().copied().collect(),
        };
        assert_eq!(mode(&access(&[], &[])), 0o660);
        assert_eq!(mode(&access(&[], &[50])), 0o660);
        assert_eq!(mode(&access(&[1_000], &[])), 0o666);
        assert_eq!(mode(&access(&[], &[50, 51])), 0o666);
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("missing/qosd.sock");
        drop(bind(&path, &Access::default()).expect("makes the directory"));
        drop(std::os::unix::net::UnixListener::bind(&path).expect("first socket"));
        assert!(path.exists(), "closing a socket leaves its file");

        let (listener, socket) = bind(&path, &Access::default()).expect("replaces the dead one");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o660);

        let error = bind(&path, &Access::default()).expect_err("lives").to_string();
        let own_pid = std::process::id();
        assert!(error.starts_with(&format!("another qosd (pid {own_pid}) answers on ")), "{error}");

        drop((listener, socket));
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_left_alone() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("qosd.sock");
        fs::write(&path, "precious").expect("written");
        let error = bind(&path, &Access::default()).expect_err("in the way").to_string();
        assert!(error.contains("exists and is not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).expect("still there"), "precious");
    }
}
