//! Types and arithmetic that the kernel programs and userspace share.
//!
//! Everything here is `no_std`, allocates nothing, does no IO and is tested on the host; the
//! kernel programs call the very same functions. What depends on a kernel helper, a map or an
//! operating system belongs elsewhere.
#![no_std]
// The value types of maps are written to memory that another program reads: their layout is
// checked beside each of them, and their conversion to bytes is confined to `pod`.

pub mod abi;
pub mod checksum;
pub mod classify;
pub mod clock;
pub mod compact;
pub mod length;
pub mod mark;
pub mod mss;
#[cfg(feature = "user")]
mod pod;
