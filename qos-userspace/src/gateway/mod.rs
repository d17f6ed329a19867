//! What makes one Linux box deliver levels: kernel programs, maps, interfaces, egress scheduling.

pub mod link;
mod netlink;
pub mod scheduler;
