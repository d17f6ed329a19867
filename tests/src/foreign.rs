//! Programs of somebody else's on an interface's hooks. They pass everything on.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};

use crate::netlink::Netlink;
use crate::netns::Namespace;

/// Name of each of them.
pub const NAME: &str = "somebodys";

/// `XDP_FLAGS_SKB_MODE` of linux/if_link.h: in the stack.
pub const GENERIC: u32 = 1 << 1;
/// `BPF_F_BEFORE` of linux/bpf.h: before all that are there.
pub const BEFORE: u32 = 1 << 3;
/// `BPF_F_AFTER`, likewise: behind them.
pub const AFTER: u32 = 1 << 4;

/// A hook of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP.
    Xdp,
    /// tc ingress, by tcx.
    Ingress,
    /// tc egress, by tcx.
    Egress,
}

/// A program on a hook; detached when dropped.
#[derive(Debug)]
pub struct Foreign {
    program: OwnedFd,
    _link: Option<OwnedFd>,
}

impl Foreign {
    /// Attaches one to a link. `flags`: [`GENERIC`] for XDP in the stack, [`BEFORE`] or [`AFTER`] on tcx,
    /// zero for the driver's hook or the end of the chain.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(gateway: &Namespace, link: &str, hook: Hook, flags: u32) -> Result<Self> {
        // linux/bpf.h: command and attach types, `union bpf_attr` for tcx, of which XDP takes the start.
        const BPF_LINK_CREATE: libc::c_long = 28;
        let (kind, attach_type) = match hook {
            Hook::Xdp => (Kind::Xdp, 37_u32),
            Hook::Ingress => (Kind::Classifier, 46),
            Hook::Egress => (Kind::Classifier, 47),
        };
        let program = load(kind)?;
        let index = Netlink::open(gateway)?.link(link)?.index;
        let create = [program.as_raw_fd() as u32, index, attach_type, flags, 0, 0, 0, 0];
        let link = gateway
            .run(|| bpf(BPF_LINK_CREATE, create.as_ptr().cast(), size_of_val(&create)))
            .with_context(|| format!("attaching to {hook:?} of {link}"))?;
        Ok(Self { program, _link: Some(link) })
    }

    /// Loads one for tc and attaches it nowhere.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn loaded() -> Result<Self> {
        Ok(Self { program: load(Kind::Classifier)?, _link: None })
    }

    /// Its program.
    #[must_use]
    pub fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Classifier = 3,
    Xdp = 6,
}

fn load(kind: Kind) -> Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    #[repr(C)]
    struct Load {
        kind: u32,
        instructions: u32,
        code: u64,
        license: u64,
        log: [u32; 2],
        log_buffer: u64,
        kernel: u32,
        flags: u32,
        name: [u8; 16],
    }
    // r0 = XDP_PASS or TCX_NEXT; exit
    let verdict: u64 = match kind {
        Kind::Xdp => 2,
        Kind::Classifier => 0xffff_ffff,
    };
    let code: [u64; 2] = [verdict << 32 | 0xb7, 0x95];
    let mut name = [0; 16];
    name[..NAME.len()].copy_from_slice(NAME.as_bytes());
    let load = Load {
        kind: kind as u32,
        instructions: 2,
        code: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log: [0; 2],
        log_buffer: 0,
        kernel: 0,
        flags: 0,
        name,
    };
    bpf(BPF_PROG_LOAD, (&raw const load).cast(), size_of::<Load>()).context("loading a program")
}

fn bpf(command: libc::c_long, attributes: *const libc::c_void, size: usize) -> io::Result<OwnedFd> {
    // SAFETY: the attributes, and what they point to, outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both commands return a descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
