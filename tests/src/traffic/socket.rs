//! Socket plumbing that the standard library lacks: options, batches, kernel receive stamps.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};
use nix::time::{ClockId, clock_gettime};

use crate::netns::Namespace;

/// Messages a batch call moves at most.
pub(super) const BATCH: usize = 64;
/// Start of a UDP flow's payload: sequence number, time of sending, flow number.
pub(super) const HEAD: usize = 20;

/// A socket of `namespace`, bound to `local`.
pub(super) fn bound(namespace: &Namespace, kind: SockType, local: SocketAddr) -> Result<OwnedFd> {
    let family = if local.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let made = namespace.run(|| socket(family, kind, SockFlag::SOCK_CLOEXEC, None));
    let fd = made.with_context(|| format!("socket in namespace {}", namespace.name()))?;
    if kind == SockType::Stream {
        setsockopt(&fd, sockopt::ReuseAddr, &true).context("SO_REUSEADDR")?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(local))
        .with_context(|| format!("binding {local} in namespace {}", namespace.name()))?;
    Ok(fd)
}

/// Sets the DSCP (0 to 63) of what the socket sends.
pub(super) fn set_dscp(fd: &impl AsFd, is_v4: bool, dscp: u8) -> Result<()> {
    let octet = i32::from(dscp) << 2;
    if is_v4 { setsockopt(fd, sockopt::Ipv4Tos, &octet) } else { setsockopt(fd, sockopt::Ipv6TClass, &octet) }
        .with_context(|| format!("marking a socket with DSCP {dscp}"))
}

/// Reads a plain-old-data socket option; what the kernel doesn't fill stays zero.
///
/// # Safety
/// Every bit pattern must be a valid `T`.
pub(super) unsafe fn get_option<T>(fd: &impl AsFd, level: i32, option: i32) -> io::Result<T> {
    // SAFETY: by the function's contract zeros are a valid T.
    let mut value: T = unsafe { zeroed() };
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `value`.
    let result = unsafe {
        libc::getsockopt(fd.as_fd().as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut length)
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// MTU of a connected socket's path.
pub(super) fn path_mtu(fd: &impl AsFd, is_v4: bool) -> Result<u32> {
    let (level, option) =
        if is_v4 { (libc::IPPROTO_IP, libc::IP_MTU) } else { (libc::IPPROTO_IPV6, libc::IPV6_MTU) };
    // SAFETY: any bits are an i32.
    let mtu: i32 = unsafe { get_option(fd, level, option) }.context("path MTU")?;
    Ok(mtu.unsigned_abs())
}

/// Packets that overran the socket's receive buffer since it was made.
pub(super) fn receive_drops(fd: &impl AsFd) -> Result<u64> {
    /// `SK_MEMINFO_DROPS` of linux/sock_diag.h.
    const DROPS: usize = 8;
    // SAFETY: any bits are numbers.
    let numbers: [u32; 9] =
        unsafe { get_option(fd, libc::SOL_SOCKET, libc::SO_MEMINFO) }.context("SO_MEMINFO")?;
    Ok(u64::from(numbers[DROPS]))
}

/// `CLOCK_REALTIME` in ns: the clock of the kernel's receive stamps.
pub(super) fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_REALTIME).expect("the clock exists on every Linux");
    time.tv_sec().cast_unsigned() * 1_000_000_000 + time.tv_nsec().cast_unsigned()
}

/// Sends `heads.len()` datagrams on a connected socket, each its head followed by `padding`, and
/// returns how many were taken.
pub(super) fn send_batch(fd: &impl AsFd, heads: &mut [[u8; HEAD]], padding: &mut [u8]) -> io::Result<usize> {
    // SAFETY: zeros are valid for these C structures.
    let (mut vectors, mut messages): ([[libc::iovec; 2]; BATCH], [libc::mmsghdr; BATCH]) =
        unsafe { (zeroed(), zeroed()) };
    for ((vector, message), head) in vectors.iter_mut().zip(&mut messages).zip(heads.iter_mut()) {
        vector[0] = libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: HEAD };
        vector[1] = libc::iovec { iov_base: padding.as_mut_ptr().cast(), iov_len: padding.len() };
        message.msg_hdr.msg_iov = vector.as_mut_ptr();
        message.msg_hdr.msg_iovlen = 2;
    }
    let count = heads.len().min(BATCH) as u32;
    // SAFETY: the first `count` messages point to vectors, heads and padding that outlive the call.
    let taken = unsafe { libc::sendmmsg(fd.as_fd().as_raw_fd(), messages.as_mut_ptr(), count, 0) };
    if taken < 0 { Err(io::Error::last_os_error()) } else { Ok(taken.unsigned_abs() as usize) }
}

/// A datagram's head and when the kernel received it.
pub(super) struct Received {
    pub(super) head: [u8; HEAD],
    /// Length of the UDP payload.
    pub(super) length: u32,
    /// ns of [`now`]'s clock.
    pub(super) at: u64,
}

/// Waits for a datagram, up to the socket's receive timeout, and hands it and those behind it, up
/// to [`BATCH`], to `take`. Returns how many there were.
///
/// The socket must have `SO_TIMESTAMPNS` set.
pub(super) fn receive_batch(fd: &impl AsFd, mut take: impl FnMut(Received)) -> io::Result<usize> {
    /// Room and alignment for one `SCM_TIMESTAMPNS`.
    type Control = [u64; 8];

    let mut heads = [[0_u8; HEAD]; BATCH];
    let mut controls: [Control; BATCH] = [[0; 8]; BATCH];
    // SAFETY: zeros are valid for these C structures.
    let (mut vectors, mut messages): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) =
        unsafe { (zeroed(), zeroed()) };
    for (((vector, message), head), control) in
        vectors.iter_mut().zip(&mut messages).zip(&mut heads).zip(&mut controls)
    {
        *vector = libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: HEAD };
        message.msg_hdr.msg_iov = vector;
        message.msg_hdr.msg_iovlen = 1;
        message.msg_hdr.msg_control = control.as_mut_ptr().cast();
        message.msg_hdr.msg_controllen = size_of::<Control>();
    }
    // MSG_TRUNC: the length is the datagram's own, though only its head is copied.
    let flags = libc::MSG_WAITFORONE | libc::MSG_TRUNC;
    // SAFETY: all messages point to vectors, heads and controls that outlive the call.
    let count = unsafe {
        libc::recvmmsg(
            fd.as_fd().as_raw_fd(),
            messages.as_mut_ptr(),
            BATCH as u32,
            flags,
            std::ptr::null_mut(),
        )
    };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    let count = count.unsigned_abs() as usize;
    for index in 0..count {
        let at = kernel_stamp(&messages[index].msg_hdr).unwrap_or_else(now);
        take(Received { head: heads[index], length: messages[index].msg_len, at });
    }
    Ok(count)
}

fn kernel_stamp(message: &libc::msghdr) -> Option<u64> {
    // SAFETY: the kernel has filled the control buffer that the header points to and set its
    // length; the macros stay within it.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(message);
        while !control.is_null() {
            if (*control).cmsg_level == libc::SOL_SOCKET && (*control).cmsg_type == libc::SCM_TIMESTAMPNS {
                let time: libc::timespec = libc::CMSG_DATA(control).cast::<libc::timespec>().read_unaligned();
                return Some(time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned());
            }
            control = libc::CMSG_NXTHDR(message, control);
        }
    }
    None
}
